"""The stepper: what all methods share, so that the file of a method holds its mathematics alone.

A method says what it carries from step to step (``start``) and what one step is (``step``, from what is ``Given`` to a
``Step``). The stepper checks what arrives, keeps the state, fills in the info, takes steps back that are not finite or
not accepted, and asks a judge about the last step where there is one.

**The contract of all methods.** The incoming updates are read as the gradient of the objective at the point (methods
``scale_by_...`` take any vector), so whatever stands in front in an ``optax.chain`` has its effect. ``update`` takes
``at=``, the third result of ``objective.value_and_grad``, and the further points that a method names; what else it is
given raises at trace time, unless it may be for another transformation of the chain. Methods without a point are made
of gradients alone, and work in any loop of optax. The updates of a whole method are ready for ``optax.apply_updates``,
and ``state.info`` holds the figures of the step. Inside ``optax.masked`` and ``optax.partition`` a method acts on the
leaves it is given, by path. Under ``optax.MultiSteps`` the gradient is the mean over the mini-batches, and curvature
and losses are those of the last point. A step in which anything is not finite is skipped and counted: updates are zero
and the state stays. Numbers may be traced, or a schedule of the step unless they name where something begins;
``optax.inject_hyperparams`` works on every method as it is. Under ``vmap`` a ``lax.cond`` becomes a ``select``, so
periodic work is then done at every step.

A line search of optax behind a method is told of the point: ``tx.update(grads, state, params, at=at, value=loss,
grad=grads, value_fn=lambda params, at: at.loss_at(params))``. Data-parallel steps are taken under plain ``jax.jit``
with the batch sharded over the devices; inside ``shard_map`` and ``pmap``, where a device sees its part alone, they
raise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._arguments import points_of
from curvax.types import Array, PyTree, Scalar


class StepInfo(NamedTuple):
    """Figures of the last step, all scalars; a figure that a method does not work out is NaN, a count -1.

    Attributes:
        loss: h(theta) before the step, on the batch that judges it.
        new_loss: h(theta + delta) there, whether the step was taken or not.
        predicted_change: M(delta) - M(0) of the model of the method.
        step_ratio: rho, the actual over the predicted change; -inf where the step failed.
        damping: lambda that the step was computed with.
        radius: The radius of the trust region that the step was computed with.
        step_size: The factor of the step along its direction, from a line search or in closed form.
        reason: Why they stopped, a ``curvax.solvers.StopReason``.
        gradient_norm: The norm of the incoming updates.
        skipped_steps: How many steps so far were skipped because something was not finite.
        undone_steps: How many were undone by a judge.
        extra: What the method adds, by name.
    """

    loss: Array
    new_loss: Array
    predicted_change: Array
    step_ratio: Array
    damping: Array
    radius: Array
    step_size: Array
    inner_iterations: Array
    reason: Array
    gradient_norm: Array
    update_norm: Array
    accepted: Array
    skipped_steps: Array
    undone_steps: Array
    extra: dict[str, Array]


class StepState(NamedTuple):
    """The state of every method.

    Attributes:
        strength: What adapts: lambda, the radius or sigma for the next step; 0 for methods in which nothing does.
        key: Raw data of the PRNG key that the key of every step comes from.
        memory: What the method carries from step to step, such as its last direction.
        last: The last step, for the judge; () without one.
    """

    steps: Array
    strength: Array
    key: Array
    memory: Any
    last: Any
    info: StepInfo


@dataclasses.dataclass(frozen=True)
class Given:
    """What a step is computed from.

    Attributes:
        gradient: The incoming updates g.
        at: The point; there is none for methods that take gradients alone.
        curvature_at: The point of the curvature, and of the losses that judge the step; ``at`` unless given.
        held_out_at: A point on data that the step was not computed from; None unless given.
        key: The PRNG key of the step.
        other_key: Another, for methods that draw for two purposes.
        last: The step before; None where the method does not keep it.
        undo: Whether the judge takes the last step back, so that nothing of this one is kept.
    """

    gradient: PyTree
    at: CurvaturePoint
    curvature_at: CurvaturePoint
    held_out_at: CurvaturePoint | None
    strength: Array
    memory: Any
    steps: Array
    key: Array
    other_key: Array
    info: StepInfo
    params: PyTree
    extra: Mapping[str, Any]
    last: LastStep | None
    undo: Array

    @property
    def last_change(self) -> PyTree:
        """How the parameters changed since the step before began, zero at first; for methods that keep it.

        Whatever stands behind the method in a chain has had its effect on it.
        """
        assert self.last is not None
        change = trees.sub(trees.extract(self.at.params, self.gradient), self.last.params)
        return trees.where(self.steps > 0, change, trees.zeros_like(change))

    @property
    def last_params(self) -> PyTree:
        """All parameters where the step before began; leaves that are hidden from the method are as they are now."""
        assert self.last is not None
        now = self.at.params
        if jax.tree.structure(now) == jax.tree.structure(self.last.params):
            return trees.cast_like(self.last.params, now)
        hidden = trees.sub(now, trees.embed(trees.extract(now, self.gradient), now))
        return trees.add(hidden, trees.embed(self.last.params, now))

    @property
    def dtype(self) -> Any:
        """The dtype of losses, norms and strengths: float32 or wider."""
        return self.strength.dtype

    def number(self, value: Any) -> Array:
        """A number, or a schedule at this step, in that dtype."""
        return jnp.asarray(value(self.steps) if callable(value) else value).astype(self.dtype)

    @property
    def largest_penalty(self) -> Array:
        """The strength of the penalty, the largest where leaves differ, for curvature that knows one alone (KF-18)."""
        penalty = self.curvature_at.penalty
        if not penalty:
            return jnp.zeros((), self.dtype)
        strengths = jax.tree.leaves(trees.extract(penalty.curvature(self.curvature_at.params), self.gradient))
        return jnp.max(jnp.stack([eta.astype(self.dtype) for eta in strengths]))


class Step(NamedTuple):
    """What a step comes to.

    Attributes:
        figures: Fields of ``StepInfo``, and further ones that end in ``extra``.
        memory: What the method carries to the next step.
        strength: lambda, the radius or sigma for the next step; None leaves it.
        accepted: Whether the step is taken; None for always.
        finite: Whether all is finite, besides updates and incoming updates, which the stepper looks at.
        reads_updates: Whether the incoming updates are read, so that they have to be finite.
        guarded: Whether ``memory`` is already what it is to be where something is not finite or ``Given.undo`` holds:
            then the stepper does not select, which would read and write all of it once more.
        change: The model's change of the loss for the update itself, where ``predicted_change`` is for another length.
        loss_behind: The loss behind the update itself, likewise; None for ``new_loss``.
    """

    update: PyTree
    figures: Mapping[str, Any]
    memory: Any = ()
    strength: Array | None = None
    accepted: Array | None = None
    finite: Any = True
    reads_updates: bool = True
    guarded: bool = False
    change: Array | None = None
    loss_behind: Array | None = None


class LastStep(NamedTuple):
    """What a judge is told of the step before.

    Attributes:
        params: Where it began; not how long it was, as what stands behind the method in a chain may change the update.
        predicted_change: What the model promised, 0 if the step was not taken, NaN without a model.
        loss: The loss of its batch where it ended, NaN where that was not measured.
        unrest: What the judge has said of how much losses change from batch to batch, NaN at first.
    """

    params: PyTree
    predicted_change: Array
    loss: Array
    unrest: Array


class Verdict(NamedTuple):
    """What a judge says of the last step: the strength to go on with, whether to undo it, its ratio for the info.

    And what it wants to be told at the next one, ``LastStep.unrest``.
    """

    strength: Array
    undo: Array
    step_ratio: Array | None = None
    unrest: Array | None = None


class Judge(Protocol):
    """Judges the last step on the data of the present point, which its curvature has not seen."""

    def __call__(self, last: LastStep, given: Given) -> Verdict: ...


def nothing(params: PyTree) -> tuple[()]:
    """What a method without memory carries."""
    del params
    return ()


def stepper(
    name: str,
    step: Callable[[Given], Step],
    *,
    start: Callable[[PyTree], Any] = nothing,
    strength: Scalar = 0.0,
    seed: Scalar = 0,
    extra: Mapping[str, Any] | None = None,
    points: tuple[str, ...] = ("at",),
    judge: Judge | None = None,
    forget: Callable[[Any], Any] = lambda memory: memory,
    keeps_last: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a method.

    Args:
        start: params -> what the method carries; parameters may be ShapeDtypeStructs.
        strength: lambda_0, the first radius or sigma.
        extra: The names of the figures that the method adds, with their dtypes (None for that of the losses).
        points: The names of the points that ``update`` takes; () for a method of gradients alone.
        judge: What judges the last step before a new one is computed. One that it undoes is taken back by the
            update, in place of a new step.
        forget: What the method carries on from a step that was undone, given what it carried: a direction or a warm
            start that leads there is of no use.
        keeps_last: Whether the step is given the one before, as a judge is.
    """
    keeps_last = keeps_last or judge is not None
    added = {} if extra is None else dict(extra)
    if callable(strength):
        raise TypeError(f"{name}: what adapts begins with a number, which a schedule is not; see damping rules")

    def init(params: PyTree) -> StepState:
        params = trees.floating_arrays(params, f"{name}: params")
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        unknown = jnp.full((), jnp.nan, dtype)
        last = LastStep(trees.zeros_like(params), jnp.zeros((), dtype), unknown, jnp.copy(unknown))
        info = _empty_info(added, dtype)
        # Floating point may arrive as a number, an array or a traced value, of any dtype.
        first = jnp.array(jnp.asarray(strength).astype(dtype))
        key = jax.random.key_data(jax.random.key(seed))
        return StepState(jnp.zeros((), jnp.int32), first, key, start(params), last if keeps_last else (), info)

    def update(updates: PyTree, state: StepState, params: PyTree = None, **arguments: Any) -> tuple[PyTree, StepState]:
        given = _given(name, points, updates, state, params, arguments)
        undo, unrest = jnp.array(False), None
        here = trees.extract(given.at.params, updates) if keeps_last else ()
        if judge is not None:
            verdict = judge(state.last, given)
            undo, unrest = verdict.undo & (state.steps > 0), verdict.unrest
            given = dataclasses.replace(given, strength=verdict.strength.astype(given.dtype), undo=undo)
            if verdict.step_ratio is not None:
                given = dataclasses.replace(given, info=given.info._replace(step_ratio=verdict.step_ratio))
        taken = step(given)
        accepted = jnp.array(True) if taken.accepted is None else taken.accepted
        moved = trees.cast_like(taken.update, updates)
        after = StepState(
            steps=jnp.asarray(optax.safe_increment(state.steps)),
            strength=given.strength if taken.strength is None else taken.strength.astype(given.dtype),
            key=state.key,
            memory=taken.memory,
            last=_last_step(here, taken, accepted, given, unrest) if keeps_last else (),
            info=_info(taken, accepted, added, given),
        )
        # What a method tried and not what is left of it: the info has its norm, and the largest entry with that.
        # Updates that are not read are not looked at either, so that a compiler need not work them out.
        tried, *read = trees.are_finite(moved, updates) if taken.reads_updates else trees.are_finite(moved)
        finite = functools.reduce(jnp.logical_and, read, tried | ~accepted) & taken.finite
        skipped_steps = jnp.asarray(optax.safe_increment(state.info.skipped_steps))
        skipped = state._replace(info=state.info._replace(skipped_steps=skipped_steps))
        if taken.guarded:
            skipped = skipped._replace(memory=taken.memory)
            state = state._replace(memory=taken.memory)
        nowhere = trees.zeros_like(moved)
        outcomes = [(~finite, nowhere, skipped), (accepted, moved, after)]
        if judge is not None:
            back = trees.cast_like(trees.sub(state.last.params, here), updates)
            undone_steps = jnp.asarray(optax.safe_increment(state.info.undone_steps))
            reverted = state._replace(
                strength=given.strength,
                memory=forget(state.memory),
                last=state.last._replace(predicted_change=jnp.zeros((), given.dtype)),
                info=state.info._replace(undone_steps=undone_steps, step_ratio=given.info.step_ratio),
            )
            outcomes = [(undo, back, reverted), *outcomes]
        conditions, changes, states = zip(*outcomes, strict=True)
        outcome = trees.first_true(*conditions)
        return trees.select(outcome, *changes, nowhere), trees.choose(outcome, *states, after)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _last_step(began, taken, accepted, given, unrest):
    figures = taken.figures
    change = figures.get("predicted_change", jnp.nan) if taken.change is None else taken.change
    behind = figures.get("new_loss", jnp.nan) if taken.loss_behind is None else taken.loss_behind
    promised = jnp.where(accepted, change, 0).astype(given.dtype)
    unrest = given.last.unrest if unrest is None else unrest
    return LastStep(began, promised, jnp.asarray(behind).astype(given.dtype), unrest)


