"""The natural gradient is the steepest descent in the divergence of the predictions (NG-3; Martens 2016, 5.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests import oracles
from tests.theory import chains
from tests.tolerances import rounding


def problem():
    return chains.problem("bernoulli", examples=30)


def divergence(own, weights, new, x, reverse=False):
    """KL(P(theta + d) || P(theta)) of the predictions, mean over x; or KL(P(theta) || P(theta + d))."""
    targets = jnp.asarray(own.family.targets)

    def log(w):
        outputs = chains.network(w, x)
        return jax.vmap(lambda y: -own.family.negative_log(outputs, y))(targets)

    first, second = (log(weights), log(new)) if reverse else (log(new), log(weights))
    return jnp.mean(jnp.sum(jnp.exp(first) * (first - second), axis=0))


def natural_step(own):
    """F, g and F^{-1} g."""
    fisher = np.asarray(oracles.dense_fisher(own.objective, own.weights, own.batch))
    gradient = np.asarray(oracles.ravel(jax.jit(jax.grad(own.objective))(own.weights, own.batch)))
    return fisher, gradient, np.linalg.solve(fisher, gradient)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_best_step_within_a_divergence_tends_to_the_scaled_natural_gradient(reverse):
    r"""argmin h(theta + d) with KL <= eps^2 is d = -eps sqrt(2) F^{-1} g / ||g||_{F^{-1}} up to O(eps^2)."""
    own = problem()
    start = oracles.ravel(own.weights)
    _, gradient, natural = natural_step(own)
    length = np.sqrt(gradient @ natural)
    limit = -np.sqrt(2) * natural / length

    def stationary(unknowns, eps):
        """The gradient of the Lagrangian and the constraint, of u = d / eps and the multiplier; of order one."""

        def at(u):
            return oracles.unravel(start + eps * u, own.weights)

        def lagrangian(unknowns):
            u, multiplier = unknowns[:-1], unknowns[-1]
            bound = divergence(own, own.weights, at(u), own.batch[0], reverse) / eps**2 - 1
            return own.objective(at(u), own.batch) / eps + multiplier * bound

        return jax.grad(lagrangian)(unknowns)

    @jax.jit
    def solve(unknowns, eps):
        def newton(x, _):
            return x - jnp.linalg.solve(jax.jacfwd(stationary)(x, eps), stationary(x, eps)), None

        found = jax.lax.scan(newton, unknowns, length=20)[0]
        return found, stationary(found, eps)

    distances = []
    for eps in (0.04, 0.01):
        found, rest = solve(jnp.append(limit, length / np.sqrt(2)), eps)
        np.testing.assert_allclose(rest, 0, atol=rounding(jnp.float64, 1000, scale=1 / eps**2))
        assert found[-1] > 0  # h is convex here, so that this is its minimum
        distances.append(np.linalg.norm(found[:-1] - limit) / np.linalg.norm(limit))
    # A quarter of eps has about a quarter of the distance.
    assert distances[0] < 0.2
    assert 3.5 < distances[0] / distances[1] < 4.5


def test_the_bounded_step_of_the_library_is_that_step():
    """delta = -sqrt(2 c / g^T F^{-1} g) F^{-1} g has 1/2 delta^T F delta = c, nearly the divergence itself."""
    own = problem()
    fisher, gradient, natural = natural_step(own)
    ratios = []
    for budget in (1e-4, 1e-6):
        tx = curvax.natural_gradient(damping=1e-12, max_divergence=budget, max_iterations=200, tolerance=1e-12)

        @jax.jit
        def step(weights, batch, tx=tx):
            _, grads, at = own.objective.value_and_grad(weights, batch)
            updates, _ = tx.update(grads, tx.init(weights), weights, at=at)
            new = jax.tree.map(jnp.add, weights, updates)
            return oracles.ravel(updates), divergence(own, weights, new, batch[0])

        delta, realised = step(own.weights, own.batch)
        expected = -np.sqrt(2 * budget / (gradient @ natural)) * natural
        np.testing.assert_allclose(delta, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_allclose(delta @ fisher @ delta / 2, budget, rtol=1e-9)
        ratios.append(abs(float(realised) / budget - 1))
    # The relative rest is of the order of the step, which is a tenth as long.
    assert ratios[1] < 0.2 * ratios[0]
