"""Blocks of vectors: pytrees whose leaves have a leading axis that counts the vectors, and the small algebra on them.

Products are accumulated in float32 or wider and ask for full precision, which accelerators do not give to float32
unasked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.types import Array, PyTree


def inner_products(block: PyTree, other: PyTree) -> Array:
    """X^T y, the inner products of a block with a vector, shape (k,), or X^T Y with a block, shape (k, m)."""

    def one(x, y):
        dtype = trees.wide_dtype(x, y)
        axes = tuple(range(1, x.ndim)), tuple(range(y.ndim - x.ndim + 1, y.ndim))
        return jnp.tensordot(x.astype(dtype), y.astype(dtype), axes, precision="highest")

    parts = jax.tree.leaves(jax.tree.map(one, block, other))
    dtype = trees.wide_dtype(*parts)
    return functools.reduce(jnp.add, [part.astype(dtype) for part in parts])


def combine(coefficients: Array, block: PyTree) -> PyTree:
    """X c in float32 or wider: a vector for coefficients of shape (k,), a block of m for shape (m, k)."""

    def one(leaf):
        dtype = trees.wide_dtype(leaf, coefficients)
        return jnp.tensordot(coefficients.astype(dtype), leaf.astype(dtype), 1, precision="highest")

    return jax.tree.map(one, block)


def row_dots(left: PyTree, right: PyTree) -> Array:
    """The inner products <u_i, v_i> of two blocks of k vectors, shape (k,)."""
    return jax.vmap(trees.vdot)(left, right)


def lengths_and_cosines(*vectors: PyTree) -> tuple[Array, Array]:
    """The norms of k vectors, shape (k,), and the cosines of the angles between them, shape (k, k), with 0 for zeros.

    Free of overflow and underflow, and by one matrix product for each leaf: k norms and their inner products one by one
    are as many reductions of each leaf, which are slow to compile.
    """
    block = jax.tree.map(lambda *leaves: jnp.stack([leaf.astype(trees.wide_dtype(leaf)) for leaf in leaves]), *vectors)
    leaves = [leaf for leaf in jax.tree.leaves(block) if leaf.size]
    dtype = trees.wide_dtype(*leaves)
    rows = [jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim))).astype(dtype) for leaf in leaves]
    sizes = functools.reduce(jnp.maximum, rows, jnp.zeros(len(vectors), dtype))
    sizes = jnp.where((sizes > 0) & jnp.isfinite(sizes), sizes, 1)
    block = jax.tree.map(lambda leaf: leaf / trees.expand_right(sizes, leaf.ndim).astype(leaf.dtype), block)
    products = inner_products(block, block)
    lengths = jnp.sqrt(jnp.diagonal(products))
    inverse = jnp.where(lengths == 0, 0, 1 / jnp.where(lengths == 0, 1, lengths))
    return sizes * lengths, inverse[:, None] * products * inverse[None, :]


def row(block: PyTree, index: Any) -> PyTree:
    """Vector number ``index`` of a block."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), block)


def with_row(block: PyTree, index: Any, vector: PyTree) -> PyTree:
    """The block with ``vector`` in place of its vector number ``index``."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), block, vector)


def zeros(like: PyTree, count: int, dtype: Any = None) -> PyTree:
    """A block of ``count`` zero vectors."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), dtype or leaf.dtype), like)


def without(block: PyTree, basis: PyTree) -> PyTree:
    """Each vector of a block (or one vector) less its projection on an orthonormal basis."""
    return trees.sub(block, combine(inner_products(basis, block).T, basis))


def split(vector: PyTree, project: Callable[[PyTree], Array], expand: Callable[[Array], PyTree]):
    """What a vector has in a space with an orthonormal basis Q, and what it has outside.

    One subtraction v - Q Q^T v leaves rounding of the size of v along Q, which is not small beside a short rest. The
    second takes that out as well: what then stands above rounding is orthogonal to Q to rounding (Parlett 1998,
    section 6.9: twice is enough).

    Returns:
        ``(Q^T v, v - Q Q^T v, length of that)``.
    """
    first = project(vector)
    rest = trees.sub(vector, expand(first))
    second = project(rest)
    rest = trees.sub(rest, expand(second))
    return first + second, rest, trees.norm(rest)


def expanded(basis: PyTree, vector: PyTree) -> tuple[Array, PyTree, Array]:
    """``split`` with an orthonormal block, which zero vectors may fill up."""
    return split(vector, functools.partial(inner_products, basis), lambda coefficients: combine(coefficients, basis))


def unit(vector: PyTree, length: Array, size: Array) -> tuple[PyTree, Array]:
    """``vector`` over its ``length``, or zeros where that is rounding error of something of length ``size``; and which.

    Ten units of rounding: noise that is taken for a new direction costs a step and does no other harm, but a new
    direction taken for noise would cut off the small end of a spectrum.
    """
    new = length > 10 * jnp.finfo(length.dtype).eps * size
    return trees.scale(jnp.where(new, 1 / length, 0), trees.where(new, vector, trees.zeros_like(vector))), new


def orthonormalise(block: PyTree) -> tuple[PyTree, Array]:
    """The factorisation v_i = sum_j R_ji q_j with orthonormal q, where q_j = 0 if v_j depends on the v before it.

    By Gram-Schmidt, twice, one vector after another. Householder factorisations of the leaves would be faster for many
    vectors, but several batched LAPACK calls at once can deadlock on a CPU of few cores (jaxlib 0.10).
    """
    count = jax.tree.leaves(block)[0].shape[0]

    def body(index, carry):
        basis, triangle = carry
        vector = row(block, index)
        coefficients, rest, length = expanded(basis, vector)
        direction, new = unit(rest, length, trees.norm(vector))
        column = coefficients.at[index].set(jnp.where(new, length, 0))
        return with_row(basis, index, direction), triangle.at[:, index].set(column)

    dtype = jax.tree.leaves(block)[0].dtype
    return jax.lax.fori_loop(0, count, body, (trees.zeros_like(block), jnp.zeros((count, count), dtype)))
