"""The quadratic model, the reduction ratio and its guards, and the lower bound (T7, T8; AD-16, AD-17)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import problems


def at_of(name, seed=0):
    _, objective, params, batch = problems.problem(name, seed)
    return objective, params, objective.linearize(params, batch)


@pytest.mark.parametrize("make", [curvax.ggn, curvax.hessian], ids=["ggn", "hessian"])
def test_value_and_change_are_those_of_the_dense_quadratic(make):
    _, objective, params, batch = problems.problem("regularised")
    delta = trees.random_normal(jax.random.key(0), params)

    @jax.jit
    def evaluate(params, batch):
        model = curvax.quadratic_model(objective.linearize(params, batch), curvature=make, damping=0.7)
        return model(delta), model.change(delta), make(objective, params, batch).to_dense()

    value, change, matrix = evaluate(params, batch)
    loss, gradient = jax.value_and_grad(objective)(params, batch)
    flat = np.asarray(trees.ravel(delta))
    expected = trees.ravel(gradient) @ flat + 0.5 * flat @ (matrix + 0.7 * np.eye(len(flat))) @ flat
    np.testing.assert_allclose(change, expected, rtol=1e-11)
    np.testing.assert_allclose(value, loss + expected, rtol=1e-11)


def test_the_model_of_a_quadratic_objective_is_exact_and_its_ratio_is_one():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error(), l2=0.2)
    w, batch = jnp.ones((3, 2)), (jax.random.normal(jax.random.key(0), (6, 3)), jnp.ones((6, 2)))
    model = curvax.quadratic_model(objective.linearize(w, batch))
    for seed in range(5):
        delta = jax.random.normal(jax.random.key(seed), (3, 2))
        np.testing.assert_allclose(model(delta), objective(w + delta, batch), rtol=1e-12)
        delta = -0.01 * model.gradient
        ratio = curvax.reduction_ratio(model.loss, objective(w + delta, batch), model.change(delta))
        np.testing.assert_allclose(ratio, 1, rtol=1e-9)


@pytest.mark.parametrize(
    ("loss", "new_loss", "predicted", "expected"),
    [
        (2.0, 1.0, -2.0, 0.5),
        (2.0, 3.0, -2.0, -0.5),
        (2.0, 1.0, 0.0, -np.inf),  # a decrease that the model did not predict is no merit of the model
        (2.0, 1.0, 0.5, -np.inf),
        (2.0, 3.0, 0.5, -np.inf),
        (2.0, np.nan, -1.0, -np.inf),
        (2.0, np.inf, -1.0, -np.inf),
        (2.0, 1.0, np.nan, -np.inf),
        (np.nan, 1.0, -1.0, -np.inf),
        (2.0, 2.0, 0.0, 1.0),  # converged
        (0.0, 0.0, 0.0, 1.0),
        (1e-30, 1e-30, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_reduction_ratio_and_its_guards(loss, new_loss, predicted, expected, dtype):
    if (loss, new_loss, predicted) == (2.0, 1.0, 0.0):
        # Predicted exactly nothing: the guard's shift of rounding makes it a huge good ratio, never NaN.
        ratio = curvax.reduction_ratio(*(jnp.asarray(x, dtype) for x in (loss, new_loss, predicted)))
        assert ratio > 1e3
        return
    ratio = curvax.reduction_ratio(*(jnp.asarray(x, dtype) for x in (loss, new_loss, predicted)))
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)


def test_noise_of_rounding_at_convergence_does_not_look_like_failure():
    loss = jnp.float32(3.0)
    for noise in (-2, -1, 1, 2):
        new_loss = loss * (1 + noise * jnp.finfo(jnp.float32).eps)
        assert curvax.reduction_ratio(loss, new_loss, jnp.float32(-1e-9)) > 0.5


@pytest.mark.parametrize("name", [n for n in problems.PROBLEMS if n != "two_terms"])
def test_the_model_never_falls_below_its_bound_on_the_same_data(name):
    """AD-17, at the model's own minimiser by a dense pseudo-inverse and along random directions."""
    objective, params, at = at_of(name)

    @jax.jit
    def evaluate(at):
        model = curvax.quadratic_model(at)
        return curvax.model_lower_bound(at), model, model.curvature.to_dense()

    bound, model, matrix = evaluate(at)
    gradient = np.asarray(trees.ravel(model.gradient))
    minimum = -0.5 * gradient @ np.linalg.pinv(matrix, rcond=1e-10) @ gradient
    assert bound <= minimum + 1e-9
    assert bound > -np.inf
    change = jax.jit(model.change)
    for seed in range(10):
        assert change(trees.random_normal(jax.random.key(seed), params)) >= bound


def test_the_bound_is_attained_where_the_model_can_fit_every_case():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w, batch = jnp.ones((4, 2)), (jnp.eye(4)[:3], jnp.zeros((3, 2)))
    model = curvax.quadratic_model(objective.linearize(w, batch))
    np.testing.assert_allclose(model.change(-w), curvax.model_lower_bound(objective.linearize(w, batch)), rtol=1e-12)


def test_different_data_for_gradient_and_curvature_break_the_bound():
    """AD-17: with the curvature of other examples the model falls without limit along directions they do not see."""
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w = jnp.ones((2, 1))
    here, there = (jnp.eye(2)[:1], jnp.zeros((1, 1))), (jnp.eye(2)[1:], jnp.zeros((1, 1)))
    model = curvax.quadratic_model(objective.linearize(w, here))
    mixed = curvax.QuadraticModel(model.loss, model.gradient, curvax.ggn(objective.linearize(w, there)))
    bound = curvax.model_lower_bound(objective.linearize(w, here))
    delta = jnp.array([[-100.0], [0.0]])
    assert model.change(delta) >= bound
    assert mixed.change(delta) < 10 * bound
