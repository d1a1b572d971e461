"""Where a program computes one example's part of a value from other examples.

A program is compared with its twin, which has another number of examples: axes whose lengths differ are those of the
examples. An operation couples examples if it sums, sorts, shifts, contracts or otherwise works along such an axis. What
cannot be looked into, such as a call back to Python, is taken to work example by example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from curvax.programs.walk import called_program, equations, is_scan, scan_parts

Axes = frozenset[int]
Merges = Mapping[int, set[tuple[int, int]]]


class Flow(NamedTuple):
    """What is known of a value: whether it depends on the batch, and the operation that coupled examples, or ""."""

    reads: bool
    coupled: str


class Setting(NamedTuple):
    """What an equation stands in.

    Attributes:
        program: The program that holds it.
        first: The number of examples, ``second`` that of the twin.
        merges: For each multiple of them the layouts (before, after) in which they were merged with other axes.
        constants: The arrays that programs hold, by their variables.
    """

    program: Jaxpr
    first: int
    second: int
    merges: Merges
    constants: Mapping[Any, Any]

    def multiple(self, length: int, other: int) -> int:
        """How many times the examples an axis has, 0 where its length is no multiple of their number."""
        times, rest = divmod(length, self.first)
        return 0 if rest or other != times * self.second else times

    def may_be_merged(self, times: int, layout: tuple[int, int]) -> bool:
        """Whether examples may lie so in an axis that has several times their number."""
        return times == 1 or self.merges.get(times, {layout}) == {layout} or len(self.merges[times]) > 1


NOTHING = Flow(reads=False, coupled="")


def flow(eqn: JaxprEqn, twin: JaxprEqn | None, setting: Setting, inputs: Sequence[Flow]) -> list[Flow]:
    """What the results of an equation depend on."""
    both = joined(inputs)
    if twin is None or not both.reads:
        return [both] * len(eqn.outvars)
    inside = _inside(eqn, twin, setting, inputs)
    if inside is not None:
        return inside
    moving = [x.reads and varies(*pair) for x, *pair in zip(inputs, eqn.invars, twin.invars, strict=True)]
    name = eqn.primitive.name
    if name in ("optimization_barrier", "device_put"):  # each result is an operand
        return list(inputs)
    if not any(moving):
        return [both] * len(eqn.outvars)
    if _mixes(eqn, twin, setting, moving):
        return [both._replace(coupled=both.coupled or name)] * len(eqn.outvars)
    # An input that grows with the number of examples and a result that does not: a sum over examples, or one of them.
    stays = [not varies(*pair) for pair in zip(eqn.outvars, twin.outvars, strict=True)]
    return [both._replace(coupled=both.coupled or (name if flag else "")) for flag in stays]


def joined(flows: Iterable[Flow]) -> Flow:
    """What depends on all of them."""
    flows = list(flows)
    return Flow(any(x.reads for x in flows), next((x.coupled for x in flows if x.coupled), ""))


def varies(atom: Any, twin: Any) -> bool:
    """Whether the shapes differ."""
    return not isinstance(atom, Literal) and atom.aval.shape != twin.aval.shape


def varying(atom: Any, twin: Any) -> list[int]:
    """The axes whose lengths differ in the twin."""
    return [i for i, (a, b) in enumerate(zip(atom.aval.shape, twin.aval.shape, strict=True)) if a != b]


# --- programs inside of equations -------------------------------------------------------------------------------------


def _inside(eqn, twin, setting, inputs):
    """The results of an equation that runs programs, or None for others."""
    name = eqn.primitive.name
    if is_scan(eqn):
        return _scan(eqn, twin, setting, inputs)
    if name == "custom_linear_solve":
        return _linear_solve(eqn, twin, setting, inputs)
    if name == "shard_map":
        return _sharded(eqn, twin, setting, inputs)
    if name == "linear_call":
        return _run(eqn.params["callee"], twin.params["callee"], setting, inputs, name)
    if name == "while":
        return _while(eqn, twin, setting, inputs)
    if name == "cond":
        branches = zip(eqn.params["branches"], twin.params["branches"], strict=True)
        found = [_run(*pair, setting, inputs[1:], name) for pair in branches]
        return [joined((inputs[0], *results)) for results in zip(*found, strict=True)]
    body, other = (called_program(e, through_custom_rules=True) for e in (eqn, twin))
    return None if body is None or other is None else _run(body, other, setting, inputs, name)


def _run(program: ClosedJaxpr | Jaxpr, twin: ClosedJaxpr | Jaxpr, setting, inputs, name) -> list[Flow]:
    program, twin = (p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in (program, twin))
    pairs = list(zip(program.eqns, twin.eqns, strict=False))
    if len(program.eqns) != len(twin.eqns) or not all(same_operation(*pair) for pair in pairs):
        # Another program for another number of examples: what it does along their axis cannot be told.
        whole = joined(inputs)
        return [whole._replace(coupled=whole.coupled or (name if whole.reads else ""))] * len(program.outvars)
    values = dict(zip(program.invars, inputs, strict=True))
    setting = setting._replace(program=program)

    def read(atom):
        return NOTHING if isinstance(atom, Literal) else values.get(atom, NOTHING)

    for eqn, other in pairs:
        values.update(zip(eqn.outvars, flow(eqn, other, setting, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in program.outvars]


def same_operation(eqn: JaxprEqn, twin: JaxprEqn) -> bool:
    """Whether two equations are of one primitive, with as many operands and results."""
    counts = [(len(e.invars), len(e.outvars)) for e in (eqn, twin)]
    return eqn.primitive is twin.primitive and counts[0] == counts[1]


def carries_examples(eqn: JaxprEqn, twin: JaxprEqn, setting: Setting) -> bool:
    """Whether a ``scan`` goes over the examples one by one and carries on what it has seen of them."""
    parts, other = scan_parts(eqn), scan_parts(twin)
    if parts.length == other.length:
        return False
    consts, carry, scanned = parts.operands([NOTHING] * len(eqn.invars))
    scanned = [Flow(reads=True, coupled="") for _ in scanned]
    step = functools.partial(_step_of_scan, parts, other, setting, consts, scanned)
    return any(x.reads for x in _until_stable(carry, step, parts.num_carry)[0])


def _scan(eqn, twin, setting, inputs):
    parts, other = scan_parts(eqn), scan_parts(twin)
    consts, carry, scanned = parts.operands(inputs)
    step = functools.partial(_step_of_scan, parts, other, setting, consts, scanned)
    _, results = _until_stable(carry, step, parts.num_carry)
    if joined(scanned).reads and carries_examples(eqn, twin, setting):
        return [Flow(reads=True, coupled=x.coupled or "scan") for x in results]
    return results


def _step_of_scan(parts, other, setting, consts, scanned, carry):
    return _run(parts.body, other.body, setting, [*consts, *carry, *scanned], "scan")


def _linear_solve(eqn, twin, setting, inputs):
    """By the program that solves; how the matrix is multiplied by is not asked."""
    consts, start = [], 0
    for kind, count in zip(eqn.params["const_lengths"]._fields, eqn.params["const_lengths"], strict=True):
        consts = inputs[start : start + count] if kind == "solve" else consts
        start += count
    solve, other = (e.params["jaxprs"].solve for e in (eqn, twin))
    return _run(solve, other, setting, [*consts, *inputs[start:]], "solve")


def _sharded(eqn, twin, setting, inputs):
    """A part of the examples on every device: coupled where devices exchange what they have."""
    exchanged = next((e.primitive.name for e in equations(eqn.params["jaxpr"]) if _exchanges(e)), "")
    results = _run(eqn.params["jaxpr"], twin.params["jaxpr"], setting, inputs, "shard_map")
    return [x._replace(coupled=x.coupled or (exchanged if x.reads else "")) for x in results]


def _exchanges(eqn):
    return eqn.primitive.name.startswith(("psum", "pmax", "pmin", "ppermute", "pgather", "all_", "reduce_scatter"))


def _while(eqn, twin, setting, inputs):
    of_condition, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    outside, consts = inputs[:of_condition], inputs[of_condition : of_condition + of_body]
    carry, results = _until_stable(
        inputs[of_condition + of_body :],
        lambda carry: _run(eqn.params["body_jaxpr"], twin.params["body_jaxpr"], setting, [*consts, *carry], "while"),
        None,
    )
    condition = eqn.params["cond_jaxpr"], twin.params["cond_jaxpr"]
    (verdict,) = _run(*condition, setting, [*outside, *carry], "while")
    return [joined((x, verdict)) for x in results]


def _until_stable(carry, step: Callable[[list[Flow]], list[Flow]], num_carry):
    """What a step makes of the carry is what the next starts from: again, until nothing new comes."""
    while True:
        results = step(carry)
        after = [joined(pair) for pair in zip(carry, results[:num_carry], strict=True)]
        if after == carry:
            return carry, [*after, *results[len(after) :]]
        carry = after


# --- single operations ------------------------------------------------------------------------------------------------


def _mixes(eqn, twin, setting, moving) -> bool:
    """Whether an operation works along an axis of the examples of an operand that is ``moving`` with them."""
    name = eqn.primitive.name
    axes = [
        frozenset(varying(a, b)) if flag else frozenset()
        for a, b, flag in zip(eqn.invars, twin.invars, moving, strict=True)
    ]
    if name in _RULES:
        return _RULES[name](eqn, twin, setting, axes)
    params = eqn.params
    if name.startswith(("reduce_window", "select_and_")):
        windows, padding = params["window_dimensions"], params["padding"]
        return any(windows[a] != 1 or tuple(padding[a]) != (0, 0) for own in axes for a in own)
    if name in _LINEAR_ALGEBRA:
        most = max(len(x.aval.shape) for x in eqn.invars)
        depths = [2 if len(x.aval.shape) == most else 1 for x in eqn.invars]  # of matrices, and of vectors beside them
        return any(
            a >= len(x.aval.shape) - depth for x, depth, own in zip(eqn.invars, depths, axes, strict=True) for a in own
        )
    if name.startswith("scatter"):
        return _scatter(eqn, twin, setting)
    if not name.startswith(_ALONG_AXES):
        return False
    along = [params[key] for key in ("axes", "dimensions", "axis", "dimension", "reduction_dimension") if key in params]
    named = {a for entry in along for a in (entry if isinstance(entry, (tuple, list)) else (entry,))}
    return any(named & own for own in axes)


_ALONG_AXES = ("reduce", "arg", "cum", "sort", "rev", "approx_top_k")
"""What names the axes that it works along: sums and the like, running sums, sorting, reversal."""

_LINEAR_ALGEBRA = frozenset({"cholesky", "lu", "eigh", "eig", "qr", "geqrf", "geqp3", "householder_product", "svd"}) | {
    "schur", "hessenberg", "tridiagonal", "tridiagonal_solve", "cholesky_update", "symmetric_product"
}  # fmt: skip
"""Of matrices in the last two axes."""


def _dot(eqn, twin, setting, axes):
    (contracted, others), (batch, other_batch) = eqn.params["dimension_numbers"]
    left, right = axes
    if left & set(contracted) or right & set(others):
        return True
    # Every row with every row.
    return bool((left - set(batch) and right) or (right - set(other_batch) and left))


def _convolution(eqn, twin, setting, axes):
    numbers, groups = eqn.params["dimension_numbers"], "feature_group_count"
    grouped = eqn.params[groups] != twin.params[groups]  # under vmap with a kernel for each example
    left, right = axes
    alone = left <= {numbers.lhs_spec[0]} and eqn.params["batch_group_count"] == 1 and not right
    return not alone and not (grouped and left <= {numbers.lhs_spec[1]} and right <= {numbers.rhs_spec[0]})


def _slice(eqn, twin, setting, axes):
    """A part is whole examples only if it is so many times their number: a half of pairs one behind the other, say."""
    (own,) = axes

    def whole(a):
        times = setting.multiple(eqn.invars[0].aval.shape[a], twin.invars[0].aval.shape[a])
        starts, stops = ([e.params[key][a] for e in (eqn, twin)] for key in ("start_indices", "limit_indices"))
        strides = [1 if e.params["strides"] is None else e.params["strides"][a] for e in (eqn, twin)]
        if strides == [1, 1]:
            ends = setting.multiple(*stops) > 0 and (starts == [0, 0] or setting.multiple(*starts) > 0)
            return ends and setting.may_be_merged(times, (times, 1))
        return strides == [times, times] and starts[0] == starts[1] < times and setting.may_be_merged(times, (1, times))

    return not all(whole(a) for a in own)


def _split(eqn, twin, setting, axes):
    (own,), axis = axes, eqn.params["axis"]
    if axis not in own:
        return False
    times = setting.multiple(eqn.invars[0].aval.shape[axis], twin.invars[0].aval.shape[axis])
    parts = zip(eqn.params["sizes"], twin.params["sizes"], strict=True)
    return not (all(setting.multiple(*pair) for pair in parts) and setting.may_be_merged(times, (times, 1)))


def _concatenate(eqn, twin, setting, axes):
    axis = eqn.params["dimension"]
    lengths = [(a.aval.shape[axis], b.aval.shape[axis]) for a, b in zip(eqn.invars, twin.invars, strict=True)]
    return any(axis in own for own in axes) and not all(setting.multiple(*pair) for pair in lengths if pair != (0, 0))


def _pad(eqn, twin, setting, axes):
    return any(tuple(eqn.params["padding_config"][a]) != (0, 0, 0) for a in axes[0])


def _dynamic_slice(eqn, twin, setting, axes):
    return any(eqn.params["slice_sizes"][a] != eqn.invars[0].aval.shape[a] for a in axes[0])


def _dynamic_update_slice(eqn, twin, setting, axes):
    operand, update = (x.aval.shape for x in eqn.invars[:2])
    return any(update[a] != operand[a] for a in varying(eqn.invars[0], twin.invars[0]))


def _gather(eqn, twin, setting, axes):
    numbers, operand = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape

    def whole(a):
        every = eqn.params["slice_sizes"][a] == operand[a] and a not in numbers.start_index_map
        return every or a in numbers.operand_batching_dims or _reads_own(eqn, numbers.start_index_map, a, setting)

    return not all(whole(a) for a in axes[0])


def _scatter(eqn, twin, setting):
    numbers = eqn.params["dimension_numbers"]
    places = numbers.scatter_dims_to_operand_dims
    chosen = {*numbers.inserted_window_dims, *places} - {*numbers.operand_batching_dims}
    growing = chosen & set(varying(eqn.invars[0], twin.invars[0]))
    return not all(_reads_own(eqn, places, a, setting) for a in growing)


def _reads_own(eqn, places, axis, setting):
    """Whether every example takes its own number along ``axis``, as in ``x[jnp.arange(len(x)), lengths - 1]``."""
    if axis not in places:
        return False
    column, indices = places.index(axis), eqn.invars[1]
    made = _producer(setting.program, indices)
    if made is not None and made.primitive.name == "concatenate":
        widths = [atom.aval.shape[-1] for atom in made.invars]
        if made.params["dimension"] != len(indices.aval.shape) - 1 or set(widths) != {1}:
            return False
        return _counts_examples(setting, made.invars[column])
    return indices.aval.shape[-1] == 1 and _counts_examples(setting, indices)


def _counts_examples(setting, atom):
    """Whether an array is 0, 1, ... along axis 0, as many as there are examples, and constant along others."""
    held = _held(setting, atom)
    if held is not None:
        return held.shape[:1] == (setting.first,) and bool(np.all(np.arange(setting.first) == held.T))
    made = _producer(setting.program, atom)
    if made is None:
        return False
    name = made.primitive.name
    if name == "iota":
        return made.params["dimension"] == 0 and made.params["shape"][0] == setting.first
    if name == "select_n":  # the wrap of negative numbers, which these are not
        return _is_wrap(setting, made) and _counts_examples(setting, made.invars[1])
    if name == "broadcast_in_dim":
        return made.params["broadcast_dimensions"][:1] == (0,) and _counts_examples(setting, made.invars[0])
    if name in ("reshape", "convert_element_type"):
        lengths = {x.aval.shape[:1] for x in (*made.invars, *made.outvars)}
        return lengths == {(setting.first,)} and _counts_examples(setting, made.invars[0])
    return False


def _is_wrap(setting, select):
    negative, numbers, *_ = select.invars
    held = _held(setting, negative)
    if held is not None:
        return not np.any(held)
    made = _producer(setting.program, negative)
    return made is not None and made.primitive.name == "lt" and made.invars[0] is numbers


def _held(setting, atom):
    """The array, where the program holds it."""
    known = not isinstance(atom, Literal) and atom in setting.constants
    return np.asarray(setting.constants[atom]) if known else None


def _producer(program, atom) -> Any:
    return next((eqn for eqn in program.eqns if any(out is atom for out in eqn.outvars)), None)


def _triangular_solve(eqn, twin, setting, axes):
    ndim = len(eqn.invars[1].aval.shape)
    solved = ndim - 2 if eqn.params["left_side"] else ndim - 1
    return bool(axes[0] & {ndim - 2, ndim - 1}) or solved in axes[1]


def _fft(eqn, twin, setting, axes):
    ndim = len(eqn.invars[0].aval.shape)
    return any(a >= ndim - len(eqn.params["fft_lengths"]) for a in axes[0])


def _top_k(eqn, twin, setting, axes):
    ndim = len(eqn.invars[0].aval.shape)
    return eqn.params.get("axis", -1) % ndim in axes[0]


def _reshape(eqn, twin, setting, axes):
    """The examples stay whole if what lies before and behind them in memory is only cut up or joined."""
    (own,), target = axes, varying(eqn.outvars[0], twin.outvars[0])
    if len(own) != 1 or len(target) != 1:
        return False
    ((source,), (goal,)) = own, target
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    times, after = (
        setting.multiple(x.aval.shape[i], y.aval.shape[i])
        for x, y, i in ((eqn.invars[0], twin.invars[0], source), (eqn.outvars[0], twin.outvars[0], goal))
    )
    if not times or not after:
        return True
    order = eqn.params.get("dimensions") or range(len(old))  # a transposition before
    (before_old, behind_old), (before_new, behind_new) = (
        _around([old[i] for i in order], list(order).index(source)),
        _around(new, goal),
    )
    if after >= times:
        return bool(before_old % max(before_new, 1) or behind_old % max(behind_new, 1))
    if before_new % max(before_old, 1) or behind_new % max(behind_old, 1):
        return True
    layouts = setting.merges.get(times, set())
    unfolded = before_new // max(before_old, 1), behind_new // max(behind_old, 1)
    return after == 1 and len(layouts) == 1 and layouts != {unfolded}


def _around(shape, axis):
    before = behind = 1
    for index, length in enumerate(shape):
        before *= length if index < axis else 1
        behind *= length if index > axis else 1
    return before, behind


_RULES: dict[str, Callable[..., bool]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "triangular_solve": _triangular_solve,
    "fft": _fft,
    "top_k": _top_k,
    "reshape": _reshape,
}
