r"""Limited-memory symmetric rank-one (SR1) matrices, and minimisation of plain functions with them.

The SR1 matrix of pairs (a_i, b_i) is the symmetric B with B a_i = b_i that grows from gamma I by one rank for each
pair: B+ = B + r r^T / (r^T a), r = b - B a. In compact form B = gamma I + Psi C^{-1} Psi^T with psi_i = b_i - gamma a_i
and C_ij = a_i^T psi_j for a_i not older than a_j. The pairs (s, y) of steps and changes of the gradient give the
Hessian (direct form), the pairs (y, s) its inverse; the two are inverse to each other where gamma is. C is the matrix
D + L + L^T - S^T B_0 S of the literature, so the vectors psi alone need to be kept.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.compact_map import CompactMap, inner_products
from curvax.damping.rules import RadiusRule
from curvax.quadratic_model import reduction_ratio
from curvax.solvers.compact_trust_region import compact_trust_region

PyTree = Any
Scalar = Any
Array = jax.Array
Evaluate = Callable[[PyTree], tuple[Array, PyTree]]


class SR1Memory(NamedTuple):
    """The pairs of a limited-memory SR1 matrix, as a ring buffer of arrays with fixed shapes.

    Attributes:
        vectors: Psi, a pytree like the parameters with a leading axis of slots.
        core: C, shape (slots, slots).
        gram: Psi^T Psi, shape (slots, slots).
        ages: When each slot was filled, counted from 1; 0 for an empty slot.
    """

    vectors: PyTree
    core: Array
    gram: Array
    ages: Array


class MemoryUpdate(NamedTuple):
    """What ``sr1_update`` returns.

    Attributes:
        memory: The memory.
        skipped: Whether the pair was left out.
        dropped: How many older pairs were dropped because the matrix was no longer well defined.
    """

    memory: SR1Memory
    skipped: Array
    dropped: Array


def sr1_memory(params: PyTree, size: int = 5) -> SR1Memory:
    """An empty memory for vectors like ``params``.

    Args:
        params: A pytree with the shapes and dtypes of the parameters.
        size: m, how many pairs it keeps.

    Returns:
        The memory.
    """
    if size < 1:
        raise ValueError(f"the memory must hold one pair at least, got size={size}")
    dtype = trees.wide_dtype(*jax.tree.leaves(params))
    vectors = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), params)
    return SR1Memory(
        vectors, jnp.zeros((size, size), dtype), jnp.zeros((size, size), dtype), jnp.zeros(size, jnp.int32)
    )


def sr1_map(memory: SR1Memory, scale: Scalar) -> CompactMap:
    """The SR1 matrix of a memory, a linear map with ``solve``, ``to_dense``, ``spectrum`` and the rest.

    Args:
        memory: The memory.
        scale: gamma, the number whose multiple of the identity the matrix grew from, as in ``sr1_update``.

    Returns:
        The map.
    """
    return CompactMap(jnp.asarray(scale, memory.core.dtype), memory.vectors, memory.core, memory.gram, memory.ages > 0)


def sr1_update(
    memory: SR1Memory, operand: PyTree, image: PyTree, scale: Scalar, tolerance: float = 1e-8
) -> MemoryUpdate:
    r"""Adds the pair (a, b) that the matrix shall take a to b by, in place of the oldest one.

    A pair is left out if |a^T r| < tolerance ||a|| ||r|| with r = b - B a, as it would make the update unbounded, or if
    it is not finite or already obeyed. Then, as long as C is singular or Psi has dependent columns (relative to
    rounding), the oldest pair is dropped. Costs three products with Psi.

    Args:
        memory: The memory.
        operand: a: the step s for the Hessian, the change y of the gradient for its inverse.
        image: b: y or s.
        scale: gamma, not zero.
        tolerance: The threshold r of the paper.

    Returns:
        A ``MemoryUpdate``.

    Example:
        >>> H = jnp.diag(jnp.array([1.0, -2.0, 3.0]))
        >>> memory = curvax.quasi_newton.sr1_memory(jnp.zeros(3), size=3)
        >>> for a in jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]):
        ...     memory, _, _ = curvax.quasi_newton.sr1_update(memory, a, H @ a, scale=0.5)
        >>> bool(jnp.allclose(curvax.quasi_newton.sr1_map(memory, 0.5).to_dense(), H, atol=1e-4))
        True

    Source: Ramamurthy and Duffy 2017, section 3 and appendix; Nocedal and Wright 2006, section 6.2.
    """
    dtype = memory.core.dtype
    scale = jnp.asarray(scale, dtype)
    matrix = sr1_map(memory, scale)
    along = matrix.project(operand)
    psi = trees.sub(image, trees.scale(scale, operand))
    own = jnp.linalg.solve(matrix._own(memory.core), along)
    residual = trees.sub(psi, matrix.combine(own))
    lengths = trees.norm(operand).astype(dtype) * trees.norm(residual).astype(dtype)
    curved = jnp.abs(trees.vdot(operand, residual)).astype(dtype) >= tolerance * lengths
    rounding = 10 * jnp.finfo(dtype).eps * trees.norm(image).astype(dtype)
    news = trees.norm(residual).astype(dtype) > rounding
    kept = curved & news & (lengths > 0) & trees.all_finite(operand, image)

    slot = jnp.argmin(memory.ages)
    here = jnp.arange(memory.ages.size) == slot
    stored = jax.tree.map(
        lambda stack, leaf: stack.at[slot].set(jnp.where(kept, leaf, stack[slot])), memory.vectors, psi
    )
    squares = inner_products(stored, psi).astype(dtype)
    used = (memory.ages > 0) | here
    ages = jnp.where(here, jnp.max(memory.ages) + 1, memory.ages)
    products = jnp.where(here, trees.vdot(operand, psi).astype(dtype), along)
    core, gram = (
        _with_row(matrix, here, row, used) for matrix, row in ((memory.core, products), (memory.gram, squares))
    )
    small = trees.where(kept, (core, gram, ages), (memory.core, memory.gram, memory.ages))
    repaired = jax.lax.while_loop(_is_ill_defined, _without_oldest, small)
    dropped = jnp.sum(small[2] > 0) - jnp.sum(repaired[2] > 0)
    return MemoryUpdate(SR1Memory(stored, *repaired), ~kept, dropped.astype(jnp.int32))


class MinimizeReason(enum.IntEnum):
    """Why ``minimize`` stopped; ``MinimizeReason(int(reason)).text`` reads aloud."""

    MAX_ITERATIONS = 0
    GRADIENT = 1
    SMALL_STEP = 2
    NON_FINITE = 3

    @property
    def text(self) -> str:
        """One sentence about the code."""
        return {
            MinimizeReason.MAX_ITERATIONS: "the maximum number of iterations was taken",
            MinimizeReason.GRADIENT: "the gradient is within the tolerance",
            MinimizeReason.SMALL_STEP: "no step that lowers the function is longer than rounding",
            MinimizeReason.NON_FINITE: "the function or its gradient at the start is not finite",
        }[self]


class MinimizeResult(NamedTuple):
    """What ``minimize`` returns.

    Attributes:
        value: x, a pytree like the start.
        function_value: f(x).
        gradient_norm: ||grad f(x)||.
        reason: A ``MinimizeReason``.
        iterations: Steps tried.
        accepted: Steps taken.
        skipped_pairs: Pairs that were left out of the memory.
        memory: The memory at the end.
    """

    value: PyTree
    function_value: Array
    gradient_norm: Array
    reason: Array
    iterations: Array
    accepted: Array
    skipped_pairs: Array
    memory: SR1Memory


def minimize(
    function: Callable[[PyTree], Array],
    start: PyTree,
    *,
    method: Literal["trust_region", "line_search"] = "trust_region",
    memory_size: int = 5,
    scale: float = 1.0,
    initial_radius: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> MinimizeResult:
    r"""Minimises a plain function by L-SR1, in one ``while_loop``: inside ``jit``, ``vmap`` and on any device.

    The matrix may be indefinite, and the trust region follows its negative curvature. Where the gradient is within the
    tolerance but the matrix has a negative eigenvalue, as it does next to a saddle point after the first pair that
    shows it, the trust region goes on, with this matrix and ever smaller steps, until one is taken or twenty were not;
    methods whose matrix is positive definite, such as L-BFGS, end there. For objectives with data use ``curvax.lsr1``.

    Args:
        function: f, from a pytree to a scalar.
        start: x_0.
        method: "trust_region" (algorithm 1) or "line_search" (algorithm 2).
        memory_size: m.
        scale: gamma of B_0 = gamma I; the line search starts from H_0 = I / gamma.
        initial_radius: The first radius; ||grad f(x_0)|| by default.
        max_iterations: The cap.
        tolerance: The norm of the gradient to stop at.

    Returns:
        A ``MinimizeResult``.

    Example:
        >>> def saddle(x):                                                    # stationary at 0, minima at x[1] = -1, 1
        ...     return x[0] ** 2 / 2 + x[1] ** 4 / 4 - x[1] ** 2 / 2
        >>> result = curvax.quasi_newton.minimize(saddle, jnp.array([1.0, 1e-5]), tolerance=1e-4)
        >>> curvax.quasi_newton.MinimizeReason(int(result.reason)).text
        'the gradient is within the tolerance'
        >>> bool(abs(abs(result.value[1]) - 1) < 1e-3)
        True

    Source: Ramamurthy and Duffy 2017, algorithms 1 and 2.
    """
    _check_method(method)
    rule, dtype = RadiusRule(), trees.wide_dtype(*jax.tree.leaves(start))
    evaluate = jax.value_and_grad(function)

    class Carry(NamedTuple):
        value: PyTree
        loss: Array
        gradient: PyTree
        strategy: Array  # the radius, or the last step size
        memory: SR1Memory
        iterations: Array
        accepted: Array
        skipped: Array
        probes: Array  # steps since the gradient came within the tolerance
        reason: Array

    def reason_at(loss, gradient, small_step, memory, probes):
        indefinite = _has_negative_curvature(memory, scale) & (probes < 20)
        indefinite = indefinite & (method == "trust_region")
        reason = jnp.where(small_step, MinimizeReason.SMALL_STEP.value, MinimizeReason.MAX_ITERATIONS.value)
        flat = trees.norm(gradient) <= tolerance
        reason = jnp.where(flat & ~indefinite, MinimizeReason.GRADIENT.value, reason)
        return jnp.where(trees.all_finite(loss, gradient), reason, MinimizeReason.NON_FINITE.value).astype(jnp.int32)

    def running(carry):
        return (carry.reason == MinimizeReason.MAX_ITERATIONS.value) & (carry.iterations < max_iterations)

    def iterate(carry):
        def displaced(step):
            loss, gradient = evaluate(trees.add(carry.value, step))
            return loss.astype(dtype), gradient

        here = (displaced, carry.loss, carry.gradient, carry.memory, carry.strategy)
        if method == "trust_region":
            taken = trust_region_step(*here, scale=scale, rule=rule)
        else:
            taken = line_search_step(*here, scale=scale)
        value = trees.where(taken.accepted, trees.add(carry.value, taken.step), carry.value)
        loss = jnp.where(taken.accepted, taken.new_loss, carry.loss)
        gradient = trees.where(taken.accepted, taken.new_gradient, carry.gradient)
        shortest = jnp.finfo(dtype).eps * (1 + trees.norm(carry.value).astype(dtype))
        small = ~taken.accepted & (taken.step_norm <= shortest)
        # A long step from a saddle may end where the function curves upwards, which says nothing about the saddle.
        forget = (carry.probes > 0) & ~taken.accepted
        memory = trees.where(forget, carry.memory, taken.memory)
        probes = jnp.where(trees.norm(gradient) <= tolerance, carry.probes + 1, 0)
        return Carry(
            value,
            loss,
            gradient,
            taken.strategy,
            memory,
            carry.iterations + 1,
            carry.accepted + taken.accepted.astype(jnp.int32),
            carry.skipped + taken.skipped.astype(jnp.int32),
            probes,
            reason_at(loss, gradient, small, memory, probes),
        )

    loss, gradient = evaluate(start)
    loss = loss.astype(dtype)
    first = jnp.asarray(trees.norm(gradient) if initial_radius is None else initial_radius, dtype)
    zero, memory = jnp.zeros((), jnp.int32), sr1_memory(start, memory_size)
    carry = Carry(
        start,
        loss,
        gradient,
        first if method == "trust_region" else jnp.full((), 0.5, dtype),
        memory,
        zero,
        zero,
        zero,
        zero,
        reason_at(loss, gradient, jnp.array(False), memory, zero),
    )
    end = jax.lax.while_loop(running, iterate, carry)
    norm = trees.norm(end.gradient).astype(dtype)
    return MinimizeResult(end.value, end.loss, norm, end.reason, end.iterations, end.accepted, end.skipped, end.memory)


@dataclasses.dataclass(frozen=True)
class SR1Step:
    """One iteration of L-SR1.

    Attributes:
        step: What was tried.
        step_norm: Its norm.
        new_loss: f there.
        new_gradient: Its gradient there.
        predicted_change: The change of the quadratic model.
        step_ratio: The actual over the predicted change.
        accepted: Whether the step shall be taken.
        strategy: The radius, or the step size, for the next iteration.
        memory: The memory with the new pair, be the step taken or not.
        skipped: Whether the pair was left out.
        dropped: Pairs dropped to repair the memory.
        hard_case: Whether the trust-region problem was in its hard case; for a line search, whether the direction
            pointed upwards and was turned round.
    """

    step: PyTree
    step_norm: Array
    new_loss: Array
    new_gradient: PyTree
    predicted_change: Array
    step_ratio: Array
    accepted: Array
    strategy: Array
    memory: SR1Memory
    skipped: Array
    dropped: Array
    hard_case: Array


def trust_region_step(
    evaluate: Evaluate,
    loss: Array,
    gradient: PyTree,
    memory: SR1Memory,
    radius: Array,
    *,
    scale: Scalar = 1.0,
    rule: RadiusRule | None = None,
    acceptance: Scalar = 1e-4,
    skip_tolerance: float = 1e-8,
) -> SR1Step:
    """One iteration of algorithm 1: the exact step in the region, its judgement, the pair, the radius.

    Args:
        evaluate: (step) -> (loss, gradient) behind the step.
        loss: f here.
        gradient: Its gradient here.
        memory: Of the direct form, pairs (s, y).
        radius: Delta.
        scale: gamma.
        rule: How Delta adapts.
        acceptance: eta, the least ratio of a step that is taken.
        skip_tolerance: r of the skip rule.

    Returns:
        An ``SR1Step``.
    """
    rule, dtype = RadiusRule() if rule is None else rule, memory.core.dtype
    solution = compact_trust_region(sr1_map(memory, scale), gradient, radius)
    new_loss, new_gradient = evaluate(solution.step)
    predicted = solution.model_value.astype(dtype)
    ratio = reduction_ratio(loss, new_loss, predicted).astype(dtype)
    updated = sr1_update(memory, solution.step, trees.sub(new_gradient, gradient), scale, skip_tolerance)
    return SR1Step(
        step=solution.step,
        step_norm=solution.norm,
        new_loss=new_loss.astype(dtype),
        new_gradient=new_gradient,
        predicted_change=predicted,
        step_ratio=ratio,
        accepted=ratio > acceptance,
        strategy=rule(radius, ratio, solution.norm),
        memory=updated.memory,
        skipped=updated.skipped,
        dropped=updated.dropped,
        hard_case=solution.hard_case,
    )


def line_search_step(
    evaluate: Evaluate,
    loss: Array,
    gradient: PyTree,
    memory: SR1Memory,
    last_step_size: Array,
    *,
    scale: Scalar = 1.0,
    sufficient_decrease: Scalar = 1e-4,
    most_halvings: int = 30,
    skip_tolerance: float = 1e-8,
    loss_at: Callable[[PyTree], Array] | None = None,
) -> SR1Step:
    """One iteration of algorithm 2: the direction -H g, halved until the loss falls enough, and the pair.

    The matrix may be indefinite: a direction that points upwards is turned round, and one orthogonal to the gradient is
    replaced by -g.

    Args:
        evaluate: (step) -> (loss, gradient) behind the step.
        loss: f here.
        gradient: Its gradient here.
        memory: Of the inverse form, pairs (y, s).
        last_step_size: The step size before; the search starts from min(1, twice that).
        scale: gamma; H_0 = I / gamma.
        sufficient_decrease: c of Armijo's rule.
        most_halvings: The cap on the search.
        skip_tolerance: r of the skip rule.
        loss_at: (step) -> loss, if that is cheaper than with the gradient.

    Returns:
        An ``SR1Step``.
    """
    dtype = memory.core.dtype
    loss_at = (lambda step: evaluate(step)[0]) if loss_at is None else loss_at
    inverse_scale = 1 / jnp.asarray(scale, dtype)
    direction = trees.scale(-1.0, sr1_map(memory, inverse_scale)(gradient))
    slope = trees.vdot(gradient, direction).astype(dtype)
    lengths = trees.norm(gradient).astype(dtype) * trees.norm(direction).astype(dtype)
    upwards = slope > 0
    orthogonal = ~(jnp.abs(slope) > jnp.sqrt(jnp.finfo(dtype).eps) * lengths)
    direction = trees.where(upwards, trees.scale(-1.0, direction), direction)
    direction = trees.where(orthogonal, trees.scale(-1.0, gradient), direction)
    slope = jnp.where(orthogonal, -trees.vdot(gradient, gradient).astype(dtype), -jnp.abs(slope))
    rounding = 10 * jnp.finfo(dtype).eps * jnp.abs(loss)

    def sufficient(step_size, value):
        return value <= loss + sufficient_decrease * step_size * slope + rounding

    def searching(carry):
        step_size, value, tries = carry
        return ~sufficient(step_size, value) & (tries < most_halvings)

    def halve(carry):
        step_size, _, tries = carry
        step_size = step_size / 2
        return step_size, loss_at(trees.scale(step_size, direction)).astype(dtype), tries + 1

    start = jnp.minimum(1, 2 * last_step_size).astype(dtype)
    first = (start, loss_at(trees.scale(start, direction)).astype(dtype), jnp.zeros((), jnp.int32))
    step_size, value, _ = jax.lax.while_loop(searching, halve, first)
    step = trees.scale(step_size, direction)
    accepted = sufficient(step_size, value)
    new_loss, new_gradient = evaluate(step)
    updated = sr1_update(memory, trees.sub(new_gradient, gradient), step, inverse_scale, skip_tolerance)
    predicted = step_size * slope / 2
    return SR1Step(
        step=step,
        step_norm=trees.norm(step).astype(dtype),
        new_loss=new_loss.astype(dtype),
        new_gradient=new_gradient,
        predicted_change=predicted,
        step_ratio=reduction_ratio(loss, new_loss, predicted).astype(dtype),
        accepted=accepted,
        strategy=jnp.where(accepted, step_size, last_step_size / 2),
        memory=updated.memory,
        skipped=updated.skipped,
        dropped=updated.dropped,
        hard_case=upwards,
    )


def _with_row(matrix, here, row, used):
    """``matrix`` with ``row`` in the row and the column where ``here`` is, zero where nothing is stored."""
    replaced = jnp.where(here[:, None], row[None, :], jnp.where(here[None, :], row[:, None], matrix))
    return jnp.where(used[:, None] & used[None, :], replaced, 0)


def _is_ill_defined(small):
    """Whether C is singular or Psi has dependent columns, to rounding; the matrices are first scaled."""
    core, gram, ages = small
    used = ages > 0
    both = used[:, None] & used[None, :]
    identity = jnp.eye(ages.size, dtype=core.dtype)
    rounding = 10 * ages.size * jnp.finfo(core.dtype).eps

    def scaled(matrix, sizes):
        factors = jax.lax.rsqrt(jnp.where(used & (sizes > 0), sizes, 1))
        return jnp.where(both, matrix * factors[:, None] * factors[None, :], identity)

    of_core = jnp.abs(jnp.linalg.eigvalsh(scaled(core, jnp.max(jnp.abs(core), axis=1))))
    of_gram = jnp.linalg.eigvalsh(scaled(gram, jnp.diagonal(gram)))
    bad = (jnp.min(of_core) <= rounding * jnp.max(of_core)) | (jnp.min(of_gram) <= rounding)
    empty = jnp.any(used & (jnp.diagonal(gram) <= 0))
    return jnp.any(used) & (bad | empty)


def _without_oldest(small):
    core, gram, ages = small
    oldest = jnp.argmin(jnp.where(ages > 0, ages, jnp.iinfo(ages.dtype).max))
    ages = jnp.where(jnp.arange(ages.size) == oldest, 0, ages)
    used = ages > 0
    both = used[:, None] & used[None, :]
    return jnp.where(both, core, 0), jnp.where(both, gram, 0), ages


def _has_negative_curvature(memory, scale):
    values = sr1_map(memory, scale).spectrum().values
    return jnp.min(values) < -jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.max(jnp.abs(values))


def _check_method(method):
    if method not in ("trust_region", "line_search"):
        raise ValueError(f"method must be 'trust_region' or 'line_search', got {method!r}")
