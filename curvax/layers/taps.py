"""Taps: the inputs of all layers, and the cotangents of their outputs, from one linearisation of the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_dataclass

from curvax import trees
from curvax.layers.find import Layers, Member
from curvax.layers.geometry import Geometry
from curvax.layers.use import LayerUse
from curvax.matrices.curvature import example_keys
from curvax.objectives.objective import compiled_if_eager
from curvax.objectives.point import CurvaturePoint, Linearization
from curvax.objectives.term import scale_cases, weighted_sum
from curvax.programs.instrument import evaluate
from curvax.programs.linearize import linearize
from curvax.programs.trace import program_arguments, trace_term
from curvax.programs.views import places_given
from curvax.types import Array, PyTree


def tap(layers: Layers, at: CurvaturePoint) -> TappedPoint:
    r"""A curvature point with every layer tapped.

    One forward pass gives the outputs, the inputs a of all layers and the linear maps; each pull back of a cotangent u
    of the outputs then gives the cotangents ds of all layers' outputs, and the gradient with respect to the parameters
    of any example is sum_r a_r ds_r^T. The forward pass takes the place of the point's own; what is read of both is
    merged by XLA inside one ``jit``.

    Args:
        at: The curvature point; its batch may have another number of examples than the one ``find_layers`` saw.

    Returns:
        The ``TappedPoint``. Its ``point`` is the curvature point, linearised through the taps.

    Raises:
        ValueError: The model is not the one that ``find_layers`` saw, or the point works in chunks.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tapped = curvax.tap(layers, objective.linearize(w, batch))
        >>> (layer,) = tapped.pull_back(tapped.loss_cotangents())
        >>> layer.inputs[0, :, 0], layer.cotangents[0, :, 0]
        (Array([[1., 2.],
               [3., 4.]], dtype=float...), Array([[-1.],
               [-1.]], dtype=float...))
    """
    if at.chunk_size is not None:
        raise ValueError("taps need the whole batch in memory: linearize without chunk_size")
    check_leaves(at.params, layers)
    return compiled_if_eager(_tap, at, layers=layers)


def _tap(at, *, layers):
    taps, linearizations = [], []
    for index, (term, cases) in enumerate(zip(at.terms, at.cases, strict=True)):
        tapped, forward = _tap_term(layers, index, term, at.params, cases.inputs)
        taps.append(tapped)
        zeros = [geometry.use.zeros() for geometry in tapped.uses]
        along, back = Partial(_along_params, tapped.jvp, zeros), Partial(_to_params, tapped.transpose)
        linearizations.append(Linearization(tapped.outputs, along, back, forward))
    return TappedPoint(dataclasses.replace(at, linearizations=tuple(linearizations)), tuple(taps), layers)


class TermTap(NamedTuple):
    """One term's model, tapped and linearised.

    Attributes:
        given: What else parameters are combined with, see ``views.Given``.
        jvp: (tangents of the leaves of the parameters, perturbations) -> tangent of the outputs.
    """

    outputs: PyTree
    inputs: list[Array | None]
    given: dict[tuple[int, ...], Array]
    jvp: Callable[[tuple[Array, ...], list[Array]], PyTree]
    transpose: Callable[[PyTree], tuple[tuple[Array, ...], list[Array]]]
    uses: Geometries


@jax.tree_util.register_static
class Geometries(tuple):
    """Geometries of uses, static to jax."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TappedPoint:
    """An objective linearised with every layer tapped; made by ``curvax.tap``.

    Attributes:
        point: The curvature point, to be given as ``at=``.
        taps: For each term its outputs, inputs of uses and linear maps.
    """

    point: CurvaturePoint
    taps: tuple[TermTap, ...]
    layers: Layers = dataclasses.field(metadata={"static": True})

    def definite(self) -> TappedPoint:
        """This point with the absolute values of the cases' factors; see ``CurvaturePoint.definite``."""
        return dataclasses.replace(self, point=self.point.definite())

    def loss_cotangents(self) -> tuple[PyTree, ...]:
        """For each term the gradient of every example's own loss in its outputs, without weights and 1/N."""
        return tuple(piece.loss.gradient(piece.outputs, piece.targets) for piece in self.point.pieces())

    def sampled_cotangents(self, key: Array) -> tuple[PyTree, ...]:
        """The same at targets drawn from the model's own distribution, whose second moment is the Fisher matrix.

        Pulled back they give the cotangents of Monte-Carlo Kronecker factors and Fisher diagonals (Martens 2016,
        section 6.3.2); every example has a key of its own.
        """
        pieces = self.point.pieces(example_keys(self.point, key))
        return tuple(
            piece.loss.gradient(piece.outputs, piece.loss.draw(piece.extra, piece.outputs, piece.targets))
            for piece in pieces
        )

    def example_scales(self, name: str) -> list[Array]:
        """For each term the factor of each example's loss, which cotangents are without; for ``name``, in errors.

        Raises:
            ValueError: The model couples examples, or weights or a mask over the steps of sequences make the cases
                finer than examples.
        """
        self.check_separate(name)
        scales = []
        for index, cases in enumerate(self.point.cases):
            if cases.scale.ndim > 1:
                raise ValueError(
                    f"{name}: the weights or mask of term {index} have shape {cases.scale.shape}, so that the steps of"
                    " a sequence are the cases; this estimate is one of examples"
                )
            scales.append(jnp.broadcast_to(cases.scale, (self.point.num_examples(index),)))
        return scales

    def check_separate(self, name: str) -> None:
        """Raises a ValueError where the gradient of one example is not defined."""
        if self.layers.couples_examples:
            raise ValueError(
                f"{name}: the model couples examples by `{self.layers.coupled_by}`, so the gradient of one example is"
                " not defined; evaluate batch statistics with fixed numbers, and read rows within each example by"
                " jnp.take_along_axis or under jax.vmap"
            )
        for index, rows in enumerate(self.layers.rows_per_example):
            if rows > 1:
                raise ValueError(
                    f"{name}: the outputs of term {index} have {rows} rows for each example of its inputs, as where the"
                    " steps of sequences are folded into axis 0, and gradients of single rows are not to be had; return"
                    " (examples, steps, ...), whose loss is the sum over the steps, and with example_weights of"
                    " 1 / steps the mean that it was"
                )

    def by_layer(self, uses: Sequence[LayerUse]) -> dict[str, list[LayerUse]]:
        """Uses grouped by the name of their layer, in the order of the layers."""
        groups = {layer.name: [] for layer in self.layers}
        for use in uses:
            groups[use.layer.name].append(use)
        return groups

    def pull_back(self, cotangents: tuple[PyTree, ...]) -> list[LayerUse]:
        """The layers' output cotangents for one cotangent of each term's outputs, examples kept apart.

        Args:
            cotangents: For each term a pytree like its outputs.

        Returns:
            One ``LayerUse`` for each use, with the layer it belongs to; in the order of the layers.
        """
        raw = [tap.transpose(u)[1] for tap, u in zip(self.taps, cotangents, strict=True)]
        return self.capture(raw)

    def pull_back_columns(self, cotangents: tuple[PyTree, ...]) -> list[LayerUse]:
        """The same for several cotangents at once, on a new leading axis here and in the result's cotangents."""
        raw = [
            jax.vmap(lambda u, tap=tap: tap.transpose(u)[1])(u) for tap, u in zip(self.taps, cotangents, strict=True)
        ]
        return self.capture(raw, columns=True)

    def value_and_gradient(self, *extra: tuple[PyTree, ...]) -> tuple[Array, PyTree, list[list[LayerUse]]]:
        """Loss, gradient and the pull backs of further cotangents, by one backward sweep for all of them.

        The gradients of layers are products of their inputs and cotangents, so a further cotangent costs a third of a
        gradient, and what ``remat`` recomputes is computed once for all.

        Args:
            *extra: Further cotangents, each as for ``pull_back``.

        Returns:
            ``(loss, gradient, captured)``, a list of captured uses for each of ``extra``.
        """
        scaled = tuple(
            scale_cases(piece.scale, u) for piece, u in zip(self.point.pieces(), self.loss_cotangents(), strict=True)
        )
        stacked = [jax.tree.map(lambda *us: jnp.stack(us), *term) for term in zip(scaled, *extra, strict=True)]
        results = [jax.vmap(tap.transpose, out_axes=(0, 0))(u) for tap, u in zip(self.taps, stacked, strict=True)]
        raws = [[[ds[i] for ds in eps] for _, eps in results] for i in range(1 + len(extra))]
        first = self.capture(raws[0])
        gradient = self.to_params([(use, use.gradient()) for use in first])
        leaves, treedef = jax.tree.flatten(gradient)
        for params, _ in results:
            others = jax.tree.leaves(params)
            for i in self.layers.unstructured:
                leaves[i] = leaves[i] + others[i][0]
        gradient = treedef.unflatten(leaves)
        point = self.point
        parts = [weighted_sum(piece.scale, piece.loss.value(piece.outputs, piece.targets)) for piece in point.pieces()]
        loss = functools.reduce(trees.add, parts)
        if point.penalty:
            loss = trees.add(loss, point.penalty.value(point.params))
            gradient = trees.add(gradient, point.penalty.gradient(point.params))
        return loss, gradient, [self.capture(raw) for raw in raws[1:]]

    def to_params(
        self, matrices: Sequence[tuple[LayerUse, Array]], *, lead: tuple[int, ...] | None = None, wide: bool = False
    ) -> PyTree:
        """The sum of layers' matrices (blocks, inputs, outputs), each put back where its layer's parameters come from.

        A further leading axis, such as that of the examples, is kept. Where there may be no matrices, ``lead`` says
        what it is: () or (examples,). The result has the dtypes of the parameters, or with ``wide`` float32 at least:
        squares leave the range of narrow ones.
        """
        params = trees.widened(self.point.params) if wide else self.point.params
        leaves, treedef = jax.tree.flatten(params)
        if lead is None:
            lead = matrices[0][1].shape[:-3] if matrices else ()
        sums: list[Any] = [None] * len(leaves)
        for use, matrix in matrices:
            back = use.geometry
            own, given = use.layer.leaves, self.taps[use.layer.members[0].term if use.swapped else use.term].given

            def spread(m, back=back, own=own, given=given):
                def forward(*values):
                    filled: list[Any] = [None] * len(leaves)
                    for i, leaf in zip(own, values, strict=True):
                        filled[i] = leaf
                    return back.matrices(back.base_value(filled, given, wide=wide))

                out, pull = jax.vjp(forward, *(leaves[i] for i in own))
                return pull(m.astype(out.dtype))

            parts = spread(matrix) if not lead else jax.vmap(spread)(matrix)
            for i, part in zip(own, parts, strict=True):
                sums[i] = part if sums[i] is None else sums[i] + part
        filled = [
            jnp.zeros((*lead, *leaf.shape), leaf.dtype) if s is None else s
            for s, leaf in zip(sums, leaves, strict=True)
        ]
        return treedef.unflatten(filled)

    def capture(
        self,
        raw: Sequence[Sequence[Array]],
        columns: bool = False,
        places: Callable[[Member, Geometry, tuple[int, ...]], Array | None] | None = None,
    ) -> list[LayerUse]:
        """The uses of every layer, from cotangents of every use of every term as the model has them.

        Args:
            raw: For each term a cotangent of each use's output.
            columns: Whether there are several, on a leading axis.
            places: For a use, and the shape of its cotangents, at which of its shared positions its inputs are wanted,
                None for all.
        """
        found = []
        for layer in self.layers:
            for member in layer.members:
                geometry = self.taps[member.term].uses[member.use]
                ds = raw[member.term][member.use]
                cotangents = jax.vmap(geometry.cotangents)(ds) if columns else geometry.cotangents(ds)
                chosen = None if places is None else places(member, geometry, cotangents.shape)
                inputs = geometry.inputs(self.taps[member.term].inputs[member.use], chosen)
                # Products of layers add up over examples: in float32 at least, whatever the model computes in.
                dtype = trees.wide_dtype(cotangents)
                cotangents = cotangents.astype(dtype)
                if inputs is not None and geometry.use.kind != "embedding":
                    inputs = inputs.astype(dtype)
                kind = geometry.use.kind
                if member.swapped:  # the matrices are those of the layer's first use
                    geometry = self.taps[layer.members[0].term].uses[layer.members[0].use]
                found.append(LayerUse(inputs, cotangents, geometry, kind, member.swapped, member.term, layer))
        return found


