"""Preconditioners for the conjugate-gradient solvers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.krylov._scaled_system import wide
from curvax.matrices.linear_map import Diagonal
from curvax.types import PyTree, Scalar


def diagonal_preconditioner(diagonal: PyTree, *, offset: Scalar = 0.0, exponent: Scalar = 0.75) -> Diagonal:
    r"""The map r -> P^{-1} r with P = (diag(d) + kappa I)^xi, taken elementwise.

    An exponent below one makes the preconditioner milder than the estimate of the diagonal, which is noisy. Entries of
    d + kappa below the unit roundoff of their largest count as that, so that P is positive definite whatever d is.
    Source: Martens 2010, section 4.7; Martens 2016, sections 4.9 and 4.11.

    Args:
        diagonal: d, an estimate of the diagonal of the damped matrix that the solver inverts: the diagonal of the
            curvature plus that of all damping and weight decay. A pytree shaped like the right-hand side.
        offset: kappa. Martens takes 0 with Tikhonov damping and about 1e-2 of the mean of the damping matrix's diagonal
            with scale-sensitive damping.
        exponent: xi, from 0 (no preconditioning) to 1.

    Raises:
        TypeError: A leaf of ``diagonal`` is not real floating-point.

    Example:
        >>> curvax.solvers.diagonal_preconditioner(jnp.array([3.0, 15.0]), offset=1.0, exponent=0.5)(jnp.ones(2))
        Array([0.5 , 0.25], dtype=float...)
    """
    trees.check_floating(diagonal, "diagonal")
    diagonal = wide(jax.tree.map(jnp.asarray, diagonal))
    shifted = jax.tree.map(lambda leaf: leaf + jnp.asarray(offset, leaf.dtype), diagonal)
    dtype = trees.wide_dtype(*jax.tree.leaves(shifted))
    # Clipped in front of the maximum, as XLA takes that of a joint vector leaf by leaf again.
    tops = [jnp.max(jnp.maximum(leaf, 0)).astype(dtype) for leaf in jax.tree.leaves(shifted)]
    largest = functools.reduce(jnp.maximum, tops)
    largest = jnp.where(largest > 0, largest, 1)

    def inverse_power(leaf):
        floor = jnp.finfo(leaf.dtype).eps * largest.astype(leaf.dtype)
        return jnp.maximum(leaf, floor) ** -jnp.asarray(exponent, leaf.dtype)

    return Diagonal(jax.tree.map(inverse_power, shifted))
