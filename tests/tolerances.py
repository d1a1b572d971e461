r"""Where a tolerance comes from: the number of roundings on the way to a result, not the error that one machine made.

A rounding changes a number by a factor of at most 1 + u, with the unit roundoff u = eps / 2. Processors differ in the
order of sums and in fused multiply-adds, hence in the error, but not in the bound: n roundings in a row change a result
by at most gamma_n = n u / (1 - n u) of the sum of the magnitudes that went into it (Higham 2002, Accuracy and stability
of numerical algorithms, lemma 3.1). Typical errors are near sqrt(n) u, so a test that keeps to its bound has room.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def rounding(dtype: Any, operations: int, scale: float = 1.0, condition: float = 1.0) -> float:
    r"""The most that rounding can change a result by, condition * scale * gamma_n.

    Args:
        dtype: The dtype that was computed in.
        operations: n, the roundings in a row: the length of a sum of products; of sums behind one another, their total
            length; n for an elimination or a triangular solve of size n.
        scale: The magnitudes that went into the result: ||A|| ||x|| of a product A x, the largest eigenvalue of a
            matrix whose eigenvalues are compared. 1 for a relative tolerance of a sum without cancellation.
        condition: By how much the problem magnifies a relative change of its data: the condition number of a system
            that is solved, 1 for eigenvalues of a symmetric matrix.

    Returns:
        The absolute tolerance.

    Raises:
        ValueError: So many roundings leave no digit.

    Example:
        >>> bool(abs(jnp.sum(jnp.full(100, 0.1, jnp.float32)) - 10) <= rounding(jnp.float32, 100, scale=10))
        True
    """
    accumulated = operations * float(jnp.finfo(dtype).eps) / 2
    if accumulated >= 1:
        raise ValueError(f"{operations} roundings in {jnp.dtype(dtype).name} leave no digit to compare")
    return condition * scale * accumulated / (1 - accumulated)
