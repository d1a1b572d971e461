"""Natural gradient descent: steepest descent in the Kullback-Leibler divergence of the model's predictions."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.rules import DampingRule, next_batch_rule
from curvax.matrices.curvature import Curvature, Fisher, check_curvature
from curvax.matrices.linear_map import LinearMap
from curvax.transforms._arguments import check_arguments
from curvax.transforms._judge import JudgedBy, begun, judged_here, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: optax.ScalarOrSchedule | None = None,
    initial_damping: float | None = None,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    max_divergence: optax.ScalarOrSchedule | None = None,
    max_iterations: int = 20,
    tolerance: optax.ScalarOrSchedule = 1e-4,
    warm_start: optax.ScalarOrSchedule = 0.0,
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent, delta = -alpha (F + lambda I)^{-1} g, solved by conjugate gradients.

    lambda adapts unless ``damping`` is given: it begins with the curvature along the first gradient and follows how
    well the damped model predicts what a step does to the loss of the next batch. A step that raises that far beyond
    what noise explains is undone, and counted in ``undone_steps``. A damping that is given stays, and nothing is
    undone: it is to be tuned together with the learning rate.

    With ``max_divergence`` the step is shortened where needed so that 1/2 delta^T F delta, the divergence KL(p_new ||
    p_old) of the predictions to second order, stays within it: alpha is multiplied by min(1, sqrt(2 c / delta^T F
    delta)). ``curvax.kl_divergence(at, new_params)`` is what it comes to. Martens 2016 (section 5.5) finds an adapted
    damping far better than rescaling the undamped step.
    ``update`` takes ``at=`` and optionally ``curvature_at=``, a point on another batch for F.

    Args:
        learning_rate: alpha, a number or a schedule.
        damping: lambda, above 0, a number or a schedule; None lets it adapt.
        initial_damping: The lambda that adapting begins with; if None g^T F g / g^T g for the first gradient.
        rule: How it adapts; if None ``curvax.damping.next_batch_rule(period=1, base=0.9)``, or by the "same_batch"
            that of Levenberg and Marquardt, ``curvax.damping.DampingRule()``.
        judged_by: "next_batch"; "same_batch" judges the step on the batch that it comes from (Martens 2016, section
            5.5), which is for batches so large that what fits them fits all data.
        max_divergence: The bound c on the divergence of a step, a number or a schedule; None for none.
        tolerance: The relative residual to stop at.
        warm_start: The solve starts from this times the last solution; above 0 only where F changes little.
        curvature: F, ``curvax.Fisher()`` by default; ``curvax.Fisher(num_samples=1)`` draws targets anew at every step.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation, with ``residual``, ||(F + lambda I) x - g|| / ||g||, and ``divergence``, 1/2 delta^T F delta
        (0 without ``max_divergence``) in ``state.info.extra``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.natural_gradient(damping=1e-9)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Amari 1998; Martens 2016, sections 5.3 and 5.5.
    """
    check_arguments(natural_gradient, locals())
    solve = _Solve("natural_gradient", max_iterations, tolerance, warm_start, curvature)
    if damping is not None and not (initial_damping is None and rule is None):
        raise ValueError(
            "natural_gradient: damping= is a lambda that stays; initial_damping= and rule= are for one that adapts"
        )
    own, judge = judging(judged_by, rule, DampingRule(), next_batch_rule(period=1, base=0.9), damped=True)
    judge = judge if damping is None else None

    def step(given: Given) -> Step:
        matrix, rate = solve.matrix(given), given.number(learning_rate)
        if damping is not None:
            kept = strength = given.number(damping)
        elif initial_damping is not None:
            kept = strength = given.strength
        else:
            kept, strength = begun(given.strength, lambda: _curvature_along_gradient(matrix, given))
        solution, figures, finite = solve(matrix, strength, given)
        divergence, factor = jnp.zeros((), given.dtype), jnp.ones((), given.dtype)
        if max_divergence is not None:
            divergence = rate**2 * matrix.quadratic(solution).astype(given.dtype) / 2
            limit = given.number(max_divergence)
            within = divergence <= limit
            factor = jnp.where(within, 1, jnp.sqrt(limit / jnp.where(within, 1, divergence)))
        # The damped model at -a x, from its value q(x) = 1/2 x^T (F + lambda I) x - g^T x at x.
        length, slope = factor * rate, trees.vdot(given.gradient, solution).astype(given.dtype)
        figures |= {
            "predicted_change": length**2 * (figures.pop("model_value") + slope) - length * slope,
            "step_ratio": given.info.step_ratio,
            "divergence": factor**2 * divergence,
        }
        update = trees.scale(-length, solution)
        if damping is not None:  # no loss is read, so that there need not be one
            return Step(update, figures, memory=solution, finite=finite)
        figures["loss"], predicted = given.at.loss, figures["predicted_change"]
        finite = finite & trees.all_finite(given.at.loss, predicted)
        if judge is None:
            loss = given.at.loss.astype(given.dtype)
            figures["step_ratio"], adapted = judged_here(own, given, strength, update, loss, predicted)
            kept = adapted if initial_damping is not None else jnp.where(kept > 0, adapted, kept)
        return Step(update, figures, memory=solution, strength=kept, finite=finite)

    return stepper(
        "natural_gradient",
        step,
        start=trees.zeros_like,
        strength=0.0 if initial_damping is None else initial_damping,
        seed=seed,
        extra={"residual": None, "divergence": None},
        points=("at", "curvature_at"),
        judge=judge,
        forget=trees.zeros_like,
    )


