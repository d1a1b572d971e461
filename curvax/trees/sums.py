"""Inner products, norms and largest magnitudes of pytrees, in float32 or wider; what is not finite shows in them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from curvax.trees.dtypes import wide_dtype
from curvax.trees.leaves import is_small
from curvax.types import PyTree


def vdot(left: PyTree, right: PyTree) -> jax.Array:
    """The inner product of two pytrees, sum_i <left_i, right_i>, accumulated in float32 or wider.

    >>> vdot({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}).item()
    11.0
    """
    return vdots((left, right))[0]


def vdots(*pairs: tuple[PyTree, PyTree]) -> jax.Array:
    """The inner products of several pairs of pytrees of one structure, shape (len(pairs),).

    Small leaves of all pairs are summed together: on CPU XLA makes four kernels of a sum.

    >>> vdots(({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}), ({"a": jnp.ones(2)}, {"a": jnp.ones(2)}))
    Array([11.,  2.], dtype=float...)
    """
    return _vdots([(jax.tree.leaves(left), jax.tree.structure(left).flatten_up_to(right)) for left, right in pairs])


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of a pytree, free of overflow and underflow of the squares.

    >>> norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}).item()
    5.0
    """
    return norms(tree)[0]


def norms(*trees: PyTree) -> jax.Array:
    """``norm`` of several pytrees of one structure, shape (len(trees),), by the sums of ``vdots``."""
    safe = units(*trees)
    scaled = [
        jax.tree.map(lambda leaf, unit=unit: leaf.astype(safe.dtype) / unit, tree)
        for tree, unit in zip(trees, safe, strict=True)
    ]
    return safe * jnp.sqrt(vdots(*zip(scaled, scaled, strict=True)))


def largest(tree: PyTree) -> jax.Array:
    """The largest magnitude of an entry, in float32 or wider; not finite where an entry is not, 0 where there is none.

    >>> largest({"a": jnp.array([3.0, -5.0]), "b": jnp.zeros(0)}).item()
    5.0
    """
    return largests(tree)[0]


def largests(*trees: PyTree) -> jax.Array:
    """``largest`` of several pytrees of one structure, shape (len(trees),)."""
    return _largests(list(map(jax.tree.leaves, trees)), _top_or_nan)


def units(*trees: PyTree) -> jax.Array:
    """Positive numbers near the largest magnitudes of pytrees of one structure, to divide by before squaring.

    1 for zero, and any number where an entry is not finite, which the sum of squares then shows.
    """
    sizes = _largests(list(map(jax.tree.leaves, trees)), jnp.max)
    return jnp.where((sizes > 0) & jnp.isfinite(sizes), sizes, 1)


def all_finite(*trees: PyTree) -> jax.Array:
    """Whether every entry of every leaf is finite, as a boolean scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return are_finite(leaves)[0]


def are_finite(*trees: PyTree) -> jax.Array:
    """Whether every entry is finite, for several pytrees of one structure, shape (len(trees),).

    Of small leaves by the largest magnitude, which a norm needs as well: a compiler then works it out once for both.

    >>> are_finite({"a": jnp.ones(2)}, {"a": jnp.array([1.0, jnp.nan])})
    Array([ True, False], dtype=bool)
    """
    return jnp.isfinite(_largests(list(map(jax.tree.leaves, trees)), _zero_or_nan))


# Programs of their own outside of jit, so that few are compiled there, and part of the caller's inside.
@functools.partial(jax.jit, inline=True)
def _vdots(pairs):
    dtype = wide_dtype(*jax.tree.leaves(pairs))
    products = [[x.astype(dtype) * y.astype(dtype) for x, y in zip(*pair, strict=True)] for pair in pairs]
    return _reduced(products, dtype, jnp.add, lambda rows: jnp.sum(rows, axis=-1), jnp.sum)


# XLA's maximum on CPU loses what is not a number among more than 4,000 entries (JAX 0.10.2); its sum does not. A sum of
# zero times the entries is one pass more over a large leaf; small ones have their maximum by their bits, which are
# ordered as magnitudes are, with NaN above infinity.
@functools.partial(jax.jit, inline=True, static_argnums=1)
def _largests(rows, of_large):
    magnitudes = [list(map(jnp.abs, leaves)) for leaves in rows]
    dtype = wide_dtype(*jax.tree.leaves(magnitudes))

    def of_small(rows):
        bits = jax.lax.bitcast_convert_type(rows, jnp.dtype(f"uint{8 * rows.dtype.itemsize}"))
        return jax.lax.bitcast_convert_type(jnp.max(bits, axis=-1), rows.dtype)

    return _reduced(magnitudes, dtype, jnp.maximum, of_small, of_large)


def _top_or_nan(magnitudes):
    return jnp.max(magnitudes) + _zero_or_nan(magnitudes)


def _zero_or_nan(magnitudes):
    return jnp.sum(0 * magnitudes)


def _reduced(rows, dtype, combine, of_small, of_large):
    """One number for each list of leaves, lists of one structure; small leaves of all lists are reduced at once."""
    small, parts = [], []
    for leaves in zip(*rows, strict=True):
        leaves = list(map(jnp.asarray, leaves))
        if not leaves[0].size:
            continue
        if all(map(is_small, leaves)):
            small.append([leaf.astype(dtype).ravel() for leaf in leaves])
        else:
            parts.append(jnp.stack([of_large(leaf).astype(dtype) for leaf in leaves]))
    if small:
        parts.append(of_small(jnp.stack([jnp.concatenate(row) for row in zip(*small, strict=True)])))
    return functools.reduce(combine, parts, jnp.zeros(len(rows), dtype))
