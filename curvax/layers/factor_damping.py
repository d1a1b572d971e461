"""Factored Tikhonov damping of Kronecker factors, and the size of the curvature that it is measured by."""

from __future__ import annotations

import jax.numpy as jnp

from curvax.layers.factors import KroneckerFactors, diagonals_of
from curvax.layers.find import Layers
from curvax.types import Array, Scalar


def damped_factors(inputs: Array, outputs: Array, gamma: Scalar, *, balanced: bool = True) -> tuple[Array, Array]:
    r"""(A + pi gamma I, G + gamma / pi I) with pi^2 the ratio of the mean eigenvalues of A and G; factored Tikhonov.

    Their product is A (x) G + gamma^2 I and two cross terms, which this pi keeps smallest in the trace norm. Factors
    are as in ``KroneckerFactors``; of a factor without trace pi is 1. Damping that is lost in the rounding of a factor
    is raised to 32 eps n^{1/2} times the mean eigenvalue, or a singular factor would have no inverse, or one of noise.

    Args:
        gamma: The square root of the damping, of lambda and the penalty's strength.
        balanced: False for pi = 1, as in Heskes 2000.

    Example:
        >>> A, G = curvax.layers.damped_factors(jnp.full((1, 1, 1), 4.0), jnp.full((1, 1, 1), 1.0), 1.0)
        >>> A.item(), G.item()
        (6.0, 1.5)

    Source: Martens 2016, eq. 6.7.
    """
    pi = damping_ratio(inputs, outputs)
    pi = pi if balanced else jnp.ones_like(pi)
    gamma = jnp.asarray(gamma).astype(pi.dtype)
    return _damped(inputs, pi * gamma), _damped(outputs, gamma / pi)


def _damped(factor, damping):
    least = 32 * factor.shape[-1] ** 0.5 * jnp.finfo(factor.dtype).eps * mean_eigenvalue(factor)
    return add_to_diagonal(factor, jnp.maximum(damping, least))


def damping_ratio(inputs: Array, outputs: Array) -> Array:
    """pi of ``damped_factors`` for each of the matrices of a block."""
    a, g = mean_eigenvalue(inputs), mean_eigenvalue(outputs)
    known = (a > 0) & (g > 0)
    return jnp.where(known, jnp.sqrt(jnp.where(known, a, 1) / jnp.where(known, g, 1)), 1)


def mean_eigenvalue(factor: Array) -> Array:
    """The trace over the size, for each matrix; of a diagonal factor too."""
    return jnp.mean(diagonals_of(factor), axis=-1)


def mean_curvature(layers: Layers, factors: KroneckerFactors) -> Array:
    """The mean eigenvalue of the curvature on the parameters that have one, blocks and diagonals."""
    treatment, total = layers.treatment, jnp.zeros(())
    for block, *sides in zip(treatment.kronecker, factors.inputs, factors.outputs, strict=True):
        a, g = map(diagonals_of, sides)
        products = jnp.sum(a, 1) * jnp.sum(g, 1)
        if block.squares is not None:  # the trace of L^T (A (x) G) L
            products = jnp.einsum("bi,bio,bo->b", a, jnp.asarray(block.squares, a.dtype), g)
        total = total + jnp.sum(products).astype(total.dtype)
    for diagonal, covered in zip(factors.diagonals, treatment.covered, strict=True):
        own = diagonal if covered is None else jnp.where(covered, 0, diagonal)
        total = total + jnp.sum(own).astype(total.dtype)
    return total / max(treatment.dimensions, 1)


def add_to_diagonal(factor: Array, scalars: Array) -> Array:
    """A + s I, for each matrix."""
    if factor.ndim == 2:
        return factor + scalars[:, None]
    return factor + scalars[:, None, None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)[None]
