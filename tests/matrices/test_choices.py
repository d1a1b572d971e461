"""The curvature choices as values: printed, compared, hashed, and checked for their usual mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from curvax.matrices.curvature import OutputCurvature, check_curvature
from tests import oracles, problems


@pytest.mark.parametrize(
    ("curvature", "text", "definite"),
    [
        (curvax.GaussNewton(), "GaussNewton(num_samples=None)", True),
        (curvax.Fisher(), "Fisher(num_samples=None)", True),
        (curvax.Fisher(3), "Fisher(num_samples=3)", True),
        (curvax.EmpiricalFisher(), "EmpiricalFisher()", True),
        (curvax.Hessian(), "Hessian()", False),
    ],
)
def test_a_choice_is_a_value(curvature, text, definite):
    assert repr(curvature) == text
    assert curvature.definite is definite
    assert curvature == type(curvature)(**vars(curvature))
    assert hash(curvature) == hash(type(curvature)(**vars(curvature)))
    assert not callable(curvature)  # optax.inject_hyperparams would take it for a schedule


def test_choices_that_differ_are_not_equal():
    choices = [
        curvax.GaussNewton(), curvax.EmpiricalFisher(), curvax.Hessian(), *map(curvax.Fisher, (None, 1, 2))
    ]  # fmt: skip
    assert len(set(choices)) == len(choices)


def test_equal_choices_compile_once():
    _, objective, params, batch = problems.problem("regularised")
    traces = 0

    @jax.jit
    def product(matrix, vector):
        nonlocal traces
        traces += 1
        return matrix(vector)

    at = objective.linearize(params, batch)
    for _ in range(2):
        product(curvax.Fisher().at(at), params)
    assert traces == 1
    product(curvax.GaussNewton().at(at), params)
    assert traces == 2


@pytest.mark.parametrize(
    ("curvature", "oracle"),
    [
        (curvax.GaussNewton(), oracles.dense_ggn),
        (curvax.Fisher(), oracles.dense_fisher),
        (curvax.EmpiricalFisher(), oracles.dense_empirical_fisher),
        (curvax.Hessian(), oracles.dense_hessian),
    ],
    ids=["ggn", "fisher", "empirical_fisher", "hessian"],
)
def test_at_makes_the_matrix_that_the_choice_names_and_ignores_a_key_it_does_not_need(curvature, oracle):
    _, objective, params, batch = problems.problem("gaussian")  # where no two of the four are equal
    with_key = jax.jit(lambda at, key: curvature.at(at, key).to_dense())
    matrix = with_key(objective.linearize(params, batch), jax.random.key(0))
    np.testing.assert_allclose(matrix, oracle(objective, params, batch), rtol=0, atol=1e-10)


def test_a_sampled_matrix_is_the_one_of_its_key():
    _, objective, params, batch = problems.problem("mlp")

    @jax.jit
    def diagonals(at, key):
        drawn = curvax.Fisher(2).at(at, key), curvax.fisher(at, key=key, num_samples=2)
        return [trees.ravel(matrix.diagonal()) for matrix in drawn]

    at = objective.linearize(params, batch)
    by_value, by_function = diagonals(at, jax.random.key(0))
    np.testing.assert_allclose(by_value, by_function, rtol=1e-12)
    assert np.abs(diagonals(at, jax.random.key(1))[0] - by_value).max() > 1e-3 * by_value.max()


def linear_point():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    return objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))))


def test_what_is_no_choice_is_refused():
    with pytest.raises(TypeError, match=r"quadratic: curvature= takes a value such as curvax.GaussNewton\(\).*got ggn"):
        check_curvature("quadratic", curvax.ggn)
    with pytest.raises(TypeError, match="got 'ggn'"):
        check_curvature("quadratic", "ggn")
    with pytest.raises(TypeError, match=r"got Hessian\(\)"):
        check_curvature("gram", curvax.Hessian(), OutputCurvature)
    with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
        curvax.Fisher(0)
    with pytest.raises(ValueError, match=r"Fisher\(num_samples=1\) draws and takes a key="):
        curvax.Fisher(1).at(linear_point())
    with pytest.raises(TypeError, match="got ggn"):
        curvax.quadratic_model(linear_point(), curvature=curvax.ggn)
