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
