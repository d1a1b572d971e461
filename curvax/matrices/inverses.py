"""Inverses of symmetric positive definite matrices that are formed: one function, several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from curvax.types import Array

InverseMethod = Literal["cholesky", "schur", "eigen", "newton_schulz"]

# Where halving ends. LAPACK's calls are slow on loaded cores, and each half more is compiled.
_SMALL = 256


def inverse_of(matrix: Array, method: InverseMethod = "cholesky", previous: Array | None = None) -> Array:
    r"""The inverse of each of a stack of symmetric positive definite matrices, or of diagonals.

    - "cholesky": L^{-T} L^{-1} with A = L L^T. The most accurate one: in float32 the error is near 1e-8 times the
      condition number.
    - "schur": by halves down to small matrices, of which a Cholesky factor is taken: with S = D - B^T A^{-1} B

          [A   B]^{-1}   [A^{-1} + A^{-1} B S^{-1} B^T A^{-1}   -A^{-1} B S^{-1}]
          [B^T D]      = [-S^{-1} B^T A^{-1}                     S^{-1}         ]

      The fewest operations, and ten times the error of "cholesky": from condition numbers of 1e6 float32 fails it.
    - "eigen": by an eigendecomposition, whose eigenvalues are raised to the rounding of the largest: finite and
      positive definite where rounding has made the matrix indefinite. Many times the price of the others.
    - "newton_schulz": X <- X (2 I - A X) from ``previous``, which should be the inverse of a matrix near this one: a
      few products. Where ||I - A X|| < 1 does not hold for it, from I / ||A|| instead, which takes many steps. In
      float32 the least accurate one: rounding of A X stops it early at condition numbers of 1e4 and above.

    Args:
        matrix: (blocks, n, n), or of diagonals (blocks, n).
        previous: What to start from, in the shape of the inverse; None if there is nothing.

    Returns:
        The inverses, symmetric to the last bit. Not finite where Cholesky factors do not exist.

    Example:
        >>> inverse_of(jnp.array([[[2.0, 0.0], [0.0, 4.0]]]))
        Array([[[0.5 , 0.  ],
                [0.  , 0.25]]], dtype=float...)

    Source: Pan and Schreiber 1991 for Newton-Schulz; Martens 2016, section 6.8, on its use here.
    """
    if matrix.ndim == 2:
        return 1 / matrix
    # Loops over single matrices: batched products are slow on CPUs. Full precision, as accelerators round their
    # operands to some ten bits otherwise, too few for a matrix that is at all ill-conditioned.
    starts = [None] * len(matrix) if previous is None else list(previous)
    with jax.default_matmul_precision("highest"):
        functions = [lambda m, s=s: _symmetric(_METHODS[method](m, s)) for s in starts]
        return jnp.stack(sequenced(functions, list(matrix)))


def inverse_cholesky(matrix: Array) -> Array:
    r"""X = L^{-1} for A = L L^T, one matrix: X^T X is the inverse and X A X^T = I.

    By halves down to small matrices, as products run several times as fast as triangular solves:

        X = [X_1                  0  ]
            [-X_2 W^T X_1         X_2]    for A = [A_1 B; B^T D], W = X_1 B and X_2 that of D - W^T W
    """
    n = len(matrix)
    if n <= _SMALL:
        # Reads the lower triangle alone, which saves a program for each size over making the matrix symmetric first.
        factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        return jax.scipy.linalg.solve_triangular(factor, jnp.eye(n, dtype=matrix.dtype), lower=True)
    half = n // 2
    first = inverse_cholesky(matrix[:half, :half])
    w = first @ matrix[:half, half:]
    second = inverse_cholesky(matrix[half:, half:] - w.T @ w)
    return jnp.block([[first, jnp.zeros((half, n - half), matrix.dtype)], [-second @ (w.T @ first), second]])


def sequenced(functions: Sequence[Callable[[Any], Any]], arguments: Sequence[Any], after: Any = None) -> list[Any]:
    """Each function of its argument, one after another even where they do not depend on one another.

    Several calls of batched LAPACK routines at once can deadlock on a CPU of few cores (jaxlib 0.10).

    Args:
        after: What is to be there before the first of them begins.
    """
    results, last = [], after
    for function, argument in zip(functions, arguments, strict=True):
        argument, _ = jax.lax.optimization_barrier((argument, last))
        last = function(argument)
        results.append(last)
    return results


def over_blocks(function: Callable[..., Array], *stacks: Array) -> Array:
    """The function of each of the matrices of stacks, for functions that are products of matrices.

    One matrix alone goes without a batch axis: XLA's CPU backend runs batched products many times slower.
    """
    if len(stacks[0]) == 1:
        return function(*(stack[0] for stack in stacks))[None]
    return jax.vmap(function)(*stacks)


def _by_cholesky(matrix, previous):
    del previous
    x = inverse_cholesky(matrix)
    if len(x) <= _SMALL:
        return x.T @ x
    half = len(x) // 2  # half of the operations are with the zeros above the diagonal
    left, corner = x[:, :half], x[half:, half:]
    across = corner.T @ left[half:]
    return jnp.block([[left.T @ left, across.T], [across, corner.T @ corner]])


def _by_schur(matrix, previous):
    n = len(matrix)
    if n <= _SMALL:
        return _by_cholesky(matrix, previous)
    half = n // 2
    a, b, d = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    inverse = _by_schur(a, None)
    left = inverse @ b
    rest = _by_schur(d - b.T @ left, None)
    corner = left @ rest
    return jnp.block([[inverse + corner @ left.T, -corner], [-corner.T, rest]])


def _by_eigenvalues(matrix, previous):
    del previous
    values, vectors = jnp.linalg.eigh(matrix)
    floor = len(matrix) ** 0.5 * jnp.finfo(matrix.dtype).eps * values[-1]
    return (vectors / jnp.maximum(values, floor)) @ vectors.T


def _by_newton_schulz(matrix, previous):
    n, info = len(matrix), jnp.finfo(matrix.dtype)
    eye = jnp.eye(n, dtype=matrix.dtype)

    def state_at(inverse):
        residual = eye - matrix @ inverse
        return inverse, residual, jnp.linalg.norm(residual)

    # The largest sum of a row is above the largest eigenvalue, so those of I - A / ||A|| are within [0, 1).
    norm = jnp.max(jnp.sum(jnp.abs(matrix), axis=0))
    residual = eye - matrix / norm
    state = (eye / norm, residual, jnp.linalg.norm(residual))
    if previous is not None:
        warm = state_at(previous)
        fit = _bound(warm[1]) < 1  # not so for what is not finite
        state = jax.tree.map(lambda own, other: jnp.where(fit, own, other), warm, state)

    def goes_on(carry):
        (_, _, size), better, step = carry
        # A residual of the root of the rounding is squared by the product after the loop.
        return better & (size > jnp.sqrt(info.eps)) & (step < info.nmant + 10)

    def body(carry):
        old, _, step = carry
        new = state_at(_symmetric(old[0] + old[0] @ old[1]))
        # Every step squares the residual. Where it does not become smaller rounding has the better of it.
        better = new[2] < old[2]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old), better, step + 1

    (inverse, residual, _), better, _ = jax.lax.while_loop(goes_on, body, (state, jnp.asarray(True), 0))
    return jnp.where(better, inverse + inverse @ residual, inverse)


def _bound(matrix):
    """An upper bound of the largest singular value that is near it for multiples of I and for noise alike."""
    absolute = jnp.abs(matrix)
    rows, columns = (jnp.max(jnp.sum(absolute, axis=axis)) for axis in (0, 1))
    return jnp.minimum(jnp.sqrt(rows * columns), jnp.linalg.norm(matrix))


def _symmetric(matrix):
    return (matrix + matrix.T) / 2


_METHODS = {
    "cholesky": _by_cholesky,
    "schur": _by_schur,
    "eigen": _by_eigenvalues,
    "newton_schulz": _by_newton_schulz,
}
