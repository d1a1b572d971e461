import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import estimators

SIZE, STEPS, SAMPLES = 24, 6, 400
VALUES = np.r_[-1, np.linspace(0, 1, SIZE - 3), 8, 10]


@pytest.fixture
def density(dense_map, symmetric):
    def make(values, dtype=jnp.float64):
        return compiled(dense_map(symmetric(values), dtype))

    return make


@jax.jit
def compiled(linear_map):
    """The samples of four keys together."""

    def one(key):
        return estimators.spectral_density(linear_map, key, num_steps=STEPS, num_samples=SAMPLES // 4)

    return jax.tree.map(jnp.concatenate, jax.vmap(one)(jax.random.split(jax.random.key(0), 4)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_weights_of_each_sample_sum_to_one_and_nodes_lie_in_the_spectrum(dtype, density):
    result = density(VALUES, dtype)
    atol = 1e-5 if dtype == jnp.float32 else 1e-12
    assert result.nodes.shape == result.weights.shape == (SAMPLES, STEPS)
    assert result.nodes.dtype == dtype
    np.testing.assert_allclose(np.sum(result.weights, axis=1), np.ones(SAMPLES), rtol=atol)
    assert np.all(np.asarray(result.weights) >= 0)
    assert np.min(result.nodes) >= -1 - atol
    assert np.max(result.nodes) <= 10 + atol
    np.testing.assert_allclose(np.median(result.nodes[:, -1]), 10, atol=2e-3)  # the ends settle first


def test_moments_are_unbiased_to_degree_2k_minus_1(density):
    result = density(VALUES)
    for degree in range(1, 2 * STEPS):
        moments = np.sum(np.asarray(result.weights * result.nodes**degree), axis=1)
        four = 4 * np.std(moments, ddof=1) / np.sqrt(SAMPLES)
        assert abs(np.mean(moments) - np.mean(VALUES**degree)) < four
    squares = np.sum(np.asarray(result.weights * result.nodes**2), axis=1)
    np.testing.assert_allclose(np.mean(squares), np.mean(VALUES**2), rtol=0.1)


def test_evaluate_is_the_smoothed_density(density):
    few = np.r_[np.zeros(SIZE - 8), np.full(6, 3), -2, 5]  # four distinct values: the quadrature finds each
    result = density(few)
    grid = np.linspace(-6, 9, 300).reshape(3, 100)
    evaluate = jax.jit(lambda result, grid: result.evaluate(grid, 0.4))
    smoothed = evaluate(result, grid)
    exact = np.mean(np.exp(-0.5 * ((grid[..., None] - few) / 0.4) ** 2) / (0.4 * np.sqrt(2 * np.pi)), axis=-1)
    assert smoothed.shape == grid.shape
    np.testing.assert_allclose(smoothed, exact, atol=0.02)
    fine = np.linspace(-6, 9, 3001)
    np.testing.assert_allclose(np.sum(evaluate(result, fine)) * 15 / 3000, 1, rtol=1e-9)


def test_cumulative_counts_eigenvalues(density):
    few = np.r_[np.zeros(SIZE - 8), np.full(6, 3), -2, 5]
    grid = jnp.array([-3.0, -1.0, 1.0, 4.0, 6.0])
    np.testing.assert_allclose(density(few).cumulative(grid), [0, 1 / 24, 17 / 24, 23 / 24, 1], atol=0.02)
    assert density(few).cumulative(jnp.array(1.0)).shape == ()


def test_density_of_the_identity_is_one_point(density):
    result = density(np.ones(SIZE), jnp.float32)
    np.testing.assert_allclose(result.nodes, np.ones((SAMPLES, STEPS)), rtol=1e-6)
    np.testing.assert_array_equal(result.weights[:, 0], np.ones(SAMPLES))


def test_errors(dense_map):
    with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
        estimators.spectral_density(dense_map(np.eye(SIZE)), jax.random.key(0), num_steps=3, num_samples=0)
