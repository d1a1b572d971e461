"""One of several pytrees by a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import trees
from curvax.trees import choices
from tests.trees.cases import several


def test_choosing_outside_of_jit_compiles_once():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    other = trees.scale(1.0, tree)
    trees.choose(jnp.array(0), tree, other)
    before = choices._branch._cache_size()
    for number in (0, 1, 1):
        trees.choose(jnp.array(number), tree, other)
    assert choices._branch._cache_size() == before


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_a_tree_is_chosen_leaf_by_leaf_whatever_their_sizes(number):
    a, b, c, _ = several()
    b = {**b, "kernel": a["kernel"]}
    c = {**c, "kernel": a["kernel"]}
    chosen = jax.jit(trees.choose)(jnp.int32(number), a, b, c)
    jax.tree.map(np.testing.assert_array_equal, chosen, (a, b, c)[min(number, 2)])
    batched = jax.vmap(lambda n: trees.choose(n, a, b, c))(jnp.array([number, 0], jnp.int32))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y), batched, chosen)
