"""Why an iterative solver stopped: integer codes that pass through ``jit`` and ``vmap``, and their text."""

from __future__ import annotations

import enum

import jax.numpy as jnp

from curvax.types import Array


class Reason(enum.IntEnum):
    """An integer code with one sentence about it."""

    text: str

    def __new__(cls, code: int, text: str = ""):
        self = int.__new__(cls, code)
        self._value_, self.text = code, text
        return self


class StopReason(Reason):
    """The codes in the ``reason`` field of the solvers' results; ``StopReason(int(reason)).text`` reads aloud.

    Example:
        >>> result = curvax.solvers.cg(lambda v: 2.0 * v, jnp.ones(3), max_iterations=5, tolerance=1e-6)
        >>> StopReason(int(result.reason)).text
        'the residual is within the tolerance'
    """

    MAX_ITERATIONS = 0, "the maximum number of iterations was taken"
    CONVERGED = 1, "the residual is within the tolerance"
    PROGRESS = 2, "the relative progress of the quadratic model fell below the progress tolerance"
    MONITOR = 3, "the monitor asked to stop"
    NEGATIVE_CURVATURE = 4, "a search direction without positive curvature was met"
    BOUNDARY = 5, "the boundary of the trust region was reached"
    BREAKDOWN = 6, "r^T P^{-1} r was not positive: the preconditioner is not positive definite"
    NON_FINITE = 7, "a product, a preconditioned residual or the right-hand side was not finite"


def first_reason(*cases: tuple[Array, StopReason]) -> Array:
    """The reason of the first case whose condition holds, or MAX_ITERATIONS, the code of a run that goes on."""
    # XLA copies the expression into every kernel that asks for the reason, but packed runs have few leaves.
    first = jnp.array(StopReason.MAX_ITERATIONS.value, jnp.int32)
    for condition, reason in reversed(cases):
        first = jnp.where(condition, jnp.array(reason.value, jnp.int32), first)
    return first
