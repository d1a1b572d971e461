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
        unit = power_of_two(trees.units(product)[0])
        scaled = trees.scale(1 / unit, product)
        square, slope, length = trees.vdots((scaled, scaled), (direction, scaled), (direction, direction))
        norm = jnp.where(square == 0, 1, jnp.sqrt(square))
        slope = slope / norm
        # A cosine between p and A p below rounding says nothing about its sign. For definite A the cosine is at least
        # 2 / sqrt(condition number), so that this spares all but hopeless systems.
        flat = slope <= jnp.finfo(slope.dtype).eps * jnp.sqrt(length)
        return Probe(scaled, unit, norm, jnp.where(flat, 1, slope), flat)

    def precondition(self, residual: PyTree) -> PyTree:
        if self.preconditioner is None:
            return residual
        preconditioned = product(self.preconditioner, residual, self.like)
        return trees.scale(1 / self.preconditioner_unit, preconditioned)

    def descent(self, preconditioned: PyTree, unit: Scalar, factor: Array, direction: PyTree) -> PyTree:
        """-y / unit + factor * p, in the dtypes of b."""
        return narrow(trees.add_scaled(trees.scale(-1 / unit, preconditioned), factor, direction), self.like)

    def outward(self, vector: PyTree) -> PyTree:
        """A vector in the units of the caller and the dtypes of b, packed."""
        return narrow(trees.scale(self.unit, vector), self.like)


class Probe(NamedTuple):
    """A p = ``unit * product`` with a power of two, ``norm`` of that product, and the slope p^T A p / |A p|.

    The slope of a flat direction, one without positive curvature, is 1.
    """

    product: PyTree
    unit: Array
    norm: Array
    slope: Array
    flat: Array


class WarmStart(NamedTuple):
    """A point x_0 to start from, packed, which is ``stride * direction`` in the units of the system.

    It is not ``useful``, and replaced by zero, where it is zero or not finite, or where b is.
    """

    x0: PyTree
    direction: PyTree
    stride: Array
    useful: Array


def scaled_system(matvec, b, preconditioner, x0=None) -> tuple[ScaledSystem, WarmStart | None]:
    """The system, in units of b, and a start in them."""
    trees.check_floating(b, "b")
    b = jax.tree.map(jnp.asarray, b)
    if x0 is not None:
        trees.check_like(x0, b, "x0", "b")
        x0 = narrow(jax.tree.map(jnp.asarray, x0), b)
    packing = packing_of(b)
    b, matvec = packing.pack(b), packing.inside(matvec, "matvec")
    x0 = None if x0 is None else packing.pack(x0)
    right = wide(b)
    size, *others = trees.largests(right) if x0 is None else trees.largests(right, x0)
    unit = power_of_two(size)
    right = jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), right)
    preconditioner_unit = jnp.ones_like(unit)
    if preconditioner is not None:
        preconditioner = packing.inside(preconditioner, "preconditioner")
        image = product(preconditioner, right, b)
        preconditioner_unit = power_of_two(trees.largest(image)) / power_of_two(size / unit)
    system = ScaledSystem(matvec, preconditioner, trees.structure_of(b), packing, right, unit, preconditioner_unit)
    if x0 is None:
        return system, None
    (x0_size,) = others
    useful = (x0_size > 0) & jnp.isfinite(x0_size) & (size > 0) & jnp.isfinite(size)
    x0, x0_unit = trees.where(useful, x0, trees.zeros_like(x0)), power_of_two(x0_size)
    return system, WarmStart(x0, trees.scale(1 / x0_unit, x0), x0_unit / unit, useful)


class Start(NamedTuple):
    """What a run from zero begins with.

    Attributes:
        threshold: Of |r|, below which the run ends.
        residual: r_0 = -b.
        residual_norm: |r_0|.
        descent: r_0^T P^{-1} r_0, likewise.
        direction: -P^{-1} r_0, in units of the preconditioner.
        reason: The reason to end at once, if there is one.
    """

    threshold: Array
    residual: PyTree
    residual_norm: Array
    descent: Array
    direction: PyTree
    reason: Array


def start_of_run(system: ScaledSystem, tolerance: Scalar) -> Start:
    """The start at zero of a run that is to end at |r| <= tolerance |b|."""
    downhill = system.precondition(system.right)
    square, descent = trees.vdots((system.right, system.right), (system.right, downhill))
    length = jnp.sqrt(square)
    threshold = jnp.asarray(tolerance, length.dtype) * length
    reason = first_reason(
        (~jnp.isfinite(length), StopReason.NON_FINITE),
        (length <= threshold, StopReason.CONVERGED),
        (~jnp.isfinite(descent), StopReason.NON_FINITE),
        (descent <= 0, StopReason.BREAKDOWN),
    )
    residual = trees.scale(-1.0, system.right)
    return Start(threshold, residual, length, descent, narrow(downhill, system.like), reason)


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
