"""Minimisation of plain functions by L-SR1 in one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_at_least, check_choice
from curvax.damping.rules import RadiusRule
from curvax.krylov.stop_reasons import Reason
from curvax.quasi_newton.sr1 import SR1Memory, sr1_map, sr1_memory
from curvax.quasi_newton.steps import line_search_step, trust_region_step
from curvax.types import Array, PyTree, Scalar


class MinimizeReason(Reason):
    """Why ``minimize`` stopped; ``MinimizeReason(int(reason)).text`` reads aloud."""

    MAX_ITERATIONS = 0, "the maximum number of iterations was taken"
    GRADIENT = 1, "the gradient is within the tolerance"
    SMALL_STEP = 2, "no step that lowers the function is longer than rounding"
    NON_FINITE = 3, "the function or its gradient at the start is not finite"


class MinimizeResult(NamedTuple):
    """What ``minimize`` returns: x, f(x), ||grad f(x)||, a ``MinimizeReason``, and the memory at the end."""

    value: PyTree
    function_value: Array
    gradient_norm: Array
    reason: Array
    iterations: Array  # steps tried
    accepted: Array  # steps taken
    skipped_pairs: Array  # pairs that were left out of the memory
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
    Source: Ramamurthy and Duffy 2017, algorithms 1 and 2.

    Args:
        method: "trust_region" (algorithm 1) or "line_search" (algorithm 2).
        scale: gamma of B_0 = gamma I; the line search starts from H_0 = I / gamma.
        initial_radius: The first radius; ||grad f(x_0)|| by default.
        tolerance: The norm of the gradient to stop at.

    Example:
        >>> def saddle(x):                                                    # stationary at 0, minima at x[1] = -1, 1
        ...     return x[0] ** 2 / 2 + x[1] ** 4 / 4 - x[1] ** 2 / 2
        >>> result = curvax.quasi_newton.minimize(saddle, jnp.array([1.0, 1e-5]), tolerance=1e-4)
        >>> curvax.quasi_newton.MinimizeReason(int(result.reason)).text
        'the gradient is within the tolerance'
        >>> bool(abs(abs(result.value[1]) - 1) < 1e-3)
        True
    """
    check_choice("method", method, ("trust_region", "line_search"))
    cap = check_at_least("max_iterations", max_iterations, 0)
    start = trees.floating_arrays(start, "start")
    rule, dtype = RadiusRule(), trees.wide_dtype(*jax.tree.leaves(start))
    evaluate = jax.value_and_grad(function)

    def result_at(value, loss, gradient, small_step, counts: tuple[Array, Array, Array], memory, probes):
        norm = trees.norm(gradient).astype(dtype)
        flat = norm <= jnp.asarray(tolerance, dtype)
        # How many steps it is since the gradient came within the tolerance.
        probes = jnp.where(flat, probes + 1, 0)
        indefinite = _has_negative_curvature(memory, scale) & (probes < 20) & (method == "trust_region")
        reason = jnp.where(small_step, MinimizeReason.SMALL_STEP.value, MinimizeReason.MAX_ITERATIONS.value)
        reason = jnp.where(flat & ~indefinite, MinimizeReason.GRADIENT.value, reason)
        reason = jnp.where(trees.all_finite(loss, gradient), reason, MinimizeReason.NON_FINITE.value)
        return MinimizeResult(value, loss, norm, reason.astype(jnp.int32), *counts, memory), gradient, probes

    def running(carry):
        (at, _, _), _ = carry
        return (at.reason == MinimizeReason.MAX_ITERATIONS.value) & (at.iterations < cap)

    def iterate(carry):
        (at, gradient, probes), reach = carry

        def displaced(step):
            loss, gradient = evaluate(trees.add(at.value, step))
            return loss.astype(dtype), gradient

        here = (displaced, at.function_value, gradient, at.memory, reach)
        if method == "trust_region":
            taken = trust_region_step(*here, scale=scale, rule=rule)
        else:
            taken = line_search_step(*here, scale=scale)
        there = trees.add(at.value, taken.step), taken.new_loss, taken.new_gradient
        value, loss, new_gradient = trees.where(taken.accepted, there, (at.value, at.function_value, gradient))
        shortest = jnp.finfo(dtype).eps * (1 + trees.norm(at.value).astype(dtype))
        small = ~taken.accepted & (taken.step_norm <= shortest)
        # A long step from a saddle may end where the function curves upwards, which says nothing about the saddle.
        forget = (probes > 0) & ~taken.accepted
        memory = trees.where(forget, at.memory, taken.memory)
        accepted, skipped = (flag.astype(jnp.int32) for flag in (taken.accepted, taken.skipped))
        counts = at.iterations + 1, at.accepted + accepted, at.skipped_pairs + skipped
        return result_at(value, loss, new_gradient, small, counts, memory, probes), taken.reach

    loss, gradient = evaluate(start)
    first = jnp.asarray(trees.norm(gradient) if initial_radius is None else initial_radius, dtype)
    reach = first if method == "trust_region" else jnp.full((), 0.5, dtype)
    zero, memory = jnp.zeros((), jnp.int32), sr1_memory(start, memory_size)
    origin = result_at(start, loss.astype(dtype), gradient, jnp.array(False), (zero, zero, zero), memory, zero - 1)
    return jax.lax.while_loop(running, iterate, (origin, reach))[0][0]


def _has_negative_curvature(memory, scale):
    values = sr1_map(memory, scale).spectrum().values
    return jnp.min(values) < -jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.max(jnp.abs(values))
