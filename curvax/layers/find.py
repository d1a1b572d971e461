"""Finds the layers of any model: which parameters are used in which operations, and what has no structure and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from curvax import trees
from curvax.layers.geometry import Geometry, elementwise_axes, geometry_of
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import Term
from curvax.programs.analysis import analyse
from curvax.programs.uses import Use
from curvax.programs.views import Leaf, ancestors, leaf_indices, places_given, signature

PyTree = Any
Fallback = Literal["error", "diagonal", "gradient"]


def find_layers(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    fallback: Fallback = "error",
    through_custom_rules: bool = False,
) -> Layers:
    r"""The layers of a model, found in its program: nothing is registered, subclassed or renamed.

    Every operation s = a W that is linear in a parameter and in data is a use: a matrix product in any spelling, a
    convolution, an embedding, an elementwise scale or shift; inside ``jit``, ``remat``, ``scan``, ``vmap`` and
    derivatives of the network alike. The gradient of an example with respect to W is sum_r a_r ds_r^T over its uses,
    from the inputs a and the cotangents ds of the outputs that ``curvax.tap`` gives. A leaf that enters anything else
    has no structure; ``print(layers)`` says what is treated how, and why.

    The model is traced, never run: ``params`` and ``batch`` may be ShapeDtypeStructs. It is traced at two further
    numbers of examples, which shows the axis of the examples in every array.

    Args:
        objective: The objective.
        params: theta.
        batch: A batch; the number of its examples does not matter later.
        fallback: What those who use the layers do with parameters without structure: "error" refuses them here;
            "diagonal" leaves them to diagonal curvature, "gradient" to the gradient alone.
        through_custom_rules: Look for parameters inside functions with custom derivative rules. Their rules are then
            taken to be what differentiating their bodies gives.

    Returns:
        The ``Layers``.

    Raises:
        ValueError: A parameter has no structure and ``fallback`` is "error"; or the model cannot be traced at another
            number of examples.

    Example:
        >>> def network(params, x):
        ...     return jnp.tanh(x @ params["w"] + params["b"]) @ params["out"].T
        >>> objective = curvax.Objective(network, curvax.losses.squared_error())
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "out": jnp.ones((2, 4))}
        >>> print(curvax.find_layers(objective, params, (jnp.ones((5, 3)), jnp.ones((5, 2)))))
        layer  shape   kind   bias  uses  shared  reason
        out    (2, 4)  dense        1     1
        w      (3, 4)  dense  b     1     1
    """
    inputs = [jax.eval_shape(term.split, batch)[0] for term in objective.terms]
    return _find(objective, params, inputs, fallback, through_custom_rules)


def find_layers_at(at: CurvaturePoint, *, fallback: Fallback = "error", through_custom_rules: bool = False) -> Layers:
    """``find_layers`` for the model, the parameters and the batch of a curvature point, which may be traced."""
    inputs = [jax.eval_shape(lambda tree: tree, cases.inputs) for cases in at.cases]
    return _find(at, at.params, inputs, fallback, through_custom_rules)


def _find(objective, params, inputs, fallback, through_custom_rules):
    if fallback not in ("error", "diagonal", "gradient"):
        raise ValueError(f"fallback must be 'error', 'diagonal' or 'gradient', got {fallback!r}")
    trees.check_floating(params, "params")
    paths, leaves = trees.leaf_paths(params), jax.tree.leaves(params)
    structs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    found, given, reasons, touched, coupled = [], [], {}, set(), False
    for term, term_inputs in zip(objective.terms, inputs, strict=True):
        analysis = _analyse_term(term, params, term_inputs, through_custom_rules)
        coupled |= analysis.couples_examples
        touched |= analysis.touched
        for leaf, reason in analysis.reasons.items():
            reasons.setdefault(leaf, reason)
        found.append(analysis.uses)
        given.append(analysis.given)
    for uses in found:  # a leaf with one use that has no structure has none altogether
        for use in uses:
            if any(leaf in reasons for leaf in leaf_indices(use.operand)) and use.unfit is None:
                others = [leaf for leaf in leaf_indices(use.operand) if leaf not in reasons]
                use.unfit = "another use of the parameter has no structure"
                reasons |= dict.fromkeys(others, "is joined with a parameter without structure")
    reasons |= {i: "is not used" for i in range(len(leaves)) if i not in touched}
    layers = Layers(
        tuple(paths),
        structs,
        tuple(_collect(found, structs, paths)),
        tuple(tuple(use.unfit is None for use in uses) for uses in found),
        tuple(tuple((use.kind, leaf_indices(use.operand)) for use in uses) for uses in found),
        tuple(tuple((use.input_axis, use.output_axis) for use in uses) for uses in found),
        tuple(given),
        reasons,
        coupled,
        fallback,
        through_custom_rules,
    )
    missing = [paths[i] for i, reason in sorted(reasons.items()) if reason != "is not used"]
    if missing and fallback == "error":
        raise ValueError(
            f"no structure was found for {', '.join(missing)}; pass fallback='diagonal' or fallback='gradient' to treat"
            f" such parameters without it, or change how the model uses them:\n{layers}"
        )
    return layers


class Member(NamedTuple):
    """One use in a layer.

    Attributes:
        term: The term of the objective.
        use: Its place among the term's uses.
        elementwise: Of an elementwise use: along which axes the parameter varies, and whether it is only moved there.
        swapped: Whether its inputs and outputs are those of the layer exchanged, as in an output head that is tied to
            an embedding.
    """

    term: int
    use: int
    elementwise: tuple[tuple[int, ...], bool]
    swapped: bool


@dataclasses.dataclass(frozen=True)
class Layer:
    """Uses of the same parameters.

    Attributes:
        name: The paths of its leaves.
        kind: The kind of its first use.
        leaves: The places of its leaves among those of the parameters.
        members: Its uses.
        shape: (blocks, inputs, outputs) of its matrices.
        bias: The layer's name whose parameters are added to this one's results, or None.
        only_moves: Whether every entry of its matrices is one entry of a leaf.
        shared: How many positions share the parameters within an example, over all uses.
        shown_shape: The shape of its parameters before that.
    """

    name: str
    kind: str
    leaves: tuple[int, ...]
    members: tuple[Member, ...]
    shape: tuple[int, int, int]
    bias: str | None
    only_moves: bool
    shared: int
    shown_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """What ``find_layers`` found; print it to see it as a table.

    Attributes:
        paths: The path of every leaf of the parameters.
        structs: Its shape and dtype.
        layers: The layers.
        fit: For each term and each of its uses whether it has structure.
        kinds: For each term and use its kind and leaves, by which its program is known again.
        axes: For each term and use the axes of the examples in its input and output.
        given: For each term the addresses of operations of a parameter and data that are the same for all examples.
        reasons: For each leaf without structure, by its place, why.
        couples_examples: Whether an example's output may depend on other examples, as with batch statistics in
            training. Then gradients of examples are those of the sum of all losses, cut up by example.
        fallback: As given.
        through_custom_rules: As given.
    """

    paths: tuple[str, ...]
    structs: tuple[jax.ShapeDtypeStruct, ...]
    layers: tuple[Layer, ...]
    fit: tuple[tuple[bool, ...], ...]
    kinds: tuple[tuple[Any, ...], ...]
    axes: tuple[tuple[Any, ...], ...]
    given: tuple[frozenset[tuple[int, ...]], ...]
    reasons: dict[int, str]
    couples_examples: bool
    fallback: Fallback
    through_custom_rules: bool

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"there is no layer {name!r}; there are {', '.join(layer.name for layer in self.layers)}")

    def __iter__(self):
        return iter(self.layers)

    def __len__(self):
        return len(self.layers)

    @property
    def structured(self) -> tuple[int, ...]:
        """The places of the leaves that layers hold."""
        return tuple(sorted({leaf for layer in self.layers for leaf in layer.leaves}))

    @property
    def unstructured(self) -> tuple[int, ...]:
        """The places of the other leaves that the model uses."""
        return tuple(i for i, reason in sorted(self.reasons.items()) if reason != "is not used")

    def __str__(self) -> str:
        head = ("layer", "shape", "kind", "bias", "uses", "shared", "reason")
        biases = {layer.bias for layer in self.layers if layer.bias is not None}
        rows = [
            (
                layer.name,
                str(layer.shown_shape),
                layer.kind,
                layer.bias or "",
                str(len(layer.members)),
                str(layer.shared),
                "",
            )
            for layer in self.layers
            if layer.name not in biases
        ]
        rows += [
            (self.paths[i], str(self.structs[i].shape), "-", "", "", "", reason)
            for i, reason in sorted(self.reasons.items())
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        if self.couples_examples:
            lines.append("The model couples examples (batch statistics): gradients of single examples are not defined.")
        return "\n".join(line.rstrip() for line in lines)

    def uses_at(self, index: int, program: ClosedJaxpr, num_leaves: int, num_outputs: int) -> list[Use]:
        """The uses with structure of the term of that index in a program traced now, with their axes of examples."""
        analysis = analyse(
            program,
            num_leaves,
            num_outputs,
            through_custom_rules=self.through_custom_rules,
            given=self.given[index],
        )
        if tuple((use.kind, leaf_indices(use.operand)) for use in analysis.uses) != self.kinds[index]:
            raise ValueError(
                "the model's program is not the one that find_layers saw: it uses its parameters in other operations"
                " or in another order; call find_layers with this model, and with parameters and a batch like these"
            )
        kept = []
        for use, fit, (input_axis, output_axis) in zip(analysis.uses, self.fit[index], self.axes[index], strict=True):
            use.input_axis, use.output_axis = input_axis, output_axis
            if fit:
                kept.append(use)
        return kept


def trace_term(term: Term, params: PyTree, inputs: PyTree) -> tuple[ClosedJaxpr, Any, int]:
    """(program, structure of (outputs, aux), how many of its results are outputs) of a term's model."""
    treedef = jax.tree.structure(params)

    def flat(leaves, inputs):
        return term.apply(treedef.unflatten(leaves), inputs)

    program, shapes = jax.make_jaxpr(flat, return_shape=True)(jax.tree.leaves(params), inputs)
    return program, jax.tree.structure(shapes), len(jax.tree.leaves(shapes[0]))


