"""Where the natural gradient flow goes (NG-4; Martens 2016, sections 5.3 and 5.5).

Section 5.3 has it that with a divergence for objective the flow is the geodesic towards the target in the Riemannian
manifold that F makes. It is the other one: the straight line in expectations (Fujiwara and Amari 1995), in every
exponential family that has the target in it, and the two differ.
"""

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from curvax import losses


def flow(objective, batch, start, time, count=400):
    """theta at equal times up to ``time``, of d theta / dt = -F^{-1} grad h, by Runge and Kutta's method."""

    def velocity(theta):
        _, gradient, at = objective.value_and_grad(theta, batch)
        return -jnp.linalg.solve(curvax.fisher(at).to_dense(), gradient)

    def one(theta, _):
        h = time / count
        a = velocity(theta)
        b = velocity(theta + h / 2 * a)
        c = velocity(theta + h / 2 * b)
        new = theta + h / 6 * (a + 2 * b + 2 * c + velocity(theta + h * c))
        return new, new

    return np.asarray(jax.jit(lambda start: jax.lax.scan(one, start, length=count)[1])(jnp.asarray(start)))


def test_of_normal_distributions_it_is_straight_in_the_moments_and_no_half_ellipse():
    """From N(-1, s^2) to N(1, s^2): where the mean is 0 the variance is s^2 + 1, on the geodesic s^2 + 1/2."""

    def model(theta, x):
        return theta[0] + 0 * x, theta[1] + 0 * x

    variance = 0.25
    targets = 1 + np.array([-1.0, 1.0]) * variance**0.5  # of mean 1 and that variance
    objective, batch = curvax.Objective(model, losses.gaussian()), (jnp.zeros(2), jnp.asarray(targets))
    start = np.array([-1.0, np.log(variance)])
    times = np.linspace(0, 3, 401)[1:]
    mean, log_variance = flow(objective, batch, start, 3.0).T
    variances = np.exp(log_variance)
    left = np.exp(-times)
    np.testing.assert_allclose(mean, 1 - 2 * left, atol=1e-8)
    # E y^2 is the same at both ends, so that it stays.
    np.testing.assert_allclose(mean**2 + variances, 1 + variance, atol=1e-8)
    geodesic = variance + (1 - mean**2) / 2  # of the metric (dm^2 + 2 ds^2) / s^2 through both ends
    half = np.argmin(np.abs(mean))
    np.testing.assert_allclose([variances[half], geodesic[half]], [variance + 1, variance + 0.5], atol=1e-4)


def test_of_classes_it_is_straight_in_the_probabilities_and_no_great_circle():
    def model(theta, x):
        return jnp.concatenate([theta, jnp.zeros(1)]) + 0 * x

    objective = curvax.Objective(model, losses.softmax_cross_entropy())
    target, start = np.array([0.9, 0.05, 0.05]), np.array([-1.0, 1.0])
    batch = jnp.zeros((1, 3)), jnp.asarray(target)[None]
    logits = flow(objective, batch, start, 2.0)
    weights = np.exp(np.column_stack([logits, np.zeros(len(logits))]))
    path = weights / weights.sum(axis=1, keepdims=True)
    first = np.exp(np.append(start, 0)) / np.exp(np.append(start, 0)).sum()
    left = np.exp(-np.linspace(0, 2, 401)[1:])[:, None]
    np.testing.assert_allclose(path, target + left * (first - target), atol=1e-8)
    # The geodesic is the great circle of the roots; its plane goes through both ends and the origin.
    normal = np.cross(np.sqrt(first), np.sqrt(target))
    off = np.abs(np.sqrt(path) @ normal) / np.linalg.norm(normal)
    assert off.max() > 0.02


def test_a_step_of_rate_one_leaves_the_flow():
    """Figure 5.1: N(m, e^s) towards N(0, 1) from far away; the straight step overshoots what the flow arrives at."""

    def model(theta, x):
        return theta[0] + 0 * x, theta[1] + 0 * x

    objective, batch = curvax.Objective(model, losses.gaussian()), (jnp.zeros(2), jnp.array([-1.0, 1.0]))
    start = jnp.array([3.0, -1.0])

    @jax.jit
    def compute(theta):
        _, gradient, at = objective.value_and_grad(theta, batch)
        step = -jnp.linalg.solve(curvax.fisher(at).to_dense(), gradient)
        path = jax.vmap(lambda rate: objective(theta + rate * step, batch))(jnp.linspace(0, 1, 101))
        return path, step

    path, step = compute(start)
    end = flow(objective, batch, start, 12.0)[-1]
    np.testing.assert_allclose(end, [0, 0], atol=1e-4)
    np.testing.assert_allclose(start[0] + step[0], 0, atol=1e-12)  # the mean arrives
    assert start[1] + step[1] > 5  # the variance does not
    assert path[-1] > path.min() + 1
