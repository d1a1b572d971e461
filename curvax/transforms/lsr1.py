"""L-SR1: limited-memory symmetric rank-one quasi-Newton methods, by a trust region or by a line search."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.damping.rules import RadiusRule, next_batch_radius_rule
from curvax.packing import packing_of
from curvax.quasi_newton import SR1Step, line_search_step, sr1_memory, trust_region_step
from curvax.transforms._arguments import check_arguments, static_count
from curvax.transforms._judge import JudgedBy, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree


def lsr1(
    *,
    memory_size: int | None = None,
    scale: optax.ScalarOrSchedule = 1.0,
    initial_radius: float | None = None,
    rule: RadiusRule | None = None,
    acceptance: optax.ScalarOrSchedule = 1e-4,
    judged_by: JudgedBy = "next_batch",
    skip_tolerance: optax.ScalarOrSchedule = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""L-SR1 with a trust region: s minimises g^T s + 1/2 s^T B s over ||s|| <= Delta exactly, B of SR1 pairs.

    B may be indefinite and is used as it is: the region follows negative curvature away from saddle points. The pair of
    s and the change y of the gradient enters the memory whether the step is taken or not; both gradients are of the one
    batch, so an iteration takes two. A step whose reduction ratio is not above ``acceptance`` is not taken.

    What the step does to the loss of the next batch says how Delta goes on, and a step that raises that far beyond what
    noise explains is undone. Where the batch stays the same, or with ``judged_by="same_batch"``, its own ratio says it,
    as in the paper.

    ``update`` takes ``at=``. Under ``optax.MultiSteps`` g is the mean over the mini-batches and the gradient behind the
    step that of the last one, so pairs mix batches: use larger batches in its place.

    Args:
        memory_size: m, pairs to keep, 5 if None; the paper finds 2 to 10 alike.
        scale: gamma of B_0 = gamma I, which the paper leaves open.
        initial_radius: Delta_0; by default the norm of the first gradient.
        rule: How Delta adapts; if None ``curvax.damping.next_batch_radius_rule()`` where batches change, and where they
            do not doubled above 3/4 for steps longer than 0.8 Delta and halved below 1/10. One that is given acts on
            both.
        acceptance: eta, in (0, 1e-3).
        judged_by: "next_batch" or "same_batch".
        skip_tolerance: r: pairs with |s^T (y - B s)| < r ||s|| ||y - B s|| are left out.

    Returns:
        The transformation. In ``state.info.extra``: ``hard_case``, the ``pairs`` in memory, and how many so far were
        left out, ``skipped_pairs``, or dropped later as the matrix was no longer well defined, ``dropped_pairs``; not
        counting updates that undo a step.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.lsr1()
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([[1.0], [3.0]]))
        >>> @jax.jit
        ... def step(w, state):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     return optax.apply_updates(w, updates), state
        >>> state = tx.init(w)
        >>> for _ in range(10):
        ...     w, state = step(w, state)
        >>> w.round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Ramamurthy and Duffy 2017, algorithm 1; Brust, Erway and Marcia 2017 for the subproblem.
    """
    check_arguments(lsr1, locals())
    following = next_batch_radius_rule()
    rule, judge = judging(judged_by, rule, RadiusRule(), following, measured=True)

    def step(given: Given) -> Step:
        start = trees.norm(given.gradient) if initial_radius is None else jnp.asarray(initial_radius)
        # From a stationary point any radius will do; that of zero is no region.
        start = jnp.where(start > 0, start, 1).astype(given.dtype)
        radius = jnp.where(given.steps == 0, start, given.strength)
        loss = given.at.loss.astype(given.dtype)
        packed = _Packed(given)
        taken = trust_region_step(
            packed.evaluate,
            loss,
            packed.gradient,
            packed.memory,
            radius,
            scale=given.number(scale),
            rule=rule,
            acceptance=given.number(acceptance),
            skip_tolerance=given.number(skip_tolerance),
        )
        # Of a step that is taken the next batch says what it was worth.
        reach = taken.reach if judge is None else jnp.where(taken.accepted, radius, taken.reach)
        figures = {"loss": loss, "radius": radius, "hard_case": taken.hard_case}
        return _step(given, packed, taken, figures, reach)

    return _transformation("lsr1", step, memory_size, 1.0, "hard_case", judge)


