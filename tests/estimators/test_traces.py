import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import estimators
from curvax.matrices.linear_map import LinearMap

ESTIMATORS = {
    "rademacher": lambda a, k, m: estimators.hutchinson_trace(a, k, num_samples=m),
    "normal": lambda a, k, m: estimators.hutchinson_trace(a, k, num_samples=m, distribution=curvax.trees.random_normal),
    "hutch++": lambda a, k, m: estimators.hutch_plus_plus(a, k, num_products=m),
    "xtrace": lambda a, k, m: estimators.xtrace(a, k, num_products=m),
}
SIZE, PRODUCTS, COUNT = 30, 18, 1500
INDEFINITE = np.linspace(-1, 4, SIZE)
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@functools.cache
def compiled(name):
    """The estimates of all keys; every test that can uses these few programs."""
    keys = jax.random.split(jax.random.key(1), COUNT)
    return jax.jit(lambda linear_map: jax.vmap(lambda key: ESTIMATORS[name](linear_map, key, PRODUCTS))(keys))


def many(name, linear_map):
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), compiled(name)(linear_map))


def padded(*values):
    return np.concatenate([values, np.zeros(SIZE - len(values))])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased_with_a_standard_error_that_tells_the_spread(name, dense_map, symmetric, assert_unbiased):
    estimates = many(name, dense_map(symmetric(INDEFINITE)))
    assert_unbiased(estimates.value, np.sum(INDEFINITE))
    # Exact in the mean of squares for independent samples, and for XTrace by the covariance that is added.
    ratio = np.mean(np.square(estimates.standard_error)) / np.var(estimates.value)
    assert abs(ratio - 1) < 0.15


@pytest.mark.parametrize("name", ["rademacher", "hutch++", "xtrace"])
def test_standard_errors_tell_the_spread_on_all_kinds_of_spectra(name, dense_map, symmetric):
    numbers = np.arange(1, SIZE + 1)
    spectra = {
        "flat": np.linspace(1, 2, SIZE),
        "indefinite": np.linspace(-3, 3.5, SIZE),
        "geometric": 0.8**numbers,
        "harmonic": 1 / numbers,
        "two levels": np.where(numbers <= 5, 10.0, 1.0),
    }
    for kind, values in spectra.items():
        estimates = many(name, dense_map(symmetric(values)))
        ratio = np.sqrt(np.mean(np.square(estimates.standard_error)) / np.var(estimates.value))
        # Noise of the covariance is cut off at zero, which errs on the safe side where the estimates hardly correlate.
        assert 0.88 < ratio < 1.25, (kind, ratio)


def test_variance_of_hutchinson_is_the_formula(dense_map, symmetric):
    matrix = symmetric(INDEFINITE)
    squares, diagonal = np.sum(matrix**2), np.sum(np.diag(matrix) ** 2)
    for name, variance in (("rademacher", 2 * (squares - diagonal) / PRODUCTS), ("normal", 2 * squares / PRODUCTS)):
        np.testing.assert_allclose(np.var(many(name, dense_map(matrix)).value), variance, rtol=0.12)
    diagonal = many("rademacher", dense_map(np.diag(INDEFINITE)))
    np.testing.assert_allclose(diagonal.value, np.sum(INDEFINITE), rtol=1e-12)


@DTYPES
@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_exact_for_maps_of_low_rank_at_any_scale(name, dtype, dense_map, symmetric):
    rtol = 1e-5 if dtype == jnp.float32 else 1e-13
    for values in (padded(3), padded(5, 4, 3, -2, 1), padded(1e3, 1, 1, -1e-2), padded(6, 5, 4, 3, 2, 1)):
        for scale in (1.0, 1e-8, 1e8) if dtype == jnp.float32 else (1.0, 1e-20, 1e20):
            result = many(name, dense_map(scale * symmetric(values), dtype))
            np.testing.assert_allclose(result.value / scale, np.full(COUNT, np.sum(values)), rtol=rtol)
            assert np.max(result.standard_error) <= rtol * scale * np.max(values)
    zero = many(name, dense_map(np.zeros((SIZE, SIZE)), dtype))
    assert np.all(zero.value == 0)
    assert np.all(zero.standard_error == 0)


@DTYPES
def test_xtrace_is_exact_for_the_identity(dtype, dense_map):
    result = many("xtrace", dense_map(7 * np.eye(SIZE), dtype))
    np.testing.assert_allclose(result.value, np.full(COUNT, 7.0 * SIZE), rtol=1e-6 if dtype == jnp.float32 else 1e-14)