def _tap_term(layers, index, term, params, inputs):
    program, out_tree, _ = trace_term(term, params, inputs)
    geometries = Geometries(layers.geometries_at(index, program))
    uses = [geometry.use for geometry in geometries]
    places = sorted({n.place for geometry in geometries for n in places_given(geometry.base)})

    def model(leaves, perturbations):
        flat = program_arguments(leaves, inputs)
        results, captured, _, given = evaluate(program, flat, uses, perturbations, places)
        return jax.tree.unflatten(out_tree, results)[0], (captured, given)

    leaves, zeros = tuple(jax.tree.leaves(params)), [use.zeros() for use in uses]
    outputs, jvp, transpose, forward, (captured, given) = linearize(model, leaves, zeros, has_aux=True)
    return TermTap(outputs, captured, given, jvp, transpose, geometries), forward


def _along_params(jvp, zeros, tangent):
    return jvp(tangent, zeros)


def _to_params(transpose, cotangent):
    return (transpose(cotangent)[0],)


def check_leaves(params: PyTree, layers: Layers) -> None:
    """Raises a ValueError unless the parameters have the leaves that the layers know."""
    paths = trees.leaf_paths(params)
    if tuple(paths) != layers.paths:
        missing = [path for path in layers.paths if path not in paths]
        surplus = [path for path in paths if path not in layers.paths]
        raise ValueError(
            f"the parameters are not those that find_layers saw: missing {missing}, surplus {surplus}; call"
            " find_layers with parameters of this structure"
        )
