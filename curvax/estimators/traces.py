"""Traces from products alone: Hutchinson, Hutch++, XTrace, and trace f(A) by stochastic Lanczos quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.checks import check_at_least
from curvax.krylov import _wide as wide
from curvax.krylov.functions import TraceEstimate, mean_of_samples, slq_trace
from curvax.matrices.linear_map import LinearMap, Noise
from curvax.types import Array, Scalar


def hutchinson_trace(
    linear_map: LinearMap, key: Array, *, num_samples: int, distribution: Noise = trees.random_rademacher
) -> TraceEstimate:
    r"""The mean of v^T A v over random v with E[v v^T] = I; the variance is 2 (|A|_F^2 - |diag A|^2) / num_samples.

    Costs ``num_samples`` calls of ``linear_map.quadratic``, which for Gauss-Newton and Fisher maps is a forward pass
    only. Samples are taken one after another in the memory of one; ``jax.vmap`` over keys takes several together.
    Source: Hutchinson 1990; Avron and Toledo 2011 (the variances).

    Args:
        distribution: The noise; ``curvax.trees.random_rademacher`` (entries -1 or +1) has the lowest variance, and
            ``random_normal`` 2 |A|_F^2 / num_samples.

    Example:
        >>> A = curvax.Diagonal({"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])})
        >>> curvax.estimators.hutchinson_trace(A, jax.random.key(0), num_samples=2)
        TraceEstimate(value=Array(6., dtype=float...), standard_error=Array(0., dtype=float...))
    """
    check_at_least("num_samples", num_samples, 1)
    dtype = wide.dtype_of(linear_map)

    def one(sample_key):
        return linear_map.quadratic(distribution(sample_key, linear_map.structure)).astype(dtype)

    return mean_of_samples(jax.lax.map(one, trees.split_key(key, num_samples)))


def hutch_plus_plus(linear_map: LinearMap, key: Array, *, num_products: int) -> TraceEstimate:
    r"""The trace on the range of a random sketch exactly, and Hutchinson's estimate of the rest.

    With Q an orthonormal basis of A S for random S, trace A = trace Q^T A Q + trace P A P, P = I - Q Q^T. The first
    part takes two thirds of the products, the second, whose is the standard error, the rest. For positive semi-definite
    A the relative error falls as 1 / num_products, against 1 / sqrt(num_products) for Hutchinson; a map of rank at most
    ``num_products // 3`` gives its trace exactly. Source: Meyer, Musco, Musco and Woodruff 2021, Algorithm 1.

    Args:
        num_products: The number of products with A. A third as many vectors are held in memory, three times over.


    Raises:
        ValueError: If ``num_products`` is less than 3 or the sketch would be wider than the number of parameters.

    Example:
        >>> A = curvax.from_matvec(lambda v: jnp.full(50, 2.0) * jnp.sum(v), jnp.zeros(50))  # rank one
        >>> curvax.estimators.hutch_plus_plus(A, jax.random.key(0), num_products=6).value.round(6)
        Array(100., dtype=float...)
    """
    check_at_least("num_products", num_products, 3)
    width = num_products // 3
    _check_products(linear_map, num_products, 3)
    sketch_key, rest_key = jax.random.split(key)
    sketch = _draw_block(linear_map, sketch_key, width, trees.random_normal)
    basis, _ = blocks.orthonormalise(wide.block_product(linear_map, sketch))
    tests = _draw_block(linear_map, rest_key, num_products - 2 * width, trees.random_rademacher)
    tests = blocks.without(tests, basis)
    exact = jnp.sum(blocks.row_dots(basis, wide.block_product(linear_map, basis)))
    rest = mean_of_samples(blocks.row_dots(tests, wide.block_product(linear_map, tests)))
    return TraceEstimate(exact + rest.value, rest.standard_error)


def xtrace(linear_map: LinearMap, key: Array, *, num_products: int) -> TraceEstimate:
    r"""The exchangeable estimator: every test vector serves in the sketch and, left out of it, in the estimate.

    With test vectors w_1 ... w_k, k = num_products / 2, and Q_i an orthonormal basis of the products A w_j, j != i, it
    is the mean over i of trace Q_i^T A Q_i + (n - k + 1) u^T A u / |u|^2, u = (I - Q_i Q_i^T) w_i. All come from one
    factorisation of A Omega = Q R: Q_i Q_i^T = Q (I - s_i s_i^T) Q^T for the unit vector s_i orthogonal to the columns
    of R other than i. A map of rank less than k gives its trace exactly. Source: Epperly, Tropp and Webber 2024, XTrace
    with normalised test vectors.

    The leave-one-out estimates t_i share sketches and correlate, so that the standard error of their mean as if they
    were independent, which the paper takes, comes out too small, by 5 to 38 % on spectra that do not decay fast. To it
    is added their covariance, from the estimates t_ij that leave j out of the sketch of t_i: t_ij does not depend on
    w_j and t_j is unbiased given all others, so cov(t_i, t_j) = E[(t_i - t_ij)(t_j - t_ji)].

    Args:
        num_products: The number of products with A, even. Half as many vectors are held in memory, five times over.


    Raises:
        ValueError: If ``num_products`` is odd, less than 4 or more than twice the number of parameters.

    Example:
        >>> A = curvax.from_matvec(lambda v: jnp.full(50, 2.0) * jnp.sum(v), jnp.zeros(50))  # rank one
        >>> curvax.estimators.xtrace(A, jax.random.key(0), num_products=4).value.round(6)
        Array(100., dtype=float...)
    """
    if num_products < 4 or num_products % 2:
        raise ValueError(f"num_products is {num_products}; it must be even and at least 4")
    count = num_products // 2
    _check_products(linear_map, num_products, 2)
    tests = _draw_block(linear_map, key, count, trees.random_normal)
    products = wide.block_product(linear_map, tests)
    basis, triangle = blocks.orthonormalise(products)
    images = wide.block_product(linear_map, basis)
    overlaps = blocks.inner_products(basis, tests)
    # The parts of the tests outside the sketch and their products: vectors, and not differences of inner products,
    # which would lose what is left when there are about as many tests as parameters.
    outside = trees.sub(tests, blocks.combine(overlaps.T, basis))
    outside_images = trees.sub(products, blocks.combine(overlaps.T, images))
    estimates, changes = _leave_one_out(
        dimension=trees.size(linear_map.structure),
        triangle=triangle,
        projected=blocks.inner_products(basis, images),
        overlaps=overlaps,
        crossed=blocks.inner_products(images, outside),
        quadratics=blocks.row_dots(outside, outside_images),
        squared_norms=blocks.row_dots(outside, outside),
    )
    mean, error = mean_of_samples(estimates)
    # In units of the error, as squares of what a tiny map gives would underflow. What noise leaves of the covariance
    # is kept between nothing and what estimates would have whose variance all comes from triples of test vectors.
    changes = changes / jnp.where(error > 0, error, 1)
    covariance = jnp.sum(changes * changes.T) / (count * (count - 1))
    return TraceEstimate(mean, error * jnp.sqrt(1 + jnp.clip(covariance, 0, 2)))


def slq_logdet(
    linear_map: LinearMap, key: Array, *, num_steps: int, num_samples: int, damping: Scalar = 0.0
) -> TraceEstimate:
    r"""log det(A + damping I) = trace log(A + damping I), by stochastic Lanczos quadrature.

    It is not a number where the Lanczos process meets a negative eigenvalue of A + damping I. Source: Ubaru, Chen and
    Saad 2017, section 3.

    Args:
        linear_map: A, symmetric, with A + damping I positive definite.
        num_steps: As in ``slq_trace``; about sqrt(condition number) are needed.


    Example:
        >>> A = curvax.Diagonal(jnp.array([1.0, 2.0, 4.0]))
        >>> curvax.estimators.slq_logdet(A, jax.random.key(0), num_steps=3, num_samples=2).value.round(6)
        Array(2.079442, dtype=float...)
    """

    def function(nodes):
        return jnp.log(nodes + jnp.asarray(damping, nodes.dtype))

    return slq_trace(function, linear_map, key, num_steps=num_steps, num_samples=num_samples)


def _draw_block(linear_map, key, count, distribution):
    drawn = jax.vmap(lambda k: distribution(k, linear_map.structure))(trees.split_key(key, count))
    return wide.cast(drawn, wide.dtype_of(linear_map))


def _leave_one_out(*, dimension, triangle, projected, overlaps, crossed, quadratics, squared_norms):
    """The k estimates t_i of XTrace, and the k x k changes t_i - t_ij where j is left out of the sketch as well.

    Given are n, R, H = Q^T A Q, W = Q^T Omega, the Q^T A v_i as columns, the v_i^T A v_i and the |v_i|^2, where
    v_i = (I - Q Q^T) w_i.
    """
    left_out = _orthogonal_to_other_columns(triangle)

    def between(matrix):
        return jnp.matmul(left_out.T, matrix, precision="highest")

    # Q_i Q_i^T = Q Q^T - (Q s_i)(Q s_i)^T loses the energy s_i^T H s_i from the trace, and what is outside of Q_i gains
    # the direction Q s_i: u_i = v_i + a Q s_i, a = s_i^T Q^T w_i, so that
    # u_i^T A u_i = v_i^T A v_i + 2 a s_i^T Q^T A v_i + a^2 s_i^T H s_i. u_i is scaled to |u_i|^2 = n - k + 1, its mean
    # square for normal w_i, which takes the noise of its length out.
    energies, along, images = (
        between(jnp.matmul(projected, left_out, precision="highest")),
        between(overlaps),
        between(crossed),
    )
    energy, own, own_image = (jnp.diagonal(x) for x in (energies, along, images))
    quadratics += 2 * own * own_image + own**2 * energy
    squared_norms += own**2
    outside = dimension - triangle.shape[0] + 1
    rest = outside * _quotients(quadratics, squared_norms)

    # Without j, at [i, j], goes the part e = (s_j - c s_i) / r of s_j that is orthogonal to s_i too. Where there is
    # none, R is singular and all of this is zero.
    cosines = between(left_out)
    squares = 1 - cosines**2
    found = squares > squares.shape[0] * jnp.sqrt(jnp.finfo(squares.dtype).eps)
    inverse = jnp.where(found, jax.lax.rsqrt(jnp.where(found, squares, 1)), 0)

    def column(vector):
        return vector[:, None]

    mixed = inverse * (energies - cosines * column(energy))
    second_energy = inverse**2 * (energy[None, :] - 2 * cosines * energies + cosines**2 * column(energy))
    second = inverse * (along.T - cosines * column(own))
    second_image = inverse * (images.T - cosines * column(own_image))
    quadratics = column(quadratics) + 2 * second * (second_image + column(own) * mixed) + second**2 * second_energy
    without = (outside + 1) * _quotients(quadratics, column(squared_norms) + second**2)
    changes = jnp.where(found, second_energy + column(rest) - without, 0)
    return jnp.trace(projected) - energy + rest, changes


def _quotients(numerators, denominators):
    return jnp.where(denominators > 0, numerators / jnp.where(denominators > 0, denominators, 1), 0)


def _orthogonal_to_other_columns(triangle):
    """Unit vectors s_i, as columns, with s_i^T R_j = 0 for j != i: the directions of the columns of R^{-T}.

    Singular values below rounding are raised to it, which leaves a product s_i^T R_j of that size. Where R is singular
    any such s_i will do: it is then orthogonal to the range of A, and what is left out with it is zero.
    """
    left, values, right = jnp.linalg.svd(triangle)
    level = jnp.finfo(values.dtype).eps * values[0] * values.size
    raised = jnp.maximum(values, jnp.where(level > 0, level, 1))
    inverse = jnp.matmul(left * (raised[-1] / raised)[None, :], right, precision="highest")
    return inverse / jnp.linalg.norm(inverse, axis=0, keepdims=True)


def _check_products(linear_map, num_products, multiple):
    dimension = trees.size(linear_map.structure)
    if num_products // multiple > dimension:
        raise ValueError(
            f"num_products is {num_products}, more than {multiple} times the {dimension} parameters of the map;"
            f" linear_map.trace() is exact and takes {dimension} products"
        )