def test_error_falls_from_hutchinson_to_hutch_plus_plus_to_xtrace_on_a_decaying_spectrum(dense_map, symmetric):
    values = 0.4 ** np.arange(SIZE)
    linear_map = dense_map(symmetric(values))
    errors = {}
    for name in ("rademacher", "hutch++", "xtrace"):
        errors[name] = np.sqrt(np.mean((many(name, linear_map).value / np.sum(values) - 1) ** 2))
    assert errors["xtrace"] < errors["hutch++"] / 3
    assert errors["hutch++"] < errors["rademacher"] / 10


@DTYPES
def test_xtrace_where_the_sketch_is_singular_to_working_precision(dtype, dense_map, symmetric):
    values = (10.0 if dtype == jnp.float32 else 100.0) ** -np.arange(SIZE)
    estimates = many("xtrace", dense_map(symmetric(values), dtype)).value
    np.testing.assert_allclose(estimates, np.full(COUNT, np.sum(values)), rtol=3e-5 if dtype == jnp.float32 else 2e-13)


class Recording(LinearMap):
    """A dense map that keeps the blocks of vectors it was given."""

    def __init__(self, matrix):
        self.matrix, self.blocks = matrix, []

    @property
    def structure(self):
        return jax.ShapeDtypeStruct(self.matrix.shape[:1], self.matrix.dtype)

    def __call__(self, vector):
        return self.matrix @ vector

    def block(self, vectors):
        self.blocks.append(vectors)
        return vectors @ self.matrix


def recorded(estimator, matrix, num_products, seed=3):
    def run(matrix, key):
        linear_map = Recording(matrix)
        return estimator(linear_map, key, num_products=num_products), linear_map.blocks

    result, blocks = jax.jit(run)(jnp.asarray(matrix), jax.random.key(seed))
    return result, [np.asarray(block).T for block in blocks]


def test_xtrace_is_the_mean_of_the_leave_one_out_estimates(symmetric):
    matrix = symmetric(np.linspace(-1, 4, 12))
    result, (tests, _) = recorded(estimators.xtrace, matrix, 10, seed=0)
    values = []
    for index in range(5):
        basis, _ = np.linalg.qr(matrix @ np.delete(tests, index, axis=1))
        rest = tests[:, index] - basis @ (basis.T @ tests[:, index])
        quotient = rest @ matrix @ rest / (rest @ rest)
        values.append(np.trace(basis.T @ matrix @ basis) + (12 - basis.shape[1]) * quotient)
    np.testing.assert_allclose(result.value, np.mean(values), rtol=1e-11)
    changes = np.zeros((5, 5))
    for i, j in itertools.permutations(range(5), 2):
        basis, _ = np.linalg.qr(matrix @ np.delete(tests, [i, j], axis=1))
        rest = tests[:, i] - basis @ (basis.T @ tests[:, i])
        quotient = rest @ matrix @ rest / (rest @ rest)
        changes[i, j] = values[i] - np.trace(basis.T @ matrix @ basis) - (12 - basis.shape[1]) * quotient
    independent, covariance = np.var(values, ddof=1) / 5, np.sum(changes * changes.T) / 20
    assert 0 < covariance < 2 * independent
    np.testing.assert_allclose(result.standard_error, np.sqrt(independent + covariance), rtol=1e-11)


def test_hutch_plus_plus_is_the_papers_algorithm(symmetric):
    matrix = symmetric(np.linspace(-1, 4, 12))
    result, (sketch, _, rest) = recorded(estimators.hutch_plus_plus, matrix, 11)
    basis, _ = np.linalg.qr(matrix @ sketch)
    assert (sketch.shape[1], basis.shape[1], rest.shape[1]) == (3, 3, 5)
    np.testing.assert_allclose(basis.T @ rest, 0, atol=1e-14)
    samples = np.sum(rest * (matrix @ rest), axis=0)
    np.testing.assert_allclose(result.value, np.trace(basis.T @ matrix @ basis) + np.mean(samples), rtol=1e-12)
    np.testing.assert_allclose(result.standard_error, np.std(samples, ddof=1) / np.sqrt(5), rtol=1e-12)


