"""Checks of arguments that are numbers or names; ``curvax.trees`` has those of pytrees."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.errors import TracerIntegerConversionError

from curvax.types import Array


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_drawn(what: str, key: Any, num_samples: int | None) -> None:
    """Raises a ValueError unless there are both a key and a positive number of samples, or neither."""
    if (key is None) != (num_samples is None):
        raise ValueError(
            f"{what} takes both key= and num_samples= where it is estimated, and neither where it is exact"
        )
    if num_samples is not None:
        check_at_least("num_samples", num_samples, 1)


def check_at_least(name: str, value: Any, least: int) -> int | Array:
    """The count as a Python integer, or as an int32 where it is traced, as from ``optax.inject_hyperparams``.

    Raises:
        ValueError: It is too small; a traced one cannot be checked.
    """
    try:
        count = operator.index(value)
    except TracerIntegerConversionError:
        return jnp.asarray(value, jnp.int32)
    if count < least:
        raise ValueError(f"{name} is {count}; it must be at least {least}")
    return count
