"""Finds the layers of any model: which parameters are used in which operations, and what has no structure and why."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from curvax import trees
from curvax.checks import check_choice
from curvax.layers.blocks import Block, Treatment, blocks_of, treatment_of
from curvax.layers.geometry import Geometry, geometry_of
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.programs.analysis import analyse, uses_in
from curvax.programs.trace import trace_twins
from curvax.programs.uses import Use
from curvax.programs.walk import Address
from curvax.types import PyTree

Fallback = Literal["error", "diagonal", "gradient"]
Biases = Literal["joint", "separate"]


def find_layers(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    fallback: Fallback = "error",
    bias: Biases = "joint",
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
        batch: A batch; the number of its examples does not matter later.
        fallback: What those who use the layers do with parameters without structure: "error" refuses them here;
            "diagonal" gives them the diagonal of the curvature, by a forward pass for each of their entries;
            "gradient" no curvature, so that they go along the gradient.
        bias: Whether Kronecker factors take a bias together with its weights ("joint", a one behind every input), or as
            a block of its own ("separate"), without what the two have in common; its factor is a matrix as large as the
            weights' one on the outputs. A bias that is added to no results of weights, or to those of several, has its
            diagonal either way.
        through_custom_rules: Look for parameters inside functions with custom derivative rules. Their rules are then
            taken to be what differentiating their bodies gives.

    Raises:
        ValueError: A parameter has no structure and ``fallback`` is "error"; or the model cannot be traced at another
            number of examples.

    Example:
        >>> def network(params, x):
        ...     return jnp.tanh(x @ params["w"] + params["b"]) @ params["out"].T
        >>> objective = curvax.Objective(network, curvax.losses.squared_error())
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "out": jnp.ones((2, 4))}
        >>> print(curvax.find_layers(objective, params, (jnp.ones((5, 3)), jnp.ones((5, 2)))))
        layer  shape   kind   bias  uses  shared  factors  reason
        out    (2, 4)  dense        1     1       4 x 2
        w      (3, 4)  dense  b     1     1       4 x 4
    """
    inputs = [_structure(lambda batch, term=term: term.split(batch)[0], batch) for term in objective.terms]
    return _find(objective, params, inputs, fallback, bias, through_custom_rules)


def find_layers_at(
    at: CurvaturePoint, *, fallback: Fallback = "error", bias: Biases = "joint", through_custom_rules: bool = False
) -> Layers:
    """``find_layers`` for the model, the parameters and the batch of a curvature point, which may be traced."""
    inputs = [_structure(lambda tree: tree, cases.inputs) for cases in at.cases]
    return _find(at, at.params, inputs, fallback, bias, through_custom_rules)


def _structure(function, tree):
    """``jax.eval_shape`` of a function of a tree, in which flags and strings stay what they are."""
    arrays, rebuild = trees.split_arrays(tree)
    made = None

    def run(arrays):
        nonlocal made
        results, made = trees.split_arrays(function(rebuild(arrays)))
        return results

    structs = jax.eval_shape(run, arrays)
    assert made is not None
    return made(structs)


def _find(objective, params, inputs, fallback, bias, through_custom_rules):
    check_choice("fallback", fallback, get_args(Fallback))
    check_choice("bias", bias, get_args(Biases))
    params = trees.floating_arrays(params, "params")
    paths, leaves = trees.leaf_paths(params), jax.tree.leaves(params)
    structs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    twins = [trace_twins(term, params, x) for term, x in zip(objective.terms, inputs, strict=True)]
    found = [analyse(pair, len(leaves), through_custom_rules) for pair in twins]
    reasons: dict[int, str] = {}
    for analysis in found:
        reasons = analysis.reasons | reasons
    _drop_with_their_leaves([analysis.uses for analysis in found], reasons)
    touched = {leaf for analysis in found for leaf in analysis.touched}
    reasons |= {i: "is not used" for i in range(len(leaves)) if i not in touched}
    every = {use: geometry_of(use, structs) for analysis in found for use in analysis.uses if use.unfit is None}
    for use, geometry in every.items():
        if geometry.varies_by_example:
            use.unfit = "has a row for each example; look rows up by numbers among the inputs"
            reasons |= dict.fromkeys(use.operand.leaves, use.unfit)
    _drop_with_their_leaves([analysis.uses for analysis in found], reasons)
    geometries = tuple(tuple(every[use] for use in analysis.uses if use.unfit is None) for analysis in found)
    layers = Layers(
        tuple(paths),
        structs,
        tuple(_collect(geometries, paths)),
        geometries,
        tuple(_outline(analysis.uses) for analysis in found),
        tuple(tuple(use.unfit is None for use in analysis.uses) for analysis in found),
        tuple(analysis.given for analysis in found),
        reasons,
        next((analysis.coupled for analysis in found if analysis.coupled), ""),
        tuple(analysis.rows_per_example for analysis in found),
        fallback,
        bias,
        through_custom_rules,
    )
    missing = [paths[i] for i, reason in sorted(reasons.items()) if reason != "is not used"]
    if missing and fallback == "error":
        raise ValueError(
            f"no structure was found for {', '.join(missing)}; pass fallback='diagonal' or fallback='gradient' to treat"
            f" such parameters without it, or change how the model uses them:\n{layers}"
        )
    return layers


