import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import estimators
from curvax.linear_map import LinearMap

ESTIMATORS = {
    "rademacher": lambda a, k, m: estimators.hutchinson_trace(a, k, num_samples=m),
    "normal": lambda a, k, m: estimators.hutchinson_trace(a, k, num_samples=m, distribution="normal"),
    "hutch++": lambda a, k, m: estimators.hutch_plus_plus(a, k, num_products=m),
    "xtrace": lambda a, k, m: estimators.xtrace(a, k, num_products=m),
}
INDEFINITE = np.linspace(-1, 4, 12)


def many(name, num_products, count):
    keys = jax.random.split(jax.random.key(1), count)
    return jax.jit(lambda a: jax.vmap(lambda k: ESTIMATORS[name](a, k, num_products))(keys))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased_with_a_standard_error_that_tells_the_spread(name, dense_map, symmetric, assert_unbiased):
    matrix = symmetric(INDEFINITE)
    estimates = many(name, 8, 4000)(dense_map(matrix))
    assert_unbiased(estimates.value, np.trace(matrix))
    # Exact in the mean of squares for independent samples; XTrace's leave-one-out estimates are not independent.
    ratio = np.mean(np.square(estimates.standard_error)) / np.var(estimates.value)
    assert 0.93 < ratio < 1.07 if name in ("rademacher", "normal") else 0.5 < ratio < 2


def test_variance_of_hutchinson_is_the_formula(dense_map, symmetric):
    matrix = symmetric(INDEFINITE)
    squares, diagonal = np.sum(matrix**2), np.sum(np.diag(matrix) ** 2)
    for name, variance in (("rademacher", 2 * (squares - diagonal) / 5), ("normal", 2 * squares / 5)):
        np.testing.assert_allclose(np.var(many(name, 5, 8000)(dense_map(matrix)).value), variance, rtol=0.08)


class Recording(LinearMap):
    """A dense map that keeps the blocks of vectors it was given."""

    def __init__(self, matrix):
        self.matrix, self.blocks = jnp.asarray(matrix), []

    @property
    def structure(self):
        return jax.ShapeDtypeStruct(self.matrix.shape[:1], self.matrix.dtype)

    def __call__(self, vector):
        return self.matrix @ vector

    def block(self, vectors):
        self.blocks.append(np.asarray(vectors))
        return vectors @ self.matrix


@pytest.mark.parametrize("num_products", [4, 10, 24])
def test_xtrace_is_the_mean_of_the_leave_one_out_estimates(num_products, symmetric):
    matrix = symmetric(INDEFINITE)
    recording = Recording(matrix)
    estimate = estimators.xtrace(recording, jax.random.key(3), num_products=num_products)
    tests, size = recording.blocks[0].T, len(matrix)
    values = []
    for index in range(tests.shape[1]):
        basis, _ = np.linalg.qr(matrix @ np.delete(tests, index, axis=1))
        rest = tests[:, index] - basis @ (basis.T @ tests[:, index])
        quotient = rest @ matrix @ rest / (rest @ rest)
        values.append(np.trace(basis.T @ matrix @ basis) + (size - basis.shape[1]) * quotient)
    np.testing.assert_allclose(estimate.value, np.mean(values), rtol=1e-10)
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    np.testing.assert_allclose(estimate.standard_error, spread, rtol=1e-8, atol=1e-9)


def test_hutch_plus_plus_is_the_papers_algorithm(symmetric):
    matrix = symmetric(INDEFINITE)
    recording = Recording(matrix)
    value = estimators.hutch_plus_plus(recording, jax.random.key(3), num_products=11).value
    sketch, _, rest = (block.T for block in recording.blocks)
    assert sketch.shape[1] == 3
    assert sum(block.shape[0] for block in recording.blocks) == 11
    basis, _ = np.linalg.qr(matrix @ sketch)
    np.testing.assert_allclose(basis.T @ rest, 0, atol=1e-12)
    expected = np.trace(basis.T @ matrix @ basis) + np.mean(np.sum(rest * (matrix @ rest), axis=0))
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_exact_for_maps_of_low_rank(name, dtype, dense_map, symmetric):
    rtol = 2e-5 if dtype == jnp.float32 else 1e-11
    estimate = jax.jit(lambda a, k: ESTIMATORS[name](a, k, 18))
    spectra = {
        "rank 1": [3.0],
        "rank 5": [5, 4, 3, -2, 1],
        "wide rank 4": [1e3, 1, 1, -1e-2],
        "rank 6": [6, 5, 4, 3, 2, 1],
    }
    for label, values in spectra.items():
        matrix = symmetric(np.concatenate([values, np.zeros(30 - len(values))]))
        for scale in (1.0, 1e-8, 1e8) if dtype == jnp.float32 else (1.0, 1e-20, 1e20):
            result = estimate(dense_map(scale * matrix, dtype), jax.random.key(2))
            np.testing.assert_allclose(result.value / scale, np.sum(values), rtol=rtol, err_msg=label)
            assert result.standard_error / scale <= rtol * np.max(np.abs(values)) * 10
    zero = estimate(dense_map(np.zeros((30, 30)), dtype), jax.random.key(2))
    assert zero.value == 0
    assert zero.standard_error == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["hutch++", "xtrace"])
