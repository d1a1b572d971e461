"""Inner products, norms and largest magnitudes of pytrees, and what is not finite in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import trees
from curvax.trees import SMALL
from tests.trees.cases import several


def test_several_inner_products_are_those_of_each_pair():
    a, b, c, d = several()
    together = jax.jit(lambda *pairs: trees.vdots(*pairs))((a, b), (c, c), (a, d))
    assert together.dtype == jnp.float32
    for found, pair in zip(np.asarray(together), ((a, b), (c, c), (a, d)), strict=True):
        x, y = (np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)]) for tree in pair)
        assert abs(found - x @ y) < 1e-6 * np.linalg.norm(x) * np.linalg.norm(y)


@pytest.mark.parametrize("place", ["large", "half", "kernel", "scalar"])
@pytest.mark.parametrize("entry", [-100.0, jnp.inf, jnp.nan])
def test_the_largest_entries_of_several_trees_wherever_they_stand(place, entry):
    a, b, c, _ = several()
    b = {**b, place: b[place].at[(-1,) * b[place].ndim].set(entry)}
    together, apart = jax.jit(lambda *all: (trees.largests(*all), [trees.largest(tree) for tree in all]))(a, b, c)
    np.testing.assert_array_equal(together, apart)
    assert together[1] == 100 if np.isfinite(entry) else not np.isfinite(together[1])


@pytest.mark.parametrize("size", [10, 3000, 5000, SMALL, SMALL + 1, 100_000])
@pytest.mark.parametrize("entry", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_entry_that_is_not_finite_is_found_in_leaves_of_all_sizes(size, entry):
    whole = jnp.linspace(-1e38, 1e38, size, dtype=jnp.float32)
    finite = jax.jit(trees.all_finite)
    assert finite({"a": whole, "b": jnp.ones(3)})
    assert finite({"a": jnp.full_like(whole, 3e38), "b": jnp.ones(3)})
    for place in (0, size // 2, -1):
        assert not finite({"a": whole.at[place].set(entry), "b": jnp.ones(3)})


def test_what_is_complex_half_or_empty_is_looked_at_as_well():
    leaves = [jnp.full(5, 1 + 1j, jnp.complex64), jnp.ones(20_000, jnp.complex64), jnp.ones(3, jnp.bfloat16)]
    finite = jax.jit(lambda *leaves: trees.all_finite(leaves, jnp.zeros((0, 3)), jnp.arange(3)))
    assert finite(*leaves)
    assert trees.all_finite([])
    for number, leaf in enumerate(leaves):
        bad = [*leaves[:number], leaf.at[2].set(jnp.nan), *leaves[number + 1 :]]
        assert not finite(*bad)


def test_several_at_once_under_vmap_and_on_a_mesh():
    a, b, _, _ = several()

    def figures(x):
        y = trees.scale(2.0, x)
        return trees.vdots((x, b), (x, y)), trees.largests(x, y), trees.are_finite(x, y), trees.norms(x, y)

    def lane(tree):
        return jax.tree.map(lambda leaf: leaf[0], tree)

    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, trees.scale(3.0, b))
    alone, together = jax.jit(lambda batch: (figures(lane(batch)), lane(jax.vmap(figures)(batch))))(batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), alone, together)

    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    placed = jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    beside = jax.device_put(b, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    on_mesh = jax.jit(lambda x, y: (trees.vdots((x, y)), trees.largests(x), trees.are_finite(x), trees.norms(x)))
    for x, y in zip(on_mesh(placed, beside), on_mesh(a, b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_trees_of_other_structures_are_refused():
    for other in ({"a": jnp.ones(2), "b": jnp.ones(2)}, [jnp.ones(2)], {"b": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r"(?i)dict"):
            trees.vdot({"a": jnp.ones(2)}, other)


def test_leaves_of_other_shapes_are_refused_even_where_all_together_have_as_many_entries():
    for left, right in (({"w": (2, 3)}, {"w": (3, 2)}), ({"a": (2,), "b": (3,)}, {"a": (3,), "b": (2,)})):
        left, right = ({name: jnp.ones(shape) for name, shape in sizes.items()} for sizes in (left, right))
        with pytest.raises(ValueError, match="shapes"):
            trees.vdot(left, right)


def test_sums_of_nothing():
    assert trees.vdots().shape == trees.norms().shape == trees.largests().shape == trees.are_finite().shape == (0,)
    assert [float(trees.vdot([], [])), float(trees.norm([])), float(trees.norm([jnp.zeros((0, 2))]))] == [0.0] * 3
