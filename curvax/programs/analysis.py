"""Finds every use of every parameter in the program of a model, from shapes alone.

The program is walked with an abstract value for each variable: something affine in the parameters (a ``Node``),
something constant, or data. Where data and a parameter meet in an operation linear in both, that is a use; where a
parameter enters anything else, it has no structure, and the reason is kept. Two traces of the same model at two numbers
of examples are compared on the way: the axis in which the shapes differ is the axis of the examples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from curvax.programs.counters import counted
from curvax.programs.coupling import (
    NOTHING,
    Flow,
    Setting,
    carries_examples,
    flow,
    joined,
    same_operation,
    varies,
    varying,
)
from curvax.programs.trace import Twins
from curvax.programs.uses import Axes, Convolution, Dense, Elementwise, ExampleAxis, Lookup, Use, operation_of
from curvax.programs.views import MOVES, Applied, Constant, Given, Leaf, Node, Scan, Sliced, is_affine, places_given
from curvax.programs.walk import DESCEND, Address, Site, called_program, is_scan, program_at, scan_parts, walk


class Analysis(NamedTuple):
    """What the walk found.

    Attributes:
        uses: All uses in the order of the program, also those that turned out to be ``unfit``.
        reasons: For each leaf without structure, why.
        touched: The leaves that anything was computed from.
        coupled: The operation by which an output depends on other examples, as with batch statistics, or "".
        rows_per_example: How many rows of the outputs belong to each example: more than one where steps of sequences
            are folded into axis 0.
        given: The addresses of operations of a parameter and data that are the same for all examples.
    """

    uses: list[Use]
    reasons: dict[int, str]
    touched: set[int]
    coupled: str
    rows_per_example: int
    given: frozenset[Address]


def analyse(twins: Twins, num_leaves: int, through_custom_rules: bool = False) -> Analysis:
    """Walks a program of (params, inputs) -> (outputs, aux), and its twin for the axes of the examples.

    Args:
        num_leaves: How many of their arguments are leaves of the parameters.
        through_custom_rules: Look into functions with custom derivative rules, as if the rules were those of their
            bodies.
    """
    found = _Walk(through_custom_rules, twins)
    results = found.run(twins.programs[0], num_leaves)
    for result in results:
        if not isinstance(result, _Data):
            found.consumed(result, "is returned by the model without meeting the data")
    outvars = (program.jaxpr.outvars for program in twins.programs)
    outputs = list(zip(results, *outvars, strict=True))[: twins.num_outputs]
    rows = {_rows_per_example(a, b, twins.sizes) for x, a, b in outputs if isinstance(x, _Data)}
    # An output for every pair of examples, say, is one of two.
    coupled = joined(x.flow for x, _, _ in outputs if isinstance(x, _Data)).coupled
    # Two axes of examples are pairs of them.
    pairs = any(len(varying(a, b)) > 1 for x, a, b in outputs if isinstance(x, _Data))
    coupled = coupled or ("outputs" if pairs or None in rows else "")
    most = max((n for n in rows if n is not None), default=1)
    return Analysis(found.uses, found.reasons, found.touched, coupled, most, frozenset(found.given))


def uses_in(
    program: ClosedJaxpr, num_leaves: int, given: Collection[Address], through_custom_rules: bool = False
) -> list[Use]:
    """The uses in a program traced alone, without axes of examples; ``given`` is from ``analyse``."""
    found = _Walk(through_custom_rules, None)
    found.given.update(given)
    found.run(program, num_leaves)
    return found.uses


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """A value that is neither constant nor affine in the parameters.

    Attributes:
        flow: Whether it depends on the batch, and what has coupled examples.
        source: The use whose result it is, if its axes are only permuted, and the permutation.
    """

    flow: Flow
    source: tuple[Use, Axes] | None = None
    leaves = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """An entry-by-entry product of values affine in parameters: once it scales data, it is linear in each of them."""

    factors: tuple[Node, ...]

    @property
    def leaves(self):
        return tuple(leaf for node in self.factors for leaf in node.leaves)


class _Walk:
    def __init__(self, through_custom_rules: bool, twins: Twins | None):
        self.through, self.twins = through_custom_rules, twins
        self.sizes = twins.sizes if twins is not None else (0, 0)
        self.twin_programs: dict[Address, Jaxpr] = {}
        self.given: set[Address] = set()
        self.uses: list[Use] = []
        self.reasons: dict[int, str] = {}
        self.touched: set[int] = set()
        self.merges: dict[int, set[tuple[int, int]]] = {}
        self.constants: dict[Any, Any] = {}

    def run(self, program, num_leaves):
        batch = [_Data(Flow(reads=True, coupled=""))] * (len(program.jaxpr.invars) - num_leaves)
        leaves = [Leaf(i) for i in range(num_leaves)]
        self.constants = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        return walk(program, [*leaves, *batch], functools.partial(self.equation, ()), Constant)

    def setting(self, site: Site) -> Setting:
        """What an equation stands in."""
        return Setting(site.program, *self.sizes, self.merges, self.constants)

    def twin_of(self, site: Site) -> JaxprEqn | None:
        """The equation in the twin program."""
        if self.twins is None:
            return None
        around = site.address[:-1]
        if around not in self.twin_programs:
            self.twin_programs[around] = program_at(self.twins.programs[1], site.address)
        eqns = self.twin_programs[around].eqns
        if len(eqns) != len(site.program.eqns) or not same_operation(site.eqn, eqns[site.address[-1]]):
            raise ValueError(
                "the model computes differently for different numbers of examples, so their axis cannot be found"
            )
        return eqns[site.address[-1]]

    def equation(self, scans: tuple[Scan, ...], site: Site, inputs: list[Any]) -> Any:
        """What an equation makes of abstract values."""
        twin, affine = self.twin_of(site), [x for x in inputs if x.leaves]
        self.touched.update(leaf for x in affine for leaf in x.leaves)
        self.note_merges(site.eqn, twin)
        if affine and called_program(site.eqn, self.through) is not None:
            return DESCEND
        if affine and is_scan(site.eqn):
            return self.scan(scans, site, twin, inputs)
        if any(isinstance(x, _Data) for x in inputs):
            return self.meeting(scans, site, twin, inputs, affine) if affine else self.data(site, twin, inputs)
        return self.of_parameters(scans, site, inputs, affine)

    def of_parameters(self, scans, site, inputs, affine):
        """An equation of parameters and constants alone."""
        name, outputs = site.name, range(len(site.eqn.outvars))
        if name == "stop_gradient" or (not affine and site.eqn.effects):
            return self.data(site, None, inputs)
        if not any(isinstance(x, _Product) for x in inputs):
            if not affine or is_affine(site, inputs):
                return [Applied(site, i, operands=tuple(inputs)) for i in outputs]
            shapes = {atom.aval.shape for atom in (*site.eqn.invars, *site.eqn.outvars)}
            # Linear in each factor unless one leaf is in both; factors are evaluated from the parameters alone.
            apart = not set(inputs[0].leaves) & set(inputs[-1].leaves) and not any(map(places_given, inputs))
            if name == "mul" and apart and len(shapes) == 1 and not scans:
                return [_Product(tuple(inputs))]
        elif len(inputs) == 1 and name in MOVES | {"broadcast_in_dim"}:
            return [_Product(tuple(Applied(site, i, operands=(x,)) for x in inputs[0].factors)) for i in outputs]
        self.explain(name, affine)
        return self.data(site, None, inputs)

    def meeting(self, scans, site, twin, inputs, affine):
        """A parameter meets data."""
        result = self.data(site, twin, inputs)
        if self.is_given(scans, site, twin, affine):
            self.given.add(site.address)
            operands = [
                x if isinstance(x, Node) else Given((*site.address, i), _struct(site.eqn.invars[i]))
                for i, x in enumerate(inputs)
            ]
            return [Applied(site, 0, operands=tuple(operands))]
        side = next(i for i, x in enumerate(inputs) if x.leaves)
        operation = operation_of(site.eqn, side) if len(affine) == 1 else None
        if isinstance(affine[0], _Product) and operation != Elementwise("scale"):
            operation = None
        if operation is None:
            # Data that is added to nothing: the parameter, copied for each example, can be tapped where it is.
            for index, x in enumerate(inputs):
                if x.leaves:
                    self.tap_itself(scans, site, twin, x, index, site.name)
            return result
        factors = affine[0].factors if isinstance(affine[0], _Product) else affine
        for factor in factors:
            cofactors = tuple(x for x in factors if x is not factor)
            output = _struct(site.eqn.outvars[0])
            shape = site.eqn.invars[side].aval.shape
            use = Use(operation, factor, side, site.address, scans, shape, output, cofactors)
            self.uses.append(use)
            if twin is not None:
                use.unfit = self.find_examples(use, site.eqn, twin, inputs[1 - side])
                if use.unfit is not None:
                    self.consumed(factor, f"{use.unfit} ({site.path})")
        use = self.uses[-1]
        if operation.kind == "shift":
            # A difference turns the sign of one of the two, so that they are no sum with a one for the bias.
            use.rides_on = source = None if site.name == "sub" else inputs[1 - side].source
        else:
            source = None if use.cofactors else (use, tuple(range(len(use.output.shape))))
        return result if use.unfit else [dataclasses.replace(result[0], source=source)]

    def is_given(self, scans, site, twin, affine):
        """Whether the data that a parameter meets are the same for all examples, so that it stays affine."""
        name = site.name
        if len(affine) != 1 or isinstance(affine[0], _Product) or scans:
            return False
        if name not in ("mul", "add", "sub", "add_any", "dot_general"):
            return False
        if twin is None:
            return site.address in self.given
        pairs = zip((*site.eqn.invars, *site.eqn.outvars), (*twin.invars, *twin.outvars), strict=True)
        return not any(varies(a, b) for a, b in pairs)

    def tap_itself(self, scans, site, twin, node, index, name):
        if isinstance(node, _Product):
            self.explain(name, [node])
            return
        output = _struct(site.eqn.invars[index])
        address = (*site.address, index)
        use = Use(Elementwise("shift"), node, None, address, scans, output.shape, output)
        self.uses.append(use)
        if twin is not None:
            axis = self.axis(site.eqn.invars[index], twin.invars[index])
            if isinstance(axis, ExampleAxis):
                use.output_axis = axis
            else:
                use.unfit = f"enters {name}"
                self.explain(name, [node])

    # --- axes of examples -------------------------------------------------------------------------------------------

    def find_examples(self, use, eqn, twin, other):
        """Sets the axes of the examples; returns why there are none."""
        if not other.flow.reads:
            return "meets what is computed from parameters alone"
        output = self.axis(eqn.outvars[0], twin.outvars[0])
        if not isinstance(output, ExampleAxis):
            return output
        use.output_axis = output
        if use.kind == "shift":
            return None
        incoming = self.axis(eqn.invars[1 - use.side], twin.invars[1 - use.side])
        if not isinstance(incoming, ExampleAxis):
            return incoming
        use.input_axis = incoming
        operation = use.operation
        if isinstance(operation, Dense | Convolution | Lookup) and varies(eqn.invars[use.side], twin.invars[use.side]):
            return "is copied for each example"
        pairs = (*operation.contracted, *operation.batched) if isinstance(operation, Dense) else ()
        if incoming.axis in (axis for _, axis in pairs):
            return "the examples are summed over"
        if isinstance(operation, Convolution) and incoming.axis != operation.input_axes[0]:
            return "the examples are not the batch of the convolution"
        return None

    def axis(self, atom, twin):
        """The ``ExampleAxis`` of a variable, or why it has none."""
        shape, other = atom.aval.shape, twin.aval.shape
        growing = varying(atom, twin)
        if not growing:
            return "the examples are not an axis of its result or input"
        if len(growing) > 1:
            return "two axes grow with the number of examples"
        index, (first, second) = growing[0], self.sizes
        times, rest = divmod(shape[index], first)
        if rest or other[index] != times * second:
            return "an axis is not a multiple of the number of examples"
        if times == 1:
            return ExampleAxis(index)
        layouts = self.merges.get(times, set())
        if len(layouts) != 1:
            return "examples and another axis are merged in an order that cannot be told"
        before, after = next(iter(layouts))
        return ExampleAxis(index, before, after)

    def note_merges(self, eqn, twin):
        """Records in what order a reshape or a concatenation merges the examples with other axes."""
        if twin is None or eqn.primitive.name not in ("reshape", "concatenate"):
            return
        first, new = self.sizes[0], eqn.outvars[0].aval.shape
        target = varying(eqn.outvars[0], twin.outvars[0])
        if eqn.primitive.name == "concatenate":
            axis = eqn.params["dimension"]
            if axis in target and all(v.aval.shape[axis] == first for v in eqn.invars):
                self.merges.setdefault(new[axis] // first, set()).add((new[axis] // first, 1))
            return
        order = eqn.params.get("dimensions") or range(len(eqn.invars[0].aval.shape))  # a transposition before
        old = [eqn.invars[0].aval.shape[i] for i in order]
        source = [list(order).index(i) for i in varying(eqn.invars[0], twin.invars[0])]
        if len(source) != 1 or len(target) != 1 or old[source[0]] != first or new[target[0]] == first:
            return
        times = new[target[0]] // first
        # What lies before the examples in memory stays before them.
        before_old, before_new = math.prod(old[: source[0]]), math.prod(new[: target[0]])
        if before_new and before_old % before_new == 0 and times % (before_old // before_new) == 0:
            before = before_old // before_new
            self.merges.setdefault(times, set()).add((before, times // before))

    # --- loops ------------------------------------------------------------------------------------------------------

    def scan(self, scans, site, twin, inputs):
        parts = scan_parts(site.eqn)
        loop = Scan(site.address, parts.length)
        for x in inputs:
            if isinstance(x, _Product):
                self.explain("scan", [x])
        consts, carry, scanned = parts.operands([_carried(x) if isinstance(x, _Product) else x for x in inputs])
        for offset, x in enumerate(carry):
            if x.leaves:
                self.tap_itself(scans, site, twin, x, parts.num_consts + offset, "the carry of scan")
        counters = counted(parts, [_integer(x) for x in carry])
        carry = [
            _carried(x) if numbers is None else Sliced(loop, operands=(Constant(numbers),))
            for x, numbers in zip(carry, counters, strict=True)
        ]
        sliced = [Sliced(loop, operands=(x,)) if isinstance(x, Node) else _carried(x) for x in scanned]
        uses, reasons = len(self.uses), dict(self.reasons)
        while True:
            handle = functools.partial(self.equation, (*scans, loop))
            results = walk(parts.body, [*consts, *carry, *sliced], handle, Constant, site.address, site.path)
            after = [
                b if isinstance(b, Node) else _Data(joined((b.flow, a.flow)))
                for a, b in zip(map(_carried, parts.results(results)[0]), carry, strict=True)
            ]
            flows = [[x.flow for x in values if isinstance(x, _Data)] for values in (after, carry)]
            if flows[0] == flows[1]:
                break
            # What a step makes of the carry is what the next starts from: walk again with both.
            del self.uses[uses:]
            self.reasons, carry = dict(reasons), after
        for x in results:
            if x.leaves:
                self.consumed(x, "leaves a scan without meeting the data")
        # Over the examples one by one: what is carried on has seen those before.
        setting = self.setting(site)
        if twin is not None and carries_examples(site.eqn, twin, setting):
            return [_Data(Flow(reads=True, coupled=_carried(x).flow.coupled or "scan")) for x in results]
        return [_carried(x) for x in results]

    # --- values -----------------------------------------------------------------------------------------------------

    def data(self, site, twin, inputs):
        """Results that are data."""
        setting = self.setting(site)
        flows = flow(site.eqn, twin, setting, [_carried(x).flow for x in inputs])
        source = _moved_source(site.eqn, inputs)
        return [_Data(found, None if i else source) for i, found in enumerate(flows)]

    def consumed(self, value, reason):
        """The value's leaves have no structure."""
        self.touched.update(value.leaves)
        for index in value.leaves:
            self.reasons.setdefault(index, reason)

    def explain(self, name, values):
        leaves = sorted({index for x in values for index in x.leaves})
        if any(isinstance(x, _Product) for x in values) or (name in ("mul", "dot_general") and len(values) > 1):
            other = "another parameter" if len(leaves) > 1 else "itself"
            text = f"is multiplied by {other} before it meets the data"
        elif name.startswith("custom_"):
            text = f"is used inside a function with custom derivatives ({name}); see through_custom_rules"
        elif name in ("cond", "while"):
            text = f"is used inside `{name}`, whose body is not looked into"
        elif name == "gather":
            text = "enters `gather`: several rows by one index, or no whole rows; read them one by one"
        else:
            text = f"enters `{name}`"
        for x in values:
            self.consumed(x, text)


