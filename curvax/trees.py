"""Arithmetic on parameter pytrees, with the dtype rules and the leaf paths that the whole library uses.

Scalars never change the dtype of a leaf, inner products are accumulated in float32 or wider, and leaves are addressed
by normalised paths such as ``"encoder/0/kernel"``, the same for dicts, flax, equinox and trees with hidden leaves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    SequenceKey,
    register_dataclass,
    tree_flatten_with_path,
)

from curvax.types import PyTree, Scalar


def vdot(left: PyTree, right: PyTree) -> jax.Array:
    """The inner product of two pytrees, sum_i <left_i, right_i>, accumulated in float32 or wider.

    >>> vdot({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}).item()
    11.0
    """
    products = jax.tree.map(_leaf_vdot, left, right)
    return functools.reduce(_add_promoted, jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def vdots(*pairs: tuple[PyTree, PyTree]) -> jax.Array:
    """The inner products of several pairs of pytrees of one structure, shape (len(pairs),).

    Small leaves of all pairs are summed together: on CPU XLA makes four kernels of a sum.

    >>> vdots(({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}), ({"a": jnp.ones(2)}, {"a": jnp.ones(2)}))
    Array([11.,  2.], dtype=float...)
    """
    return _vdots([(jax.tree.leaves(left), jax.tree.leaves(right)) for left, right in pairs])


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


SMALL = 2**14  # entries: 64 kilobytes in float32


def is_small(leaf: Any) -> bool:
    """Whether kernels for a leaf cost more than passes over it, so that it is worth joining to others.

    Leaves on a mesh are not joined, as their sharding would be lost.
    """
    return leaf.size <= SMALL and jax.typeof(leaf).sharding.mesh.empty


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


def where(condition: Any, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Leaf by leaf ``jnp.where`` with one scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)


def first_true(*conditions: jax.Array) -> jax.Array:
    """The number of the first of the scalar conditions that holds, their count where none does.

    A reduction and no expression: XLA copies an expression of scalars, however long, into the kernel of every leaf that
    is chosen by it, which was a sixth of what there was to compile of a step of Hessian-free.

    >>> first_true(jnp.array(False), jnp.array(True)).item(), first_true(jnp.array(False)).item()
    (1, 1)
    """
    return jnp.argmax(jnp.stack([*conditions, jnp.array(True)])).astype(jnp.int32)


def all_true(*conditions: jax.Array) -> jax.Array:
    """Whether all of the scalar conditions hold, by a reduction likewise.

    >>> all_true(jnp.array(True), jnp.array(False)).item()
    False
    """
    return first_true(*[~condition for condition in conditions]) == len(conditions)


def choose(number: jax.Array, *cases: PyTree) -> PyTree:
    """The pytree of that number; the last for every greater number.

    Small leaves by a branch, whose copies need no kernels, large ones by selection, which is one with what makes them.

    >>> choose(jnp.array(1), {"a": jnp.zeros(2)}, {"a": jnp.ones(2)})
    {'a': Array([1., 1.], dtype=float...)}
    """
    structure = jax.tree.structure(cases[-1])
    found, branched = [], []
    for leaves in zip(*map(structure.flatten_up_to, cases), strict=True):
        if any(leaf is not leaves[0] for leaf in leaves):
            leaves = [jnp.asarray(leaf).astype(jnp.result_type(*leaves)) for leaf in leaves]
            if all(map(is_small, leaves)):
                branched.append((len(found), leaves))
            else:
                for index, leaf in reversed(list(enumerate(leaves[:-1]))):
                    leaves[-1] = jnp.where(number == index, leaf, leaves[-1])
        found.append(leaves[-1])
    if branched:
        places, leaves = zip(*branched, strict=True)
        for place, leaf in zip(places, _branch(number, list(zip(*leaves, strict=True))), strict=True):
            found[place] = leaf
    return structure.unflatten(found)


@functools.partial(jax.jit, inline=True)  # outside of jit it is then compiled once
def _branch(number, cases):
    return jax.lax.switch(number, [lambda case=case: case for case in cases])


def zeros_like(tree: PyTree) -> PyTree:
    """A pytree of zeros with the shapes and dtypes (and sharding) of ``tree``, which may hold ShapeDtypeStructs."""
    return jax.tree.map(jnp.zeros_like, tree)


def widened(tree: PyTree) -> PyTree:
    """Every leaf in float32 or wider, as for squares, which leave the range of narrow leaves."""
    return jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), tree)


def wide_structure(tree: PyTree) -> PyTree:
    """The ShapeDtypeStructs of ``widened(tree)``."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wide_dtype(leaf)), tree)


def wide_full(tree: PyTree, value: Scalar) -> PyTree:
    """One value everywhere, with the shapes of ``tree``, which may hold ShapeDtypeStructs, in float32 or wider."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), wide_structure(tree))


def clip(tree: PyTree, least: Scalar, largest: Scalar) -> PyTree:
    """Every entry brought within the bounds, in the dtypes of ``tree``."""
    return jax.tree.map(lambda x: jnp.clip(x, jnp.asarray(least, x.dtype), jnp.asarray(largest, x.dtype)), tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` with every leaf cast to the dtype of the same leaf of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


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


def size(tree: PyTree) -> int:
    """The number of entries of all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def example_structure(tree: PyTree) -> PyTree:
    """The ShapeDtypeStructs of one example of ``tree``, whose leaves have the examples on axis 0."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def structure_of(tree: PyTree) -> PyTree:
    """The pytree of ``jax.ShapeDtypeStruct`` that describes ``tree``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


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


