"""Newton's method with a trust region: truncated conjugate gradients on the exact Hessian, negative curvature used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.rules import RadiusRule
from curvax.matrices.curvature import hessian
from curvax.matrices.linear_map import LinearMap
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count

PyTree = Any


class NewtonCGInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        loss: h(theta) before the step.
        new_loss: h(theta + delta), whether the step was taken or not.
        predicted_change: M(delta) - M(0).
        step_ratio: rho, the actual over the predicted change; -inf where the step failed.
        radius: r that the step was computed with.
        cg_iterations: Steps of conjugate gradients.
        cg_reason: Why they stopped, a ``curvax.solvers.StopReason``.
        negative_curvature: Whether the step ends along a direction of negative curvature.
        gradient_norm: The norm of the incoming gradient.
        update_norm: The norm of delta.
        accepted: Whether the step was taken.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    loss: jax.Array
    new_loss: jax.Array
    predicted_change: jax.Array
    step_ratio: jax.Array
    radius: jax.Array
    cg_iterations: jax.Array
    cg_reason: jax.Array
    negative_curvature: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    accepted: jax.Array
    skipped_steps: jax.Array


class NewtonCGState(NamedTuple):
    """State of ``newton_cg``.

    Attributes:
        steps: Steps so far.
        radius: r for the next step.
        first_gradient_norm: The norm of the first gradient, which the accuracy of the solves is measured against.
        info: Figures of the last step.
    """

    steps: jax.Array
    radius: jax.Array
    first_gradient_norm: jax.Array
    info: NewtonCGInfo


def newton_cg(
    objective: Objective,
    *,
    initial_radius: float = 1.0,
    rule: RadiusRule | None = None,
    max_iterations: int = 50,
    tolerance: float = 0.5,
    acceptance: float = 1e-4,
    curvature: Callable[..., LinearMap] = hessian,
) -> optax.GradientTransformationExtraArgs:
    r"""Trust-region Newton: delta minimises g^T delta + 1/2 delta^T H delta in ||delta|| <= r, by Steihaug's method.

    Conjugate gradients run until the residual is below min(tolerance, sqrt(||g|| / ||g_0||)) of the gradient, which
    makes the last steps converge faster than linearly, or until they reach the edge of the region or a direction of
    negative curvature, which they follow to the edge: a saddle point is left along the direction that shows it. A step
    whose reduction ratio rho is not above ``acceptance`` is not taken and shrinks r.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=``, the third result of
    ``objective.value_and_grad``, or ``batch=``, and optionally ``curvature_at=``, a point on another batch for the
    products and the reduction ratio. Inside ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts on the
    leaves it is given. Under ``optax.MultiSteps`` the gradient is the mean over the mini-batches and the Hessian that
    of the last one. A step in which anything is not finite is skipped and counted.

    Args:
        objective: The objective.
        initial_radius: r_0.
        rule: How r adapts; by default doubled above rho = 3/4 for steps to the edge, halved below 1/10.
        max_iterations: The cap on conjugate gradient steps.
        tolerance: The loosest relative residual to stop at.
        acceptance: The least rho of a step that is taken.
        curvature: What makes the matrix from (objective, at=...); ``curvax.hessian``.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> loss = curvax.losses.from_function(lambda z, y: z**4 / 4 - z**2 / 2, convex=False)     # minima at -1, 1
        >>> objective = curvax.Objective(lambda w, x: x * w, loss)
        >>> tx = curvax.newton_cg(objective)
        >>> w, batch = jnp.array(1e-3), (jnp.ones(1), jnp.zeros(1))                                # next to a maximum
        >>> state = tx.init(w)
        >>> for _ in range(8):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     w = optax.apply_updates(w, updates)
        >>> print(f"{w:.4f}")
        1.0000

    Source: Steihaug 1983; Nocedal and Wright 2006, algorithm 7.2.
    """
    rule = RadiusRule() if rule is None else rule

    def init(params: PyTree) -> NewtonCGState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        whole = dict.fromkeys(("cg_iterations", "cg_reason", "skipped_steps"), jnp.int32)
        flags = dict.fromkeys(("negative_curvature", "accepted"), jnp.bool_)
        return NewtonCGState(
            steps=jnp.zeros((), jnp.int32),
            radius=jnp.full((), initial_radius, dtype),
            first_gradient_norm=jnp.zeros((), dtype),
            info=empty_info(NewtonCGInfo, dtype, **whole, **flags),
        )

    def update(
        updates: PyTree,
        state: NewtonCGState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        curvature_at: CurvaturePoint | None = None,
        **extra: Any,
    ) -> tuple[PyTree, NewtonCGState]:
        del extra
        at = point_for_update("newton_cg", objective, updates, params, at, batch)
        local = at if curvature_at is None else curvature_at
        dtype = state.radius.dtype
        matrix = curvature(local.objective, at=local).restrict(updates)
        gradient_norm = trees.norm(updates).astype(dtype)
        first_norm = jnp.where(state.steps == 0, gradient_norm, state.first_gradient_norm)

        result = solvers.steihaug(
            matrix,
            trees.scale(-1.0, updates),
            radius=state.radius,
            max_iterations=max_iterations,
            tolerance=jnp.minimum(tolerance, jnp.sqrt(gradient_norm / jnp.where(first_norm > 0, first_norm, 1))),
        )
        delta = result.value
        loss = local.loss.astype(dtype)
        new_loss = local.loss_at(trees.add(local.params, trees.embed(delta, local.params))).astype(dtype)
        predicted = result.model_value.astype(dtype)
        ratio = reduction_ratio(loss, new_loss, predicted).astype(dtype)
        accepted = ratio > acceptance

        steps = next_count(state.steps)
        info = NewtonCGInfo(
            loss=loss,
            new_loss=new_loss,
            predicted_change=predicted,
            step_ratio=ratio,
            radius=state.radius,
            cg_iterations=result.iterations.astype(jnp.int32),
            cg_reason=result.reason.astype(jnp.int32),
            negative_curvature=result.negative_curvature,
            gradient_norm=gradient_norm,
            update_norm=result.norm.astype(dtype),
            accepted=accepted,
            skipped_steps=state.info.skipped_steps,
        )
        radius = rule(state.radius, ratio, result.norm.astype(dtype))
        finite = trees.all_finite(loss, updates, predicted) & (result.reason != solvers.StopReason.NON_FINITE)
        moved = trees.where(accepted, delta, trees.zeros_like(delta))
        return finish(finite, moved, NewtonCGState(steps, radius, first_norm, info), state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
