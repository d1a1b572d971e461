"""The floating-point operations a program takes, counted on its jaxpr: loops by trip count, factorisations by textbook.

XLA's own ``cost_analysis()`` counts the body of a loop once and a LAPACK call as nothing, so it cannot compare methods
that iterate or factorise. Like XLA, this counter leaves out dead code and counts a repeated pure operation once.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from benchmarks import operation_prices
from curvax.programs.walk import called_program, scan_parts


def flops(
    function: Callable, *args: Any, while_trip_count: int | None = None, alarms: bool = False, **kwargs: Any
) -> float:
    """The floating-point operations that one call ``function(*args, **kwargs)`` takes.

    A multiplication and an addition count one each; see ``count_operations`` for the price of everything else and for
    what is merged. The function is traced, never compiled or run.

    Args:
        function: Any function that JAX can trace, jitted or not.
        *args: Its arguments: pytrees of arrays or of ``jax.ShapeDtypeStruct``; only shapes and dtypes matter.
        while_trip_count: The iterations to count for each ``while_loop`` that does not show its own number.
        alarms: Whether conditionals on data are for what happens rarely, so that their cheapest branch counts.
        **kwargs: Its keyword arguments, likewise.

    Returns:
        The number of operations.

    Raises:
        ValueError: The number of iterations of a ``while_loop`` is not evident and ``while_trip_count`` is not given.

    Example:
        >>> matrix = jax.ShapeDtypeStruct((100, 100), jnp.float32)
        >>> flops(jnp.matmul, matrix, matrix)
        2000000.0
        >>> power = lambda a: jax.lax.fori_loop(0, 10, lambda _, x: a @ x, a)
        >>> flops(power, matrix)
        20000000.0
    """
    counts = count_operations(function, *args, while_trip_count=while_trip_count, alarms=alarms, **kwargs)
    return float(sum(counts.values()))


def count_operations(
    function: Callable, *args: Any, while_trip_count: int | None = None, alarms: bool = False, **kwargs: Any
) -> dict[str, float]:
    """The floating-point operations of ``function(*args, **kwargs)`` by the name of the primitive that takes them.

    What counts how much, for operands or results that are floating-point (complex numbers count like real ones;
    integers, booleans and random bits count nothing):

    - ``dot_general`` of (m, k) by (k, n): 2mkn. Convolution: 2 (outputs) (kernel positions) (input channels per group),
      divided by the product of the input dilation, since products with the zeros it inserts are skipped: exact up to
      the border. Products with padding count.
    - An elementwise function, also a transcendental one: 1 per element of its result. So does any primitive that is
      not named here, such as a foreign function or a Pallas kernel.
    - Reductions and cumulative sums: 1 per element of the operand; over windows, 1 per element of each window.
      Scatter-add and its like: 1 per element of the updates. Sorting n numbers: n log2 n.
      Fourier transform of length n: 5 n log2 n, half of that for real data.
    - Moving, casting, selecting and creating data: nothing.
    - n x n factorisations (Golub & Van Loan 2013): Cholesky n^3/3, LU 2n^3/3, QR with Q 8n^3/3, symmetric eigenproblem
      9n^3 (JAX always computes the vectors), general eigenproblem and Schur form 25n^3, without vectors 10n^3, SVD
      21n^3, without vectors 8n^3/3, Hessenberg form 10n^3/3, tridiagonal form 4n^3/3; a triangular solve with k right
      sides n^2 k. Rectangular ones accordingly.
    - ``scan`` and ``while_loop``: the body times the trip count. ``cond``: the branch that its predicate says where
      that follows from constants, else the one that takes the most operations. ``shard_map``: the body times the number
      of devices. To count one step of a method with periodic work, close over the counter of its state as a number.

    Dead code does not count, also inside of loops. A pure operation repeated with equal operands counts once within a
    computation: calls (``jit``, custom derivatives, ``custom_linear_solve``) are merged into their caller; the bodies
    of loops and the branches of conditionals are computations of their own, merged with nothing outside. What
    ``jax.checkpoint`` recomputes counts again, unless its ``prevent_cse`` is False. The count is of the program, not of
    what one backend makes of it: XLA may also fold constants, merge two identical loops, move loop-invariant work out
    of a loop, and on CPU undo a checkpoint.

    Args:
        function: Any function that JAX can trace, jitted or not.
        *args: Its arguments: pytrees of arrays or of ``jax.ShapeDtypeStruct``; only shapes and dtypes matter.
        while_trip_count: The iterations to count for each ``while_loop`` that does not show its own number; one that
            does has an integer counter with constant start, step and bound.
        alarms: Whether conditionals on data are for what happens rarely, so that their cheapest branch counts.
        **kwargs: Its keyword arguments, likewise.

    Returns:
        The number of operations by primitive, the largest first; without those that count nothing.

    Raises:
        ValueError: The number of iterations of a ``while_loop`` is not evident and ``while_trip_count`` is not given.

    Example:
        >>> count_operations(lambda a, b: a @ jax.scipy.linalg.cho_solve((a, True), b), jnp.eye(6), jnp.ones(6))
        {'dot_general': 72.0, 'triangular_solve': 72.0}
    """
    program = _Computation(jax.make_jaxpr(function)(*args, **kwargs))
    counts, _ = _live_counts(program, [True] * len(program.outputs), _Assumed(while_trip_count, alarms))
    largest_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: float(count) for name, count in largest_first if count}


class _Assumed(NamedTuple):
    """What cannot be read from a program: the trips of loops, and whether its conditionals on data are alarms."""

    trips: int | None
    alarms: bool


class _Operation(NamedTuple):
    """An equation whose operands and results are numbered values; loops and branches carry their computations."""

    eqn: JaxprEqn | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bodies: tuple[_Computation, ...] = ()
    trip_count: int | None = None

    @property
    def name(self) -> str:
        return self.eqn.primitive.name if self.eqn else "barrier"

    def counts(self) -> dict[str, float]:
        return {self.name: operation_prices.price(self.eqn)} if self.eqn else {}


class _Computation:
    """A jaxpr as XLA sees it: calls inlined, equal values under one number, each distinct operation listed once."""

    def __init__(self, jaxpr: Jaxpr | ClosedJaxpr, given: Sequence[np.ndarray | None] = ()):
        """Args: the program, and the values of its first operands that are known scalars."""
        self.operations: list[_Operation] = []
        self.constants: dict[int, np.ndarray] = {}
        self._numbers = itertools.count()
        self._known: dict[Any, tuple[int, ...]] = {}
        inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        self.inputs = tuple(next(self._numbers) for _ in inner.invars)
        self.constants |= {x: value for x, value in zip(self.inputs, given, strict=False) if value is not None}
        self.outputs = self._inline(jaxpr, self.inputs)

    def producer(self, number: int) -> _Operation | None:
        return next((operation for operation in self.operations if number in operation.outputs), None)

    def _inline(self, jaxpr: Jaxpr | ClosedJaxpr, arguments: Sequence[int]) -> tuple[int, ...]:
        jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())
        environment = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            environment[var] = self._constant(value, var)

        def read(atoms):
            return tuple(self._constant(x.val, x) if isinstance(x, Literal) else environment[x] for x in atoms)

        for eqn in jaxpr.eqns:
            environment.update(zip(eqn.outvars, self._apply(eqn, read(eqn.invars)), strict=True))
        return read(jaxpr.outvars)

    def _apply(self, eqn: JaxprEqn, inputs: tuple[int, ...]) -> tuple[int, ...]:
        name, params = eqn.primitive.name, eqn.params
        if name in _IDENTITIES and [_type(x) for x in eqn.invars] == [_type(x) for x in eqn.outvars]:
            return inputs
        if name == "optimization_barrier":
            return tuple(map(self._barrier, inputs))
        if name == "custom_linear_solve":
            lengths = params["const_lengths"]
            start = lengths.matvec + lengths.vecmat
            return self._inline(params["jaxprs"].solve, inputs[start : start + lengths.solve] + inputs[sum(lengths) :])
        if name in _CONTROL_FLOW:
            return self._control_flow(eqn, inputs)
        called = None if operation_prices.is_priced(name) else called_program(eqn, through_custom_rules=True)
        if called is not None:
            if params.get("differentiated"):  # jax.checkpoint puts its operands behind barriers only when it recomputes
                guarded = np.broadcast_to(params["prevent_cse"], len(inputs))
                inputs = tuple(self._barrier(x) if guard else x for x, guard in zip(inputs, guarded, strict=True))
            return self._inline(called, inputs)
        if _has_effects(eqn):
            return self._append(eqn, inputs)
        value = self._folded(eqn, inputs)
        if value is not None:
            return (self._constant(value, eqn.outvars[0]),)
        key = (_SYNONYMS.get(name, name), tuple(sorted(inputs)) if name in _COMMUTATIVE else inputs, _signature(params))
        if key not in self._known:
            self._known[key] = self._append(eqn, inputs)
        return self._known[key]

    def _control_flow(self, eqn: JaxprEqn, inputs: tuple[int, ...]) -> tuple[int, ...]:
        params = eqn.params
        known = [self.constants.get(x) for x in inputs]
        if eqn.primitive.name == "cond":
            branches = params["branches"]
            if known[0] is not None:
                return self._inline(branches[np.clip(int(known[0]), 0, len(branches) - 1)], inputs[1:])
            return self._append(eqn, inputs, tuple(_Computation(branch, known[1:]) for branch in branches))
        if eqn.primitive.name == "scan":
            parts = scan_parts(eqn)
            return self._append(eqn, inputs, (_Computation(parts.body, known[: parts.num_consts]),), parts.length)
        if eqn.primitive.name == "shard_map":
            axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
            devices = math.prod(params["mesh"].shape[axis] for axis in axes)
            return self._append(eqn, inputs, (_Computation(params["jaxpr"]),), devices)
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        condition = _Computation(params["cond_jaxpr"], known[:first])
        body = _Computation(params["body_jaxpr"], known[first:second])
        return self._append(eqn, inputs, (condition, body), _static_trip_count(eqn, known, condition, body))

    def _folded(self, eqn: JaxprEqn, inputs: tuple[int, ...]) -> np.ndarray | None:
        """The value of an operation on known scalars, such as whether a counter is at its period."""
        fold = _FOLDS.get(eqn.primitive.name)
        values = [self.constants.get(x) for x in inputs]
        absorbing = {"or": True, "and": False}.get(eqn.primitive.name)
        if _type(eqn.outvars[0]) == ((), np.dtype(bool)) and any(x is not None and x == absorbing for x in values):
            return np.asarray(absorbing)
        if fold is None or any(value is None or value.dtype.kind not in "iubf" for value in values):
            return None
        shape, dtype = _type(eqn.outvars[0])
        return np.asarray(fold(*values), dtype) if shape == () and np.dtype(dtype).kind in "iubf" else None

    def _append(self, eqn, inputs, bodies=(), trip_count=None) -> tuple[int, ...]:
        outputs = tuple(next(self._numbers) for _ in (eqn.outvars if eqn else inputs))
        self.operations.append(_Operation(eqn, inputs, outputs, bodies, trip_count))
        return outputs

    def _barrier(self, number: int) -> int:
        """The same value under a number of its own, so that nothing computed from it is merged."""
        return self._append(None, (number,))[0]

    def _constant(self, value: Any, atom: Any) -> int:
        """The number of a constant: scalars are the same by value, arrays by identity."""
        shape, dtype = _type(atom)
        scalar = shape == () and not jnp.issubdtype(dtype, jax.dtypes.extended)
        key = ("constant", dtype, np.asarray(value, dtype).tobytes()) if scalar else ("constant", id(value))
        if key not in self._known:
            self._known[key] = (next(self._numbers),)
        (number,) = self._known[key]
        if scalar:
            self.constants[number] = np.asarray(value, dtype)
        return number


def _live_counts(computation: _Computation, needed: Sequence[bool], assumed: _Assumed) -> tuple[Counter, list[bool]]:
    """The operations by name that the needed outputs take, and which inputs they read."""
    live = {number for number, need in zip(computation.outputs, needed, strict=True) if need}
    counts = Counter()
    for operation in reversed(computation.operations):
        needed = [number in live for number in operation.outputs]
        if not any(needed) and not (operation.eqn and _has_effects(operation.eqn)):
            continue
        if operation.bodies:
            count, used = _CONTROL_FLOW[operation.name](operation, needed, assumed)
        else:
            count, used = operation.counts(), [True] * len(operation.inputs)
        counts.update(count)
        live.update(number for number, use in zip(operation.inputs, used, strict=True) if use)
    return counts, [number in live for number in computation.inputs]


def _scan_counts(operation, needed, assumed):
    parts = scan_parts(operation.eqn)
    consts, carries = parts.num_consts, parts.num_carry
    count, used, needed = _trip_counts(operation.bodies[0], consts, carries, needed, assumed)
    return _times(operation.trip_count, count), used[:consts] + needed[:carries] + used[consts + carries :]


def _while_counts(operation, needed, assumed):
    params = operation.eqn.params
    condition, body = operation.bodies
    test_count, test_used = _live_counts(condition, [True], assumed)
    consts = params["cond_nconsts"]
    needed = [need or use for need, use in zip(needed, test_used[consts:], strict=True)]
    count, used, needed = _trip_counts(body, params["body_nconsts"], len(needed), needed, assumed)
    trips = assumed.trips if operation.trip_count is None else operation.trip_count
    if trips is None:
        carried = ", ".join(str(var.aval) for var in operation.eqn.outvars)
        raise ValueError(
            f"the number of iterations of the while loop that carries ({carried}) depends on data; pass"
            " while_trip_count= the number of iterations to count for such loops"
        )
    return _times(trips, count) + _times(trips + 1, test_count), (
        test_used[:consts] + used[: params["body_nconsts"]] + needed
    )


def _cond_counts(operation, needed, assumed):
    branches = [_live_counts(branch, needed, assumed) for branch in operation.bodies]
    choose = min if assumed.alarms else max
    chosen = choose((count for count, _ in branches), key=lambda count: sum(count.values()))
    return chosen, [True, *map(any, zip(*(used for _, used in branches), strict=True))]


def _shard_map_counts(operation, needed, assumed):
    count, used = _live_counts(operation.bodies[0], needed, assumed)
    return _times(operation.trip_count, count), used


_CONTROL_FLOW = {"scan": _scan_counts, "while": _while_counts, "cond": _cond_counts, "shard_map": _shard_map_counts}


def _trip_counts(body, consts, carries, needed, assumed):
    """One trip of a loop: its operations, the inputs it reads, and the outputs needed once its own reads are added."""
    while True:
        count, used = _live_counts(body, needed, assumed)
        read = used[consts : consts + carries]
        grown = [need or use for need, use in itertools.zip_longest(needed, read, fillvalue=False)]
        if grown == needed:
            return count, used, needed
        needed = grown


def _static_trip_count(eqn, known, condition, body) -> int | None:
    """The trips of ``while counter < bound: counter += step`` where all is a known integer, otherwise None.

    Args:
        eqn: The ``while`` equation.
        known: The values of its operands, None where they are not known scalars.
        condition: Its condition as a computation.
        body: Its body, likewise.
    """
    first, second = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    starts, counters = known[second:], body.inputs[second - first :]
    fixed = [start if x == y else None for start, x, y in zip(starts, counters, body.outputs, strict=True)]
    bounds = dict(zip(condition.inputs, known[:first] + fixed, strict=True)) | condition.constants
    steps = dict(zip(body.inputs, known[first:second], strict=False)) | body.constants

    test = condition.producer(condition.outputs[0])
    if test is None or test.name not in _MIRRORED:
        return None
    relation, (left, right) = test.name, test.inputs
    if bounds.get(left) is not None:
        relation, left, right = _MIRRORED[relation], right, left
    if left not in condition.inputs[first:]:
        return None
    index = condition.inputs[first:].index(left)
    increment = body.producer(body.outputs[index])
    if increment is None or increment.name not in ("add", "sub") or counters[index] not in increment.inputs:
        return None
    if increment.name == "sub" and increment.inputs[0] != counters[index]:
        return None
    (step,) = [x for x in increment.inputs if x != counters[index]] or [None]
    values = starts[index], bounds.get(right), steps.get(step)
    if any(value is None or value.dtype.kind not in "iu" for value in values):
        return None
    start, bound, step = map(int, values)
    step = -step if increment.name == "sub" else step
    if step == 0 or (step > 0) != (relation in ("lt", "le")):
        return None
    closed = {"lt": 0, "le": 1, "gt": 0, "ge": -1}[relation]
    return len(range(start, bound + closed, step))


_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


# Nothing happens where operand and result have the same shape and dtype.
_IDENTITIES = frozenset(
    [
        *("copy", "copy_p", "device_put", "name", "pvary", "sharding_constraint", "stop_gradient"),
        *("broadcast_in_dim", "convert_element_type", "reshape", "slice", "squeeze"),
        *("reduce_max", "reduce_min", "reduce_prod", "reduce_sum"),
    ]
)
# XLA's remainder has the sign of the dividend.
_FOLDS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "sign": np.sign,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "select_n": lambda which, *cases: cases[int(which)],
    "convert_element_type": lambda x: x,
}
_SYNONYMS = {"add_any": "add"}
_COMMUTATIVE = frozenset(["add", "add_any", "and", "eq", "max", "min", "mul", "ne", "or", "xor"])


def _type(atom) -> tuple[Any, Any]:
    return getattr(atom.aval, "shape", None), getattr(atom.aval, "dtype", None)


def _has_effects(eqn: JaxprEqn) -> bool:
    """Whether an equation must run though nobody reads it; a collective's axis name is an effect to JAX, not to XLA."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def _signature(params) -> tuple:
    """The parameters as a key of a dictionary; those that cannot be compared are equal only to themselves."""
    return tuple((name, _hashable(params[name])) for name in sorted(params) if name != "weak_type")


def _hashable(value):
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _times(factor, counts: Counter) -> Counter:
    return Counter({name: factor * count for name, count in counts.items()})
