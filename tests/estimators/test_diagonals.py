import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import estimators, trees

SIZE, SAMPLES, COUNT = 12, 6, 4000


@functools.cache
def compiled(distribution):
    keys = jax.random.split(jax.random.key(0), COUNT)

    def one(linear_map, key):
        estimate = estimators.hutchinson_diagonal(linear_map, key, num_samples=SAMPLES, distribution=distribution)
        return trees.ravel(estimate)

    return jax.jit(lambda linear_map: jax.vmap(functools.partial(one, linear_map))(keys))


def many(distribution, linear_map):
    return np.asarray(compiled(distribution)(linear_map), float)


@pytest.mark.parametrize(
    ("distribution", "effective"), [(trees.random_rademacher, SAMPLES), (trees.random_normal, SAMPLES - 2)]
)
def test_unbiased_with_the_variance_of_the_formula(distribution, effective, dense_map, symmetric, assert_unbiased):
    matrix = symmetric(np.linspace(2, 6, SIZE))
    estimates = many(distribution, dense_map(matrix))
    assert_unbiased(estimates, np.diag(matrix))
    off_diagonal = np.sum(matrix**2, axis=1) - np.diag(matrix) ** 2
    np.testing.assert_allclose(np.var(estimates, axis=0), off_diagonal / effective, rtol=0.25)


@pytest.mark.parametrize("distribution", [trees.random_rademacher, trees.random_normal])
def test_exact_for_diagonal_maps_at_any_scale(distribution, dense_map):
    for scale in (1.0, 1e-20, 1e20):
        diagonal = scale * np.linspace(-3, 5, SIZE)
        estimates = many(distribution, dense_map(np.diag(diagonal)))
        np.testing.assert_allclose(estimates, np.broadcast_to(diagonal, estimates.shape), rtol=1e-13)


def test_structure_of_the_map_in_single_precision_at_least():
    entries = {"half": jnp.full((2, 3), 1.5, jnp.bfloat16), "single": jnp.ones((), jnp.float32), "double": jnp.ones(2)}
    result = estimators.hutchinson_diagonal(curvax.Diagonal(entries), jax.random.key(0), num_samples=3)
    wide = {"half": jnp.float32, "single": jnp.float32, "double": jnp.float64}
    assert {name: leaf.dtype for name, leaf in result.items()} == wide
    for name, leaf in result.items():
        np.testing.assert_array_equal(leaf, np.asarray(entries[name], leaf.dtype))


def test_narrow_leaves_are_accumulated_in_float32():
    # In bfloat16 the sum of 1000 ones would stop at 256.
    linear_map = curvax.Diagonal({"half": jnp.ones(4, jnp.bfloat16)})
    result = estimators.hutchinson_diagonal(linear_map, jax.random.key(0), num_samples=1000)
    np.testing.assert_array_equal(np.asarray(result["half"], float), 1)


def test_errors():
    with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
        estimators.hutchinson_diagonal(curvax.Diagonal(jnp.ones(3)), jax.random.key(0), num_samples=0)
