"""Inverses of symmetric positive definite matrices that are formed: one function, several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from curvax.types import Array


def inverse_of(matrix: Array, method: str, previous: Array) -> Array:
    """The inverse of a stack of symmetric positive definite matrices (blocks, n, n), or of diagonals (blocks, n)."""
    if matrix.ndim == 2:
        return 1 / matrix
    del method, previous
    return jnp.stack([_by_schur(m) for m in matrix])


def sequenced(functions: Sequence[Callable[[Array], Array]], arguments: Sequence[Array]) -> list[Array]:
    """Each function of its argument, one after another even where they do not depend on one another.

    Several calls of batched LAPACK routines at once can deadlock on a CPU of few cores (jaxlib 0.10).
    """
    results, last = [], None
    for function, argument in zip(functions, arguments, strict=True):
        if last is not None:
            argument, _ = jax.lax.optimization_barrier((argument, last))
        last = function(argument)
        results.append(last)
    return results


def _by_schur(matrix, base=256):
    n = matrix.shape[0]
    if n <= base:
        factor = jnp.linalg.cholesky(matrix)
        inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(n, dtype=matrix.dtype), lower=True)
        return inverse.T @ inverse
    half = n // 2
    a, b, d = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    inverse = _by_schur(a, base)
    left = inverse @ b
    rest = _by_schur(d - b.T @ left, base)
    corner = left @ rest
    return jnp.block([[inverse + corner @ left.T, -corner], [-corner.T, rest]])