@DTYPES
def test_slq_logdet(dtype, dense_map, symmetric):
    values = np.geomspace(0.1, 10, SIZE) - 0.05
    estimate = jax.jit(
        lambda linear_map, damping: estimators.slq_logdet(
            linear_map, jax.random.key(4), num_steps=SIZE + 2, num_samples=PRODUCTS, damping=damping
        )
    )
    hutchinson = jax.jit(lambda a: estimators.hutchinson_trace(a, jax.random.key(4), num_samples=PRODUCTS))
    for damping in (0.0, 0.5):
        result = jax.tree.map(float, estimate(dense_map(symmetric(values), dtype), damping))
        truth = np.sum(np.log(values + damping))
        assert abs(result.value - truth) < 4 * result.standard_error
        # With all steps the quadrature is exact: Hutchinson's estimate for the logarithm of the matrix, same vectors.
        expected = hutchinson(dense_map(symmetric(np.log(values + damping)), dtype))
        np.testing.assert_allclose(result, expected, rtol=5e-5 if dtype == jnp.float32 else 1e-11)
    assert jnp.isnan(estimate(dense_map(symmetric(values - 1), dtype), 0.0).value)


def test_one_sample_has_no_standard_error(dense_map):
    result = estimators.hutchinson_trace(dense_map(np.eye(SIZE)), jax.random.key(0), num_samples=1)
    assert result.value == SIZE
    assert jnp.isinf(result.standard_error)


def test_leaves_in_narrow_dtypes_mixed_and_empty():
    def linear_map(widest):
        return curvax.Diagonal(
            {
                "half": jnp.linspace(1, 2, 12).astype(jnp.bfloat16).reshape(3, 4),
                "scalar": jnp.asarray(3.0, jnp.float32),
                "empty": jnp.zeros((0, 2), jnp.float32),
                "wide": jnp.linspace(0, 1, 5).astype(widest),
            }
        )

    for widest in (jnp.bfloat16, jnp.float32, jnp.float64):
        for estimator in ESTIMATORS.values():
            run = functools.partial(estimator, m=8)
            result = jax.eval_shape(lambda a, k, run=run: run(a, k), linear_map(widest), jax.random.key(0))
            assert {leaf.dtype for leaf in result} == {curvax.trees.wider(widest, jnp.float32)}
    mixed = linear_map(jnp.float64)
    truth = sum(np.sum(np.asarray(leaf, float)) for leaf in jax.tree.leaves(mixed))
    estimate = jax.jit(lambda key: estimators.xtrace(mixed, key, num_products=36))(jax.random.key(0))
    np.testing.assert_allclose(estimate.value, truth, rtol=0.02)  # all 18 parameters, rounded to 8 bits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, k: estimators.hutchinson_trace(a, k, num_samples=0), "num_samples is 0; it must be at least 1"),
        (lambda a, k: estimators.hutch_plus_plus(a, k, num_products=2), "must be at least 3"),
        (lambda a, k: estimators.hutch_plus_plus(a, k, num_products=39), "exact and takes 12 products"),
        (lambda a, k: estimators.xtrace(a, k, num_products=5), "must be even and at least 4"),
        (lambda a, k: estimators.xtrace(a, k, num_products=26), "more than 2 times the 12 parameters"),
        (lambda a, k: estimators.slq_trace(jnp.log, a, k, num_steps=0, num_samples=1), "num_steps is 0"),
        (lambda a, k: estimators.slq_logdet(a, k, num_steps=1, num_samples=0), "num_samples is 0"),
    ],
)
def test_errors(call, message, dense_map):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: call(dense_map(np.eye(12)), key), jax.random.key(0))


CALLS = {
    **{name: functools.partial(estimate, m=6) for name, estimate in ESTIMATORS.items()},
    "logdet": lambda a, k: estimators.slq_logdet(a, k, num_steps=3, num_samples=2, damping=1.0),
    "eigenpairs": lambda a, k: estimators.top_eigenpairs(a, k, num_pairs=2),
    "cumulative": lambda a, k: estimators.spectral_density(a, k, num_steps=3, num_samples=2).cumulative(jnp.ones(4)),
    "density": lambda a, k: estimators.spectral_density(a, k, num_steps=3, num_samples=2).evaluate(
        jnp.ones((2, 3)), 0.1
    ),
    "diagonal": lambda a, k: estimators.hutchinson_diagonal(a, k, num_samples=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_rank_is_promoted(name, dense_map):
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda key: CALLS[name](dense_map(np.eye(12)), key), jax.random.key(0))
