"""Checks of arguments that are numbers or names; ``curvax.trees`` has those of pytrees."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from jax.errors import TracerIntegerConversionError


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raises a ValueError for a count that is too small; a traced one cannot be checked."""
    count = static_count(value)
    if count is not None and count < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def static_count(value: Any) -> int | None:
    """A count as a Python integer; None where it is known at run time only, as from ``optax.inject_hyperparams``."""
    try:
        return operator.index(value)
    except TracerIntegerConversionError:
        return None
