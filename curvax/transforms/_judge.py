"""The judge of the next batch: whether the last step has also paid on data that its curvature has not seen.

A step fits the batch that it was computed from. Judged there it looks good for ever, so that the damping falls until
steps follow the noise of their batch alone and the loss rises. The whole methods therefore look back, before each step,
at what the last one did to the loss of the batch that has come since: one forward pass, at the parameters where the
last step began. Where the batch has not changed there is nothing to look back for, and the rule of the method's paper
acts on the ratio that it measured.

What a step has done is measured at the parameters, and what it promised by the method itself: a learning rate, clip or
trace that stands behind the method in a chain makes steps fall short of their promise, so that lambda does not fall,
and has its effect on the way back of a step that is undone. Learning rates belong into the method where it has one;
otherwise take ``judged_by="same_batch"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.damping.rules import Rule
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.transforms._step import Given, LastStep, Verdict
from curvax.types import Array, PyTree

JudgedBy = Literal["next_batch", "same_batch"]
R = TypeVar("R", bound=Rule)

ABSURD = 3
"""A rise by so many times what the model promised, or could, is no noise of a batch: the step is undone."""

UNUSUAL = 4
"""A rise from batch to batch by so many times their mean change is looked into: three standard deviations of noise."""


def judging(
    judged_by: JudgedBy, rule: R | None, same: R, following: R, measured: bool = False, damped: bool = False
) -> tuple[R, NextBatch | None]:
    """The rule for a step judged on its own batch, and the judge by the next one, None for "same_batch".

    Args:
        rule: The rule that the user has given, which takes the place of both others.
        same: The rule of the method's paper.
        following: The rule for ratios on a batch that the step was not computed from.
        measured: Whether the method measures the loss behind its step.
        damped: Whether what it promises is the change of the model with lambda I in it.
    """
    check_choice("judged_by", judged_by, ("next_batch", "same_batch"))
    own = same if rule is None else rule
    if judged_by == "same_batch":
        return own, None
    if rule is not None:
        return own, NextBatch(rule, rule, measured)
    return own, NextBatch(following, same, measured, damped)


def begun(strength: Array, first: Callable[[], Array]) -> tuple[Array, Array]:
    """(strength to keep, strength of the step), where one that has not begun, 0, begins with ``first()``.

    A batch along whose gradient there is no curvature says nothing: its step has 1, and the next batch is asked again.
    """
    kept = jax.lax.cond(strength > 0, lambda: strength, lambda: first().astype(strength.dtype))
    kept = jnp.where(kept > 0, kept, 0)
    return kept, jnp.where(kept > 0, kept, 1)


def judged_here(
    rule: Rule, given: Given, strength: Array, update: PyTree, loss: Array, predicted: Array
) -> tuple[Array, Array]:
    """(rho, the strength behind it) of a step on its own batch; the loss behind it is taken where the rule is due."""

    def measure() -> Array:
        return reduction_ratio(loss, given.at.loss_along(update), predicted).astype(given.dtype)

    count = given.steps + 1
    ratio = jax.lax.cond(count % rule.period == 0, measure, lambda: given.info.step_ratio)
    norm = trees.norm(update).astype(given.dtype)
    return ratio, rule.adapt(strength, ratio, count=count, step_norm=norm)


def adapted_at_once(judge: NextBatch | None, rule: Rule, given: Given, ratio: Array, taken: Array) -> Array:
    """The strength behind a step: without a judge by its own ratio; with one, the next batch decides on what was taken.

    A step that was not taken has failed by any rule, or the same one would be tried for ever.
    """
    if judge is not None:
        ratio = jnp.where(taken, ratio, -jnp.inf)
    strength = rule.adapt(given.strength, ratio, count=given.steps + 1, step_norm=given.info.update_norm)
    return strength if judge is None else jnp.where(taken, given.strength, strength)


@dataclasses.dataclass(frozen=True)
class NextBatch:
    """Judges the last step by the loss of the present batch, at the parameters where it began and where it ended.

    The rule acts where its period is due. Whatever the period, a rise of the loss that neither the model nor the noise
    of batches explains is looked into at once: a step that has raised the loss of this batch ``ABSURD`` times as much
    as it was to lower it, or as there was of it where it is known not to be below zero, is undone.

    Attributes:
        rule: What the ratio on another batch does to the strength.
        same: What the ratio of the info does where the batch is still that of the last step, which is seen by its loss
            if the method has measured that behind the step.
        measured: Whether it has.
        damped: Whether the promise is that of the model with lambda I in it. Without lambda |delta|^2 / 2 it promises
            more by that part, which is at most as much again, where B is nothing; the rule, which looks for such gains,
            is told 1 of what goes beyond that by a half, as it is noise.
    """

    rule: Rule
    same: Rule
    measured: bool = False
    damped: bool = False

    def __call__(self, last: LastStep, given: Given) -> Verdict:
        if not all(term.loss.has_value for term in given.at.terms):
            raise ValueError(
                "the loss of the next batch is to judge the step, and this objective has none"
                " (curvax.losses.curvature_only); take natural_gradient with a lambda that stays, damping=,"
                " scale_by_natural_gradient or scale_by_kfac"
            )
        info, here = given.info, given.at.loss.astype(given.dtype)
        rounding = 32 * jnp.finfo(here.dtype).eps * jnp.abs(here)
        unchanged = jnp.abs(here - last.loss) <= rounding
        promised = jnp.abs(last.predicted_change)

        nonnegative = given.at.loss_is_nonnegative

        def possible(loss):
            # A model may promise many times the loss that there is.
            return jnp.where(nonnegative, jnp.minimum(promised, jnp.abs(loss)), promised)

        def bound(loss):
            return ABSURD * (possible(loss) + rounding)

        # Another batch has another loss: only a rise that no noise explains is worth a forward pass by itself. A loss
        # may have a floor that no model gets below, so that its own size says little about its noise.
        noise = jnp.fmin(UNUSUAL * last.unrest, jnp.abs(info.loss) / 4)
        alarming = ~(here - info.loss <= bound(info.loss) + noise)
        taken = (given.steps > 0) & (last.predicted_change < 0)
        periodic = given.steps % self.rule.period == 0
        due = (periodic | alarming) & taken & ~unchanged

        def look_back() -> tuple[Array, Array]:
            there = given.at.loss_at(given.last_params).astype(given.dtype)
            # Where the loss is not finite at the old parameters either, it is the batch that is bad.
            known = jnp.isfinite(there)
            # A rise counts against what there was to promise, or a model without any sense would look harmless.
            promise = jnp.where(here > there, -possible(there), last.predicted_change)
            ratio = reduction_ratio(there, here, promise).astype(given.dtype)
            # Of NaN no rule makes anything.
            return jnp.where(known, ratio, jnp.nan), known & ~(here - there <= bound(there))

        # What is periodic is so whatever the data, so that a count of operations knows of it.
        looks = due if self.measured else periodic | due
        ratio, absurd = jax.lax.cond(looks, look_back, lambda: (info.step_ratio, jnp.array(False)))
        ratio, absurd = jnp.where(due, ratio, info.step_ratio), absurd & due

        def adapted(rule, ratio):
            return rule.adapt(given.strength, ratio, count=given.steps, step_norm=info.update_norm)

        told = ratio
        if self.damped:
            hidden = info.damping * jnp.square(info.update_norm) / (2 * promised)
            told = jnp.where(ratio > 3 / 2 + hidden, 1, ratio).astype(ratio.dtype)  # nothing of NaN, without a lambda
        strength = jnp.where(due, adapted(self.rule, told), given.strength)
        strength = jnp.where(unchanged & taken, adapted(self.same, ratio), strength)
        strength = jnp.where(absurd, self.rule.retreat(given.strength), strength)
        return Verdict(strength, absurd, ratio, _averaged(last.unrest, jnp.abs(here - info.loss)))


def _averaged(mean: Array, new: Array) -> Array:
    """The running mean of the last ten or so; what is not finite is left out, and the first is a mean by itself."""
    known = jnp.where(jnp.isfinite(mean), 0.9 * mean + 0.1 * new, new)
    return jnp.where(jnp.isfinite(new), known, mean).astype(mean.dtype)
