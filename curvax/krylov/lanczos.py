"""The Lanczos process on pytrees, with full re-orthogonalisation, and the Gauss quadrature that it defines."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.checks import check_at_least
from curvax.krylov import _wide as wide
from curvax.types import Array, PyTree


class LanczosResult(NamedTuple):
    """What k Lanczos steps give: A Q = Q T + r e_k^T with Q^T Q = I and Q^T r = 0.

    Where the process ends early, after ``num_valid`` = m < k steps, the space of the first m vectors is invariant under
    A: A Q_m = Q_m T_m. The other vectors, their entries of T and the residual are zero.
    """

    basis: PyTree  # Q: the orthonormal vectors, along the leading axis of every leaf; in float32 or wider
    diagonal: Array  # alpha, shape (k,): the diagonal of T
    off_diagonal: Array  # beta, shape (k - 1,): the off-diagonal of T
    residual: PyTree  # r, one vector: what the next step would normalise
    num_valid: Array  # m, an integer: the number of steps made


def lanczos(linear_map: wide.Operator, start: PyTree, *, num_steps: int) -> LanczosResult:
    r"""Tridiagonalises a symmetric map on the Krylov space span(b, A b, ..., A^{k-1} b).

    Each new vector is orthogonalised twice against all earlier ones, so that the basis is orthonormal to rounding, at
    the price of O(n k^2) operations. A new part that is not above rounding, relative to the largest product so far,
    means an invariant space and ends the process. Source: Lanczos 1950; Parlett 1998, The Symmetric Eigenvalue Problem,
    section 6.9 (twice is enough) and chapter 13.

    Args:
        start: b, a pytree with the structure of the map, of any non-zero length. From a zero vector no step is made.
        num_steps: k, the number of products; it may exceed the number of parameters.

    Raises:
        ValueError: If ``start`` is not shaped like the vectors of the map, or ``num_steps`` is less than one.

    Example:
        >>> A = curvax.Diagonal({"w": jnp.array([1.0, 2.0, 3.0])})
        >>> result = curvax.estimators.lanczos(A, {"w": jnp.ones(3)}, num_steps=5)
        >>> result.num_valid.item(), result.diagonal.round(6)
        (3, Array([2., 2., 2., 0., 0.], dtype=float...))
    """
    trees.check_like(start, linear_map.structure, "start", "the map's vectors")
    check_at_least("num_steps", num_steps, 1)
    dtype = wide.dtype_of(linear_map)
    start = wide.cast(start, dtype)
    length = trees.norm(start)
    first, _ = blocks.unit(start, length, length)
    basis = blocks.with_row(blocks.zeros(linear_map.structure, num_steps + 1, dtype), 0, first)

    def body(index, carry):
        basis, diagonal, off_diagonal, largest = carry
        product = wide.product(linear_map, blocks.row(basis, index))
        largest = jnp.maximum(largest, trees.norm(product))
        coefficients, rest, length = blocks.expanded(basis, product)
        direction, new = blocks.unit(rest, length, largest)
        return (
            blocks.with_row(basis, index + 1, direction),
            diagonal.at[index].set(coefficients[index]),
            off_diagonal.at[index].set(jnp.where(new, length, 0)),
            largest,
        )

    zero = jnp.zeros((num_steps,), dtype)
    carry = basis, zero, zero, jnp.zeros((), dtype)
    basis, diagonal, off_diagonal, _ = jax.lax.fori_loop(0, num_steps, body, carry)
    return LanczosResult(
        basis=jax.tree.map(lambda leaf: leaf[:-1], basis),
        diagonal=diagonal,
        off_diagonal=off_diagonal[:-1],
        residual=trees.scale(off_diagonal[-1], blocks.row(basis, num_steps)),
        num_valid=jnp.where(length > 0, 1 + jnp.sum(off_diagonal[:-1] > 0), 0),
    )


def gauss_quadrature(result: LanczosResult) -> tuple[Array, Array]:
    r"""The Gauss quadrature of k Lanczos steps: b^T f(A) b / |b|^2 ~ sum_j w_j f(theta_j).

    The nodes theta_j are the eigenvalues of T, the weights w_j the squared first entries of its eigenvectors. The sum
    is exact for polynomials f up to degree 2k - 1. Source: Golub and Welsch 1969; Golub and Meurant 2010, chapter 6.

    Returns:
        ``(nodes, weights)``, each of shape (k,). The first ``num_valid`` nodes ascend and their weights sum to one; the
        others repeat the first node with weight zero, so that f is never evaluated outside the spectrum.

    Example:
        >>> A = curvax.Diagonal(jnp.array([1.0, 2.0, 4.0]))
        >>> nodes, weights = curvax.estimators.gauss_quadrature(curvax.estimators.lanczos(A, jnp.ones(3), num_steps=2))
        >>> (3 * weights @ nodes**3).item()
        73.0...
    """
    valid = jnp.arange(result.diagonal.size) < result.num_valid
    values, vectors = tridiagonal_eigen(result, valid)
    weights = jnp.where(valid, vectors[0] ** 2, 0)
    total = jnp.sum(weights)
    return values, weights / jnp.where(total > 0, total, 1)


def tridiagonal_eigen(result: LanczosResult, valid: Array) -> tuple[Array, Array]:
    """The eigenvalues, ascending, and eigenvectors, as columns, of T on the first steps, those that are ``valid``.

    The other values repeat the first one, so that no function is evaluated outside the spectrum.
    """
    both = valid[:, None] & valid[None, :]
    whole = jnp.diag(result.diagonal) + jnp.diag(result.off_diagonal, 1) + jnp.diag(result.off_diagonal, -1)
    matrix = jnp.where(both, whole, 0)
    bound = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    unit = jnp.where(bound > 0, bound, 1)
    # Steps that do not count are put above the spectrum of the others, where the ascending order sorts them last.
    values, vectors = jnp.linalg.eigh(matrix / unit + jnp.diag(jnp.where(valid, 0, 2).astype(unit.dtype)))
    return jnp.where(valid, values, values[0]) * unit, vectors
