"""The objective, its gradient and the matrices on the outputs against their definitions written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from tests import oracles, problems


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_value_and_gradient_are_those_of_the_definition(name):
    _, objective, params, batch = problems.problem(name)
    loss, gradient = jax.jit(lambda p, b: objective.value_and_grad(p, b)[:2])(params, batch)
    expected, slope = jax.jit(jax.value_and_grad(oracles.value, argnums=1))(objective, params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    actual, slope = np.asarray(oracles.ravel(gradient)), np.asarray(oracles.ravel(slope))
    np.testing.assert_allclose(actual, slope, rtol=0, atol=1e-13 * np.linalg.norm(slope))


def pseudo_huber(z, y):
    return jnp.sum(jnp.sqrt(1 + (z - y) ** 2) - 1)


def bumps(z, y):
    return jnp.sum(jnp.sin(z) * z[::-1] + y * z)


LOSSES = {
    "squared_error": losses.squared_error(),
    "sigmoid_binary_cross_entropy": losses.sigmoid_binary_cross_entropy(),
    "softmax_cross_entropy": losses.softmax_cross_entropy(),
    "poisson": losses.poisson(),
    "curvature_only": losses.curvature_only(losses.poisson()),
    "convex": losses.from_function(pseudo_huber, convex=True),
    "absolute": losses.from_function(bumps, convex=False, curvature="absolute"),
    "clipped": losses.from_function(bumps, convex=False, curvature="clipped"),
    "exact": losses.from_function(bumps, convex=False),
    "natural": losses.from_function(lambda z, y: jax.nn.logsumexp(z) - y @ z, convex=True, natural=True),
    "gaussian": losses.gaussian(),
    "exact gaussian": losses.gaussian("exact"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_matrices_on_the_outputs_are_those_of_the_definition(name):
    """For a model that returns its parameters, G is the matrix on the outputs over the number of examples."""
    loss = LOSSES[name]
    outputs, targets = jax.random.normal(jax.random.key(1), (3, 4)), jax.random.uniform(jax.random.key(2), (3, 4))
    if "gaussian" in name:
        outputs = (outputs, outputs[::-1] / 2)
    objective, batch = curvax.Objective(lambda z, _: z, loss), (targets, targets)

    @jax.jit
    def matrices(outputs, batch):
        pairs = [(loss.curvature(outputs, batch[1]), oracles.dense_ggn(objective, outputs, batch))]
        if loss.natural or "gaussian" in name:
            pairs.append((loss.fisher(outputs, batch[1]), oracles.dense_fisher(objective, outputs, batch)))
        return [(oracles.dense_output_matrix(matrix, outputs), 3 * expected) for matrix, expected in pairs]

    for actual, expected in matrices(outputs, batch):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.linalg.norm(expected))
