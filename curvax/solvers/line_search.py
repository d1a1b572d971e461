"""A line search by backtracking."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.types import Array, Scalar


class LineSearch(NamedTuple):
    """The last step size that was tried and the loss there."""

    step_size: Array
    value: Array
    found: Array  # whether it falls enough; if not, no step should be taken


def backtracking_line_search(
    loss_at: Callable[[Array], Array],
    start: Scalar,
    slope: Scalar,
    *,
    sufficient_decrease: Scalar = 1e-4,
    shrink: Scalar = 0.5,
    max_tries: Scalar = 30,
    initial: Scalar = 1.0,
    first: Scalar | None = None,
) -> LineSearch:
    r"""The first a of a_0, rho a_0, rho^2 a_0 ... at which the loss has fallen enough, f(a) <= f(0) + c a f'(0).

    A loss that is not a number has not fallen. An ascent direction is never followed, however little it rises, and
    costs no search. Source: Nocedal and Wright 2006, algorithm 3.1; Martens 2016, section 4.6.8.

    Args:
        loss_at: a -> f(a), along the direction.
        start: f(0); what is added to it, such as a few roundings, the loss may miss its aim by.
        slope: f'(0), not positive along a descent direction. Its dtype is that of the search.
        sufficient_decrease: c of Armijo's rule, from 0 to 1.
        shrink: rho, below 1.
        max_tries: The most step sizes to try after the first.
        first: f(a_0), where it is known.

    Example:
        >>> search = curvax.solvers.backtracking_line_search(lambda a: (a - 0.2) ** 2, 0.04, jnp.array(-0.4))
        >>> search.step_size.item(), search.found.item()                                    # 1 and 1/2 lead too far up
        (0.25, True)
    """
    slope = jnp.asarray(slope)
    start, sufficient_decrease, shrink, initial = (
        jnp.asarray(x, slope.dtype) for x in (start, sufficient_decrease, shrink, initial)
    )

    def sufficient(step_size, value):
        return (value <= start + sufficient_decrease * step_size * slope) & (slope <= 0)

    def searching(carry):
        step_size, value, tries = carry
        return ~sufficient(step_size, value) & (slope <= 0) & (tries < jnp.asarray(max_tries, jnp.int32))

    def shorten(carry):
        step_size, _, tries = carry
        step_size = shrink * step_size
        return step_size, jnp.asarray(loss_at(step_size), slope.dtype), tries + 1

    first = jnp.asarray(loss_at(initial) if first is None else first, slope.dtype)
    step_size, value, _ = jax.lax.while_loop(searching, shorten, (initial, first, jnp.zeros((), jnp.int32)))
    return LineSearch(step_size, value, sufficient(step_size, value))
