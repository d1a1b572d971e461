"""Moments of a stochastic second-order iteration (AS-1, AS-2, AS-5; Martens 2016, section 5.7.2 and appendix A.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from curvax import theory
from tests.theory import quadratics
from tests.theory.quadratics import trace, transposed
from tests.tolerances import rounding

SOME = np.array([0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233])
ROUNDED = 1 + 1e-11  # an inequality may miss by this, the rounding of 233 steps


def one(problems, i=0):
    return quadratics.Problems(*(field[i] for field in problems))


def rates_up_to(problems, low, high, seed=7):
    """alpha with alpha lambda_1(K) between the two."""
    return np.random.default_rng(seed).uniform(low, high, len(problems.start)) / problems.largest


def losses(problems, rate):
    """E h - h* at ``SOME`` steps, (problems, steps)."""
    steps = quadratics.recursion(problems, np.broadcast_to(rate, (SOME[-1], *rate.shape)))
    return np.stack([step.total for k, step in enumerate(steps) if k in SOME], axis=1)


@pytest.mark.parametrize("rates", [np.full(40, 0.4), 1 / np.arange(1, 41)], ids=["constant", "annealed"])
def test_moments_are_those_of_many_runs(rates):
    problem = one(quadratics.random_problems(1, 3, 5, decades=0.5))
    problem = problem._replace(hessian=problem.hessian / problem.largest)
    samples = quadratics.runs(jax.random.key(0), problem, rates, 20_000)
    moments = jax.jit(theory.moments)(*problem.matrices, rates, problem.start)
    quadratics.check_moments(samples, problem.hessian, moments)


def test_moments_are_the_recursion_and_its_closed_form():
    """Under any rate, stable or not, and from a random start."""
    problems = quadratics.random_problems(60, 4, 1)
    rate = rates_up_to(problems, 0.02, 2.2)
    root = np.random.default_rng(2).normal(size=problems.hessian.shape)
    covariance = root @ transposed(root)
    expected = list(quadratics.recursion(problems, np.broadcast_to(rate, (20, 60)), covariance))

    def exact(h, b, sigma, rate, start, covariance):
        return theory.moments(h, b, sigma, jnp.full(20, rate), start, covariance=covariance)

    def closed(h, b, sigma, rate, start, covariance):
        def at(k):
            return theory.constant_rate_moments(h, b, sigma, rate, start, k, covariance=covariance)

        return jax.vmap(at)(jnp.arange(21))

    # In the norm of B, in which K is symmetric, nothing is magnified by more than the condition number of B.
    condition = np.max(np.linalg.cond(problems.curvature))
    for compute in (exact, closed):
        all_steps = jax.jit(jax.vmap(compute))(*problems.matrices, rate, problems.start, covariance)
        for k, step in enumerate(expected):
            moments = jax.tree.map(lambda leaf, k=k: leaf[:, k], all_steps)
            for own, want in (
                (moments.mean, step.mean),
                (moments.covariance, step.covariance),
                (moments.loss.noise, step.noise),
                (moments.loss.start, step.start),
            ):
                axes = tuple(range(1, want.ndim))
                error = np.max(np.abs(own - want), axis=axes) / np.maximum(np.max(np.abs(want), axis=axes), 1e-300)
                assert np.max(error) <= rounding(jnp.float64, 20 * 12, condition=condition)


def test_a_constant_rate_ends_with_the_stationary_covariance():
    problems = quadratics.random_problems(200, 4, 3)
    rate = rates_up_to(problems, 0.02, 1.9)
    covariance = jax.jit(jax.vmap(theory.stationary_covariance))(*problems.matrices, rate)
    floor = jax.jit(jax.vmap(theory.stationary_loss))(*problems.matrices, rate)
    for i, own in enumerate(np.asarray(covariance)):
        h, b, sigma = (matrix[i] for matrix in problems.matrices)
        inverse = np.linalg.inv(b)
        kept = np.eye(4) - rate[i] * inverse @ h
        oracle = scipy.linalg.solve_discrete_lyapunov(kept, rate[i] ** 2 * inverse @ sigma @ inverse)
        primed = b - rate[i] / 2 * h
        # What is left of a disturbance adds up to 1 / (1 - r^2), with r the spectral radius.
        slowness = 1 / (1 - np.max(np.abs(np.linalg.eigvals(kept))) ** 2)
        condition = slowness * max(np.linalg.cond(b), np.linalg.cond(primed))
        tolerance = rounding(jnp.float64, 4 * 16, condition=condition)
        np.testing.assert_allclose(own, oracle, rtol=0, atol=tolerance * np.max(np.abs(oracle)))
        np.testing.assert_allclose(floor[i], np.trace(h @ oracle) / 2, rtol=tolerance)
        # The traces that B - alpha / 2 H in the place of B makes exact.
        half = rate[i] / 2
        np.testing.assert_allclose(np.trace(h @ own), half * np.trace(np.linalg.solve(primed, sigma)), rtol=tolerance)
        tolerance = rounding(jnp.float64, 4 * 16, condition=condition * np.linalg.cond(h))
        np.testing.assert_allclose(np.trace(primed @ own), half * np.trace(np.linalg.solve(h, sigma)), rtol=tolerance)


def printed_covariance(problem, rate, steps):
    """Theorem 1 as printed: V_{k+1} = V_k - alpha (K V_k + V_k K^T) + alpha^2 B^{-1} Sigma B^{-1}, V_0 = d d^T."""
    contraction = np.linalg.solve(problem.curvature, problem.hessian)
    inverse = np.linalg.inv(problem.curvature)
    covariance = np.outer(problem.start, problem.start)
    for _ in range(steps):
        shrunk = contraction @ covariance
        covariance = covariance - rate * (shrunk + shrunk.T) + rate**2 * inverse @ problem.noise @ inverse
    return covariance


def test_the_printed_covariance_of_theorem_1_is_false_at_both_ends():
    """It is d d^T, not 0, for k = 0, and its limit alpha Xi_K^{-1}(B^{-1} Sigma B^{-1}) is of first order in alpha."""
    problem = quadratics.with_spectrum(np.eye(2), np.eye(2), np.eye(2), np.array([1.0, 2.0]))
    rate = 0.45
    exact = jax.jit(lambda: theory.constant_rate_moments(*problem.matrices, rate, problem.start, 0).covariance)()
    assert np.all(exact == 0)
    assert np.max(printed_covariance(problem, rate, 0)) == 4
    stationary = jax.jit(lambda rate: theory.stationary_covariance(*problem.matrices, rate))
    limit = stationary(rate)
    printed = printed_covariance(problem, rate, 300)
    np.testing.assert_allclose(printed, rate / 2 * np.eye(2), atol=1e-14)
    np.testing.assert_allclose(limit, rate / (2 - rate) * np.eye(2), atol=1e-14)  # 29 % more
    # To first order in alpha the two agree.
    np.testing.assert_allclose(stationary(1e-6), 0.5e-6 * np.eye(2), rtol=1e-6, atol=1e-20)


def test_the_mean_knows_nothing_of_the_noise_and_b_equal_to_h_is_there_after_one_annealed_step():
    problem = one(quadratics.random_problems(1, 4, 4))
    rates = 1 / np.arange(1.0, 9)
    mean = jax.jit(lambda b, sigma: theory.moments(problem.hessian, b, sigma, rates, problem.start).mean)
    np.testing.assert_array_equal(mean(problem.curvature, problem.noise), mean(problem.curvature, 0 * problem.noise))
    there = mean(problem.hessian, problem.noise)[1:]
    assert np.max(np.abs(there)) < 1e-13 * np.max(np.abs(problem.start))


def constant_rate_bounds(problems, rate):
    bound = jax.jit(jax.vmap(lambda *arguments: theory.constant_rate_bounds(*arguments, SOME)))
    return jax.tree.map(np.asarray, bound(*problems.matrices, rate, problems.start))


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.5), (0.5, 1.0), (1.0, 1.98)])
def test_the_corrected_theorem_6_holds(low, high):
    """On 3,000 problems at 13 steps each, for constant rates."""
    problems = quadratics.random_problems(3000, 4, 0)
    rate = rates_up_to(problems, low, high)
    exact, bounds = losses(problems, rate), constant_rate_bounds(problems, rate)
    assert np.all(bounds.lower <= exact * ROUNDED)
    assert np.all(exact <= bounds.upper * ROUNDED)
    np.testing.assert_allclose(bounds.lower[:, 0], quadratics.first_loss(problems), rtol=1e-10)
    np.testing.assert_allclose(bounds.upper[:, 0], quadratics.first_loss(problems), rtol=1e-10)


def test_both_bounds_of_theorem_6_are_false_as_printed():
    """U fails for large k, by up to 4/3, and L for small k, by 2 at k = 0: here in a fifth and a tenth of all cases."""
    problems = quadratics.random_problems(3000, 4, 0)
    rate = rates_up_to(problems, 0.01, 0.5)
    exact, first = losses(problems, rate), quadratics.first_loss(problems)[:, None]
    fast, slow = (rate * problems.largest)[:, None], (rate * problems.smallest)[:, None]
    floor = (rate / 4 * trace(np.linalg.solve(problems.curvature, problems.noise)))[:, None]

    def printed(one, other):
        return (1 - (1 - 2 * one) ** SOME) * floor + ((1 - 2 * other) ** SOME + (1 - other) ** (2 * SOME)) * first

    upper, lower = printed(fast, slow), printed(slow, fast)
    above, below = exact > upper * ROUNDED, exact * ROUNDED < lower
    assert np.mean(above) > 0.15
    assert np.mean(below) > 0.08
    assert 1.2 < np.max(exact[above] / upper[above]) < 4 / 3
    np.testing.assert_allclose(np.max(lower[below] / exact[below]), 2, rtol=1e-10)
    # The printed floor is that of alpha -> 0.
    exact_floor = jax.jit(jax.vmap(theory.stationary_loss))(*problems.matrices, rate)
    assert np.all(exact_floor > floor[:, 0])


def test_one_step_of_equation_5_16_holds_and_two_only_with_what_commutes():
    """tr(Y (I - Xi_C)^i(X)) = tr(Y (I - 2 C)^i X): the proof goes on as though Y (I - 2 C) were symmetric."""
    draw = np.random.default_rng(3)
    c, y, x = (root + root.T for root in draw.normal(size=(3, 4, 4)))

    def sides(y, times):
        left = x
        for _ in range(times):
            left = left - c @ left - (c @ left).T
        return np.trace(y @ left), np.trace(y @ np.linalg.matrix_power(np.eye(4) - 2 * c, times) @ x)

    np.testing.assert_allclose(*sides(y, 1), rtol=1e-12)
    assert abs(np.subtract(*sides(y, 2))) > 1
    np.testing.assert_allclose(*sides(c @ c - c, 3), rtol=1e-12)


def test_dtypes_transformations_and_validity():
    """float32 in, float32 out; vmap over rates; a derivative; nan where no stationary distribution is."""
    h, b, sigma = (jnp.asarray(matrix, jnp.float32) for matrix in (np.diag([4.0, 1.0]), np.eye(2), np.eye(2)))
    d = jnp.ones(2)

    @jax.jit
    def compute(rates):
        floors = jax.vmap(lambda rate: theory.stationary_loss(h, b, sigma, rate))(rates)
        slope = jax.grad(lambda rate: theory.stationary_loss(h, b, sigma, rate))(rates[0])
        beyond = (
            theory.stationary_covariance(h, b, sigma, rates[3]),
            theory.constant_rate_bounds(h, b, sigma, rates[3], d, 3),
        )
        return floors, slope, beyond, theory.moments(h, b, sigma, rates, d)

    floors, slope, beyond, moments = compute(jnp.array([0.1, 0.25, 0.5, 0.6, -0.1]))
    assert {leaf.dtype for leaf in jax.tree.leaves((floors, beyond, moments))} == {jnp.dtype("float32")}
    expected = [rate / 4 * (1 / (1 - 2 * rate) + 1 / (1 - rate / 2)) for rate in (0.1, 0.25)]
    np.testing.assert_allclose(floors[:2], expected, rtol=1e-6)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves((floors[2:], beyond)))
    np.testing.assert_allclose(slope, (1 / 4) * (1 / 0.8**2 + 1 / 0.95**2), rtol=1e-5)
    one = np.array([[1]])
    np.testing.assert_allclose(jax.jit(theory.stationary_loss)(one, one, one, 0.5), 1 / 6)


def test_a_matrix_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"curvature must be a square matrix .* hessian \(2, 2\), curvature \(2,\)"):
        theory.stationary_loss(jnp.eye(2), jnp.ones(2), jnp.eye(2), 0.1)
    with pytest.raises(ValueError, match=r"noise must be a square matrix"):
        theory.moments(jnp.eye(2), jnp.eye(2), jnp.eye(3), jnp.ones(2), jnp.ones(2))
