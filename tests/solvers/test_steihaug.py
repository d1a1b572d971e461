"""Steihaug-Toint (CG-7, T6) against the exact trust-region solution and the plain run."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from curvax import solvers
from curvax.solvers import StopReason

N = 8


@functools.partial(jax.jit, static_argnames=("steps", "precondition"))
def steihaug(matrix, b, radius, inverse, tolerance=1e-10, *, steps=4 * N, precondition=False):
    return solvers.steihaug(
        lambda v: matrix @ v,
        b,
        radius=radius,
        preconditioner=(lambda r: inverse @ r) if precondition else None,
        max_iterations=steps,
        tolerance=tolerance,
    )


exact = jax.jit(lambda matrix, b, radius: solvers.dense_trust_region(matrix, -b, radius))


def symmetric(rng, eigenvalues):
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T


def quadratic(matrix, b, x):
    return 0.5 * x @ matrix @ x - b @ x


def norm_in(preconditioner, x):
    return np.sqrt(x @ preconditioner @ x)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 2), st.integers(0, 3), st.booleans())
def test_decrease_is_at_least_half_of_the_best(seed, log_radius, rank_deficiency, precondition):
    """Yuan 2000, for positive semi-definite A; in the norm of P by the change of variables y = P^(1/2) x."""
    rng = np.random.default_rng(seed)
    eigenvalues = 10.0 ** rng.uniform(-2, 1, N)
    eigenvalues[:rank_deficiency] = 0
    matrix, b, radius = symmetric(rng, eigenvalues), rng.standard_normal(N), 10.0**log_radius
    root = symmetric(rng, np.geomspace(0.3, 3, N)) if precondition else np.eye(N)
    inverse_root = np.linalg.inv(root)
    result = steihaug(matrix, b, radius, inverse_root @ inverse_root, precondition=precondition)
    best = exact(inverse_root @ matrix @ inverse_root, inverse_root @ b, radius)
    x = np.asarray(result.value)
    assert best.model_value <= 0
    assert quadratic(matrix, b, x) <= 0.5 * best.model_value * (1 - 1e-10)
    assert quadratic(matrix, b, x) >= best.model_value * (1 + 1e-9)
    assert norm_in(root @ root, x) <= radius * (1 + 1e-9)
    np.testing.assert_allclose(result.model_value, quadratic(matrix, b, x), rtol=1e-9)
    np.testing.assert_allclose(result.norm, norm_in(root @ root, x), rtol=1e-9)


@pytest.mark.parametrize("precondition", [False, True])
def test_ends_where_the_path_of_conjugate_gradients_leaves_the_region(precondition):
    rng = np.random.default_rng(0)
    matrix, b = symmetric(rng, np.geomspace(0.1, 10, N)), rng.standard_normal(N)
    preconditioner = symmetric(rng, np.geomspace(0.5, 5, N)) if precondition else np.eye(N)
    inverse = np.linalg.inv(preconditioner)
    run = jax.jit(
        lambda b: (
            solvers.cg(
                lambda v: matrix @ v,
                b,
                preconditioner=lambda r: inverse @ r,
                max_iterations=N - 1,
                tolerance=0.0,
                store_at=tuple(range(1, N)),
            ).stored.values
        )
    )
    path = np.vstack([np.zeros(N), run(b)])
    norms = [norm_in(preconditioner, x) for x in path]
    assert np.all(np.diff(norms) > 0)
    for radius in np.linspace(0.05, 0.99, 12) * norms[-1]:
        result = steihaug(matrix, b, radius, inverse, precondition=precondition)
        leg = int(np.searchsorted(norms, radius))
        assert result.iterations == leg
        assert result.reason == StopReason.BOUNDARY
        assert result.on_boundary
        assert not result.negative_curvature
        np.testing.assert_allclose(norm_in(preconditioner, np.asarray(result.value)), radius, rtol=1e-13)
        start, along = path[leg - 1], path[leg] - path[leg - 1]
        travelled = (result.value - start) @ along / (along @ along)
        assert 0 <= travelled <= 1
        np.testing.assert_allclose(result.value, start + travelled * along, atol=1e-10)


def test_cap_leaves_the_iterate_of_conjugate_gradients():
    rng = np.random.default_rng(5)
    matrix, b = symmetric(rng, np.geomspace(0.1, 10, N)), rng.standard_normal(N)
    result = steihaug(matrix, b, 100.0, np.eye(N), steps=3)
    expected = jax.jit(lambda b: solvers.cg(lambda v: matrix @ v, b, max_iterations=3, tolerance=0.0))(b)
    assert result.reason == StopReason.MAX_ITERATIONS
    assert result.iterations == 3
    assert not result.on_boundary
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-12)
    np.testing.assert_allclose(result.residual_norm, expected.residual_norm, rtol=1e-12)


@pytest.mark.parametrize("precondition", [False, True])
def test_interior_solution_is_that_of_conjugate_gradients_and_of_the_dense_solver(precondition):
    rng = np.random.default_rng(1)
    matrix, b = symmetric(rng, np.geomspace(0.1, 10, N)), rng.standard_normal(N)
    preconditioner = symmetric(rng, np.geomspace(0.5, 5, N))
    solution = np.linalg.solve(matrix, b)
    radius = 1.01 * norm_in(preconditioner if precondition else np.eye(N), solution)
    result = steihaug(matrix, b, radius, np.linalg.inv(preconditioner), precondition=precondition)
    assert result.reason == StopReason.CONVERGED
    assert not result.on_boundary
    np.testing.assert_allclose(result.value, solution, rtol=1e-7)
    if not precondition:
        np.testing.assert_allclose(result.value, exact(matrix, b, radius).step, rtol=1e-7)


def test_tiny_region_gives_the_exact_solution():
    """There the solution is along b, whatever the matrix is."""
    rng = np.random.default_rng(2)
    matrix, b = symmetric(rng, np.linspace(-5, 5, N)), rng.standard_normal(N)
    result = steihaug(matrix, b, 1e-9, np.eye(N))
    np.testing.assert_allclose(result.value, 1e-9 * b / np.linalg.norm(b), rtol=1e-12)
    np.testing.assert_allclose(result.value, exact(matrix, b, 1e-9).step, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1, 2))
def test_indefinite_matrices_end_on_the_boundary_or_above_the_best(seed, log_radius):
    rng = np.random.default_rng(seed)
    matrix, b, radius = symmetric(rng, rng.uniform(-3, 3, N)), rng.standard_normal(N), 10.0**log_radius
    result = steihaug(matrix, b, radius, np.eye(N), 1e-13, steps=20 * N)
    x = np.asarray(result.value)
    if np.linalg.eigvalsh(matrix)[0] < -1e-3:
        assert result.on_boundary
        np.testing.assert_allclose(np.linalg.norm(x), radius, rtol=1e-12)
    cauchy = -0.5 * np.linalg.norm(b) * min(radius, np.linalg.norm(b) / np.linalg.norm(matrix, 2))
    assert exact(matrix, b, radius).model_value - 1e-9 <= quadratic(matrix, b, x) <= cauchy * (1 - 1e-9)


def test_negative_curvature_is_followed_to_the_boundary():
    result = steihaug(np.diag(np.append(np.ones(N - 1), -1.0)), np.eye(N)[-1], 2.0, np.eye(N))
    assert result.reason == StopReason.NEGATIVE_CURVATURE
    assert result.negative_curvature
    assert result.on_boundary
    assert result.iterations == 1
    np.testing.assert_allclose(result.value, 2.0 * np.eye(N)[-1], atol=1e-15)
    np.testing.assert_allclose(result.model_value, -4.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("b_scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("radius_scale", [1e-25, 1e-8, 1e25])
def test_scales_of_b_and_radius_may_be_far_apart(dtype, precondition, b_scale, radius_scale):
    rng = np.random.default_rng(3)
    matrix, b = symmetric(rng, np.geomspace(1, 10, N)).astype(dtype), rng.standard_normal(N).astype(dtype)
    b, radius = b * np.asarray(b_scale, dtype), np.asarray(radius_scale, dtype)
    result = steihaug(matrix, b, radius, np.eye(N, dtype=dtype), 1e-5, precondition=precondition)
    x, solution = np.asarray(result.value, float), np.linalg.solve(matrix.astype(float), b.astype(float))
    if np.linalg.norm(solution) < 0.5 * radius:
        assert result.reason == StopReason.CONVERGED
        np.testing.assert_allclose(x, solution, atol=1e-4 * np.linalg.norm(solution))
    elif np.linalg.norm(solution) > 10 * radius:
        assert result.reason == StopReason.BOUNDARY
        np.testing.assert_allclose(np.linalg.norm(x), radius, rtol=1e-6)
    np.testing.assert_allclose(result.norm, np.linalg.norm(x), rtol=1e-5)


@pytest.mark.parametrize("what", ["matrix", "b"])
def test_non_finite_input_gives_a_zero_step(what):
    matrix, b = np.eye(N), np.ones(N)
    (matrix if what == "matrix" else b)[..., 2] = np.nan
    result = steihaug(matrix, b, 1.0, np.eye(N))
    assert result.reason == StopReason.NON_FINITE
    assert result.iterations == 0
    assert not np.any(result.value)


def test_zero_right_hand_side_gives_zero():
    result = steihaug(-np.eye(N), np.zeros(N), 1.0, np.eye(N))
    assert result.reason == StopReason.CONVERGED
    assert not np.any(result.value)


def test_preconditioner_that_is_not_positive_definite():
    result = steihaug(np.eye(N), np.ones(N), 1.0, -np.eye(N), precondition=True)
    assert result.reason == StopReason.BREAKDOWN
    assert not np.any(result.value)


def test_lanes_of_vmap_and_pytrees():
    rng = np.random.default_rng(4)
    matrix, b = symmetric(rng, np.geomspace(0.1, 10, N)), rng.standard_normal(N)
    radii = np.array([1e-3, 1.0, 1e3])

    def run(radius):
        tree = {"u": b[:3], "v": b[3:].reshape(5, 1), "none": None}

        def matvec(v):
            image = matrix @ jnp.concatenate([v["u"], v["v"][:, 0]])
            return {"u": image[:3], "v": image[3:, None], "none": None}

        # Below it rounding decides whether the last of N steps is enough.
        return solvers.steihaug(matvec, tree, radius=radius, max_iterations=4 * N, tolerance=1e-6)

    together = jax.jit(jax.vmap(run))(radii)
    for lane, radius in enumerate(radii):
        alone = steihaug(matrix, b, radius, np.eye(N), tolerance=1e-6)
        joined = np.concatenate([together.value["u"][lane], together.value["v"][lane, :, 0]])
        np.testing.assert_allclose(joined, alone.value, rtol=1e-9, atol=1e-14)
        assert together.reason[lane] == alone.reason
        assert together.iterations[lane] == alone.iterations


def test_bad_cap_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        solvers.steihaug(lambda v: v, jnp.ones(2), radius=1.0, max_iterations=0, tolerance=0.1)
