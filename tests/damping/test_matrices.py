"""Tikhonov and scale-sensitive damping against dense matrices; how they behave under changes of parameters (DM-9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import damping
from curvax.matrices.linear_map import DenseMap
from tests.oracles import dense_ggn, dense_hessian
from tests.problems import problem
from tests.transforms.stepping import one_step

KEY, GGN = jax.random.key(0), curvax.GaussNewton()


def dense(name, piece, strength, curvature=GGN, oracle=dense_ggn):
    """The damped matrix, and B by its definition."""
    objective, params, batch = problem(name)[1:]
    damped = jax.jit(lambda p, b: piece.matrix(objective.linearize(p, b), curvature, strength, KEY).to_dense())
    return damped(params, batch), np.asarray(oracle(objective, params, batch))


@pytest.mark.parametrize(
    ("name", "curvature", "oracle"), [("mlp", GGN, dense_ggn), ("regularised", curvax.Hessian(), dense_hessian)]
)
def test_tikhonov_adds_lambda_to_the_diagonal(name, curvature, oracle):
    damped, matrix = dense(name, damping.tikhonov(), 0.7, curvature, oracle)
    np.testing.assert_allclose(damped, matrix + 0.7 * np.eye(len(matrix)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("exponent", "offset"), [(1.0, 0.0), (0.75, 0.01), (0.0, 0.0)])
def test_scale_sensitive_is_a_power_of_the_diagonal(exponent, offset):
    piece = damping.scale_sensitive(exponent=exponent, offset=offset, diagonal=lambda matrix, key: matrix.diagonal())
    damped, matrix = dense("mlp", piece, 0.3)
    expected = matrix + 0.3 * np.diag((np.diag(matrix) + offset) ** exponent)
    np.testing.assert_allclose(damped, expected, rtol=1e-10, atol=1e-12)


def test_scale_sensitive_estimates_the_diagonal_without_bias_by_default():
    objective, params, batch = problem("mlp")[1:]

    @jax.jit
    @jax.vmap
    def estimate(key):
        at = objective.linearize(params, batch)
        damped = damping.scale_sensitive().matrix(at, GGN, 0.5, key)
        return curvax.trees.ravel(damped.maps[1].diagonal())

    exact = 0.5 * np.diag(dense_ggn(objective, params, batch))
    draws = np.asarray(estimate(jax.random.split(KEY, 4000)))
    directions = np.random.default_rng(0).standard_normal((20, draws.shape[1]))
    projected, expected = draws @ directions.T, directions @ exact
    errors = (projected.mean(0) - expected) / (projected.std(0) / np.sqrt(len(draws)))
    assert np.abs(errors).max() < 4.5


def test_scale_sensitive_refuses_nonsense():
    with pytest.raises(ValueError, match="exponent"):
        damping.scale_sensitive(exponent=2.0)
    objective, params, batch = problem("mlp")[1:]
    wrong = damping.scale_sensitive(diagonal={"wrong": jnp.ones(3)})
    with pytest.raises(ValueError, match="diagonal"):
        wrong.matrix(objective.linearize(params, batch), GGN, 1.0, KEY)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_what_is_added_to_a_matrix_that_is_there(exponent):
    """A dense matrix has its own diagonal, which is read and not estimated."""
    matrix = np.array([[4.0, 1.0], [1.0, 9.0]])
    like = DenseMap.of(jnp.asarray(matrix), jnp.zeros(2))
    added = damping.scale_sensitive(exponent=exponent).added(like, 0.5, KEY)
    np.testing.assert_allclose(added.to_dense(), 0.5 * np.diag(np.diag(matrix) ** exponent), rtol=1e-12)
    np.testing.assert_allclose(damping.tikhonov().added(like, 0.5, KEY).to_dense(), 0.5 * np.eye(2), rtol=1e-12)


def step(objective, params, batch, piece, strength):
    """-(B + lambda D)^{-1} g in dense algebra."""

    @jax.jit
    def compute(params, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        return piece.matrix(at, GGN, strength, KEY).to_dense(), curvax.trees.ravel(gradient)

    return -np.linalg.solve(*map(np.asarray, compute(params, batch)))


def test_reparameterisation_shows_which_damping_is_invariant():
    """theta = C phi for a diagonal C: D = diag(B) and D = C^T C carry over, Tikhonov's does not (DM-9)."""
    scales = np.geomspace(1e-2, 1e2, 3)[:, None]
    batch = (jax.random.normal(jax.random.key(1), (8, 3)), jax.random.normal(jax.random.key(2), (8, 1)))
    theta = np.array([[0.3], [-0.2], [0.5]])
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


