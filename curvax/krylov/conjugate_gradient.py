"""Preconditioned conjugate gradients on pytrees, with what Hessian-free optimisation asks of it.

Martens 2016, Algorithm 2 and sections 4.2, 4.6.7, 4.8 and 4.11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.checks import check_at_least
from curvax.krylov._scaled_system import ScaledSystem, Start, power_of_two, scaled_system, start_of_run
from curvax.krylov.monitors import Monitor
from curvax.krylov.stop_reasons import StopReason, first_reason
from curvax.types import Array, PyTree, Scalar


class StoredIterates(NamedTuple):
    """Some iterates of a run of ``cg``, in their order, the last iterate always among them, and q at each.

    The slots after the first ``used`` hold the starting point x_0, as iterate 0.
    """

    values: PyTree  # every leaf has a leading axis over the slots
    iterations: Array
    model_values: Array
    used: Array


class CGResult(NamedTuple):
    """What ``cg`` returns.

    Attributes:
        value: The last iterate x, in the dtypes of b; finite whatever happened.
        reason: Why the run stopped, a ``StopReason`` code.
        iterations: The number of steps taken. A run that ends in negative curvature has used one product more.
        residual_norm: |A x - b|, by the recurrence.
        model_value: q(x) = 1/2 x^T A x - b^T x.
        model_trace: q(x_0), ..., q(x_max_iterations); the entries after the last step repeat its value. None where
            ``max_iterations`` is traced.
        negative_curvature_direction: A descent direction p with p^T A p <= 0 (to rounding) where that is the reason,
            otherwise zero. Its length means nothing.
        stored: The iterates asked for by ``store_at``, else None.
        monitor_state: The final state of the monitor, else None.
    """

    value: PyTree
    reason: Array
    iterations: Array
    residual_norm: Array
    model_value: Array
    model_trace: Array | None
    negative_curvature_direction: PyTree
    stored: StoredIterates | None
    monitor_state: PyTree


def cg(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    *,
    x0: PyTree | None = None,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
    max_iterations: Scalar,
    tolerance: Scalar,
    progress_tolerance: Scalar | None = None,
    store_at: Sequence[int] | None = None,
    monitor: Monitor | None = None,
) -> CGResult:
    r"""Minimises q(x) = 1/2 x^T A x - b^T x, that is, solves A x = b, by preconditioned conjugate gradients.

    Every threshold is relative, so that b and 10^{-30} b need the same steps. One product with A is used in each
    iteration, one more for a warm start. Under ``vmap`` a lane that has stopped keeps its result while others go on.

    The residual that is tested and returned is that of the recurrence. The true one follows it down to the rounding of
    the largest iterate times A, about u |A| |x| at worst with u the unit roundoff, and stays there; a tolerance below
    that is met by the recurrence only. A second run with ``x0=result.value`` refines what the first one left. Source:
    Martens 2016, Algorithm 2, eq. 4.2 (the progress rule) and section 4.6.7 (the stored iterates).

    Args:
        matvec: v -> A v, linear and symmetric; a ``LinearMap`` or any function of a pytree shaped like b. A should be
            positive semi-definite; where it shows that it is not, the run ends.
        b: The right-hand side, a pytree of floating-point arrays.
        x0: A warm start, shaped like b; None is zero and saves a product. Ignored where b is zero, and where x_0, the
            residual there or its square is not finite.
        preconditioner: r -> P^{-1} r with P symmetric positive definite, for instance a ``diagonal_preconditioner``.
            The scale of P does not matter.
        max_iterations: The hard cap. It may be traced, without ``progress_tolerance`` and ``store_at``.
        tolerance: Stop when |A x - b| <= tolerance * |b|.
        progress_tolerance: Stop at iteration j when (q_j - q_{j-k}) / q_j < progress_tolerance with k = max(10, j/10),
            tested once j > k and q_j < 0; a warm start may begin with q_0 > 0. Martens takes 1e-4. None: no such stop.
        store_at: The numbers of the iterates to keep, for instance ``geometric_iterations(max_iterations)``; the last
            iterate is kept in any case. Memory is one copy of b for each. None: nothing is stored.
        monitor: A rule of the caller's own that sees every iterate and can stop the run; see ``Monitor``.

    Raises:
        TypeError: A leaf of b is not real floating-point.
        ValueError: ``x0`` or a product differs from b in structure or shape, or an iteration count is out of range.

    Example:
        >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
        >>> result = curvax.solvers.cg(lambda v: A @ v, jnp.array([1.0, 2.0]), max_iterations=10, tolerance=1e-10)
        >>> jnp.allclose(A @ result.value, jnp.array([1.0, 2.0])), result.iterations.item()
        (Array(True, dtype=bool), 2)
    """
    cap = check_at_least("max_iterations", max_iterations, 1)
    if not isinstance(cap, int) and not (progress_tolerance is None and store_at is None):
        raise ValueError("progress_tolerance= and store_at= need max_iterations as a Python integer, not a traced one")
    system, warm = scaled_system(matvec, b, preconditioner, x0)
    start = start_of_run(system, tolerance)
    state = _start(start, warm, cap, store_at, monitor)

    def running(state):
        return (state.reason == StopReason.MAX_ITERATIONS) & (state.iteration < cap)

    def step(state):
        return _step(system, state, start, warm, progress_tolerance, monitor)

    return _result(system, jax.lax.while_loop(running, step, state))


def geometric_iterations(max_iterations: int, ratio: float = 1.3) -> tuple[int, ...]:
    """The rounded powers of ``ratio`` up to ``max_iterations``, for ``store_at`` (Martens 2010: 1.3).

    >>> geometric_iterations(30)
    (1, 2, 3, 4, 5, 6, 8, 11, 14, 18, 23, 30)
    """
    numbers, power = set(), ratio
    if ratio <= 1:
        raise ValueError(f"ratio is {ratio}; its powers must grow, so it must be above 1")
    while round(power) <= max_iterations:
        numbers.add(round(power))
        power *= ratio
    return tuple(sorted(numbers))


class _State(NamedTuple):
    iteration: Array
    reason: Array
    x: PyTree
    residual: PyTree
    direction: PyTree
    descent: Array  # r^T y with y = P^{-1} r / unit
    unit: Array  # so that y, and with it p, is of about length 1 behind a warm start
    residual_norm: Array
    model_value: Array
    trace: Array | None  # the model values of all iterates
    stored: _Store | None
    monitor_state: PyTree


class _Store(NamedTuple):
    values: PyTree
    iterations: Array
    numbers: Array


def _start(start, warm, cap, store_at, monitor):
    zero, reason, direction, iteration = trees.zeros_like(start.residual), start.reason, start.direction, 0
    first = trees.cast_like(zero, direction)
    if warm is not None:
        # A run from x_0 is one from zero with a step to x_0 in front that is not counted: a product less to compile.
        reason = jnp.where(warm.useful, StopReason.MAX_ITERATIONS.value, reason)
        direction, iteration = trees.where(warm.useful, (warm.direction, -1), (direction, 0))
        first = warm.x0
    model_value = jnp.zeros_like(start.descent)
    run = zero, start.residual, direction, start.descent, model_value + 1, start.residual_norm, model_value
    trace = jnp.full((cap + 1,), model_value) if isinstance(cap, int) else None
    stored = None if store_at is None else _empty_store(first, store_at, cap)
    watched = None if monitor is None else monitor.state
    return _State(jnp.asarray(iteration, jnp.int32), reason, *run, trace, stored, watched)


# The textbook's run (Hestenes and Stiefel 1952), which jax.scipy.sparse.linalg.cg is, but for this:
# - r = A x - b is the gradient of q, so q(x) = (r - b)^T x / 2 comes without a product; jax.scipy returns no figures.
# - b is at unit scale, A p too when p^T A p is taken: jax.scipy squares |b|, and 1e-30 b in float32 is zero to it.
# - p^T A p <= 0 ends the run, and p is returned; jax.scipy divides by it.
# - x and r are wider than p in half precision: what is added to x is, to the bit, what was multiplied by A.
# - A step that is not finite is not taken, so that the result is finite whatever A does.
def _step(system: ScaledSystem, state: _State, start: Start, warm, progress_tolerance, monitor) -> _State:
    p, before, unit = state.direction, state.descent, state.unit
    product, product_unit, norm, slope, flat = system.probe(p)
    length = before / slope / norm
    # Times 1 / unit: XLA divides by the product of what is divided by in turn, which may underflow.
    stride, counts = length * (1 / product_unit), jnp.array(True)
    if warm is not None:
        # To x_0 whatever the curvature, and on from there as from a start; to the bit, as strides are powers of two.
        counts = state.iteration >= 0
        stride, length = trees.where(counts, (stride, length), (warm.stride, warm.stride * product_unit))
        flat, before = flat & counts, jnp.where(counts, before, jnp.inf)
    x = trees.add_scaled(state.x, stride, p)
    residual = trees.add_scaled(state.residual, length, product)
    preconditioned = system.precondition(residual)
    sums = trees.vdots((residual, residual), (trees.sub(residual, system.right), x), (residual, preconditioned))
    residual_norm, model_value = jnp.sqrt(sums[0]), 0.5 * sums[1]
    measured = residual_norm + model_value
    if warm is not None:
        unit = jnp.where(counts, unit, power_of_two(sums[2] / residual_norm))
        measured = jnp.where(counts, measured, measured + sums[2])
    descent = sums[2] / unit
    defect = first_reason(
        (~jnp.isfinite(norm), StopReason.NON_FINITE),
        (flat, StopReason.NEGATIVE_CURVATURE),
        (~jnp.isfinite(measured), StopReason.NON_FINITE),
    )
    # A defective step is not taken: everything but the reason stays as it was.
    taken = defect == StopReason.MAX_ITERATIONS
    x, residual = trees.where(taken, (x, residual), (state.x, state.residual))
    iteration = state.iteration + taken.astype(jnp.int32)
    otherwise = p, defect
    if warm is not None:
        # From an x_0 that cannot be reached back to zero.
        otherwise = trees.where(counts, otherwise, (start.direction, start.reason))
        descent, unit = trees.where(counts | taken, (descent, unit), (start.descent, jnp.ones_like(unit)))
        iteration = jnp.maximum(iteration, 0)
    trace = state.trace
    if trace is not None:
        trace = jnp.where(taken & (jnp.arange(trace.size, dtype=jnp.int32) >= iteration), model_value, trace)

    direction = system.descent(preconditioned, unit, descent / before, p)
    monitor_state, monitored = _monitored(monitor, state.monitor_state, system, x, iteration, taken & counts)
    verdict = first_reason(
        (residual_norm <= start.threshold, StopReason.CONVERGED),
        (~jnp.isfinite(descent), StopReason.NON_FINITE),
        (descent <= 0, StopReason.BREAKDOWN),
        (_stalled(trace, iteration, progress_tolerance), StopReason.PROGRESS),
        (monitored, StopReason.MONITOR),
    )
    direction, reason = trees.where(taken, (direction, verdict), otherwise)
    return _State(
        iteration=iteration,
        reason=reason,
        x=x,
        residual=residual,
        direction=direction,
        descent=descent,
        unit=unit,
        residual_norm=jnp.where(taken, residual_norm, state.residual_norm),
        model_value=jnp.where(taken, model_value, state.model_value),
        trace=trace,
        stored=_stored(state.stored, system, x, iteration),
        monitor_state=monitor_state,
    )


def _stalled(trace, iteration, progress_tolerance):
    """Martens 2016, eq. 4.2, with q = M - M(0)."""
    if progress_tolerance is None:
        return jnp.zeros((), bool)
    window = jnp.maximum(10, iteration // 10)
    now, before = trace[iteration], trace[iteration - window]
    return (iteration > window) & (now < 0) & (now - before > jnp.asarray(progress_tolerance, now.dtype) * now)


def _monitored(monitor, state, system, x, iteration, counts):
    """The monitor's new state and its verdict, of an iterate that counts."""
    if monitor is None:
        return None, jnp.zeros((), bool)

    def look():
        return monitor.update(state, system.packing.unpack(system.outward(x)), iteration)

    return jax.lax.cond(counts, look, lambda: (state, jnp.zeros((), bool)))


