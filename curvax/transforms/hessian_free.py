"""Hessian-free optimisation: truncated Gauss-Newton steps by conjugate gradients (Martens 2010; 2016, chapter 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import products, solvers, trees
from curvax.curvature_point import CurvaturePoint
from curvax.damping import DampingRule
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal
from curvax.linear_map import LinearMap
from curvax.objective import Objective
from curvax.quadratic_model import reduction_ratio
from curvax.transforms._point import point_for_update

PyTree = Any


class HessianFreeInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        loss: h(theta) on the curvature batch.
        new_loss: h(theta + delta) there, before the line search.
        step_ratio: rho, the actual over the predicted change; -inf where the step failed.
        damping: lambda that the step was computed with.
        cg_iterations: Steps of conjugate gradients.
        cg_reason: Why they stopped, a ``curvax.solvers.StopReason``.
        chosen_iteration: The iterate that CG-backtracking chose.
        step_size: The factor alpha that the line search found, 0 if it found none.
        gradient_norm: The norm of the incoming gradient.
        update_norm: The norm of delta before the line search.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    loss: jax.Array
    new_loss: jax.Array
    step_ratio: jax.Array
    damping: jax.Array
    cg_iterations: jax.Array
    cg_reason: jax.Array
    chosen_iteration: jax.Array
    step_size: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    skipped_steps: jax.Array


class HessianFreeState(NamedTuple):
    """State of ``hessian_free``.

    Attributes:
        steps: Steps so far.
        damping: lambda for the next step.
        direction: The last iterate of the last run of conjugate gradients, where the next run starts from.
        key: Raw data of the PRNG key of the preconditioner.
        info: Figures of the last step.
    """

    steps: jax.Array
    damping: jax.Array
    direction: PyTree
    key: jax.Array
    info: HessianFreeInfo


def hessian_free(
    objective: Objective,
    *,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    warm_start: float = 0.95,
    preconditioner_exponent: float | None = 0.75,
    max_iterations: int = 50,
    progress_tolerance: float = 5e-4,
    sufficient_decrease: float = 1e-2,
    curvature: Callable[..., LinearMap] = products.ggn,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimisation: (G + lambda I) delta = -g solved inexactly by preconditioned conjugate gradients.

    One step, as in Martens 2016, algorithm 3 with recipe A: conjugate gradients start from ``warm_start`` times where
    the last run ended and stop by relative progress (eq. 4.2) or the cap; among iterates kept on the way, the walk back
    from the last takes the one at which the loss itself is best; lambda adapts by the reduction ratio; a backtracking
    line search has the last word. The preconditioner is (diag(G) + lambda)^0.75 with the diagonal from one pull back
    (Chapelle and Erhan 2011).

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=`` (the third result of
    ``objective.value_and_grad``) or ``batch=`` for the gradient's batch, and optionally ``curvature_at=``, a point
    linearised on another, usually smaller batch for the products and the reduction ratio, and ``held_out=``, a batch on
    which CG-backtracking and line search judge the loss (they take the curvature batch otherwise). Inside
    ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts on the leaves it is given. Under
    ``optax.MultiSteps`` the gradient is the mean over the mini-batches and everything else is of the last one. A step
    in which anything is not finite is skipped and counted: updates are zero and the state stays.

    Args:
        objective: The objective.
        initial_damping: lambda_0.
        rule: How lambda adapts; by default times 2/3 above rho = 3/4 and times 3/2 below 1/4.
        warm_start: zeta, in [0, 1].
        preconditioner_exponent: xi, 0.75 in Martens 2010; None for no preconditioner.
        max_iterations: The cap on conjugate gradient steps; 50 to 250 in recipe A, 25 to 50 in recipe C.
        progress_tolerance: The threshold of eq. 4.2.
        sufficient_decrease: c of the line search.
        curvature: What makes the matrix from (objective, at=...): ``curvax.ggn`` or ``curvax.fisher``.
        seed: Seed of the preconditioner's noise.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.hessian_free(objective, initial_damping=1e-8, progress_tolerance=0.0)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)
    """
    rule = DampingRule() if rule is None else rule

    def init(params: PyTree) -> HessianFreeState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))

        def zero(dtype=dtype):  # a buffer of its own for every leaf, so that the state can be donated
            return jnp.zeros((), dtype)

        damping = jnp.full((), initial_damping, dtype)
        info = HessianFreeInfo(
            loss=zero(),
            new_loss=zero(),
            step_ratio=zero(),
            damping=damping + 0,
            cg_iterations=zero(jnp.int32),
            cg_reason=zero(jnp.int32),
            chosen_iteration=zero(jnp.int32),
            step_size=zero(),
            gradient_norm=zero(),
            update_norm=zero(),
            skipped_steps=zero(jnp.int32),
        )
        key = jax.random.key_data(jax.random.key(seed))
        return HessianFreeState(zero(jnp.int32), damping, trees.zeros_like(params), key, info)

    def update(
        updates: PyTree,
        state: HessianFreeState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        curvature_at: CurvaturePoint | None = None,
        held_out: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, HessianFreeState]:
        del extra
        at = point_for_update("hessian_free", objective, updates, params, at, batch)
        local = at if curvature_at is None else curvature_at
        dtype = state.damping.dtype
        whole_matrix = curvature(local.objective, at=local)
        matrix = whole_matrix.restrict(updates)

        def loss_at(delta):
            new_params = trees.add(local.params, trees.embed(delta, local.params))
            return (local.loss_at(new_params) if held_out is None else objective(new_params, held_out)).astype(dtype)

        def damped(v):
            return trees.add_scaled(matrix(v), state.damping, v)

        result = solvers.cg(
            damped,
            trees.scale(-1.0, updates),
            x0=trees.scale(warm_start, state.direction),
            preconditioner=preconditioner(state, whole_matrix, updates),
            max_iterations=max_iterations,
            tolerance=float(jnp.finfo(dtype).eps),
            progress_tolerance=progress_tolerance,
            store_at=solvers.geometric_iterations(max_iterations),
        )
        assert result.stored is not None
        chosen = solvers.backtrack(result.stored, loss_at)
        delta = chosen.value

        loss = local.loss.astype(dtype)
        if held_out is None:  # the losses that judge the step are those of the curvature batch, and known
            new_loss, judged = chosen.objective, loss
        else:
            new_loss = local.loss_at(trees.add(local.params, trees.embed(delta, local.params))).astype(dtype)
            judged = loss_at(trees.zeros_like(delta))
        gradient = updates if curvature_at is None else trees.extract(local.value_and_gradient()[1], updates)
        slope = trees.vdot(gradient, delta)
        predicted = slope + matrix.quadratic(delta).astype(slope.dtype) / 2
        ratio = reduction_ratio(loss, new_loss, predicted).astype(dtype)
        step_size = _backtracking_line_search(
            lambda step_size: loss_at(trees.scale(step_size, delta)),
            judged,
            chosen.objective,
            trees.vdot(updates, delta).astype(dtype),
            sufficient_decrease,
        )

        finite = trees.all_finite(loss, updates, delta, predicted)
        moved = trees.scale(step_size, delta)
        steps = jnp.asarray(optax.safe_increment(state.steps))
        info = HessianFreeInfo(
            loss=loss,
            new_loss=new_loss,
            step_ratio=ratio,
            damping=state.damping,
            cg_iterations=result.iterations.astype(jnp.int32),
            cg_reason=result.reason.astype(jnp.int32),
            chosen_iteration=chosen.iteration.astype(jnp.int32),
            step_size=step_size,
            gradient_norm=trees.norm(updates).astype(dtype),
            update_norm=trees.norm(delta).astype(dtype),
            skipped_steps=state.info.skipped_steps,
        )
        taken = HessianFreeState(steps, rule(state.damping, ratio, steps), result.value, state.key, info)
        skipped = state._replace(info=state.info._replace(skipped_steps=optax.safe_increment(state.info.skipped_steps)))
        return trees.where(finite, moved, trees.zeros_like(moved)), trees.where(finite, taken, skipped)

    def preconditioner(state, whole_matrix, updates):
        """(diag(G) + lambda)^xi: the estimate takes the penalty's part exactly."""
        if preconditioner_exponent is None:
            return None
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.steps)
        diagonal = trees.extract(chapelle_erhan_diagonal(whole_matrix, key), updates)
        diagonal = jax.tree.map(lambda d: d + state.damping.astype(d.dtype), diagonal)
        return solvers.diagonal_preconditioner(diagonal, exponent=preconditioner_exponent)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _backtracking_line_search(loss_at, start, first, slope, sufficient_decrease, shrink=0.8, most=60):
    """The first alpha of 1, shrink, shrink^2 ... with loss_at(alpha) <= start + c alpha g^T delta, else 0.

    ``start`` is the loss at alpha = 0 and ``first`` that at alpha = 1; both are known.
    """

    def sufficient(step_size, value):
        return value <= start + sufficient_decrease * step_size * slope

    def searching(carry):
        step_size, value, tries = carry
        return ~sufficient(step_size, value) & (tries < most)

    def shorten(carry):
        step_size, _, tries = carry
        step_size = jnp.asarray(shrink, step_size.dtype) * step_size
        return step_size, loss_at(step_size), tries + 1

    one = jnp.ones((), slope.dtype)
    step_size, value, _ = jax.lax.while_loop(searching, shorten, (one, first, jnp.zeros((), jnp.int32)))
    # An ascent direction (possible from a warm start that was cut short) is never followed, however little it rises.
    return jnp.where(sufficient(step_size, value) & (slope <= 0), step_size, 0)
