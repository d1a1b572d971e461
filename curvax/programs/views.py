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

from curvax.programs.walk import Address, Site, apply_equation
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

    Attributes:
        operands: What it is computed from.
    """

    operands: tuple[Node, ...] = dataclasses.field(default=(), kw_only=True)

    @functools.cached_property
    def leaves(self) -> tuple[int, ...]:
        """The leaves that the node depends on."""
        return _union(node.leaves for node in self.operands)

    @functools.cached_property
    def scans(self) -> tuple[Scan, ...]:
        """The scans from one step of which to the next the node differs."""
        return _union(node.scans for node in self.operands)

    @functools.cached_property
    def unknown(self) -> tuple[Node, ...]:
        """The arrays in it that are not known before the program runs."""
        return _union(node.unknown for node in self.operands)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(Node):
    """A leaf of the parameters, by its place among ``jax.tree.leaves``."""

    index: int

    @functools.cached_property
    def leaves(self) -> tuple[int, ...]:
        return (self.index,)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Node):
    """An array that the program holds."""

    value: Any

    @functools.cached_property
    def unknown(self) -> tuple[Node, ...]:
        return (self,) if isinstance(self.value, Tracer) else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Node):
    """A value of the running program that is the same for all examples, such as a batch statistic.

    It is an operand of an equation: ``place`` is the address of the equation and the number of the operand.
    """

    place: Address
    value: Any  # its ShapeDtypeStruct

    @functools.cached_property
    def unknown(self) -> tuple[Node, ...]:
        return (self,)


@dataclasses.dataclass(frozen=True, eq=False)
class Applied(Node):
    """One output of an equation of a program."""

    site: Site
    output: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sliced(Node):
    """What a ``scan`` hands to its body: one element along axis 0 of ``operands[0]``."""

    scan: Scan

    @functools.cached_property
    def scans(self) -> tuple[Scan, ...]:
        return _union([self.operands[0].scans, (self.scan,)])


def value(
    node: Node,
    leaves: Sequence[Array] | Mapping[int, Array],
    scans: Sequence[Scan] = (),
    given: Mapping[Address, Array] | None = None,
    known: Mapping[Node, Array] | None = None,
) -> Array:
    """The node's value at these leaves, with one leading axis for each scan in ``scans`` that it takes slices of.

    Args:
        node: The node.
        leaves: The leaves of the parameters, at least those that the node depends on.
        scans: The scans around the node, outermost first.
        given: The values of ``Given`` nodes by their places.
        known: Values to take for nodes whatever they are.
    """
    known = dict(known or {}) | {n: given[n.place] for n in places_given(node) if given}
    return _value(node, leaves, tuple(scan for scan in scans if scan in node.scans), known)


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


class Signatures:
    """Numbers nodes so that two of one number have the same value."""

    def __init__(self):
        self._numbers: dict[Any, int] = {}
        self._of: dict[Node, int] = {}

    def __call__(self, node: Node) -> int:
        """The node's number."""
        if node not in self._of:
            self._of[node] = self._numbers.setdefault(self._description(node), len(self._numbers))
        return self._of[node]

    def _description(self, node):
        operands = tuple(map(self, node.operands))
        if isinstance(node, Applied):
            params = tuple(sorted((key, str(entry)) for key, entry in node.site.eqn.params.items()))
            return node.site.name, params, operands, node.output
        if isinstance(node, Constant):
            scalar = jnp.ndim(node.value) == 0 and not isinstance(node.value, Tracer)
            return "constant", float(node.value) if scalar and jnp.isrealobj(node.value) else id(node.value)
        return type(node), operands, node.leaves, node.place if isinstance(node, Given) else ()


MOVES = frozenset(
    {
        *("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "sharding_constraint"),
        *("slice", "dynamic_slice", "split", "concatenate", "stack", "unstack", "pad"),
        *("convert_element_type", "reduce_precision", "optimization_barrier"),
    }
)
"""Primitives that put every entry in at most one place, unchanged."""

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
    """Whether every entry of the node is one entry of one leaf (or a constant zero), none of them twice."""
    found = [n for n in ancestors(node) if n.leaves]
    if not all(_moves(n) for n in found if isinstance(n, Applied)):
        return False
    # Whatever is used twice on the way to the node may be there twice.
    used = [operand for n in found for operand in n.operands if operand.leaves]
    leaves = [n.index for n in found if isinstance(n, Leaf)]
    return len(used) == len(set(used)) and len(leaves) == len(set(leaves))


def _moves(node):
    eqn = node.site.eqn
    same_size = node.site.name == "broadcast_in_dim" and eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    return node.site.name in MOVES or same_size


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
) -> tuple[tuple[int, ...], bool]:
    """(axes along which a node's value depends on different entries of the parameters, whether it only moves them)."""
    axes = _axes_of_leaf(node, structs)
    if axes is not None:
        return tuple(i for i, size in enumerate(axes) if size > 1), True
    return _varying_by_numbers(node, {i: structs[i] for i in node.leaves}, scans)


