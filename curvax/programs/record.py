"""A program recorded equation by equation, for backward recursions other than that of the gradient.

Reverse-mode differentiation sends a cotangent through every equation by the transpose of its Jacobian. Curvature
propagation adds noise at every equation that bends, and the recursion of Becker and LeCun sends squares: both need the
equations one by one, with the values that entered them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from curvax.layers.find import trace_term
from curvax.objectives.term import Term
from curvax.programs.analysis import body_of
from curvax.programs.views import MOVES, apply_equation

PyTree = Any
Array = jax.Array


def record(
    program: ClosedJaxpr,
    arguments: Sequence[Any],
    varies: Sequence[bool],
    roots: Collection[tuple[int, ...]] = (),
) -> tuple[list[Value], RecordedProgram]:
    """Runs a program and keeps every equation that depends on what varies.

    Calls, ``remat`` and custom rules whose bodies are elementwise stay one equation or are entered, whichever keeps
    their derivatives; a ``scan`` is unrolled. What several equations make of one variable entry by entry, such as
    x sigmoid(x), becomes one step.

    Args:
        program: The program.
        arguments: Its arguments.
        varies: Which of them are variables.
        roots: Addresses of equations outside of loops whose first result varies by itself.

    Returns:
        ``(results, recorded)``; the values of ``roots`` are in ``recorded.roots`` under their addresses.
    """
    recorded = RecordedProgram([], [Value(x, flag) for x, flag in zip(arguments, varies, strict=True)], {})
    results = _run(recorded, program.jaxpr, [Value(c) for c in program.consts], recorded.arguments, (), roots)
    return results, recorded


def record_term(
    term: Term, params: PyTree, inputs: PyTree, roots: Collection[tuple[int, ...]] | None = None
) -> RecordedTerm:
    """Runs a term's model and keeps every equation that depends on the parameters, or else on ``roots`` alone."""
    program, _, num_outputs = trace_term(term, params, inputs)
    leaves, data = jax.tree.leaves(params), jax.tree.leaves(inputs)
    varies = [roots is None] * len(leaves) + [False] * len(data)
    results, recorded = record(program, [*leaves, *data], varies, roots or ())
    return RecordedTerm(recorded, results[:num_outputs], recorded.arguments[: len(leaves)])


class RecordedTerm(NamedTuple):
    """A term's model, recorded.

    Attributes:
        program: The equations.
        outputs: z, flattened.
        params: The leaves of the parameters.
    """

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
    roots: dict[tuple[int, ...], Value]
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
        self.steps.append(step if plain else Chain(step.program, step.eqn, [origin], step.outputs, parts))

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

    program: Jaxpr
    eqn: JaxprEqn
    inputs: list[Value]
    outputs: list[Value]

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

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
        results = apply_equation(self.program, self.eqn, *values)
        return [y for y, out in zip(results, self.outputs, strict=True) if out.varies]

    @functools.cached_property
    def pull_back(self) -> Callable[[list[Array]], tuple[Array, ...]]:
        """The transpose of the Jacobian."""
        return jax.vjp(self.function, *(x.array for x in self.variables))[1]

    @property
    def elementwise(self) -> bool:
        """Whether an entry of the result depends on the entries there of its operands alone, some perhaps broadcast."""
        return _is_elementwise(self.eqn)

    @property
    def linear(self) -> bool:
        """Whether the result is linear in all operands that vary together."""
        if self.name in SELECTIONS or self.name in ("add", "add_any", "sub", "neg"):
            return True
        return self.name in BILINEAR and len(self.variables) == 1


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


BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})

SELECTIONS = MOVES | {
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
        *("lgamma", "digamma", "select_n", "convert_element_type", "copy", "copy_p", "name", "stop_gradient"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "floor", "ceil", "round"),
    }
)


def _run(recorded, program, consts, arguments, address, roots):
    environment = dict(zip(program.constvars, consts, strict=True))
    environment.update(zip(program.invars, arguments, strict=True))

    def read(atom):
        return Value(atom.val) if isinstance(atom, Literal) else environment[atom]

    for number, eqn in enumerate(program.eqns):
        here = (*address, number)
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _run_equation(recorded, program, eqn, inputs, here, roots)
        if here in roots:
            outputs[0].varies, recorded.roots[here] = True, outputs[0]
            # What arrives at it is asked for, so no chain may pass it by.
            recorded.chains.pop(id(outputs[0]), None)
        environment.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in program.outvars]


def _run_equation(recorded, program, eqn, inputs, address, roots):
    inside = any(root[: len(address)] == address and len(root) > len(address) for root in roots)
    varies = any(x.varies for x in inputs)
    body = body_of(eqn, through_custom_rules=False)
    if body is not None and (varies or inside):
        return _run(recorded, body.jaxpr, [Value(c) for c in body.consts], inputs, address, roots)
    if eqn.primitive.name == "scan" and varies:
        return _unrolled(recorded, eqn, inputs)
    outputs = [Value(y) for y in apply_equation(program, eqn, *(x.array for x in inputs))]
    if varies:
        for out in outputs:
            out.varies = jnp.issubdtype(jnp.result_type(out.array), jnp.inexact)
        if any(out.varies for out in outputs):
            # A number of another type, such as an index, takes part but has no derivative.
            inputs = [x if _inexact(x.array) else Value(x.array) for x in inputs]
            recorded.append(Step(program, eqn, inputs, outputs))
    return outputs


def _unrolled(recorded, eqn, inputs):
    params = eqn.params
    body, length = params["jaxpr"], params["length"]
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    scanned = [_taken_apart(recorded, x, length) for x in inputs[num_consts + num_carry :]]
    results: list[Any] = [None] * length
    for index in reversed(range(length)) if params["reverse"] else range(length):
        own = [parts[index] for parts in scanned]
        out = _run(recorded, body.jaxpr, [Value(c) for c in body.consts], [*consts, *carry, *own], (), ())
        carry, results[index] = out[:num_carry], out[num_carry:]
    stacks = [_stacked(recorded, parts) for parts in zip(*results, strict=True)]
    return [*carry, *stacks]


def _taken_apart(recorded, value, length):
    if not value.varies:
        return [Value(value.array[i]) for i in range(length)]
    program = jax.make_jaxpr(lambda x: [x[i] for i in range(length)])(value.array)
    return _run(recorded, program.jaxpr, [Value(c) for c in program.consts], [value], (), ())


def _stacked(recorded, parts):
    if not any(x.varies for x in parts):
        return Value(jnp.stack([x.array for x in parts]))
    program = jax.make_jaxpr(lambda *xs: jnp.stack(xs))(*(x.array for x in parts))
    return _run(recorded, program.jaxpr, [Value(c) for c in program.consts], list(parts), (), ())[0]


def _is_elementwise(eqn):
    name = eqn.primitive.name
    if name in ("custom_jvp_call", "custom_vjp_call"):
        body = body_of(eqn, through_custom_rules=True)
        return body is not None and all(_is_elementwise(inner) for inner in body.jaxpr.eqns)
    body = body_of(eqn, through_custom_rules=False)
    if body is not None:
        return all(_is_elementwise(inner) for inner in body.jaxpr.eqns)
    return name in _ELEMENTWISE


def _inexact(array):
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def _zeros(array):
    return jnp.zeros(jnp.shape(array), jnp.result_type(array))
