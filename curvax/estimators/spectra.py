"""The density of the eigenvalues from products alone, by stochastic Lanczos quadrature."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_at_least
from curvax.krylov.lanczos import gauss_quadrature, lanczos
from curvax.matrices.linear_map import LinearMap
from curvax.types import Array, Scalar


class SpectralDensity(NamedTuple):
    """A discrete estimate of the spectral density phi(t) = 1/n sum_i delta(t - lambda_i).

    It is the mean over the samples of sum_j w_j delta(t - theta_j).
    """

    nodes: Array  # theta, shape (num_samples, num_steps): the Ritz values, at or between the eigenvalues
    weights: Array  # w, of the same shape: non-negative, with sum one for each sample

    def evaluate(self, grid: Array, width: Scalar) -> Array:
        """The density smoothed by a Gaussian of standard deviation ``width``, at the points of ``grid``."""
        width = jnp.asarray(width, self.nodes.dtype)
        height = width * jnp.sqrt(2 * jnp.pi).astype(width.dtype)
        return self._mean(grid, lambda t: jnp.exp(-0.5 * ((t - self.nodes) / width) ** 2) / height)

    def cumulative(self, grid: Array) -> Array:
        """The estimated share of eigenvalues that are at most t, for each t of ``grid``, an array of any shape."""
        return self._mean(grid, lambda t: (self.nodes <= t).astype(self.nodes.dtype))

    def _mean(self, grid, function):
        """The mean over the samples of sum_j w_j function(t)_j, for each t."""
        grid = jnp.asarray(grid, self.nodes.dtype)
        means = jax.vmap(lambda t: jnp.sum(self.weights * function(t)) / self.nodes.shape[0])(grid.reshape(-1))
        return means.reshape(grid.shape)


def spectral_density(linear_map: LinearMap, key: Array, *, num_steps: int, num_samples: int) -> SpectralDensity:
    r"""The density of the eigenvalues of A by stochastic Lanczos quadrature.

    From each of ``num_samples`` random directions, ``num_steps`` Lanczos steps give the Gauss quadrature of the
    density as that direction sees it. Moments up to order 2 num_steps - 1 are unbiased; the outermost nodes settle on
    the outermost eigenvalues first. Source: Lin, Saad and Yang 2016, section 3.2; Ghorbani, Krishnan and Xiao 2019,
    Algorithm 1.

    Args:
        num_steps: Lanczos steps for each sample, and vectors held in memory.
        num_samples: Random directions, one after another.

    Example:
        >>> A = curvax.Diagonal(jnp.array([0.0, 0.0, 0.0, 4.0]))
        >>> density = curvax.estimators.spectral_density(A, jax.random.key(0), num_steps=2, num_samples=3)
        >>> density.cumulative(jnp.array([-1.0, 2.0, 5.0]))
        Array([0.  , 0.75, 1.  ], dtype=float...)
    """
    check_at_least("num_samples", num_samples, 1)

    def one(sample_key):
        start = trees.random_rademacher(sample_key, linear_map.structure)
        return gauss_quadrature(lanczos(linear_map, start, num_steps=num_steps))

    return SpectralDensity(*jax.lax.map(one, trees.split_key(key, num_samples)))