def _analyse_term(term, params, inputs, through_custom_rules):
    axes = term.example_axes
    axes = axes[0] if isinstance(axes, (tuple, list)) else axes
    located = jax.tree.map(
        lambda axis, part: jax.tree.map(lambda leaf: _Located((leaf, axis)), part), axes, inputs, is_leaf=_is_none
    )
    sizes = {leaf.shape[axis] for leaf, axis in jax.tree.leaves(located) if axis is not None and leaf.ndim > axis}
    if len(sizes) != 1:
        raise ValueError(
            f"the leaves of the inputs have {sorted(sizes)} examples; say in example_axes where the examples are, and"
            " None for what they share"
        )

    def with_examples(number):
        def resized(pair):
            leaf, axis = pair
            if axis is None or leaf.ndim <= axis:
                return leaf
            return jax.ShapeDtypeStruct((*leaf.shape[:axis], number, *leaf.shape[axis + 1 :]), leaf.dtype)

        return jax.tree.map(resized, located, is_leaf=lambda node: isinstance(node, _Located))

    structs = jax.eval_shape(lambda tree: tree, params)
    programs = []
    for number in _PRIMES:
        try:
            programs.append(trace_term(term, structs, with_examples(number)))
        except Exception as error:
            raise ValueError(
                f"the model cannot be traced with {number} examples, which shows where the examples are; does it hold"
                " an array or a number that only fits one size of the batch? Move it into the inputs"
            ) from error
    (program, _, num_outputs), (twin, _, _) = programs
    num_leaves = len(jax.tree.leaves(params))
    return analyse(program, num_leaves, num_outputs, twin, _PRIMES, through_custom_rules)


