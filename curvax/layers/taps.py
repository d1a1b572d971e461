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
from curvax.layers.find import Layer, Layers
from curvax.layers.geometry import Geometry
from curvax.objectives.objective import Objective
from curvax.objectives.point import Cases, CurvaturePoint, Linearization
from curvax.objectives.term import Term, scale_cases, weighted_sum, weighting
from curvax.programs.instrument import evaluate
from curvax.programs.trace import trace_term
from curvax.programs.views import places_given

PyTree = Any
Array = jax.Array


def tap(objective: Objective, layers: Layers, params: PyTree, batch: PyTree) -> TappedPoint:
    r"""The objective linearised at (params, batch) with every layer tapped.

    One forward pass gives the outputs, the inputs a of all layers and the linear maps; each pull back of a cotangent u
    of the outputs then gives the cotangents ds of all layers' outputs, and the gradient with respect to the parameters
    of any example is sum_r a_r ds_r^T.

    Args:
        objective: The objective.
        layers: From ``curvax.find_layers``.
        params: theta.
        batch: The batch; it may have another number of examples than the one ``find_layers`` saw.

    Returns:
        The ``TappedPoint``. Its ``point`` is the curvature point of ``objective.linearize``.

    Raises:
        ValueError: The model is not the one that ``find_layers`` saw.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tapped = curvax.tap(objective, layers, w, batch)
        >>> (layer,) = tapped.pull_back(tapped.loss_cotangents())
        >>> layer.inputs[0, :, 0], layer.cotangents[0, :, 0]
        (Array([[1., 2.],
               [3., 4.]], dtype=float...), Array([[-1.],
               [-1.]], dtype=float...))
    """
    trees.check_floating(params, "params")
    _check_leaves(params, layers)
    cases, taps, linearizations, aux = [], [], [], []
    for index, term in enumerate(objective.terms):
        inputs, targets = term.split(batch)
        tapped, term_aux = _tap_term(layers, index, term, params, inputs)
        scale, count = weighting(term, batch, tapped.outputs, targets)
        cases.append(Cases(inputs, targets, scale, count))
        taps.append(tapped)
        zeros = [geometry.use.zeros() for geometry in tapped.uses]
        along, back = Partial(_along_params, tapped.jvp, zeros), Partial(_to_params, tapped.transpose)
        linearizations.append(Linearization(tapped.outputs, along, back))
        aux.append(term_aux)
    only = aux[0] if len(aux) == 1 else tuple(aux)
    point = CurvaturePoint(objective, params, tuple(cases), tuple(linearizations), only, None)
    return TappedPoint(point, tuple(taps), layers)


def tap_at(layers: Layers, at: CurvaturePoint) -> TappedPoint:
    """The same at a curvature point: its parameters and its batch, with every layer tapped.

    The forward pass is one that XLA merges with the point's own inside one ``jit``.
    """
    if at.chunk_size is not None:
        raise ValueError("taps need the whole batch in memory: linearize without chunk_size")
    _check_leaves(at.params, layers)
    taps = []
    for index, (term, cases) in enumerate(zip(at.objective.terms, at.cases, strict=True)):
        tapped, _ = _tap_term(layers, index, term, at.params, cases.inputs)
        taps.append(tapped)
    return TappedPoint(at, tuple(taps), layers)


