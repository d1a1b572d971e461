"""Blocks of vectors: pytrees whose leaves have a leading axis that counts the vectors, and the small algebra on them.

All blocks of one map are kept in one dtype, ``dtype_of`` the map: the widest of its leaves and at least float32.
Products of blocks ask for full precision, which accelerators do not give to float32 unasked.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.matrices.linear_map import LinearMap

PyTree = Any


def dtype_of(linear_map: LinearMap) -> Any:
    """The dtype of blocks of vectors and of scalars about this map."""
    return trees.wide_dtype(*jax.tree.leaves(linear_map.structure))


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Every leaf in one dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def product(linear_map: LinearMap, vector: PyTree) -> PyTree:
    """A v in the wide dtype; the map itself is given its own dtypes."""
    return cast(linear_map(trees.cast_like(vector, linear_map.structure)), dtype_of(linear_map))


def block_product(linear_map: LinearMap, vectors: PyTree) -> PyTree:
    """A v_1 ... A v_k in the wide dtype."""
    return cast(linear_map.block(trees.cast_like(vectors, linear_map.structure)), dtype_of(linear_map))


def zeros(linear_map: LinearMap, count: int) -> PyTree:
    """A block of ``count`` zero vectors."""
    dtype = dtype_of(linear_map)
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), dtype), linear_map.structure)


def row(block: PyTree, index: Any) -> PyTree:
    """Vector number ``index`` of a block."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), block)


def with_row(block: PyTree, index: Any, vector: PyTree) -> PyTree:
    """The block with ``vector`` in place of its vector number ``index``."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), block, vector)


def gram(left: PyTree, right: PyTree) -> jax.Array:
    """The inner products of a block with a vector, shape (k,), or with a block, shape (k, m)."""

    def one(x, y):
        axes = tuple(range(1, x.ndim)), tuple(range(y.ndim - x.ndim + 1, y.ndim))
        return jnp.tensordot(x, y, axes, precision="highest")

    return functools.reduce(operator.add, jax.tree.leaves(jax.tree.map(one, left, right)))


def combine(coefficients: jax.Array, block: PyTree) -> PyTree:
    """sum_j c_j v_j: a vector for coefficients of shape (k,), a block of m for shape (m, k)."""
    return jax.tree.map(lambda leaf: jnp.tensordot(coefficients, leaf, 1, precision="highest"), block)


def row_dots(left: PyTree, right: PyTree) -> jax.Array:
    """The inner products <u_i, v_i> of two blocks of k vectors, shape (k,)."""
    return jax.vmap(trees.vdot)(left, right)


def without(block: PyTree, basis: PyTree) -> PyTree:
    """Each vector of a block (or one vector) less its projection on an orthonormal basis."""
    return trees.sub(block, combine(gram(basis, block).T, basis))


def expanded(basis: PyTree, vector: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
    """What a vector has in the space of an orthonormal basis, which zero vectors may fill up, and what it has outside.

    Returns:
        ``(coefficients, rest, length of rest)``, orthogonalised twice, so that what stands above rounding in ``rest``
        is orthogonal to rounding.
    """
    first = gram(basis, vector)
    rest = trees.sub(vector, combine(first, basis))
    second = gram(basis, rest)
    rest = trees.sub(rest, combine(second, basis))
    return first + second, rest, trees.norm(rest)


def unit(vector: PyTree, length: jax.Array, size: jax.Array) -> tuple[PyTree, jax.Array]:
    """``vector`` over its ``length``, or zeros where that is rounding error of something of length ``size``; and which.

    Ten units of rounding: noise that is taken for a new direction costs a step and does no other harm, but a new
    direction taken for noise would cut off the small end of a spectrum.
    """
    new = length > 10 * jnp.finfo(length.dtype).eps * size
    return trees.scale(jnp.where(new, 1 / length, 0), trees.where(new, vector, trees.zeros_like(vector))), new


def orthonormalise(block: PyTree) -> tuple[PyTree, jax.Array]:
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
