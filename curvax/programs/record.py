"""A program recorded equation by equation, for backward recursions other than that of the gradient.

Reverse-mode differentiation sends a cotangent through every equation by the transpose of its Jacobian. Curvature
propagation adds noise at every equation that bends, and the recursion of Becker and LeCun sends squares: both need the
equations one by one, with the values that entered them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from curvax.programs.trace import program_arguments, trace_term
from curvax.programs.views import MOVES
from curvax.programs.walk import DESCEND, Address, Site, apply_equation, called_program, is_scan, scan_parts, walk
from curvax.types import Array, PyTree

if TYPE_CHECKING:
    from curvax.objectives.term import Term


def record(
    program: ClosedJaxpr,
    arguments: Sequence[Any],
    varies: Sequence[bool],
    roots: Collection[Address] = (),
) -> tuple[list[Value], RecordedProgram]:
    """Runs a program and keeps every equation that depends on what varies.

    Calls, ``remat`` and custom rules whose bodies are elementwise stay one equation or are entered, whichever keeps
    their derivatives; a ``scan`` is unrolled. What several equations make of one variable entry by entry, such as
    x sigmoid(x), becomes one step.

    Args:
        varies: Which of them are variables.
        roots: Addresses of equations outside of loops whose first result varies by itself.

    Returns:
        ``(results, recorded)``; the values of ``roots`` are in ``recorded.roots`` under their addresses.
    """
    recorded = RecordedProgram([], [Value(x, flag) for x, flag in zip(arguments, varies, strict=True)], {})
    return _run(recorded, program, recorded.arguments, roots), recorded


def record_term(term: Term, params: PyTree, inputs: PyTree, roots: Collection[Address] | None = None) -> RecordedTerm:
    """Runs a term's model and keeps every equation that depends on the parameters, or else on ``roots`` alone."""
    program, _, num_outputs = trace_term(term, params, inputs)
    arguments, num_leaves = program_arguments(params, inputs), len(jax.tree.leaves(params))
    varies = [roots is None] * num_leaves + [False] * (len(arguments) - num_leaves)
    results, recorded = record(program, arguments, varies, roots or ())
    return RecordedTerm(recorded, results[:num_outputs], recorded.arguments[:num_leaves])


class RecordedTerm(NamedTuple):
    """A term's model, recorded."""

    program: RecordedProgram
    outputs: list[Value]
    params: list[Value]

    def at_outputs(self, tree: PyTree) -> list[tuple[Value, Array]]:
        """What a tree like the outputs seeds a sweep with."""
        return [(out, leaf) for out, leaf in zip(self.outputs, jax.tree.leaves(tree), strict=True) if out.varies]

    def to_params(self, arrived: dict[int, Array], like: PyTree) -> PyTree:
        """What a sweep brought to the parameters."""
        return jax.tree.structure(like).unflatten([found(arrived, value) for value in self.params])


def pull_back(step: Step, cotangents: list[Array]) -> list[Array]:
    """The rule of the gradient."""
    return list(step.pull_back(cotangents))


def found(arrived: dict[int, Array], value: Value) -> Array:
    """What a sweep brought to a value, zeros if nothing."""
    return arrived[id(value)] if id(value) in arrived else _zeros(value.array)


@dataclasses.dataclass(eq=False)
class Value:
    """An array, and whether it depends on what varies."""

    array: Any
    varies: bool = False


Rule = Callable[["Step", list[Array]], list[Array]]
"""(equation, what arrived at its results) -> what leaves at the operands that vary."""


