"""Why the empirical Fisher matrix is no curvature (NG-5; Martens 2016, section 5.6.1), by the thesis' own example.

n = 1, f = theta, R = N(z, 1) and the one case y = 0: h = theta^2 / 2, F = 1, and the empirical one is theta^2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax

STARTS = np.random.default_rng(0).normal(size=1000)


def iterate(starts, exponent, rates):
    """theta <- theta - alpha_k (theta^2)^{-xi} theta from many starts; all iterates."""
    iterates = [starts]
    for rate in rates:
        theta = iterates[-1]
        iterates.append(theta - rate * np.sign(theta) * np.abs(theta) ** (1 - 2 * exponent))
    return np.array(iterates)


def test_the_matrices_of_the_example():
    objective = curvax.Objective(lambda w, x: w + 0 * x, curvax.losses.squared_error())
    batch = jnp.zeros(1), jnp.zeros(1)

    @jax.jit
    @jax.vmap
    def compute(theta):
        loss, gradient, at = objective.value_and_grad(theta, batch)
        return loss, gradient, curvax.fisher(at).to_dense()[0, 0], curvax.empirical_fisher(at).to_dense()[0, 0]

    loss, gradient, fisher, empirical = compute(STARTS)
    np.testing.assert_allclose(loss, STARTS**2 / 2)
    np.testing.assert_allclose(gradient, STARTS)
    np.testing.assert_allclose(fisher, 1)
    np.testing.assert_allclose(empirical, STARTS**2)


@pytest.mark.parametrize("exponent", [0.5, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_of_two_iterates_one_is_as_far_off_as_the_rate_says(exponent, power):
    """max(|theta_k|, |theta_{k+1}|) >= (alpha_k / 2)^{1 / (2 xi)}, for rates k^-power.

    |theta_{k+1}| >= alpha_k |theta_k|^{1 - 2 xi} - |theta_k|, which is least where both are equal. So the iterates do
    not fall as fast as alpha_k, as section 5.6.1 has it, but for xi = 1/2: up to xi = 1 they fall as its square root.
    """
    rates = np.arange(1.0, 2001) ** -power
    sizes = np.abs(iterate(STARTS, exponent, rates))
    sizes[:, np.any(sizes == 0, axis=0)] = np.inf  # where rounding has hit the minimum
    pairs = np.maximum(sizes[:-1], sizes[1:])
    bound = (rates / 2) ** (1 / (2 * exponent))
    assert np.all(pairs >= (1 - 1e-9) * bound[:, None])
    if exponent <= 0.6:  # and that is how far they are off
        assert np.median(pairs[-1][np.isfinite(pairs[-1])]) < 4 * bound[-1]


def test_a_constant_rate_does_not_converge_and_the_fisher_matrix_does():
    rate = 0.1
    ends = np.abs(iterate(STARTS, 0.5, np.full(1000, rate)))[-2:]
    np.testing.assert_allclose(ends.sum(axis=0), rate, rtol=1e-9)  # the limit cycle
    exact = iterate(STARTS, 0.0, np.full(200, rate))
    np.testing.assert_allclose(exact[-1], (1 - rate) ** 200 * STARTS, rtol=1e-12)


@pytest.mark.parametrize(("power", "critical"), [(1.0, (1 + 5**0.5) / 4), (0.5, (1 + 3**0.5) / 4)])
def test_an_exponent_below_one_is_not_enough_even_with_rates_that_fall(power, critical):
    """Section 5.6.1 asks for xi < 1. From a share alpha^{1 / (2 xi (2 xi - 1))} of places a step leads far away.

    With rates k^-p these are infinitely many where 2 xi (2 xi - 1) >= p: from xi = 0.81 on for 1 / k, and from 0.68 on
    for 1 / sqrt(k).
    """
    rates = np.arange(1.0, 20_001) ** -power

    def farthest(exponent):
        """The median over starts of the largest |theta_k|, for k around 10^3 and around 10^4."""
        sizes = np.abs(iterate(STARTS[:200], exponent, rates))
        return [np.median(np.max(sizes[k : 2 * k], axis=0)) for k in (1000, 10_000)]

    early, late = farthest(critical + 0.09)
    assert late > 0.9 * early > 0.9
    early, late = farthest(critical - 0.15)
    assert late < 0.4 * early


def test_rates_that_fall_too_fast_do_not_arrive():
    """Rates may fall "sufficiently fast" and too fast: the way is no longer than their sum."""
    start = np.array([3.0])
    np.testing.assert_allclose(iterate(start, 0.5, 2.0 ** -np.arange(1, 60))[-1], 2.0)


def test_the_exponent_one_can_converge_for_one_start_and_for_none_beside_it():
    """With alpha_k = c theta_k^2, known in advance, theta_k = (1 - c)^k theta_0; deviations grow by 1 + c a step."""
    share, count = 0.1, 60
    rates = share * (1 - share) ** (2 * np.arange(count))
    ends = np.abs(iterate(np.array([1.0, 1.001, 0.999]), 1.0, rates)[-1])
    np.testing.assert_allclose(ends[0], (1 - share) ** count, rtol=1e-6)
    assert ends[1:].min() > 10 * ends[0]
