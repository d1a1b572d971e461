"""Functions of a symmetric map from products alone: f(A) v and trace f(A), by the Lanczos process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.checks import check_at_least
from curvax.krylov import _wide as wide
from curvax.krylov.lanczos import LanczosResult, gauss_quadrature, lanczos, tridiagonal_eigen
from curvax.types import Array, PyTree, Scalar


def lanczos_function(
    function: Callable[[Array], Array],
    linear_map: wide.Operator,
    vector: PyTree,
    *,
    num_steps: int,
    tolerance: Scalar,
) -> PyTree:
    r"""f(A) v as |v| Q f(T) e_1, with A Q = Q T + r e_k^T from k Lanczos steps that start at v.

    The error is at most 2 |v| times that of the best polynomial of degree k - 1 for f on the spectrum. For 1/x and
    1/sqrt(x) on a spectrum of condition number kappa it falls as exp(-2k/sqrt(kappa)); for sqrt(x) on one that
    reaches zero as 1/k. Whether that is enough is judged by what the last quarter of the steps has changed. Source:
    Saad 1992, SIAM J. Numer. Anal. 29; Musco, Musco and Sidford 2018 (in finite precision).

    Args:
        function: f, elementwise on arrays of eigenvalues.
        num_steps: k, the number of products and of vectors held in memory.
        tolerance: How much the last quarter of the steps may change the result by, relative to it.

    Returns:
        f(A) v in the dtypes of v; not a number where f is not finite on the spectrum or the tolerance was not met.
    """
    run = lanczos(linear_map, vector, num_steps=num_steps)
    fewer = num_steps - max(1, num_steps // 4)
    coefficients, before = (_at_first(function, run, count) for count in (num_steps, fewer))
    settled = trees.norm(coefficients - before) <= jnp.asarray(tolerance, before.dtype) * trees.norm(coefficients)
    # A process that ended early has met a space that A maps to itself: nothing is missing.
    length = jnp.where(settled | (run.num_valid < num_steps), trees.norm(wide.cast(vector, before.dtype)), jnp.nan)
    # From a zero vector no step is made.
    result = trees.scale(jnp.where(run.num_valid > 0, length, 0), blocks.combine(coefficients, run.basis))
    return trees.cast_like(result, vector)


def slq_trace(
    function: Callable[[Array], Array], linear_map: wide.Operator, key: Array, *, num_steps: int, num_samples: int
) -> TraceEstimate:
    r"""trace f(A) by stochastic Lanczos quadrature: the mean of v^T f(A) v, each by ``num_steps`` Lanczos steps.

    The sampling error falls with ``num_samples`` and is what ``standard_error`` tells; the error of the quadrature,
    zero for polynomials f up to degree 2 num_steps - 1, falls with ``num_steps`` and is not in it. Source: Ubaru, Chen
    and Saad 2017, Algorithm 1.

    Args:
        function: f, elementwise on arrays of eigenvalues.
        num_steps: Lanczos steps, and vectors held in memory.
        num_samples: Rademacher vectors v, one after another.

    Example:
        >>> A = curvax.Diagonal(jnp.array([1.0, 4.0, 9.0]))
        >>> curvax.estimators.slq_trace(jnp.sqrt, A, jax.random.key(0), num_steps=3, num_samples=2).value.round(6)
        Array(6., dtype=float...)
    """
    check_at_least("num_samples", num_samples, 1)
    dimension = trees.size(linear_map.structure)

    def one(sample_key):
        start = trees.random_rademacher(sample_key, linear_map.structure)
        nodes, weights = gauss_quadrature(lanczos(linear_map, start, num_steps=num_steps))
        return dimension * jnp.sum(weights * function(nodes))

    return mean_of_samples(jax.lax.map(one, trees.split_key(key, num_samples)))


class TraceEstimate(NamedTuple):
    """An unbiased estimate of a trace and what it may be off by."""

    value: Array  # the estimate, a scalar
    standard_error: Array  # its estimated standard deviation; infinite where one sample cannot tell


def mean_of_samples(samples: Array) -> TraceEstimate:
    """The mean of independent samples and its standard error."""
    count = samples.shape[0]
    value = jnp.mean(samples)
    if count == 1:
        return TraceEstimate(value, jnp.full_like(value, jnp.inf))
    # Scaled before it is squared: the deviations of a tiny map would underflow.
    deviations = samples - value
    largest = jnp.max(jnp.abs(deviations))
    unit = jnp.where(largest > 0, largest, 1)
    return TraceEstimate(value, unit * jnp.sqrt(jnp.sum((deviations / unit) ** 2) / (count * (count - 1))))


def _at_first(function: Callable[[Array], Array], run: LanczosResult, count: int) -> Array:
    """f(T) e_1 with T of the first ``count`` steps, filled up with zeros."""
    kept = jnp.arange(run.diagonal.size) < jnp.minimum(count, run.num_valid)
    values, vectors = tridiagonal_eigen(run, kept)
    images = jnp.where(kept, function(values), 0)
    return jnp.where(kept, jnp.matmul(vectors, images * vectors[0], precision="highest"), 0)
