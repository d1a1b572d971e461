"""Inverses of symmetric positive definite matrices that are formed: one function, several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from curvax.types import Array

InverseMethod = Literal["cholesky", "schur", "eigen", "newton_schulz"]

# Where halving ends. What is factorised has twice as many rows, and from 256 on OpenBLAS factorises by threads of its
# own, which then keep the cores from XLA's for milliseconds: inverses of a network took twice as long.
_SMALL = 127


def inverse_of(matrix: Array, method: InverseMethod = "cholesky", previous: Array | None = None) -> Array:
    r"""The inverse of each of a stack of symmetric positive definite matrices, or of diagonals.

    - "cholesky": L^{-T} L^{-1} with A = L L^T. The most accurate one: in float32 the error is near 1e-8 times the
      condition number.
    - "schur": by halves down to small matrices, of which a Cholesky factor is taken: with S = D - B^T A^{-1} B

          [A   B]^{-1}   [A^{-1} + A^{-1} B S^{-1} B^T A^{-1}   -A^{-1} B S^{-1}]
          [B^T D]      = [-S^{-1} B^T A^{-1}                     S^{-1}         ]

      The fewest operations, and ten to twenty times the error of "cholesky": float32 fails it from condition numbers
      of 1e6 on.
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
    return inverses_of_stacks([matrix], method, None if previous is None else [previous])[0]


def inverses_of_stacks(
    stacks: Sequence[Array],
    method: InverseMethod = "cholesky",
    previous: Sequence[Array] | None = None,
    after: Any = None,
) -> list[Array]:
    """``inverse_of`` each of several stacks, by programs that those of near sizes share; see ``by_size``.

    Args:
        previous: What to start from, for each of them.
        after: What is to be there before the first is worked on.
    """
    full = [place for place, stack in enumerate(stacks) if stack.ndim == 3]

    def inverse(matrix, start=None):
        return _symmetric(_METHODS[method](matrix, start))

    starts = previous if method == "newton_schulz" else None
    arguments = [(stacks[i],) if starts is None else (stacks[i], starts[i]) for i in full]
    found = dict(zip(full, by_size(inverse, arguments, after), strict=True))
    return [found[place] if place in found else 1 / stack for place, stack in enumerate(stacks)]


def inverse_root(matrix: Array) -> Array:
    r"""Y = L^{-T} for A = L L^T, one matrix: Y Y^T is the inverse and Y^T A Y = I.

    By halves down to small matrices, as products run several times as fast as what LAPACK does:

        Y = [Y_1  -Y_1 W Y_2]
            [0     Y_2      ]    for A = [A_1 B; B^T D], W = Y_1^T B and Y_2 that of D - W^T W
    """
    n = len(matrix)
    if n <= _SMALL:
        return _small_inverse_root(matrix)
    half = _half(n)
    first = inverse_root(matrix[:half, :half])
    w = first.T @ matrix[:half, half:]
    second = inverse_root(matrix[half:, half:] - w.T @ w)
    return jnp.block([[first, -first @ (w @ second)], [jnp.zeros((n - half, half), matrix.dtype), second]])


def _small_inverse_root(matrix):
    """L^{-T}, the lower left part of the Cholesky factor of [A I; I cI] for any c above the eigenvalues of A^{-1}.

    Triangular solves, the obvious way, leave OpenBLAS's threads in XLA's way even where matrices have 64 rows.
    """
    n = len(matrix)
    identity = jnp.eye(n, dtype=matrix.dtype)
    enlarged = jnp.block([[matrix, identity], [identity, jnp.finfo(matrix.dtype).max / 4 * identity]])
    # LAPACK works by columns, so that what it is given transposed needs no copy; the barrier keeps XLA from turning it
    # before. It reads one triangle alone, which saves a program for each size over making the matrix symmetric first.
    factor = jax.lax.linalg.cholesky(jax.lax.optimization_barrier(enlarged).T, symmetrize_input=False)
    return factor[n:, :n]


