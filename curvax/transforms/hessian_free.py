"""Hessian-free optimisation: truncated Gauss-Newton steps by conjugate gradients (Martens 2010; 2016, chapter 4)."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.matrices import Damping, tikhonov
from curvax.damping.rules import DampingRule
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal
from curvax.layers.find import Layers
from curvax.matrices.curvature import ggn
from curvax.matrices.linear_map import LinearMap
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count, step_key

PyTree = Any

RECIPE_A = MappingProxyType({"max_iterations": 250, "choice": "walk"})
"""Martens 2010: long runs that stop by relative progress, then CG-backtracking; a large gradient batch."""

RECIPE_B = MappingProxyType(
    {"max_iterations": 250, "stop": "lookback", "choice": "best", "warm_start_from": "best", "stop_period": 2}
)
"""Runs stop once the loss on the curvature batch is worse than ten steps ago; the iterate best on ``held_out=`` is the
step, the one best on the curvature batch the next warm start."""

RECIPE_C = MappingProxyType({"max_iterations": 30, "choice": "last"})
"""Closest to momentum: short runs on small batches, the same for gradient and curvature; tune ``warm_start``."""


class HessianFreeInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        loss: h(theta) on the curvature batch.
        new_loss: h(theta + delta) there, before the line search.
        predicted_change: M(delta) - M(0) of the undamped model there.
        step_ratio: rho, the actual over the predicted change; -inf where the step failed or curvature was negative.
        damping: lambda that the step was computed with.
        cg_iterations: Steps of conjugate gradients.
        cg_reason: Why they stopped, a ``curvax.solvers.StopReason``.
        chosen_iteration: The iterate that was chosen.
        step_size: The factor alpha that the line search found, 0 if it found none.
        gradient_norm: The norm of the incoming gradient.
        update_norm: The norm of delta before the line search.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    loss: jax.Array
    new_loss: jax.Array
    predicted_change: jax.Array
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
        direction: The iterate of the last run of conjugate gradients that the next run starts from.
        key: Raw data of the PRNG key of preconditioner and damping.
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
    damping: Damping | None = None,
    warm_start: float = 0.95,
    warm_start_from: Literal["last", "best"] = "last",
    preconditioner_exponent: float | None = 0.75,
    max_iterations: int = 50,
    progress_tolerance: float = 5e-4,
    stop: Literal["progress", "lookback", "reduction"] = "progress",
    stop_period: int = 5,
    choice: Literal["walk", "best", "last"] = "walk",
    sufficient_decrease: float = 1e-2,
    curvature: Callable[..., LinearMap] = ggn,
    layers: Layers | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimisation: (G + lambda D) delta = -g solved inexactly by preconditioned conjugate gradients.

    One step, as in Martens 2016, algorithm 3: conjugate gradients start from ``warm_start`` times where the last run
    ended and stop by relative progress (eq. 4.2), by a further rule of your choice or at the cap; one of the iterates
    kept on the way is chosen by the loss itself; lambda adapts by the reduction ratio; a backtracking line search has
    the last word. The preconditioner is (diag(G + lambda D))^0.75 with the diagonal from one pull back (Chapelle and
    Erhan 2011). Three settings are Martens's recipes of section 4.11:

    - ``hessian_free(objective, **curvax.transforms.RECIPE_A)``: 250 iterations, CG-backtracking (Martens 2010).
    - ``RECIPE_B``: stop when the loss on the curvature batch turns; choose on ``held_out=``; warm start from the best.
    - ``RECIPE_C``: 30 iterations on small batches, the last iterate taken: the closest to momentum.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=`` (the third result of
    ``objective.value_and_grad``) or ``batch=`` for the gradient's batch, and optionally ``curvature_at=``, a point
    linearised on another, usually smaller batch for the products and the reduction ratio, and ``held_out=``, a batch on
    which the choice among iterates and the line search judge the loss (they take the curvature batch otherwise). Inside
    ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts on the leaves it is given. Under
    ``optax.MultiSteps`` the gradient is the mean over the mini-batches and everything else is of the last one. A step
    in which anything is not finite is skipped and counted: updates are zero and the state stays.

    With an indefinite matrix (``curvature=curvax.hessian``) a run ends at the first direction of negative curvature,
    and the damping grows; ``curvax.newton_cg`` makes use of such a direction.

    Args:
        objective: The objective.
        initial_damping: lambda_0.
        rule: How lambda adapts; by default times 2/3 above rho = 3/4 and times 3/2 below 1/4.
        damping: D: ``curvax.damping.tikhonov()`` by default, ``scale_sensitive()`` or ``structural(...)``.
        warm_start: zeta, in [0, 1].
        warm_start_from: Start from the "last" iterate of the last run or from the "best" on its curvature batch.
        preconditioner_exponent: xi, 0.75 in Martens 2010; None for no preconditioner.
        max_iterations: The cap on conjugate gradient steps; 50 to 250 in recipe A, 25 to 50 in recipe C.
        progress_tolerance: The threshold of eq. 4.2.
        stop: A further rule that looks at the loss on the curvature batch: "lookback" stops once it is worse than ten
            iterates ago, "reduction" once the reduction is below 90 per cent of the largest seen (section 4.13).
        stop_period: That rule looks at every iterate of this period.
        choice: "walk" goes back from the last kept iterate as long as the loss falls, "best" takes the best of all that
            are kept, "last" takes the last.
        sufficient_decrease: c of the line search.
        curvature: What makes the matrix from (objective, at=...): ``curvax.ggn`` or ``curvax.fisher``.
        layers: From ``curvax.find_layers``: the preconditioner's diagonal then squares the gradients of single
            examples, which varies much less. It is for losses whose cases are examples.
        seed: Seed of the preconditioner's noise.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``stop``, ``choice`` or ``warm_start_from`` is none of those named; ``update`` got neither or both
            of ``at=`` and ``batch=``, or updates that are not the parameters'.

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
    damp = tikhonov() if damping is None else damping
    choose = _named("choice", choice, _CHOICES)
    make_monitor = _named("stop", stop, _MONITORS)
    _named("warm_start_from", warm_start_from, {"last": 0, "best": 0})

    def init(params: PyTree) -> HessianFreeState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        whole = dict.fromkeys(("cg_iterations", "cg_reason", "chosen_iteration", "skipped_steps"), jnp.int32)
        return HessianFreeState(
            steps=jnp.zeros((), jnp.int32),
            damping=jnp.full((), initial_damping, dtype),
            direction=trees.zeros_like(params),
            key=jax.random.key_data(jax.random.key(seed)),
            info=empty_info(HessianFreeInfo, dtype, **whole),
        )

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
        loss = local.loss.astype(dtype)
        damping_key, preconditioner_key = jax.random.split(step_key(state.key, state.steps))
        damped = damp(local, curvature, state.damping, damping_key)
        matrix = curvature(local.objective, at=local).restrict(updates)

        def local_loss(delta):
            return local.loss_at(_moved(local, delta)).astype(dtype)

        def judged_loss(delta):
            return local_loss(delta) if held_out is None else objective(_moved(local, delta), held_out).astype(dtype)

        result = solvers.cg(
            damped.restrict(updates),
            trees.scale(-1.0, updates),
            x0=trees.scale(warm_start, state.direction),
            preconditioner=_preconditioner(damped, preconditioner_key, updates, preconditioner_exponent, layers),
            max_iterations=max_iterations,
            tolerance=float(jnp.finfo(dtype).eps),
            progress_tolerance=progress_tolerance,
            store_at=solvers.geometric_iterations(max_iterations),
            monitor=make_monitor(local_loss, loss, stop_period),
        )
        assert result.stored is not None
        chosen = choose(result.stored, judged_loss)
        delta = chosen.value
        best = solvers.best_stored(result.stored, local_loss) if warm_start_from == "best" else result

        if held_out is None:  # the losses that judge the step are those of the curvature batch, and known
            new_loss, judged = chosen.objective, loss
        else:
            new_loss, judged = local_loss(delta), judged_loss(trees.zeros_like(delta))
        gradient = updates if curvature_at is None else trees.extract(local.value_and_gradient()[1], updates)
        slope = trees.vdot(gradient, delta)
        predicted = (slope + matrix.quadratic(delta).astype(slope.dtype) / 2).astype(dtype)
        # A matrix that is not positive definite needs more damping, however well the part of the step fared.
        indefinite = result.reason == solvers.StopReason.NEGATIVE_CURVATURE
        ratio = jnp.where(indefinite, -jnp.inf, reduction_ratio(loss, new_loss, predicted).astype(dtype))
        step_size = _backtracking_line_search(
            lambda step_size: judged_loss(trees.scale(step_size, delta)),
            judged,
            chosen.objective,
            trees.vdot(updates, delta).astype(dtype),
            sufficient_decrease,
        )

        steps = next_count(state.steps)
        info = HessianFreeInfo(
            loss=loss,
            new_loss=new_loss,
            predicted_change=predicted,
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
        taken = HessianFreeState(steps, rule(state.damping, ratio, steps), best.value, state.key, info)
        finite = trees.all_finite(loss, updates, delta, predicted)
        return finish(finite, trees.scale(step_size, delta), taken, state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _preconditioner(damped, key, updates, exponent, layers):
    """(diag(G + lambda D))^xi: the estimate takes the penalty's and a diagonal damping's part exactly."""
    if exponent is None:
        return None
    diagonal = trees.extract(chapelle_erhan_diagonal(damped, key, layers=layers), updates)
    return solvers.diagonal_preconditioner(diagonal, exponent=exponent)


def _moved(point, delta):
    return trees.add(point.params, trees.embed(delta, point.params))


_CHOICES = {"walk": solvers.backtrack, "best": solvers.best_stored, "last": solvers.last_stored}

_MONITORS = {
    "progress": lambda loss_at, loss, period: None,
    "lookback": lambda loss_at, loss, period: solvers.lookback_monitor(loss_at, loss, period=period),
    "reduction": lambda loss_at, loss, period: solvers.reduction_monitor(loss_at, loss, period=period),
}


def _named(argument, name, table):
    if name not in table:
        raise ValueError(f"hessian_free: {argument} must be one of {', '.join(map(repr, table))}, got {name!r}")
    return table[name]


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