def _drop_with_their_leaves(uses_of_terms: list[list[Use]], reasons: dict[int, str]) -> None:
    """A leaf with one use that has no structure has none altogether, nor have those that are joined with it."""
    known = -1
    while known != len(reasons):  # a leaf that is dropped late may have been used early
        known = len(reasons)
        for use in (use for uses in uses_of_terms for use in uses if use.unfit is None):
            if any(leaf in reasons for leaf in use.operand.leaves):
                use.unfit = "another use of the parameter has no structure"
                for leaf in use.operand.leaves:
                    reasons.setdefault(leaf, "is joined with a parameter without structure")


def _outline(uses: list[Use]) -> tuple[Any, ...]:
    """What the uses of a program are known by again."""
    return tuple((use.kind, use.operand.leaves) for use in uses)


class Member(NamedTuple):
    """One use in a layer.

    Attributes:
        use: Its place among the term's geometries.
        swapped: Whether its inputs and outputs are those of the layer exchanged, as in an output head that is tied to
            an embedding.
    """

    term: int
    use: int
    swapped: bool


@dataclasses.dataclass(frozen=True)
class Layer:
    """Uses of the same parameters.

    Attributes:
        name: The paths of its leaves.
        kind: The kind of its first use.
        leaves: The places of its leaves among those of the parameters.
        shape: (blocks, inputs, outputs) of its matrices.
        bias: The layer's name whose parameters are added to this one's results, or None.
        only_moves: Whether every entry of its matrices is one entry of a leaf.
        shared: How many positions share the parameters within an example, over all uses.
        shown_shape: The shape of its parameters before they are laid out as those matrices, for the table.
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
        geometries: For each term those of its uses that have structure, in the program that was looked at.
        outlines: For each term and use its kind and leaves, by which the program is known again.
        fit: For each term and use whether it has structure.
        given: For each term the addresses of operations of a parameter and data that are the same for all examples.
        reasons: For each leaf without structure, by its place, why.
        biases: Whether biases are "joint" with their weights or "separate".
        coupled_by: The operation by which an example's output depends on other examples, as with batch statistics in
            training, or "". Gradients of examples are then those of the sum of all losses, cut up by example.
        rows_per_example: For each term how many rows of its outputs belong to each example of its inputs.
    """

    paths: tuple[str, ...]
    structs: tuple[jax.ShapeDtypeStruct, ...]
    layers: tuple[Layer, ...]
    geometries: tuple[tuple[Geometry, ...], ...]
    outlines: tuple[tuple[Any, ...], ...]
    fit: tuple[tuple[bool, ...], ...]
    given: tuple[frozenset[Address], ...]
    reasons: dict[int, str]
    coupled_by: str
    rows_per_example: tuple[int, ...]
    fallback: Fallback
    biases: Biases
    through_custom_rules: bool

    @property
    def couples_examples(self) -> bool:
        """Whether an example's output may depend on other examples."""
        return bool(self.coupled_by)

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

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The layers with their biases, each as one matrix: what Kronecker factors are for."""
        return blocks_of(self)

    def restricted(self, paths: Collection[str]) -> Layers:
        """The layers whose parameters are all among ``paths``; other parameters are taken for constants.

        Raises:
            ValueError: A parameter is joined with one that is not among them, as where a model adds up the two, so that
                it has no layer; and ``fallback`` is "error".
        """
        if set(self.paths) <= set(paths):
            return self
        key = tuple(path for path in self.paths if path in paths)
        if key not in self._restrictions:
            hidden = {i: "is not used" for i, path in enumerate(self.paths) if path not in key}
            # A leaf with one use that has no structure has none altogether, nor have those that are joined with it.
            gone, known = set(hidden), -1
            while known != len(gone):
                known = len(gone)
                gone |= {
                    i for layer in self if 0 < len(gone & set(layer.leaves)) < len(layer.leaves) for i in layer.leaves
                }
            kept = {layer.name for layer in self if not gone & set(layer.leaves)}
            layers = tuple(
                layer if layer.bias in kept else dataclasses.replace(layer, bias=None)
                for layer in self
                if layer.name in kept
            )
            parted = dict.fromkeys(sorted(gone - set(hidden)), "is joined with a parameter that is masked")
            if parted and self.fallback == "error":
                names = ", ".join(self.paths[i] for i in parted)
                raise ValueError(
                    f"{names}: joined in one layer with a parameter that is masked, and without structure of its own;"
                    " mask both or neither, or take find_layers(..., fallback='diagonal')"
                )
            reasons = self.reasons | hidden | parted
            self._restrictions[key] = dataclasses.replace(self, layers=layers, reasons=reasons)
        return self._restrictions[key]

    @functools.cached_property
    def _restrictions(self) -> dict[tuple[str, ...], Layers]:
        return {}

    @functools.cached_property
    def treatment(self) -> Treatment:
        """Which blocks have Kronecker factors, and what the other parameters have."""
        return treatment_of(self)

    @property
    def structured(self) -> tuple[int, ...]:
        """The places of the leaves that layers hold."""
        return tuple(sorted({leaf for layer in self.layers for leaf in layer.leaves}))

    @property
    def unstructured(self) -> tuple[int, ...]:
        """The places of the other leaves that the model uses."""
        return tuple(i for i, reason in sorted(self.reasons.items()) if reason != "is not used")

    def __str__(self) -> str:
        head = ("layer", "shape", "kind", "bias", "uses", "shared", "factors", "reason")
        rows = [
            (
                block.name,
                str(block.weights.shown_shape),
                block.weights.kind,
                "" if block.bias is None else block.bias.name,
                str(len(block.weights.members)),
                str(block.weights.shared),
                *self._curvature_of(block.weights),
            )
            for block in self.blocks
        ]
        without = {"error": "", "diagonal": "diagonal", "gradient": "mean"}[self.fallback]
        rows += [
            (
                self.paths[i],
                str(self.structs[i].shape),
                "-",
                "",
                "",
                "",
                "" if reason == "is not used" else without,
                reason,
            )
            for i, reason in sorted(self.reasons.items())
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        if self.couples_examples:
            lines.append(
                f"The model couples examples by `{self.coupled_by}`: gradients of single examples are not defined."
            )
        rows = max(self.rows_per_example)
        if rows > 1:
            lines.append(f"The outputs have {rows} rows for each example: gradients of single rows are not to be had.")
        return "\n".join(line.rstrip() for line in lines)

    def _curvature_of(self, layer: Layer) -> tuple[str, str]:
        """What Kronecker-factored curvature does to a layer, such as "785 x 1000", and why it has no factors."""
        for block in self.treatment.kronecker:
            if block.name == layer.name:
                blocks, *sizes = block.shape
                sides = zip(sizes, block.diagonal_factors, strict=True)
                text = " x ".join(f"diag {size}" if diagonal else str(size) for size, diagonal in sides)
                return (text if blocks == 1 else f"{blocks} of {text}"), ""
        return "diagonal", self.treatment.reasons.get(layer.name, "")

    def geometries_at(self, index: int, program: ClosedJaxpr) -> list[Geometry]:
        """The geometries of the term of that index in a program traced now.

        Everything is known from ``find_layers`` but where the uses are: that may change with the number of examples, as
        with one example nothing is copied for each.
        """
        uses = uses_in(program, len(self.paths), self.given[index], self.through_custom_rules)
        if _outline(uses) != self.outlines[index]:
            raise ValueError(
                "the model's program is not the one that find_layers saw: it uses its parameters in other operations"
                " or in another order; call find_layers with this model, and with parameters and a batch like these"
            )
        kept = (use for use, fit in zip(uses, self.fit[index], strict=True) if fit)
        return [geometry.at(use) for geometry, use in zip(self.geometries[index], kept, strict=True)]


def _collect(geometries, paths):
    """The uses grouped by the parameters they use, in the order of the leaves."""
    groups: dict[Any, list[tuple[int, int, Geometry]]] = {}
    keys: dict[Use, Any] = {}
    for term, geometries_of_term in enumerate(geometries):
        for place, geometry in enumerate(geometries_of_term):
            key = _key(geometry)
            groups.setdefault(key, []).append((term, place, geometry))
            keys[geometry.use] = key
    names = _names(groups, paths)
    riders: dict[Any, set[str]] = {}
    for use, key in keys.items():
        if use.rides_on is not None and use.rides_on[0] in keys:
            riders.setdefault(keys[use.rides_on[0]], set()).add(names[key])
    for key in sorted(groups, key=lambda key: groups[key][0][2].base.leaves):
        first = groups[key][0][2]
        axes = first.in_axes, first.out_axes
        members = tuple(
            Member(term, place, (geometry.out_axes, geometry.in_axes) == axes != (geometry.in_axes, geometry.out_axes))
            for term, place, geometry in groups[key]
        )
        biases = riders.get(key, set())
        yield Layer(
            names[key],
            first.use.kind,
            first.base.leaves,
            members,
            first.shape,
            next(iter(biases)) if len(biases) == 1 else None,
            first.only_moves,
            sum(geometry.shared for _, _, geometry in groups[key]),
            first.base_shape,
        )


def _key(geometry):
    """What uses of the same parameters in the same way have in common."""
    if not geometry.elementwise:
        return False, geometry.base.signature
    # Elementwise uses are told apart by the entries of their leaves, copies taken away; a shift is so even from other
    # kinds.
    key = geometry.base.leaves, len(geometry.feature_axes), geometry.arriving
    return True, key if geometry.use.kind == "shift" else (geometry.use.kind, key)


def _names(groups, paths):
    names, counts = {}, Counter()
    for key, group in groups.items():
        name = "+".join(paths[i] for i in group[0][2].base.leaves)
        counts[name] += 1
        names[key] = name if counts[name] == 1 else f"{name}#{counts[name]}"
    return names
