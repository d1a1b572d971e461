"""Natural gradient descent: steepest descent in the Kullback-Leibler divergence of the model's predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.matrices.curvature import fisher
from curvax.matrices.linear_map import LinearMap
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count

PyTree = Any


class NaturalGradientInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        damping: lambda.
        cg_iterations: Steps of conjugate gradients.
        cg_reason: Why they stopped, a ``curvax.solvers.StopReason``.
        residual: ||(F + lambda I) x - g|| / ||g|| at the end.
        divergence: 1/2 delta^T F delta, the divergence of the step to second order; 0 where it is not worked out
            (``scale_by_natural_gradient``, or no ``max_divergence``).
        gradient_norm: The norm of the incoming updates.
        update_norm: The norm of what came out.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    damping: jax.Array
    cg_iterations: jax.Array
    cg_reason: jax.Array
    residual: jax.Array
    divergence: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    skipped_steps: jax.Array


class NaturalGradientState(NamedTuple):
    """State of ``natural_gradient`` and ``scale_by_natural_gradient``.

    Attributes:
        steps: Steps so far.
        solution: The last solution, where the next run of conjugate gradients starts from.
        info: Figures of the last step.
    """

    steps: jax.Array
    solution: PyTree
    info: NaturalGradientInfo


def natural_gradient(
    objective: Objective,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float = 1e-3,
    max_divergence: float | None = None,
    max_iterations: int = 20,
    tolerance: float = 1e-4,
    warm_start: float = 0.0,
    curvature: Callable[..., LinearMap] = fisher,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent, delta = -alpha (F + lambda I)^{-1} g, solved by conjugate gradients.

    With ``max_divergence`` the step is shortened where needed so that 1/2 delta^T F delta, the divergence KL(p_new ||
    p_old) of the predictions to second order, stays within it: alpha is multiplied by min(1, sqrt(2 c / delta^T F
    delta)). Martens 2016 (section 5.5) finds an adapted damping far better than rescaling the undamped step;
    ``hessian_free`` has that.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=``, the third result of
    ``objective.value_and_grad``, or ``batch=``, and optionally ``curvature_at=``, a point on another batch for F.
    Inside ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts on the leaves it is given. Under
    ``optax.MultiSteps`` the gradient is the mean over the mini-batches and F that of the last one. A step in which
    anything is not finite is skipped and counted.

    Args:
        objective: The objective.
        learning_rate: alpha, a number or a schedule of the step.
        damping: lambda, above 0.
        max_divergence: The bound c on the divergence of a step, or None.
        max_iterations: The cap on conjugate gradient steps.
        tolerance: The relative residual to stop at.
        warm_start: The solve starts from this times the last solution; above 0 only where F changes little.
        curvature: What makes F from (objective, at=...): ``curvax.fisher``, or ``curvax.ggn``.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.natural_gradient(objective, damping=1e-9)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Amari 1998; Martens 2016, sections 5.3 and 5.5.
    """

    def finished(solution, matrix, steps):
        rate = jnp.asarray(learning_rate(steps) if callable(learning_rate) else learning_rate)
        step = trees.scale(-rate, solution)
        if max_divergence is None:
            return step, None
        divergence = matrix.quadratic(step) / 2
        limit = jnp.asarray(max_divergence, divergence.dtype)
        within = divergence <= limit
        factor = jnp.where(within, 1, jnp.sqrt(limit / jnp.where(within, 1, divergence)))
        return trees.scale(factor, step), factor**2 * divergence

    solve = (damping, max_iterations, tolerance, warm_start, curvature)
    return _transformation("natural_gradient", objective, *solve, finished)


def scale_by_natural_gradient(
    objective: Objective,
    *,
    damping: float = 1e-3,
    max_iterations: int = 20,
    tolerance: float = 1e-4,
    warm_start: float = 0.0,
    curvature: Callable[..., LinearMap] = fisher,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (F + lambda I)^{-1}, by conjugate gradients.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate, momentum or a line search
    behind it: ``optax.chain(curvax.scale_by_natural_gradient(objective), optax.scale_by_learning_rate(0.1))``.
    Schedule the damping with ``optax.inject_hyperparams``, naming the other arguments in ``static_args``. ``update``
    takes the same arguments as that of ``curvax.natural_gradient``.

    Args:
        objective: The objective.
        damping: lambda, above 0.
        max_iterations: The cap on conjugate gradient steps.
        tolerance: The relative residual to stop at.
        warm_start: The solve starts from this times the last solution; above 0 only where F changes little.
        curvature: What makes F from (objective, at=...): ``curvax.fisher``, or ``curvax.ggn``.

    Returns:
        The transformation. ``state.info`` holds the figures of the solve.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_natural_gradient(objective, damping=0.5)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> tx.update(jnp.ones((2, 1)), tx.init(w), w, batch=batch)[0]
        Array([[1.],
               [1.]], dtype=float...)

    Source: Amari 1998; Martens 2016, section 5.2.
    """
    solve = (damping, max_iterations, tolerance, warm_start, curvature)
    return _transformation("scale_by_natural_gradient", objective, *solve, lambda solution, *_: (solution, None))


def _transformation(name, objective, damping, max_iterations, tolerance, warm_start, curvature, finished):
    """The transformation whose updates are ``finished(solution, F, step)``, with the divergence if it is known."""

    def init(params: PyTree) -> NaturalGradientState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        whole = dict.fromkeys(("cg_iterations", "cg_reason", "skipped_steps"), jnp.int32)
        info = empty_info(NaturalGradientInfo, dtype, **whole)
        return NaturalGradientState(jnp.zeros((), jnp.int32), trees.zeros_like(params), info)

    def update(
        updates: PyTree,
        state: NaturalGradientState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        curvature_at: CurvaturePoint | None = None,
        **extra: Any,
    ) -> tuple[PyTree, NaturalGradientState]:
        del extra
        at = point_for_update(name, objective, updates, params, at, batch)
        local = at if curvature_at is None else curvature_at
        dtype = state.info.residual.dtype
        strength = jnp.asarray(damping).astype(dtype)
        matrix = curvature(local.objective, at=local).restrict(updates)

        result = solvers.cg(
            lambda v: trees.add_scaled(matrix(v), strength, v),
            updates,
            x0=trees.scale(warm_start, state.solution),
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        moved, divergence = finished(result.value, matrix, state.steps)

        gradient_norm = trees.norm(updates).astype(dtype)
        info = NaturalGradientInfo(
            damping=strength,
            cg_iterations=result.iterations.astype(jnp.int32),
            cg_reason=result.reason.astype(jnp.int32),
            residual=result.residual_norm.astype(dtype) / jnp.where(gradient_norm > 0, gradient_norm, 1),
            divergence=jnp.zeros((), dtype) if divergence is None else divergence.astype(dtype),
            gradient_norm=gradient_norm,
            update_norm=trees.norm(moved).astype(dtype),
            skipped_steps=state.info.skipped_steps,
        )
        # A matrix that is not finite ends the solve at its start, which is finite: the reason tells.
        finite = trees.all_finite(updates, moved) & (result.reason != solvers.StopReason.NON_FINITE)
        return finish(finite, moved, NaturalGradientState(next_count(state.steps), result.value, info), state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