@dataclasses.dataclass(eq=False)
class RecordedProgram:
    """The equations in the order in which they ran, and where the variables are."""

    steps: list[Step]
    arguments: list[Value]
    roots: dict[Address, Value]
    chains: dict[int, tuple[Value, list[Step]]] = dataclasses.field(default_factory=dict)

    def append(self, step: Step) -> None:
        """Adds an equation, or the elementwise function of one variable that it completes."""
        origin = self._origin(step)
        if origin is None:
            self.steps.append(step)
            return
        before = [part for x in step.variables for part in self.chains.get(id(x), (x, []))[1]]
        parts = [*dict.fromkeys(before), step]
        self.chains[id(step.outputs[0])] = origin, parts
        plain = len(parts) == 1
        self.steps.append(step if plain else Chain(step.site, [origin], step.outputs, parts))

    def _origin(self, step):
        """The one value that an elementwise step's operands come from entry by entry."""
        origins = [self.chains.get(id(x), (x, []))[0] for x in step.variables]
        same = all(x is origins[0] for x in origins) and len(step.outputs) == 1 and step.elementwise
        return origins[0] if same and origins[0].array.shape == step.outputs[0].array.shape else None

    def sweep(self, seeds: Sequence[tuple[Value, Array]], rule: Rule) -> dict[int, Array]:
        """Sends ``seeds`` backwards by ``rule``; what arrives at a value adds up and is found under its ``id``."""
        arrived: dict[int, Array] = {}

        def add(value, array):
            arrived[id(value)] = arrived[id(value)] + array if id(value) in arrived else array

        for value, seed in seeds:
            add(value, seed)
        for step in reversed(self.steps):
            if any(id(out) in arrived for out in step.outputs):
                at_results = [found(arrived, out) for out in step.moving]
                for value, array in zip(step.variables, rule(step, at_results), strict=True):
                    add(value, array)
        return arrived


@dataclasses.dataclass(eq=False)
class Step:
    """One equation that ran."""

    site: Site
    inputs: list[Value]
    outputs: list[Value]

    @property
    def variables(self) -> list[Value]:
        """The operands that vary."""
        return [x for x in self.inputs if x.varies]

    @property
    def moving(self) -> list[Value]:
        """The results that vary."""
        return [x for x in self.outputs if x.varies]

    def function(self, *arrays: Array) -> list[Array]:
        """The results that vary as a function of the operands that do."""
        given = iter(arrays)
        values = [next(given) if x.varies else x.array for x in self.inputs]
        results = apply_equation(self.site.program, self.site.eqn, *values)
        return [y for y, out in zip(results, self.outputs, strict=True) if out.varies]

    @functools.cached_property
    def pull_back(self) -> Callable[[list[Array]], tuple[Array, ...]]:
        """The transpose of the Jacobian."""
        return jax.vjp(self.function, *(x.array for x in self.variables))[1]

    @property
    def elementwise(self) -> bool:
        """Whether an entry of the result depends on the entries there of its operands alone, some perhaps broadcast."""
        return _is_elementwise(self.site.eqn)

    @property
    def bilinear(self) -> bool:
        """Whether it is a product of its two operands."""
        return self.site.name in ("mul", "dot_general", "conv_general_dilated")

    @property
    def selects(self) -> bool:
        """Whether the results are sums of entries of the operands."""
        return self.site.name in _SELECTIONS

    @property
    def linear(self) -> bool:
        """Whether the result is linear in all operands that vary together."""
        sums = self.selects or self.site.name in ("add", "add_any", "sub", "neg")
        return sums or (self.bilinear and len(self.variables) == 1)

    def product(self, *operands: Array) -> Array:
        """A bilinear equation of other operands."""
        return self.site.eqn.primitive.bind(*operands, **self.site.eqn.params)


@dataclasses.dataclass(eq=False)
class Chain(Step):
    """Several elementwise equations that make one function of one variable.

    Attributes:
        parts: The equations in their order, the last one that of the result.
    """

    parts: list[Step]

    def function(self, *arrays: Array) -> list[Array]:
        values = {id(self.inputs[0]): arrays[0]}
        for part in self.parts:
            (values[id(part.outputs[0])],) = part.function(*(values[id(x)] for x in part.variables))
        return [values[id(self.outputs[0])]]

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return all(part.linear for part in self.parts)


