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
    flat = [(jax.tree.leaves(left), jax.tree.structure(left).flatten_up_to(right)) for left, right in pairs]
    for x, y in ((x, y) for left, right in flat for x, y in zip(left, right, strict=True)):
        if jnp.shape(x) != jnp.shape(y):  # joined, only their sizes would have to agree
            raise ValueError(f"inner product of leaves of shapes {jnp.shape(x)} and {jnp.shape(y)}")
    return _vdots(flat)


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of a pytree, free of overflow and underflow of the squares.

    >>> norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}).item()
    5.0
    """
    return norms(tree)[0]


def norms(*trees: PyTree) -> jax.Array:
    """``norm`` of several pytrees of one structure, shape (len(trees),), by the sums of ``vdots``."""
    return _norms(list(map(jax.tree.leaves, trees)))


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
    return _units(list(map(jax.tree.leaves, trees)))


def all_finite(*trees: PyTree) -> jax.Array:
    """Whether every entry of every leaf is finite, as a boolean scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return are_finite(leaves)[0]


def are_finite(*trees: PyTree) -> jax.Array:
    """Whether every entry is finite, for several pytrees of one structure, shape (len(trees),).

    >>> are_finite({"a": jnp.ones(2)}, {"a": jnp.array([1.0, jnp.nan])})
    Array([ True, False], dtype=bool)
    """
    return jnp.isfinite(_largests(list(map(jax.tree.leaves, trees)), _finite_or_nan))


# Programs of their own outside of jit, so that few are compiled there, and part of the caller's inside. Small leaves
# are joined before anything is done to them, so that it is done once, and one joint vector serves all who read it.
@functools.partial(jax.jit, inline=True)
def _vdots(pairs):
    dtype = wide_dtype(*jax.tree.leaves(pairs))
    parts = _joined([leaves for pair in pairs for leaves in pair], dtype)
    products = [jax.tree.map(jnp.multiply, left, right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return _reduced(products, dtype, jnp.add, lambda rows: jnp.sum(rows, axis=-1), jnp.sum)


@functools.partial(jax.jit, inline=True)
def _norms(rows):
    safe = _units(rows)
    scaled = [
        jax.tree.map(lambda leaf, unit=unit: leaf / unit, parts)
        for parts, unit in zip(_joined(rows, safe.dtype), safe, strict=True)
    ]
    squares = jax.tree.map(jnp.square, scaled)
    return safe * jnp.sqrt(_reduced(squares, safe.dtype, jnp.add, lambda rows: jnp.sum(rows, axis=-1), jnp.sum))


def _units(rows):
    sizes = _largests(rows, _top)
    return jnp.where((sizes > 0) & jnp.isfinite(sizes), sizes, 1)


# XLA's maximum on CPU loses what is not a number among more than 4,000 entries (JAX 0.10.2), its sum does not: x - x is
# finite where x is, and not a number elsewhere. Zero times x would say so as well, by a whole array of zeros.
@functools.partial(jax.jit, inline=True, static_argnums=1)
def _largests(rows, of_entries):
    real = [[jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf for leaf in leaves] for leaves in rows]
    dtype = wide_dtype(*jax.tree.leaves(real))
    return _reduced(_joined(real, dtype), dtype, jnp.maximum, functools.partial(of_entries, axis=-1), of_entries)


def _top(entries, axis=None):
    return jnp.max(jnp.abs(entries), axis)


def _finite_or_nan(entries, axis=None):
    return jnp.sum(entries - entries, axis)


def _top_or_nan(entries, axis=None):
    # Zero times the sum: x - x is what rounding has taken off a product that a compiler has fused with the difference.
    return _top(entries, axis) + 0 * _finite_or_nan(entries, axis)


def _joined(rows, dtype):
    """For each of several lists of leaves, all of one structure, (the large ones, the small ones as one vector)."""
    places = [place for place, leaves in enumerate(zip(*rows, strict=True)) if leaves[0].size]
    small = {place for place in places if all(is_small(row[place]) for row in rows)}

    def joined(row):
        leaves = {place: row[place].astype(dtype) for place in places}
        vectors = [leaf.ravel() for place, leaf in leaves.items() if place in small]
        large = [leaf for place, leaf in leaves.items() if place not in small]
        return large, [jnp.concatenate(vectors)] if vectors else []

    return [joined(list(map(jnp.asarray, row))) for row in rows]


def _reduced(parts, dtype, combine, of_small, of_large):
    """One number for each of what ``_joined`` returns; small leaves of all of them are reduced at once."""
    large, small = ([part[i] for part in parts] for i in (0, 1))
    numbers = [jnp.stack([of_large(leaf) for leaf in leaves]) for leaves in zip(*large, strict=True)]
    numbers += [of_small(jnp.stack(vectors)) for vectors in zip(*small, strict=True)]
    return functools.reduce(combine, numbers, jnp.zeros(len(parts), dtype))