@dataclasses.dataclass(frozen=True)
class LayerOutputs:
    """The outputs of some layers as intermediate quantities, for ``curvax.damping.structural``.

    The output of a bias is the sum that it completes: name the bias of a layer to mean what goes into its activation.

    Attributes:
        layers: From ``curvax.find_layers``.
        names: The names of layers.
    """

    layers: Layers
    names: tuple[str, ...]

    def extended(self, index: int, term: Term) -> Callable[[PyTree, PyTree], tuple[PyTree, Array]] | None:
        """(params, inputs) -> (z, outputs of the layers) for the term of that index; None if it has none of them.

        The outputs are one array of shape (examples, all units at all positions).
        """
        chosen_layers = [self.layers[name] for name in self.names]
        places = sorted(m.use for layer in chosen_layers for m in layer.members if m.term == index)
        if not places:
            return None

        def model(params: PyTree, inputs: PyTree) -> tuple[PyTree, Array]:
            program, out_tree, _ = trace_term(term, params, inputs)
            geometries = self.layers.geometries_at(index, program)
            chosen = [geometries[place] for place in places]
            flat = [*jax.tree.leaves(params), *jax.tree.leaves(inputs)]
            uses = [geometry.use for geometry in chosen]
            results, _, outputs, _ = evaluate(program, flat, uses, [None] * len(uses))
            arranged = [g.cotangents(raw).swapaxes(0, 1) for g, raw in zip(chosen, outputs, strict=True)]
            flat_outputs = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in arranged], axis=1)
            return jax.tree.unflatten(out_tree, results)[0], flat_outputs

        return model


class Captured(NamedTuple):
    """What one use of a layer gives for the gradient of each example.

    Attributes:
        inputs: a, of shape (blocks, examples, shared, inputs); of an embedding the indices, (1, examples, shared); of
            a scale its input, (1, examples, shared, features); of a shift None, standing for ones.
        cotangents: ds, of shape (blocks, examples, shared, outputs).
        geometry: How the layer's matrices come from the parameters.
        kind: The kind of the use.
        swapped: Whether inputs and outputs are exchanged with respect to the layer's matrices.
        term: The term of the objective.
        layer: The layer.
    """

    inputs: Array | None
    cotangents: Array
    geometry: Geometry
    kind: str
    swapped: bool
    term: int
    layer: Layer

    def gradient(self, weights: Array | None = None) -> Array:
        """sum_n w_n sum_r a_r ds_r^T in the layer's matrices, (blocks, inputs, outputs)."""
        cotangents = self.cotangents if weights is None else self.cotangents * weights[None, :, None, None]
        return self._matrices("bnri,bnro->bio", cotangents)

    def per_example(self) -> Array:
        """sum_r a_r ds_r^T for each example, (examples, blocks, inputs, outputs)."""
        return self._matrices("bnri,bnro->nbio", self.cotangents)

    def squares(self, weights: Array) -> Array:
        """sum_n w_n sq(sum_r a_r ds_r^T) in the layer's matrices, (blocks, inputs, outputs)."""
        return self.products(self.cotangents, weights)

    def products(self, others: Array, weights: Array) -> Array:
        """sum_n w_n (sum_r a_r ds_r^T) * (sum_r a_r dt_r^T), elementwise, with dt from ``others``; like ``squares``."""
        if self.kind in ("dense", "conv") and self.cotangents.shape[2] == 1:
            assert self.inputs is not None
            inputs, cotangents = _square(self.inputs[:, :, 0]), self.cotangents[:, :, 0] * others[:, :, 0]
            result = _sum_of_products("bni,bno->bio", inputs, cotangents * weights[None, :, None])
            return result.swapaxes(1, 2) if self.swapped else result
        rows = self.per_example()
        other_rows = rows if others is self.cotangents else self._replace(cotangents=others).per_example()
        return jnp.einsum("n,nbio->bio", weights, rows * other_rows)

    def _matrices(self, spec, cotangents):
        if self.kind in ("scale", "shift"):
            products = cotangents if self.inputs is None else self.inputs * cotangents
            summed = jnp.sum(products, axis=2 if "n" in spec[-4:] else (1, 2))
            return summed[0][:, None, None] if "n" in spec[-4:] else summed[:, None]
        if self.kind == "embedding":
            result = self._rows(cotangents, per_example="n" in spec[-4:])
        else:
            contract = jnp.einsum if "n" in spec[-4:] else _sum_of_products
            result = contract(spec, self.inputs, cotangents)
        return result.swapaxes(-1, -2) if self.swapped else result

    def _rows(self, cotangents, per_example):
        """Cotangents added into the rows that were looked up."""
        assert self.inputs is not None
        rows = self.layer.shape[2 if self.swapped else 1]
        indices, values = self.inputs[0], cotangents[0]
        indices = jnp.where((indices >= 0) & (indices < rows), indices, rows)

        def added(indices, values):
            zeros = jnp.zeros((rows, values.shape[-1]), values.dtype)
            return zeros.at[indices.reshape(-1)].add(values.reshape(-1, values.shape[-1]), mode="drop")

        if per_example:
            return jax.vmap(added)(indices, values)[:, None]
        return added(indices, values)[None]


