"""The uses of parameters in a model: operations linear in a parameter and in data, and where their examples are."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from jax.extend.core import Jaxpr

from curvax.programs.views import Node, depends_on

Kind = Literal["dense", "conv", "embedding", "scale", "shift"]


class ExampleAxis(NamedTuple):
    """Where the examples are in an array: an axis of length before * N * after, examples in the middle."""

    axis: int
    before: int = 1
    after: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """One ``scan`` that a use stands in; its identity tells it from others."""

    length: int


@dataclasses.dataclass(eq=False)
class Use:
    """One operation that uses a parameter.

    Attributes:
        kind: "dense" (``dot_general``), "conv", "embedding" (``gather``), "scale" (``mul``) or "shift" (``add``).
        operand: How the parameter came here.
        side: Which operand of the operation is the parameter.
        program: The jaxpr that holds the operation.
        eqn: The operation; for a "shift" with ``side`` None the operand itself is what is tapped.
        address: The equation numbers that lead to the operation through nested programs.
        scans: The scans around it, outermost first.
        where: The same for people.
        input_axis: The examples in the other operand, without axes of scans; None where that is not needed.
        output_axis: The examples in the result.
        unfit: Why it gives no structure; None if it does.
        rides_on: For a bias, the use whose result it is added to and the permutation of that result's axes.
    """

    kind: Kind
    operand: Node
    side: int | None
    program: Jaxpr
    eqn: Any  # a JaxprEqn
    address: tuple[int, ...]
    scans: tuple[Scan, ...]
    where: str
    input_axis: ExampleAxis | None = None
    output_axis: ExampleAxis | None = None
    unfit: str | None = None
    rides_on: tuple[Use, tuple[int, ...]] | None = None

    @property
    def layered(self) -> tuple[bool, ...]:
        """For each scan around the use, whether every step has parameters of its own (else they are shared)."""
        return tuple(depends_on(self.operand, scan) for scan in self.scans)

    @property
    def variable(self) -> Any:
        """The variable that is perturbed: the result, or the parameter itself."""
        return self.eqn.outvars[0] if self.side is not None else self.eqn.invars[self.address[-1]]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the perturbation: the axes of the scans around the use, then its output's."""
        return (*(scan.length for scan in self.scans), *self.variable.aval.shape)
