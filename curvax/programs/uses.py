"""The uses of parameters in a model: operations linear in a parameter and in data, and where their examples are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.programs.views import Node, Scan
from curvax.programs.walk import Address

Axes = tuple[int, ...]


class Dense(NamedTuple):
    """A matrix product in any spelling. Its result has the batched axes, then the free ones of either operand."""

    contracted: tuple[tuple[int, int], ...]  # pairs (axis of the parameter, axis of the input) that are summed over
    batched: tuple[tuple[int, int], ...]  # pairs that go side by side, as of experts
    free: Axes  # the other axes of the parameter
    free_outputs: Axes  # where they are in the result
    kind: str = "dense"


class Convolution(NamedTuple):
    """A convolution; axes are (examples, channels, *spatial) of data and (out, in, *spatial) of the kernel."""

    input_axes: Axes
    kernel_axes: Axes
    output_axes: Axes
    kernel_shape: Axes  # the spatial one
    strides: Axes
    padding: tuple[tuple[int, int], ...]
    input_dilation: Axes
    kernel_dilation: Axes
    groups: int
    kind: str = "conv"


class Lookup(NamedTuple):
    """Rows of a table, by indices on the last axis of the input.

    A row is what is left of the table at one index, or at one pair of indices, wherever their axes are: the rows are
    numbered by all of them, the last one fastest in the order of the base.
    """

    axes: Axes  # of the table, those that indices number
    columns: Axes  # where on the last axis of the input the index of each is said
    lengths: Axes  # of these axes
    clips: bool  # whether an index outside means the nearest row; else none
    features: Axes  # the axes of a row in the result
    kind: str = "embedding"

    def numbers(self, indices: jax.Array, order: Axes) -> jax.Array:
        """The numbers of the rows that indices read; where they read none, the number of rows.

        ``order`` says for each axis of the table where it is in the base.
        """
        indices = indices if indices.dtype.itemsize >= 4 else indices.astype(jnp.int32)
        number, inside = jnp.zeros(indices.shape[:-1], indices.dtype), True
        by_base = sorted(zip(self.axes, self.columns, self.lengths, strict=True), key=lambda entry: order[entry[0]])
        for _, column, length in by_base:
            index = indices[..., column]
            if self.clips:
                index = jnp.clip(index, 0, length - 1)
            inside = inside & (index >= 0) & (index < length)
            number = number * length + index
        return jnp.where(inside, number, math.prod(self.lengths))


class Elementwise(NamedTuple):
    """A product ("scale") or a sum ("shift") entry by entry; ``negative`` where the parameter is subtracted."""

    kind: str
    negative: bool = False


Operation = Dense | Convolution | Lookup | Elementwise


def operation_of(eqn: Any, side: int) -> Operation | None:
    """What an equation does with data and the parameter that is its operand ``side``; None if nothing known."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dense(
            params["dimension_numbers"], side, len(eqn.invars[side].aval.shape), len(eqn.outvars[0].aval.shape)
        )
    if name == "conv_general_dilated" and side == 1 and params["batch_group_count"] == 1:
        return _convolution(eqn, params["dimension_numbers"])
    if name == "gather" and side == 0:
        return _lookup(eqn, params["dimension_numbers"])
    if name == "mul":
        return Elementwise("scale")
    if name in ("add", "add_any", "sub"):
        return Elementwise("shift", negative=name == "sub" and side == 1)
    return None


def _dense(numbers, side, ndim, ndim_out):
    contract, batch = numbers
    free = tuple(i for i in range(ndim) if i not in (*contract[side], *batch[side]))
    first = len(batch[side]) if side == 0 else ndim_out - len(free)
    contracted, batched = (tuple(zip(axes[side], axes[1 - side], strict=True)) for axes in (contract, batch))
    return Dense(contracted, batched, free, tuple(range(first, first + len(free))))


def _convolution(eqn, numbers):
    params, kernel = eqn.params, eqn.invars[1].aval.shape
    return Convolution(
        *(numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
        tuple(kernel[i] for i in numbers.rhs_spec[2:]),
        *(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"]),
        params["feature_group_count"],
    )


def _lookup(eqn, numbers):
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    collapsed = numbers.collapsed_slice_dims
    axes = tuple(sorted(axis for axis in numbers.start_index_map if sizes[axis] == 1))
    # Of an axis that is taken whole an index says nothing.
    whole = all(sizes[axis] == shape[axis] for axis in range(len(shape)) if axis not in axes)
    if not axes or numbers.operand_batching_dims or not whole or not set(collapsed) <= set(axes):
        return None
    kept = [axis for axis in range(len(shape)) if axis not in collapsed]
    features = tuple(place for axis, place in zip(kept, numbers.offset_dims, strict=True) if axis not in axes)
    columns = tuple(numbers.start_index_map.index(axis) for axis in axes)
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    return Lookup(axes, columns, tuple(shape[axis] for axis in axes), clips, features)


class ExampleAxis(NamedTuple):
    """Where the examples are in an array: an axis of length before * N * after, examples in the middle."""

    axis: int
    before: int = 1
    after: int = 1


@dataclasses.dataclass(eq=False)
class Use:
    """One operation that uses a parameter."""

    operation: Operation
    operand: Node  # how the parameter came here
    side: int | None  # which operand the parameter is; None where the operand itself is what is tapped
    address: Address  # for ``side`` None the number of the operand follows that of the equation
    scans: tuple[Scan, ...]  # the scans around it, outermost first
    operand_shape: Axes  # in a step of the scans
    output: Any  # shape and dtype of what is perturbed: the result, or the parameter itself
    cofactors: tuple[Node, ...] = ()  # other parameters that the operand comes multiplied with, entry by entry
    input_axis: ExampleAxis | None = None  # the examples in the other operand, in a step; None where not needed
    output_axis: ExampleAxis | None = None  # the examples in the result
    unfit: str | None = None  # why it gives no structure
    rides_on: tuple[Use, Axes] | None = None  # of a bias, the use whose permuted result it is added to

    @property
    def kind(self) -> str:
        """The kind of the operation."""
        return self.operation.kind

    @property
    def layered(self) -> tuple[bool, ...]:
        """For each scan around the use, whether every step has parameters of its own (else they are shared)."""
        return tuple(scan in self.operand.scans for scan in self.scans)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the perturbation: the axes of the scans around the use, then its output's."""
        return (*(scan.length for scan in self.scans), *self.output.shape)

    def zeros(self) -> jax.Array:
        """The perturbation that changes nothing."""
        return jnp.zeros(self.output_shape, self.output.dtype)
