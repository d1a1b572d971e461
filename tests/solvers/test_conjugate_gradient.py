"""Conjugate gradients on dense problems with known answers: CG-1 and CG-8 (T5), warm starts, pytrees, agreement."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import curvax
from curvax import solvers, trees
from curvax.solvers import StopReason

N = 8


@functools.partial(jax.jit, static_argnames=("steps", "precondition"))
def solve(matrix, b, x0, inverse, tolerance, *, steps=N, precondition=False):
    """A run that keeps every iterate; one compilation serves most tests."""
    return solvers.cg(
        lambda v: matrix @ v,
        b,
        x0=x0,
        preconditioner=(lambda r: inverse @ r) if precondition else None,
        max_iterations=steps,
        tolerance=tolerance,
        store_at=tuple(range(1, steps + 1)),
    )


def symmetric(rng, eigenvalues):
    """A matrix with these eigenvalues, and its eigenvectors as columns."""
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T, vectors


def quadratic(matrix, b, x):
    return 0.5 * x @ matrix @ x - b @ x


def krylov_minimizer(matrix, b, x0, preconditioner, dimension):
    """The minimum of the quadratic over x0 + K_dimension(P^-1 A, P^-1 r0), by a dense orthonormal basis."""
    basis, vector = [], np.linalg.solve(preconditioner, matrix @ x0 - b)
    for _ in range(dimension):
        for _ in range(2):
            for other in basis:
                vector = vector - other * (other @ vector)
        basis.append(vector / np.linalg.norm(vector))
        vector = np.linalg.solve(preconditioner, matrix @ basis[-1])
    basis = np.stack(basis, axis=1)
    return x0 + basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ (b - matrix @ x0))


def problem(seed, condition=10.0):
    rng = np.random.default_rng(seed)
    matrix, _ = symmetric(rng, np.geomspace(1, condition, N))
    preconditioner, _ = symmetric(rng, np.geomspace(1, 5, N))
    return matrix, rng.standard_normal(N), rng.standard_normal(N), preconditioner


def close(actual, expected, rtol):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_every_iterate_is_optimal_over_its_krylov_space(warm, precondition):
    matrix, b, x0, preconditioner = problem(0)
    x0 = x0 if warm else np.zeros(N)
    if not precondition:
        preconditioner = np.eye(N)
    inverse = np.linalg.inv(preconditioner)
    result = solve(matrix, b, x0, inverse, 0.0, precondition=precondition)
    for i in range(1, N):
        close(result.stored.values[i - 1], krylov_minimizer(matrix, b, x0, preconditioner, i), 1e-10)
    assert result.stored.iterations.tolist() == list(range(1, N + 1))
    assert result.stored.used == N
    close(result.value, np.linalg.solve(matrix, b), 1e-10)


def test_model_trace_is_the_quadratic_at_the_iterates():
    matrix, b, x0, _ = problem(1)
    result = solve(matrix, b, x0, np.eye(N), 0.0)
    iterates = np.vstack([x0, result.stored.values])
    expected = [quadratic(matrix, b, x) for x in iterates]
    close(result.model_trace, expected, 1e-13)
    close(result.stored.model_values, expected[1:], 1e-13)
    assert result.model_value == result.model_trace[-1]
    assert np.all(np.diff(result.model_trace[:-1]) < 0)


@pytest.mark.parametrize("factor", [2.0**60, 2.0**-60, 7e25, 3e-200])
def test_scale_of_the_preconditioner_changes_nothing(factor):
    matrix, b, x0, preconditioner = problem(2)
    inverse = np.linalg.inv(preconditioner)
    plain = solve(matrix, b, x0, inverse, 1e-9, precondition=True)
    scaled = solve(matrix, b, x0, inverse / factor, 1e-9, precondition=True)
    assert plain.iterations == scaled.iterations
    close(scaled.stored.values, plain.stored.values, 0.0 if np.log2(factor) % 1 == 0 else 1e-12)


def test_preconditioner_equal_to_the_matrix_takes_one_step():
    matrix, b, _, _ = problem(3, condition=1e6)
    result = solve(matrix, b, np.zeros(N), np.linalg.inv(matrix), 1e-7, precondition=True)
    assert result.iterations == 1
    assert result.reason == StopReason.CONVERGED
    close(result.value, np.linalg.solve(matrix, b), 1e-7)


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_as_many_steps_as_distinct_eigenvalues(distinct):
    rng = np.random.default_rng(4)
    matrix, _ = symmetric(rng, np.resize(np.arange(1.0, distinct + 1), N))
    result = solve(matrix, rng.standard_normal(N), np.zeros(N), np.eye(N), 1e-12)
    assert result.iterations == distinct
    assert result.reason == StopReason.CONVERGED


@pytest.mark.parametrize("precondition", [False, True])
def test_norm_of_the_iterates_grows_from_a_cold_start(precondition):
    matrix, b, _, preconditioner = problem(5)
    if not precondition:
        preconditioner = np.eye(N)
    result = solve(matrix, b, np.zeros(N), np.linalg.inv(preconditioner), 0.0, precondition=precondition)
    norms = [x @ preconditioner @ x for x in np.asarray(result.stored.values)[:-1]]
    assert np.all(np.diff(norms) > 0)


@pytest.mark.parametrize("warm", [False, True])
def test_error_is_the_best_weighted_polynomial(warm):
    """Martens 2016, eq. 4.13, by weighted least squares on the known eigenvalues."""
    rng = np.random.default_rng(6)
    eigenvalues = np.geomspace(0.1, 10, N)
    matrix, vectors = symmetric(rng, eigenvalues)
    b, x0 = rng.standard_normal(N), warm * rng.standard_normal(N)
    weights = 0.5 * ((matrix @ x0 - b) @ vectors) ** 2 / eigenvalues
    solution = np.linalg.solve(matrix, b)
    result = solve(matrix, b, x0, np.eye(N), 0.0)
    errors = np.asarray(result.model_trace) - quadratic(matrix, b, solution)
    close(errors[0], weights.sum(), 1e-12)
    for degree in range(1, N - 1):
        powers = np.sqrt(weights)[:, None] * (eigenvalues / 10)[:, None] ** np.arange(1, degree + 1)
        coefficients = np.linalg.lstsq(powers, -np.sqrt(weights), rcond=None)[0]
        best = np.sum((np.sqrt(weights) + powers @ coefficients) ** 2)
        np.testing.assert_allclose(errors[degree], best, rtol=1e-8, atol=1e-14 * weights.sum())
        # and direction by direction: omega_j (1 - beta_j / beta_j*)^2
        x = np.asarray(result.stored.values[degree - 1])
        shares = weights * (1 - (vectors.T @ (x - x0)) / (vectors.T @ (solution - x0))) ** 2
        np.testing.assert_allclose(shares.sum(), errors[degree], rtol=1e-9, atol=1e-14 * weights.sum())


def test_high_curvature_goes_first_and_clusters_go_together():
    rng = np.random.default_rng(7)
    clusters = np.repeat([1.0, 10.0], N // 2)
    eigenvalues = clusters * (1 + 1e-5 * rng.standard_normal(N))
    matrix, vectors = symmetric(rng, eigenvalues)
    b = vectors @ np.sqrt(2 * eigenvalues)  # every omega_j is one
    result = solve(matrix, b, np.zeros(N), np.eye(N), 0.0)
    left = (1 - np.asarray(result.stored.values) @ vectors / (b @ vectors / eigenvalues)) ** 2
    assert left[0, clusters > 5].max() < 0.02 < 0.5 < left[0, clusters < 5].min()
    assert left[1].max() < 1e-7


def test_agrees_with_jax_scipy_step_by_step():
    matrix, b, x0, preconditioner = problem(8)
    inverse = np.linalg.inv(preconditioner)
    result = solve(matrix, b, x0, inverse, 0.0, precondition=True)
    theirs = jax.jit(
        lambda steps: jax.scipy.sparse.linalg.cg(
            lambda v: matrix @ v, jnp.asarray(b), jnp.asarray(x0), tol=0.0, maxiter=steps, M=lambda r: inverse @ r
        )[0]
    )
    for i in (1, 3, 5):
        close(result.stored.values[i - 1], theirs(i), 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 4), st.integers(-90, 90), st.integers(-90, 90))
def test_random_positive_definite_pytrees(seed, log_condition, b_exponent, matrix_exponent):
    rng = np.random.default_rng(seed)
    matrix, _ = symmetric(rng, 10.0 ** np.append([0, log_condition], rng.uniform(0, log_condition, N - 2)))
    b = rng.standard_normal(N)
    result = _solve_tree(matrix * 10.0**matrix_exponent, b * 10.0**b_exponent)
    x = np.concatenate([result.value["a"].ravel(), result.value["b"]]) * 10.0 ** (matrix_exponent - b_exponent)
    assert result.reason == StopReason.CONVERGED
    assert result.iterations <= 3 * N
    np.testing.assert_allclose(matrix @ x, b, atol=1e-8 * np.linalg.norm(b))
    close(x, np.linalg.solve(matrix, b), 1e-8 * 10**log_condition)
    assert np.all(np.diff(result.model_trace) <= 1e-13 * abs(result.model_value))


@jax.jit
def _solve_tree(matrix, b):
    like = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2), "none": None}
    linear_map = curvax.from_matvec(lambda v: trees.unravel(matrix @ trees.ravel(v), v), like)
    return solvers.cg(linear_map, trees.unravel(b, like), max_iterations=4 * N, tolerance=1e-9)


def test_warm_start_at_the_solution_takes_no_step():
    matrix, b, _, _ = problem(9)
    result = solve(matrix, b, np.linalg.solve(matrix, b), np.eye(N), 1e-10)
    assert result.iterations == 0
    assert result.reason == StopReason.CONVERGED
    close(result.value, np.linalg.solve(matrix, b), 0.0)


def test_restart_refines_what_rounding_left():
    rng = np.random.default_rng(10)
    matrix = symmetric(rng, np.geomspace(1e-3, 1, 100))[0].astype(np.float32)
    b = rng.standard_normal(100).astype(np.float32)

    def run(x0, cap, tolerance=2e-6):
        return solvers.cg(lambda v: matrix @ v, b, x0=x0, max_iterations=cap, tolerance=tolerance).value

    run = jax.jit(run, static_argnames="cap")

    def relative_residual(x):
        return np.linalg.norm(matrix.astype(float) @ np.asarray(x, float) - b) / np.linalg.norm(b)

    first = run(np.zeros_like(b), 400)
    assert relative_residual(first) < 5e-5
    assert relative_residual(run(first, 400)) < 0.8 * relative_residual(first)
    early = run(np.zeros_like(b), 100, 0.0)  # as many steps as dimensions, and still far off
    assert relative_residual(run(early, 100, 0.0)) < 0.1 * relative_residual(early)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtypes_are_kept_and_scalars_are_wide(dtype):
    diagonal = jnp.linspace(1, 3, N).astype(dtype)
    b = {"p": jnp.ones(N, dtype), "q": jnp.ones((), dtype if dtype == "float64" else "float32")}
    result = jax.jit(
        lambda b: solvers.cg(
            lambda v: {"p": diagonal * v["p"], "q": 2 * v["q"]},
            b,
            x0=trees.scale(0.1, b),
            max_iterations=20,
            tolerance=1e-2,
            store_at=(3,),
        )
    )(b)
    assert jax.tree.map(lambda leaf: leaf.dtype, result.value) == jax.tree.map(lambda leaf: leaf.dtype, b)
    assert result.stored.values["p"].dtype == dtype
    assert result.model_trace.dtype == ("float64" if dtype == "float64" else "float32")
    assert result.reason == StopReason.CONVERGED
    np.testing.assert_allclose(result.value["p"].astype(float), 1 / np.asarray(diagonal, float), atol=2e-2)


def test_bfloat16_reaches_the_rounding_of_its_products():
    """Directions are rounded before use, so that the recurrences describe the products that were really taken."""
    rng = np.random.default_rng(11)
    matrix = jnp.asarray(symmetric(rng, np.geomspace(0.01, 1, 100))[0], jnp.float32)
    b = jnp.asarray(rng.standard_normal(100), jnp.bfloat16)
    result = jax.jit(
        lambda b: solvers.cg(
            lambda v: (matrix @ v.astype(jnp.float32)).astype(v.dtype), b, max_iterations=100, tolerance=1e-3
        )
    )(b)
    exact, b = np.asarray(matrix, float), np.asarray(b, float)
    x, solution = np.asarray(result.value, float), np.linalg.solve(exact, b)
    assert result.reason == StopReason.CONVERGED
    gap = quadratic(exact, b, x) - quadratic(exact, b, solution)
    assert gap < 1e-3 * abs(quadratic(exact, b, solution))
