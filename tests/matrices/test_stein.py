"""Sums and differences of Kronecker products against their dense float64 inverses."""

import jax
import numpy as np
import pytest

from curvax.matrices.stein import (
    Powers,
    Stein,
    prepare_stein,
    smith,
    solve_by_powers,
    solve_stein,
    squared_smith,
    squarings,
)
from tests.tolerances import rounding

SIGNS = [1, -1]


def semidefinite(rng, size, rank):
    rows = rng.normal(size=(rank, size))
    return rows.T @ rows / rank


def problem(seed, sign):
    """A, G definite and C, D semi-definite of random sizes and ranks, with A (x) G - C (x) D definite, and V."""
    rng = np.random.default_rng(seed)
    ins, outs = rng.integers(1, 9, 2)
    a, g = (semidefinite(rng, n, n + 2) + 0.3 * np.eye(n) for n in (ins, outs))
    c, d = (semidefinite(rng, n, rng.integers(1, n + 1)) for n in (ins, outs))
    if sign < 0:
        products = [np.max(np.linalg.eigvals(np.linalg.solve(x, y)).real) for x, y in ((a, c), (g, d))]
        c = c * (0.7 / (products[0] * products[1]))
    return a, g, c, d, rng.normal(size=(ins, outs))


def dense(a, g, c, d, v, sign):
    """Row-major: the matrix on U as a vector of its rows is A (x) G +- C (x) D."""
    return np.linalg.solve(np.kron(a, g) + sign * np.kron(c, d), v.reshape(-1)).reshape(v.shape)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("seed", range(6))
def test_solutions_are_those_of_the_dense_system(seed, sign):
    *matrices, v = problem(seed, sign)
    found = jax.jit(lambda m, v: solve_stein(prepare_stein(*m), v, sign=sign))(matrices, v)
    np.testing.assert_allclose(found, dense(*matrices, v, sign), rtol=1e-9, atol=1e-9)
    a, g, c, d = matrices
    np.testing.assert_allclose(a @ found @ g + sign * c @ found @ d, v, atol=1e-10)


@pytest.mark.parametrize("sign", SIGNS)
def test_both_matrices_are_diagonal_in_what_is_prepared(sign):
    *matrices, _ = problem(10, sign)
    stein = jax.jit(prepare_stein)(*matrices)
    a, g, c, d = matrices
    for k, s, x, y in ((stein.inputs, stein.input_values, a, c), (stein.outputs, stein.output_values, g, d)):
        np.testing.assert_allclose(k.T @ x @ k, np.eye(len(x)), atol=1e-12)
        np.testing.assert_allclose(k.T @ y @ k, np.diag(s), atol=1e-12)
        assert np.all(s >= 0)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_multiple_of_the_identity_takes_eigenvectors_alone(sign):
    """xi I +- C (x) D: both of A, G are the identity."""
    *_, c, d, v = problem(11, 1)
    xi = 1.5 if sign > 0 else 1.5 * np.linalg.norm(c, 2) * np.linalg.norm(d, 2)
    (s1, k1), (s2, k2) = np.linalg.eigh(c), np.linalg.eigh(d)
    found = jax.jit(lambda stein, v: solve_stein(stein, v, sign=sign, identity=xi))(Stein(k1, k2, s1, s2), v)
    exact = dense(xi * np.eye(len(c)), np.eye(len(d)), c, d, v, sign)
    np.testing.assert_allclose(found, exact, rtol=1e-11, atol=1e-12)


def test_a_difference_that_rounding_made_indefinite_stays_definite():
    """s_1 s_2 above one: the solution is finite and its product with the right-hand side positive."""
    values = np.array([0.5, 1.0, 1.0 + 1e-3], np.float32)
    eye = np.eye(3, dtype=np.float32)
    v = np.ones((3, 3), np.float32)
    found = np.asarray(jax.jit(lambda s, v: solve_stein(s, v, sign=-1))(Stein(eye, eye, values, values), v))
    assert found.dtype == np.float32
    assert np.all(found > 0)
    assert np.max(found) <= 1 / (3 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("seed", range(3))
def test_smith_iterations_are_partial_sums_of_the_same_series(seed, sign):
    a, g, c, d, v = problem(seed, -1)  # spectral radii with the product 0.7, for both signs
    inverses = np.linalg.inv(a), np.linalg.inv(g)

    @jax.jit
    def compute(v):
        terms = [smith(*inverses, c, d, v, sign=sign, terms=n) for n in (1, 16, 128)]
        roots = [np.linalg.inv(np.linalg.cholesky(matrix)).T for matrix in (a, g)]
        powers = [squarings(root.T @ other @ root, 4) for root, other in zip(roots, (c, d), strict=True)]
        whitened = solve_by_powers(Powers(*roots, *powers), v, sign=sign)
        return terms, squared_smith(*inverses, c, d, v, sign=sign, doublings=4), whitened

    (first, sixteen, many), squared, whitened = compute(v)
    np.testing.assert_allclose(whitened, sixteen, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(first, inverses[0] @ v @ inverses[1], atol=1e-12)
    np.testing.assert_allclose(squared, sixteen, rtol=1e-10, atol=1e-10)
    exact = dense(a, g, c, d, v, sign)
    error = np.linalg.norm(many - exact)
    assert error <= 1e-8 * np.linalg.norm(exact)  # 0.7^128 of terms that are not orthogonal
    assert np.linalg.norm(sixteen - exact) < np.linalg.norm(first - exact)


def test_smith_goes_on_from_a_solution():
    a, g, c, d, v = problem(2, -1)
    exact = dense(a, g, c, d, v, -1)
    inverses = np.linalg.inv(a), np.linalg.inv(g)
    found = jax.jit(lambda start: smith(*inverses, c, d, v, sign=-1, terms=3, start=start))(exact)
    np.testing.assert_allclose(found, exact, atol=rounding(np.float64, 1000, scale=float(np.max(np.abs(exact)))))
