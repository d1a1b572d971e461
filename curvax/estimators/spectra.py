"""The density of the eigenvalues from products alone, by stochastic Lanczos quadrature."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.estimators.lanczos import check_at_least, gauss_quadrature, lanczos
from curvax.matrices.linear_map import LinearMap

Scalar = Any


class SpectralDensity(NamedTuple):
    """A discrete estimate of the spectral density phi(t) = 1/n sum_i delta(t - lambda_i).

    It is the mean over the samples of sum_j w_j delta(t - theta_j).
    """

    nodes: jax.Array
    """theta, shape (num_samples, num_steps): the Ritz values, which are points of or between the eigenvalues."""
    weights: jax.Array
    """w, of the same shape: non-negative, with sum one for each sample."""

    def evaluate(self, grid: jax.Array, width: Scalar) -> jax.Array:
        """The density smoothed by a Gaussian, at the points of ``grid``.

        Args:
            grid: t, an array of any shape.
            width: The standard deviation of the Gaussian, a scalar.

        Returns:
            The values, shaped like ``grid``; their integral over the real line is one.
        """
        width = jnp.asarray(width, self.nodes.dtype)
        distances = (self._at(grid) - self.nodes) / width
        return self._mean(jnp.exp(-0.5 * distances**2) / (width * jnp.sqrt(2 * jnp.pi).astype(width.dtype)))

    def cumulative(self, grid: jax.Array) -> jax.Array:
        """The estimated share of eigenvalues that are at most t, for each t of ``grid``, an array of any shape."""
        return self._mean((self.nodes <= self._at(grid)).astype(self.nodes.dtype))

    def _at(self, grid):
        return jnp.asarray(grid, self.nodes.dtype)[..., None, None]

    def _mean(self, values):
        return jnp.sum(self.weights * values, axis=(-2, -1)) / self.nodes.shape[0]


def spectral_density(linear_map: LinearMap, key: jax.Array, *, num_steps: int, num_samples: int) -> SpectralDensity:
    r"""The density of the eigenvalues of A by stochastic Lanczos quadrature.

    From each of ``num_samples`` random directions, ``num_steps`` Lanczos steps give the Gauss quadrature of the
    density as that direction sees it. Moments up to order 2 num_steps - 1 are unbiased; the outermost nodes settle on
    the outermost eigenvalues first.

    Args:
        linear_map: A, symmetric.
        key: A PRNG key.
        num_steps: Lanczos steps for each sample, and vectors held in memory.
        num_samples: Random directions, one after another.

    Returns:
        A ``SpectralDensity``.

    Raises:
        ValueError: If a count is less than one.

    Example:
        >>> A = curvax.Diagonal(jnp.array([0.0, 0.0, 0.0, 4.0]))
        >>> density = curvax.estimators.spectral_density(A, jax.random.key(0), num_steps=2, num_samples=3)
        >>> density.cumulative(jnp.array([-1.0, 2.0, 5.0]))
        Array([0.  , 0.75, 1.  ], dtype=float...)

    Source: Lin, Saad and Yang 2016, section 3.2; Ghorbani, Krishnan and Xiao 2019, Algorithm 1.
    """
    check_at_least("num_samples", num_samples, 1)

    def one(sample_key):
        start = trees.random_rademacher(sample_key, linear_map.structure)
        return gauss_quadrature(lanczos(linear_map, start, num_steps=num_steps))

    return SpectralDensity(*jax.lax.map(one, jax.random.split(key, num_samples)))
