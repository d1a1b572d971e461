"""Dense matrices straight from their definitions, to test curvature products against; for hundreds of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.objectives.objective import Objective
from curvax.objectives.output_matrix import OutputMatrix
from curvax.objectives.term import Term, evaluate, expand_right

PyTree = Any


@jax.jit
def dense_hessian(objective: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """The Hessian of the objective by ``jax.hessian`` of the ravelled parameters.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix, in the order of ``curvax.trees.ravel``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> dense_hessian(objective, jnp.zeros((1, 1)), (jnp.ones((1, 1)), jnp.ones((1, 1))))
        Array([[1.]], dtype=float...)
    """
    return jax.hessian(lambda flat: objective(trees.unravel(flat, params), batch))(trees.ravel(params))


@jax.jit
def dense_ggn(objective: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """The generalised Gauss-Newton matrix sum_i scale_i J_i^T C_i J_i, from explicit Jacobians and explicit C_i.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix.
    """
    return _sandwich(objective, params, batch, lambda term, z, y: term.loss.curvature(z, y))


@jax.jit
def dense_fisher(objective: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """The Fisher matrix sum_i scale_i J_i^T F_R J_i, from explicit Jacobians and explicit F_R.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix.
    """
    return _sandwich(objective, params, batch, lambda term, z, y: term.loss.fisher(z, y))


@jax.jit
def dense_empirical_fisher(objective: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """The empirical Fisher matrix sum_i scale_i g_i g_i^T, from the explicit gradient of every case.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.

    Returns:
        The n x n matrix.
    """

    def one(term):
        gradients, scale = case_gradients(term, params, batch)
        return (gradients * scale[:, None]).T @ gradients

    return _penalised(objective, params, sum(one(term) for term in objective.terms))


@jax.jit
def case_gradients(term: Term, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    """The gradient of the loss of every case of a term, by ``jax.jacrev``, and the factor of each case.

    Args:
        term: The term.
        params: theta.
        batch: The batch.

    Returns:
        Gradients, cases x n, and scales, one for each case; cases are the examples, or the steps where weights or mask
        number those.
    """
    _, _, scale, _, _ = evaluate(term, params, batch)
    axes = max(scale.ndim, 1)

    def losses(flat):
        outputs, targets, _, _, _ = evaluate(term, trees.unravel(flat, params), batch)
        values = term.loss.value(outputs, targets)
        return jnp.sum(values, axis=tuple(range(axes, values.ndim))).reshape(-1)

    gradients = jax.jacrev(losses)(trees.ravel(params))
    return gradients, jnp.broadcast_to(scale, (gradients.shape[0],) if scale.ndim == 0 else scale.shape).reshape(-1)


def dense_output_matrix(matrix: OutputMatrix, outputs: PyTree) -> jax.Array:
    """An ``OutputMatrix`` written out as one matrix over all outputs of the batch, by products with basis vectors.

    Args:
        matrix: The matrix.
        outputs: The outputs whose shape it acts on.

    Returns:
        The matrix, of the size of ``trees.ravel(outputs)``.
    """
    identity = jnp.eye(trees.size(outputs), dtype=trees.wide_dtype(*jax.tree.leaves(outputs)))
    return jax.vmap(lambda row: trees.ravel(matrix.product(trees.unravel(row, outputs))))(identity).T


def _sandwich(objective, params, batch, matrix_of):
    def one(term):
        def outputs_of(flat):
            return trees.ravel(evaluate(term, trees.unravel(flat, params), batch)[0])

        outputs, targets, scale, _, _ = evaluate(term, params, batch)
        jacobian = jax.jacrev(outputs_of)(trees.ravel(params))
        scales = trees.ravel(jax.tree.map(lambda z: jnp.broadcast_to(expand_right(scale, z.ndim), z.shape), outputs))
        matrix = dense_output_matrix(matrix_of(term, outputs, targets), outputs)
        return jacobian.T @ (scales[:, None] * matrix) @ jacobian

    return _penalised(objective, params, sum(one(term) for term in objective.terms))


def _penalised(objective, params, matrix):
    entries = jax.tree.map(jnp.full_like, params, objective.penalty_curvature(params))
    return matrix + jnp.diag(trees.ravel(entries).astype(matrix.dtype))
