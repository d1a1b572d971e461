"""The error of E[A (x) G] ~ A (x) G, and what an inverse covariance says (KF-22, KF-23; Martens 2016, 6.3.1, 6.4.1)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.layers import quality
from tests.theory import chains
from tests.tolerances import rounding


@pytest.mark.parametrize("family", chains.FAMILIES)
def test_cotangents_have_no_mean_and_no_correlation_with_inputs_under_the_model(family):
    """Lemma 15: E[g] = 0 and E[abar g^T] = 0 with targets of the model, in every layer; not with those of the data."""
    own = chains.problem(family, 4, 3)
    cases = jax.jit(lambda w, b: chains.every_case(own.family, w, b))(own.weights, own.batch)
    np.testing.assert_allclose(jnp.sum(cases.probabilities), 1, rtol=1e-14)
    gradient = jax.jit(jax.grad(own.objective))(own.weights, own.batch)
    for a, g, slope in zip(cases.inputs, cases.cotangents, gradient, strict=True):
        size = float(jnp.sum(cases.probabilities * jnp.linalg.norm(g, axis=-1)))
        tolerance = rounding(jnp.float64, cases.probabilities.size, scale=5 * size)
        np.testing.assert_allclose(jnp.einsum("kn,kno->o", cases.probabilities, g), 0, atol=tolerance)
        np.testing.assert_allclose(jnp.einsum("kn,ni,kno->io", cases.probabilities, a, g), 0, atol=tolerance)
        labelled = jnp.einsum("kn,ni,kno->io", cases.labelled, a, g)
        np.testing.assert_allclose(labelled, slope, atol=tolerance)
        assert jnp.max(jnp.abs(labelled)) > 0.05 * size


def joint_cumulant(weights, variables):
    """kappa of several variables from their joint moments: the sum over all partitions, without any lemma."""
    total = 0.0
    for partition in partitions(list(range(len(variables)))):
        moments = [np.sum(weights * np.prod([variables[i] for i in part], axis=0)) for part in partition]
        total += (-1) ** (len(partition) - 1) * math.factorial(len(partition) - 1) * np.prod(moments)
    return total


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for tail in partitions([i for i in rest if i not in others]):
                yield [[first, *others], *tail]


@pytest.mark.parametrize("family", chains.FAMILIES)
def test_the_error_is_the_cumulants_of_third_and_fourth_order(family):
    """Eqs. 6.3 and 6.4 for entries of all pairs of layers, against the joint distribution of inputs and targets."""
    own = chains.problem(family, 4, 3, examples=12)

    @jax.jit
    def compute(weights, batch):
        tapped = own.tapped(weights, batch)
        error = quality.exact_matrix(tapped) - quality.khatri_rao(quality.joint_factors(tapped))
        return error, quality.cumulant_bound(tapped), chains.every_case(own.family, weights, batch)

    error, bound, cases = compute(own.weights, own.batch)
    assert np.all(np.abs(error) <= bound + 1e-12)
    weights = np.asarray(cases.probabilities)
    places = [(layer, *place) for layer, w in enumerate(own.weights) for place in np.ndindex(w.shape)]
    assert len(list(partitions([0, 1, 2, 3]))) == 15
    draw = np.random.default_rng(0)
    for p, q in [*draw.integers(len(places), size=(60, 2)), (0, 0)]:
        (layer, i, o), (other, j, u) = places[p], places[q]
        a, b = (np.broadcast_to(cases.inputs[k][:, m], weights.shape) for k, m in ((layer, i), (other, j)))
        g, h = (np.asarray(cases.cotangents[k][:, :, m]) for k, m in ((layer, o), (other, u)))
        terms = [
            joint_cumulant(weights, [a, b, g, h]),
            np.sum(weights * a) * joint_cumulant(weights, [b, g, h]),
            np.sum(weights * b) * joint_cumulant(weights, [a, g, h]),
        ]
        size = np.sum(weights * np.abs(a * b * g * h)) + np.sum(weights * np.abs(g * h)) * np.max(np.abs(a * b))
        tolerance = rounding(jnp.float64, 15 * weights.size, scale=10 * size)
        np.testing.assert_allclose(error[p, q], np.sum(terms), atol=tolerance)
        np.testing.assert_allclose(bound[p, q], np.sum(np.abs(terms)), atol=tolerance)


def test_a_row_of_the_inverse_fisher_matrix_predicts_one_derivative_from_the_others():
    """Sigma^{-1} = D^{-1} (I - B): row i of B is the best linear predictor of derivative i, and D_ii its error."""
    own = chains.problem("bernoulli", 3, features=2, seed=4)

    @jax.jit
    def compute(weights, batch):
        cases = chains.every_case(own.family, weights, batch)
        return quality.exact_matrix(own.tapped(weights, batch)), cases.gradients(), cases.probabilities.reshape(-1)

    fisher, gradients, probabilities = (np.asarray(x) for x in compute(own.weights, own.batch))
    rows = gradients * np.sqrt(probabilities)[:, None]
    size = len(fisher)
    tolerance = rounding(jnp.float64, size, condition=float(np.linalg.cond(fisher)))
    assert tolerance < 1e-9
    precision = np.linalg.inv(fisher)
    for i in range(size):
        others = np.delete(np.arange(size), i)
        predictor, (error,), *_ = np.linalg.lstsq(rows[:, others], rows[:, i])
        np.testing.assert_allclose(-precision[i, others] / precision[i, i], predictor, atol=tolerance * 10)
        np.testing.assert_allclose(1 / precision[i, i], error, rtol=tolerance)
