"""The natural gradient as a least-squares fit of the best changes of the outputs (NG-8; Martens 2016, section 5.9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from tests import oracles, problems
from tests.tolerances import rounding

NAMES = ["mlp", "poisson", "gaussian", "recurrent"]
every_problem = pytest.mark.parametrize("name", NAMES)
DRAW = np.random.default_rng(0)


def metric(name, z):
    """F_R of one example."""
    if name == "mlp":
        p = np.exp(z) / np.exp(z).sum()
        return np.diag(p) - np.outer(p, p)
    if name == "poisson":
        return np.diag(np.exp(z))
    if name == "recurrent":
        p = 1 / (1 + np.exp(-z))
        return np.diag(p * (1 - p))
    log_variance = z[len(z) // 2 :]
    return np.diag(np.concatenate([np.exp(-log_variance), np.full(log_variance.size, 0.5)]))


def cases(name):
    """For each example J, F_R and the gradient of L in the outputs; and F, grad h and h."""
    _, objective, params, batch = problems.problem(name)
    (term,) = objective.terms

    @jax.jit
    def compute(flat):
        def rows(flat):
            return jax.vmap(oracles.ravel)(term.model_fn(oracles.unravel(flat, params), batch[0]))

        outputs = term.model_fn(params, batch[0])
        gradients = jax.vmap(oracles.ravel)(jax.grad(lambda z: jnp.sum(term.loss.value(z, batch[1])))(outputs))
        return rows(flat), jax.jacfwd(rows)(flat), gradients

    outputs, jacobians, gradients = map(np.asarray, compute(oracles.ravel(params)))
    metrics = np.array([metric(name, z) for z in outputs])
    fisher = np.asarray(oracles.dense_fisher(objective, params, batch))
    total = np.mean(np.einsum("iap,ia->ip", jacobians, gradients), axis=0)
    return jacobians, metrics, gradients, fisher, total, float(oracles.value(objective, params, batch))


def squares(jacobians, metrics, best, delta):
    """(1/N) sum_i 1/2 ||J_i delta - best_i||^2 in the metric F_R."""
    gap = jacobians @ delta - best
    return np.einsum("ia,iab,ib->", gap, metrics, gap) / (2 * len(gap))


@every_problem
def test_the_model_is_a_sum_of_squared_distances_from_the_best_changes(name):
    """M(delta) = mean 1/2 ||J delta + F_R^+ grad L||^2 + c, where print has J delta + F_R^{-1} grad log r: the sign."""
    jacobians, metrics, gradients, fisher, total, loss = cases(name)
    best = -np.einsum("iab,ib->ia", np.linalg.pinv(metrics, rcond=1e-12), gradients)
    constant = loss - squares(jacobians, metrics, best, np.zeros(len(total)))
    _, objective, params, batch = problems.problem(name)

    @jax.jit
    @jax.vmap
    def model(delta):
        at = objective.linearize(params, batch)
        step = oracles.unravel(delta, params)
        return curvax.quadratic_model(at, curvature=curvax.Fisher())(step)

    deltas = DRAW.normal(size=(20, len(total)))
    for delta, got in zip(deltas, model(deltas), strict=True):
        expected = loss + total @ delta + delta @ fisher @ delta / 2
        np.testing.assert_allclose(got, expected, rtol=1e-10)
        np.testing.assert_allclose(squares(jacobians, metrics, best, delta) + constant, expected, rtol=1e-9)
        assert abs(squares(jacobians, metrics, -best, delta) + constant - expected) > 1e-3 * abs(expected)


@every_problem
def test_its_minimiser_is_the_natural_gradient_and_that_of_the_print_climbs(name):
    """By least squares over all cases; where the printed square is least, M is up by three times what it can fall."""
    jacobians, metrics, gradients, fisher, total, _ = cases(name)
    values, vectors = np.linalg.eigh(metrics)
    roots = np.sqrt(np.maximum(values, 0))[..., None] * np.swapaxes(vectors, 1, 2)  # S with S^T S = F_R
    best = -np.einsum("iab,ib->ia", np.linalg.pinv(metrics, rcond=1e-12), gradients)
    matrix, right = (roots @ jacobians).reshape(-1, len(total)), np.einsum("iab,ib->ia", roots, best).ravel()
    fitted = np.linalg.lstsq(matrix, right, rcond=1e-9)[0]
    natural = -np.linalg.pinv(fisher, rcond=1e-12, hermitian=True) @ total
    np.testing.assert_allclose(fitted, natural, rtol=1e-5, atol=1e-6 * np.abs(natural).max())
    printed = np.linalg.lstsq(matrix, -right, rcond=1e-9)[0]
    fall, rise = (total @ d + d @ fisher @ d / 2 for d in (fitted, printed))
    np.testing.assert_allclose(fall, -total @ -natural / 2, rtol=1e-6)
    np.testing.assert_allclose(rise, -3 * fall, rtol=1e-6)


@every_problem
def test_no_step_promises_more_than_changing_the_outputs_of_each_case_alone(name):
    """M(delta) - h >= -1/2 mean grad L^T F_R^+ grad L, which ``model_lower_bound`` gives."""
    _, metrics, gradients, fisher, total, _ = cases(name)
    _, objective, params, batch = problems.problem(name)
    bound = jax.jit(lambda p: curvax.model_lower_bound(objective.linearize(p, batch)))(params)
    each = np.einsum("ia,iab,ib->i", gradients, np.linalg.pinv(metrics, rcond=1e-12), gradients)
    np.testing.assert_allclose(bound, -np.mean(each) / 2, rtol=1e-9)
    fall = -total @ np.linalg.pinv(fisher, rcond=1e-12, hermitian=True) @ total / 2
    assert bound <= fall + 1e-12


def test_the_library_takes_that_step():
    """From ``curvax.natural_gradient`` with next to no damping, for a model that the data determine."""
    x, y = DRAW.normal(size=(40, 2)), DRAW.poisson(1.0, size=(40, 2)).astype(float)
    objective, w = curvax.Objective(lambda w, x: jnp.tanh(x @ w) * 1.5, losses.poisson()), DRAW.normal(size=(2, 2))
    tx = curvax.natural_gradient(damping=1e-12, max_iterations=100, tolerance=1e-13)

    @jax.jit
    def compute(w):
        _, gradient, at = objective.value_and_grad(w, (x, y))
        outputs = jnp.tanh(x @ w) * 1.5
        jacobian = jax.jacfwd(lambda flat: (jnp.tanh(x @ flat.reshape(2, 2)) * 1.5).ravel())(w.ravel())
        return tx.update(gradient, tx.init(w), w, at=at)[0], outputs.ravel(), jacobian

    step, z, jacobian = map(np.asarray, compute(w))
    best, root = -(1 - y.ravel() * np.exp(-z)), np.exp(z / 2)  # -F_R^{-1} grad L of exp(z) - y z
    fitted, *_, singular = np.linalg.lstsq(root[:, None] * jacobian, root * best, rcond=None)
    condition = (singular[0] / singular[-1]) ** 2
    np.testing.assert_allclose(step.ravel(), fitted, atol=rounding(jnp.float64, 1000, condition=condition) + 1e-9)