def scale_by_natural_gradient(
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    max_iterations: int = 20,
    tolerance: optax.ScalarOrSchedule = 1e-4,
    warm_start: optax.ScalarOrSchedule = 0.0,
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (F + lambda I)^{-1}, by conjugate gradients.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate, momentum or a line search
    behind it: ``optax.chain(curvax.scale_by_natural_gradient(), optax.scale_by_learning_rate(0.1))``. Arguments and
    figures are those of ``curvax.natural_gradient``, with a damping that stays.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_natural_gradient(damping=0.5)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> tx.update(jnp.ones((2, 1)), tx.init(w), w, at=objective.linearize(w, batch))[0]
        Array([[1.],
               [1.]], dtype=float...)

    Source: Amari 1998; Martens 2016, section 5.2.
    """
    check_arguments(scale_by_natural_gradient, locals())
    solve = _Solve("scale_by_natural_gradient", max_iterations, tolerance, warm_start, curvature)

    def step(given: Given) -> Step:
        solution, figures, finite = solve(solve.matrix(given), given.number(damping), given)
        del figures["model_value"]
        return Step(solution, figures, memory=solution, finite=finite)

    extra, points = {"residual": None}, ("at", "curvature_at")
    return stepper("scale_by_natural_gradient", step, start=trees.zeros_like, seed=seed, extra=extra, points=points)


class _Solve:
    """(F + lambda I)^{-1} g by conjugate gradients, with the figures of the run."""

    def __init__(self, name, max_iterations, tolerance, warm_start, curvature):
        self.curvature = Fisher() if curvature is None else curvature
        check_curvature(name, self.curvature)
        self.max_iterations, self.tolerance, self.warm_start = max_iterations, tolerance, warm_start

    def matrix(self, given: Given) -> LinearMap:
        return self.curvature.at(given.curvature_at, given.key).restrict(given.gradient)

    def __call__(self, matrix: LinearMap, damping: Array, given: Given) -> tuple[PyTree, dict[str, Array], Array]:
        result = solvers.cg(
            lambda v: trees.add_scaled(matrix(v), damping, v),
            given.gradient,
            x0=trees.scale(given.number(self.warm_start), given.memory),
            max_iterations=self.max_iterations,
            tolerance=given.number(self.tolerance),
        )
        norm = trees.norm(given.gradient).astype(given.dtype)
        figures = {
            "damping": damping,
            "inner_iterations": result.iterations,
            "reason": result.reason,
            "gradient_norm": norm,
            "residual": result.residual_norm.astype(given.dtype) / jnp.where(norm > 0, norm, 1),
            "model_value": result.model_value.astype(given.dtype),
        }
        # A matrix that is not finite ends the solve where it is finite: the reason tells.
        return result.value, figures, result.reason != solvers.StopReason.NON_FINITE


def _curvature_along_gradient(matrix, given):
    """g^T F g / g^T g: with it as lambda no step is longer than steepest descent's to the minimum of the model."""
    norm = trees.norm(given.gradient).astype(given.dtype)
    unit = trees.scale(jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0), given.gradient)
    return matrix.quadratic(unit).astype(given.dtype)
