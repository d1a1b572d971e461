"""Why an iterative solver stopped: integer codes that pass through ``jit`` and ``vmap``, and their text."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp


class StopReason(enum.IntEnum):
    """The codes in the ``reason`` field of the solvers' results; ``StopReason(int(reason)).text`` reads aloud.

    Example:
        >>> result = curvax.solvers.cg(lambda v: 2.0 * v, jnp.ones(3), max_iterations=5, tolerance=1e-6)
        >>> StopReason(int(result.reason)).text
        'the residual is within the tolerance'
    """

    MAX_ITERATIONS = 0
    CONVERGED = 1
    PROGRESS = 2
    MONITOR = 3
    NEGATIVE_CURVATURE = 4
    BOUNDARY = 5
    BREAKDOWN = 6
    NON_FINITE = 7

    @property
    def text(self) -> str:
        """One sentence about the code."""
        return STOP_REASONS[self]


STOP_REASONS: dict[Any, str] = {
    StopReason.MAX_ITERATIONS: "the maximum number of iterations was taken",
    StopReason.CONVERGED: "the residual is within the tolerance",
    StopReason.PROGRESS: "the relative progress of the quadratic model fell below the progress tolerance",
    StopReason.MONITOR: "the monitor asked to stop",
    StopReason.NEGATIVE_CURVATURE: "a search direction without positive curvature was met",
    StopReason.BOUNDARY: "the boundary of the trust region was reached",
    StopReason.BREAKDOWN: "r^T P^{-1} r was not positive: the preconditioner is not positive definite",
    StopReason.NON_FINITE: "a product, a preconditioned residual or the right-hand side was not finite",
}
"""The text of each ``StopReason``, by code."""


def first_reason(*cases: tuple[jax.Array, StopReason]) -> jax.Array:
    """The reason of the first case whose condition holds, or MAX_ITERATIONS, the code of a run that goes on."""
    conditions = [condition for condition, _ in cases]
    codes = [jnp.array(reason.value, jnp.int32) for _, reason in cases]
    return jnp.select(conditions, codes, jnp.array(StopReason.MAX_ITERATIONS.value, jnp.int32))
