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
    slope: Array  # f'(0)


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
    rule = Shortening(start, slope, sufficient_decrease, shrink, max_tries)
    initial = jnp.asarray(initial, slope.dtype)
    begun = rule.begun(initial, loss_at(initial) if first is None else first)
    return rule.result(jax.lax.while_loop(rule.goes_on, lambda trial: rule.next(trial, loss_at), begun))


class Trial(NamedTuple):
    """A step size, the loss there, and how many were tried before."""

    step_size: Array
    value: Array
    tries: Array


class Shortening:
    """The search as a rule on trials, for loops that have more to do: f(0), f'(0), c, rho and the most tries."""

    def __init__(self, start: Scalar, slope: Array, sufficient_decrease: Scalar, shrink: Scalar, max_tries: Scalar):
        self.slope, self.max_tries = slope, jnp.asarray(max_tries, jnp.int32)
        numbers = start, sufficient_decrease, shrink
        self.start, self.sufficient_decrease, self.shrink = (jnp.asarray(x, slope.dtype) for x in numbers)

    def begun(self, step_size: Scalar, value: Scalar) -> Trial:
        """The first trial."""
        dtype = self.slope.dtype
        return Trial(jnp.asarray(step_size, dtype), jnp.asarray(value, dtype), jnp.zeros((), jnp.int32))

    def goes_on(self, trial: Trial) -> Array:
        """Whether a shorter step is to be tried."""
        return ~self.sufficient(trial) & (self.slope <= 0) & (trial.tries < self.max_tries)

    def next(self, trial: Trial, loss_at: Callable[[Array], Array]) -> Trial:
        """The next trial."""
        step_size = self.shrink * trial.step_size
        return Trial(step_size, jnp.asarray(loss_at(step_size), self.slope.dtype), trial.tries + 1)

    def sufficient(self, trial: Trial) -> Array:
        """Whether the loss has fallen enough."""
        bound = self.start + self.sufficient_decrease * trial.step_size * self.slope
        return (trial.value <= bound) & (self.slope <= 0)

    def result(self, trial: Trial) -> LineSearch:
        """What the search has come to."""
        return LineSearch(trial.step_size, trial.value, self.sufficient(trial), self.slope)
