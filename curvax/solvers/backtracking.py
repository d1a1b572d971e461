"""The choice among stored conjugate-gradient iterates by the objective itself, which the last need not be best for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.krylov.conjugate_gradient import StoredIterates
from curvax.types import Array, PyTree, Scalar


class BacktrackResult(NamedTuple):
    """The chosen iterate, its number, q and the objective there, and how often the objective was evaluated."""

    value: PyTree
    iteration: Array
    model_value: Array
    objective: Array
    evaluations: Array
    stayed: Array  # whether it is x = 0 because no iterate that was looked at is better


def backtrack(
    stored: StoredIterates, objective: Callable[[PyTree], Array], initial_value: Scalar | None = None
) -> BacktrackResult:
    """Goes from the last stored iterate backwards for as long as the objective improves.

    Along a run of conjugate gradients the quadratic model always improves, but the objective may have been best long
    before the end. A last iterate where the objective is not finite counts as worst. Source: Martens 2016, sections
    4.6.7 and 4.11.

    Args:
        stored: ``CGResult.stored``, of a run with ``store_at``.
        objective: x -> h, the objective at the parameters plus x, a scalar; a representative part of the data will do.
        initial_value: h(0) on the same data. If given, x = 0 is a candidate, as iterate 0: no iterate that is above it
            by more than ten units of rounding is chosen, nor does one stop the walk.


    Example:
        >>> result = curvax.solvers.cg(
        ...     lambda v: jnp.array([1.0, 2.0, 3.0]) * v, jnp.ones(3), max_iterations=3, tolerance=0.0, store_at=(1, 2)
        ... )
        >>> chosen = curvax.solvers.backtrack(result.stored, lambda x: (jnp.linalg.norm(x) - 1.0) ** 2)
        >>> chosen.iteration.item(), chosen.evaluations.item()
        (2, 3)
    """

    def walking(carry):
        slot, best, _, _ = carry
        return (slot == best) & (slot > 0)

    def step_back(carry):
        slot, best, value, evaluations = carry
        earlier = _evaluated(stored, objective, slot - 1)
        # An objective above where it began, or infinite, says nothing about where to stop.
        better = (earlier < value) | ~jnp.isfinite(value) | _above(value, initial_value)
        return slot - 1, jnp.where(better, slot - 1, best), jnp.where(better, earlier, value), evaluations + 1

    # From behind the last, so that the objective stands in the program once.
    behind = _last(stored) + 1
    nothing = jnp.full((), jnp.inf, jax.eval_shape(lambda: _evaluated(stored, objective, behind)).dtype)
    start = (behind, behind, nothing, jnp.zeros((), jnp.int32))
    _, best, value, evaluations = jax.lax.while_loop(walking, step_back, start)
    return _chosen(stored, best, value, evaluations, initial_value)


def best_stored(
    stored: StoredIterates, objective: Callable[[PyTree], Array], initial_value: Scalar | None = None
) -> BacktrackResult:
    """The stored iterate with the lowest objective, all of them evaluated; arguments as for ``backtrack``.

    In Martens's second recipe the objective is on data that the curvature was not taken from.

    Source: Martens 2016, section 4.11.
    """
    slots = jnp.arange(stored.iterations.size, dtype=jnp.int32)
    values = jax.lax.map(lambda slot: _evaluated(stored, objective, slot), slots)
    values = jnp.where(slots <= _last(stored), values, jnp.inf)
    best = jnp.argmin(values)
    return _chosen(stored, best, values[best], stored.used, initial_value)


def last_stored(
    stored: StoredIterates, objective: Callable[[PyTree], Array], initial_value: Scalar | None = None
) -> BacktrackResult:
    """The last iterate, with the objective there; no choice at all. Arguments as for ``backtrack``."""
    del initial_value
    last = _last(stored)
    return _chosen(stored, last, _evaluated(stored, objective, last), jnp.ones((), jnp.int32), None)


def _last(stored):
    return jnp.maximum(stored.used - 1, 0)


def _evaluated(stored, objective, slot):
    value = objective(blocks.row(stored.values, slot))
    return jnp.where(jnp.isnan(value), jnp.inf, value)


def _above(value, initial_value):
    if initial_value is None:
        return jnp.array(False)
    initial_value = jnp.asarray(initial_value, value.dtype)
    return ~(value <= initial_value + 10 * jnp.finfo(value.dtype).eps * jnp.abs(initial_value))


def _chosen(stored, slot, value, evaluations, initial_value):
    chosen = BacktrackResult(
        blocks.row(stored.values, slot),
        stored.iterations[slot],
        stored.model_values[slot],
        value,
        jnp.asarray(evaluations),
        jnp.array(False),
    )
    if initial_value is None:
        return chosen
    here = trees.zeros_like(chosen)._replace(
        objective=jnp.asarray(initial_value, value.dtype), evaluations=chosen.evaluations, stayed=jnp.array(True)
    )
    return trees.where(_above(value, initial_value), here, chosen)
