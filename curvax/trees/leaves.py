"""The leaves of a pytree: their normalised paths, such as ``"encoder/0/kernel"``, their sizes, others in their place.

Paths are the same for dicts, flax, equinox and trees with hidden leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, tree_flatten_with_path

from curvax.types import PyTree


def leaf_paths(tree: PyTree) -> list[str]:
    """The normalised path of each leaf, in leaf order.

    Attribute, dictionary and sequence keys read alike, and the ``value`` of the box that flax puts around an array is
    dropped.

    >>> leaf_paths({"encoder": [{"kernel": jnp.ones(2)}], "scale": jnp.ones(1)})
    ['encoder/0/kernel', 'scale']
    """
    paths = [path for path, _ in tree_flatten_with_path(tree)[0]]
    if any(_names_value(path) for path in paths):
        boxed = tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree and _is_box(node))[0]
        # Of a box its own key comes first; a leaf has none.
        paths = [(*path, *rest[1:]) for path, node in boxed for rest, _ in tree_flatten_with_path(node)[0]]
    return ["/".join(map(_key_string, path)) for path in paths]


def embed(part: PyTree, whole: PyTree) -> PyTree:
    """``part``, whose leaves are some of those of ``whole`` by path, filled up with zeros to all of them.

    >>> embed({"a": None, "b": jnp.ones(1)}, {"a": jnp.ones(2), "b": jnp.ones(1)})
    {'a': Array([0., 0.], dtype=float...), 'b': Array([1.], dtype=float...)}
    """
    if jax.tree.structure(part) == jax.tree.structure(whole):
        return part
    present = dict(zip(leaf_paths(part), jax.tree.leaves(part), strict=True))
    unknown = sorted(set(present) - set(leaf_paths(whole)))
    if unknown:
        raise ValueError(
            f"leaf {unknown[0]!r} is not among the parameters, which are {listed(leaf_paths(whole))}; pass a"
            " tree whose leaves are all or some of the parameters of the objective"
        )
    leaves, treedef = jax.tree.flatten(whole)
    filled = [present.get(path) for path in leaf_paths(whole)]
    return treedef.unflatten(
        [jnp.zeros_like(leaf) if value is None else value for value, leaf in zip(filled, leaves, strict=True)]
    )


def extract(whole: PyTree, part: PyTree) -> PyTree:
    """Those leaves of ``whole`` that ``part`` has, in the structure of ``part``: the transpose of ``embed``."""
    if jax.tree.structure(part) == jax.tree.structure(whole):
        return whole
    by_path = dict(zip(leaf_paths(whole), jax.tree.leaves(whole), strict=True))
    return jax.tree.structure(part).unflatten([by_path[path] for path in leaf_paths(part)])


def replace_leaves(tree: PyTree, places: Collection[int], other: PyTree) -> PyTree:
    """``tree`` with the leaves at ``places``, in leaf order, from ``other``.

    >>> replace_leaves([1, 2, 3], [1], [10, 20, 30])
    [1, 20, 3]
    """
    leaves, treedef = jax.tree.flatten(tree)
    others = jax.tree.leaves(other)
    return treedef.unflatten([others[i] if i in places else leaf for i, leaf in enumerate(leaves)])


def split_arrays(tree: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The arrays among the leaves, and the function that puts others in their place.

    What is left where it is are numbers, flags and strings, which are for Python to read.

    >>> arrays, rebuild = split_arrays({"mode": "train", "x": jnp.ones(2)})
    >>> rebuild(["other"])
    {'mode': 'train', 'x': 'other'}
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def rebuild(arrays):
        replaced = dict(zip(places, arrays, strict=True))
        return treedef.unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], rebuild


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the ShapeDtypeStruct of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


SMALL = 2**14  # entries: 64 kilobytes in float32


def is_small(leaf: Any) -> bool:
    """Whether kernels for a leaf cost more than passes over it, so that it is worth joining to others.

    Leaves on a mesh are not joined, as their sharding would be lost.
    """
    return leaf.size <= SMALL and jax.typeof(leaf).sharding.mesh.empty


def size(tree: PyTree) -> int:
    """The number of entries of all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def structure_of(tree: PyTree) -> PyTree:
    """The pytree of ``jax.ShapeDtypeStruct`` that describes ``tree``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def example_structure(tree: PyTree) -> PyTree:
    """The ShapeDtypeStructs of one example of ``tree``, whose leaves have the examples on axis 0."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


@dataclasses.dataclass(frozen=True)
class Static:
    """A pytree of hashable leaves, itself hashable, equal to those of equal pytrees, as jit asks of what is static."""

    tree: PyTree

    def _key(self):
        leaves, treedef = jax.tree.flatten(self.tree)
        return treedef, tuple(leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def listed(paths: list[str], most: int = 6) -> str:
    """Paths for a message, as many as one reads.

    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(path) for path in paths[:most])
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _key_string(key) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key).strip(".[]'\"")


def _names_value(path) -> bool:
    """Whether a path ends in an attribute of that name, which a dictionary's key is not."""
    return len(path) > 1 and not isinstance(path[-1], DictKey) and _key_string(path[-1]) == "value"


def _is_box(node) -> bool:
    """Whether a node holds its ``value`` and nothing else, unlike the module of an attention that has one too."""
    children = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    return len(children) == 1 and _names_value((None, *children[0][0]))
