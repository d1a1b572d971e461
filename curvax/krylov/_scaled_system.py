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
        norm = trees.norm(product)
        norm = jnp.where(norm == 0, 1, norm)
        unit_product = trees.scale(1 / norm, product)
        slope = trees.vdot(direction, unit_product)
        # A cosine between p and A p below rounding says nothing about its sign. For definite A the cosine is at least
        # 2 / sqrt(condition number), so that this spares all but hopeless systems.
        flat = slope <= jnp.finfo(slope.dtype).eps * jnp.sqrt(trees.vdot(direction, direction))
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
    size = trees.largest(right)
    if x0 is None:
        start, residual = trees.zeros_like(right), trees.scale(-1.0, right)
    else:
        start = wide(packing.pack(x0))
        start = trees.where((size > 0) & trees.all_finite(start), start, trees.zeros_like(start))
        residual = trees.sub(product(matvec, start, b), right)
    residual_size = size if x0 is None else trees.largest(residual)
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


def start_of_run(system: ScaledSystem, residual: PyTree, model_value: Scalar, threshold: Array):
    """What a run begins with: |r_0|, r_0^T P^{-1} r_0, the direction -P^{-1} r_0, and the reason to end at once."""
    preconditioned = system.precondition(residual)
    descent = trees.vdot(residual, preconditioned)
    residual_norm = jnp.sqrt(trees.vdot(residual, residual))
    reason = first_reason(
        (~jnp.isfinite(residual_norm + model_value), StopReason.NON_FINITE),
        (residual_norm <= threshold, StopReason.CONVERGED),
        (~jnp.isfinite(descent), StopReason.NON_FINITE),
        (descent <= 0, StopReason.BREAKDOWN),
    )
    return residual_norm, descent, narrow(trees.scale(-1.0, preconditioned), system.like), reason


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