def test_damping_by_b_itself_is_a_learning_rate():
    """D = B with lambda = 1/alpha - 1 shortens the undamped step to alpha of it, in any parameters (DM-2, DM-8)."""
    batch = (jax.random.normal(jax.random.key(1), (8, 3)), jax.random.normal(jax.random.key(2), (8, 1)))
    objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error(), l2=0.01)
    theta, alpha = np.array([[0.3], [-0.2], [0.5]]), 0.8**3
    undamped = step(objective, theta, batch, damping.tikhonov(), 0.0)
    shortened = step(objective, theta, batch, damping.proportional(), 1 / alpha - 1)
    np.testing.assert_allclose(shortened, alpha * undamped, rtol=1e-9)
    matrix = np.array([[4.0, 1.0], [1.0, 9.0]])
    added = damping.proportional().added(DenseMap.of(jnp.asarray(matrix), jnp.zeros(2)), 0.5, KEY)
    np.testing.assert_allclose(added.to_dense(), matrix / 2, rtol=1e-12)

    exact = {"max_iterations": 9, "progress_tolerance": 0.0, "choice": "last", "warm_start": 0.0, "rule": KEPT}
    one, two = (
        one_step(curvax.hessian_free(damping_matrix=piece, initial_damping=strength, **exact), objective, theta, batch)[
            1
        ]
        for piece, strength in ((damping.tikhonov(), 0.0), (damping.proportional(), 1 / alpha - 1))
    )
    np.testing.assert_allclose(two.info.update_norm, alpha * one.info.update_norm, rtol=1e-9)


KEPT = damping.DampingRule(decrease=1, increase=1)


def test_weights_that_are_exponentials_of_the_parameters():
    """w = exp(theta), C = diag(w): undamped, by diag(B), C^T C or B the step is C^{-1} that of w; not by I (DM-9)."""
    batch = (jax.random.normal(jax.random.key(1), (8, 3)), jax.random.normal(jax.random.key(2), (8, 1)))
    weights = np.array([[0.3], [20.0], [1.5]]) * 1e-2
    original = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error())
    exponential = curvax.Objective(lambda theta, x: jnp.tanh(x @ jnp.exp(theta)), curvax.losses.squared_error())
    diagonal = damping.scale_sensitive(diagonal=lambda matrix, key: matrix.diagonal())
    carried = damping.scale_sensitive(diagonal=weights**2)
    for ours, theirs, strength in (
        (damping.tikhonov(), damping.tikhonov(), 0.0),
        (diagonal, diagonal, 0.1),
        (carried, damping.tikhonov(), 0.1),
        (damping.proportional(), damping.proportional(), 0.1),
    ):
        moved = np.ravel(weights) * step(exponential, np.log(weights), batch, ours, strength)
        np.testing.assert_allclose(moved, step(original, weights, batch, theirs, strength), rtol=1e-8)
    tikhonov = np.ravel(weights) * step(exponential, np.log(weights), batch, damping.tikhonov(), 0.1)
    assert np.abs(tikhonov / step(original, weights, batch, damping.tikhonov(), 0.1) - 1).max() > 0.1


def test_the_diagonal_of_a_ravine_restricts_the_step_far_too_much():
    """B = u u^T + a v v^T with u = (-1, 1), v = (1, 1): diag(B) = (a + 1, a + 1) everywhere (DM-2, figure 4.2)."""
    a = 1e4
    design = np.array([[-1.0, 1.0], [a**0.5, a**0.5]]) * 2**0.5  # the mean over two cases halves the squares
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    target = design @ np.array([[-1.0], [1.0]])  # a step along u, where curvature is small
    exact = damping.scale_sensitive(diagonal=lambda matrix, key: matrix.diagonal())
    batch = (design, target)
    along = {
        name: step(objective, jnp.zeros((2, 1)), batch, piece, 0.1) @ np.array([-0.5, 0.5])
        for name, piece in (("diagonal", exact), ("identity", damping.tikhonov()))
    }
    np.testing.assert_allclose(along["identity"], 2 / 2.1, rtol=1e-9)
    np.testing.assert_allclose(along["diagonal"], 2 / (2 + 0.1 * (a + 1)), rtol=1e-9)
