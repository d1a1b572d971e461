"""Products of a map with vectors that are kept in one dtype: the widest of the map's leaves and at least float32."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from curvax import trees
from curvax.types import PyTree


class Operator(Protocol):
    """What is needed of a symmetric linear map here; a ``LinearMap`` is one."""

    @property
    def structure(self) -> PyTree: ...

    def __call__(self, vector: PyTree) -> PyTree: ...

    def block(self, vectors: PyTree) -> PyTree: ...


def dtype_of(linear_map: Operator) -> Any:
    """The dtype of vectors and of scalars about this map."""
    return trees.wide_dtype(*jax.tree.leaves(linear_map.structure))


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Every leaf in one dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def product(linear_map: Operator, vector: PyTree) -> PyTree:
    """A v in the wide dtype; the map itself is given its own dtypes."""
    return cast(linear_map(trees.cast_like(vector, linear_map.structure)), dtype_of(linear_map))


def block_product(linear_map: Operator, vectors: PyTree) -> PyTree:
    """A v_1 ... A v_k in the wide dtype."""
    return cast(linear_map.block(trees.cast_like(vectors, linear_map.structure)), dtype_of(linear_map))
