"""Hessian-free optimisation: truncated Gauss-Newton steps by conjugate gradients (Martens 2010; 2016, chapter 4)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.matrices import Damping, Tikhonov
from curvax.damping.rules import DampingRule, next_batch_rule
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal
from curvax.layers.factor_damping import mean_curvature
from curvax.layers.factors import factors_of
from curvax.layers.find import Layers, find_layers_at
from curvax.layers.inverses import kronecker_preconditioner
from curvax.layers.taps import tap
from curvax.matrices.curvature import Curvature, Fisher, GaussNewton, check_curvature
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.packing import packing_of
from curvax.transforms._arguments import check_arguments, static_count
from curvax.transforms._judge import JudgedBy, adapted_at_once, judging
from curvax.transforms._step import Given, Step, stepper

RECIPE_A = MappingProxyType({"max_iterations": 250, "choice": "walk", "progress_tolerance": 5e-3})
"""Martens 2010: long runs that stop by relative progress, then CG-backtracking; a large gradient batch. The tolerance
is that of the paper, 5e-4 for each iteration of the window of eq. 4.2, while that has its least length of ten."""

RECIPE_B = MappingProxyType(
    {
        "max_iterations": 250,
        "stop": "lookback",
        "choice": "best_held_out",
        "warm_start_from": "best",
        "stop_period": 2,
    }
)
"""Runs stop once the loss on the curvature batch is significantly worse than ten steps ago; the iterate best on
``held_out_at=``, which it demands, is the step, the one best on the curvature batch the next warm start."""

RECIPE_C = MappingProxyType({"max_iterations": 30, "choice": "last"})
"""Closest to momentum: short runs on small batches, the same for gradient and curvature; tune ``warm_start``, which
Martens raises towards the end, when he also takes larger batches and a lower learning rate
(``optax.chain(hessian_free(**RECIPE_C, judged_by="same_batch"), optax.scale_by_schedule(...))``)."""


def hessian_free(
    *,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    damping_matrix: Damping | None = None,
    warm_start: optax.ScalarOrSchedule = 0.95,
    warm_start_from: Literal["last", "best", "gradient"] = "last",
    preconditioner: Literal["diagonal", "kronecker"] = "diagonal",
    preconditioner_exponent: optax.ScalarOrSchedule | None = 0.75,
    preconditioner_offset: optax.ScalarOrSchedule = 0.0,
    max_iterations: int | None = None,
    progress_tolerance: optax.ScalarOrSchedule = 1e-4,
    stop: Literal["progress", "lookback", "reduction"] = "progress",
    stop_period: int | None = None,
    choice: Literal["walk", "best", "best_held_out", "last"] = "walk",
    sufficient_decrease: optax.ScalarOrSchedule = 1e-2,
    curvature: Curvature | None = None,
    layers: Layers | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-free optimisation: (G + lambda D) delta = -g solved inexactly by preconditioned conjugate gradients.

    One step, as in Martens 2016, algorithm 3: conjugate gradients start from ``warm_start`` times where the last run
    ended (or from 0, if nothing of it was taken) and stop by relative progress (eq. 4.2), by a further rule of your
    choice or at the cap; one of the iterates kept on the way is chosen by the loss itself; lambda adapts by the
    reduction ratio; a backtracking line search has the last word. The preconditioner is (diag(G + lambda D) + kappa)^xi
    with the diagonal from one pull back of noise, squared per example (Chapelle and Erhan 2011; algorithm 6). Three
    settings are Martens's recipes of section 4.11:

    - ``hessian_free(**curvax.transforms.RECIPE_A)``: 250 iterations, CG-backtracking (Martens 2010).
    - ``RECIPE_B``: stop when the loss on the curvature batch turns; choose on ``held_out_at=``; warm start from the
      best.
    - ``RECIPE_C``: 30 iterations on small batches, the last iterate taken: the closest to momentum.

    ``update`` takes ``at=``, whose batch is that of the gradient. What judges a step looks at it: the choice among
    iterates, the reduction ratio and the line search. ``held_out_at=`` is a point on a batch that none of this was
    computed from, for the choice and the line search to judge on in its place; its losses are in the info.

    ``curvature_at=`` is a point on another, usually smaller batch for the products, which save most of the work of a
    large gradient batch. Martens (section 4.10.1) warns of it. With one batch for both, the Gauss-Newton model is
    bounded below whatever the network, and is that of a convex function. With two, there are directions with reward but
    no curvature, and the cases of the smaller one count for more in the curvature than in the gradient: only the
    damping holds steps back then, so lambda stays large, and steps from a curvature batch that is much smaller than the
    number of parameters degenerate. With equal batches lambda shrinks reliably. Larger gradient batches pay late in
    training, when noise of the gradient is what is left; raise lambda when changing to them.

    By default the next batch judges how lambda adapts, as a step always suits the batch that it was made from: lambda
    falls where the step has lowered the loss of the new batch by half of what was predicted, and grows where it has
    raised it by as much; a step that has raised it by three times the prediction is undone, and counted in
    ``undone_steps``. Where the batch stays the same, or with ``judged_by="same_batch"``, the rule is that of Martens,
    on the ratio of the info. A learning rate behind the method in a chain wants ``judged_by="same_batch"``, as steps
    would fall short of what they promise.

    With an indefinite matrix (``curvature=curvax.Hessian()``) a run ends at the first direction of negative curvature,
    and the damping grows; ``curvax.newton_cg`` makes use of such a direction.

    Args:
        rule: How lambda adapts; if None ``next_batch_rule(period=1, base=0.9)`` where batches change, and times 2/3
            above rho = 3/4 and times 3/2 below 1/4 where they do not.
        judged_by: "next_batch" or "same_batch".
        damping_matrix: D: ``curvax.damping.tikhonov()`` by default, ``scale_sensitive()`` or ``structural(...)``.
        warm_start: zeta, in [0, 1], a number or a schedule.
        warm_start_from: Start from the "last" iterate of the last run, from the "best" on its curvature batch, or
            without a memory from -zeta g, the "gradient" (with ``max_iterations`` R and ``warm_start`` 1 the simplified
            Hessian-free method of Henriques et al. 2019, algorithm 2).
        preconditioner: "diagonal", or "kronecker" for the inverse of Kronecker factors of the curvature batch: fewer
            iterations, for the inverses of all factors once a step.
        preconditioner_exponent: xi of the diagonal one, 0.75 in Martens 2010; None for no preconditioner.
        preconditioner_offset: kappa of the diagonal one: 0 with Tikhonov's damping, about 1e-2 of the mean of the
            diagonal of D with scale-sensitive damping (section 4.11).
        max_iterations: The cap on conjugate gradient steps, 50 if None; 50 to 250 in recipe A, 25 to 50 in recipe C.
        progress_tolerance: The threshold of eq. 4.2.
        stop: A further rule that looks at the loss on the curvature batch: "lookback" stops once it is significantly
            worse than ten iterates ago, "reduction" once the reduction is below 90 per cent of the largest seen
            (section 4.13).
        stop_period: That rule looks at every iterate of this period, 5 if None.
        choice: "walk" goes back from the last kept iterate as long as the loss falls, "best" takes the best of all that
            are kept; neither takes one above the loss at delta = 0: there is no step then, and more damping.
            "best_held_out" is "best", and demands ``held_out_at=``. "last" takes the last.
        sufficient_decrease: c of the line search.
        curvature: ``curvax.GaussNewton()`` by default, or ``curvax.Fisher()``.
        layers: From ``curvax.find_layers``, for both preconditioners, which look for them at trace time otherwise.
        seed: Seed of the preconditioner's noise, and of what ``curvature`` draws.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures: losses,
        ratio and ``update_norm`` are of delta before the line search, whose factor is ``step_size``, 0 if it found
        none. In ``extra``, ``chosen_iteration`` is the iterate that was chosen, 0 for none, and ``held_out_loss`` and
        ``new_held_out_loss`` are what ``loss`` and ``new_loss`` are on the held-out batch, NaN without: where the one
        falls and the other rises, steps overfit their batch (section 4.10.2).

    Raises:
        ValueError: ``stop``, ``choice`` or ``warm_start_from`` is none of those named; or "best_held_out" is not given
            ``held_out_at=``.

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
    rule, judge = judging(judged_by, rule, DampingRule(), next_batch_rule(period=1, base=0.9), measured=True)
    damping_matrix = Tikhonov() if damping_matrix is None else damping_matrix
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("hessian_free", curvature)
    kind_of_choice = _named("choice", choice, _CHOICES)
    make_monitor = _named("stop", stop, _MONITORS)
    _named("warm_start_from", warm_start_from, {"last": 0, "best": 0, "gradient": 0})
    kronecker = _named("preconditioner", preconditioner, {"diagonal": False, "kronecker": True})

    def step(given: Given) -> Step:
        at, local, held_out, dtype = given.at, given.curvature_at, given.held_out_at, given.dtype
        if choice == "best_held_out" and held_out is None:
            raise ValueError(
                "hessian_free: choice='best_held_out', as in RECIPE_B, takes held_out_at=, a point on a batch that is"
                " not in the curvature batch: held_out_at=objective.linearize(params, other_batch)"
            )
        count = static_count("hessian_free", "max_iterations", max_iterations, 50)
        matrix = curvature.at(local, given.key).restrict(given.gradient)
        damped = damping_matrix.matrix(local, curvature, given.strength, given.key)
        # Small leaves are one vector throughout, iterates and all.
        packing = packing_of(given.gradient)
        gradient, memory = packing.pack(given.gradient), packing.pack(given.memory)
        if kronecker:
            precondition = _kronecker_preconditioner(given, packing, layers)
        else:
            power = preconditioner_exponent, preconditioner_offset
            precondition = _diagonal_preconditioner(damped, given, packing, layers, *power)

        def loss_on(point):
            return lambda delta: point.loss_along(packing.unpack(delta)).astype(dtype)

        judged_at = at if held_out is None else held_out
        loss, judged = at.loss.astype(dtype), judged_at.loss.astype(dtype)
        downhill = trees.scale(-1.0, gradient)
        result = solvers.cg(
            packing.inside(damped.restrict(given.gradient), "the damped matrix"),
            downhill,
            x0=trees.scale(given.number(warm_start), downhill if warm_start_from == "gradient" else memory),
            preconditioner=precondition,
            max_iterations=count,
            tolerance=float(jnp.finfo(dtype).eps),
            progress_tolerance=given.number(progress_tolerance),
            store_at=solvers.geometric_iterations(count),
            monitor=make_monitor(loss_on(local), local, static_count("hessian_free", "stop_period", stop_period, 5)),
        )
        assert result.stored is not None
        # An ascent direction (possible from a warm start that was cut short) is not followed.
        chosen, search = solvers.choose_and_search(
            result.stored,
            loss_on(judged_at),
            judged,
            gradient,
            choice=kind_of_choice,
            sufficient_decrease=given.number(sufficient_decrease),
        )
        delta, new_judged = chosen.value, chosen.objective
        best = solvers.best_stored(result.stored, loss_on(local)) if warm_start_from == "best" else result

        new_loss = new_judged if held_out is None else loss_on(at)(delta)
        slope, (gradient_norm, length) = search.slope, trees.norms(gradient, delta)
        if isinstance(damping_matrix, Tikhonov):  # from q, which has lambda I in it, without a product
            predicted = (chosen.model_value - given.strength * jnp.square(length) / 2).astype(dtype)
        else:
            predicted = (slope + matrix.quadratic(packing.unpack(delta)).astype(slope.dtype) / 2).astype(dtype)
        # A run that only rose needs more damping, and so does a matrix that is not positive definite, however well the
        # part of the step fared.
        failed = chosen.stayed | (result.reason == solvers.StopReason.NEGATIVE_CURVATURE)
        ratio = jnp.where(failed, -jnp.inf, reduction_ratio(loss, new_loss, predicted).astype(dtype))
        accepted = search.found & ~chosen.stayed
        step_size = jnp.where(accepted, search.step_size, 0)
        nowhere = jnp.full((), jnp.nan, dtype)
        behind = search.value if held_out is None else nowhere
        # Where the matrix has failed by itself, the next batch is not asked about the part of the step either.
        change = jnp.where(failed, 0, step_size * slope + step_size**2 * (predicted - slope))
        figures = {
            "loss": loss,
            "new_loss": new_loss,
            "predicted_change": predicted,
            "step_ratio": ratio,
            "damping": given.strength,
            "step_size": step_size,
            "inner_iterations": result.iterations,
            "reason": result.reason,
            "gradient_norm": gradient_norm,
            "update_norm": length,
            "chosen_iteration": chosen.iteration,
            "held_out_loss": nowhere if held_out is None else judged,
            "new_held_out_loss": nowhere if held_out is None else new_judged,
        }
        return Step(
            packing.unpack(trees.scale(step_size, delta)),
            figures,
            # From where no iterate was below the loss the next run would start above it too, however large lambda.
            memory=given.memory
            if warm_start_from == "gradient"
            else packing.unpack(trees.where(accepted, best.value, trees.zeros_like(best.value))),
            strength=adapted_at_once(judge, rule, given, ratio, accepted & ~failed),
            accepted=accepted,
            finite=trees.all_finite(loss, judged, predicted, length),
            change=change.astype(dtype),
            loss_behind=jnp.where(search.step_size == 1, new_loss, behind),
        )

    return stepper(
        "hessian_free",
        step,
        start=trees.zeros_like,  # the iterate that the next run of conjugate gradients starts from
        strength=initial_damping,
        seed=seed,
        extra={"chosen_iteration": jnp.int32, "held_out_loss": None, "new_held_out_loss": None},
        points=("at", "curvature_at", "held_out_at"),
        judge=judge,
        forget=trees.zeros_like,
    )


def _kronecker_preconditioner(given, packing, layers):
    """F^{-1} by the factors of the curvature batch, with the damping of the step."""
    point = given.curvature_at
    layers = find_layers_at(point) if layers is None else layers
    own = layers.restricted(trees.leaf_paths(given.gradient))
    # Of a point in chunks a part of the size of one.
    part = point if point.chunk_size is None else point.subset(-(-point.num_examples(0) // point.chunk_size))
    factors = factors_of(tap(own, part), given.other_key, Fisher(num_samples=1), "expand", ())
    # A damping within the rounding of the factors would not keep them definite.
    least = 1e-5 * mean_curvature(own, factors).astype(given.dtype)
    solve = kronecker_preconditioner(own, factors, damping=jnp.maximum(given.strength, least))

    def precondition(v):
        return trees.extract(solve(trees.embed(v, point.params)), v)

    return packing.inside(precondition, "the preconditioner")


def _diagonal_preconditioner(damped, given, packing, layers, exponent, offset):
    """(diag(G + lambda D) + kappa)^xi: the estimate takes the penalty's and a diagonal damping's part exactly."""
    if exponent is None:
        return None
    whole = chapelle_erhan_diagonal(damped, given.other_key, layers=layers)
    diagonal = packing.pack(trees.extract(whole, given.gradient))
    return solvers.diagonal_preconditioner(diagonal, offset=given.number(offset), exponent=given.number(exponent))


_CHOICES: dict[str, solvers.Choice] = {"walk": "walk", "best": "best", "best_held_out": "best", "last": "last"}

_MONITORS = {
    "progress": lambda loss_at, point, period: None,
    "lookback": lambda loss_at, point, period: solvers.lookback_monitor(loss_at, point.loss, period=period),
    "reduction": lambda loss_at, point, period: solvers.reduction_monitor(loss_at, point.loss, period=period),
}


def _named(argument, name, table):
    if name not in table:
        raise ValueError(f"hessian_free: {argument} must be one of {', '.join(map(repr, table))}, got {name!r}")
    return table[name]
