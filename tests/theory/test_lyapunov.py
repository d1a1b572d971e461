"""Lyapunov equations and traces of their solutions (AS-3, AS-4; Martens 2016, equations 5.23 to 5.31)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from curvax import theory
from tests.theory import quadratics
from tests.theory.quadratics import trace, transposed
from tests.tolerances import rounding

ROUNDED = 1 + 1e-11


def stable(count, n, seed, margin=0.05):
    """A of no symmetry with A + A^T negative definite, and Q of any rank."""
    draw = np.random.default_rng(seed)
    skew = draw.normal(size=(count, n, n))
    matrix = skew - transposed(skew) - quadratics.definite(draw, count, n, 1.0) - margin * np.eye(n)
    root = draw.normal(size=(count, n, n)) * (np.arange(n) < draw.integers(1, n + 1, (count, 1, 1)))
    return matrix, root @ transposed(root)


def by_elimination(matrix, right):
    """P of A^T P + P A = -Q for stacks, as n^2 equations."""
    n = matrix.shape[-1]
    eye = np.eye(n)
    system = np.einsum("...ki,jl->...ijkl", matrix, eye) + np.einsum("ik,...lj->...ijkl", eye, matrix)
    solution = np.linalg.solve(system.reshape(-1, n * n, n * n), -right.reshape(-1, n * n, 1))
    return solution.reshape(right.shape)


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (3, 1), (8, 2)])
def test_lyapunov_equations_of_any_stable_matrix_are_solved(n, seed):
    """A with eigenvalues in the left half plane; A + A^T need not be definite."""
    draw = np.random.default_rng(seed)
    matrix, right = stable(40, n, seed)
    change = np.eye(n) + np.triu(draw.normal(size=(40, n, n)), 1)
    matrix = np.linalg.solve(change, matrix @ change)
    solution = np.asarray(jax.jit(jax.vmap(theory.solve_lyapunov))(matrix, right))
    for a, q, own in zip(matrix, right, solution, strict=True):
        oracle = scipy.linalg.solve_continuous_lyapunov(a.T, -q)
        eye = np.eye(n)
        condition = np.linalg.cond(np.kron(a.T, eye) + np.kron(eye, a.T))
        tolerance = rounding(jnp.float64, 20 * n, condition=condition, scale=np.linalg.norm(oracle))
        assert np.linalg.norm(own - oracle) <= tolerance
        np.testing.assert_array_equal(own, own.T)


def test_an_unstable_matrix_has_no_solution():
    solve = jax.jit(theory.solve_lyapunov)
    for a in (np.diag([-1.0, 0.5]), np.diag([-1.0, 1e-3]), np.array([[0.0, 1.0], [-1.0, 0.0]]), np.eye(2)):
        assert np.all(np.isnan(solve(a, np.eye(2))))


def test_float32_and_ill_conditioned_matrices():
    a = np.diag(-(10.0 ** np.arange(-3, 4)))
    own = jax.jit(theory.solve_lyapunov)(a.astype(np.float32), np.eye(7, dtype=np.float32))
    assert own.dtype == jnp.float32
    np.testing.assert_allclose(np.diag(own), -1 / (2 * np.diag(a)), rtol=1e-4)


def test_the_printed_equation_5_24_is_transposed():
    """K V + V K^T = alpha B^{-1} Sigma B^{-1} is A^T P + P A + Q = 0 with A = -K^T; A = -K gives another matrix."""
    problem = quadratics.random_problems(1, 3, 2)
    h, b, sigma = (matrix[0] for matrix in problem.matrices)
    contraction, inverse = np.linalg.solve(b, h), np.linalg.inv(b)
    right = 0.1 * inverse @ sigma @ inverse

    def residual(p):
        return np.linalg.norm(contraction @ p + p @ contraction.T - right) / np.linalg.norm(right)

    solve = jax.jit(theory.solve_lyapunov)
    assert residual(np.asarray(solve(-contraction.T, right))) < 1e-10
    assert residual(np.asarray(solve(-contraction, right))) > 0.1


def test_all_four_bounds_on_the_trace_hold():
    """Equations 5.25 to 5.27 on 5,000 matrices of no symmetry, each attained by some of them."""
    matrix, right = stable(5000, 4, 5)
    exact = trace(by_elimination(matrix, right))
    bounds = jax.tree.map(np.asarray, jax.jit(jax.vmap(theory.lyapunov_trace_bounds))(matrix, right))
    for lower in (bounds.lower, bounds.root_lower):
        assert np.all(lower <= exact * ROUNDED)
    for upper in (bounds.upper, bounds.sharp_upper):
        assert np.all(exact <= upper * ROUNDED)
    assert np.all(bounds.sharp_upper <= bounds.upper * ROUNDED)
    assert np.any(bounds.root_lower > bounds.lower)
    assert np.any(bounds.root_lower < bounds.lower)
    # Attained: A = -I all but the roots', these for A = -Q^{1/2}.
    own = jax.jit(theory.lyapunov_trace_bounds)
    np.testing.assert_allclose(own(-np.eye(3), np.diag([1.0, 2, 3]))[:3], 3.0)
    np.testing.assert_allclose(own(-np.diag([1.0, 2, 3]), np.diag([1.0, 4, 9])).root_lower, 3.0)


def test_bounds_say_nothing_where_a_plus_its_transpose_is_not_definite():
    bounds = jax.jit(theory.lyapunov_trace_bounds)(np.array([[-1.0, 4.0], [0.0, -1.0]]), np.eye(2))
    assert all(np.isnan(bound) for bound in bounds)


def test_the_stationary_covariance_is_a_lyapunov_equation_with_another_b():
    """P = H^{1/2} V_inf H^{1/2} exactly, for rates up to the largest; with B as printed tr P is up to 1/4 too low."""
    problems = quadratics.random_problems(1000, 4, 6)
    fraction = np.random.default_rng(8).uniform(0.01, 1.9, 1000)
    rate = fraction / problems.largest
    matrix, right = map(np.asarray, jax.jit(jax.vmap(theory.stationary_lyapunov))(*problems.matrices, rate))
    floor = np.asarray(jax.jit(jax.vmap(theory.stationary_loss))(*problems.matrices, rate))
    covariance = np.asarray(jax.jit(jax.vmap(theory.stationary_covariance))(*problems.matrices, rate))
    solution, root = by_elimination(matrix, right), quadratics.sqrtm(problems.hessian)
    np.testing.assert_allclose(trace(solution), 2 * floor, rtol=1e-9)
    want = root @ covariance @ root
    np.testing.assert_allclose(solution, want, rtol=0, atol=1e-9 * np.max(np.abs(want)))
    bounds = jax.tree.map(np.asarray, jax.jit(jax.vmap(theory.lyapunov_trace_bounds))(matrix, right))
    assert np.all(np.maximum(bounds.lower, bounds.root_lower) <= 2 * floor * ROUNDED)
    assert np.all(2 * floor <= np.minimum(bounds.upper, bounds.sharp_upper) * ROUNDED)
    # Equation 5.28 as printed.
    inverse = np.linalg.solve(problems.curvature, root)
    printed = trace(
        by_elimination(-root @ inverse, rate[:, None, None] * transposed(inverse) @ problems.noise @ inverse)
    )
    np.testing.assert_allclose(
        printed, rate / 2 * trace(np.linalg.solve(problems.curvature, problems.noise)), rtol=1e-9
    )
    within = fraction < 0.5
    assert np.all(printed < 2 * floor)
    assert 0.75 < np.min(printed[within] / (2 * floor[within])) < 0.85


def test_lemma_4_holds():
    """On 5,000 symmetric S, definite or not, and X of any rank."""
    draw = np.random.default_rng(9)
    symmetric = draw.normal(size=(5000, 4, 4)) + draw.normal(size=(5000, 1, 1)) * np.eye(4)
    symmetric = symmetric + transposed(symmetric)
    _, semidefinite = stable(5000, 4, 10)
    exact = trace(symmetric @ semidefinite)
    bounds = jax.jit(jax.vmap(theory.trace_product_bounds))(symmetric, semidefinite)
    slack = 1e-13 * np.linalg.norm(symmetric, axis=(1, 2)) * trace(semidefinite)
    assert np.all(bounds.lower <= exact + slack)
    assert np.all(exact <= bounds.upper + slack)


def test_lemma_5_holds_for_matrices_of_no_symmetry():
    draw = np.random.default_rng(11)
    matrix, solution = draw.normal(size=(2, 1000, 4, 4))
    right = -(matrix @ solution + transposed(solution) @ matrix)
    own = np.asarray(jax.jit(jax.vmap(theory.pseudo_lyapunov_trace))(matrix, right))
    tolerance = rounding(jnp.float64, 64, condition=np.max(np.linalg.cond(matrix)))
    np.testing.assert_allclose(own, trace(solution), atol=tolerance * np.max(np.linalg.norm(solution, axis=(1, 2))))


def test_equation_a_11_has_lost_a_half():
    """tr(B V) = (alpha / 2) tr(H^{-1} Sigma) for the printed V, and with B - alpha / 2 H for the exact one."""
    problems = quadratics.random_problems(300, 4, 12)
    rate = np.random.default_rng(13).uniform(0.01, 0.5, 300) / problems.largest
    scale = rate[:, None, None]
    inverse = np.linalg.inv(problems.hessian)
    expected = rate / 2 * trace(inverse @ problems.noise)
    lemma = jax.jit(jax.vmap(theory.pseudo_lyapunov_trace))(-inverse, scale * inverse @ problems.noise @ inverse)
    np.testing.assert_allclose(lemma, expected, rtol=1e-9)
    contraction, inverse = np.linalg.solve(problems.curvature, problems.hessian), np.linalg.inv(problems.curvature)
    printed = by_elimination(-transposed(contraction), scale * inverse @ problems.noise @ inverse)
    np.testing.assert_allclose(trace(problems.curvature @ printed), expected, rtol=1e-8)  # and not twice that
    exact = np.asarray(jax.jit(jax.vmap(theory.stationary_covariance))(*problems.matrices, rate))
    primed = problems.curvature - scale / 2 * problems.hessian
    np.testing.assert_allclose(trace(primed @ exact), expected, rtol=1e-8)


def test_lemma_14_holds():
    """tr(A S X) <= tr(A T X) for commuting A >= 0, S <= T, and X >= 0, on 3,000 of them."""
    draw = np.random.default_rng(14)
    vectors = np.linalg.qr(draw.normal(size=(3000, 4, 4)))[0]

    def with_values(values):
        return (vectors * values[:, None]) @ transposed(vectors)

    s = draw.normal(size=(3000, 4))
    a, more = draw.exponential(size=(2, 3000, 4))
    _, x = stable(3000, 4, 15)
    least, most = (trace(with_values(a) @ with_values(values) @ x) for values in (s, s + more))
    assert np.all(least <= most)
