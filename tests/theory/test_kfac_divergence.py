"""The divergences that the block-diagonal matrices are Hessians of (KF-26; Martens 2016, sections 6.11 and 6.12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.layers import quality
from tests.theory import chains
from tests.tolerances import rounding


def from_layer(weights, i, s):
    """The outputs of the network, from the inputs s_i to the units of layer i (from 0)."""
    for w in weights[i + 1 :]:
        s = chains.with_one(jnp.tanh(s)) @ w
    return s


def hessian(divergence, weights):
    """The Hessian of sum_i D_i(W_i'), block-diagonal as each D_i is a function of one layer."""
    blocks = [
        jax.hessian(lambda w, i=i: divergence(i, w))(own).reshape(own.size, own.size) for i, own in enumerate(weights)
    ]
    return jax.scipy.linalg.block_diag(*blocks)


@pytest.mark.parametrize("family", chains.FAMILIES)
def test_f_check_is_the_hessian_of_the_distance_of_the_inputs_to_units(family):
    r"""D(theta', theta) = 1/2 sum_i E[(s_i - s_i')^T G_ii (s_i - s_i')], with s_i' = W_i' abar_{i-1} (Heskes 2000)."""
    own = chains.problem(family, 4, 3)

    @jax.jit
    def compute(weights, batch):
        joint = quality.joint_factors(own.tapped(weights, batch))
        cases = chains.every_case(own.family, weights, batch)

        def divergence(i, w):
            change = cases.inputs[i] @ (weights[i] - w)
            g = jnp.einsum("kn,kno,knp->op", cases.probabilities, cases.cotangents[i], cases.cotangents[i])
            return jnp.mean(jnp.einsum("no,op,np->n", change, g, change)) / 2

        return quality.block_diagonal(joint), hessian(divergence, weights)

    check, expected = compute(own.weights, own.batch)
    scale = float(jnp.max(jnp.abs(check)))
    np.testing.assert_allclose(check, expected, atol=rounding(jnp.float64, 200, scale=10 * scale))


@pytest.mark.parametrize("family", chains.FAMILIES)
def test_with_the_fisher_matrix_of_each_case_it_is_the_diagonal_blocks_of_the_exact_one(family):
    """The Hessian of sum_i E[KL] between P(y|s_i) and P(y|s_i'), in either direction, and of its quadratic form."""
    own = chains.problem(family, 4, 3)

    @jax.jit
    def compute(weights, batch):
        exact = quality.exact_matrix(own.tapped(weights, batch))
        cases = chains.every_case(own.family, weights, batch)
        targets = jnp.asarray(own.family.targets)

        def quadratic(i, w):
            change = cases.inputs[i] @ (weights[i] - w)
            along = jnp.einsum("kno,no->kn", cases.cotangents[i], change)
            return jnp.sum(cases.probabilities * along**2) / 2

        def divergence(i, w, forwards):
            def log(matrix):
                outputs = from_layer(weights, i, cases.inputs[i] @ matrix)
                return jax.vmap(lambda y: -own.family.negative_log(outputs, y))(targets)

            old, new = log(weights[i]), log(w)
            first, second = (old, new) if forwards else (new, old)
            return jnp.mean(jnp.sum(jnp.exp(first) * (first - second), axis=0))

        ways = [quadratic, lambda i, w: divergence(i, w, True), lambda i, w: divergence(i, w, False)]
        return exact, [hessian(way, weights) for way in ways]

    exact, expected = compute(own.weights, own.batch)
    layer = np.repeat(np.arange(3), [w.size for w in own.weights])
    blocks = np.where(layer[:, None] == layer, exact, 0)
    tolerance = rounding(jnp.float64, 500, scale=10 * float(np.max(np.abs(exact))))
    for matrix in expected:
        np.testing.assert_allclose(matrix, blocks, atol=tolerance)
