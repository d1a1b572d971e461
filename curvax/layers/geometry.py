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

from curvax.programs.uses import Convolution, Dense, Elementwise, Lookup, Use
from curvax.programs.views import Node, only_moves, value, varying_axes, without_permutation
from curvax.programs.walk import Address
from curvax.types import Array

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """Which axes of a use's arrays are what. Axes of the base count those of scans, which lead.

    Attributes:
        base: What of the parameters is seen as one array: the operand without its transpositions, or for elementwise
            uses without its copies.
        block_axes: Of the base, those that number independent matrices.
        in_axes: Of the base, those that the input is contracted with.
        out_axes: Of the base, those of the output's features.
        order: For each axis of the operand its place in the base, without scans.
        groups: Of a convolution: the first of ``out_axes`` is (groups, channels of a group).
        feature_axes: Of an elementwise use's operand, those along which the parameter varies.
        only_moves: Whether every entry of the base is one entry of a leaf, none twice.
        arriving: Of an elementwise use, what tells apart which entries of its leaves it takes.
    """

    use: Use
    base: Node
    base_shape: Axes
    block_axes: Axes = ()
    in_axes: Axes = ()
    out_axes: Axes = ()
    order: Axes = ()
    groups: int = 1
    feature_axes: Axes = ()
    only_moves: bool = True
    arriving: bytes = b""

    def at(self, use: Use) -> Geometry:
        """The same for this use in a program traced now."""
        use.input_axis, use.output_axis = self.use.input_axis, self.use.output_axis
        base = use.operand if self.elementwise else without_permutation(use.operand)[0]
        return dataclasses.replace(self, use=use, base=base)

    @property
    def elementwise(self) -> bool:
        """Whether the parameter is multiplied or added entry by entry."""
        return isinstance(self.use.operation, Elementwise)

    @property
    def varies_by_example(self) -> bool:
        """Whether each example meets entries of its own, as rows ``p[arange(examples)]``: they are no layer's."""
        axis = self.use.output_axis
        assert axis is not None
        return self.elementwise and axis.axis + len(self._scans(True)) in self.feature_axes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, inputs, outputs) of the matrices."""
        if self.elementwise:
            return 1, 1, math.prod(self.base_shape)
        blocks, ins, outs = (
            math.prod(self.base_shape[i] for i in axes) for axes in (self.block_axes, self.in_axes, self.out_axes)
        )
        return blocks * self.groups, ins, outs // self.groups

    @property
    def shared(self) -> int:
        """How many positions of an example share the parameters."""
        axis, (blocks, _, outs) = self.use.output_axis, self.shape
        assert axis is not None
        examples = self.use.output.shape[axis.axis] // (axis.before * axis.after)
        return math.prod(self.use.output_shape) // (examples * blocks * outs)

    # --- parameters -------------------------------------------------------------------------------------------------

    def base_value(
        self, leaves: Sequence[Any], given: Mapping[Address, Array] | None = None, *, wide: bool = False
    ) -> Array:
        """The base at these leaves, behind one axis for each scan that has parameters of its own.

        ``wide`` takes it in float32 at least, whatever the dtypes of leaves and program.
        """
        whole = value(self.base, leaves, self.use.scans, given, wide=wide)
        if not self.elementwise:
            return whole
        return whole[tuple(slice(None) if i in self.feature_axes else 0 for i in range(whole.ndim))]

    def matrices(self, base: Array) -> Array:
        """The base as (blocks, inputs, outputs); for elementwise uses as (1, 1, features)."""
        if self.elementwise:
            return base.reshape(self.shape)
        blocks, ins, outs = self.block_axes, self.in_axes, self.out_axes
        if self.groups > 1:
            # The groups of the output's channels are an axis of their own, the last of the blocks.
            (axis,) = outs
            base = base.reshape(*base.shape[:axis], self.groups, -1, *base.shape[axis + 1 :])
            blocks, ins = (tuple(i + (i > axis) for i in axes) for axes in (blocks, ins))
            blocks, outs = (*blocks, axis), (axis + 1,)
        return base.transpose(*blocks, *ins, *outs).reshape(self.shape)

    # --- data -------------------------------------------------------------------------------------------------------

    def inputs(self, raw: Array | None, places: Array | None = None) -> Array | None:
        """The use's input as (blocks, examples, shared, features); indices as (1, examples, shared) for embeddings.

        At all of the shared positions, or of a dense use or a convolution at some ``places`` among them alone.
        """
        if raw is None:
            return None
        axis, operation = self.use.input_axis, self.use.operation
        assert axis is not None
        if places is not None:
            if isinstance(operation, Convolution) and self._shares_pixels_alone:  # others are not laid out
                return self._patches(raw, operation, places)
            inputs = self.inputs(raw)
            assert inputs is not None
            return jnp.take(inputs, places, axis=2)
        if isinstance(operation, Dense):
            blocks, features = self._by_base(operation.batched), self._by_base(operation.contracted)
            return self._arranged(raw, axis, blocks, features)
        if isinstance(operation, Convolution):
            return self._patches(raw, operation)
        if isinstance(operation, Lookup):
            return self._arranged(operation.numbers(raw, self.order), axis, (), ())[..., 0]
        return self._elementwise(raw, axis)

    def cotangents(self, raw: Array) -> Array:
        """The cotangent of the use's output as (blocks, examples, shared, features)."""
        axis, operation, scans = self.use.output_axis, self.use.operation, len(self.use.scans)
        assert axis is not None
        if isinstance(operation, Dense):
            # The batched axes come first in the result, as the product lists them.
            blocks = self._by_base([(own, place) for place, (own, _) in enumerate(operation.batched)])
            features = self._by_base(zip(operation.free, operation.free_outputs, strict=True))
            return self._arranged(raw, axis, blocks, features)
        if isinstance(operation, Convolution):
            batch, channels, *spatial = (i + scans for i in operation.output_axes)
            raw = raw.transpose(*range(scans), batch, *spatial, channels)
            raw = raw.reshape(*raw.shape[:-1], self.groups, raw.shape[-1] // self.groups)
            groups = raw.ndim - 2 - scans
            return self._arranged(raw, axis._replace(axis=0), (groups,), (groups + 1,))
        if isinstance(operation, Lookup):
            rest = [i for i in range(len(self.order)) if i not in operation.axes]
            return self._arranged(raw, axis, (), self._by_base(zip(rest, operation.features, strict=True)))
        return self._elementwise(-raw if operation.negative else raw, axis)

    def _by_base(self, pairs):
        """Of pairs (axis of the operand, axis of the data) the latter, in the order of the base's axes."""
        return tuple(axis for _, axis in sorted(pairs, key=lambda pair: self.order[pair[0]]))

    def _scans(self, layered):
        """The axes of scans whose steps have parameters of their own, or share them."""
        return tuple(i for i, own in enumerate(self.use.layered) if own == layered)

    def _arranged(self, array, example, blocks, features):
        """``array`` as (blocks, examples, shared, features); axes are counted without those of the scans."""
        scans = len(self.use.scans)
        blocks, features = (tuple(i + scans for i in axes) for axes in (blocks, features))
        example = example._replace(axis=example.axis + scans)
        return _arrange(array, example, self._scans(True) + blocks, features, self._scans(False))

    def _elementwise(self, raw, example):
        scans, own = len(self.use.scans), self._scans(True)
        raw = jnp.broadcast_to(raw, (*raw.shape[:scans], *self.use.output.shape))
        # The features are the scans with parameters of their own, then axes of the operand, in its order.
        features = tuple(own[i] if i < len(own) else i - len(own) + scans for i in self.feature_axes)
        return _arrange(raw, example._replace(axis=example.axis + scans), (), features, self._scans(False))

    @property
    def _shares_pixels_alone(self):
        """Whether what shares a convolution within an example is its output positions, and no scan or further axis."""
        axis = self.use.input_axis
        return not self._scans(False) and axis is not None and axis.before == axis.after == 1

    def _patches(self, raw, convolution, places=None):
        """The input of a convolution as (blocks, examples, output positions, kernel positions and channels)."""
        lead = raw.shape[: len(self.use.scans)]
        flat = raw.reshape(-1, *raw.shape[len(lead) :])
        patches = jax.vmap(lambda x: _patches_of(x, convolution, places))(flat)
        patches = patches.reshape(*lead, *patches.shape[1:])  # (scans, examples, positions, *kernel, groups, channels)
        _, in_channels, *spatial = convolution.kernel_axes
        groups = 2 + len(spatial)
        # The base may have its channels before or behind the positions of its kernel.
        features = self._by_base([(in_channels, groups + 1), *((axis, 2 + i) for i, axis in enumerate(spatial))])
        assert self.use.input_axis is not None
        return self._arranged(patches, self.use.input_axis._replace(axis=0), (groups,), features)


def geometry_of(use: Use, structs: Sequence[jax.ShapeDtypeStruct]) -> Geometry:
    """The geometry of a use, for leaves of these shapes."""
    own = tuple(scan.length for scan in use.scans if scan in use.operand.scans)
    operation, shape = use.operation, use.operand_shape
    if isinstance(operation, Elementwise):
        feature_axes, moves, arriving = varying_axes(use.operand, structs, use.scans)
        base_shape = tuple(length for i, length in enumerate((*own, *shape)) if i in feature_axes)
        return Geometry(use, use.operand, base_shape, feature_axes=feature_axes, only_moves=moves, arriving=arriving)
    base, order = without_permutation(use.operand)
    # The operand is transpose(base, order): its axis i is axis order[i] of the base.
    order = order or tuple(range(len(shape)))
    base_shape = (*own, *(shape[order.index(i)] for i in range(len(shape))))
    groups = 1
    if isinstance(operation, Dense):
        pairs = operation.batched, operation.contracted
        blocks, ins, outs = *(tuple(i for i, _ in axes) for axes in pairs), operation.free
    elif isinstance(operation, Convolution):
        blocks, ins, outs, groups = (), operation.kernel_axes[1:], operation.kernel_axes[:1], operation.groups
    else:
        blocks, ins = (), operation.axes
        outs = tuple(axis for axis in range(len(shape)) if axis not in ins)
    blocks, ins, outs = (tuple(sorted(order[i] + len(own) for i in axes)) for axes in (blocks, ins, outs))
    blocks = (*range(len(own)), *blocks)
    return Geometry(use, base, base_shape, blocks, ins, outs, order, groups, only_moves=only_moves(base))


def _arrange(array, example, blocks, features, shared_scans):
    """``array`` as (blocks, examples, shared, features), whatever is left being shared."""
    axis = example.axis
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


def _patches_of(x, convolution, places=None):
    """(examples, positions, *kernel positions, groups, channels) of the input of a convolution.

    Padding and slices, one for each kernel position: exact, and as fast as memory allows. Where some positions alone
    are wanted each slice is cut down to them before all are put together.
    """
    kernel, strides, dilation = convolution.kernel_shape, convolution.strides, convolution.kernel_dilation
    examples, channels, *spatial = convolution.input_axes
    x = x.transpose(examples, *spatial, channels)
    config = [(*pad, d - 1) for pad, d in zip(convolution.padding, convolution.input_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, strides, strict=True)]
    groups = (convolution.groups, x.shape[-1] // convolution.groups)
    parts = []
    for offset in itertools.product(*map(range, kernel)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, counts, strides, strict=True)]
        part = jax.lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))
        part = part.reshape(x.shape[0], math.prod(counts), *groups)
        parts.append(part if places is None else jnp.take(part, places, axis=1))
    patches = jnp.stack(parts, axis=2)
    return patches.reshape(*patches.shape[:2], *kernel, *groups)
