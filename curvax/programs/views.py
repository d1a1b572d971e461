"""How a leaf of the parameters reaches the operation that uses it: a graph of equations that is affine in the leaves.

A model seldom multiplies by a leaf as it is: it transposes it, takes a slice ``params[i]``, joins the kernels of four
gates, casts to bfloat16, or adds one to a scale. As long as nothing but constants takes part, the operand is an affine
function of the leaves; this module holds such functions, evaluates them, and says when two are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from curvax import trees
from curvax.programs.walk import Address, Site, apply_equation, apply_widely
from curvax.types import Array


@dataclasses.dataclass(frozen=True)
class Scan:
    """One ``scan`` that a use stands in, by its address."""

    address: Address
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value that depends on leaves and constants alone.

    What is asked of every node again and again is kept with it, so that graphs are walked once.
    """

    operands: tuple[Node, ...] = dataclasses.field(default=(), kw_only=True)

    @functools.cached_property
    def leaves(self) -> tuple[int, ...]:
        """The leaves that the node depends on, in their order."""
        own = {self.index} if isinstance(self, Leaf) else set()
        return tuple(sorted(own.union(*(node.leaves for node in self.operands))))

    @functools.cached_property
    def scans(self) -> frozenset[Scan]:
        """The scans from one step of which to the next the node differs."""
        own = {self.scan} if isinstance(self, Sliced) else set()
        return frozenset(own).union(*(node.scans for node in self.operands))

    @functools.cached_property
    def unknown(self) -> frozenset[Any]:
        """The arrays in it that are not known before the program runs."""
        own = isinstance(self, Given) or (isinstance(self, Constant) and isinstance(self.value, Tracer))
        return frozenset({self} if own else ()).union(*(node.unknown for node in self.operands))

    @functools.cached_property
    def signature(self) -> Any:
        """A hashable description: nodes of the same signature have the same value."""
        return type(self), _described(self), *(node.signature for node in self.operands)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(Node):
    """A leaf of the parameters, by its place among ``jax.tree.leaves``."""

    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Node):
    """An array that the program holds."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Node):
    """A value of the running program that is the same for all examples, such as a batch statistic.

    It is an operand of an equation: ``place`` is the address of the equation and the number of the operand.
    """

    place: Address
    value: Any  # its shape and dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Applied(Node):
    """One output of an equation of a program."""

    site: Site
    output: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sliced(Node):
    """What a ``scan`` hands to its body: one element along axis 0 of ``operands[0]``."""

    scan: Scan


def value(
    node: Node,
    leaves: Sequence[Array] | Mapping[int, Array],
    scans: Sequence[Scan] = (),
    given: Mapping[Address, Array] | None = None,
    known: Mapping[Node, Array] | None = None,
    wide: bool = False,
) -> Array:
    """The node's value at these leaves, with one leading axis for each scan in ``scans`` that it takes slices of.

    Args:
        leaves: The leaves of the parameters, at least those that the node depends on.
        scans: The scans around the node, outermost first.
        given: The values of ``Given`` nodes by their places.
        known: Values to take for nodes whatever they are.
        wide: Compute in float32 what the program computes in narrower dtypes, so that the transpose of the function
            serves for values outside of their range.
    """
    known = dict(known or {}) | {n: given[n.place] for n in places_given(node) if given}
    if wide:
        leaves = {i: trees.widened(leaves[i]) for i in node.leaves}
    return _value(node, leaves, tuple(scan for scan in scans if scan in node.scans), known, wide)


def places_given(node: Node) -> tuple[Given, ...]:
    """The values of the running program that the node is computed from."""
    return tuple(n for n in node.unknown if isinstance(n, Given))


def ancestors(node: Node) -> list[Node]:
    """The node and everything it is computed from, each once."""
    seen = {node: None}
    stack = [node]
    while stack:
        new = [n for n in stack.pop().operands if n not in seen]
        seen |= dict.fromkeys(new)
        stack += new
    return list(seen)


def _described(node):
    """What tells a node apart from others of its type and operands."""
    if isinstance(node, Applied):
        params = sorted((key, str(entry)) for key, entry in node.site.eqn.params.items())
        return node.site.name, *params, node.output
    if isinstance(node, Constant):
        if isinstance(node.value, np.ndarray) and node.value.dtype.kind == "i" and node.value.size <= 4096:
            return node.value.shape, node.value.dtype.str, node.value.tobytes()  # such as the numbers of a loop
        scalar = jnp.ndim(node.value) == 0 and jnp.isrealobj(node.value) and not node.unknown
        return float(node.value) if scalar else id(node.value)
    return node.place if isinstance(node, Given) else node.leaves


MOVES = frozenset(
    {
        *("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "sharding_constraint"),
        *("slice", "dynamic_slice", "split", "concatenate", "stack", "unstack", "pad"),
        *("convert_element_type", "reduce_precision", "optimization_barrier"),
    }
)
"""Primitives that put every entry in at most one place, unchanged; what they join it with may be constants."""

_AFFINE = (MOVES - {"pad", "dynamic_slice"}) | {
    *("broadcast_in_dim", "neg", "add", "sub", "add_any", "reduce_sum", "name"),
}


def is_affine(site: Site, inputs: Sequence[Node]) -> bool:
    """Whether an equation of parameters and constants is affine in the parameters."""
    name = site.name
    with_leaves = [i for i, x in enumerate(inputs) if x.leaves]
    if name in _AFFINE:
        return all(jnp.issubdtype(cast(Any, v.aval).dtype, jnp.floating) for v in site.eqn.outvars)
    if name in ("mul", "dot_general", "conv_general_dilated"):
        return len(with_leaves) == 1
    if name in ("div", "gather", "dynamic_slice"):
        return with_leaves == [0]
    if name == "pad":
        return 1 not in with_leaves
    if name == "select_n":
        return 0 not in with_leaves
    return False


def only_moves(node: Node) -> bool:
    """Whether every entry of the node is one entry of one leaf, none of them twice, and none a constant."""
    found = [n for n in ancestors(node) if n.leaves]
    if not all(_moves(n) for n in found if isinstance(n, Applied)):
        return False
    # Whatever is used twice on the way to the node may be there twice.
    used = [operand for n in found for operand in n.operands if operand.leaves]
    leaves = [n.index for n in found if isinstance(n, Leaf)]
    return len(used) == len(set(used)) and len(leaves) == len(set(leaves))


def _moves(node):
    eqn, name = node.site.eqn, node.site.name
    if name == "dynamic_slice":
        return _reads_apart(node)
    if name == "broadcast_in_dim":
        return eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    if name == "pad":
        return all(max(added) <= 0 for added in eqn.params["padding_config"])
    if name in ("concatenate", "stack"):
        return all(operand.leaves for operand in node.operands)
    return name in MOVES


def _reads_apart(node):
    """Whether the slices that different steps of scans take have no entry in common."""
    _, *starts = node.operands
    scans = sorted(frozenset().union(*(start.scans for start in starts)), key=lambda scan: scan.address)
    if any(start.unknown for start in starts):
        return False
    shape, sizes = node.site.eqn.invars[0].aval.shape, node.site.eqn.params["slice_sizes"]
    corners = []
    with jax.ensure_compile_time_eval():
        for start, length, size in zip(starts, shape, sizes, strict=True):
            numbers = np.clip(np.asarray(value(start, {}, scans)), 0, length - size)
            corners.append(numbers.reshape([scan.length if scan in start.scans else 1 for scan in scans]))
    places = np.stack([np.ravel(numbers) for numbers in np.broadcast_arrays(*corners)], axis=-1)
    aligned = all(np.all(column % size == 0) for column, size in zip(places.T, sizes, strict=True))
    return len(places) == 1 or (aligned and len(np.unique(places, axis=0)) == len(places))


def without_permutation(node: Node) -> tuple[Node, tuple[int, ...]]:
    """(base, order) with node = transpose(base, order), where base is not itself a transpose or a cast."""
    permutation = ()
    while isinstance(node, Applied):
        if node.site.name == "transpose":
            step = tuple(node.site.eqn.params["permutation"])
            permutation = tuple(step[i] for i in permutation) if permutation else step
        elif node.site.name not in ("convert_element_type", "copy", "copy_p"):
            break
        (node,) = node.operands
    return node, permutation


def varying_axes(
    node: Node, structs: Sequence[jax.ShapeDtypeStruct], scans: Sequence[Scan]
) -> tuple[tuple[int, ...], bool, bytes]:
    """(axes along which a node's value depends on different entries of parameters, whether it only moves them, which).

    The last tells nodes apart at which other entries arrive. Found by evaluating it with a number for each entry of its
    leaves; for small leaves such as scales and biases.
    """
    sizes = [math.prod(structs[i].shape) for i in node.leaves]
    total, starts = sum(sizes), np.cumsum([1, *sizes[:-1]])
    with jax.ensure_compile_time_eval():
        known = {n: _stand_in(n.value) for n in node.unknown}

        def at(digits):
            """The value where the entries of the leaves are digits of their numbers, which start at one."""
            entries = {
                i: jnp.asarray(digits(start + np.arange(size)), structs[i].dtype).reshape(structs[i].shape)
                for i, start, size in zip(node.leaves, starts, sizes, strict=True)
            }
            return np.asarray(value(node, entries, scans, known=known), np.float64)

        low = at(np.zeros_like)
        # Digits that every dtype holds exactly; they add up to the number of the entry that arrives.
        places = range(math.ceil(math.log(total + 2, 64)))
        codes = np.sum([64**place * (at(lambda n, place=place: n // 64**place % 64) - low) for place in places], 0)
        # A sum of two entries may arrive at the number of a third; at other entries it gives itself away.
        tables = np.random.default_rng(0).integers(1, 64, (2, total + 1))
        probes = [(table, at(lambda n, table=table: table[n]) - low) for table in tables]
    axes = tuple(i for i in range(codes.ndim) if codes.shape[i] > 1 and np.any(codes != np.take(codes, [0], axis=i)))
    entries = codes[tuple(slice(None) if i in axes else 0 for i in range(codes.ndim))].ravel()
    numbers = set(entries.tolist())
    if node.unknown or len(numbers) < entries.size or not numbers <= set(range(1, 1 + total)):
        return axes, False, entries.tobytes()
    moves = all(np.array_equal(table[codes.astype(int)], probe) for table, probe in probes)
    return axes, moves, entries.tobytes()


def _stand_in(array):
    """Numbers for an array that is not known yet, all different: what is multiplied by them goes on to vary."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(np.random.default_rng(0).uniform(1, 2, array.shape), array.dtype)
    return jnp.arange(array.size, dtype=array.dtype).reshape(array.shape)


def _value(node, leaves, scans, known, wide):
    if not scans:
        return _plain_value(node, leaves, known, wide)
    outer, inner = scans[0], scans[1:]
    slices = [n for n in ancestors(node) if isinstance(n, Sliced) and n.scan == outer]
    wholes = [_plain_value(n.operands[0], leaves, known, wide) for n in slices]

    def one(*parts):
        return _value(node, leaves, inner, known | dict(zip(slices, parts, strict=True)), wide)

    return jax.vmap(one)(*wholes)


def _plain_value(node, leaves, known, wide):
    found = dict(known)

    def evaluate(n):
        if n not in found:
            if isinstance(n, Leaf):
                found[n] = leaves[n.index]
            elif isinstance(n, Constant):
                found[n] = n.value
            else:
                assert isinstance(n, Applied), "a slice of a scan outside of it"
                operands = list(map(evaluate, n.operands))
                if wide and n.leaves:
                    found[n] = apply_widely(n.site.program, n.site.eqn, *map(_widened, operands))[n.output]
                else:
                    found[n] = apply_equation(n.site.program, n.site.eqn, *operands)[n.output]
        return found[n]

    return evaluate(node)


def _widened(operand):
    array = jnp.asarray(operand)
    return trees.widened(array) if jnp.issubdtype(array.dtype, jnp.floating) else array
