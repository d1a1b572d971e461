"""Diagonal Newton methods against dense diagonals (CL-8)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.oracles import dense_empirical_fisher, dense_ggn, dense_hessian
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, loss, run

GOAL, PARAMS, DATA = problem("mlp")[1:]


def exact(at, key):
    del key
    return curvax.layers.exact_ggn_diagonal(curvax.tap(curvax.find_layers(GOAL, PARAMS, DATA), at))


def empirical(at, key):
    del key
    return curvax.layers.empirical_fisher_diagonal(curvax.tap(curvax.find_layers(GOAL, PARAMS, DATA), at))


def hessian(at, key):
    del key
    return curvax.hessian(at).diagonal()


def chain(**options):
    return optax.chain(curvax.scale_by_diagonal_curvature(**options), optax.scale(-0.1))


@pytest.mark.parametrize("period", [1, 2])
def test_the_running_average_of_the_gauss_newton_diagonal(period):
    """LeCun et al. 1998, divided by what the average has of its first value."""
    total, count = 0.0, 0
    for k, taken in enumerate(run(chain(diagonal=exact, damping=0.1, decay=0.8, period=period), GOAL, PARAMS, DATA, 4)):
        if k % period == 0:
            total, count = 0.8 * total + 0.2 * np.diag(dense_ggn(GOAL, taken.before, DATA)), count + 1
        d = total / (1 - 0.8**count)
        expected = -0.1 * gradient(GOAL, taken.before, DATA) / (d + 0.1)
        np.testing.assert_allclose(flat(taken.updates), expected, rtol=1e-9)


@pytest.mark.parametrize("negative", ["absolute", "zero"])
def test_negative_entries_of_the_hessians_diagonal(negative):
    d, g = np.diag(dense_hessian(GOAL, PARAMS, DATA)), gradient(GOAL, PARAMS, DATA)
    assert d.min() < 0
    taken = run(chain(diagonal=hessian, damping=0.2, negative=negative), GOAL, PARAMS, DATA)[0]
    shifted = (np.abs(d) if negative == "absolute" else np.maximum(d, 0)) + 0.2
    np.testing.assert_allclose(flat(taken.updates), -0.1 * g / shifted, rtol=1e-9)


def test_squares_of_single_examples_to_the_power_of_martens_2010():
    d, g = np.diag(dense_empirical_fisher(GOAL, PARAMS, DATA)), gradient(GOAL, PARAMS, DATA)
    taken = run(chain(diagonal=empirical, damping=0.2, exponent=0.75), GOAL, PARAMS, DATA)[0]
    np.testing.assert_allclose(flat(taken.updates), -0.1 * g / (d + 0.2) ** 0.75, rtol=1e-9)


def test_by_default_the_diagonal_is_estimated_without_bias():
    """A long running average at parameters that stay."""
    tx = curvax.scale_by_diagonal_curvature(damping=0.1, decay=0.9995)

    @jax.jit
    def held(params):
        at = GOAL.linearize(params, DATA)
        ones = jax.tree.map(jnp.ones_like, params)
        state, _ = jax.lax.scan(lambda s, _: (tx.update(ones, s, at=at)[1], None), tx.init(params), length=3000)
        return tx.update(ones, state, at=at)[0]

    d = np.diag(dense_ggn(GOAL, PARAMS, DATA))
    np.testing.assert_allclose(1 / flat(held(PARAMS)) - 0.1, d, rtol=0.1, atol=0.01 * d.max())


@pytest.mark.parametrize("rate", [None, 0.1])
def test_the_whole_method_begins_with_the_curvature_along_the_gradient_and_promises_what_the_matrix_does(rate):
    first, second = run(curvax.diagonal_newton(rate, diagonal=exact), GOAL, PARAMS, DATA, 2)
    matrix, g = np.asarray(dense_ggn(GOAL, PARAMS, DATA)), gradient(GOAL, PARAMS, DATA)
    d = np.diag(matrix)
    damping = d @ g**2 / (g @ g)
    damped, direction = matrix + damping * np.eye(len(g)), g / (d + damping)
    alpha = min(g @ direction / (direction @ damped @ direction), np.inf if rate is None else rate)
    delta = -alpha * direction
    np.testing.assert_allclose(flat(first.updates), delta, rtol=1e-9)
    info = first.state.info
    np.testing.assert_allclose(info.damping, damping, rtol=1e-9)
    np.testing.assert_allclose(info.step_size, alpha, rtol=1e-9)
    np.testing.assert_allclose(info.predicted_change, g @ delta + delta @ damped @ delta / 2, rtol=1e-9)
    ratio = (loss(GOAL, first.after, DATA) - loss(GOAL, PARAMS, DATA)) / info.predicted_change
    np.testing.assert_allclose(second.state.info.step_ratio, ratio, rtol=1e-6)


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"diagonal= takes a function \(point, key\)"):
        curvax.diagonal_newton(diagonal=jnp.ones(3))
    with pytest.raises(ValueError, match="negative must be one of 'absolute', 'zero'"):
        curvax.scale_by_diagonal_curvature(negative="clip")