class TermTap(NamedTuple):
    """One term's model, tapped and linearised.

    Attributes:
        outputs: z.
        inputs: The inputs of all uses as the model has them.
        given: What else parameters are combined with, see ``views.Given``.
        jvp: (tangent of the parameters, perturbations) -> tangent of the outputs.
        transpose: Its transpose.
        uses: The geometries of the uses.
    """

    outputs: PyTree
    inputs: list[Array | None]
    given: dict[tuple[int, ...], Array]
    jvp: Callable[[PyTree, list[Array]], PyTree]
    transpose: Callable[[PyTree], tuple[PyTree, list[Array]]]
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
        layers: The layers.
    """

    point: CurvaturePoint
    taps: tuple[TermTap, ...]
    layers: Layers = dataclasses.field(metadata={"static": True})

    def loss_cotangents(self) -> tuple[PyTree, ...]:
        """For each term the gradient of every example's own loss in its outputs, without weights and 1/N."""
        return tuple(piece.loss.gradient(piece.outputs, piece.targets) for piece in self.point.pieces())

    def pull_back(self, cotangents: tuple[PyTree, ...]) -> list[Captured]:
        """The layers' output cotangents for one cotangent of each term's outputs, examples kept apart.

        Args:
            cotangents: For each term a pytree like its outputs.

        Returns:
            One ``Captured`` for each use, with the layer it belongs to; in the order of the layers.
        """
        raw = [tap.transpose(u)[1] for tap, u in zip(self.taps, cotangents, strict=True)]
        return self.capture(raw)

    def pull_back_columns(self, cotangents: tuple[PyTree, ...]) -> list[Captured]:
        """The same for several cotangents at once, on a new leading axis here and in the result's cotangents."""
        raw = [
            jax.vmap(lambda u, tap=tap: tap.transpose(u)[1])(u) for tap, u in zip(self.taps, cotangents, strict=True)
        ]
        return self.capture(raw, columns=True)

    def value_and_gradient(self, *extra: tuple[PyTree, ...]) -> tuple[Array, PyTree, list[list[Captured]]]:
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
        if point.objective.l2 is not None:
            loss = trees.add(loss, point.objective.penalty(point.params))
            penalty = point.objective.penalty_curvature(point.params)
            gradient = trees.add(gradient, trees.multiply(point.params, penalty))
        return loss, gradient, [self.capture(raw) for raw in raws[1:]]

    def to_params(self, matrices: Sequence[tuple[Captured, Array]]) -> PyTree:
        """The sum of layers' matrices (blocks, inputs, outputs), each put back where its layer's parameters come from.

        A further leading axis, such as that of the examples, is kept.
        """
        leaves, treedef = jax.tree.flatten(self.point.params)
        lead = max((matrix.ndim - 3 for _, matrix in matrices), default=0)
        shape = matrices[0][1].shape[:lead] if matrices else ()
        sums: list[Any] = [None] * len(leaves)
        for use, matrix in matrices:
            back = use.geometry
            own, given = use.layer.leaves, self.taps[use.layer.members[0].term if use.swapped else use.term].given

            def spread(m, back=back, own=own, given=given):
                def forward(*values):
                    filled: list[Any] = [None] * len(leaves)
                    for i, leaf in zip(own, values, strict=True):
                        filled[i] = leaf
                    return back.matrices(back.base_value(filled, given))

                out, pull = jax.vjp(forward, *(leaves[i] for i in own))
                return pull(m.astype(out.dtype))

            parts = spread(matrix) if not lead else jax.vmap(spread)(matrix)
            for i, part in zip(own, parts, strict=True):
                sums[i] = part if sums[i] is None else sums[i] + part
        filled = [
            jnp.zeros((*shape, *leaf.shape), leaf.dtype) if s is None else s
            for s, leaf in zip(sums, leaves, strict=True)
        ]
        return treedef.unflatten(filled)

    def capture(self, raw: Sequence[Sequence[Array]], columns: bool = False) -> list[Captured]:
        """The uses of every layer, from cotangents of every use of every term as the model has them.

        Args:
            raw: For each term a cotangent of each use's output.
            columns: Whether there are several, on a leading axis.
        """
        found = []
        for layer in self.layers:
            for member in layer.members:
                geometry = self.taps[member.term].uses[member.use]
                ds = raw[member.term][member.use]
                cotangents = jax.vmap(geometry.cotangents)(ds) if columns else geometry.cotangents(ds)
                inputs = geometry.inputs(self.taps[member.term].inputs[member.use])
                # Products of layers add up over examples: in float32 at least, whatever the model computes in.
                dtype = trees.wide_dtype(cotangents)
                cotangents = cotangents.astype(dtype)
                if inputs is not None and geometry.use.kind != "embedding":
                    inputs = inputs.astype(dtype)
                kind = geometry.use.kind
                if member.swapped:  # the matrices are those of the layer's first use
                    geometry = self.taps[layer.members[0].term].uses[layer.members[0].use]
                found.append(Captured(inputs, cotangents, geometry, kind, member.swapped, member.term, layer))
        return found