_PRIMES = (7, 11)


class _Located(tuple):
    """A leaf and its example axis."""


def _is_none(node):
    return node is None


def _collect(found, structs, paths):
    """The uses grouped by the parameters they use, in the order of the leaves."""
    groups: dict[Any, list[tuple[int, int, Geometry]]] = {}
    riders: dict[int, Any] = {}
    keys: dict[int, Any] = {}
    for term, uses in enumerate(found):
        fit = [use for use in uses if use.unfit is None]
        for place, use in enumerate(fit):
            elementwise = elementwise_of(use, structs)
            geometry = geometry_of(use, elementwise)
            key = (geometry.elementwise, signature(geometry.base) if not geometry.elementwise else _flat(geometry))
            if geometry.elementwise and use.kind != "shift":
                key = (use.kind, key)
            groups.setdefault(key, []).append((term, place, geometry))
            keys[id(use)] = key
    names = _names(groups, paths)
    for key, group in groups.items():
        for _, _, geometry in group:
            ridden = geometry.use.rides_on
            if ridden is not None and id(ridden[0]) in keys:
                riders.setdefault(keys[id(ridden[0])], set()).add(names[key])
    order = sorted(groups, key=lambda key: leaf_indices(groups[key][0][2].base))
    for key in order:
        group = groups[key]
        first = group[0][2]
        numbers = {n.place: jax.ShapeDtypeStruct(n.shape, structs[0].dtype) for n in places_given(first.base)}
        base = jax.eval_shape(lambda leaves, given, first=first: first.base_value(leaves, given), structs, numbers)
        shape = jax.eval_shape(first.matrices, base).shape
        members, shared = [], 0
        for term, place, geometry in group:
            swapped = (
                (geometry.in_axes, geometry.out_axes)
                == (first.out_axes, first.in_axes)
                != (
                    first.in_axes,
                    first.out_axes,
                )
            )
            members.append(Member(term, place, (geometry.feature_axes, geometry.only_moves), swapped))
            shared += _positions(geometry)
        biases = riders.get(key, set())
        yield Layer(
            names[key],
            first.use.kind,
            leaf_indices(first.base),
            tuple(members),
            shape,
            next(iter(biases)) if len(biases) == 1 else None,
            first.only_moves,
            shared,
            tuple(base.shape),
        )