def test_exact_for_the_identity_and_for_full_sketches(name, dtype, dense_map, symmetric):
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    for num_products in (6, 12):
        result = ESTIMATORS[name](dense_map(np.eye(20), dtype), jax.random.key(0), num_products)
        np.testing.assert_allclose(result.value, 20, rtol=rtol if name == "xtrace" else 0.5)
    result = ESTIMATORS[name](
        dense_map(symmetric(INDEFINITE), dtype), jax.random.key(1), 24 if name == "xtrace" else 36
    )
    np.testing.assert_allclose(result.value, np.sum(INDEFINITE), rtol=10 * rtol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_error_falls_from_hutchinson_to_hutch_plus_plus_to_xtrace_on_decaying_spectra(dtype, dense_map, symmetric):
    values = 0.7 ** np.arange(40)
    linear_map = dense_map(symmetric(values), dtype)
    errors = {}
    for name in ("rademacher", "hutch++", "xtrace"):
        value = np.asarray(many(name, 30, 100)(linear_map).value, float)
        errors[name] = np.sqrt(np.mean((value / np.sum(values) - 1) ** 2))
    assert errors["xtrace"] < errors["hutch++"] / 2
    assert errors["hutch++"] < errors["rademacher"] / 5


def test_xtrace_in_float32_reaches_rounding_on_a_spectrum_that_ends_below_it(dense_map, symmetric):
    values = 10.0 ** -np.arange(30)  # the sketch is singular to working precision, though not in exact arithmetic
    value = many("xtrace", 40, 20)(dense_map(symmetric(values), jnp.float32)).value
    np.testing.assert_allclose(value, np.sum(values), rtol=3e-6)


def test_slq_trace_with_all_steps_is_hutchinson_on_the_function_of_the_matrix(dense_map, symmetric):
    values = np.geomspace(0.1, 10, 12)
    key = jax.random.key(4)
    expected = estimators.hutchinson_trace(dense_map(symmetric(np.log(values))), key, num_samples=5)
    result = estimators.slq_trace(jnp.log, dense_map(symmetric(values)), key, num_steps=14, num_samples=5)
    np.testing.assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_slq_logdet(dtype, dense_map, symmetric):
    matrix = symmetric(np.geomspace(0.1, 10, 40) - 0.05)
    logdet = jax.jit(lambda a, k, damping: estimators.slq_logdet(a, k, num_steps=25, num_samples=60, damping=damping))
    for damping in (0.0, 0.5):
        result = logdet(dense_map(matrix, dtype), jax.random.key(0), damping)
        truth = np.linalg.slogdet(matrix + damping * np.eye(40))[1]
        assert 0 < result.standard_error < 0.1 * abs(truth)
        assert abs(result.value - truth) < 4 * result.standard_error
    assert jnp.isnan(logdet(dense_map(matrix - np.eye(40), dtype), jax.random.key(0), 0.0).value)


def test_one_sample_has_no_standard_error(dense_map, symmetric):
    result = estimators.hutchinson_trace(dense_map(symmetric(INDEFINITE)), jax.random.key(0), num_samples=1)
    assert jnp.isfinite(result.value)
    assert jnp.isinf(result.standard_error)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_same_key_same_result_eager_jit_and_vmap(name, dense_map, symmetric):
    linear_map, key = dense_map(symmetric(INDEFINITE)), jax.random.key(5)
    eager = ESTIMATORS[name](linear_map, key, 6)
    batched = jax.jit(jax.vmap(lambda k: ESTIMATORS[name](linear_map, k, 6)))(key[None])
    np.testing.assert_allclose(jax.tree.map(lambda x: x[0], batched), eager, rtol=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_leaves_in_narrow_mixed_and_empty_shapes(name):
    entries = {
        "half": jnp.linspace(1, 2, 12).astype(jnp.bfloat16).reshape(3, 4),
        "single": jnp.asarray(3.0, jnp.float32),
        "empty": jnp.zeros((0, 2), jnp.float32),
        "double": jnp.linspace(0, 1, 5),
    }
    result = ESTIMATORS[name](curvax.Diagonal(entries), jax.random.key(0), 8)
    truth = float(sum(jnp.sum(leaf.astype(jnp.float64)) for leaf in entries.values()))
    assert result.value.dtype == jnp.float64
    np.testing.assert_allclose(result.value, truth, rtol=0.5)
    del entries["double"]
    assert ESTIMATORS[name](curvax.Diagonal(entries), jax.random.key(0), 8).value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, k: estimators.hutchinson_trace(a, k, num_samples=0), "num_samples is 0; it must be at least 1"),
        (
            lambda a, k: estimators.hutchinson_trace(a, k, num_samples=2, distribution="cauchy"),
            "'rademacher', 'normal'",
        ),
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
        jax.eval_shape(lambda k: call(dense_map(np.eye(12)), k), jax.random.key(0))
