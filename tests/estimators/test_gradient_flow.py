"""Diagnostics of vanishing gradients against dense Jacobians and eigenvectors (AD-18), and secant ratios (DG-7)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax import estimators
from curvax.matrices.linear_map import DenseMap


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_norms_by_lag_are_those_of_the_unrolled_network(gain):
    draw = np.random.default_rng(0)
    weights, inputs = gain * draw.normal(size=(4, 4)) / 2, 0.3 * draw.normal(size=(6, 4))

    def step(h, x):
        return jnp.tanh(weights @ h + x)

    norms = jax.jit(lambda h: estimators.jacobian_norms_by_lag(step, h, jnp.asarray(inputs)))(jnp.zeros(4))

    state, product, states = np.zeros(4), np.eye(4), []
    for x in inputs:
        state = np.tanh(weights @ state + x)
        states.append(state)
    expected = [1.0]
    for state in reversed(states):
        product = product @ np.diag(1 - state**2) @ weights
        expected.append(np.linalg.svd(product)[1][0])
    np.testing.assert_allclose(norms, expected, rtol=1e-10)


def test_gradients_by_lag_are_those_of_the_unrolled_network():
    """Of a loss of all states, whose derivatives add up on the way back."""
    draw = np.random.default_rng(1)
    weights, inputs, targets = draw.normal(size=(4, 4)), 0.3 * draw.normal(size=(6, 4)), draw.normal(size=(7, 4))

    def step(h, x):
        return jnp.tanh(weights @ h + x)

    def loss(states):
        return jnp.sum((states - targets) ** 2) / 2

    start = jnp.asarray(draw.normal(size=4))
    norms = jax.jit(lambda h: estimators.gradient_norms_by_lag(loss, step, h, jnp.asarray(inputs)))(start)
    states = [np.asarray(start)]
    for x in inputs:
        states.append(np.tanh(weights @ states[-1] + x))
    total, expected = states[-1] - targets[-1], []
    for t in range(6, -1, -1):
        expected.append(np.linalg.norm(total))
        total = weights.T @ ((1 - states[t] ** 2) * total) + states[t - 1] - targets[t - 1]
    np.testing.assert_allclose(norms, expected, rtol=1e-10)


def test_a_linear_recurrence_of_one_unit_vanishes_below_one_and_explodes_above():
    """h_T = a^T h_0: both norms are a^l, and dh_T / da = T a^(T-1) has a factor of 1e4 from a = 0.95 to 1.05."""

    @jax.jit
    def norms(a):
        given = (lambda h, x: a * h + x, jnp.ones(1), jnp.zeros((100, 1)))
        jacobians = estimators.jacobian_norms_by_lag(*given)
        return jacobians, estimators.gradient_norms_by_lag(lambda states: states[-1, 0], *given)

    for a in (0.95, 1.0, 1.05):
        for found in norms(a):
            np.testing.assert_allclose(found, a ** np.arange(101), rtol=1e-10)
    assert (1.05 / 0.95) ** 99 > 1e4


def test_layer_norms_are_those_of_dense_jacobians():
    draw = np.random.default_rng(0)
    params = {"a": jnp.asarray(draw.normal(size=(3, 4))), "b": jnp.asarray(draw.normal(size=(4, 2)))}
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], curvax.losses.squared_error())
    batch = draw.normal(size=(5, 3)), draw.normal(size=(5, 2))
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return estimators.layer_norms(tapped, jax.random.key(0), num_samples=4000)

    norms = compute(params, batch)
    hidden = np.tanh(batch[0] @ params["a"])
    jacobians = (1 - hidden**2)[:, :, None] * np.asarray(params["b"])
    residual = hidden @ params["b"] - batch[1]
    np.testing.assert_allclose(norms.jacobian["a"], np.sqrt(np.mean(np.sum(jacobians**2, axis=(1, 2)))), rtol=0.02)
    np.testing.assert_allclose(norms.jacobian["b"], np.sqrt(2), rtol=1e-10)
    slopes = np.einsum("nio,no->ni", jacobians, residual)
    np.testing.assert_allclose(norms.gradient["a"], np.sqrt(np.mean(np.sum(slopes**2, axis=1))), rtol=1e-10)
    np.testing.assert_allclose(norms.gradient["b"], np.sqrt(np.mean(np.sum(residual**2, axis=1))), rtol=1e-10)


def test_boosts_put_together_are_the_newton_step():
    matrix = np.diag([9.0, 2.0, 0.5, 0.1]) + 0.05
    gradient = {"x": jnp.array([1.0, -1.0]), "y": jnp.array([0.2, 0.1])}

    @jax.jit
    def compute(gradient):
        pairs = estimators.top_eigenpairs(DenseMap.of(jnp.asarray(matrix), gradient), jax.random.key(0), num_pairs=4)
        found = estimators.newton_boosts(pairs, gradient, damping=0.3)
        return pairs, found, jax.tree.map(lambda d: jnp.tensordot(found.newton, d, 1), pairs.vectors)

    pairs, boosts, step = compute(gradient)
    flat = np.array([1.0, -1.0, 0.2, 0.1])
    together = np.concatenate([step["x"], step["y"]])
    np.testing.assert_allclose(together, np.linalg.solve(matrix + 0.3 * np.eye(4), flat), rtol=1e-8)
    np.testing.assert_allclose(boosts.boost, (pairs.values[0] + 0.3) / (pairs.values + 0.3), rtol=1e-12)
    np.testing.assert_allclose(np.sum(boosts.gradient**2), flat @ flat, rtol=1e-9)


@pytest.mark.parametrize("cancels", [False, True])
def test_a_long_lag_is_boosted_by_what_its_gradient_lacks_unless_cases_cancel(cancels):
    """A weight that acts over a lag l has the gradient c^l and the curvature c^2l of one that acts at once (AD-18).

    The Newton step makes up for it, and has to: the targets ask for both weights alike. Where the cases ask for
    opposite changes, there is no gradient to boost, whatever the curvature.
    """
    decay = 0.5**8
    x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, decay], [0.0, decay]])
    y = x @ jnp.array([[1.0], [1.0]])
    if cancels:
        y = y.at[3].set(-y[3])
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())

    @jax.jit
    def compute(w):
        _, gradient, at = objective.value_and_grad(w, (x, y))
        pairs = estimators.top_eigenpairs(curvax.ggn(at), jax.random.key(0), num_pairs=2)
        return estimators.newton_boosts(pairs, gradient)

    found = compute(jnp.zeros((2, 1)))
    np.testing.assert_allclose(found.boost, [1.0, decay**-2], rtol=1e-6)
    sizes, steps = np.abs(np.asarray(found.gradient)), np.abs(np.asarray(found.newton))
    # What cancels is zero to the rounding of the other gradient, 0.5, of which the eigenvector has its share.
    rounding = 2e-16 if cancels else 0.0
    np.testing.assert_allclose(sizes, [0.5, 0.0 if cancels else decay**2 / 2], rtol=1e-6, atol=rounding)
    np.testing.assert_allclose(steps, [1.0, 0.0 if cancels else 1.0], rtol=1e-6, atol=rounding / decay**2)


@pytest.mark.parametrize("make", [curvax.levenberg_marquardt, curvax.hessian_free, curvax.diagonal_newton])
def test_no_deterministic_step_parts_units_that_are_the_same_or_wakes_one_that_is_zero(make):
    """Two units with the same weights, and one with none at all (AD-18): symmetry has to be broken by the start."""
    draw = np.random.default_rng(0)
    first, last = draw.normal(size=(3, 4)), draw.normal(size=(4, 2))
    first[:, 1], last[1], first[:, 3], last[3] = first[:, 0], last[0], 0.0, 0.0
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], curvax.losses.squared_error())
    batch = draw.normal(size=(9, 3)), draw.normal(size=(9, 2))

    def exact(at, key):
        del key
        return curvax.ggn(at).diagonal()

    tx = make(diagonal=exact) if make is curvax.diagonal_newton else make(judged_by="same_batch")

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            _, gradient, at = objective.value_and_grad(params, batch)
            updates, state = tx.update(gradient, state, params, at=at)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=5)[0][0]

    params = run({"a": jnp.asarray(first), "b": jnp.asarray(last)})
    assert np.abs(params["a"][:, 0] - first[:, 0]).max() > 0.1
    np.testing.assert_allclose(params["a"][:, 0], params["a"][:, 1], atol=1e-8)
    np.testing.assert_allclose(params["b"][0], params["b"][1], atol=1e-8)
    assert not np.any(params["a"][:, 3])
    assert not np.any(params["b"][3])


def test_secant_ratios_average_to_the_diagonal_and_to_any_column():
    """Over all signs exactly; and they are the limit of those of small steps (eq. 3.12)."""
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) * p["s"], curvax.losses.squared_error())
    params, draw = {"w": jnp.array([0.3, -0.5, 0.2]), "s": jnp.array(1.5)}, np.random.default_rng(0)
    batch = draw.normal(size=(5, 3)), draw.normal(size=5)
    flat, unravel = ravel_pytree(params)
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=flat.size)))

    @jax.jit
    def compute(params, batch):
        matrix = curvax.hessian(objective.linearize(params, batch))
        rows = jax.vmap(lambda d: curvax.trees.ravel(estimators.secant_ratios(matrix, unravel(d))))(signs)
        column = jax.vmap(lambda d: curvax.trees.ravel(estimators.secant_ratios(matrix, unravel(d), entry=d[1])))(signs)
        slope = jax.grad(lambda v: objective(unravel(v), batch))
        difference = (slope(flat + 1e-6 * signs[5]) - slope(flat - 1e-6 * signs[5])) / (2e-6 * signs[5])
        return jnp.mean(rows, axis=0), jnp.mean(column, axis=0), rows[5], difference, matrix.to_dense()

    diagonal, column, ratios, differences, dense = compute(params, batch)
    np.testing.assert_allclose(diagonal, np.diag(dense), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(column, dense[:, 1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ratios, differences, rtol=1e-6, atol=1e-8)
