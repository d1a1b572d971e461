"""L-SR1: limited-memory symmetric rank-one quasi-Newton methods, by a trust region or by a line search."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.damping.rules import RadiusRule
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.quasi_newton import SR1Memory, SR1Step, line_search_step, sr1_memory, trust_region_step
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count

PyTree = Any
Array = jax.Array


class LSR1Info(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        loss: h(theta) before the step.
        new_loss: h(theta + s), whether the step was taken or not.
        predicted_change: The change of the quadratic model along s; of a line search, half the slope's.
        step_ratio: The actual over the predicted change; -inf where the step failed.
        radius: Delta that the step was computed with; of a line search, the step size.
        gradient_norm: The norm of the incoming gradient.
        update_norm: The norm of s.
        accepted: Whether the step was taken.
        hard_case: Whether the trust-region problem was in its hard case; for a line search, whether the direction
            pointed upwards and was turned round.
        pairs: How many pairs the memory holds.
        skipped_pairs: How many pairs so far were left out of the memory.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    loss: Array
    new_loss: Array
    predicted_change: Array
    step_ratio: Array
    radius: Array
    gradient_norm: Array
    update_norm: Array
    accepted: Array
    hard_case: Array
    pairs: Array
    skipped_pairs: Array
    skipped_steps: Array


class LSR1State(NamedTuple):
    """State of ``lsr1`` and ``lsr1_linesearch``.

    Attributes:
        steps: Steps so far.
        strategy: The radius for the next step, or the last step size of the line search.
        memory: The pairs.
        info: Figures of the last step.
    """

    steps: Array
    strategy: Array
    memory: SR1Memory
    info: LSR1Info


def lsr1(
    objective: Objective,
    *,
    memory_size: int = 5,
    scale: float = 1.0,
    initial_radius: float | None = None,
    rule: RadiusRule | None = None,
    acceptance: float = 1e-4,
    skip_tolerance: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""L-SR1 with a trust region: s minimises g^T s + 1/2 s^T B s over ||s|| <= Delta exactly, B of SR1 pairs.

    B may be indefinite and is used as it is: the region follows negative curvature away from saddle points. The pair of
    s and the change y of the gradient enters the memory whether the step is taken or not; both gradients are of the one
    batch, so an iteration takes two. A step whose reduction ratio is not above ``acceptance`` is not taken.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=``, the third result of
    ``objective.value_and_grad``, or ``batch=``. Inside ``optax.masked`` and ``optax.partition`` (with ``at=``) it acts
    on the leaves it is given. Under ``optax.MultiSteps`` g is the mean over the mini-batches and the gradient behind
    the step that of the last one, so pairs mix batches: use larger batches in its place. A step in which anything is
    not finite is skipped and counted.

    Args:
        objective: The objective.
        memory_size: m, pairs to keep; the paper finds 2 to 10 alike.
        scale: gamma of B_0 = gamma I, which the paper leaves open.
        initial_radius: Delta_0; by default the norm of the first gradient.
        rule: How Delta adapts; by default doubled above 3/4 for steps longer than 0.8 Delta, halved below 1/10.
        acceptance: eta, in (0, 1e-3).
        skip_tolerance: r: pairs with |s^T (y - B s)| < r ||s|| ||y - B s|| are left out.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.lsr1(objective)
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
    rule = RadiusRule() if rule is None else rule

    def step(at, updates, state):
        start = trees.norm(updates) if initial_radius is None else jnp.asarray(initial_radius)
        # From a stationary point any radius will do; that of zero is no region.
        start = jnp.where(start > 0, start, 1).astype(state.strategy.dtype)
        radius = jnp.where(state.steps == 0, start, state.strategy)
        (evaluate, _), loss = _around(at, updates), at.loss.astype(state.strategy.dtype)
        options = {"scale": scale, "rule": rule, "acceptance": acceptance, "skip_tolerance": skip_tolerance}
        return trust_region_step(evaluate, loss, updates, state.memory, radius, **options), radius, loss

    return _transformation("lsr1", objective, memory_size, 1.0, step)


def lsr1_linesearch(
    objective: Objective,
    *,
    memory_size: int = 5,
    scale: float = 1.0,
    sufficient_decrease: float = 1e-4,
    skip_tolerance: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""L-SR1 with a line search: along -H g, with H of SR1 pairs (y, s), the inverse form.

    H may be indefinite. Where -H g points upwards, which the paper has no remedy for, it is turned round, and where it
    is orthogonal to the gradient, -g takes its place. The search starts from min(1, twice the last step size) and
    halves it until the loss falls by ``sufficient_decrease`` of what the slope promises.

    The incoming updates are read as the gradient g of the objective. ``update`` takes ``at=`` or ``batch=``; wrappers
    are as for ``curvax.lsr1``.

    Args:
        objective: The objective.
        memory_size: m, pairs to keep.
        scale: gamma; H_0 = I / gamma.
        sufficient_decrease: c of Armijo's rule.
        skip_tolerance: r: pairs with |y^T (s - H y)| < r ||y|| ||s - H y|| are left out.

    Returns:
        The transformation; its updates are ready for ``optax.apply_updates``. ``state.info`` holds the figures.

    Raises:
        ValueError: ``update`` got neither or both of ``at=`` and ``batch=``, or updates that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.lsr1_linesearch(objective)
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

    def step(at, updates, state):
        (evaluate, loss_at), loss = _around(at, updates), at.loss.astype(state.strategy.dtype)
        taken = line_search_step(
            evaluate,
            loss,
            updates,
            state.memory,
            state.strategy,
            scale=scale,
            sufficient_decrease=sufficient_decrease,
            skip_tolerance=skip_tolerance,
            loss_at=loss_at,
        )
        return taken, taken.reach, loss

    # The search of the first step starts from 1, twice this.
    return _transformation("lsr1_linesearch", objective, memory_size, 0.5, step)


def _transformation(name, objective, memory_size, strategy, step):
    def init(params: PyTree) -> LSR1State:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        whole = dict.fromkeys(("pairs", "skipped_pairs", "skipped_steps"), jnp.int32)
        flags = dict.fromkeys(("accepted", "hard_case"), jnp.bool_)
        return LSR1State(
            steps=jnp.zeros((), jnp.int32),
            strategy=jnp.full((), strategy, dtype),
            memory=sr1_memory(params, memory_size),
            info=empty_info(LSR1Info, dtype, **whole, **flags),
        )

    def update(
        updates: PyTree,
        state: LSR1State,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, LSR1State]:
        del extra
        at = point_for_update(name, objective, updates, params, at, batch)
        dtype = state.strategy.dtype
        taken: SR1Step
        taken, radius, loss = step(at, updates, state)
        info = LSR1Info(
            loss=loss,
            new_loss=taken.new_loss,
            predicted_change=taken.predicted_change,
            step_ratio=taken.step_ratio,
            radius=radius,
            gradient_norm=trees.norm(updates).astype(dtype),
            update_norm=taken.step_norm,
            accepted=taken.accepted,
            hard_case=taken.hard_case,
            pairs=jnp.sum(taken.memory.ages > 0).astype(jnp.int32),
            skipped_pairs=state.info.skipped_pairs + taken.skipped.astype(jnp.int32),
            skipped_steps=state.info.skipped_steps,
        )
        moved = trees.where(taken.accepted, taken.step, trees.zeros_like(taken.step))
        after = LSR1State(next_count(state.steps), taken.reach, taken.memory, info)
        # The memory of a step that is not finite is the old one already: not to be selected, it is the largest part.
        return finish(taken.finite, moved, after, state._replace(memory=taken.memory))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _around(at, like):
    """From a displacement of the leaves of ``like``: to (loss, gradient in them), and to the loss, on the batch."""

    def loss_at(displacement):
        return at.loss_at(trees.add(at.params, trees.embed(displacement, at.params)))

    def evaluate(displacement):
        loss, gradient = jax.value_and_grad(loss_at)(displacement)
        return loss, trees.cast_like(gradient, like)

    return evaluate, loss_at
