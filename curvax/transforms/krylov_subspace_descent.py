"""Krylov subspace descent: the loss itself minimised over a Krylov space of the curvature (Vinyals and Povey 2012)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.matrices.curvature import ggn
from curvax.matrices.linear_map import LinearMap
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count

PyTree = Any


class KrylovSubspaceDescentInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        loss: h(theta) on the batch of the subspace's minimisation.
        new_loss: h(theta + delta) there.
        dimension: The dimension of the subspace, the last step's direction included.
        subspace_iterations: L-BFGS steps in the subspace.
        gradient_norm: The norm of the incoming gradient.
        update_norm: The norm of delta.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    loss: jax.Array
    new_loss: jax.Array
    dimension: jax.Array
    subspace_iterations: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    skipped_steps: jax.Array


class KrylovSubspaceDescentState(NamedTuple):
    """State of ``krylov_subspace_descent``.

    Attributes:
        steps: Steps so far.
        direction: The last step, one more vector of the next subspace.
        info: Figures of the last step.
    """

    steps: jax.Array
    direction: PyTree
    info: KrylovSubspaceDescentInfo


def krylov_subspace_descent(
    objective: Objective,
    *,
    num_vectors: int = 20,
    max_subspace_iterations: int = 20,
    tolerance: float = 1e-3,
    curvature: Callable[..., LinearMap] = ggn,
) -> optax.GradientTransformationExtraArgs:
    r"""Krylov subspace descent: delta minimises h(theta + delta) over span{g, B g, B^2 g, ..., last step} by L-BFGS.

    The space contains the conjugate-gradient iterates of every Tikhonov-damped model, so there is no damping to adapt;
    the price is the memory of its basis, and evaluations of loss and gradient in place of products.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=``, the third result of
    ``objective.value_and_grad``, or ``batch=``, optionally ``curvature_at=``, a point on another batch for B, and
    ``held_out=``, a batch whose loss is minimised over the subspace (that of the curvature otherwise; Vinyals and Povey
    take three different batches). Inside ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts on the leaves
    it is given. Under ``optax.MultiSteps`` the gradient is the mean over the mini-batches and everything else is of the
    last one. A step in which anything is not finite is skipped and counted.

    Args:
        objective: The objective.
        num_vectors: The dimension of the Krylov space; memory is one copy of the parameters for each.
        max_subspace_iterations: The cap on L-BFGS steps.
        tolerance: They stop where the gradient in the subspace has shrunk to this fraction.
        curvature: What makes B from (objective, at=...): ``curvax.ggn``, ``curvax.fisher`` or ``curvax.hessian``.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.krylov_subspace_descent(objective, num_vectors=2, tolerance=1e-6)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Vinyals and Povey 2012; Martens 2016, section 4.6.1.
    """

    def init(params: PyTree) -> KrylovSubspaceDescentState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        whole = dict.fromkeys(("dimension", "subspace_iterations", "skipped_steps"), jnp.int32)
        info = empty_info(KrylovSubspaceDescentInfo, dtype, **whole)
        return KrylovSubspaceDescentState(jnp.zeros((), jnp.int32), trees.zeros_like(params), info)

    def update(
        updates: PyTree,
        state: KrylovSubspaceDescentState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        curvature_at: CurvaturePoint | None = None,
        held_out: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, KrylovSubspaceDescentState]:
        del extra
        at = point_for_update("krylov_subspace_descent", objective, updates, params, at, batch)
        local = at if curvature_at is None else curvature_at
        dtype = state.info.loss.dtype

        def loss_at(delta):
            new_params = trees.add(local.params, trees.embed(delta, local.params))
            return (local.loss_at(new_params) if held_out is None else objective(new_params, held_out)).astype(dtype)

        gradient_norm = trees.norm(updates).astype(dtype)
        subspace = solvers.krylov_subspace(
            curvature(local.objective, at=local).restrict(updates),
            updates,
            num_vectors=num_vectors,
            # Without a gradient there is nothing to do, not even along the last direction.
            extra=trees.where(gradient_norm > 0, state.direction, trees.zeros_like(state.direction)),
        )
        minimum = solvers.minimize_in_subspace(
            loss_at, subspace, max_iterations=max_subspace_iterations, tolerance=tolerance
        )
        delta = minimum.value

        loss = local.loss.astype(dtype) if held_out is None else loss_at(trees.zeros_like(delta))
        info = KrylovSubspaceDescentInfo(
            loss=loss,
            new_loss=minimum.objective.astype(dtype),
            dimension=jnp.sum(subspace.active, dtype=jnp.int32),
            subspace_iterations=minimum.iterations.astype(jnp.int32),
            gradient_norm=gradient_norm,
            update_norm=trees.norm(delta).astype(dtype),
            skipped_steps=state.info.skipped_steps,
        )
        taken = KrylovSubspaceDescentState(next_count(state.steps), delta, info)
        return finish(trees.all_finite(loss, updates, delta, subspace.matrix), delta, taken, state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
