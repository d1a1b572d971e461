"""Small leaves joined to one vector, for algorithms that do much to every leaf.

An iteration of conjugate gradients makes some twenty passes over every leaf. For the biases, scales and small kernels
of a network the time of a pass is that of launching it, and every pass has to be compiled: twenty over one vector are a
fraction of twenty for each leaf. Large leaves stay as they are, as joining them would cost a copy for each product with
the matrix, and so do leaves on a mesh, whose sharding a joint vector would not have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the leaves of ``like`` are joined: ``groups`` has the numbers of the leaves that go together."""

    like: PyTree
    groups: tuple[tuple[int, ...], ...]

    def pack(self, tree: PyTree) -> tuple[jax.Array, ...]:
        """One array for each group. A leaf alone keeps its shape, and axes in front of those of ``like`` stay."""
        leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(self.like), strict=True))
        return tuple(
            leaves[group[0]][0] if len(group) == 1 else _joined([leaves[i] for i in group]) for group in self.groups
        )

    def unpack(self, arrays: tuple[jax.Array, ...]) -> PyTree:
        """The inverse."""
        leaves, structure = jax.tree.flatten(self.like)
        found = list(leaves)
        for group, array in zip(self.groups, arrays, strict=True):
            if len(group) == 1:
                found[group[0]] = array
                continue
            start, lead = 0, array.shape[:-1]
            for index in group:
                shape = leaves[index].shape
                found[index] = array[..., start : start + math.prod(shape)].reshape(*lead, *shape)
                start += math.prod(shape)
        return structure.unflatten(found)

    def inside(self, function: Callable[[PyTree], PyTree], name: str) -> Callable[[tuple], tuple]:
        """A linear function of pytrees like ``like`` as one of packed arrays."""

        def packed(arrays):
            image = function(self.unpack(arrays))
            trees.check_like(image, self.like, f"the result of {name}", "the entries of b")
            return self.pack(image)

        return packed


def packing_of(tree: PyTree) -> Packing:
    """Small leaves of one dtype go together; the order of the groups is that of their first leaves."""
    groups: dict[object, list[int]] = {}
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        groups.setdefault(leaf.dtype if trees.is_small(leaf) else number, []).append(number)
    return Packing(trees.structure_of(tree), tuple(map(tuple, groups.values())))


def _joined(pairs):
    dtype = functools.reduce(trees.wider, [leaf.dtype for leaf, _ in pairs])
    rows = [leaf.reshape(*leaf.shape[: leaf.ndim - like.ndim], like.size) for leaf, like in pairs]
    return jnp.concatenate([row.astype(dtype) for row in rows], axis=-1)