def elementwise_of(use: Use, structs: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[tuple[int, ...], bool]:
    """What ``elementwise_axes`` gives for an elementwise use, with all leaves but its own left out."""
    if use.kind not in ("scale", "shift"):
        return (), True
    own = leaf_indices(use.operand)
    small = [s if i in own else jax.ShapeDtypeStruct((), s.dtype) for i, s in enumerate(structs)]
    return elementwise_axes(use.operand, small, use.scans)


def _flat(geometry):
    """What tells elementwise uses apart: the leaves they use, once copies are taken away."""
    return tuple(signature(n) for n in ancestors(geometry.use.operand) if isinstance(n, Leaf)), len(
        geometry.feature_axes
    )


def _names(groups, paths):
    names, counts = {}, {}
    for key, group in groups.items():
        name = "+".join(paths[i] for i in leaf_indices(group[0][2].base))
        counts[name] = counts.get(name, 0) + 1
        names[key] = name if counts[name] == 1 else f"{name}#{counts[name]}"
    return names


def _positions(geometry):
    """How many positions of an example share the parameters in one use."""
    use = geometry.use
    raw = jax.ShapeDtypeStruct(use.output_shape, jnp.float32)
    shape = jax.eval_shape(geometry.cotangents, raw).shape
    return math.prod(shape[2:3])
