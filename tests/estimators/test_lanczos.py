import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import curvax
from curvax import estimators, trees

SIZE, STEPS = 20, 8
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@functools.cache
def compiled(num_steps):
    def run(linear_map, start):
        result = estimators.lanczos(linear_map, start, num_steps=num_steps)
        return result, estimators.gauss_quadrature(result)

    return jax.jit(run)


def flat(tree):
    return np.concatenate([np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(tree)])


def rows(block):
    return np.concatenate([np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in jax.tree.leaves(block)], axis=1)


def dense(result):
    off_diagonal = np.asarray(result.off_diagonal, float)
    return np.diag(np.asarray(result.diagonal, float)) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)


def start_for(linear_map, seed=0):
    return trees.random_normal(jax.random.key(seed), linear_map.structure)


@DTYPES
def test_orthonormal_basis_and_tridiagonal_projection_at_any_scale(dtype, dense_map, symmetric):
    atol = 2e-6 if dtype == jnp.float32 else 1e-14
    for values in (np.linspace(-3, 5, SIZE), 0.3 ** np.arange(SIZE), np.r_[1e3, np.linspace(0, 1, SIZE - 1)]):
        for scale in (1.0, 1e-8, 1e8) if dtype == jnp.float32 else (1.0, 1e-20, 1e20):
            matrix = symmetric(values) / np.max(np.abs(values))
            linear_map = dense_map(scale * matrix, dtype)
            start = start_for(linear_map)
            result, _ = compiled(STEPS)(linear_map, start)
            basis, tridiagonal = rows(result.basis), dense(result) / scale
            assert result.num_valid == STEPS
            np.testing.assert_allclose(basis @ basis.T, np.eye(STEPS), atol=atol)
            np.testing.assert_allclose(basis @ matrix @ basis.T, tridiagonal, atol=atol)
            last = np.zeros((STEPS, SIZE))
            last[-1] = flat(result.residual) / scale
            np.testing.assert_allclose(basis @ matrix, tridiagonal @ basis + last, atol=atol)
            np.testing.assert_allclose(basis @ last[-1], 0, atol=atol)
            np.testing.assert_allclose(basis[0] * np.linalg.norm(flat(start)), flat(start), atol=10 * atol)


@DTYPES
def test_an_invariant_space_ends_the_process(dtype, dense_map, symmetric):
    three = symmetric(np.r_[np.ones(8), np.full(8, 2), np.full(SIZE - 16, 3)])
    cases = [(np.eye(SIZE), 1), (np.zeros((SIZE, SIZE)), 1), (three, 3), (np.diag(np.r_[1, 2, 3, np.zeros(17)]), 4)]
    for matrix, expected in cases:
        for scale in (1.0, 1e-8) if dtype == jnp.float32 else (1.0, 1e-20):
            linear_map = dense_map(scale * matrix, dtype)
            result, (nodes, weights) = compiled(STEPS)(linear_map, start_for(linear_map))
            assert result.num_valid == expected
            nodes, weights = np.asarray(nodes, float), np.asarray(weights, float)
            assert np.isfinite(flat((result.basis, result.residual, nodes, weights))).all()
            basis = rows(result.basis)
            np.testing.assert_allclose(basis @ basis.T, np.diag(np.arange(STEPS) < expected), atol=1e-6)
            assert np.all(dense(result)[expected:] == 0)
            assert not flat(result.residual).any()
            distinct = np.unique(np.round(np.linalg.eigvalsh(matrix), 9))
            np.testing.assert_allclose(nodes[:expected] / scale, distinct, atol=3e-6)
            assert np.all(weights[expected:] == 0)
            assert np.all(nodes[expected:] == nodes[0])


@DTYPES
def test_more_steps_than_parameters_give_the_spectrum(dtype, dense_map, symmetric):
    values = np.linspace(-3, 5, SIZE)
    linear_map = dense_map(symmetric(values), dtype)
    result, (nodes, weights) = compiled(SIZE + 5)(linear_map, start_for(linear_map))
    assert result.num_valid == SIZE
    np.testing.assert_allclose(nodes[:SIZE], values, atol=5e-6 if dtype == jnp.float32 else 1e-13)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-2, 2), min_size=SIZE, max_size=SIZE),
    seed=st.integers(0, 1000),
    exponent=st.integers(-20, 20),
)
def test_quadrature_is_exact_to_degree_2k_minus_1(values, seed, exponent):
    matrix = np.diag(values) * 10.0**exponent
    linear_map = curvax.Diagonal(jnp.diag(jnp.asarray(matrix)))
    start = start_for(linear_map, seed)
    result, (nodes, weights) = compiled(4)(linear_map, start)
    nodes, direction = np.asarray(nodes) / 10.0**exponent, np.asarray(start / trees.norm(start))
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-13)
    for degree in range(2 * int(result.num_valid)):
        expected = np.sum(direction**2 * np.asarray(values) ** degree)
        np.testing.assert_allclose(np.sum(weights * nodes**degree), expected, atol=1e-13 * 4.0**degree)


def test_a_zero_start_makes_no_step(dense_map):
    linear_map = dense_map(np.eye(SIZE))
    result, (nodes, weights) = compiled(STEPS)(linear_map, trees.zeros_like(linear_map.structure))
    assert result.num_valid == 0
    assert trees.all_finite(result, nodes, weights)
    assert np.all(np.asarray(weights) == 0)


def test_narrow_leaves_have_a_basis_in_float32(dense_map, symmetric):
    values = np.linspace(-3, 5, SIZE)
    linear_map = dense_map(symmetric(values), jnp.bfloat16)
    result, (nodes, _) = compiled(STEPS)(linear_map, start_for(linear_map))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.basis)} == {jnp.dtype("float32")}
    basis = rows(result.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(STEPS), atol=2e-6)
    assert abs(float(nodes[-1]) - 5) < 0.1


def test_errors(dense_map):
    linear_map = dense_map(np.eye(SIZE))
    with pytest.raises(ValueError, match=r"start\['kernel'\] has shape \(3,\)"):
        estimators.lanczos(linear_map, {"kernel": jnp.zeros(3), "bias": [jnp.zeros(SIZE - 6)]}, num_steps=2)
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        estimators.lanczos(linear_map, start_for(linear_map), num_steps=0)
