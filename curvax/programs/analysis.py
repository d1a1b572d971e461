"""Finds every use of every parameter in the program of a model, from shapes alone.

The program is walked with an abstract value for each variable: something affine in the parameters (a ``Node``),
something constant, or data. Where data and a parameter meet in an operation linear in both, that is a use; where a
parameter enters anything else, it has no structure, and the reason is kept. Two traces of the same model at two prime
batch sizes are walked side by side: the axis in which the shapes differ is the axis of the examples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from curvax.programs.uses import ExampleAxis, Scan, Use
from curvax.programs.views import MOVES, Applied, Constant, Given, Leaf, Node, Sliced, leaf_indices


class Analysis(NamedTuple):
    """What the walk found.

    Attributes:
        uses: All uses in the order of the program, also those that turned out to be ``unfit``.
        reasons: For each leaf without structure, why.
        touched: The leaves that anything was computed from.
        couples_examples: Whether an output may depend on other examples, as with batch statistics.
        given: The addresses of operations of a parameter and data that are the same for all examples.
    """

    uses: list[Use]
    reasons: dict[int, str]
    touched: set[int]
    couples_examples: bool
    given: frozenset[tuple[int, ...]]


def analyse(
    program: ClosedJaxpr,
    num_leaves: int,
    num_outputs: int,
    twin: ClosedJaxpr | None = None,
    batch_sizes: tuple[int, int] = (0, 0),
    through_custom_rules: bool = False,
    given: frozenset[tuple[int, ...]] = frozenset(),
) -> Analysis:
    """Walks a program.

    Args:
        program: The jaxpr of (params, inputs) -> (outputs, aux), its arguments flattened.
        num_leaves: How many of its arguments are leaves of the parameters.
        num_outputs: How many of its results are outputs; the rest are auxiliary.
        twin: The same traced with another number of examples; without it, axes of examples are not looked for.
        batch_sizes: The numbers of examples of the two.
        through_custom_rules: Look into functions with custom derivative rules, as if the rules were those of their
            bodies.
        given: What an earlier walk with a twin found, for a walk without one.
    """
    walk = _Walk(twin is not None, batch_sizes, through_custom_rules, None if twin is not None else given)
    arguments = [
        Leaf(i) if i < num_leaves else _Data(reads_batch=True, coupled=False) for i in range(len(program.jaxpr.invars))
    ]
    frame = _Frame((), (), "")
    results = walk.closed(program, twin, arguments, frame)
    for index, result in enumerate(results):
        if isinstance(result, Node):
            walk.consumed(result, "is returned by the model without meeting the data")
        elif index < num_outputs and result.coupled:
            walk.couples_examples = True
    return Analysis(walk.uses, walk.reasons, walk.touched, walk.couples_examples, frozenset(walk.given))


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """A value that is neither constant nor affine in the parameters.

    Attributes:
        reads_batch: Whether it depends on the batch.
        coupled: Whether one example's part may depend on other examples.
        source: The use whose result it is, if its axes are only permuted, and the permutation.
    """

    reads_batch: bool
    coupled: bool
    source: tuple[Use, tuple[int, ...]] | None = None


class _Frame(NamedTuple):
    """Where in the nested programs the walk is."""

    address: tuple[int, ...]
    scans: tuple[Scan, ...]
    where: str


class _Walk:
    def __init__(self, has_twin, batch_sizes, through_custom_rules, known_given):
        self.has_twin, self.batch_sizes, self.through = has_twin, batch_sizes, through_custom_rules
        self.known_given = known_given
        self.given: set[tuple[int, ...]] = set()
        self.uses: list[Use] = []
        self.reasons: dict[int, str] = {}
        self.touched: set[int] = set()
        self.couples_examples = False
        self.merges: dict[int, set[tuple[int, int]]] = {}

    # --- programs ---------------------------------------------------------------------------------------------------

    def closed(self, program, twin, arguments, frame):
        consts = [Constant(c) for c in program.consts]
        return self.open(program.jaxpr, twin.jaxpr if twin else None, consts, arguments, frame)

    def open(self, program: Jaxpr, twin: Jaxpr | None, consts, arguments, frame):
        environment: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
        environment.update(zip(program.invars, arguments, strict=True))

        def read(atom):
            return Constant(atom.val) if isinstance(atom, Literal) else environment[atom]

        if twin is not None and [e.primitive for e in twin.eqns] != [e.primitive for e in program.eqns]:
            raise ValueError(
                "the model computes differently for different numbers of examples, so their axis cannot be found"
            )
        for index, eqn in enumerate(program.eqns):
            here = frame._replace(address=(*frame.address, index))
            other = twin.eqns[index] if twin is not None else None
            results = self.equation(program, eqn, other, [read(atom) for atom in eqn.invars], here)
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def equation(self, program, eqn, twin, inputs, frame):
        nodes = [x for x in inputs if isinstance(x, Node)]
        affine = [x for x in nodes if leaf_indices(x)]
        for x in affine:
            self.touched.update(leaf_indices(x))
        self.note_merges(eqn, twin)
        name = eqn.primitive.name
        body = body_of(eqn, self.through)
        if body is not None and affine:
            frame = frame._replace(where=_join(frame.where, _title(eqn)))
            return self.closed(body, body_of(twin, self.through) if twin is not None else None, inputs, frame)
        if name == "scan" and affine:
            return self.scan(eqn, twin, inputs, frame)
        if not affine:
            if len(nodes) == len(inputs) and not eqn.effects:
                return [Applied(program, eqn, tuple(inputs), i) for i in range(len(eqn.outvars))]
            return self.data(eqn, twin, inputs)
        if len(nodes) == len(inputs):
            if name == "stop_gradient":
                return self.data(eqn, twin, inputs)
            if _is_affine(eqn, inputs):
                return [Applied(program, eqn, tuple(inputs), i) for i in range(len(eqn.outvars))]
            self.explain(name, affine)
            return self.data(eqn, twin, inputs)
        return self.meeting(program, eqn, twin, inputs, affine, frame)

    def meeting(self, program, eqn, twin, inputs, affine, frame):
        """A parameter meets data."""
        name = eqn.primitive.name
        result = self.data(eqn, twin, inputs)
        if self.is_given(eqn, twin, affine, frame):
            self.given.add(frame.address)
            operands = [
                x if isinstance(x, Node) else Given((*frame.address, i), eqn.invars[i].aval.shape)
                for i, x in enumerate(inputs)
            ]
            return [Applied(program, eqn, tuple(operands), 0)]
        side = next(i for i, x in enumerate(inputs) if isinstance(x, Node) and leaf_indices(x))
        kind = _kind(eqn, side) if len(affine) == 1 else None
        where = _join(frame.where, name)
        if kind is None:
            # Data that is added to nothing: the parameter, copied for each example, can be tapped where it is.
            for index, x in enumerate(inputs):
                if isinstance(x, Node) and leaf_indices(x):
                    self.tap_itself(program, eqn, twin, x, index, frame._replace(where=where), name)
            return result
        use = Use(kind, inputs[side], side, program, eqn, frame.address, frame.scans, where)
        other = inputs[1 - side]
        if kind == "shift" and other.source is not None:
            use.rides_on = other.source
        self.uses.append(use)
        if self.has_twin:
            use.unfit = self.find_examples(use, eqn, twin, other, side)
            if use.unfit is not None:
                self.consumed(inputs[side], f"{use.unfit} ({where})")
                return result
        order = tuple(range(len(eqn.outvars[0].aval.shape)))
        source = use.rides_on if kind == "shift" and use.rides_on else (use, order)
        return [dataclasses.replace(result[0], source=source if kind != "shift" or use.rides_on else None)]

    def is_given(self, eqn, twin, affine, frame):
        """Whether the data that a parameter meets are the same for all examples, so that it stays affine."""
        if len(affine) != 1 or frame.scans or eqn.primitive.name not in ("mul", "add", "sub", "add_any", "dot_general"):
            return False
        if self.known_given is not None:
            return frame.address in self.known_given
        pairs = zip((*eqn.invars, *eqn.outvars), (*twin.invars, *twin.outvars), strict=True)
        return all(isinstance(a, Literal) or a.aval.shape == b.aval.shape for a, b in pairs)

    def tap_itself(self, program, eqn, twin, node, index, frame, name):
        use = Use("shift", node, None, program, eqn, (*frame.address, index), frame.scans, frame.where)
        self.uses.append(use)
        if self.has_twin:
            axis = self.axis(eqn.invars[index], twin.invars[index])
            if isinstance(axis, ExampleAxis):
                use.output_axis = axis
            else:
                use.unfit = f"enters {name}"
                self.explain(name, [node])

    def find_examples(self, use, eqn, twin, other, side):
        """Sets the axes of the examples; returns why there are none."""
        if not other.reads_batch:
            return "meets what is computed from parameters alone"
        output = self.axis(eqn.outvars[0], twin.outvars[0])
        if not isinstance(output, ExampleAxis):
            return output
        use.output_axis = output
        if use.kind in ("dense", "conv", "embedding", "scale"):
            incoming = self.axis(eqn.invars[1 - side], twin.invars[1 - side])
            if not isinstance(incoming, ExampleAxis):
                return incoming
            use.input_axis = incoming
            operand, operand_twin = eqn.invars[side].aval.shape, twin.invars[side].aval.shape
            if use.kind in ("dense", "conv", "embedding") and operand != operand_twin:
                return "is copied for each example"
            if use.kind == "dense":
                contract, batch = eqn.params["dimension_numbers"]
                if incoming.axis in (*contract[1 - side], *batch[1 - side]):
                    return "the examples are summed over"
            if use.kind == "conv" and incoming.axis != eqn.params["dimension_numbers"].lhs_spec[0]:
                return "the examples are not the batch of the convolution"
        return None

    def axis(self, atom, twin):
        """The ``ExampleAxis`` of a variable, or why it has none."""
        shape, other = atom.aval.shape, twin.aval.shape
        varying = [i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
        if not varying:
            return "the examples are not an axis of its result or input"
        if len(varying) > 1:
            return "two axes grow with the number of examples"
        index, (first, second) = varying[0], self.batch_sizes
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
        first = self.batch_sizes[0]
        if eqn.primitive.name == "concatenate":
            dimension, length = eqn.params["dimension"], eqn.outvars[0].aval.shape[eqn.params["dimension"]]
            grows = length != twin.outvars[0].aval.shape[dimension]
            if grows and all(v.aval.shape[dimension] == first for v in eqn.invars):
                self.merges.setdefault(length // first, set()).add((length // first, 1))
            return
        old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        old_twin, new_twin = twin.invars[0].aval.shape, twin.outvars[0].aval.shape
        source = [i for i, (a, b) in enumerate(zip(old, old_twin, strict=True)) if a != b]
        target = [i for i, (a, b) in enumerate(zip(new, new_twin, strict=True)) if a != b]
        if len(source) != 1 or len(target) != 1 or old[source[0]] != first or new[target[0]] == first:
            return
        times = new[target[0]] // first
        before_old, before_new = math.prod(old[: source[0]]), math.prod(new[: target[0]])
        if before_new and before_old % before_new == 0 and times % (before_old // before_new) == 0:
            before = before_old // before_new
            self.merges.setdefault(times, set()).add((before, times // before))

    # --- loops ------------------------------------------------------------------------------------------------------

    def scan(self, eqn, twin, inputs, frame):
        params = eqn.params
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        loop = Scan(params["length"])
        consts, carry, xs = (
            inputs[:num_consts],
            inputs[num_consts : num_consts + num_carry],
            inputs[num_consts + num_carry :],
        )
        for offset, x in enumerate(carry):
            if isinstance(x, Node) and leaf_indices(x):
                index = num_consts + offset
                here = frame._replace(where=_join(frame.where, "scan"))
                self.tap_itself(params["jaxpr"].jaxpr, eqn, twin, x, index, here, "the carry of scan")
        body_carry = [self.carried(x) for x in carry]
        sliced = [Sliced(x, loop) if isinstance(x, Node) and leaf_indices(x) else self.carried(x) for x in xs]
        inner = frame._replace(scans=(*frame.scans, loop), where=_join(frame.where, "scan"))
        body, body_twin = params["jaxpr"], twin.params["jaxpr"] if twin is not None else None
        uses, reasons = len(self.uses), dict(self.reasons)
        while True:
            results = self.closed(body, body_twin, [*consts, *body_carry, *sliced], inner)
            after = [self.carried(x) for x in results[:num_carry]]
            joined = [
                _Data(a.reads_batch or b.reads_batch, a.coupled or b.coupled)
                for a, b in zip(after, body_carry, strict=True)
            ]
            flags = [[(x.reads_batch, x.coupled) for x in carry] for carry in (joined, body_carry)]
            if flags[0] == flags[1]:
                break
            # What a step makes of the carry is what the next starts from: walk again with both.
            del self.uses[uses:]
            self.reasons, body_carry = dict(reasons), joined
        for x in results:
            if isinstance(x, Node):
                self.consumed(x, "leaves a scan without meeting the data")
        return [self.carried(x) for x in results]

    def carried(self, x):
        """What is known of a value behind the border of a loop."""
        return _Data(False, False) if isinstance(x, Node) else _Data(x.reads_batch, x.coupled)

    # --- values -----------------------------------------------------------------------------------------------------

    def data(self, eqn, twin, inputs):
        data = [x for x in inputs if isinstance(x, _Data)]
        reads = any(x.reads_batch for x in data)
        coupled = any(x.coupled for x in data)
        results = []
        for index in range(len(eqn.outvars)):
            lost = reads and twin is not None and self.loses_examples(eqn, twin, data, inputs, index)
            source = _moved_source(eqn, inputs) if index == 0 else None
            results.append(_Data(reads, coupled or lost, source))
        return results

    def loses_examples(self, eqn, twin, data, inputs, index):
        """Whether an input varies with the number of examples and the result does not: a sum over examples."""

        def varies(atom, other):
            return not isinstance(atom, Literal) and atom.aval.shape != other.aval.shape

        incoming = any(
            isinstance(x, _Data) and x.reads_batch and varies(a, b)
            for x, a, b in zip(inputs, eqn.invars, twin.invars, strict=True)
        )
        out, other = eqn.outvars[index], twin.outvars[index]
        return incoming and out.aval.shape == other.aval.shape

    def consumed(self, node, reason):
        for index in leaf_indices(node):
            self.touched.add(index)
            self.reasons.setdefault(index, reason)

    def explain(self, name, nodes):
        leaves = sorted({index for node in nodes for index in leaf_indices(node)})
        if name in ("mul", "dot_general") and len(nodes) > 1:
            other = "another parameter" if len(leaves) > 1 else "itself"
            text = f"is multiplied by {other} before it meets the data"
        elif name in ("custom_jvp_call", "custom_vjp_call"):
            text = f"is used inside a function with custom derivatives ({name}); see through_custom_rules"
        elif name in ("cond", "while"):
            text = f"is used inside `{name}`, whose body is not looked into"
        else:
            text = f"enters `{name}`"
        for index in leaves:
            self.touched.add(index)
            self.reasons.setdefault(index, text)


_AFFINE = (MOVES - {"pad", "dynamic_slice"}) | {
    "broadcast_in_dim",
    "neg",
    "add",
    "sub",
    "add_any",
    "reduce_sum",
    "name",
}


def _is_affine(eqn, inputs):
    """Whether an equation of parameters and constants is affine in the parameters."""
    name = eqn.primitive.name
    with_leaves = [i for i, x in enumerate(inputs) if leaf_indices(x)]
    if name in _AFFINE:
        return _floating(eqn)
    if name in ("mul", "dot_general", "conv_general_dilated"):
        return len(with_leaves) == 1
    if name in ("div", "gather", "dynamic_slice"):
        return with_leaves == [0]
    if name == "pad":
        return 1 not in with_leaves
    if name == "select_n":
        return 0 not in with_leaves
    return False


def _floating(eqn):
    return all(v.aval.dtype.kind == "f" or "float" in v.aval.dtype.name for v in eqn.outvars)


def _kind(eqn, side):
    """What kind of use an operation of a parameter and data is, or None."""
    name = eqn.primitive.name
    if name == "dot_general":
        return "dense"
    if name == "conv_general_dilated":
        return "conv" if side == 1 and eqn.params["batch_group_count"] == 1 else None
    if name == "gather":
        return "embedding" if side == 0 and _looks_up_rows(eqn) else None
    if name == "mul":
        return "scale"
    if name in ("add", "add_any", "sub"):
        return "shift"
    return None


def _looks_up_rows(eqn):
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    return (
        0 in numbers.start_index_map
        and set(numbers.collapsed_slice_dims) <= {0}
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *operand[1:])
    )


def _moved_source(eqn, inputs):
    """The use whose result this still is, up to a permutation of the axes."""
    first = inputs[0] if inputs else None
    if not isinstance(first, _Data) or first.source is None or len(inputs) != 1:
        return None
    name, (use, order) = eqn.primitive.name, first.source
    if name in ("convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision", "name"):
        return first.source if _floating(eqn) else None
    if name == "transpose":
        return use, tuple(order[i] for i in eqn.params["permutation"])
    return None


def body_of(eqn: JaxprEqn, through_custom_rules: bool) -> ClosedJaxpr | None:
    """The program that an equation calls once, if it may be looked into."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "pjit", "closed_call", "core_call", "custom_lin", "remat2", "checkpoint", "remat", "remat_call"):
        body = params.get("jaxpr", params.get("call_jaxpr"))
        return None if body is None else _close(body)
    if name in ("custom_jvp_call", "custom_vjp_call") and through_custom_rules:
        return _close(params["call_jaxpr"])
    return None


def _close(body):
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def _title(eqn):
    name = eqn.params.get("name")
    return str(name) if name and name not in ("<lambda>", "fn") else eqn.primitive.name


def _join(first, second):
    return f"{first}/{second}" if first else second
