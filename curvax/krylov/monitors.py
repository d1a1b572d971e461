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

    Args:
        objective: x -> h, the objective at the parameters plus x, a scalar.
        initial_value: h(0), the objective at the parameters.
        fraction: Martens takes 0.9.
        period: The objective is evaluated at every ``period``-th iterate.


    Source: Martens 2016, section 4.13 (the recurrent-network runs).
    """
    start = _scalar(initial_value)

    def update(largest, x, iteration):
        def look(largest):
            reduction = start - objective(x).astype(start.dtype)
            largest = jnp.maximum(largest, reduction)
            # A warm start may begin with an objective above h(0); the run ends only after a reduction has been seen.
            return largest, (largest > 0) & ~(reduction >= jnp.asarray(fraction, start.dtype) * largest)

        return jax.lax.cond(iteration % period == 0, look, _carry_on, largest)

    return Monitor(update, jnp.zeros_like(start))


def lookback_monitor(
    objective: Callable[[PyTree], Array],
    initial_value: Scalar,
    *,
    window: int = 10,
    margin: Scalar = 0.0,
    period: int = 1,
) -> Monitor:
    """Stops once the objective is worse than it was ``window`` iterates ago; its values since then are the state.

    Args:
        objective: x -> h, the objective at the parameters plus x on the curvature batch, a scalar.
        initial_value: h(0), the objective at the parameters; sets the scale of ``margin`` and the dtype.
        window: How many iterates to look back; Martens takes about 10.
        margin: Worse by more than ``margin * |h(0)|`` counts.
        period: The objective is evaluated at every ``period``-th iterate, and the window rounded to a multiple of it.


    Source: Martens 2016, section 4.11 (the second recipe).
    """
    start = _scalar(initial_value)
    allowance = jnp.asarray(margin, start.dtype) * jnp.abs(start)

    def update(values, x, iteration):
        def look(values):
            value = objective(x).astype(start.dtype)
            return jnp.append(values[1:], value), ~(value <= values[0] + allowance)

        return jax.lax.cond(iteration % period == 0, look, _carry_on, values)

    return Monitor(update, jnp.full((max(1, round(window / period)),), jnp.inf, start.dtype))


def _scalar(value):
    value = jnp.asarray(value)
    return value.astype(trees.wide_dtype(value))


def _carry_on(state):
    return state, jnp.zeros((), bool)
