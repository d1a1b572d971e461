"""One iteration of L-SR1, by a trust region and by a line search (Ramamurthy and Duffy 2017, algorithms 1 and 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from curvax import trees
from curvax.damping.rules import RadiusRule
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.quasi_newton.sr1 import SR1Memory, sr1_map, sr1_update
from curvax.solvers.line_search import backtracking_line_search
from curvax.solvers.trust_region import compact_trust_region
from curvax.types import Array, PyTree, Scalar

Evaluate = Callable[[PyTree], tuple[Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class SR1Step:
    """One iteration of L-SR1: what was tried, what came of it, and what the next iteration starts from."""

    step: PyTree
    step_norm: Array
    new_loss: Array  # behind the step, whether it shall be taken or not
    new_gradient: PyTree
    predicted_change: Array
    step_ratio: Array
    accepted: Array
    reach: Array  # the radius, or the step size that the next search starts from
    memory: SR1Memory  # with the new pair, be the step taken or not, where all is finite
    skipped: Array  # whether the pair was left out
    dropped: Array  # how many older pairs were dropped, as the matrix was no longer well defined
    hard_case: Array  # of the trust-region problem; of a line search, whether the direction was turned round
    finite: Array  # whether loss, gradient and model are


def trust_region_step(
    evaluate: Evaluate,
    loss: Array,
    gradient: PyTree,
    memory: SR1Memory,
    radius: Array,
    *,
    scale: Scalar = 1.0,
    rule: RadiusRule | None = None,
    acceptance: Scalar = 1e-4,
    skip_tolerance: Scalar = 1e-8,
) -> SR1Step:
    """One iteration of algorithm 1 at loss f and its gradient: the exact step in ||s|| <= radius, the pair, the radius.

    Args:
        evaluate: (step) -> (loss, gradient) behind the step.
        memory: Of the direct form, pairs (s, y).
        acceptance: eta, the least ratio of a step that is taken.
    """
    rule, dtype = RadiusRule() if rule is None else rule, memory.core.dtype
    solution = compact_trust_region(sr1_map(memory, scale), gradient, radius)
    # The multiplier says what B makes of the step, without another product: (B + sigma I) s = -g.
    expected = trees.scale(-1.0, trees.add_scaled(gradient, solution.multiplier, solution.step))

    def judge(ratio, has_gradient):
        # Where there is no gradient, as on a kink, the step has failed whatever the loss.
        ratio = jnp.where(has_gradient, ratio, -jnp.inf)
        accepted = ratio > jnp.asarray(acceptance, dtype)
        # A step that is not taken has failed by any rule, or the same one would be tried for ever.
        return ratio, accepted, rule.adapt(radius, jnp.where(accepted, ratio, -jnp.inf), step_norm=solution.norm)

    def remember(change, finite):
        return sr1_update(memory, solution.step, change, scale, skip_tolerance, expected=expected, usable=finite)

    predicted = solution.model_value.astype(dtype)
    tried = solution.step, solution.norm, predicted, solution.hard_case
    return _judged(evaluate, loss, gradient, *tried, judge, remember)


def line_search_step(
    evaluate: Evaluate,
    loss: Array,
    gradient: PyTree,
    memory: SR1Memory,
    last_step_size: Array,
    *,
    scale: Scalar = 1.0,
    sufficient_decrease: Scalar = 1e-4,
    most_halvings: int = 30,
    skip_tolerance: Scalar = 1e-8,
    loss_at: Callable[[PyTree], Array] | None = None,
) -> SR1Step:
    """One iteration of algorithm 2: the direction -H g, halved until the loss falls enough, and the pair.

    The matrix may be indefinite: a direction that points upwards is turned round, and one orthogonal to the gradient is
    replaced by -g.

    Args:
        evaluate: (step) -> (loss, gradient) behind the step.
        memory: Of the inverse form, pairs (y, s).
        last_step_size: The step size before; the search starts from min(1, twice that).
        scale: gamma; H_0 = I / gamma.
        loss_at: (step) -> loss, if that is cheaper than with the gradient.
    """
    dtype = memory.core.dtype
    loss_at = (lambda step: evaluate(step)[0]) if loss_at is None else loss_at
    inverse_scale = 1 / jnp.asarray(scale, dtype)
    direction = trees.scale(-1.0, sr1_map(memory, inverse_scale)(gradient))
    slope = trees.vdot(gradient, direction).astype(dtype)
    lengths = trees.norm(gradient).astype(dtype) * trees.norm(direction).astype(dtype)
    upwards = slope > 0
    orthogonal = ~(jnp.abs(slope) > jnp.sqrt(jnp.finfo(dtype).eps) * lengths)
    direction = trees.where(upwards, trees.scale(-1.0, direction), direction)
    direction = trees.where(orthogonal, trees.scale(-1.0, gradient), direction)
    slope = jnp.where(orthogonal, -trees.vdot(gradient, gradient).astype(dtype), -jnp.abs(slope))
    search = backtracking_line_search(
        lambda step_size: loss_at(trees.scale(step_size, direction)),
        loss + 10 * jnp.finfo(dtype).eps * jnp.abs(loss),
        slope,
        sufficient_decrease=sufficient_decrease,
        max_tries=most_halvings,
        initial=jnp.minimum(1, 2 * last_step_size),
    )
    step = trees.scale(search.step_size, direction)

    def judge(ratio, has_gradient):
        accepted = search.found & has_gradient
        return ratio, accepted, jnp.where(accepted, search.step_size, last_step_size / 2)

    def remember(change, finite):
        return sr1_update(memory, change, step, inverse_scale, skip_tolerance, usable=finite)

    tried = step, trees.norm(step).astype(dtype), search.step_size * slope / 2, upwards
    return _judged(evaluate, loss, gradient, *tried, judge, remember)


def _judged(evaluate, loss, gradient, step, step_norm, predicted, hard_case, judge, remember):
    """A step with what is behind it: ``judge`` gives ratio, acceptance and reach, ``remember`` the memory."""
    new_loss, new_gradient = evaluate(step)
    ratio = reduction_ratio(loss, new_loss, predicted).astype(predicted.dtype)
    ratio, accepted, reach = judge(ratio, trees.all_finite(new_gradient))
    finite = trees.all_finite(loss, gradient, predicted)
    updated = remember(trees.sub(new_gradient, gradient), finite)
    return SR1Step(
        step=step,
        step_norm=step_norm,
        new_loss=new_loss.astype(predicted.dtype),
        new_gradient=new_gradient,
        predicted_change=predicted,
        step_ratio=ratio,
        accepted=accepted,
        reach=reach,
        memory=updated.memory,
        skipped=updated.skipped,
        dropped=updated.dropped,
        hard_case=hard_case,
        finite=finite,
    )