def join_complex(tree: PyTree) -> PyTree:
    """``tree`` with a complex array for every ``RealPair``: the inverse of ``split_complex``."""

    def join(node):
        return jax.lax.complex(node.real, node.imag) if isinstance(node, RealPair) else node

    return jax.tree.map(join, tree, is_leaf=lambda node: isinstance(node, RealPair))


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


def random_normal(key: jax.Array, like: PyTree) -> PyTree:
    """A pytree of independent standard normal entries, shaped like ``like``."""
    return _random(jax.random.normal, key, like)


def random_rademacher(key: jax.Array, like: PyTree) -> PyTree:
    """A pytree of independent entries -1 or +1 with equal probability, shaped like ``like``; 32 by each random word."""
    return _random(_signs, key, like)


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


def scale_rows(scales: jax.Array, tree: PyTree) -> PyTree:
    """Entry i of the leading axes of every leaf times ``scales[i]``, in the dtypes of ``tree``."""
    return jax.tree.map(lambda leaf: leaf * expand_right(scales, leaf.ndim).astype(leaf.dtype), tree)


def wide_dtype(*leaves: Any) -> Any:
    """The dtype in which scalars about these leaves are accumulated: their widest, and at least float32."""
    return functools.reduce(wider, [jnp.result_type(leaf) for leaf in leaves], jnp.dtype(jnp.float32))


def wide_zero(tree: PyTree) -> jax.Array:
    """A scalar zero in the dtype in which scalars about the leaves are accumulated."""
    return jnp.zeros((), wide_dtype(*jax.tree.leaves(tree)))


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
            f"leaf {unknown[0]!r} is not among the parameters, which are {_listed(leaf_paths(whole))}; pass a"
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


def floating_arrays(tree: PyTree, name: str) -> PyTree:
    """``tree`` with the plain numbers and numpy arrays among its leaves as arrays of jax, in the dtypes it gives them.

    Raises:
        TypeError: A leaf is no array of real floating-point numbers; the error names it.

    >>> floating_arrays({"w": jnp.ones(2), "gain": 1.5}, "params")["gain"]
    Array(1.5, dtype=float...)
    """
    check_floating(tree, name)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)) if isinstance(x, _OF_PYTHON) else x, tree)


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


def check_floating(tree: PyTree, name: str) -> None:
    """Raises a TypeError that names the first leaf that is not an array of real floating-point numbers."""
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if not is_array(leaf) and not isinstance(leaf, _OF_PYTHON):
            raise TypeError(
                f"{name}[{path!r}] is {leaf!r}, not an array; parameters are arrays alone: keep the rest of a model"
                " where model_fn finds it, as by params, static = equinox.partition(model, equinox.is_inexact_array)"
                " and equinox.combine(params, static) inside model_fn"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            advice = (
                "split it into a real and an imaginary leaf"
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "curvature needs real numbers: move the leaf into the inputs of the model"
            )
            raise TypeError(f"{name}[{path!r}] has dtype {dtype}; {advice}")


def check_like(tree: PyTree, like: PyTree, name: str, like_name: str = "the parameters") -> None:
    """Raises a ValueError that names the first leaf in which ``tree`` differs from ``like`` in structure or shape."""
    check_same_leaves(tree, like, name, like_name)
    for path, leaf, other in zip(leaf_paths(like), jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name}[{path!r}] has shape {jnp.shape(leaf)}, but {like_name} have {jnp.shape(other)} there"
            )
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"{name} is a {jax.tree.structure(tree)}, but {like_name} are a {jax.tree.structure(like)}: same leaves,"
            " other containers; rebuild it with jax.tree.map over the parameters"
        )


def check_same_leaves(tree: PyTree, like: PyTree, name: str, like_name: str = "the parameters") -> None:
    """Raises a ValueError that names the leaves that only one of ``tree`` and ``like`` has."""
    paths, like_paths = leaf_paths(tree), leaf_paths(like)
    if paths != like_paths:
        missing = [path for path in like_paths if path not in paths]
        surplus = [path for path in paths if path not in like_paths]
        raise ValueError(
            f"{name} does not have the leaves of {like_name}: "
            + "; ".join(
                f"{what} {_listed(which)}" for what, which in (("missing", missing), ("surplus", surplus)) if which
            )
        )


def _leaf_vdot(x, y):
    dtype = wide_dtype(x, y)
    return jnp.sum(x.astype(dtype) * y.astype(dtype))


def _add_promoted(x, y):
    dtype = wider(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def _scaled(scalar, x):
    """``scalar * x`` in at least float32 where the scalar is an array, so that a bfloat16 leaf is rounded only once."""
    if isinstance(scalar, (int, float)):
        return scalar * x
    dtype = wider(x.dtype, jnp.float32)
    return scalar.astype(dtype) * x.astype(dtype)


def _random(sampler, key, like):
    leaves, treedef = jax.tree.flatten(like)
    keys = split_key(key, max(len(leaves), 1))
    return treedef.unflatten([sampler(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=False)])


def _signs(key, shape, dtype):
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None, :]) & 1
    return (1 - 2 * bits.reshape(-1)[:count].astype(jnp.int32)).astype(dtype).reshape(shape)


_OF_PYTHON = (bool, int, float, complex, np.ndarray, np.generic)


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


def _listed(paths: list[str], most: int = 6) -> str:
    shown = ", ".join(repr(path) for path in paths[:most])
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")