def _tap_term(layers, index, term, params, inputs):
    program, out_tree, _ = trace_term(term, params, inputs)
    geometries = Geometries(layers.geometries_at(index, program))
    uses = [geometry.use for geometry in geometries]
    places = sorted({n.place for geometry in geometries for n in places_given(geometry.base)})

    def model(params, perturbations):
        flat = [*jax.tree.leaves(params), *jax.tree.leaves(inputs)]
        results, captured, _, given = evaluate(program, flat, uses, perturbations, places)
        outputs, aux = jax.tree.unflatten(out_tree, results)
        return outputs, (captured, given, aux)

    zeros = [use.zeros() for use in uses]
    outputs, jvp, (captured, given, aux) = jax.linearize(model, params, zeros, has_aux=True)
    transpose = jax.linear_transpose(jvp, params, zeros)
    return TermTap(outputs, captured, given, jvp, transpose, geometries), aux


def _along_params(jvp, zeros, tangent):
    return jvp(tangent, zeros)


def _to_params(transpose, cotangent):
    return (transpose(cotangent)[0],)


def _check_leaves(params, layers):
    paths = trees.leaf_paths(params)
    if tuple(paths) != layers.paths:
        missing = [path for path in layers.paths if path not in paths]
        surplus = [path for path in paths if path not in layers.paths]
        raise ValueError(
            f"the parameters are not those that find_layers saw: missing {missing}, surplus {surplus}; call"
            " find_layers with parameters of this structure"
        )


def _sum_of_products(spec, inputs, cotangents):
    """An einsum over the examples: where they are sharded explicitly, the sum is on every device, as parameters are."""
    axes = [jax.typeof(array).sharding.spec for array in (inputs, cotangents)]
    explicit = any(axis is not None for spec in axes for axis in spec)
    target = jax.sharding.PartitionSpec(None, axes[0][-1], axes[1][-1]) if explicit else None
    return jnp.einsum(spec, inputs, cotangents, out_sharding=target)


def _square(array):
    return array * array
