"""Dense symmetric matrices as linear maps on a pytree, the matrix being an argument and not a constant of a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees


def _multiply(matrix, vector):
    flat = trees.ravel(vector).astype(matrix.dtype)
    return trees.unravel(jnp.matmul(matrix, flat, precision="highest"), vector)


@pytest.fixture
def dense_map():
    """A function of a matrix and a leaf dtype that gives the map on leaves of shapes (2, 3) and (n - 6,)."""

    def make(matrix, dtype=jnp.float64):
        size = matrix.shape[0]
        like = {"kernel": jnp.zeros((2, 3), dtype), "bias": [jnp.zeros((size - 6,), dtype)]}
        matrix = jnp.asarray(matrix, trees.wide_dtype(jnp.zeros((), dtype)))
        return curvax.from_matvec(jax.tree_util.Partial(_multiply, matrix), like)

    return make


@pytest.fixture
def symmetric():
    """A function of eigenvalues that gives a matrix with them and with random eigenvectors."""

    def make(eigenvalues, seed=0):
        eigenvalues = np.asarray(eigenvalues, float)
        vectors, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(eigenvalues.size,) * 2))
        matrix = (vectors * eigenvalues) @ vectors.T
        return (matrix + matrix.T) / 2

    return make


@pytest.fixture
def assert_unbiased():
    """Compares the mean of estimates with the truth at four standard errors, which must suffice to see 5 % of bias."""

    def check(estimates, truth):
        estimates = np.asarray(estimates, float).reshape(len(estimates), -1)
        truth = np.asarray(truth, float).reshape(-1)
        four = 4 * estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
        error = np.abs(estimates.mean(axis=0) - truth)
        assert (error <= four).all(), (error / four).max()
        assert (np.abs(1.05 * estimates.mean(axis=0) - truth) > 1.05 * four).all()

    return check
