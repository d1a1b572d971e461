"""How a leaf of the parameters reaches the operation that uses it: a graph of equations that is affine in the leaves.

A model seldom multiplies by a leaf as it is: it transposes it, takes a slice ``params[i]``, joins the kernels of four
gates, casts to bfloat16, or adds one to a scale. As long as nothing but constants takes part, the operand is an affine
function of the leaves; this module holds such functions, evaluates them, and says when two are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun


class Node:
    """A value that depends on leaves and constants alone."""

    @property
    def operands(self) -> tuple[Node, ...]:
        """What it is computed from."""
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(Node):
    """A leaf of the parameters, by its place among ``jax.tree.leaves``."""

    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Node):
    """An array that is known while tracing."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Applied(Node):
    """One output of an equation of a program."""

    program: Jaxpr
    eqn: JaxprEqn
    inputs: tuple[Node, ...]
    output: int

    @property
    def operands(self) -> tuple[Node, ...]:
        return self.inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Sliced(Node):
    """What a ``scan`` hands to its body: one element along axis 0 of ``whole``."""

    whole: Node
    scan: Any

    @property
    def operands(self) -> tuple[Node, ...]:
        return (self.whole,)


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Node):
    """A value of the running program that is the same for all examples, such as a batch statistic.

    It is an operand of an equation: ``place`` is the address of the equation and the number of the operand.
    """

    place: tuple[int, ...]
    shape: tuple[int, ...]


def value(
    node: Node,
    leaves: Sequence[jax.Array],
    scans: Sequence[Any] = (),
    given: Mapping[tuple[int, ...], jax.Array] | None = None,
) -> jax.Array:
    """The node's value at these leaves, with one leading axis for each scan in ``scans`` that it takes slices of.

    Args:
        node: The node.
        leaves: All leaves of the parameters.
        scans: The scans around the node, outermost first.
        given: The values of ``Given`` nodes by their places.
    """
    known = {id(n): (given or {})[n.place] for n in ancestors(node) if isinstance(n, Given)}
    return _value(node, leaves, tuple(scan for scan in scans if depends_on(node, scan)), known)


def places_given(node: Node) -> tuple[Given, ...]:
    """The values of the running program that the node is computed from."""
    return tuple(n for n in ancestors(node) if isinstance(n, Given))


def depends_on(node: Node, scan: Any) -> bool:
    """Whether the node differs from one step of the scan to the next."""
    return any(isinstance(n, Sliced) and n.scan is scan for n in ancestors(node))


def leaf_indices(node: Node) -> tuple[int, ...]:
    """The leaves that the node depends on."""
    return tuple(sorted({n.index for n in ancestors(node) if isinstance(n, Leaf)}))


def ancestors(node: Node) -> list[Node]:
    """The node and everything it is computed from, each once."""
    seen: dict[int, Node] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if id(current) not in seen:
            seen[id(current)] = current
            stack.extend(current.operands)
    return list(seen.values())


def signature(node: Node) -> Any:
    """A hashable description: nodes of the same signature have the same value."""
    if isinstance(node, Leaf):
        return ("leaf", node.index)
    if isinstance(node, Constant):
        scalar = jnp.ndim(node.value) == 0 and not isinstance(node.value, Tracer)
        return ("constant", float(node.value) if scalar and jnp.isrealobj(node.value) else id(node.value))
    if isinstance(node, Given):
        return ("given", node.place)
    if isinstance(node, Sliced):
        return ("sliced", signature(node.whole))
    assert isinstance(node, Applied)
    name = node.eqn.primitive.name
    params = tuple(sorted((key, str(entry)) for key, entry in node.eqn.params.items()))
    return (name, params, tuple(map(signature, node.inputs)), node.output)


MOVES = frozenset(
    {
        *("reshape", "transpose", "squeeze", "expand_dims", "rev", "copy", "copy_p", "sharding_constraint"),
        *("slice", "dynamic_slice", "split", "concatenate", "stack", "unstack", "pad"),
        *("convert_element_type", "reduce_precision", "optimization_barrier"),
    }
)
"""Primitives that put every entry in at most one place, unchanged."""


def only_moves(node: Node) -> bool:
    """Whether every entry of the node is one entry of one leaf (or a constant zero), none of them twice."""
    for n in ancestors(node):
        if not isinstance(n, Applied):
            continue
        name = n.eqn.primitive.name
        same_size = name == "broadcast_in_dim" and _size(n.eqn.invars[0]) == _size(n.eqn.outvars[0])
        if not (name in MOVES or same_size) and leaf_indices(n):
            return False
    leaves = [n.index for n in ancestors(node) if isinstance(n, Leaf)]
    return len(leaves) == len(set(leaves)) and not _diverges(node)


def without_permutation(node: Node) -> tuple[Node, tuple[int, ...]]:
    """(base, order) with node = transpose(base, order), where base is not itself a transpose or a cast."""
    permutation = None
    while isinstance(node, Applied):
        name = node.eqn.primitive.name
        if name == "transpose":
            step = tuple(node.eqn.params["permutation"])
            permutation = step if permutation is None else tuple(step[i] for i in permutation)
        elif name not in ("convert_element_type", "copy", "copy_p"):
            break
        node = node.inputs[0]
    return node, permutation if permutation is not None else ()


def apply_equation(program: Jaxpr, eqn: JaxprEqn, *inputs: Any) -> list[Any]:
    """The outputs of one equation, evaluated as a program of its own, so that custom rules and the like stay intact."""
    pairs = zip(eqn.invars, inputs, strict=True)
    given = {atom: value for atom, value in pairs if not isinstance(atom, Literal)}
    atoms = list(given)
    single = program.replace(constvars=[], invars=atoms, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(single, ()))(*(given[atom] for atom in atoms))


def _value(node, leaves, scans, known):
    if not scans:
        return _plain_value(node, leaves, known)
    outer, inner = scans[0], scans[1:]
    slices = [n for n in ancestors(node) if isinstance(n, Sliced) and n.scan is outer]
    wholes = [_plain_value(n.whole, leaves, known) for n in slices]

    def one(*parts):
        here = known | {id(n): part for n, part in zip(slices, parts, strict=True)}
        return _value(node, leaves, inner, here)

    return jax.vmap(one)(*wholes)


def _plain_value(node, leaves, known):
    found = dict(known)

    def evaluate(n):
        if id(n) not in found:
            if isinstance(n, Leaf):
                found[id(n)] = leaves[n.index]
            elif isinstance(n, Constant):
                found[id(n)] = n.value
            else:
                assert isinstance(n, Applied), "a slice of a scan outside of it"
                found[id(n)] = apply_equation(n.program, n.eqn, *map(evaluate, n.inputs))[n.output]
        return found[id(n)]

    return evaluate(node)


def _diverges(node):
    """Whether something with leaves in it is used twice on the way to the node."""
    counts: dict[int, int] = {}
    for n in ancestors(node):
        for operand in n.operands:
            if leaf_indices(operand):
                counts[id(operand)] = counts.get(id(operand), 0) + 1
    return any(count > 1 for count in counts.values())


def _size(atom):
    size = 1
    for length in atom.aval.shape:
        size *= length
    return size
