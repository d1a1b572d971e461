"""Values and dense matrices straight from their definitions, to test the library against; for hundreds of parameters.

Nothing here calls the library. Of an objective only its data are read: model functions, the names and fields of losses,
masks, weights and the penalty. The losses are written out anew, their Hessians are ``jax.hessian``'s, and their Fisher
matrices are the expectation E[score score^T] over every target there is, or over quadrature nodes that make it exact.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

PyTree = Any


@jax.jit
def value(objective: Any, params: PyTree, batch: PyTree) -> jax.Array:
    """The objective, sum_t weight_t / N_t sum_i mask_i w_i L_i + l2 / 2 ||theta||^2.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The scalar.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error(), l2=2.0)
        >>> value(objective, jnp.ones((1, 1)), (jnp.full((1, 1), 2.0), jnp.ones((1, 1))))
        Array(1.5, dtype=float...)
    """
    total = jnp.sum(_penalty(objective, params) * ravel(params) ** 2) / 2
    for term in objective.terms:
        outputs, targets, factors = _forward(term, params, batch)
        losses = jax.vmap(lambda z, y, term=term: _loss(term.loss, z, y))(outputs, targets)
        total = total + jnp.sum(_expand(factors, losses) * losses).astype(total.dtype)
    return total


@jax.jit
def dense_hessian(objective: Any, params: PyTree, batch: PyTree) -> jax.Array:
    """The Hessian of ``value`` in the ravelled parameters.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix, in the order of ``ravel``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> dense_hessian(objective, jnp.zeros((1, 1)), (jnp.ones((1, 1)), jnp.ones((1, 1))))
        Array([[1.]], dtype=float...)
    """
    return jax.hessian(lambda flat: value(objective, unravel(flat, params), batch))(ravel(params))


@jax.jit
def dense_ggn(objective: Any, params: PyTree, batch: PyTree) -> jax.Array:
    """The generalised Gauss-Newton matrix sum_i factor_i J_i^T C_i J_i, from explicit Jacobians and explicit C_i.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix.
    """
    return _sandwich(objective, params, batch, _curvature_block)


@jax.jit
def dense_fisher(objective: Any, params: PyTree, batch: PyTree) -> jax.Array:
    """The Fisher matrix sum_i factor_i J_i^T F_i J_i, from explicit Jacobians and explicit F_i.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix.
    """
    return _sandwich(objective, params, batch, _fisher_block)


@jax.jit
def dense_empirical_fisher(objective: Any, params: PyTree, batch: PyTree) -> jax.Array:
    """The empirical Fisher matrix sum_i factor_i g_i g_i^T, from the explicit gradient of every case.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix.
    """
    matrix = jnp.diag(_penalty(objective, params))
    for term in objective.terms:
        gradients, factors = case_gradients(term, params, batch)
        matrix = matrix + (gradients.T * factors) @ gradients
    return matrix


@jax.jit
def divergence(objective: Any, first: PyTree, second: PyTree, batch: PyTree) -> jax.Array:
    """KL(P(first) || P(second)) of the predictions, sum_i factor_i sum_y p(y|z_i) (L(y, z_i') - L(y, z_i)).

    Args:
        objective: The objective, whose losses are -log p up to what depends on y alone.
        first: The parameters that the expectation is over.
        second: The others.
        batch: The batch.

    Returns:
        The scalar, without the penalty.
    """

    def one(loss, z, other, c):
        targets, probabilities = TARGETS[_name(loss)](z)
        gaps = jax.vmap(lambda y: _loss(loss, other, y) - _loss(loss, z, y))(targets)
        expected = jnp.sum(probabilities * gaps, axis=0)
        return jnp.sum(_expand(c, expected) * expected)

    total = jnp.zeros(())
    for term in objective.terms:
        outputs, _, factors = _forward(term, first, batch)
        others = _forward(term, second, batch)[0]
        total = total + jnp.sum(jax.vmap(lambda z, o, c, t=term: one(t.loss, z, o, c))(outputs, others, factors))
    return total


@jax.jit
def case_gradients(term: Any, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    """The gradient of the loss of every case of a term, and the factor of each case.

    Args:
        term: The term.
        params: theta.
        batch: The batch.

    Returns:
        Gradients, cases x n, and factors, one for each case; cases are the examples, or the steps where weights or mask
        number those.
    """

    def losses(flat):
        outputs, targets, factors = _forward(term, unravel(flat, params), batch)
        each = jax.vmap(lambda z, y: _loss(term.loss, z, y))(outputs, targets)
        return jnp.sum(each, axis=tuple(range(factors.ndim, each.ndim))).reshape(-1)

    return jax.jacfwd(losses)(ravel(params)), _forward(term, params, batch)[2].reshape(-1)


def dense_output_matrix(matrix: Any, outputs: PyTree) -> jax.Array:
    """An ``OutputMatrix`` written out as one matrix over all outputs of the batch, by products with basis vectors.

    Args:
        matrix: The matrix.
        outputs: The outputs whose shape it acts on.

    Returns:
        The matrix, of the size of ``ravel(outputs)``.
    """
    identity = jnp.eye(ravel(outputs).size, dtype=ravel(outputs).dtype)
    return jax.vmap(lambda row: ravel(matrix.product(unravel(row, outputs))))(identity).T


def ravel(tree: PyTree) -> jax.Array:
    """All leaves as one vector, in the widest dtype there is among them and float32."""
    leaves = jax.tree.leaves(tree)
    dtype = max([jnp.dtype(jnp.float32), *(leaf.dtype for leaf in leaves)], key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([leaf.astype(dtype).reshape(-1) for leaf in leaves])


def unravel(vector: jax.Array, like: PyTree) -> PyTree:
    """The inverse of ``ravel``."""
    leaves, structure = jax.tree.flatten(like)
    parts = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten(
        [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def _forward(term, params, batch):
    """Outputs, targets and factors weight mask_i w_i / N, the shape of which is that of the cases."""
    inputs, targets = batch if term.select is None else term.select(batch)
    outputs = term.model_fn(params, inputs)
    outputs = jax.tree.map(
        lambda z: z if z.dtype.itemsize > 2 else z.astype(jnp.float32), outputs[0] if term.has_aux else outputs
    )
    examples, dtype = jax.tree.leaves(outputs)[0].shape[0], ravel(outputs).dtype
    factors, count = jnp.full(examples, term.weight, dtype), examples
    if term.mask is not None:
        mask = term.mask(batch).astype(dtype)
        count = jnp.maximum(jnp.sum(mask), 1)
        factors = _expand(factors, mask) * mask
    if term.example_weights is not None:
        weights = term.example_weights(batch).astype(dtype)
        factors = _expand(factors, weights) * _expand(weights, factors)
    return outputs, targets, factors / count


def _expand(array, like):
    """``array`` with axes of length one behind, as many as ``like`` has more."""
    return array.reshape(array.shape + (1,) * (like.ndim - array.ndim))


def _penalty(objective, params):
    """The diagonal of the penalty's Hessian."""
    chosen = jax.tree.map(lambda _: True, params) if objective.penalty.mask is None else objective.penalty.mask(params)
    l2 = 0.0 if objective.penalty.l2 is None else objective.penalty.l2
    return ravel(jax.tree.map(lambda on, leaf: jnp.full(leaf.shape, l2 if on else 0.0, leaf.dtype), chosen, params))


def _sandwich(objective, params, batch, block_of):
    """The sum over examples of J_i^T C_i J_i, and the penalty."""
    matrix = jnp.diag(_penalty(objective, params))
    for term in objective.terms:

        def rows(flat, term=term):
            return jax.vmap(ravel)(_forward(term, unravel(flat, params), batch)[0])

        outputs, targets, factors = _forward(term, params, batch)
        blocks = jax.vmap(lambda z, y, c, term=term: block_of(term.loss, z, y, c))(outputs, targets, factors)
        jacobian = jax.jacfwd(rows)(ravel(params))
        matrix = matrix + jnp.einsum("iap,iab,ibq->pq", jacobian, blocks, jacobian)
    return matrix


# What follows takes ONE example: its outputs z, targets y and factors c, of which it has one for each of its cases.


def _curvature_block(loss, z, y, c):
    """C, the matrix of the Gauss-Newton products: the Hessian, or what stands for it where the loss is not convex."""
    if hasattr(loss, "loss"):
        return _curvature_block(loss.loss, z, y, c)
    if y is None or (_name(loss) == "gaussian" and not loss.exact):
        return _fisher_block(loss, z, y, c)
    block = _hessian_block(loss, z, y, c)
    if hasattr(loss, "treatment") and not loss.convex and loss.treatment != "exact":
        values, vectors = jnp.linalg.eigh(block)
        values = jnp.abs(values) if loss.treatment == "absolute" else jnp.maximum(values, 0)
        block = (vectors * values) @ vectors.T
    return block


def _hessian_block(loss, z, y, c):
    def total(flat):
        losses = _loss(loss, unravel(flat, z), y)
        return jnp.sum(_expand(c, losses) * losses)

    return jax.hessian(total)(ravel(z))


def _fisher_block(loss, z, y, c):
    """E[score score^T]: the entries of L are independent of each other, so their blocks are summed."""
    if hasattr(loss, "loss"):
        return _fisher_block(loss.loss, z, y, c)
    if hasattr(loss, "function"):  # of natural parameters, or it has none
        return _hessian_block(loss, z, y, c)
    targets, probabilities = TARGETS[_name(loss)](z)

    def scores(target):
        return jax.jacfwd(lambda flat: _loss(loss, unravel(flat, z), target))(ravel(z))

    scores = jax.vmap(scores)(targets)
    return jnp.einsum("k...,k...a,k...b->ab", probabilities * _expand(c, probabilities[0]), scores, scores)


def _loss(loss, z, y):
    """L of one example: a number for each entry, or for each distribution over classes."""
    if hasattr(loss, "loss"):
        return _loss(loss.loss, z, y)
    return loss.function(z, y) if hasattr(loss, "function") else LOSSES[_name(loss)](z, y)


def _name(loss):
    return type(loss).__name__.replace("_", "").lower()


def _cross_entropy(z, y):
    y = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype) if jnp.issubdtype(y.dtype, jnp.integer) else y.astype(z.dtype)
    return jnp.sum(y, axis=-1) * jax.nn.logsumexp(z, axis=-1) - jnp.sum(y * z, axis=-1)


def _normal(z, y):
    """-log N(y; mean, exp(log variance)) up to a constant."""
    mean, log_variance = z
    return ((y.astype(mean.dtype) - mean) ** 2 / jnp.exp(log_variance) + log_variance) / 2


LOSSES = {
    "squarederror": lambda z, y: (z - y.astype(z.dtype)) ** 2 / 2,
    "sigmoidbinarycrossentropy": lambda z, y: jnp.logaddexp(0, z) - y.astype(z.dtype) * z,
    "softmaxcrossentropy": _cross_entropy,
    "poisson": lambda z, y: jnp.exp(z) - y.astype(z.dtype) * z,
    "gaussian": _normal,
}


def _normal_targets(mean, deviation):
    """Three nodes of Gauss and Hermite, exact up to degree 5; a squared score of mean and log variance has degree 4."""
    nodes = np.array([-math.sqrt(3), 0, math.sqrt(3)]).reshape(-1, *(1,) * mean.ndim)
    targets = mean + deviation * jnp.asarray(nodes, mean.dtype)
    return targets, jnp.broadcast_to(jnp.asarray(np.where(nodes == 0, 2 / 3, 1 / 6), mean.dtype), targets.shape)


def _classes(z):
    targets = jnp.broadcast_to(jnp.arange(z.shape[-1]).reshape(-1, *(1,) * (z.ndim - 1)), (z.shape[-1], *z.shape[:-1]))
    return targets, jnp.moveaxis(jnp.exp(z) / jnp.sum(jnp.exp(z), axis=-1, keepdims=True), -1, 0)


def _counts(log_rate):
    """The counts below 200: beyond, the probability is below rounding for rates below 60."""
    targets = jnp.arange(200, dtype=log_rate.dtype).reshape(-1, *(1,) * log_rate.ndim)
    targets = jnp.broadcast_to(targets, (200, *log_rate.shape))
    return targets, jnp.exp(targets * log_rate - jnp.exp(log_rate) - gammaln(targets + 1))


def _bits(z):
    return jnp.stack([jnp.zeros_like(z), jnp.ones_like(z)]), jnp.stack([1 / (1 + jnp.exp(z)), 1 / (1 + jnp.exp(-z))])


# The targets of one example that have the expectation over its distribution, and the probability of each entry of them.
TARGETS = {
    "squarederror": lambda z: _normal_targets(z, jnp.ones_like(z)),
    "sigmoidbinarycrossentropy": _bits,
    "softmaxcrossentropy": _classes,
    "poisson": _counts,
    "gaussian": lambda z: _normal_targets(z[0], jnp.exp(z[1] / 2)),
}
