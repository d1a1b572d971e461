"""The quadratic model along two directions: its matrix by forward passes alone, and its minimum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.matrices.curvature import OutputCurvature
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import scale_cases
from curvax.types import Array, PyTree


def products_in_plane(
    at: CurvaturePoint, curvature: OutputCurvature, first: PyTree, second: PyTree, key: Array | None = None
) -> Array:
    r"""The matrix of x^T B y over x and y in (first, second), without the penalty: two push forwards, no pull back.

    Args:
        key: For a curvature that draws.
    """

    def one(piece):
        matrix = curvature.output_matrix(piece)
        x, y = (piece.jvp(v) for v in (first, second))
        curved_x, curved_y = (scale_cases(piece.scale, matrix.product(t)) for t in (x, y))
        return _symmetric(trees.vdots((x, curved_x), (y, curved_x), (y, curved_y)))

    return at.accumulate(one, curvature.keys(at, key))


def penalty_in_plane(at: CurvaturePoint, first: PyTree, second: PyTree) -> Array:
    """The matrix of x^T (eta I) y over the same, with eta the penalty's strength on each leaf."""
    return _symmetric(at.penalty.inner_products(at.params, (first, first), (first, second), (second, second)))


def inner_products(first: PyTree, second: PyTree) -> Array:
    """The matrix of the inner products of two vectors."""
    return _symmetric(trees.vdots((first, first), (first, second), (second, second)))


def _symmetric(entries):
    return entries[jnp.array([[0, 1], [1, 2]])]


def minimum_in_plane(products: Array, slopes: Array, fixed: tuple[Any, Any] = (None, None)) -> Array:
    r"""The c that minimises slopes^T c + 1/2 c^T products c, with those entries that are not None fixed.

    Where the two directions are collinear, or one is zero, the solution of least norm in the units that make both
    curvatures one; a direction without curvature is left alone.

    Example:
        >>> minimum_in_plane(jnp.array([[2.0, 0.0], [0.0, 4.0]]), jnp.array([2.0, 2.0]))
        Array([-1. , -0.5], dtype=float...)
    """
    first, second = (None if value is None else jnp.asarray(value).astype(products.dtype) for value in fixed)
    if first is not None and second is not None:
        return jnp.stack([first, second])
    if first is not None:
        return jnp.stack([first, -_divide(slopes[1] + first * products[0, 1], products[1, 1])])
    if second is not None:
        return jnp.stack([-_divide(slopes[0] + second * products[0, 1], products[0, 0]), second])
    return -_pseudo_solve(products, slopes)


def _pseudo_solve(matrix: Array, vector: Array) -> Array:
    """A^+ b for a positive semi-definite 2 x 2 matrix, first brought to a diagonal of ones."""
    diagonal = jnp.diagonal(matrix)
    units = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    r = matrix[0, 1] * units[0] * units[1]
    scaled = vector * units
    determinant = 1 - r * r
    independent = determinant > 64 * jnp.finfo(matrix.dtype).eps
    solved = (scaled - r * scaled[::-1]) / jnp.where(independent, determinant, 1)
    sign = jnp.where(r < 0, -1, 1).astype(matrix.dtype)
    nearest = jnp.stack([scaled[0] + sign * scaled[1], sign * scaled[0] + scaled[1]]) / 4
    return units * jnp.where(independent, solved, nearest)


def _divide(numerator: Array, denominator: Array) -> Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