def by_size(function: Callable[..., Array], stacks: Sequence[tuple[Array, ...]], after: Any = None) -> list[Array]:
    """A function of each of the matrices of stacks (blocks, n, n), one by one, those of near sizes in one loop.

    Compiled once for a size, a function of products by halves is dozens of kernels, and the layers of a network have
    many matrices of a few sizes, or of sizes that differ by a bias. A matrix A is filled up to diag(A, c I) with c the
    mean of its diagonal, and the part of A is cut out of the result, so that the function has to keep the two apart,
    as inverses and Cholesky factors do. One by one, as batched products are slow on CPUs, and in full precision, as
    accelerators round operands to some ten bits otherwise, too few for a matrix that is at all ill-conditioned.

    Args:
        function: Of a matrix, or of a matrix and another that goes with it and is filled up by 1 / c; its result has
            the shape of the matrix.
        stacks: For each its arguments, of equal shapes.
        after: What is to be there before the first call.
    """
    groups: dict[Any, list[int]] = {}
    for place, (stack, *_) in enumerate(stacks):
        alone = None if jax.typeof(stack).sharding.mesh.empty else place  # joined, its sharding would be lost
        groups.setdefault((_size_class(stack.shape[-1]), stack.dtype, alone), []).append(place)

    def of_group(own):
        size = _in_equal_parts(max(stack.shape[-1] for stack, *_ in own))
        columns = [jnp.concatenate(column) for column in zip(*[_filled(each, size) for each in own], strict=True)]
        count = len(columns[0])
        if count == 1:
            return function(*(column[0] for column in columns))[None]
        if len(own) < count:  # some may be split by their blocks over devices: gathered once, as a loop's input is
            return jax.lax.map(lambda matrices: function(*matrices), tuple(columns))

        def body(place, results):  # each in the place of its first argument, so that there is one stack and not two
            arguments = (jax.lax.dynamic_index_in_dim(x, place, keepdims=False) for x in (results, *columns[1:]))
            result = function(*arguments).astype(results.dtype)
            assert result.shape == results.shape[1:]
            return jax.lax.dynamic_update_index_in_dim(results, result, place, 0)

        return jax.lax.fori_loop(0, count, body, columns[0])

    found: list[Any] = [None] * len(stacks)
    with jax.default_matmul_precision("highest"):
        joined = sequenced([of_group] * len(groups), [[stacks[i] for i in own] for own in groups.values()], after)
    for own, results in zip(groups.values(), joined, strict=True):
        start = 0
        for place in own:
            count, size, _ = stacks[place][0].shape
            found[place] = results[start : start + count, :size, :size]
            start += count
    return found


def _size_class(n):
    """Sizes of a class differ by less than a sixteenth, small ones by less than 32."""
    step = max(32, 2 ** (n - 1).bit_length() // 32)
    return -(-n // step) * step


def _in_equal_parts(n):
    """The next size that halving cuts into parts of one size."""
    parts = _parts(n)
    return -(-n // parts) * parts


def _half(n):
    """About half of a size, and a multiple of the size of the parts that halving cuts it into."""
    parts = _parts(n)
    return -(-n // parts) * (parts // 2)


def _parts(n):
    return max(1, -(-n // _SMALL))


def _filled(stacks, size):
    """diag(A, c I) for the first of them, diag(A, I / c) for the second."""
    n = stacks[0].shape[-1]
    if n == size:
        return stacks
    mean = jnp.trace(stacks[0], axis1=1, axis2=2)[:, None, None] / n
    corner = jnp.diag((jnp.arange(size) >= n).astype(mean.dtype))
    padded = [jnp.pad(stack, ((0, 0), (0, size - n), (0, size - n))) for stack in stacks]
    return tuple(stack + share * corner[None] for stack, share in zip(padded, (mean, 1 / mean), strict=False))


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
    root = inverse_root(matrix)
    if len(root) <= _SMALL:
        return root @ root.T
    half = _half(len(root))  # half of the operations are with the zeros below the diagonal
    above, corner = root[:half], root[half:, half:]
    across = above[:, half:] @ corner.T
    return jnp.block([[above @ above.T, across], [across.T, corner @ corner.T]])


def _by_schur(matrix, previous):
    n = len(matrix)
    if n <= _SMALL:
        return _by_cholesky(matrix, previous)
    half = _half(n)
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
    return (vectors / jnp.maximum(values, floor)[None]) @ vectors.T


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
