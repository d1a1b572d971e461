"""Sums, multiples and entrywise functions of pytrees, and pytrees as vectors; scalars never change a leaf's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.trees.dtypes import wide_dtype, wider
from curvax.types import PyTree, Scalar


def add(left: PyTree, right: PyTree) -> PyTree:
    """``left + right``, in the dtypes of ``left``."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), left, right)


def sub(left: PyTree, right: PyTree) -> PyTree:
    """``left - right``, in the dtypes of ``left``."""
    return jax.tree.map(lambda x, y: x - y.astype(x.dtype), left, right)


def scale(scalar: Scalar, tree: PyTree) -> PyTree:
    """``scalar * tree``, in the dtypes of ``tree``."""
    return jax.tree.map(lambda x: _scaled(scalar, x).astype(x.dtype), tree)


def add_scaled(left: PyTree, scalar: Scalar, right: PyTree) -> PyTree:
    """``left + scalar * right``, in the dtypes of ``left``.

    >>> add_scaled({"a": jnp.array([1.0])}, 2.0, {"a": jnp.array([3.0])})["a"].item()
    7.0
    """
    return jax.tree.map(lambda x, y: _add_promoted(x, _scaled(scalar, y)).astype(x.dtype), left, right)


def multiply(left: PyTree, right: PyTree) -> PyTree:
    """The elementwise product ``left * right``, in the dtypes of ``left``."""
    return jax.tree.map(lambda x, y: x * y.astype(x.dtype), left, right)


def scale_rows(scales: jax.Array, tree: PyTree) -> PyTree:
    """Entry i of the leading axes of every leaf times ``scales[i]``, in the dtypes of ``tree``."""
    return jax.tree.map(lambda leaf: leaf * expand_right(scales, leaf.ndim).astype(leaf.dtype), tree)


def clip(tree: PyTree, least: Scalar, largest: Scalar) -> PyTree:
    """Every entry brought within the bounds, in the dtypes of ``tree``."""
    return jax.tree.map(lambda x: jnp.clip(x, jnp.asarray(least, x.dtype), jnp.asarray(largest, x.dtype)), tree)


def zeros_like(tree: PyTree) -> PyTree:
    """A pytree of zeros with the shapes and dtypes (and sharding) of ``tree``, which may hold ShapeDtypeStructs."""
    return jax.tree.map(jnp.zeros_like, tree)


def ravel(tree: PyTree) -> jax.Array:
    """All leaves as one vector: leaf order, each leaf row-major, in the widest dtype (float32 at least)."""
    leaves = jax.tree.leaves(tree)
    dtype = wide_dtype(*leaves)
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves] or [jnp.zeros((0,), dtype)])


def unravel(vector: jax.Array, like: PyTree) -> PyTree:
    """The inverse of ``ravel``: a vector cut up into the shapes and dtypes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        parts.append(vector[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(treedef, parts)


def expand_right(array: jax.Array, ndim: int) -> jax.Array:
    """The array with axes of length one behind its own, ``ndim`` in all, to scale the leading axes of another.

    A scalar stays as it is.
    """
    return array if array.ndim == 0 else array.reshape(array.shape + (1,) * (ndim - array.ndim))


def _add_promoted(x, y):
    dtype = wider(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def _scaled(scalar, x):
    """``scalar * x`` in at least float32 where the scalar is an array, so that a bfloat16 leaf is rounded only once."""
    if isinstance(scalar, (int, float)):
        return scalar * x
    dtype = wider(x.dtype, jnp.float32)
    return scalar.astype(dtype) * x.astype(dtype)
