"""Minimisation of plain functions by L-SR1 in one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_at_least, check_choice
from curvax.damping.rules import RadiusRule
from curvax.quasi_newton.sr1 import SR1Memory, sr1_map, sr1_memory
from curvax.quasi_newton.steps import line_search_step, trust_region_step
from curvax.solvers.stop_reasons import Reason
from curvax.types import Array, PyTree, Scalar


class MinimizeReason(Reason):
    """Why ``minimize`` stopped; ``MinimizeReason(int(reason)).text`` reads aloud."""

    MAX_ITERATIONS = 0, "the maximum number of iterations was taken"
    GRADIENT = 1, "the gradient is within the tolerance"
    SMALL_STEP = 2, "no step that lowers the function is longer than rounding"
    NON_FINITE = 3, "the function or its gradient at the start is not finite"


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
    scale: Scalar = 1.0,
    initial_radius: Scalar | None = None,
    max_iterations: Scalar = 1000,
    tolerance: Scalar = 1e-6,
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
    check_choice("method", method, ("trust_region", "line_search"))
    cap = check_at_least("max_iterations", max_iterations, 0)
    rule, dtype = RadiusRule(), trees.wide_dtype(*jax.tree.leaves(start))
    evaluate = jax.value_and_grad(function)

    class Carry(NamedTuple):
        value: PyTree
        loss: Array
        gradient: PyTree
        reach: Array  # the radius, or the last step size
        memory: SR1Memory
        iterations: Array
        accepted: Array
        skipped: Array
        probes: Array  # steps since the gradient came within the tolerance
        reason: Array

    def is_flat(gradient):
        norm = trees.norm(gradient)
        return norm <= jnp.asarray(tolerance, norm.dtype)

    def reason_at(loss, gradient, small_step, memory, probes):
        indefinite = _has_negative_curvature(memory, scale) & (probes < 20) & (method == "trust_region")
        reason = jnp.where(small_step, MinimizeReason.SMALL_STEP.value, MinimizeReason.MAX_ITERATIONS.value)
        reason = jnp.where(is_flat(gradient) & ~indefinite, MinimizeReason.GRADIENT.value, reason)
        return jnp.where(trees.all_finite(loss, gradient), reason, MinimizeReason.NON_FINITE.value).astype(jnp.int32)

    def running(carry):
        return (carry.reason == MinimizeReason.MAX_ITERATIONS.value) & (carry.iterations < cap)

    def iterate(carry):
        def displaced(step):
            loss, gradient = evaluate(trees.add(carry.value, step))
            return loss.astype(dtype), gradient

        here = (displaced, carry.loss, carry.gradient, carry.memory, carry.reach)
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
        probes = jnp.where(is_flat(gradient), carry.probes + 1, 0)
        reason = reason_at(loss, gradient, small, memory, probes)
        iterations, accepted = carry.iterations + 1, carry.accepted + taken.accepted.astype(jnp.int32)
        skipped = carry.skipped + taken.skipped.astype(jnp.int32)
        return Carry(value, loss, gradient, taken.reach, memory, iterations, accepted, skipped, probes, reason)

    loss, gradient = evaluate(start)
    loss = loss.astype(dtype)
    first = jnp.asarray(trees.norm(gradient) if initial_radius is None else initial_radius, dtype)
    zero, memory = jnp.zeros((), jnp.int32), sr1_memory(start, memory_size)
    reach = first if method == "trust_region" else jnp.full((), 0.5, dtype)
    reason = reason_at(loss, gradient, jnp.array(False), memory, zero)
    carry = Carry(start, loss, gradient, reach, memory, zero, zero, zero, zero, reason)
    end = jax.lax.while_loop(running, iterate, carry)
    norm = trees.norm(end.gradient).astype(dtype)
    return MinimizeResult(end.value, end.loss, norm, end.reason, end.iterations, end.accepted, end.skipped, end.memory)


def _has_negative_curvature(memory, scale):
    values = sr1_map(memory, scale).spectrum().values
    return jnp.min(values) < -jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.max(jnp.abs(values))
