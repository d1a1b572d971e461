"""Rules of the caller's own that watch the iterates of ``cg``, and the two that Martens uses.

They let the objective itself, not its quadratic model, end a run. Mind the feedback that this makes with damping
adapted by the reduction ratio: the length of the run, the ratio and the damping can all collapse or creep up together
(Martens 2016, section 4.6.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.types import Array, PyTree, Scalar


class Monitor(NamedTuple):
    """A rule that sees every iterate of ``cg``.

    Attributes:
        update: (state, x, iteration) -> (state, stop), with x the iterate in the dtypes of b, ``iteration`` its number
            from 1, the new state of the same shapes and dtypes, and stop a boolean scalar.
        state: The initial state, a pytree of arrays. The final one is ``CGResult.monitor_state``.

    Example:
        >>> stop_when_long = Monitor(lambda longest, x, i: (longest, jnp.linalg.norm(x) > longest), jnp.array(1.0))
        >>> result = curvax.solvers.cg(
        ...     lambda v: v / 4, jnp.ones(3), max_iterations=9, tolerance=0.0, monitor=stop_when_long
        ... )
        >>> result.iterations.item()
        1
    """

    update: Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]]
    state: PyTree


def reduction_monitor(
    objective: Callable[[PyTree], Array], initial_value: Scalar, *, fraction: Scalar = 0.9, period: int = 1
) -> Monitor:
    """Stops once the reduction h(0) - h(x) falls below a fraction of the largest one seen in this run, its state.

    A warm start may begin with an objective above h(0), a reduction below zero, and is let go on as long as it
    improves: it stops once it is worse than the best seen by the same share of that. So it does not matter for how long
    a run only rose.

    Args:
        objective: x -> h, the objective at the parameters plus x, a scalar.
        initial_value: h(0), the objective at the parameters.
        fraction: Martens takes 0.9.
        period: The objective is evaluated at every ``period``-th iterate.


    Source: Martens 2016, section 4.13 (the recurrent-network runs).
    """
    start = _scalar(initial_value)
    loss = 1 - jnp.asarray(fraction, start.dtype)

    def update(largest, x, iteration):
        def look(largest):
            reduction = start - objective(x).astype(start.dtype)
            largest = jnp.maximum(largest, reduction)
            return largest, ~(reduction >= largest - loss * jnp.abs(largest))

        return jax.lax.cond(iteration % period == 0, look, _carry_on, largest)

    return Monitor(update, jnp.full_like(start, -jnp.inf))


def lookback_monitor(
    objective: Callable[[PyTree], Array],
    initial_value: Scalar,
    *,
    window: int = 10,
    margin: Scalar = 0.1,
    period: int = 1,
) -> Monitor:
    """Stops once the objective is significantly worse than ``window`` iterates ago; its values since are the state.

    Args:
        objective: x -> h, the objective at the parameters plus x on the curvature batch, a scalar.
        initial_value: h(0), the objective at the parameters.
        window: How many iterates to look back; Martens takes about 10.
        margin: Worse by more than this share of the reduction that there was then counts. Martens leaves open what is
            significant; this is what ``reduction_monitor`` takes for it.
        period: The objective is evaluated at every ``period``-th iterate, and the window rounded to a multiple of it.


    Source: Martens 2016, section 4.11 (the second recipe).
    """
    start = _scalar(initial_value)
    margin = jnp.asarray(margin, start.dtype)

    def update(values, x, iteration):
        def look(values):
            value, before = objective(x).astype(start.dtype), values[0]
            limit = jnp.where(jnp.isinf(before), before, before + margin * jnp.abs(start - before))
            return jnp.append(values[1:], value), ~(value <= limit)

        return jax.lax.cond(iteration % period == 0, look, _carry_on, values)

    return Monitor(update, jnp.full((max(1, round(window / period)),), jnp.inf, start.dtype))


def _scalar(value):
    value = jnp.asarray(value)
    return value.astype(trees.wide_dtype(value))


def _carry_on(state):
    return state, jnp.zeros((), bool)
