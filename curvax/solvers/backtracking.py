"""The choice among stored conjugate-gradient iterates by the objective itself, which the last need not be best for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.krylov.conjugate_gradient import StoredIterates
from curvax.solvers.line_search import LineSearch, Shortening
from curvax.types import Array, PyTree, Scalar

Choice = Literal["walk", "best", "last"]


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
    return _chosen(stored, objective, initial_value, "walk")


def best_stored(
    stored: StoredIterates, objective: Callable[[PyTree], Array], initial_value: Scalar | None = None
) -> BacktrackResult:
    """The stored iterate with the lowest objective, all of them evaluated; arguments as for ``backtrack``.

    In Martens's second recipe the objective is on data that the curvature was not taken from.

    Source: Martens 2016, section 4.11.
    """
    return _chosen(stored, objective, initial_value, "best")


def last_stored(
    stored: StoredIterates, objective: Callable[[PyTree], Array], initial_value: Scalar | None = None
) -> BacktrackResult:
    """The last iterate, with the objective there; no choice at all. Arguments as for ``backtrack``."""
    return _chosen(stored, objective, initial_value, "last")


def choose_and_search(
    stored: StoredIterates,
    objective: Callable[[PyTree], Array],
    initial_value: Scalar,
    gradient: PyTree,
    *,
    choice: Choice = "walk",
    sufficient_decrease: Scalar = 1e-2,
    shrink: Scalar = 0.8,
    max_tries: int = 60,
) -> tuple[BacktrackResult, LineSearch]:
    """The choice among stored iterates, and ``backtracking_line_search`` along the one that was chosen.

    The same as one after the other, in one loop, so that the objective is in the compiled program once; an objective
    that is not a number counts as infinite. Source: Martens 2016, sections 4.6.7 and 4.6.8.

    Args:
        stored: As for ``backtrack``, and so are ``objective`` and ``initial_value``.
        gradient: g, for the slope g^T x of the objective along an iterate x.
        choice: "walk" for ``backtrack``, "best" for ``best_stored``, "last" for ``last_stored``.
        sufficient_decrease: As for ``backtracking_line_search``, and so are ``shrink`` and ``max_tries``.

    Example:
        >>> loss = lambda x: jnp.sum((x - 0.2) ** 2)
        >>> stored = curvax.solvers.cg(lambda v: v, jnp.ones(1), max_iterations=1, tolerance=0.0, store_at=(1,)).stored
        >>> chosen, search = curvax.solvers.choose_and_search(stored, loss, loss(0.0), jnp.array([-0.4]), choice="last")
        >>> chosen.value.item(), round(search.step_size.item(), 3), search.found.item()      # from 1 by factors of 0.8
        (1.0, 0.328, True)
    """
    slopes = jax.vmap(trees.vdot, in_axes=(0, None))(stored.values, gradient)

    def rule(walk):
        slope = jnp.where(_stays(walk, initial_value, choice), 0, slopes[walk.best]).astype(walk.value.dtype)
        return Shortening(initial_value, slope, sufficient_decrease, shrink, max_tries)

    def goes_on(carry):
        walk, trial = carry
        return _walks(walk, stored, choice) | rule(walk).goes_on(trial)

    def step(carry):
        walk, trial = carry
        walking = _walks(walk, stored, choice)
        slot = jnp.where(walking, walk.slot - 1, walk.best)
        row = blocks.row(stored.values, slot)
        shorter = rule(walk).next(
            trial, lambda step_size: _value(objective, trees.scale(jnp.where(walking, 1, step_size), row))
        )
        walked = _seen(walk, shorter.value, initial_value, choice)
        first = jnp.where(_stays(walked, initial_value, choice), initial_value, walked.value)
        return trees.where(walking, (walked, rule(walked).begun(1, first)), (walk, shorter))

    walk = _behind_the_last(stored, objective)
    walk, trial = jax.lax.while_loop(goes_on, step, (walk, rule(walk).begun(1, walk.value)))
    return _result(stored, walk, initial_value, choice), rule(walk).result(trial)


class _Walk(NamedTuple):
    """Which slot was evaluated last, the best so far and the objective there, and how many were."""

    slot: Array
    best: Array
    value: Array
    evaluations: Array


def _chosen(stored, objective, initial_value, choice):
    def step(walk):
        value = _value(objective, blocks.row(stored.values, walk.slot - 1))
        return _seen(walk, value, initial_value, choice)

    walk = jax.lax.while_loop(lambda walk: _walks(walk, stored, choice), step, _behind_the_last(stored, objective))
    return _result(stored, walk, initial_value, choice)


def _behind_the_last(stored, objective):
    """Where all begin, so that the objective stands in the program once."""
    behind = _last(stored) + 1
    dtype = jax.eval_shape(lambda: _value(objective, blocks.row(stored.values, behind))).dtype
    return _Walk(behind, behind, jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32))


def _walks(walk, stored, choice):
    """Whether another iterate is to be looked at."""
    if choice == "last":
        return walk.slot > _last(stored)
    return (walk.slot > 0) & ((walk.slot == walk.best) | (choice == "best"))


def _seen(walk, value, initial_value, choice):
    """The walk with the value at the slot before."""
    if choice == "best":
        better = value <= walk.value
    else:  # an objective above where it began, or infinite, says nothing about where to stop
        better = (value < walk.value) | ~jnp.isfinite(walk.value) | _above(walk.value, initial_value)
    slot, value = walk.slot - 1, jnp.where(better, value, walk.value)
    return _Walk(slot, jnp.where(better, slot, walk.best), value, walk.evaluations + 1)


def _stays(walk, initial_value, choice):
    return jnp.array(False) if choice == "last" else _above(walk.value, initial_value)


def _last(stored):
    return jnp.maximum(stored.used - 1, 0)


def _value(objective, x):
    value = objective(x)
    return jnp.where(jnp.isnan(value), jnp.inf, value)


def _above(value, initial_value):
    if initial_value is None:
        return jnp.array(False)
    initial_value = jnp.asarray(initial_value, value.dtype)
    return ~(value <= initial_value + 10 * jnp.finfo(value.dtype).eps * jnp.abs(initial_value))


def _result(stored, walk, initial_value, choice):
    chosen = BacktrackResult(
        blocks.row(stored.values, walk.best),
        stored.iterations[walk.best],
        stored.model_values[walk.best],
        walk.value,
        walk.evaluations,
        jnp.array(False),
    )
    if initial_value is None or choice == "last":
        return chosen
    here = trees.zeros_like(chosen)._replace(
        objective=jnp.asarray(initial_value, walk.value.dtype), evaluations=walk.evaluations, stayed=jnp.array(True)
    )
    return trees.where(_stays(walk, initial_value, choice), here, chosen)