_COUNTS = ("inner_iterations", "reason")


def _empty_info(added, dtype):
    """An info before the first step; a buffer for each figure, so that states can be donated."""
    fields: dict[str, Any] = {field: jnp.full((), jnp.nan, dtype) for field in StepInfo._fields}
    fields |= {field: jnp.full((), -1, jnp.int32) for field in _COUNTS}
    fields |= {field: jnp.zeros((), jnp.int32) for field in ("skipped_steps", "undone_steps")}
    fields["accepted"] = jnp.zeros((), jnp.bool_)
    fields["extra"] = {name: jnp.zeros((), dtype if kind is None else kind) for name, kind in added.items()}
    return StepInfo(**fields)


def _info(taken, accepted, added, given):
    figures = dict(taken.figures)
    for name, tree in (("gradient_norm", given.gradient), ("update_norm", taken.update)):
        if name not in figures:
            figures[name] = trees.norm(tree)
    empty = _empty_info(added, given.dtype)
    extra = {name: jnp.asarray(figures.pop(name)).astype(empty.extra[name].dtype) for name in added}
    figures = {name: jnp.asarray(value).astype(getattr(empty, name).dtype) for name, value in figures.items()}
    counts = {"skipped_steps": given.info.skipped_steps, "undone_steps": given.info.undone_steps}
    return empty._replace(**figures, **counts, accepted=accepted, extra=extra)


def _given(name, points, updates, state, params, arguments):
    if not isinstance(state, StepState):
        raise TypeError(
            f"{name}: update takes (grads, state, params, at=at) in this order; the second argument is a"
            f" {type(state).__name__}, not the state of init"
        )
    own = points_of(name, points, arguments) if points else {}
    at = own.get("at")
    trees.check_floating(updates, "updates")
    whole = params if at is None else at.params
    if whole is not None:
        trees.check_like(trees.embed(updates, whole), whole, "updates")
    return Given(
        gradient=updates,
        at=cast(CurvaturePoint, at),
        curvature_at=cast(CurvaturePoint, at if own.get("curvature_at") is None else own["curvature_at"]),
        held_out_at=own.get("held_out_at"),
        strength=state.strength,
        memory=state.memory,
        steps=state.steps,
        key=_key(state, 0),
        other_key=_key(state, 1),
        info=state.info,
        params=params,
        extra=arguments,
        last=state.last if isinstance(state.last, LastStep) else None,
        undo=jnp.array(False),
    )


def _key(state, which):
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), 2 * state.steps + which)
