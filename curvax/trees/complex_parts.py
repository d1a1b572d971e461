"""Complex leaves as pairs of real ones: curvature is that of functions of real numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax.types import PyTree


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RealPair:
    """A complex array as its real and its imaginary part, a pytree of the two."""

    real: Any
    imag: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the complex array."""
        return self.real.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the complex array."""
        return jnp.result_type(self.real.dtype, jnp.complex64)


def split_complex(tree: PyTree) -> PyTree:
    """``tree`` with a ``RealPair`` for every complex leaf.

    >>> split_complex({"z": jnp.array(1 + 2j)})["z"].imag.item()
    2.0
    """

    def split(leaf):
        return RealPair(jnp.real(leaf), jnp.imag(leaf)) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else leaf

    return jax.tree.map(split, tree)


def join_complex(tree: PyTree) -> PyTree:
    """``tree`` with a complex array for every ``RealPair``: the inverse of ``split_complex``."""

    def join(node):
        return jax.lax.complex(node.real, node.imag) if isinstance(node, RealPair) else node

    return jax.tree.map(join, tree, is_leaf=lambda node: isinstance(node, RealPair))


def complex_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` with complex leaves where ``like`` has a ``RealPair``.

    Raises:
        TypeError: A leaf is complex where ``like`` has a real one.
    """

    def convert(wanted, leaf):
        leaf = jnp.asarray(leaf)
        if isinstance(wanted, RealPair):
            return leaf.astype(wanted.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(f"a complex array, {leaf.dtype}, where a real one belongs; take its real part")
        return leaf

    return jax.tree.map(convert, like, tree, is_leaf=lambda node: isinstance(node, RealPair))