def lsr1_linesearch(
    *,
    memory_size: int | None = None,
    scale: optax.ScalarOrSchedule = 1.0,
    sufficient_decrease: optax.ScalarOrSchedule = 1e-4,
    judged_by: JudgedBy = "next_batch",
    skip_tolerance: optax.ScalarOrSchedule = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""L-SR1 with a line search: along -H g, with H of SR1 pairs (y, s), the inverse form.

    H may be indefinite. Where -H g points upwards, which the paper has no remedy for, it is turned round, and where it
    is orthogonal to the gradient, -g takes its place. The search starts from min(1, twice the last step size) and
    halves it until the loss falls by ``sufficient_decrease`` of what the slope promises. A step that raises the loss of
    the next batch far beyond what noise explains is undone, unless ``judged_by="same_batch"``.

    ``update`` takes ``at=``; wrappers are as for ``curvax.lsr1``.

    Args:
        memory_size: m, pairs to keep, 5 if None.
        scale: gamma; H_0 = I / gamma.
        judged_by: "next_batch" or "same_batch".
        skip_tolerance: r: pairs with |y^T (s - H y)| < r ||y|| ||s - H y|| are left out.

    Returns:
        The transformation, with ``turned``, ``pairs`` in memory, ``skipped_pairs`` and ``dropped_pairs`` in
        ``state.info.extra``, as ``curvax.lsr1`` has them.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.lsr1_linesearch()
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([[1.0], [3.0]]))
        >>> @jax.jit
        ... def step(w, state):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     return optax.apply_updates(w, updates), state
        >>> state = tx.init(w)
        >>> for _ in range(10):
        ...     w, state = step(w, state)
        >>> w.round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Ramamurthy and Duffy 2017, algorithm 2.
    """
    check_arguments(lsr1_linesearch, locals())
    # The search finds the step size by itself; behind a step that is undone it starts from half of what that had.
    keep = RadiusRule(grow=1.0, bad_ratio=-math.inf)
    _, judge = judging(judged_by, None, keep, keep, measured=True)

    def step(given: Given) -> Step:
        loss = given.at.loss.astype(given.dtype)
        packed = _Packed(given)
        taken = line_search_step(
            packed.evaluate,
            loss,
            packed.gradient,
            packed.memory,
            given.strength,
            scale=given.number(scale),
            sufficient_decrease=given.number(sufficient_decrease),
            skip_tolerance=given.number(skip_tolerance),
            loss_at=packed.loss_at,
        )
        figures = {"loss": loss, "step_size": taken.reach, "turned": taken.hard_case}
        return _step(given, packed, taken, figures, taken.reach)

    # The search of the first step starts from 1, twice this.
    return _transformation("lsr1_linesearch", step, memory_size, 0.5, "turned", judge)


def _transformation(name, step, memory_size, strength, flag, judge):
    def start(params: PyTree):
        return sr1_memory(params, static_count(name, "memory_size", memory_size, 5))

    extra = {flag: jnp.bool_, **dict.fromkeys(("pairs", "skipped_pairs", "dropped_pairs"), jnp.int32)}
    return stepper(name, step, start=start, strength=strength, extra=extra, judge=judge)


class _Packed:
    """What a step is computed from, with the small leaves joined."""

    def __init__(self, given: Given):
        self.packing = packing_of(given.gradient)
        self.gradient = self.packing.pack(given.gradient)
        self.memory = given.memory._replace(vectors=self.packing.pack(given.memory.vectors))
        self.at = given.at

    def loss_at(self, displacement: PyTree) -> Array:
        """The loss of the batch behind a displacement."""
        return self.at.loss_along(self.packing.unpack(displacement))

    def evaluate(self, displacement: PyTree) -> tuple[Array, PyTree]:
        """Loss and gradient behind a displacement."""
        loss, gradient = jax.value_and_grad(self.loss_at)(displacement)
        return loss, trees.cast_like(gradient, self.gradient)


def _step(given: Given, packed: _Packed, taken: SR1Step, figures: dict[str, Array], reach: Array) -> Step:
    unpack = packed.packing.unpack
    vectors = trees.cast_like(unpack(taken.memory.vectors), given.memory.vectors)
    figures |= {
        "new_loss": taken.new_loss,
        "predicted_change": taken.predicted_change,
        "step_ratio": taken.step_ratio,
        "update_norm": taken.step_norm,
        "pairs": jnp.sum(taken.memory.ages > 0),
        "skipped_pairs": given.info.extra["skipped_pairs"] + taken.skipped.astype(jnp.int32),
        "dropped_pairs": given.info.extra["dropped_pairs"] + taken.dropped,
    }
    # The memory of a step that is not finite is the old one already, and is the largest part of the state. That of a
    # batch on which the last step is undone holds true pairs as well.
    memory = taken.memory._replace(vectors=vectors)
    return Step(unpack(taken.step), figures, memory, reach, taken.accepted, taken.finite, guarded=True)
