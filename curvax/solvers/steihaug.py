"""Conjugate gradients inside a ball or an ellipsoid (Toint 1981, Steihaug 1983; Martens 2016, section 4.6.6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_at_least
from curvax.krylov._scaled_system import narrow, scaled_system, start_of_run
from curvax.krylov.stop_reasons import StopReason, first_reason
from curvax.types import Array, PyTree, Scalar


class SteihaugResult(NamedTuple):
    """What ``steihaug`` returns; the step x is finite whatever happened.

    Attributes:
        reason: A ``StopReason`` code: CONVERGED and MAX_ITERATIONS in the interior, BOUNDARY and NEGATIVE_CURVATURE on
            the boundary.
        iterations: The number of steps taken, the one to the boundary included.
        negative_curvature: Whether the last step followed a direction without positive curvature.
        norm: ||x||_P.
        residual_norm: |A x - b|, by the recurrence.
        model_value: q(x) = 1/2 x^T A x - b^T x.
    """

    value: PyTree
    reason: Array
    iterations: Array
    on_boundary: Array
    negative_curvature: Array
    norm: Array
    residual_norm: Array
    model_value: Array


def steihaug(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    *,
    radius: Scalar,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
    max_iterations: Scalar,
    tolerance: Scalar,
) -> SteihaugResult:
    r"""Approximately minimises q(x) = 1/2 x^T A x - b^T x over ||x||_P <= radius by truncated conjugate gradients.

    Conjugate gradients from zero, along which ||x||_P grows, until the next iterate would leave the region or a
    direction without positive curvature shows; then on along that direction to the boundary. A may be indefinite. For
    positive semi-definite A the decrease is at least half of what the exact solution of the trust-region problem
    attains, provided the run is not cut short by ``tolerance`` or ``max_iterations`` (Yuan 2000). Source: Steihaug
    1983; Martens 2016, section 4.6.6.

    Args:
        matvec: v -> A v, linear and symmetric; a ``LinearMap`` or any function of a pytree shaped like b.
        b: The right-hand side, minus the gradient in a trust-region method; a pytree of floating-point arrays.
        radius: r > 0, finite.
        preconditioner: r -> P^{-1} r with P symmetric positive definite. It sets the shape of the region,
            ||x||_P = sqrt(x^T P x), which is tracked without products with P. None: the Euclidean ball.
        tolerance: Stop when |A x - b| <= tolerance * |b|.


    Raises:
        TypeError: A leaf of b is not real floating-point.
        ValueError: A product differs from b in structure or shape, or ``max_iterations`` is below 1.

    Example:
        >>> A = jnp.diag(jnp.array([1.0, -2.0]))
        >>> result = curvax.solvers.steihaug(lambda v: A @ v, jnp.ones(2), radius=3.0, max_iterations=9, tolerance=1e-8)
        >>> result.on_boundary.item(), result.negative_curvature.item(), round(result.norm.item(), 6)
        (True, True, 3.0)
    """
    cap = check_at_least("max_iterations", max_iterations, 1)
    system, _ = scaled_system(matvec, b, preconditioner)
    dtype, root = system.unit.dtype, jnp.sqrt(system.preconditioner_unit)
    start = start_of_run(system, tolerance)
    # x is held in units of the radius, so that neither a tiny nor a huge one is lost in the squares.
    limit = jnp.asarray(radius, dtype) * root
    x_unit = jnp.minimum(limit, system.unit / jnp.finfo(dtype).eps ** 2)
    limit_squared = (limit / x_unit) ** 2
    reach = x_unit / system.unit

    def step(state):
        p = state.direction
        product, unit, norm, slope, flat = system.probe(p)
        length = state.descent / slope / norm * (1 / unit) / reach
        inside = ~flat & (state.xx + length * (2 * state.xp + length * state.pp) < limit_squared)
        room = limit_squared - state.xx
        to_boundary = room / (state.xp + jnp.sqrt(state.xp**2 + state.pp * room))
        length = jnp.where(inside, length, to_boundary)

        x = trees.add_scaled(state.x, length, p)
        residual = trees.add_scaled(state.residual, length * reach * unit, product)
        residual_norm = trees.norm(residual)
        preconditioned = system.precondition(residual)
        descent = trees.vdot(residual, preconditioned)
        factor = descent / state.descent
        direction = system.descent(preconditioned, 1, factor, p)
        if preconditioner is None:
            image = None
            xx, xp, pp = trees.vdots((x, x), (x, direction), (direction, direction))
        else:
            image = trees.add_scaled(trees.scale(-1.0, residual), factor, state.image)
            xx = state.xx + length * (2 * state.xp + length * state.pp)
            xp, pp = trees.vdots((x, image), (direction, image))

        verdict = first_reason(
            (~jnp.isfinite(norm + residual_norm), StopReason.NON_FINITE),
            (flat, StopReason.NEGATIVE_CURVATURE),
            (~inside, StopReason.BOUNDARY),
            (residual_norm <= start.threshold, StopReason.CONVERGED),
            (~jnp.isfinite(descent), StopReason.NON_FINITE),
            (descent <= 0, StopReason.BREAKDOWN),
        )
        iteration = state.iteration + 1
        after = _State(iteration, verdict, x, residual, residual_norm, direction, image, descent, xx, xp, pp)
        taken = jnp.isfinite(norm + residual_norm)
        return trees.where(taken, after, state._replace(reason=verdict))

    def running(state):
        return (state.reason == StopReason.MAX_ITERATIONS) & (state.iteration < cap)

    state = jax.lax.while_loop(running, step, _start(system, start))
    negative = state.reason == StopReason.NEGATIVE_CURVATURE
    return SteihaugResult(
        value=system.packing.unpack(narrow(trees.scale(x_unit, state.x), system.like)),
        reason=state.reason,
        iterations=state.iteration,
        on_boundary=negative | (state.reason == StopReason.BOUNDARY),
        negative_curvature=negative,
        norm=jnp.sqrt(state.xx) * x_unit / root,
        residual_norm=state.residual_norm * system.unit,
        model_value=0.5 * trees.vdot(trees.sub(state.residual, system.right), state.x) * x_unit * system.unit,
    )


class _State(NamedTuple):
    iteration: Array
    reason: Array
    x: PyTree
    residual: PyTree
    residual_norm: Array
    direction: PyTree
    image: PyTree  # P p, or None where P = I
    descent: Array  # r^T P^{-1} r
    xx: Array  # x^T P x
    xp: Array  # x^T P p
    pp: Array  # p^T P p


def _start(system, start):
    image = None if system.preconditioner is None else system.right
    none, iteration = jnp.zeros_like(start.descent), jnp.zeros((), jnp.int32)
    run = start.residual, start.residual_norm, start.direction, image, start.descent
    return _State(iteration, start.reason, trees.zeros_like(system.right), *run, none, none, start.descent)
