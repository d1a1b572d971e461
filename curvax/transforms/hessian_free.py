"""Hessian-free optimisation: truncated Gauss-Newton steps by conjugate gradients (Martens 2010; 2016, chapter 4)."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.matrices import Damping, tikhonov
from curvax.damping.rules import DampingRule
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal
from curvax.layers.factors import factors_of, mean_curvature
from curvax.layers.find import Layers
from curvax.layers.inverses import kronecker_preconditioner
from curvax.layers.taps import tap
from curvax.matrices.curvature import Curvature, Fisher, GaussNewton, check_curvature
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.transforms._step import Given, Step, check_arguments, static_count, stepper

RECIPE_A = MappingProxyType({"max_iterations": 250, "choice": "walk"})
"""Martens 2010: long runs that stop by relative progress, then CG-backtracking; a large gradient batch."""

RECIPE_B = MappingProxyType(
    {"max_iterations": 250, "stop": "lookback", "choice": "best", "warm_start_from": "best", "stop_period": 2}
)
"""Runs stop once the loss on the curvature batch is worse than ten steps ago; the iterate best on ``held_out_at=`` is
the step, the one best on the curvature batch the next warm start."""

RECIPE_C = MappingProxyType({"max_iterations": 30, "choice": "last"})
"""Closest to momentum: short runs on small batches, the same for gradient and curvature; tune ``warm_start``."""


def hessian_free(
    *,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    damping_matrix: Damping | None = None,
    warm_start: optax.ScalarOrSchedule = 0.95,
    warm_start_from: Literal["last", "best"] = "last",
    preconditioner: Literal["diagonal", "kronecker"] = "diagonal",
    preconditioner_exponent: optax.ScalarOrSchedule | None = 0.75,
    max_iterations: int | None = None,
    progress_tolerance: optax.ScalarOrSchedule = 5e-4,
    stop: Literal["progress", "lookback", "reduction"] = "progress",
    stop_period: int | None = None,
    choice: Literal["walk", "best", "last"] = "walk",
    sufficient_decrease: optax.ScalarOrSchedule = 1e-2,
    curvature: Curvature | None = None,
    layers: Layers | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimisation: (G + lambda D) delta = -g solved inexactly by preconditioned conjugate gradients.

    One step, as in Martens 2016, algorithm 3: conjugate gradients start from ``warm_start`` times where the last run
    ended and stop by relative progress (eq. 4.2), by a further rule of your choice or at the cap; one of the iterates
    kept on the way is chosen by the loss itself; lambda adapts by the reduction ratio; a backtracking line search has
    the last word. The preconditioner is (diag(G + lambda D))^0.75 with the diagonal from one pull back (Chapelle and
    Erhan 2011). Three settings are Martens's recipes of section 4.11:

    - ``hessian_free(**curvax.transforms.RECIPE_A)``: 250 iterations, CG-backtracking (Martens 2010).
    - ``RECIPE_B``: stop when the loss on the curvature batch turns; choose on ``held_out_at=``; warm start from the
      best.
    - ``RECIPE_C``: 30 iterations on small batches, the last iterate taken: the closest to momentum.

    ``update`` takes ``at=``, and optionally ``curvature_at=``, a point on another, usually smaller batch for the
    products and the reduction ratio, and ``held_out_at=``, a point on a batch on which the choice among iterates and
    the line search judge the loss (they take the curvature batch otherwise).

    With an indefinite matrix (``curvature=curvax.Hessian()``) a run ends at the first direction of negative curvature,
    and the damping grows; ``curvax.newton_cg`` makes use of such a direction.

    Args:
        rule: How lambda adapts; by default times 2/3 above rho = 3/4 and times 3/2 below 1/4.
        damping_matrix: D: ``curvax.damping.tikhonov()`` by default, ``scale_sensitive()`` or ``structural(...)``.
        warm_start: zeta, in [0, 1], a number or a schedule.
        warm_start_from: Start from the "last" iterate of the last run or from the "best" on its curvature batch.
        preconditioner: "diagonal", or "kronecker" for the inverse of Kronecker factors of the curvature batch, which
            needs ``layers``: fewer iterations, for the inverses of all factors once a step.
        preconditioner_exponent: xi of the diagonal one, 0.75 in Martens 2010; None for no preconditioner.
        max_iterations: The cap on conjugate gradient steps, 50 if None; 50 to 250 in recipe A, 25 to 50 in recipe C.
        progress_tolerance: The threshold of eq. 4.2.
        stop: A further rule that looks at the loss on the curvature batch: "lookback" stops once it is worse than ten
            iterates ago, "reduction" once the reduction is below 90 per cent of the largest seen (section 4.13).
        stop_period: That rule looks at every iterate of this period, 5 if None.
        choice: "walk" goes back from the last kept iterate as long as the loss falls, "best" takes the best of all that
            are kept, "last" takes the last.
        sufficient_decrease: c of the line search.
        curvature: ``curvax.GaussNewton()`` by default, or ``curvax.Fisher()``.
        layers: From ``curvax.find_layers``: the preconditioner's diagonal then squares the gradients of single
            examples, which varies much less. It is for losses whose cases are examples.
        seed: Seed of the preconditioner's noise, and of what ``curvature`` draws.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures: losses,
        ratio and ``update_norm`` are of delta before the line search, whose factor is ``step_size``, 0 if it found
        none; ``chosen_iteration`` in ``extra`` is the iterate that was chosen.

    Raises:
        ValueError: ``stop``, ``choice`` or ``warm_start_from`` is none of those named.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.hessian_free(initial_damping=1e-8, progress_tolerance=0.0)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = jax.jit(tx.update)(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)
    """
    check_arguments(hessian_free, locals())
    rule = DampingRule() if rule is None else rule
    damping_matrix = tikhonov() if damping_matrix is None else damping_matrix
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("hessian_free", curvature)
    choose = _named("choice", choice, _CHOICES)
    make_monitor = _named("stop", stop, _MONITORS)
    _named("warm_start_from", warm_start_from, {"last": 0, "best": 0})

    if _named("preconditioner", preconditioner, {"diagonal": False, "kronecker": True}):
        if layers is None:
            raise ValueError("hessian_free: preconditioner='kronecker' needs layers=curvax.find_layers(...)")
        precondition = functools.partial(_kronecker_preconditioner, layers=layers)
    else:
        precondition = functools.partial(_diagonal_preconditioner, exponent=preconditioner_exponent, layers=layers)

    def step(given: Given) -> Step:
        local, held_out, dtype = given.curvature_at, given.held_out_at, given.dtype
        count = static_count("hessian_free", "max_iterations", max_iterations, 50)
        matrix_key, preconditioner_key = jax.random.split(given.key)
        matrix = curvature.at(local, matrix_key).restrict(given.gradient)
        damped = damping_matrix.matrix(local, curvature, given.strength, matrix_key)
        loss = local.loss.astype(dtype)

        def local_loss(delta):
            return local.loss_along(delta).astype(dtype)

        def judged_loss(delta):
            return local_loss(delta) if held_out is None else held_out.loss_along(delta).astype(dtype)

        result = solvers.cg(
            damped.restrict(given.gradient),
            trees.scale(-1.0, given.gradient),
            x0=trees.scale(given.number(warm_start), given.memory),
            preconditioner=precondition(damped, preconditioner_key, given),
            max_iterations=count,
            tolerance=float(jnp.finfo(dtype).eps),
            progress_tolerance=given.number(progress_tolerance),
            store_at=solvers.geometric_iterations(count),
            monitor=make_monitor(local_loss, loss, static_count("hessian_free", "stop_period", stop_period, 5)),
        )
        assert result.stored is not None
        chosen = choose(result.stored, judged_loss)
        delta = chosen.value
        best = solvers.best_stored(result.stored, local_loss) if warm_start_from == "best" else result

        if held_out is None:  # the losses that judge the step are those of the curvature batch, and known
            new_loss, judged = chosen.objective, loss
        else:
            new_loss, judged = local_loss(delta), held_out.loss.astype(dtype)
        gradient = given.gradient
        if local is not given.at:
            gradient = trees.extract(local.value_and_gradient()[1], gradient)
        slope = trees.vdot(gradient, delta)
        predicted = (slope + matrix.quadratic(delta).astype(slope.dtype) / 2).astype(dtype)
        # A matrix that is not positive definite needs more damping, however well the part of the step fared.
        indefinite = result.reason == solvers.StopReason.NEGATIVE_CURVATURE
        ratio = jnp.where(indefinite, -jnp.inf, reduction_ratio(loss, new_loss, predicted).astype(dtype))
        # An ascent direction (possible from a warm start that was cut short) is not followed.
        search = solvers.backtracking_line_search(
            lambda step_size: judged_loss(trees.scale(step_size, delta)),
            judged,
            trees.vdot(given.gradient, delta).astype(dtype),
            sufficient_decrease=given.number(sufficient_decrease),
            shrink=0.8,
            max_tries=60,
            first=chosen.objective,
        )
        step_size = jnp.where(search.found, search.step_size, 0)
        figures = {
            "loss": loss,
            "new_loss": new_loss,
            "predicted_change": predicted,
            "step_ratio": ratio,
            "damping": given.strength,
            "step_size": step_size,
            "inner_iterations": result.iterations,
            "reason": result.reason,
            "update_norm": trees.norm(delta),
            "chosen_iteration": chosen.iteration,
        }
        return Step(
            trees.scale(step_size, delta),
            figures,
            memory=best.value,
            strength=rule.adapt(given.strength, ratio, count=given.steps + 1),
            accepted=search.found,
            finite=trees.all_finite(loss, delta, predicted),
        )

    return stepper(
        "hessian_free",
        step,
        start=trees.zeros_like,  # the iterate that the next run of conjugate gradients starts from
        strength=initial_damping,
        seed=seed,
        extra={"chosen_iteration": jnp.int32},
        points=("at", "curvature_at", "held_out_at"),
    )


def _kronecker_preconditioner(damped, key, given, *, layers):
    """F^{-1} by the factors of the curvature batch, with the damping of the step."""
    del damped
    own, point = layers.restricted(trees.leaf_paths(given.gradient)), given.curvature_at
    # Of a point in chunks a part of the size of one.
    part = point if point.chunk_size is None else point.subset(-(-point.num_examples(0) // point.chunk_size))
    factors = factors_of(tap(own, part), key, Fisher(num_samples=1), "expand", ())
    # A damping within the rounding of the factors would not keep them definite.
    least = 1e-5 * mean_curvature(own, factors).astype(given.dtype)
    solve = kronecker_preconditioner(own, factors, damping=jnp.maximum(given.strength, least))
    return lambda v: trees.extract(solve(trees.embed(v, point.params)), v)


def _diagonal_preconditioner(damped, key, given, *, exponent, layers):
    """(diag(G + lambda D))^xi: the estimate takes the penalty's and a diagonal damping's part exactly."""
    if exponent is None:
        return None
    diagonal = trees.extract(chapelle_erhan_diagonal(damped, key, layers=layers), given.gradient)
    return solvers.diagonal_preconditioner(diagonal, exponent=given.number(exponent))


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
