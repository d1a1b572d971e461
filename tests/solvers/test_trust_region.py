"""The dense trust-region solver (DM-5): its optimality conditions on definite, indefinite, singular and hard cases."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from curvax import solvers

N = 6
solve = jax.jit(solvers.dense_trust_region)


def symmetric(rng, eigenvalues):
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T, vectors


def assert_optimal(matrix, gradient, radius, solution, rtol=1e-11):
    """The conditions that are necessary and sufficient for a global minimum over the ball."""
    step, sigma = np.asarray(solution.step, float), float(solution.multiplier)
    size = np.abs(np.linalg.eigvalsh(matrix)).max()
    assert sigma >= 0
    assert np.linalg.norm(step) <= radius * (1 + rtol)
    assert sigma <= rtol * size or np.linalg.norm(step) >= radius * (1 - rtol)
    assert np.linalg.eigvalsh(matrix)[0] + sigma >= -rtol * (size + sigma)
    defect = matrix @ step + sigma * step + gradient
    scale = (size + sigma) * np.linalg.norm(step) + np.linalg.norm(gradient)
    assert np.linalg.norm(defect) <= rtol * scale
    value = gradient @ step + 0.5 * step @ matrix @ step
    np.testing.assert_allclose(solution.model_value, value, rtol=1e-9, atol=rtol * scale * radius)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6, 6), st.floats(-6, 6), st.integers(-60, 60))
def test_random_indefinite_problems_are_optimal(seed, log_radius, log_gradient, exponent):
    rng = np.random.default_rng(seed)
    eigenvalues = rng.uniform(-1, 1, N) * 10.0 ** rng.uniform(-3, 3, N) * 10.0**exponent
    matrix, _ = symmetric(rng, eigenvalues)
    gradient, radius = rng.standard_normal(N) * 10.0**log_gradient, 10.0**log_radius
    assert_optimal(matrix, gradient, radius, solve(matrix, gradient, radius))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.floats(-3, 3), st.integers(1, 3), st.sampled_from([0.0, 1e-16, 1e-13, 1e-10, 1e-6])
)
def test_hard_and_nearly_hard_cases_are_optimal(seed, log_radius, multiplicity, lowest_share):
    rng = np.random.default_rng(seed)
    eigenvalues = np.append(-np.ones(multiplicity), rng.uniform(-0.5, 3, N - multiplicity))
    matrix, vectors = symmetric(rng, eigenvalues)
    shares = rng.standard_normal(N)
    shares[:multiplicity] *= lowest_share
    gradient, radius = vectors @ shares, 10.0**log_radius
    solution = solve(matrix, gradient, radius)
    assert_optimal(matrix, gradient, radius, solution)
    inner = np.linalg.norm(shares[multiplicity:] / (eigenvalues[multiplicity:] + 1))
    if lowest_share == 0:
        assert solution.hard_case == (inner < radius)
    if lowest_share >= 1e-10:
        assert not solution.hard_case


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_hard_case_of_a_diagonal_matrix(sign):
    solution = solve(np.diag([-2.0, 1.0, 3.0]), np.array([0.0, 3.0, 0.0]), 2.0)
    assert solution.hard_case
    np.testing.assert_allclose(solution.multiplier, 2.0)
    np.testing.assert_allclose(np.abs(solution.step), [np.sqrt(3), 1, 0], atol=1e-15)
    tilted = solve(np.diag([-2.0, 1.0, 3.0]), np.array([sign * 1e-9, 3.0, 0.0]), 2.0)
    assert not tilted.hard_case
    np.testing.assert_allclose(tilted.step, [-sign * np.sqrt(3), -1, 0], atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_multiplier_is_the_damping_that_gives_the_same_step(seed, log_radius):
    rng = np.random.default_rng(seed)
    matrix, _ = symmetric(rng, rng.uniform(0.1, 5, N))
    gradient, radius = rng.standard_normal(N), 10.0**log_radius
    solution = solve(matrix, gradient, radius)
    damped = -np.linalg.solve(matrix + float(solution.multiplier) * np.eye(N), gradient)
    np.testing.assert_allclose(solution.step, damped, rtol=1e-8, atol=1e-12 * radius)
    newton = np.linalg.norm(np.linalg.solve(matrix, gradient))
    assert (solution.multiplier > 0) == (newton > radius)


@pytest.mark.parametrize(
    ("eigenvalues", "shares", "radius"),
    [
        ([0.0] * N, [1.0] * N, 2.0),
        ([0.0] * N, [0.0] * N, 2.0),
        ([0.0, 0, 1, 2, 3, 4], [0.0, 0, 1, 1, 1, 1], 100.0),
        ([0.0, 0, 1, 2, 3, 4], [0.0, 0, 1, 1, 1, 1], 0.1),
        ([0.0, 0, 1, 2, 3, 4], [1e-3, 0, 1, 1, 1, 1], 100.0),
        ([-1.0, 0, 1, 2, 3, 4], [0.0] * N, 3.0),
        ([1.0] * N, [0.0] * N, 3.0),
        ([-1.0] * N, [1.0] * N, 3.0),
        ([1e-12, 1, 1, 1, 1, 1], [1.0] * N, 1e3),
    ],
)
def test_degenerate_problems(eigenvalues, shares, radius):
    for rng in (None, np.random.default_rng(0)):
        matrix, vectors = symmetric(rng, eigenvalues) if rng else (np.diag(eigenvalues), np.eye(N))
        gradient = vectors @ np.asarray(shares)
        assert_optimal(matrix, gradient, radius, solve(matrix, gradient, radius))


def test_float32_and_extreme_scales():
    rng = np.random.default_rng(1)
    matrix, _ = symmetric(rng, np.linspace(-1, 3, N))
    gradient = rng.standard_normal(N)
    for matrix_scale, gradient_scale, radius in [
        (1, 1, 1),
        (1e-20, 1, 1e3),
        (1e20, 1e-10, 1e-6),
        (1, 1e-30, 1),
        (1, 1e30, 1),
    ]:
        A = (matrix * matrix_scale).astype(np.float32)
        g = (gradient * gradient_scale).astype(np.float32)
        solution = solve(A, g, np.float32(radius))
        assert solution.step.dtype == np.float32
        step = np.asarray(solution.step, float) / radius
        sigma = float(solution.multiplier)
        np.testing.assert_allclose(np.linalg.norm(step), 1, rtol=1e-5)
        defect = A.astype(float) @ step + sigma * step + g.astype(float) / radius
        assert np.linalg.norm(defect) < 1e-5 * (4 * matrix_scale + sigma + np.linalg.norm(g.astype(float)) / radius)


def test_problems_in_a_batch_and_in_any_order():
    rng = np.random.default_rng(2)
    values, shares, radii = rng.uniform(-1, 3, (5, N)), rng.standard_normal((5, N)), np.geomspace(0.01, 100, 5)
    together = jax.jit(jax.vmap(solvers.diagonal_trust_region))(values, shares, radii)
    for lane in range(5):
        alone = solve(np.diag(values[lane]), shares[lane], radii[lane])
        np.testing.assert_allclose(together.step[lane], alone.step, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(together.multiplier[lane], alone.multiplier, rtol=1e-9)


def test_not_a_number_does_not_hang():
    assert not np.any(np.isfinite(solve(np.full((N, N), np.nan), np.ones(N), 1.0).step))


def test_wrong_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"must be \(n, n\) and \(n,\)"):
        solvers.dense_trust_region(jnp.eye(3), jnp.ones(2), 1.0)
