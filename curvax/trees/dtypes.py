"""The dtypes in which a library that is given narrow parameters works out sums and squares."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvax.types import PyTree, Scalar


def wide_dtype(*leaves: Any) -> Any:
    """The dtype in which scalars about these leaves are accumulated: their widest, and at least float32."""
    return functools.reduce(wider, [jnp.result_type(leaf) for leaf in leaves], jnp.dtype(jnp.float32))


def wider(left: Any, right: Any) -> Any:
    """The floating dtype that holds both, also under strict promotion, where jax declines to choose.

    >>> wider(jnp.dtype("bfloat16"), jnp.dtype("float32"))
    dtype('float32')
    """
    left, right = jnp.dtype(left), jnp.dtype(right)
    if left == right:
        return left
    if left.itemsize == right.itemsize:
        return jnp.dtype(jnp.float32)
    return max(left, right, key=lambda dtype: dtype.itemsize)


def wide_zero(tree: PyTree) -> jax.Array:
    """A scalar zero in the dtype in which scalars about the leaves are accumulated."""
    return jnp.zeros((), wide_dtype(*jax.tree.leaves(tree)))


def widened(tree: PyTree) -> PyTree:
    """Every leaf in float32 or wider, as for squares, which leave the range of narrow leaves."""
    return jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), tree)


def wide_structure(tree: PyTree) -> PyTree:
    """The ShapeDtypeStructs of ``widened(tree)``."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wide_dtype(leaf)), tree)


def wide_full(tree: PyTree, value: Scalar) -> PyTree:
    """One value everywhere, with the shapes of ``tree``, which may hold ShapeDtypeStructs, in float32 or wider."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), wide_structure(tree))


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` with every leaf cast to the dtype of the same leaf of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
