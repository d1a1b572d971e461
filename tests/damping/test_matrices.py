"""Tikhonov and scale-sensitive damping against dense matrices; how they behave under changes of parameters (DM-9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import damping
from tests.problems import problem

KEY = jax.random.key(0)


def dense(name, piece, strength, curvature=curvax.ggn):
    objective, params, batch = problem(name)[1:]
    at = objective.linearize(params, batch)
    return (
        jax.jit(lambda at: piece(at, curvature, strength, KEY).to_dense())(at),
        jax.jit(lambda at: curvature(objective, at=at).to_dense())(at),
    )


@pytest.mark.parametrize(("name", "curvature"), [("mlp", curvax.ggn), ("regularised", curvax.hessian)])
def test_tikhonov_adds_lambda_to_the_diagonal(name, curvature):
    damped, matrix = dense(name, damping.tikhonov(), 0.7, curvature)
    np.testing.assert_allclose(damped, matrix + 0.7 * np.eye(len(matrix)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("exponent", "offset"), [(1.0, 0.0), (0.75, 0.01), (0.0, 0.0)])
def test_scale_sensitive_is_a_power_of_the_diagonal(exponent, offset):
    piece = damping.scale_sensitive(exponent=exponent, offset=offset, diagonal=lambda matrix, key: matrix.diagonal())
    damped, matrix = dense("mlp", piece, 0.3)
    expected = matrix + 0.3 * np.diag((np.diag(matrix) + offset) ** exponent)
    np.testing.assert_allclose(damped, expected, rtol=1e-12, atol=1e-14)


def test_scale_sensitive_estimates_the_diagonal_without_bias_by_default():
    objective, params, batch = problem("mlp")[1:]
    at = objective.linearize(params, batch)

    @jax.jit
    @jax.vmap
    def estimate(key):
        damped = damping.scale_sensitive()(at, curvax.ggn, 0.5, key)
        return curvax.trees.ravel(damped.maps[1].diagonal())

    exact = 0.5 * np.asarray(curvax.trees.ravel(curvax.ggn(at).diagonal()))
    draws = np.asarray(estimate(jax.random.split(KEY, 4000)))
    directions = np.random.default_rng(0).standard_normal((20, draws.shape[1]))
    projected, expected = draws @ directions.T, directions @ exact
    errors = (projected.mean(0) - expected) / (projected.std(0) / np.sqrt(len(draws)))
    assert np.abs(errors).max() < 4.5


def test_scale_sensitive_refuses_nonsense():
    with pytest.raises(ValueError, match="exponent"):
        damping.scale_sensitive(exponent=2.0)
    objective, params, batch = problem("mlp")[1:]
    with pytest.raises(ValueError, match="diagonal"):
        damping.scale_sensitive(diagonal={"wrong": jnp.ones(3)})(
            objective.linearize(params, batch), curvax.ggn, 1.0, KEY
        )


def step(objective, params, batch, piece, strength):
    """-(B + lambda D)^{-1} g in dense algebra."""
    _, gradient, at = objective.value_and_grad(params, batch)
    matrix = piece(at, curvax.ggn, strength, KEY).to_dense()
    return -np.linalg.solve(np.asarray(matrix), np.asarray(curvax.trees.ravel(gradient)))


def test_reparameterisation_shows_which_damping_is_invariant():
    """theta = C phi for a diagonal C: D = diag(B) and D = C^T C carry over, Tikhonov's does not (DM-9)."""
    scales = jnp.geomspace(1e-2, 1e2, 3)[:, None]
    batch = (jax.random.normal(jax.random.key(1), (8, 3)), jax.random.normal(jax.random.key(2), (8, 1)))
    theta = jnp.array([[0.3], [-0.2], [0.5]])
    original = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error())
    rescaled = curvax.Objective(lambda w, x: jnp.tanh(x @ (scales * w)), curvax.losses.squared_error())

    def transformed(piece_of_rescaled):
        return np.ravel(scales) * step(rescaled, theta / scales, batch, piece_of_rescaled, 0.1)

    exact = damping.scale_sensitive(diagonal=lambda matrix, key: matrix.diagonal())
    np.testing.assert_allclose(transformed(exact), step(original, theta, batch, exact, 0.1), rtol=1e-9)
    tikhonov = step(original, theta, batch, damping.tikhonov(), 0.1)
    carried = damping.scale_sensitive(diagonal=scales**2)
    np.testing.assert_allclose(transformed(carried), tikhonov, rtol=1e-9)
    assert np.abs(transformed(damping.tikhonov()) / tikhonov - 1).max() > 0.1


def test_the_diagonal_of_a_ravine_restricts_the_step_far_too_much():
    """B = u u^T + a v v^T with u = (-1, 1), v = (1, 1): diag(B) = (a + 1, a + 1) everywhere (DM-2, figure 4.2)."""
    a = 1e4
    design = jnp.array([[-1.0, 1.0], [a**0.5, a**0.5]]) * 2**0.5  # the mean over two cases halves the squares
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    target = design @ jnp.array([[-1.0], [1.0]])  # a step along u, where curvature is small
    exact = damping.scale_sensitive(diagonal=lambda matrix, key: matrix.diagonal())
    batch = (design, target)
    along = {
        name: step(objective, jnp.zeros((2, 1)), batch, piece, 0.1) @ np.array([-0.5, 0.5])
        for name, piece in (("diagonal", exact), ("identity", damping.tikhonov()))
    }
    np.testing.assert_allclose(along["identity"], 2 / 2.1, rtol=1e-9)
    np.testing.assert_allclose(along["diagonal"], 2 / (2 + 0.1 * (a + 1)), rtol=1e-9)