def _axes_of_leaf(node, structs):
    """For a leaf that is cast, copied along new axes and given axes of length one, what length it has in each axis."""
    if isinstance(node, Leaf):
        return structs[node.index].shape
    if not isinstance(node, Applied) or len(node.operands) != 1:
        return None
    axes, eqn = _axes_of_leaf(node.operands[0], structs), cast(Any, node.site.eqn)
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if axes is None or node.site.name in ("convert_element_type", "copy", "copy_p"):
        return axes
    if node.site.name == "broadcast_in_dim":
        places = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(places.get(i, 1) for i in range(len(new)))
    before, after = ([i for i, size in enumerate(shape) if size > 1] for shape in (old, new))
    if node.site.name in ("reshape", "squeeze", "expand_dims") and [old[i] for i in before] == [new[i] for i in after]:
        places = dict(zip(after, (axes[i] for i in before), strict=True))
        return tuple(places.get(i, 1) for i in range(len(new)))
    return None


def _varying_by_numbers(node, structs, scans):
    """The same for any node, by evaluating it with a number for each entry of its leaves."""
    starts = dict(zip(structs, np.cumsum([1, *(math.prod(leaf.shape) for leaf in structs.values())]), strict=False))
    total = sum(math.prod(leaf.shape) for leaf in structs.values())
    with jax.ensure_compile_time_eval():
        known = {n: _stand_in(n.value) for n in node.unknown}
        zeros = {i: jnp.zeros(leaf.shape, leaf.dtype) for i, leaf in structs.items()}
        low = np.asarray(value(node, zeros, scans, known=known), np.float64)
        codes = np.zeros_like(low)
        for place in range(math.ceil(math.log(total + 2, 64))):  # digits that every dtype holds exactly
            digits = {
                i: jnp.asarray((start + np.arange(leaf.size)) // 64**place % 64, leaf.dtype).reshape(leaf.shape)
                for (i, leaf), start in zip(structs.items(), starts.values(), strict=True)
            }
            codes += 64**place * (np.asarray(value(node, digits, scans, known=known), np.float64) - low)
    axes = tuple(i for i in range(codes.ndim) if codes.shape[i] > 1 and np.any(codes != np.take(codes, [0], axis=i)))
    entries = codes[tuple(slice(None) if i in axes else 0 for i in range(codes.ndim))].ravel()
    places = set(entries.tolist())
    moved = len(places) == entries.size and places <= set(range(1, 1 + total))
    return axes, moved and not node.unknown


def _stand_in(array):
    """Numbers for an array that is not known yet, all different: what is multiplied by them goes on to vary."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(np.random.default_rng(0).uniform(1, 2, array.shape), array.dtype)
    return jnp.arange(array.size, dtype=array.dtype).reshape(array.shape)


def _value(node, leaves, scans, known):
    if not scans:
        return _plain_value(node, leaves, known)
    outer, inner = scans[0], scans[1:]
    slices = [n for n in ancestors(node) if isinstance(n, Sliced) and n.scan == outer]
    wholes = [_plain_value(n.operands[0], leaves, known) for n in slices]

    def one(*parts):
        return _value(node, leaves, inner, known | dict(zip(slices, parts, strict=True)))

    return jax.vmap(one)(*wholes)


def _plain_value(node, leaves, known):
    found = dict(known)

    def evaluate(n):
        if n not in found:
            if isinstance(n, Leaf):
                found[n] = leaves[n.index]
            elif isinstance(n, Constant):
                found[n] = n.value
            else:
                assert isinstance(n, Applied), "a slice of a scan outside of it"
                found[n] = apply_equation(n.site.program, n.site.eqn, *map(evaluate, n.operands))[n.output]
        return found[n]

    return evaluate(node)


def _union(parts):
    """Every entry of the tuples once; leaves in their order, so that equal sets are equal tuples."""
    entries = list(dict.fromkeys(entry for part in parts for entry in part))
    return tuple(sorted(entries)) if entries and isinstance(entries[0], int) else tuple(entries)
