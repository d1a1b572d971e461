"""Blocks of vectors: pytrees whose leaves have a leading axis that counts the vectors, and the small algebra on them.

All blocks of one map are kept in one dtype, ``dtype_of`` the map: the widest of its leaves and at least float32.
Products of blocks ask for full precision, which accelerators do not give to float32 unasked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.linear_map import LinearMap

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

    return sum(jax.tree.leaves(jax.tree.map(one, left, right)))


def combine(coefficients: jax.Array, block: PyTree) -> PyTree:
    """sum_j c_j v_j: a vector for coefficients of shape (k,), a block of m for shape (m, k)."""
    return jax.tree.map(lambda leaf: jnp.tensordot(coefficients, leaf, 1, precision="highest"), block)


def row_dots(left: PyTree, right: PyTree) -> jax.Array:
    """The inner products <u_i, v_i> of two blocks of k vectors, shape (k,)."""
    return jax.vmap(trees.vdot)(left, right)


def without(block: PyTree, basis: PyTree) -> PyTree:
    """Each vector of a block (or one vector) less its projection on an orthonormal basis."""
    return trees.sub(block, combine(gram(basis, block).T, basis))


def qr(block: PyTree) -> tuple[PyTree, jax.Array]:
    """The factorisation v_i = sum_j R_ji q_j of a block of k <= n vectors, with q orthonormal whatever the rank.

    Each leaf is factorised by itself and then the stacked triangles (Demmel, Grigori, Hoemmen, Langou 2012), so that
    leaves of different shapes are never joined.
    """
    leaves, treedef = jax.tree.flatten(block)
    panels = [leaf.reshape(leaf.shape[0], leaf.size // leaf.shape[0]).T for leaf in leaves]
    factors = [jnp.linalg.qr(panel) for panel in panels]
    joint, triangle = jnp.linalg.qr(jnp.concatenate([small for _, small in factors]))
    basis, start = [], 0
    for (orthonormal, small), leaf in zip(factors, leaves, strict=True):
        rows = joint[start : start + small.shape[0]]
        basis.append(jnp.matmul(orthonormal, rows, precision="highest").T.reshape(leaf.shape))
        start += small.shape[0]
    return treedef.unflatten(basis), triangle
