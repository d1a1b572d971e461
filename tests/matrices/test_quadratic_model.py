"""The quadratic model, the reduction ratio and its guards, and the lower bound (T7, T8; AD-16, AD-17)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles, problems


def at_of(name, seed=0):
    _, objective, params, batch = problems.problem(name, seed)
    return params, objective.linearize(params, batch)


@pytest.mark.parametrize(
    ("curvature", "oracle"),
    [
        (None, oracles.dense_ggn),
        (curvax.Hessian(), oracles.dense_hessian),
        (curvax.EmpiricalFisher(), oracles.dense_empirical_fisher),
    ],
)
def test_value_and_change_are_those_of_the_dense_quadratic(curvature, oracle):
    _, objective, params, batch = problems.problem("regularised")
    delta = trees.random_normal(jax.random.key(0), params)

    @jax.jit
    def evaluate(params, batch):
        model = curvax.quadratic_model(objective.linearize(params, batch), curvature=curvature, damping=0.7)
        return model(delta), model.change(delta), *jax.value_and_grad(objective)(params, batch)

    value, change, loss, gradient = evaluate(params, batch)
    matrix = np.asarray(oracle(objective, params, batch))
    flat = np.asarray(trees.ravel(delta))
    expected = trees.ravel(gradient) @ flat + 0.5 * flat @ (matrix + 0.7 * np.eye(len(flat))) @ flat
    np.testing.assert_allclose(change, expected, rtol=1e-11)
    np.testing.assert_allclose(value, loss + expected, rtol=1e-11)


def test_the_model_of_a_quadratic_objective_is_exact_and_its_ratio_is_one():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error(), l2=0.2)
    w, batch = jnp.ones((3, 2)), (jax.random.normal(jax.random.key(0), (6, 3)), jnp.ones((6, 2)))

    @jax.jit
    def evaluate(deltas):
        model = curvax.quadratic_model(objective.linearize(w, batch))
        delta = -0.01 * model.gradient
        ratio = curvax.reduction_ratio(model.loss, objective(w + delta, batch), model.change(delta))
        return jax.vmap(model)(deltas), jax.vmap(lambda delta: objective(w + delta, batch))(deltas), ratio

    predicted, actual, ratio = evaluate(jax.random.normal(jax.random.key(1), (5, 3, 2)))
    np.testing.assert_allclose(predicted, actual, rtol=1e-12)
    np.testing.assert_allclose(ratio, 1, rtol=1e-9)


@pytest.mark.parametrize(
    ("loss", "new_loss", "predicted", "expected"),
    [
        (2.0, 1.0, -2.0, 0.5),
        (2.0, 3.0, -2.0, -0.5),
        (2.0, 1.0, 0.0, -np.inf),  # a decrease that the model did not predict is no merit of the model
        (2.0, 1.0, 1e-7, -np.inf),  # within rounding in float32, and still no merit
        (2.0, 1.0, 0.5, -np.inf),
        (2.0, 3.0, 0.5, -np.inf),
        (2.0, np.nan, -1.0, -np.inf),
        (2.0, np.inf, -1.0, -np.inf),
        (2.0, 1.0, np.nan, -np.inf),
        (np.nan, 1.0, -1.0, -np.inf),
        (2.0, 2.0, 0.0, 1.0),  # converged
        (0.0, 0.0, 0.0, 1.0),
        (1e-30, 1e-30, 0.0, 1.0),
        (2.0, 2.0, 1e-16, 1.0),
        (0.0, 0.0, 1e-3, -np.inf),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_reduction_ratio_and_its_guards(loss, new_loss, predicted, expected, dtype):
    ratio = jax.jit(curvax.reduction_ratio)(*(jnp.asarray(x, dtype) for x in (loss, new_loss, predicted)))
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)


def test_noise_of_rounding_at_convergence_does_not_look_like_failure():
    loss = jnp.float32(3.0)
    for noise in (-2, -1, 1, 2):
        new_loss = loss * (1 + noise * jnp.finfo(jnp.float32).eps)
        assert jax.jit(curvax.reduction_ratio)(loss, new_loss, jnp.float32(-1e-9)) > 0.5


@pytest.mark.parametrize("name", [n for n in problems.PROBLEMS if n != "two_terms"])
def test_the_model_never_falls_below_its_bound_on_the_same_data(name):
    """AD-17, at the model's own minimiser by a dense pseudo-inverse and along random directions."""
    params, at = at_of(name)

    @jax.jit
    def evaluate(at):
        model = curvax.quadratic_model(at)
        return curvax.model_lower_bound(at), model, model.curvature.to_dense()

    bound, model, matrix = evaluate(at)
    gradient = np.asarray(trees.ravel(model.gradient))
    minimum = -0.5 * gradient @ np.linalg.pinv(matrix, rcond=1e-10) @ gradient
    assert bound <= minimum + 1e-9
    assert bound > -np.inf
    draws = jax.vmap(lambda key: model.change(trees.random_normal(key, params)))
    assert np.all(jax.jit(draws)(jax.random.split(jax.random.key(0), 10)) >= bound)


def test_the_bound_is_attained_where_the_model_can_fit_every_case():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w, batch = jnp.ones((4, 2)), (jnp.eye(4)[:3], jnp.zeros((3, 2)))

    @jax.jit
    def evaluate(at):
        return curvax.quadratic_model(at).change(-w), curvax.model_lower_bound(at)

    change, bound = evaluate(objective.linearize(w, batch))
    np.testing.assert_allclose(change, bound, rtol=1e-12)
    np.testing.assert_allclose(bound, -1.0, rtol=1e-12)


def test_different_data_for_gradient_and_curvature_break_the_bound():
    """AD-17: with the curvature of other examples the model falls without limit along directions they do not see."""
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w = jnp.ones((2, 1))
    here, there = (jnp.eye(2)[:1], jnp.zeros((1, 1))), (jnp.eye(2)[1:], jnp.zeros((1, 1)))

    @jax.jit
    def evaluate(delta):
        at = objective.linearize(w, here)
        model = curvax.quadratic_model(at)
        mixed = curvax.QuadraticModel(model.loss, model.gradient, curvax.ggn(objective.linearize(w, there)))
        return curvax.model_lower_bound(at), model.change(delta), mixed.change(delta)

    bound, change, mixed = evaluate(jnp.array([[-100.0], [0.0]]))
    assert change >= bound
    assert mixed < 10 * bound
