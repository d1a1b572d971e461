"""Brings every use into one form: inputs and output cotangents with axes (blocks, examples, shared, features).

A use multiplies a matrix, or one matrix for each block (experts, groups of a convolution, layers under ``scan``), with
features of its input, for every example and for every shared position (steps of a sequence, pixels). In that form the
gradient of one example is sum_r a_r ds_r^T for every block, whatever the model's spelling was.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.programs.uses import Use
from curvax.programs.views import Node, only_moves, places_given, value, without_permutation

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """Which axes of a use's arrays are what; the axes of scans are counted, and lead.

    Attributes:
        use: The use.
        base: What of the parameters is seen as one array: the operand without its transpositions, or for elementwise
            uses without its copies.
        block_axes: Of the base, those that number independent matrices.
        in_axes: Of the base, those that the input is contracted with.
        out_axes: Of the base, those of the output's features.
        groups: Of a convolution: the first of ``out_axes`` is (groups, channels of a group).
        feature_axes: Of an elementwise use's operand, those along which the parameter varies.
        only_moves: Whether every entry of the base is one entry of a leaf, none twice.
    """

    use: Use
    base: Node
    block_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    groups: int = 1
    feature_axes: tuple[int, ...] = ()
    only_moves: bool = True

    @property
    def elementwise(self) -> bool:
        """Whether the parameter is multiplied or added entry by entry."""
        return self.use.kind in ("scale", "shift")

    # --- parameters -------------------------------------------------------------------------------------------------

    def base_value(self, leaves: Sequence[Any], given: Mapping[tuple[int, ...], Array] | None = None) -> Array:
        """The base at these leaves, behind one axis for each scan that has parameters of its own."""
        whole = value(self.base, leaves, self.use.scans, given)
        if not self.elementwise:
            return whole
        return whole[tuple(slice(None) if i in self.feature_axes else 0 for i in range(whole.ndim))]

    def matrices(self, base: Array) -> Array:
        """The base as (blocks, inputs, outputs); for elementwise uses as (1, 1, features)."""
        if self.elementwise:
            return base.reshape(1, 1, -1)
        if self.groups > 1:
            shape = list(base.shape)
            axis = self.out_axes[0]
            shape[axis : axis + 1] = [self.groups, shape[axis] // self.groups]
            base = base.reshape(shape)
        blocks, ins, outs = self._split_axes()
        ordered = base.transpose(*blocks, *ins, *outs)
        sizes = [math.prod(base.shape[i] for i in axes) for axes in (blocks, ins, outs)]
        return ordered.reshape(sizes)

    def _split_axes(self):
        """The axes of the base once the groups are an axis of their own."""
        if self.groups == 1:
            return self.block_axes, self.in_axes, self.out_axes
        axis = self.out_axes[0]
        blocks, ins = (tuple(i + (i > axis) for i in axes) for axes in (self.block_axes, self.in_axes))
        return (*blocks, axis), ins, (axis + 1,)

    # --- data -------------------------------------------------------------------------------------------------------

    def inputs(self, raw: Array | None) -> Array | None:
        """The use's input as (blocks, examples, shared, features); indices as (1, examples, shared) for embeddings."""
        if raw is None:
            return None
        use, scans = self.use, len(self.use.scans)
        assert use.input_axis is not None
        if use.kind == "dense":
            blocks, features = self._dense_axes()
            return _arrange(raw, use.input_axis, self._scan_blocks() + blocks, features, scans, self._shared_scans())
        if use.kind == "conv":
            return self._patches(raw)
        if use.kind == "embedding":
            numbers = use.eqn.params["dimension_numbers"]
            indices = raw[..., numbers.start_index_map.index(0)]
            if use.eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
                indices = jnp.clip(indices, 0, use.eqn.invars[0].aval.shape[0] - 1)
            return _arrange(indices, use.input_axis, (), (), scans, self._shared_scans())[..., 0]
        return self._elementwise(raw, use.input_axis)

    def cotangents(self, raw: Array) -> Array:
        """The cotangent of the use's output as (blocks, examples, shared, features)."""
        use, scans = self.use, len(self.use.scans)
        assert use.output_axis is not None
        if use.kind == "dense":
            dims = self._dense_output_axes(raw.ndim - scans)
            return _arrange(raw, use.output_axis, self._scan_blocks() + dims[0], dims[1], scans, self._shared_scans())
        if use.kind == "conv":
            batch, channels, *spatial = (i + scans for i in use.eqn.params["dimension_numbers"].out_spec)
            raw = raw.transpose(*range(scans), batch, *spatial, channels)
            raw = raw.reshape(*raw.shape[:-1], self.groups, raw.shape[-1] // self.groups)
            blocks = (*self._scan_blocks(), raw.ndim - 2)
            axis = use.output_axis._replace(axis=0)
            return _arrange(raw, axis, blocks, (raw.ndim - 1,), scans, self._shared_scans())
        if use.kind == "embedding":
            numbers = use.eqn.params["dimension_numbers"]
            offsets = numbers.offset_dims if 0 in numbers.collapsed_slice_dims else numbers.offset_dims[1:]
            features = tuple(i + scans for i in offsets)
            return _arrange(raw, use.output_axis, (), features, scans, self._shared_scans())
        negative = use.eqn.primitive.name == "sub" and use.side == 1
        return self._elementwise(-raw if negative else raw, use.output_axis)

    def _scan_blocks(self):
        return tuple(i for i, layered in enumerate(self.use.layered) if layered)

    def _shared_scans(self):
        return tuple(i for i, layered in enumerate(self.use.layered) if not layered)

    def _elementwise(self, raw, example_axis):
        scans = len(self.use.scans)
        own = self._scan_blocks()
        shape = self.use.variable.aval.shape
        raw = jnp.broadcast_to(raw, (*raw.shape[:scans], *shape))
        # The features are the scans with parameters of their own, then axes of the operand, in its order.
        features = tuple(own[i] if i < len(own) else i - len(own) + scans for i in self.feature_axes)
        return _arrange(raw, example_axis, (), features, scans, self._shared_scans())

    def _dense_axes(self):
        """Of the input: its block axes and its features, in the order of the base's."""
        scans = len(self.use.scans)
        contract, batch = self.use.eqn.params["dimension_numbers"]
        side = self.use.side
        assert side is not None
        rank = self._order()
        pairs = sorted(zip(contract[side], contract[1 - side], strict=True), key=lambda pair: rank[pair[0]])
        blocks = sorted(zip(batch[side], batch[1 - side], strict=True), key=lambda pair: rank[pair[0]])
        return tuple(i + scans for _, i in blocks), tuple(i + scans for _, i in pairs)

    def _dense_output_axes(self, ndim):
        scans, side = len(self.use.scans), self.use.side
        assert side is not None
        contract, batch = self.use.eqn.params["dimension_numbers"]
        rank = self._order()
        order = sorted(range(len(batch[side])), key=lambda i: rank[batch[side][i]])
        blocks = tuple(i + scans for i in order)
        operand = self.use.eqn.invars[side].aval.shape
        free = [i for i in range(len(operand)) if i not in (*contract[side], *batch[side])]
        first = len(batch[side]) if side == 0 else ndim - len(free)
        places = sorted(range(len(free)), key=lambda i: rank[free[i]])
        return blocks, tuple(first + i + scans for i in places)

    def _order(self):
        """For each axis of the operand its place in the base."""
        _, order = without_permutation(self.use.operand)
        side = self.use.side
        assert side is not None
        ndim = len(self.use.eqn.invars[side].aval.shape)
        return order or tuple(range(ndim))

    def _patches(self, raw):
        """The input of a convolution as (blocks, examples, output positions, kernel positions and channels)."""
        use, scans = self.use, len(self.use.scans)
        params = use.eqn.params
        lead = raw.shape[:scans]
        flat = raw.reshape(-1, *raw.shape[scans:])
        patches = jax.vmap(lambda x: _patches_of(x, params, use.eqn.invars[1].aval.shape))(flat)
        patches = patches.reshape(*lead, *patches.shape[1:])  # (scans, batch, positions, kernel, groups, channels)
        assert use.input_axis is not None
        _, _, kernel, groups, channels = range(scans, scans + 5)
        # The base may have its channels before or behind the positions of its kernel.
        rank = self._order()
        spec = params["dimension_numbers"].rhs_spec
        kernel_shape = tuple(use.eqn.invars[1].aval.shape[i] for i in spec[2:])
        patches = patches.reshape(*patches.shape[:kernel], *kernel_shape, *patches.shape[groups:])
        spatial = len(kernel_shape)
        places = {spec[1]: channels - 1 + spatial} | {spec[2 + i]: kernel + i for i in range(spatial)}
        features = tuple(places[i] for i in sorted(places, key=lambda i: rank[i]))
        axis = use.input_axis._replace(axis=0)
        return _arrange(
            patches, axis, (*self._scan_blocks(), groups - 1 + spatial), features, scans, self._shared_scans()
        )


def geometry_of(use: Use, elementwise: tuple[tuple[int, ...], bool] = ((), True)) -> Geometry:
    """The geometry of a use; ``elementwise`` is what ``elementwise_axes`` gave, for those uses."""
    scans = sum(use.layered)
    if use.kind in ("scale", "shift"):
        return Geometry(use, use.operand, (), (), (), 1, *elementwise)
    base, order = without_permutation(use.operand)
    assert use.side is not None
    shape = use.eqn.invars[use.side].aval.shape
    rank = order or tuple(range(len(shape)))

    def place(axes):
        return tuple(sorted(rank[i] + scans for i in axes))

    own = tuple(range(scans))
    if use.kind == "dense":
        contract, batch = use.eqn.params["dimension_numbers"]
        taken = (*contract[use.side], *batch[use.side])
        free = [i for i in range(len(shape)) if i not in taken]
        axes = own + place(batch[use.side]), place(contract[use.side]), place(free)
        return Geometry(use, base, *axes, only_moves=only_moves(base))
    if use.kind == "conv":
        spec = use.eqn.params["dimension_numbers"].rhs_spec
        groups = use.eqn.params["feature_group_count"]
        return Geometry(use, base, own, place(spec[1:]), place(spec[:1]), groups, only_moves=only_moves(base))
    return Geometry(use, base, own, place([0]), place(range(1, len(shape))), only_moves=only_moves(base))


def elementwise_axes(node: Node, leaves: Sequence[jax.ShapeDtypeStruct], scans) -> tuple[tuple[int, ...], bool]:
    """(axes along which a node's value depends on different entries of the parameters, whether it only moves them).

    Found by evaluating it with a number for each entry; for small leaves such as scales and biases.
    """
    generator = np.random.default_rng(0)
    given = {n.place: jnp.asarray(generator.uniform(1, 2, n.shape), leaves[0].dtype) for n in places_given(node)}
    ends = np.cumsum([0, *(math.prod(leaf.shape) for leaf in leaves)])
    with jax.ensure_compile_time_eval():
        zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        low = np.asarray(value(node, zeros, scans, given), np.float64)
        codes = np.zeros_like(low)
        for place in range(math.ceil(math.log(float(ends[-1]) + 2, 64))):  # digits that every dtype holds exactly
            digits = [
                jnp.asarray(np.arange(1 + start, 1 + stop) // 64**place % 64, leaf.dtype).reshape(leaf.shape)
                for leaf, start, stop in zip(leaves, ends[:-1], ends[1:], strict=True)
            ]
            codes += 64**place * (np.asarray(value(node, digits, scans, given), np.float64) - low)
    axes = tuple(i for i in range(codes.ndim) if codes.shape[i] > 1 and np.any(codes != np.take(codes, [0], axis=i)))
    entries = codes[tuple(slice(None) if i in axes else 0 for i in range(codes.ndim))].ravel()
    places = set(entries.tolist())
    return axes, len(places) == entries.size and places <= set(range(1, 1 + int(ends[-1])))


def _arrange(array, example, blocks, features, scans, shared_scans):
    """``array`` as (blocks, examples, shared, features); axes are counted with those of the scans."""
    axis = example.axis + scans
    length = array.shape[axis] // (example.before * example.after)
    shape = [*array.shape[:axis], example.before, length, example.after, *array.shape[axis + 1 :]]

    def moved(axes):
        return tuple(i if i < axis else i + 2 for i in axes)

    blocks, features, shared_scans = moved(blocks), moved(features), moved(shared_scans)
    taken = {*blocks, *features, *shared_scans, axis + 1}
    shared = shared_scans + tuple(i for i in range(len(shape)) if i not in taken)
    groups = (blocks, (axis + 1,), shared, features)
    ordered = array.reshape(shape).transpose(*itertools.chain(*groups))
    return ordered.reshape([math.prod(shape[i] for i in group) for group in groups])


def _patches_of(x, params, kernel_shape):
    """(batch, positions, kernel positions, groups, channels) of the input of a convolution.

    Padding and slices, one for each kernel position: exact, and as fast as memory allows.
    """
    numbers, strides = params["dimension_numbers"], params["window_strides"]
    batch_axis, channel_axis, *spatial_axes = numbers.lhs_spec
    x = x.transpose(batch_axis, *spatial_axes, channel_axis)
    kernel = [kernel_shape[i] for i in numbers.rhs_spec[2:]]
    dilation, groups = params["rhs_dilation"], params["feature_group_count"]
    config = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, strides, strict=True)]
    parts = []
    for offset in itertools.product(*map(range, kernel)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, counts, strides, strict=True)]
        part = jax.lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))
        parts.append(part.reshape(x.shape[0], math.prod(counts), groups, x.shape[-1] // groups))
    return jnp.stack(parts, axis=2)
