"""What the transformations' states have in common: an info of scalars, and steps that are skipped and counted."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from curvax import trees

PyTree = Any
Info = TypeVar("Info", bound=tuple[Any, ...])


class StateWithInfo(Protocol):
    """A NamedTuple state whose ``info`` counts ``skipped_steps``."""

    @property
    def info(self) -> Any: ...

    def _replace(self, **fields: Any) -> Any: ...


def empty_info(kind: type[Info], dtype: Any, **dtypes: Any) -> Info:
    """An info of zeros of one dtype but for the fields named; a buffer for each, so that states can be donated."""
    fields: tuple[str, ...] = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
    return kind(*(jnp.zeros((), dtypes.get(name, dtype)) for name in fields))  # pyright: ignore[reportCallIssue]


def finish(finite: jax.Array, updates: PyTree, taken: Any, state: StateWithInfo) -> tuple[PyTree, Any]:
    """The step if it is finite, else zero updates and the old state with one more skipped step.

    Args:
        finite: Whether everything that entered the step is finite.
        updates: The updates of the step.
        taken: The state after it.
        state: The state before it.
    """
    skipped_steps = optax.safe_increment(state.info.skipped_steps)
    skipped = state._replace(info=state.info._replace(skipped_steps=skipped_steps))
    return trees.where(finite, updates, trees.zeros_like(updates)), trees.where(finite, taken, skipped)


def next_count(count: jax.Array) -> jax.Array:
    """count + 1, without overflow."""
    return jnp.asarray(optax.safe_increment(count))


def step_key(key: jax.Array, count: jax.Array) -> jax.Array:
    """The PRNG key of a step, from raw key data in the state and the number of the step."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), count)
