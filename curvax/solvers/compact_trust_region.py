"""The trust-region problem of a matrix in compact form, solved exactly by matrices as large as its memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.matrices.compact import CompactMap
from curvax.solvers.trust_region import TrustRegionStep, diagonal_trust_region
from curvax.types import PyTree, Scalar


def compact_trust_region(matrix: CompactMap, gradient: PyTree, radius: Scalar) -> TrustRegionStep:
    r"""Minimises g^T p + 1/2 p^T B p over ||p|| <= radius exactly, for B = gamma I + Psi C^{-1} Psi^T, definite or not.

    In an orthonormal basis of the range of Psi and one direction outside of it B is diagonal, so the problem has k + 1
    unknowns whatever the number of parameters; the solution obeys (B + sigma I) p = -g, B + sigma I positive
    semi-definite, sigma >= 0, sigma (||p|| - radius) = 0.

    Args:
        matrix: B, from ``curvax.compact_map`` or a quasi-Newton memory.
        gradient: g, a pytree with the map's structure.
        radius: A positive number.

    Example:
        >>> B = curvax.compact_map(1.0, jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[-0.5]]))     # diag(-1, 1, 1)
        >>> solution = curvax.solvers.compact_trust_region(B, jnp.array([0.0, 4.0, 0.0]), 3.0)
        >>> solution.step[1].item(), solution.multiplier.item(), solution.hard_case.item()
        (-2.0, 1.0, True)

    Source: Brust, Erway and Marcia 2017, after Burdakov, Gong, Yuan and Zikrin 2017.
    """
    trees.check_like(gradient, matrix.structure, "gradient", "the map's vectors")
    spectrum = matrix.spectrum()
    dtype = matrix.scale.dtype

    def project(vector):
        return spectrum.basis.T @ matrix.project(vector)

    def expand(coefficients):
        return matrix.combine(spectrum.basis @ coefficients)

    inside = project(gradient)
    whole = trees.norm(gradient).astype(dtype)
    share = inside / jnp.where(whole > 0, whole, 1)
    length = whole * jnp.sqrt(jnp.maximum(1 - share @ share, 0))

    # What g has outside of the range is (vector - Psi basis part), the vector being g itself ...
    def as_difference():
        return length, gradient, inside

    # ... unless the difference cancels; then it is formed.
    def formed():
        _, outside, length = blocks.split(gradient, project, expand)
        return length.astype(dtype), outside, jnp.zeros_like(inside)

    length, vector, part = jax.lax.cond(length < 0.3 * whole, formed, as_difference)
    has_outside = spectrum.rank < trees.size(gradient)
    length = jnp.where(has_outside & (length > 10 * jnp.finfo(dtype).eps * whole), length, 0)

    values = jnp.append(spectrum.values, spectrum.rest)
    small = diagonal_trust_region(values, jnp.append(inside, length), radius)

    # In the hard case any direction outside of the range will do.
    def any_direction():
        drawn = trees.random_normal(jax.random.key(0), gradient)
        drawn = trees.sub(drawn, expand(project(drawn)))
        return 1 / trees.norm(drawn).astype(dtype), drawn, jnp.zeros_like(inside)

    def own_direction():
        return jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), vector, part

    needed = (length == 0) & (small.step[-1] != 0)
    factor, vector, part = jax.lax.cond(needed, any_direction, own_direction)
    along = factor * small.step[-1]
    step = trees.add(expand(small.step[:-1] - along * part), trees.scale(along, vector))
    return small._replace(step=step, norm=small.norm.astype(dtype))
