"""The trust-region problem solved exactly by an eigendecomposition (More and Sorensen 1983; Martens 2016, 4.6.6)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.matrices.compact import CompactMap
from curvax.types import Array, PyTree, Scalar


class TrustRegionStep(NamedTuple):
    """The solution of a trust-region problem.

    Attributes:
        step: p, like the gradient.
        norm: ||p||.
        multiplier: sigma >= 0 with (B + sigma I) p = -g; zero where p is inside the region.
        hard_case: Whether g has no component along the lowest eigenvectors of an indefinite B, so that the equation for
            sigma leaves p short of the boundary and a lowest eigenvector fills the rest: one solution of several.
        model_value: g^T p + 1/2 p^T B p.
    """

    step: PyTree
    norm: Array
    multiplier: Array
    hard_case: Array
    model_value: Array


def dense_trust_region(matrix: Array, gradient: Array, radius: Scalar) -> TrustRegionStep:
    r"""Minimises g^T p + 1/2 p^T B p over ||p|| <= radius exactly, for any symmetric B, definite or not.

    The solution is the one with (B + sigma I) p = -g, B + sigma I positive semi-definite, sigma >= 0 and
    sigma (||p|| - radius) = 0: Tikhonov damping of strength sigma. Source: More and Sorensen 1983; Martens 2016,
    section 4.6.6.

    Args:
        matrix: B, symmetric, shape (n, n).
        radius: A positive number.

    Raises:
        ValueError: The shapes do not fit each other.

    Example:
        >>> solution = curvax.solvers.dense_trust_region(jnp.diag(jnp.array([-1.0, 2.0])), jnp.array([0.0, 3.0]), 2.0)
        >>> solution.hard_case.item(), solution.multiplier.item(), solution.step[1].item()
        (True, 1.0, -1.0)
    """
    if gradient.ndim != 1 or matrix.shape != gradient.shape * 2:
        raise ValueError(
            f"matrix has shape {matrix.shape} and gradient {gradient.shape}; they must be (n, n) and (n,);"
            " pytrees become vectors by curvax.trees.ravel and maps matrices by to_dense()"
        )
    dtype = trees.wide_dtype(matrix, gradient)
    values, vectors = jnp.linalg.eigh(matrix.astype(dtype))
    precision = jax.lax.Precision.HIGHEST
    solution = diagonal_trust_region(values, jnp.matmul(gradient.astype(dtype), vectors, precision=precision), radius)
    return solution._replace(step=jnp.matmul(vectors, solution.step, precision=precision))


def diagonal_trust_region(eigenvalues: Array, gradient: Array, radius: Scalar) -> TrustRegionStep:
    r"""``dense_trust_region`` for a diagonal B; gradient and step are their components along the eigenvectors.

    sigma is the root of 1/||p(sigma)|| = 1/radius with p_i(sigma) = -g_i / (lambda_i + sigma). It is sought as
    s = sigma + lambda_min, which keeps its digits near the hard case, by Newton's method from below, from where the
    concave left side makes it converge monotonically. Source: More and Sorensen 1983, section 3.

    Args:
        eigenvalues: lambda, shape (n,), in any order.
        radius: A positive number.


    Example:
        >>> curvax.solvers.diagonal_trust_region(jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0]), 1.0).multiplier.item()
        2.0
    """
    dtype = trees.wide_dtype(eigenvalues, gradient)
    radius = jnp.asarray(radius, dtype)
    # In units of the radius and of the largest |eigenvalue|, every threshold below is relative.
    unit = jnp.max(jnp.abs(eigenvalues.astype(dtype)))
    unit = jnp.where(unit > 0, unit, 1)
    values, slopes = eigenvalues.astype(dtype) / unit, gradient.astype(dtype) / unit / radius
    rounding = 10 * eigenvalues.size * jnp.finfo(dtype).eps

    # With s = sigma + lambda_min the denominators are gap_i + s, so that s keeps its digits where sigma is close to
    # -lambda_min. Were they lambda_i + sigma, the step along the lowest eigenvectors would cancel there.
    lowest = jnp.min(values)
    gaps = values - lowest
    in_lowest = gaps <= rounding
    of_lowest = jnp.where(in_lowest, slopes, 0)
    rest = _solved(jnp.where(in_lowest, 0, slopes), jnp.where(in_lowest, 1, gaps))
    newton_step = _solved(slopes, values)
    # Together, as one norm has as much to compile as five.
    vectors = slopes, of_lowest, jnp.where(gaps == 0, slopes, 0), rest, newton_step
    whole_slope, lowest_slope, pole, rest_norm, newton_norm = trees.norms(*vectors)
    # Nothing of g along the lowest eigenvectors and p(s = 0) short of the boundary: the secular equation has no root
    # s > 0. If lambda_min < 0, p = p(0) + tau z with any lowest z and tau^2 = 1 - ||p(0)||^2 solves the problem with
    # sigma = -lambda_min, for either sign of tau; the one chosen goes down what slope rounding has left. If
    # lambda_min = 0, p(0) does, with sigma = 0.
    degenerate = (lowest <= rounding) & (lowest_slope <= rounding * whole_slope) & (rest_norm < 1)
    hard_case = degenerate & (lowest < -rounding)
    first_lowest = jnp.arange(values.size) == jnp.argmin(values)
    fill = jnp.sqrt(jnp.maximum(1 - rest_norm**2, 0)) * jnp.where(slopes > 0, -1, 1).astype(dtype)
    degenerate_step = rest + jnp.where(hard_case & first_lowest, fill, 0)

    inside = (lowest > 0) & (newton_norm <= 1)
    # ||p(s)|| >= |g_lowest| / s is a lower bound.
    shift = _boundary_shift(slopes, gaps, jnp.maximum(jnp.maximum(lowest, 0), pole))
    boundary_step = _solved(slopes, gaps + shift)

    step = jnp.where(inside, newton_step, jnp.where(degenerate, degenerate_step, boundary_step))
    sigma = jnp.where(inside, 0, jnp.where(degenerate, jnp.maximum(-lowest, 0), shift - lowest))
    model_value = jnp.sum(slopes * step) + 0.5 * jnp.sum(values * step**2)
    norm, model_value = trees.norm(step) * radius, model_value * unit * radius * radius
    return TrustRegionStep(step * radius, norm, sigma * unit, hard_case & ~inside, model_value)


def compact_trust_region(matrix: CompactMap, gradient: PyTree, radius: Scalar) -> TrustRegionStep:
    r"""Minimises g^T p + 1/2 p^T B p over ||p|| <= radius exactly, for B = gamma I + Psi C^{-1} Psi^T, definite or not.

    In an orthonormal basis of the range of Psi and one direction outside of it B is diagonal, so the problem has k + 1
    unknowns whatever the number of parameters; the conditions are those of ``dense_trust_region``.

    Example:
        >>> B = curvax.compact_map(1.0, jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[-0.5]]))     # diag(-1, 1, 1)
        >>> solution = jax.jit(curvax.solvers.compact_trust_region)(B, jnp.array([0.0, 4.0, 0.0]), 3.0)
        >>> solution.step[1].item(), solution.multiplier.item(), solution.hard_case.item()
        (-2.0, 1.0, True)

    Source: Brust, Erway and Marcia 2017, after Burdakov, Gong, Yuan and Zikrin 2017.
    """
    trees.check_like(gradient, matrix.structure, "gradient", "the map's vectors")
    spectrum = matrix.spectrum()
    dtype = matrix.scale.dtype

    def project(vector):
        return jnp.matmul(spectrum.basis.T, matrix.project(vector), precision="highest")

    def expand(coefficients):
        return matrix.combine(jnp.matmul(spectrum.basis, coefficients, precision="highest"))

    inside = project(gradient)
    whole = trees.norm(gradient).astype(dtype)
    share = inside / jnp.where(whole > 0, whole, 1)
    length = whole * jnp.sqrt(jnp.maximum(1 - share @ share, 0))
    has_outside = spectrum.rank < trees.size(gradient)
    rounding = 10 * jnp.finfo(dtype).eps * whole

    # What g has outside of the range is a difference, of g itself and Psi basis inside ...
    def as_difference():
        return length, jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), gradient, inside

    # ... unless that cancels; then it is formed, by two projections: one leaves rounding of the size of g along Psi.
    # Where nothing is left, any direction outside will do, which the hard case asks for.
    def formed():
        def outside(count, carry):
            vector, length, size = carry
            vector = trees.where((count == 2) & (length <= rounding), jax.tree.map(_scattered, gradient), vector)
            vector = trees.sub(vector, expand(project(vector)))
            size = trees.norm(vector).astype(dtype)
            return vector, jnp.where(count < 2, size, length), size

        vector, length, size = jax.lax.fori_loop(0, 4, outside, (gradient, whole, whole))
        return length, 1 / jnp.where(size > 0, size, 1), vector, jnp.zeros_like(inside)

    length, factor, vector, part = jax.lax.cond(length <= 0.3 * whole, formed, as_difference)
    length = jnp.where(has_outside & (length > rounding), length, 0)

    values = jnp.append(spectrum.values, spectrum.rest)
    small = diagonal_trust_region(values, jnp.append(inside, length), radius)
    along = factor * small.step[-1]
    step = trees.add(expand(small.step[:-1] - along * part), trees.scale(along, vector))
    return small._replace(step=step, norm=small.norm.astype(dtype))


def _scattered(leaf):
    """Entries of a fixed vector without pattern between -1 and 1: a draw of noise has far more to compile."""
    numbers = jnp.arange(leaf.size, dtype=jnp.uint32) * jnp.uint32(2654435769) + jnp.uint32(leaf.size)
    mixed = (numbers ^ (numbers >> 15)) * jnp.uint32(2246822519)
    return ((mixed >> 9).astype(jnp.float32) / 2**22 - 1).astype(leaf.dtype).reshape(leaf.shape)


def _solved(slopes, curvatures):
    """-g_i / d_i, where zero over zero is zero."""
    return -slopes / jnp.where((slopes == 0) & (curvatures == 0), 1, curvatures)


def _boundary_shift(slopes, gaps, lower):
    """The s >= ``lower`` with ||g / (gaps + s)|| = 1, from that lower bound upwards."""

    # Newton's method goes for 1/||p(s)|| = 1, which is nearly linear where ||p(s)|| has a pole: s+ = s + (||p|| - 1) /
    # (d^T (D + s)^{-1} d), d = p / ||p||. The left side is concave: no step leads past the root from below, and the
    # first that does not lead upwards is rounding.
    def improve(carry):
        count, shift, _ = carry
        step = _solved(slopes, gaps + shift)
        length = trees.norm(step)
        direction = step / jnp.where(length > 0, length, 1)
        change = (1 - length) / jnp.sum(direction * _solved(direction, gaps + shift))
        raised = shift + change
        return count + 1, jnp.where(raised > shift, raised, shift), raised > shift

    def running(carry):
        count, _, raised = carry
        return raised & (count < 100)

    return jax.lax.while_loop(running, improve, (0, lower, jnp.array(True)))[1]
