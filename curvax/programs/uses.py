"""The uses of parameters in a model: operations linear in a parameter and in data, and where their examples are."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.programs.views import Node, Scan
from curvax.programs.walk import Address

Axes = tuple[int, ...]


class Dense(NamedTuple):
    """A matrix product in any spelling. Its result has the batched axes, then the free ones of either operand.

    Attributes:
        contracted: Pairs (axis of the parameter, axis of the input) that are summed over.
        batched: Pairs that go side by side, as of experts.
        free: The other axes of the parameter.
        free_outputs: Where they are in the result.
    """

    contracted: tuple[tuple[int, int], ...]
    batched: tuple[tuple[int, int], ...]
    free: Axes
    free_outputs: Axes
    kind: str = "dense"


class Convolution(NamedTuple):
    """A convolution; axes are (examples, channels, *spatial) of data and (out, in, *spatial) of the kernel.

    Attributes:
        input_axes: Of the input.
        kernel_axes: Of the kernel.
        output_axes: Of the output.
        kernel_shape: The kernel's spatial shape.
        strides: The steps between output positions.
        padding: (before, after) for each spatial axis.
        input_dilation: One more than the zeros between entries of the input.
        kernel_dilation: The same for the kernel.
        groups: Into how many groups the channels are divided.
    """

    input_axes: Axes
    kernel_axes: Axes
    output_axes: Axes
    kernel_shape: Axes
    strides: Axes
    padding: tuple[tuple[int, int], ...]
    input_dilation: Axes
    kernel_dilation: Axes
    groups: int
    kind: str = "conv"


class Lookup(NamedTuple):
    """Rows of a table, by indices whose last axis holds ``column``.

    Attributes:
        column: Where on the last axis of the input the row is said.
        rows: The number of rows.
        clips: Whether an index outside means the nearest row; else none.
        features: The axes of a row in the result.
    """

    column: int
    rows: int
    clips: bool
    features: Axes
    kind: str = "embedding"


class Elementwise(NamedTuple):
    """A product or a sum entry by entry.

    Attributes:
        kind: "scale" or "shift".
        negative: Whether it is subtracted.
    """

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
    rows, *row = eqn.invars[0].aval.shape
    collapsed = numbers.collapsed_slice_dims
    whole_rows = tuple(eqn.params["slice_sizes"]) == (1, *row) and set(collapsed) <= {0}
    if 0 not in numbers.start_index_map or numbers.operand_batching_dims or not whole_rows:
        return None
    features = numbers.offset_dims if collapsed else numbers.offset_dims[1:]
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    return Lookup(numbers.start_index_map.index(0), rows, clips, tuple(features))


class ExampleAxis(NamedTuple):
    """Where the examples are in an array: an axis of length before * N * after, examples in the middle."""

    axis: int
    before: int = 1
    after: int = 1


@dataclasses.dataclass(eq=False)
class Use:
    """One operation that uses a parameter.

    Attributes:
        operation: What it does.
        operand: How the parameter came here.
        side: Which operand of the operation is the parameter; None where the operand itself is what is tapped.
        address: The equation numbers that lead to the operation through nested programs; for ``side`` None also that
            of the operand.
        scans: The scans around it, outermost first.
        where: The same for people.
        operand_shape: The shape of the operand in a step of the scans.
        output: The shape and dtype of what is perturbed: the result, or the parameter itself.
        cofactors: Other parameters that the operand comes multiplied with, entry by entry.
        input_axis: The examples in the other operand, without axes of scans; None where that is not needed.
        output_axis: The examples in the result.
        unfit: Why it gives no structure; None if it does.
        rides_on: For a bias, the use whose result it is added to and the permutation of that result's axes.
    """

    operation: Operation
    operand: Node
    side: int | None
    address: Address
    scans: tuple[Scan, ...]
    where: str
    operand_shape: Axes
    output: Any
    cofactors: tuple[Node, ...] = ()
    input_axis: ExampleAxis | None = None
    output_axis: ExampleAxis | None = None
    unfit: str | None = None
    rides_on: tuple[Use, Axes] | None = None

    @property
    def kind(self) -> str:
        """The kind of the operation: "dense", "conv", "embedding", "scale" or "shift"."""
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