def _carried(x):
    """What is known of a value behind the border of a loop."""
    return _Data(x.flow if isinstance(x, _Data) else NOTHING)


def _integer(x):
    """The number that a loop's counter begins with, if it is one."""
    known = isinstance(x, Constant) and not x.unknown and jnp.ndim(x.value) == 0
    return x.value if known and jnp.issubdtype(jnp.result_type(x.value), jnp.integer) else None


def _struct(atom):
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def _rows_per_example(atom, twin, sizes):
    """How many rows along axis 0 belong to each example; None where their number is no multiple of the examples'."""
    if not atom.aval.shape:
        return None
    rows, rest = divmod(atom.aval.shape[0], sizes[0])
    return None if rest or twin.aval.shape[0] != rows * sizes[1] else rows


def _moved_source(eqn, inputs):
    """The use whose result this still is, up to a permutation of the axes."""
    first = inputs[0] if inputs else None
    if not isinstance(first, _Data) or first.source is None or len(inputs) != 1:
        return None
    name, (use, order) = eqn.primitive.name, first.source
    if name in ("convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision", "name"):
        return first.source if jax.numpy.issubdtype(eqn.outvars[0].aval.dtype, jax.numpy.floating) else None
    if name == "transpose":
        return use, tuple(order[i] for i in eqn.params["permutation"])
    return None
