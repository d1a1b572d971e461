"""Undamped K-FAC does not depend on how a network is parameterised (KF-24, KF-25; Martens 2016, section 6.10)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.layers import quality
from curvax.layers.factors import kronecker_factors
from curvax.layers.inverses import BlockDiagonal, precondition
from curvax.layers.tridiagonal import BlockTridiagonal
from curvax.matrices.curvature import Fisher
from tests.theory import chains
from tests.tolerances import rounding

INVERSES = {"diagonal": quality.block_diagonal_inverse, "tridiagonal": quality.block_tridiagonal_inverse}


def step(problem, inverse, weights, batch, gamma=0.0):
    """The update -F^{-1} grad, for each layer, and the factors."""
    joint = quality.joint_factors(problem.tapped(weights, batch))
    damped = quality.damped(joint, gamma) if gamma else joint
    gradient = jax.grad(problem.objective)(weights, batch)
    flat = jnp.concatenate([g.reshape(-1) for g in gradient])
    parts = jnp.split(-inverse(damped) @ flat, np.cumsum([g.size for g in gradient])[:-1])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)], joint


def back(weights, omegas, phis):
    """zeta: the weights of the plain network from those of the transformed one, W = Omega^T W^+ Phi^T in our layout."""
    return [omega.T @ w @ phi.T for w, omega, phi in zip(weights, omegas, phis, strict=True)]


def forth(weights, omegas, phis):
    inverse = np.linalg.inv
    return [inverse(omega.T) @ w @ inverse(phi.T) for w, omega, phi in zip(weights, omegas, phis, strict=True)]


def transformed(own, omegas, phis):
    def model(weights, x):
        return chains.network(weights, x, omegas, phis)

    return own.replace_model(model, forth(own.weights, omegas, phis))


def random_transformation(own):
    """Omega on homogeneous vectors, Phi on the inputs of the units; well-conditioned."""
    draw = np.random.default_rng(30)
    shapes = [w.shape for w in own.weights]
    return tuple([np.eye(n) + 0.2 * draw.normal(size=(n, n)) for n in sizes] for sizes in zip(*shapes, strict=True))


def tolerance(joint, size):
    """Rounding of a solve with each of the factors, and of the transformation."""
    conditions = [
        np.linalg.cond(a[i]) * np.linalg.cond(g[i])
        for i, (a, g) in enumerate(zip(joint.inputs, joint.outputs, strict=True))
    ]
    return rounding(jnp.float64, 100, scale=size, condition=float(max(conditions)))


@pytest.mark.parametrize("inverse", INVERSES)
def test_the_update_of_the_transformed_network_is_that_of_the_network(inverse):
    """Theorem 11: zeta(theta^+ + delta^+) = theta + delta; with damping it is not."""
    own = chains.problem("bernoulli", 4, 4, 3, examples=60)
    omegas, phis = random_transformation(own)
    other = transformed(own, omegas, phis)

    @jax.jit
    def compute(weights, others, batch):
        gammas = (0.0, 0.3)
        of = INVERSES[inverse]
        change = other.objective.terms[0].model_fn(others, batch[0]) - chains.network(weights, batch[0])
        plain, new = ([step(p, of, w, batch, g) for g in gammas] for p, w in ((own, weights), (other, others)))
        return change, plain, new

    change, plain, new = jax.tree.map(np.asarray, compute(own.weights, other.weights, own.batch))
    np.testing.assert_allclose(change, 0, atol=1e-13)
    (delta, joint), (moved, joint_there) = plain[0], new[0]
    for i, j in np.ndindex(4, 4):
        a, g = omegas[i] @ joint.inputs[i][j] @ omegas[j].T, phis[i].T @ joint.outputs[i][j] @ phis[j]
        np.testing.assert_allclose(joint_there.inputs[i][j], a, atol=1e-12)
        np.testing.assert_allclose(joint_there.outputs[i][j], g, atol=1e-12)
    size = max(np.abs(d).max() for d in delta)
    for ours, theirs in zip(delta, back(moved, omegas, phis), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=tolerance(joint, size))
    (delta, _), (moved, _) = plain[1], new[1]
    gap = max(np.abs(a - b).max() for a, b in zip(delta, back(moved, omegas, phis), strict=True))
    assert gap > 1e-2 * max(np.abs(d).max() for d in delta)


@pytest.mark.parametrize("inverse", INVERSES)
def test_the_preconditioner_of_the_library_is_invariant_and_the_dense_one(inverse):
    matrices = {"diagonal": BlockDiagonal(), "tridiagonal": BlockTridiagonal()}[inverse]
    own = chains.problem("bernoulli", 4, 3, examples=60)
    omegas, phis = random_transformation(own)
    other = transformed(own, omegas, phis)

    def library(problem, weights, batch):
        layers = problem.layers
        pairs = matrices.pairs(layers)
        factors = kronecker_factors(problem.tapped(weights, batch), curvature=Fisher(), pairs=pairs)
        prepared = matrices.prepare(layers, factors, 0.0, None)
        gradient = jax.grad(problem.objective)(weights, batch)
        return precondition(layers, matrices, prepared, factors, 0.0, gradient)

    @jax.jit
    def compute(weights, others, batch):
        dense = step(own, INVERSES[inverse], weights, batch)
        return dense, library(own, weights, batch), library(other, others, batch)

    (delta, joint), plain, new = jax.tree.map(np.asarray, compute(own.weights, other.weights, own.batch))
    size = max(np.abs(d).max() for d in delta)
    for ours, theirs, moved in zip(delta, plain, back(new, omegas, phis), strict=True):
        np.testing.assert_allclose(theirs, -ours, atol=tolerance(joint, size))
        np.testing.assert_allclose(moved, -ours, atol=tolerance(joint, size))


@pytest.mark.parametrize("inverse", INVERSES)
def test_logistic_units_and_preprocessed_inputs_make_no_difference(inverse):
    """Corollary 12: tanh(s) = 2 logistic(2 s) - 1, and inputs may be scaled, mixed and shifted."""
    own = chains.problem("bernoulli", 4, 3, examples=60)
    affine = np.eye(4)
    affine[:3] += 0.5 * np.asarray(chains.normal(50, 3, 4))
    omegas, phis = [affine], []
    for w in own.weights[:-1]:
        # Of homogeneous units: logistic(2 s) = (tanh(s) + 1) / 2, and what they take is twice what those of tanh do.
        omega = np.eye(w.shape[1] + 1) / 2
        omega[:, -1] += 0.5
        omegas.append(omega)
        phis.append(np.eye(w.shape[1]) / 2)
    weights = forth(own.weights, omegas, [*phis, np.eye(2)])

    def logistic(weights, x):
        x = (chains.with_one(x) @ affine.T)[:, :-1]
        return chains.network(weights, x, activation=jax.nn.sigmoid)

    other = own.replace_model(logistic, weights)

    @jax.jit
    def compute(weights, others, batch):
        (delta, joint), (moved, _) = (
            step(problem, INVERSES[inverse], w, batch) for problem, w in ((own, weights), (other, others))
        )
        after = [w + d for w, d in zip(weights, delta, strict=True)]
        after_there = [w + d for w, d in zip(others, moved, strict=True)]
        same = logistic(others, batch[0]) - chains.network(weights, batch[0])
        return chains.network(after, batch[0]), logistic(after_there, batch[0]), joint, same

    outputs, there, joint, same = jax.tree.map(np.asarray, compute(own.weights, other.weights, own.batch))
    np.testing.assert_allclose(same, 0, atol=1e-12)
    np.testing.assert_allclose(there, outputs, atol=10 * tolerance(joint, float(np.abs(outputs).max())))


def root(matrix, power):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


def test_the_update_is_gradient_descent_where_activities_and_derivatives_are_white():
    """Corollary 13: with Omega_i = A_ii^{-1/2}, Phi_i = G_ii^{-1/2} all factors are I in the transformed network."""
    own = chains.problem("bernoulli", 4, 3, examples=60)
    compute = jax.jit(lambda w, b: step(own, quality.block_diagonal_inverse, w, b))
    delta, joint = jax.tree.map(np.asarray, compute(own.weights, own.batch))
    omegas = [root(joint.inputs[i][i], -0.5) for i in range(3)]
    phis = [root(joint.outputs[i][i], -0.5) for i in range(3)]
    white = transformed(own, omegas, phis)

    @jax.jit
    def there(weights, batch):
        return quality.joint_factors(white.tapped(weights, batch)), jax.grad(white.objective)(weights, batch)

    factors, gradient = jax.tree.map(np.asarray, there(white.weights, white.batch))
    size = max(np.abs(d).max() for d in delta)
    near = tolerance(joint, max(size, 1.0))
    for i in range(3):
        np.testing.assert_allclose(factors.inputs[i][i], np.eye(len(omegas[i])), atol=near)
        np.testing.assert_allclose(factors.outputs[i][i], np.eye(len(phis[i])), atol=near)
    for ours, theirs in zip(delta, back(gradient, omegas, phis), strict=True):
        np.testing.assert_allclose(-theirs, ours, atol=near)
