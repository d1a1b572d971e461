"""The coordinates in which a stochastic second-order iteration on a quadratic falls apart into scalar ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.matrices.stein import generalised_eigen
from curvax.types import Array


class Modes(NamedTuple):
    r"""K = B^{-1} H = X diag(mu) X^{-1} with X^T B X = I and X^T H X = diag(mu).

    In the coordinates x = X^{-1} (theta - theta*) the iteration is x_{k+1} = (1 - alpha_k mu) x_k - alpha_k noise,
    entry by entry, with noise of covariance S, and h = 1/2 sum_i mu_i x_i^2.

    Attributes:
        values: mu, the eigenvalues of K, ascending.
        vectors: X; B^{-1} = X X^T.
        inverse: X^{-1} = X^T B.
        noise: S = X^T Sigma X.
    """

    values: Array
    vectors: Array
    inverse: Array
    noise: Array

    def coordinates(self, start: Array) -> Array:
        """X^{-1} (theta - theta*)."""
        with jax.default_matmul_precision("highest"):
            return self.inverse @ jnp.asarray(start, self.inverse.dtype)

    def matrix(self, entries: Array) -> Array:
        """X W X^T: the covariance of theta from that of x."""
        with jax.default_matmul_precision("highest"):
            return self.vectors @ entries @ self.vectors.T

    def start_loss(self, start: Array) -> Array:
        """h_0."""
        return jnp.sum(self.values * self.coordinates(start) ** 2) / 2

    def is_stable(self, rate: Array) -> Array:
        """Whether the iteration forgets its start at this rate: H is definite and 0 < alpha lambda_1(K) < 2."""
        return (rate > 0) & (self.values[0] > 0) & (rate * self.values[-1] < 2)

    def stationary_entries(self, rate: Array) -> Array:
        """The covariance of x that it ends with: alpha S_ij / (mu_i + mu_j - alpha mu_i mu_j)."""
        one, other = self.values[:, None], self.values[None]
        return rate * self.noise / (one + other - rate * one * other)

    def noise_floor(self, rate: Array) -> Array:
        """The loss that goes with it."""
        return rate / 4 * jnp.sum(jnp.diag(self.noise) / (1 - rate / 2 * self.values))


def modes_of(hessian: Array, curvature: Array, noise: Array) -> Modes:
    """The modes of H, B and Sigma, from a Cholesky factor of B and one eigendecomposition."""
    hessian, curvature, noise = as_matrices(hessian=hessian, curvature=curvature, noise=noise)
    vectors, values = generalised_eigen(curvature, hessian)
    with jax.default_matmul_precision("highest"):
        return Modes(values, vectors, vectors.T @ curvature, vectors.T @ noise @ vectors)


def as_matrices(**matrices: Array) -> list[Array]:
    """The matrices in their widest dtype, float32 at least.

    Raises:
        ValueError: They are not square matrices of one shape.
    """
    arrays = {name: _floating(jnp.asarray(matrix)) for name, matrix in matrices.items()}
    first, *_ = arrays.values()
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape != first.shape:
            shapes = ", ".join(f"{other} {own.shape}" for other, own in arrays.items())
            raise ValueError(f"{name} must be a square matrix of the shape of the others, got {shapes}")
    dtype = trees.wide_dtype(*arrays.values())
    return [array.astype(dtype) for array in arrays.values()]


def where_valid(valid: Array, value: Array) -> Array:
    """The value where a statement holds, nan where it says nothing."""
    return jnp.where(valid, value, jnp.nan)


def _floating(array: Array) -> Array:
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)
