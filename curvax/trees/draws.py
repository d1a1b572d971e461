"""Random pytrees, and keys for them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from curvax.types import PyTree


def random_normal(key: jax.Array, like: PyTree) -> PyTree:
    """A pytree of independent standard normal entries, shaped like ``like``."""
    return _random(jax.random.normal, key, like)


def random_rademacher(key: jax.Array, like: PyTree) -> PyTree:
    """A pytree of independent entries -1 or +1 with equal probability, shaped like ``like``; 32 by each random word."""
    return _random(_signs, key, like)


def split_key(key: jax.Array, count: int) -> jax.Array:
    """``count`` keys, one after the other, as ``jax.random.split``; one alone is the key itself.

    Every call of the generator is a loop of its own to compile, and most draws are of one sample, of one term, for one
    leaf: they need one call and not five. Nothing else may then be drawn from ``key``.

    >>> split_key(jax.random.key(0), 3).shape, (split_key(jax.random.key(0), 1) == jax.random.key(0)).item()
    ((3,), True)
    """
    return key[None] if count == 1 else jax.random.split(key, count)


def key_aside(key: jax.Array) -> jax.Array:
    """A key beside those that ``key`` is split into: ``jax.random.split(key, n)[i]`` is ``fold_in(key, i)``."""
    return jax.random.fold_in(key, 2**32 - 1)


def _random(sampler, key, like):
    leaves, treedef = jax.tree.flatten(like)
    keys = split_key(key, max(len(leaves), 1))
    return treedef.unflatten([sampler(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=False)])


def _signs(key, shape, dtype):
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None, :]) & 1
    return (1 - 2 * bits.reshape(-1)[:count].astype(jnp.int32)).astype(dtype).reshape(shape)