_SELECTIONS = MOVES | {
    *("broadcast_in_dim", "reduce_sum", "gather", "scatter-add", "scatter_add", "dynamic_update_slice", "select_n"),
    *("reduce_max", "reduce_min", "cumsum", "stop_gradient", "name", "select_and_gather_add", "reduce_window_max"),
    *("reduce_window_sum", "reduce_window_min", "pvary", "sort", "tile"),
}
"""Primitives whose results are sums of entries of their operands, where they are differentiable."""

_ELEMENTWISE = frozenset(
    {
        *("add", "sub", "mul", "div", "neg", "add_any", "max", "min", "pow", "integer_pow", "square", "sqrt", "rsqrt"),
        *("cbrt", "exp", "exp2", "expm1", "log", "log1p", "tanh", "tan", "sin", "cos", "asin", "acos", "atan", "atan2"),
        *("sinh", "cosh", "asinh", "acosh", "atanh", "logistic", "erf", "erfc", "erf_inv", "abs", "sign", "clamp"),
        *("log2", "lgamma", "digamma", "select_n", "convert_element_type", "copy", "copy_p", "name", "stop_gradient"),
        *("one_minus_square", "is_finite", "floor", "ceil", "round", "eq", "ne", "lt", "le", "gt", "ge"),
        *("and", "or", "not"),
    }
)


def _run(recorded, program, arguments, roots=()):
    """Runs a program on values and records it; those inside of loops have no addresses, so no roots."""
    inside = {root[:depth] for root in roots for depth in range(1, len(root))}

    def handle(site, inputs):
        varies = any(x.varies for x in inputs)
        if (varies or site.address in inside) and called_program(site.eqn) is not None:
            return DESCEND
        unrolled = varies and is_scan(site.eqn)
        outputs = _unrolled(recorded, site.eqn, inputs) if unrolled else _run_equation(recorded, site, inputs, varies)
        if site.address in roots:
            outputs[0].varies, recorded.roots[site.address] = True, outputs[0]
            # What arrives at it is asked for, so no chain may pass it by.
            recorded.chains.pop(id(outputs[0]), None)
        return outputs

    return walk(program, arguments, handle, Value)


def _run_equation(recorded, site, inputs, varies):
    outputs = [Value(y) for y in apply_equation(site.program, site.eqn, *(x.array for x in inputs))]
    for out in outputs:
        out.varies = varies and _inexact(out.array)
    if any(out.varies for out in outputs):
        # A number of another type, such as an index, takes part but has no derivative.
        recorded.append(Step(site, [x if _inexact(x.array) else Value(x.array) for x in inputs], outputs))
    return outputs


def _unrolled(recorded, eqn, inputs):
    parts = scan_parts(eqn)
    consts, carry, scanned = parts.operands(inputs)
    elements = [_taken_apart(recorded, x, parts.length) for x in scanned]
    results: list[Any] = [None] * parts.length
    for index in reversed(range(parts.length)) if parts.reverse else range(parts.length):
        out = _run(recorded, parts.body, [*consts, *carry, *(x[index] for x in elements)])
        carry, results[index] = parts.results(out)
    return [*carry, *(_stacked(recorded, steps) for steps in zip(*results, strict=True))]


def _taken_apart(recorded, value, length):
    if not value.varies:
        return [Value(value.array[i]) for i in range(length)]
    return _run(recorded, jax.make_jaxpr(lambda x: [x[i] for i in range(length)])(value.array), [value])


def _stacked(recorded, parts):
    if not any(x.varies for x in parts):
        return Value(jnp.stack([x.array for x in parts]))
    program = jax.make_jaxpr(lambda *xs: jnp.stack(xs))(*(x.array for x in parts))
    return _run(recorded, program, list(parts))[0]


def _is_elementwise(eqn):
    body = called_program(eqn, through_custom_rules=True)
    if body is not None:
        return all(map(_is_elementwise, body.jaxpr.eqns))
    return eqn.primitive.name in _ELEMENTWISE


def _inexact(array):
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def _zeros(array):
    return jnp.zeros(jnp.shape(array), jnp.result_type(array))
