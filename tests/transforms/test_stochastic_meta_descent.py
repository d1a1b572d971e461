"""Stochastic meta-descent against a dense loop; what v stands for, and where it ends (CL-4)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.oracles import dense_ggn
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, run

GOAL, PARAMS, DATA = problem("mlp")[1:]
METHOD = curvax.scale_by_stochastic_meta_descent


@pytest.mark.parametrize("exponential", [False, True])
def test_a_run_is_the_dense_loop(exponential):
    mu, decay = 2.0, 0.9
    tx = optax.chain(METHOD(0.1, meta_rate=mu, memory_decay=decay, exponential=exponential), optax.scale(-1.0))
    p, v = 0.1, np.zeros(flat(PARAMS).size)
    for taken in run(tx, GOAL, PARAMS, DATA, 5):
        matrix, g = np.asarray(dense_ggn(GOAL, taken.before, DATA)), gradient(GOAL, taken.before, DATA)
        p = p * np.clip(np.exp(-mu * g * v) if exponential else 1 - mu * g * v, 0.5, 2.0)
        v = decay * v - p * (g + decay * matrix @ v)
        np.testing.assert_allclose(flat(taken.updates), -p * g, rtol=1e-9)
    assert np.ptp(p) > 0.01


def test_v_is_how_the_parameters_depend_on_the_log_of_the_rates():
    """With nothing forgotten and the Hessian, exactly: the derivative of the run by a common shift of all log p.

    As derived, with the gradient that the step was taken by; with that behind it, as eq. 3.10 is printed, it is not.
    """
    goal = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error())
    draw = np.random.default_rng(0)
    w, data = jnp.asarray(draw.normal(size=(3, 1))), (draw.normal(size=(8, 3)), draw.normal(size=(8, 1)))

    def trajectory(shift):
        def step(w, _):
            w = w - 0.3 * jnp.exp(shift) * jax.grad(goal)(w, data)
            return w, w

        return jax.lax.scan(step, w, length=6)[1]

    @jax.jit
    def compute():
        states, derivative = jax.jvp(trajectory, (0.0,), (1.0,))
        slopes = jax.vmap(lambda w: jax.grad(goal)(w, data))(jnp.concatenate([w[None], states]))
        hessians = jax.vmap(lambda w: jax.hessian(goal)(w, data)[:, 0, :, 0])(jnp.concatenate([w[None], states]))
        return derivative, slopes, hessians

    derivative, slopes, hessians = (np.asarray(x) for x in compute())
    tx = optax.chain(METHOD(0.3, meta_rate=0.0, memory_decay=1.0, curvature=curvax.Hessian()), optax.scale(-1.0))
    printed = np.zeros((3, 1))
    for k, taken in enumerate(run(tx, goal, w, data, 6)):
        v = np.asarray(taken.state[0].memory[1])
        np.testing.assert_allclose(v, derivative[k], rtol=1e-10, atol=1e-12)
        printed = printed - 0.3 * (slopes[k + 1] + hessians[k] @ printed)
    assert np.linalg.norm(printed - v) > 0.05 * np.linalg.norm(v)


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.0])
def test_where_v_ends_if_nothing_changes(decay):
    """At -(lambda G + (1 - lambda) / p)^{-1} g: the Newton step for lambda = 1 alone, and for 0 minus p times g."""
    draw = np.random.default_rng(1)
    goal = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    x, y = draw.normal(size=(9, 4)), draw.normal(size=(9, 1))
    w, matrix = jnp.ones((4, 1)), x.T @ x / 9
    g, p = gradient(goal, w, (x, y)), 1 / np.linalg.eigvalsh(matrix)[-1]

    @jax.jit
    def held(w):
        tx = METHOD(p, meta_rate=0.0, memory_decay=decay)
        _, grads, at = goal.value_and_grad(w, (x, y))
        return jax.lax.scan(lambda s, _: (tx.update(grads, s, w, at=at)[1], None), tx.init(w), length=3000)[0]

    expected = -np.linalg.solve(decay * matrix + (1 - decay) / p * np.eye(4), g)
    np.testing.assert_allclose(np.asarray(held(w).memory[1])[:, 0], expected, rtol=1e-9)


def test_without_memory_it_multiplies_by_products_of_successive_gradients():
    """log p <- log p + mu p g g^- : the product of Almeida et al. (CL-6), times p."""
    tx = METHOD(0.2, meta_rate=0.7, memory_decay=0.0, exponential=True, min_factor=0.0, max_factor=jnp.inf)
    tx, p, last = optax.chain(tx, optax.scale(-1.0)), 0.2, 0.0
    for taken in run(tx, GOAL, PARAMS, DATA, 4):
        g = gradient(GOAL, taken.before, DATA)
        p = p * np.exp(0.7 * p * g * last)
        np.testing.assert_allclose(flat(taken.updates), -p * g, rtol=1e-9)
        last = g
