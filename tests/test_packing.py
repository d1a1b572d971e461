"""Small leaves joined to one vector: there and back, and what stays apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from curvax.packing import packing_of
from curvax.trees import SMALL


def _tree():
    return {
        "large": np.arange(SMALL + 1.0, dtype=np.float32),
        "half": np.ones((2, 3), jnp.bfloat16),
        "kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(7.0, np.float32),
    }


def test_there_and_back_with_leading_axes():
    tree = jax.tree.map(jnp.asarray, _tree())
    packing = packing_of(tree)
    assert [array.shape for array in packing.pack(tree)] == [(2, 3), (7,), (SMALL + 1,)]
    there_and_back = jax.jit(lambda block: packing.unpack(packing.pack(block)))
    for lead in ((), (4,), (2, 3)):
        block = jax.tree.map(lambda leaf, lead=lead: np.broadcast_to(leaf, (*lead, *leaf.shape)), tree)
        back = there_and_back(block)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), back) == jax.tree.map(lambda x: (x.shape, x.dtype), block)
        jax.tree.map(np.testing.assert_array_equal, back, block)


def test_leaves_on_a_mesh_stay_apart():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = jax.device_put([jnp.ones(2), jnp.ones(3)], place)
    assert [array.shape for array in packing_of(tree).pack(tree)] == [(2,), (3,)]
    assert [array.shape for array in packing_of([jnp.ones(2), jnp.ones(3)]).pack(tree)] == [(5,)]


def test_a_result_of_another_shape_is_named_by_its_leaf():

    @jax.jit
    def solve(b):
        return curvax.solvers.cg(lambda v: {"a": v["a"], "b": v["b"][:2]}, b, max_iterations=2, tolerance=0.0)

    with pytest.raises(ValueError, match=r"the result of matvec\['b'\] has shape \(2,\)"):
        solve({"a": np.ones(2), "b": np.ones(3)})


@pytest.mark.parametrize("solver", ["cg", "steihaug"])
def test_solvers_give_pytrees_to_the_functions_of_the_caller(solver):
    """One matrix that couples all leaves."""
    sizes = {"a": (2, 2), "b": (3,), "c": ()}
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    matrix = np.asarray(root @ root.T + np.eye(8), np.float32)
    b = {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in sizes.items()}
    seen = []

    def matvec(v):
        seen.append(jax.tree.map(jnp.shape, v))
        return curvax.trees.unravel(matrix @ curvax.trees.ravel(v), v)

    def precondition(r):
        seen.append(jax.tree.map(jnp.shape, r))
        return jax.tree.map(lambda leaf: 0.5 * leaf, r)

    options = {"radius": 1e6} if solver == "steihaug" else {}
    options |= {"preconditioner": precondition, "max_iterations": 30, "tolerance": 1e-6}
    found = jax.jit(lambda b: getattr(curvax.solvers, solver)(matvec, b, **options))(b)
    assert all(shapes == sizes for shapes in seen)
    exact = np.linalg.solve(matrix.astype(np.float64), np.concatenate([leaf.ravel() for leaf in b.values()]))
    value = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.value)])
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-5)


def _pairs():
    """Trees of one structure whose leaves are small, large, empty and of several dtypes."""
    generator = np.random.default_rng(0)
    return [
        jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), _tree()) for _ in "abcd"
    ]


def test_several_inner_products_are_those_of_each_pair():
    a, b, c, d = _pairs()
    together = jax.jit(lambda *pairs: trees.vdots(*pairs))((a, b), (c, c), (a, d))
    assert together.dtype == jnp.float32
    for found, pair in zip(np.asarray(together), ((a, b), (c, c), (a, d)), strict=True):
        x, y = (np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)]) for tree in pair)
        assert abs(found - x @ y) < 1e-6 * np.linalg.norm(x) * np.linalg.norm(y)


@pytest.mark.parametrize("place", ["large", "half", "kernel", "scalar"])
@pytest.mark.parametrize("entry", [-100.0, jnp.inf, jnp.nan])
def test_the_largest_entries_of_several_trees_wherever_they_stand(place, entry):
    a, b, c, _ = _pairs()
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
    a, b, _, _ = _pairs()

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


def test_choosing_outside_of_jit_compiles_once():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    other = trees.scale(1.0, tree)
    trees.choose(jnp.array(0), tree, other)
    before = trees._branch._cache_size()
    for number in (0, 1, 1):
        trees.choose(jnp.array(number), tree, other)
    assert trees._branch._cache_size() == before


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_a_tree_is_chosen_leaf_by_leaf_whatever_their_sizes(number):
    a, b, c, _ = _pairs()
    b = {**b, "kernel": a["kernel"]}
    c = {**c, "kernel": a["kernel"]}
    chosen = jax.jit(trees.choose)(jnp.int32(number), a, b, c)
    jax.tree.map(np.testing.assert_array_equal, chosen, (a, b, c)[min(number, 2)])
    several = jax.vmap(lambda n: trees.choose(n, a, b, c))(jnp.array([number, 0], jnp.int32))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), several, chosen)
