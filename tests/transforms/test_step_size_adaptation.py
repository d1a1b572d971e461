"""Step sizes by products of gradients against loops of numpy; their drift and their equivalence (CL-5, CL-6)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.tolerances import rounding

DRAW = np.random.default_rng(0)
GRADIENTS = DRAW.normal(size=(40, 7)) + 0.5 * DRAW.normal(size=7)
GRADIENTS[5, 2] = GRADIENTS[9, 3] = 0.0


def steps_of(tx, gradients=GRADIENTS):
    """The updates of a run on given gradients, in one program."""

    @jax.jit
    def run(gradients):
        def step(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, updates

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]

    return np.asarray(run(jnp.asarray(gradients)))


def silva_almeida(up, down, still=1.0):
    p, last, steps = np.ones(7), None, []
    for g in GRADIENTS:
        if last is not None:
            product = g * last
            p = p * np.where(product > 0, up, np.where(product < 0, down, still))
        steps.append(p * g)
        last = g
    return np.stack(steps)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"up": 1.3, "down": 0.6}, silva_almeida(1.3, 0.6)),
        ({}, silva_almeida(1.2, 1 / 1.2)),
        ({"up": 1.5, "grow_at_zero": True}, silva_almeida(1.5, 1 / 1.5, 1.5)),
    ],
)
def test_silva_almeida_is_the_loop(options, expected):
    steps = steps_of(curvax.scale_by_silva_almeida(min_scale=0.0, max_scale=jnp.inf, **options))
    np.testing.assert_allclose(steps, expected, rtol=rounding(jnp.float64, 200))


@pytest.mark.parametrize("exponential", [False, True])
def test_almeida_with_momentum_is_the_loop(exponential):
    """theta_{k+1} = theta_k - P g + mu (theta_k - theta_{k-1}), the momentum being optax's."""
    alpha, gamma, mu, rate = 0.3, 0.9, 0.8, 0.05
    p, last, v, change, expected = np.ones(7), np.zeros(7), np.zeros(7), np.zeros(7), []
    for k, g in enumerate(GRADIENTS):
        v = gamma * v + (1 - gamma) * g**2
        ratio = alpha * g * last / (v / (1 - gamma ** (k + 1)))
        p = p * np.clip(np.exp(ratio) if exponential else 1 + ratio, 0.5, 2.0)
        change = -rate * p * g + mu * change
        expected.append(change)
        last = g
    method = curvax.scale_by_almeida(alpha, decay=gamma, exponential=exponential, max_scale=jnp.inf)
    steps = steps_of(optax.chain(method, optax.trace(mu), optax.scale_by_learning_rate(rate)))
    np.testing.assert_allclose(steps, np.stack(expected), rtol=rounding(jnp.float64, 2000))


def test_bounds_hold_and_a_gradient_that_is_not_finite_is_skipped_without_any_point():
    """In a plain loop of optax, without parameters."""
    tx = curvax.scale_by_silva_almeida(up=2.0, min_scale=0.25, max_scale=4.0)
    constant, turning = np.ones((10, 1)), (-1.0) ** np.arange(10)[:, None]
    assert steps_of(tx, constant).max() == 4.0
    assert np.abs(steps_of(tx, turning)).min() == 0.25

    bad = np.ones((3, 1))
    bad[1] = np.nan
    np.testing.assert_array_equal(steps_of(tx, bad).ravel(), [1.0, 0.0, 2.0])


def test_steps_drift_without_bound_on_noise_unless_down_is_one_over_up():
    """log P of signs that agree by chance half of the time: a mean of (log u + log d) / 2 in a step (CL-5)."""
    noise = np.random.default_rng(1).normal(size=(400, 2000))

    def drift(up, down):
        tx = curvax.scale_by_silva_almeida(up=up, down=down, min_scale=0.0, max_scale=jnp.inf)
        return np.mean(np.log(steps_of(tx, noise)[-1] / noise[-1])) / (len(noise) - 1)

    for up, down in [(1.2, 0.7), (1.2, 0.9), (1.2, None)]:
        mean = (np.log(up) + np.log(1 / up if down is None else down)) / 2
        # Each of the draws is a sum of signs, of standard deviation log(u / d) / 2 a step.
        spread = np.log(up / (1 / up if down is None else down)) / 2 / np.sqrt(noise.size)
        assert abs(drift(up, down) - mean) < 5 * spread


def test_a_step_in_log_p_at_a_rate_over_the_product_is_silva_and_almeidas():
    r"""With u = exp(alpha) = 1 / d (CL-6), but only if the rate is alpha / (P_jj |g_j g_j^+|).

    The derivative of h(theta - P g) by log P_jj is -P_jj g_j g_j^+. The factor P_jj is missing in print: there u would
    be exp(alpha P_jj), another one for each parameter and step.
    """
    alpha, draw = 0.2, np.random.default_rng(2)
    root = draw.normal(size=(5, 5))
    theta, p = jnp.asarray(draw.normal(size=5)), jnp.asarray(np.exp(draw.normal(size=5)))

    @jax.jit
    def compute(theta, p):
        def h(theta):
            return jnp.sum(jnp.cosh(root @ theta))

        g = jax.grad(h)(theta)
        behind = jax.grad(h)(theta - 0.1 * p * g)
        slope = jax.grad(lambda q: h(theta - 0.1 * jnp.exp(q) * g))(jnp.log(p))
        return g, behind, slope

    g, behind, slope = map(np.asarray, compute(theta, p))
    scaled = 0.1 * np.asarray(p)
    np.testing.assert_allclose(slope, -scaled * g * behind, rtol=1e-10)
    signs = np.sign(g * behind)
    corrected = -alpha / (scaled * np.abs(g * behind)) * slope
    np.testing.assert_allclose(np.exp(corrected), np.exp(alpha * signs), rtol=1e-10)
    printed = -alpha / np.abs(g * behind) * slope
    np.testing.assert_allclose(printed, alpha * scaled * signs, rtol=1e-10)
    assert np.ptp(np.abs(printed)) > 0.5 * alpha * np.ptp(scaled) > 0

    method = curvax.scale_by_silva_almeida(up=np.exp(alpha))
    taken = steps_of(method, np.stack([g, behind]))[1] / behind
    np.testing.assert_allclose(taken, np.exp(corrected), rtol=1e-10)
