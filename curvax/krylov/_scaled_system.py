"""The system A x = b in units in which no inner product over- or underflows, shared by the conjugate-gradient solvers.

Vectors are divided by a power of two near the largest entry of b, which is exact: the iterates for b and for 2^k b have
the same digits. By an entry and not by the length, which takes twice as many reductions: they are most of what there is
to compile of a run. Iterates and residuals are held in float32 or wider, search directions in the dtypes of b, so that
the direction that is multiplied by A is the one that is added to the iterate. Inside a run small leaves are joined to
one vector (``Packing``); the caller's functions see pytrees like b.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.krylov.stop_reasons import StopReason, first_reason
from curvax.packing import Packing, packing_of
from curvax.types import Array, PyTree, Scalar


@dataclasses.dataclass(frozen=True)
class ScaledSystem:
    """``right`` = b / unit, and the products with A and P^{-1} / preconditioner_unit on vectors in these units.

    Vectors are the arrays of ``packing``.
    """

    matvec: Callable[[PyTree], PyTree]
    preconditioner: Callable[[PyTree], PyTree] | None
    like: PyTree
    packing: Packing
    right: PyTree
    unit: Array
    preconditioner_unit: Array

    def multiply(self, direction: PyTree) -> PyTree:
        return product(self.matvec, direction, self.like)

    def probe(self, direction: PyTree) -> Probe:
        product = self.multiply(direction)
        size = trees.units(product)[0]
        scaled = trees.scale(1 / size, product)
        square, slope, length = trees.vdots((scaled, scaled), (direction, scaled), (direction, direction))
        norm = jnp.where(square == 0, 1, jnp.sqrt(square))
        slope = slope / norm
        # A cosine between p and A p below rounding says nothing about its sign. For definite A the cosine is at least
        # 2 / sqrt(condition number), so that this spares all but hopeless systems.
        flat = slope <= jnp.finfo(slope.dtype).eps * jnp.sqrt(length)
        unit_product = trees.scale(1 / norm, scaled)
        norm = size * norm
        return Probe(unit_product, norm, jnp.where(flat, 1, slope), flat)

    def precondition(self, residual: PyTree) -> PyTree:
        if self.preconditioner is None:
            return residual
        preconditioned = product(self.preconditioner, residual, self.like)
        return trees.scale(1 / self.preconditioner_unit, preconditioned)

    def descent(self, preconditioned: PyTree, factor: Array, direction: PyTree) -> PyTree:
        """-y + factor * p, in the dtypes of b."""
        return narrow(trees.add_scaled(trees.scale(-1.0, preconditioned), factor, direction), self.like)

    def outward(self, vector: PyTree) -> PyTree:
        """A vector in the units of the caller and the dtypes of b, packed."""
        return narrow(trees.scale(self.unit, vector), self.like)


class Probe(NamedTuple):
    """A p = ``norm * unit_product``, the slope p^T A p / norm, and whether p is flat: without positive curvature.

    The slope of a flat direction is 1.
    """

    unit_product: PyTree
    norm: Array
    slope: Array
    flat: Array


def scaled_system(matvec, b, x0, preconditioner) -> tuple[ScaledSystem, PyTree, PyTree]:
    """The system, and x_0 and r_0 = A x_0 - b in its units; x_0 is zero where b is zero or ``x0`` is not finite."""
    trees.check_floating(b, "b")
    b = jax.tree.map(jnp.asarray, b)
    if x0 is not None:
        trees.check_like(x0, b, "x0", "b")
        x0 = narrow(jax.tree.map(jnp.asarray, x0), b)
    packing = packing_of(b)
    b, matvec = packing.pack(b), packing.inside(matvec, "matvec")
    if preconditioner is not None:
        preconditioner = packing.inside(preconditioner, "preconditioner")
    right = wide(b)
    downhill = trees.scale(-1.0, right)
    if x0 is None:
        start, residual = trees.zeros_like(right), downhill
        size = residual_size = trees.largest(right)
    else:
        start = wide(packing.pack(x0))
        residual = trees.sub(product(matvec, start, b), right)
        size, start_size, residual_size = trees.largests(right, start, residual)
        useful = (size > 0) & jnp.isfinite(start_size)
        start, residual = trees.where(useful, (start, residual), (trees.zeros_like(start), downhill))
        residual_size = jnp.where(useful, residual_size, size)
    unit = power_of_two(jnp.maximum(size, residual_size))

    def inward(vector):
        return jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), vector)

    residual = inward(residual)
    preconditioner_unit = jnp.ones_like(unit)
    if preconditioner is not None:
        image = product(preconditioner, residual, b)
        preconditioner_unit = power_of_two(trees.largest(image)) / power_of_two(residual_size / unit)
    system = ScaledSystem(
        matvec, preconditioner, trees.structure_of(b), packing, inward(right), unit, preconditioner_unit
    )
    return system, inward(start), residual


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        threshold: Of |r|, below which the run ends.
        residual_norm: |r_0|.
        model_value: q(x_0).
        descent: r_0^T P^{-1} r_0.
        direction: -P^{-1} r_0.
        reason: The reason to end at once, if there is one.
    """

    threshold: Array
    residual_norm: Array
    model_value: Array
    descent: Array
    direction: PyTree
    reason: Array


def start_of_run(system: ScaledSystem, x: PyTree, residual: PyTree, tolerance: Scalar) -> Start:
    """The start at x_0 with residual r_0; the run is to end at |r| <= tolerance |b|."""
    preconditioned = system.precondition(residual)
    right = system.right
    squares = (right, right), (residual, residual)
    sums = trees.vdots(*squares, (trees.sub(residual, right), x), (residual, preconditioned))
    (length, residual_norm), (model_value, descent) = jnp.sqrt(sums[:2]), sums[2:]
    model_value, threshold = 0.5 * model_value, jnp.asarray(tolerance, length.dtype) * length
    reason = first_reason(
        (~jnp.isfinite(residual_norm + model_value), StopReason.NON_FINITE),
        (residual_norm <= threshold, StopReason.CONVERGED),
        (~jnp.isfinite(descent), StopReason.NON_FINITE),
        (descent <= 0, StopReason.BREAKDOWN),
    )
    direction = narrow(trees.scale(-1.0, preconditioned), system.like)
    return Start(threshold, residual_norm, model_value, descent, direction, reason)


def product(function, vector, like) -> PyTree:
    """``function(vector)``, called in the dtypes of ``like`` and returned in float32 or wider."""
    return wide(function(narrow(vector, like)))


wide, narrow = trees.widened, trees.cast_like


def power_of_two(value: Array) -> Array:
    """The power of two just below a positive number; 1 for zero and for what is not finite."""
    unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(value, unsigned)
    exponent_bits = jax.lax.bitcast_convert_type(jnp.full_like(value, jnp.inf), unsigned)
    power = jax.lax.bitcast_convert_type(bits & exponent_bits, value.dtype)
    return jnp.where((power > 0) & (power < jnp.inf), power, 1)
