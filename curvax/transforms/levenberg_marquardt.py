"""Damped Newton methods with a dense matrix, for small problems: Levenberg, Marquardt, saddle-free Newton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.damping.rules import DampingRule
from curvax.matrices.curvature import ggn, hessian
from curvax.matrices.linear_map import LinearMap
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count

PyTree = Any
Scaling = Literal["identity", "diagonal"]


class LevenbergMarquardtInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        loss: h(theta) before the step.
        new_loss: h(theta + delta), whether the step was taken or not.
        step_ratio: rho, the actual over the predicted change; -inf where the step failed.
        damping: lambda that the step was computed with.
        gradient_norm: The norm of the incoming gradient.
        update_norm: The norm of delta.
        accepted: Whether the step was taken.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    loss: jax.Array
    new_loss: jax.Array
    step_ratio: jax.Array
    damping: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    accepted: jax.Array
    skipped_steps: jax.Array


class LevenbergMarquardtState(NamedTuple):
    """State of ``levenberg_marquardt``.

    Attributes:
        steps: Steps so far.
        damping: lambda for the next step.
        info: Figures of the last step.
    """

    steps: jax.Array
    damping: jax.Array
    info: LevenbergMarquardtInfo


def levenberg_marquardt(
    objective: Objective,
    *,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    scaling: Scaling = "identity",
    curvature: Callable[..., LinearMap] = ggn,
) -> optax.GradientTransformationExtraArgs:
    r"""Levenberg-Marquardt: delta = -(B + lambda D)^{-1} g, with lambda adapted and bad steps rejected.

    The matrix is formed and factorised, so this is for some thousands of parameters at most. B is the Gauss-Newton
    matrix by default; with ``curvature=curvax.hessian`` its eigenvalues are replaced by their absolute values
    (saddle-free Newton, Dauphin et al. 2014). A step that does not reduce the loss on the batch is not taken and raises
    lambda.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=``, the third result of
    ``objective.value_and_grad``, or ``batch=``; gradient, curvature and the loss that judges the step belong to that
    one batch. Inside ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts on the leaves it is given. Under
    ``optax.MultiSteps`` the gradient is the mean over the mini-batches and the curvature that of the last one. A step
    in which anything is not finite is skipped and counted: updates are zero and the damping stays.

    Args:
        objective: The objective.
        initial_damping: lambda_0.
        rule: How lambda adapts; by default times 2/3 above rho = 3/4 and times 3/2 below 1/4.
        scaling: D: "identity" (Levenberg 1944) or "diagonal", the diagonal of B (Marquardt 1963).
        curvature: What makes B from (objective, at=...): ``curvax.ggn``, ``curvax.fisher`` or ``curvax.hessian``.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.levenberg_marquardt(objective, initial_damping=1e-6)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 100.0]]), jnp.array([[1.0], [100.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)
        >>> print(f"{state.info.step_ratio:.3f}")
        1.000
    """
    rule = DampingRule() if rule is None else rule
    _check_scaling(scaling)

    def init(params: PyTree) -> LevenbergMarquardtState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))

        info = empty_info(LevenbergMarquardtInfo, dtype, accepted=jnp.bool_, skipped_steps=jnp.int32)
        return LevenbergMarquardtState(jnp.zeros((), jnp.int32), jnp.full((), initial_damping, dtype), info)

    def update(
        updates: PyTree,
        state: LevenbergMarquardtState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, LevenbergMarquardtState]:
        del extra
        at = point_for_update("levenberg_marquardt", objective, updates, params, at, batch)
        dtype = state.damping.dtype
        gradient = trees.ravel(updates)
        matrix = _dense(curvature(at.objective, at=at).restrict(updates), curvature)

        step = -_solve(matrix, gradient, state.damping, scaling)
        delta = trees.unravel(step, updates)
        predicted = jnp.vdot(gradient, step) + jnp.vdot(step, matrix @ step) / 2
        loss = at.loss
        new_loss = at.loss_at(trees.add(at.params, trees.embed(delta, at.params)))
        ratio = reduction_ratio(loss, new_loss, predicted).astype(dtype)

        accepted = ratio > 0
        steps = next_count(state.steps)
        info = LevenbergMarquardtInfo(
            loss=loss.astype(dtype),
            new_loss=new_loss.astype(dtype),
            step_ratio=ratio,
            damping=state.damping,
            gradient_norm=trees.norm(updates).astype(dtype),
            update_norm=trees.norm(delta).astype(dtype),
            accepted=accepted,
            skipped_steps=state.info.skipped_steps,
        )
        taken = LevenbergMarquardtState(steps, rule(state.damping, ratio, steps), info)
        moved = trees.where(accepted, delta, trees.zeros_like(delta))
        return finish(trees.all_finite(loss, gradient, matrix), moved, taken, state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def scale_by_dense_curvature(
    objective: Objective,
    *,
    damping: float = 1e-3,
    scaling: Scaling = "identity",
    curvature: Callable[..., LinearMap] = ggn,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (B + damping D)^{-1}, with B formed and factorised; for small problems.

    It preconditions whatever updates arrive, reads no loss value and keeps no state; chain a learning rate behind it:
    ``optax.chain(curvax.scale_by_dense_curvature(objective), optax.scale_by_learning_rate(0.1))``. Schedule the damping
    with ``optax.inject_hyperparams(..., static_args=("objective", "scaling", "curvature"))``. ``update`` takes ``at=``
    or ``batch=``. Under ``optax.MultiSteps`` the updates are the mean over the mini-batches and B that of the last one.
    Updates with a NaN come out as zeros.

    Args:
        objective: The objective.
        damping: lambda.
        scaling: D: "identity" or "diagonal", the diagonal of B.
        curvature: What makes B from (objective, at=...); the eigenvalues of ``curvax.hessian`` become absolute values.

    Returns:
        The transformation.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_dense_curvature(objective, damping=0.5)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> tx.update(jnp.ones((2, 1)), tx.init(w), w, batch=batch)[0]
        Array([[1.],
               [1.]], dtype=float...)
    """
    _check_scaling(scaling)

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        at = point_for_update("scale_by_dense_curvature", objective, updates, params, at, batch)
        matrix = _dense(curvature(at.objective, at=at).restrict(updates), curvature)
        scaled = trees.unravel(_solve(matrix, trees.ravel(updates), jnp.asarray(damping), scaling), updates)
        return trees.where(trees.all_finite(scaled), scaled, trees.zeros_like(scaled)), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _dense(linear_map, curvature):
    matrix = linear_map.to_dense()
    matrix = (matrix + matrix.T) / 2
    if curvature is not hessian:
        return matrix
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.abs(values)) @ vectors.T


def _solve(matrix, vector, damping, scaling):
    """(B + lambda D)^{-1} v by Cholesky; the entries of D have a floor, as some parameters do nothing."""
    entries = jnp.diag(matrix)
    if scaling == "identity":
        scale = jnp.ones_like(entries)
    else:
        scale = jnp.maximum(entries, jnp.finfo(entries.dtype).eps * jnp.max(entries))
        scale = jnp.where(scale > 0, scale, 1)
    damped = matrix + jnp.diag(damping.astype(matrix.dtype) * scale)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), vector.astype(matrix.dtype))


def _check_scaling(scaling):
    if scaling not in ("identity", "diagonal"):
        raise ValueError(f"scaling must be 'identity' or 'diagonal', got {scaling!r}")