def _empty_store(x, store_at, max_iterations):
    unknown = [number for number in store_at if not 1 <= number <= max_iterations]
    if unknown:
        raise ValueError(f"store_at asks for iterate {unknown[0]}; iterates are numbered 1 to {max_iterations}")
    numbers = jnp.array(sorted({*store_at, max_iterations}), jnp.int32)
    values = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (numbers.size, *leaf.shape)), x)
    return _Store(values, jnp.zeros_like(numbers), numbers)


def _stored(store, system, x, iteration):
    """Writes every iterate into the next slot, over its predecessor, until the number due in that slot is reached."""
    if store is None:
        return None
    slot = jnp.sum(store.numbers < iteration, dtype=jnp.int32)
    values = blocks.with_row(store.values, slot, system.outward(x))
    return _Store(values, store.iterations.at[slot].set(iteration), store.numbers)


def _result(system, state):
    trace = None if state.trace is None else state.trace * system.unit * system.unit
    negative = state.reason == StopReason.NEGATIVE_CURVATURE
    stored = None
    if state.stored is not None and trace is not None:
        numbers = state.stored.iterations
        values = system.packing.unpack(state.stored.values)
        stored = StoredIterates(values, numbers, trace[numbers], jnp.sum(numbers > 0, dtype=jnp.int32))
    return CGResult(
        value=system.packing.unpack(system.outward(state.x)),
        reason=state.reason,
        iterations=state.iteration,
        residual_norm=state.residual_norm * system.unit,
        model_value=state.model_value * system.unit * system.unit,
        model_trace=trace,
        negative_curvature_direction=system.packing.unpack(
            trees.where(negative, state.direction, trees.zeros_like(state.direction))
        ),
        stored=stored,
        monitor_state=state.monitor_state,
    )
