"""The Krylov basis and its projections (CG-9) against dense linear algebra, and the minimisation over the subspace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import solvers

N = 10


@functools.partial(jax.jit, static_argnames=("k", "precondition"))
def subspace_of(matrix, b, inverse=None, extra=None, *, k, precondition=False):
    return solvers.krylov_subspace(
        lambda v: matrix @ v,
        b,
        num_vectors=k,
        preconditioner=(lambda r: inverse @ r) if precondition else None,
        extra=extra,
    )


def symmetric(seed, eigenvalues):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T, rng


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("with_extra", [False, True])
def test_basis_spans_the_krylov_space_and_projections_are_right(precondition, with_extra):
    matrix, rng = symmetric(0, np.geomspace(0.1, 10, N))
    b, extra = rng.standard_normal(N), rng.standard_normal(N) if with_extra else None
    inverse = symmetric(1, np.geomspace(0.5, 2, N))[0] if precondition else np.eye(N)
    k = 5
    subspace = subspace_of(matrix, b, inverse, extra, k=k, precondition=precondition)
    basis = np.asarray(subspace.basis)
    m = k + with_extra
    assert np.all(subspace.active)
    np.testing.assert_allclose(basis @ basis.T, np.eye(m), atol=1e-14)
    np.testing.assert_allclose(subspace.matrix, basis @ matrix @ basis.T, atol=1e-13)
    np.testing.assert_allclose(subspace.right, basis @ b, atol=1e-14)
    krylov = [np.linalg.matrix_power(inverse @ matrix, j) @ inverse @ b for j in range(k)]
    for count in range(1, k + 1):
        inside = basis[:count].T @ (basis[:count] @ krylov[count - 1])
        np.testing.assert_allclose(inside, krylov[count - 1], rtol=1e-9, atol=1e-9 * np.abs(inside).max())
    if with_extra:
        np.testing.assert_allclose(basis.T @ (basis @ extra), extra, atol=1e-13)
    if not precondition and not with_extra:  # Lanczos: the projection is tridiagonal
        np.testing.assert_allclose(np.triu(subspace.matrix, 2), 0, atol=1e-13)


def test_basis_stays_orthonormal_where_plain_lanczos_loses_it():
    diagonal = np.append(np.linspace(1, 2, 99), 1e4).astype(np.float32)
    b = np.ones(100, np.float32)
    subspace = jax.jit(lambda b: solvers.krylov_subspace(lambda v: diagonal * v, b, num_vectors=20))(b)
    basis = np.asarray(subspace.basis, float)
    used = np.asarray(subspace.active)
    assert used.sum() > 8
    np.testing.assert_allclose(basis @ basis.T, np.diag(used.astype(float)), atol=2e-6)


@pytest.mark.parametrize("damping", [0.0, 0.3, 10.0])
def test_subspace_holds_every_damped_solution_of_conjugate_gradients(damping):
    matrix, rng = symmetric(2, np.geomspace(0.1, 10, N))
    b, k = rng.standard_normal(N), 4
    subspace = subspace_of(matrix, b, k=k)
    coefficients = np.linalg.solve(subspace.matrix + damping * np.eye(k), subspace.right)
    result = jax.jit(
        lambda b, damping: solvers.cg(lambda v: matrix @ v + damping * v, b, max_iterations=k, tolerance=0.0)
    )(b, damping)
    np.testing.assert_allclose(subspace.combine(jnp.asarray(coefficients)), result.value, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exhausted_space_leaves_zeros(dtype):
    matrix, rng = np.diag(np.resize([1.0, 2.0, 5.0], N)).astype(dtype), np.random.default_rng(3)
    b = rng.standard_normal(N).astype(dtype)
    extra = rng.standard_normal(N).astype(dtype)
    subspace = subspace_of(matrix, b, None, extra, k=6)
    assert subspace.active.tolist() == [True] * 3 + [False] * 3 + [True]
    idle = ~np.asarray(subspace.active)
    assert not np.any(subspace.basis[idle])
    assert not np.any(subspace.matrix[idle])
    assert not np.any(subspace.matrix[:, idle])
    again = subspace_of(matrix, b, None, b, k=6)
    assert again.active.tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_beyond_exhaustion_by_rounding_the_basis_stays_orthonormal(dtype):
    matrix, rng = symmetric(7, np.resize([1.0, 2.0, 5.0], N))
    subspace = subspace_of(matrix.astype(dtype), rng.standard_normal(N).astype(dtype), None, np.ones(N, dtype), k=6)
    basis, eps = np.asarray(subspace.basis, float), np.finfo(dtype).eps
    np.testing.assert_allclose(basis @ basis.T, np.diag(np.asarray(subspace.active, float)), atol=10 * eps)
    np.testing.assert_allclose(subspace.matrix, basis @ matrix.astype(dtype) @ basis.T, atol=100 * eps)


def test_zero_and_non_finite_vectors():
    matrix, rng = symmetric(4, np.geomspace(1, 3, N))
    b = rng.standard_normal(N)
    assert not np.any(subspace_of(matrix, np.zeros(N), k=3).active)
    broken = subspace_of(matrix * np.nan, b, k=3)
    assert not np.any(broken.active)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(broken))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_b_does_not_matter(scale):
    matrix, rng = symmetric(5, np.geomspace(1, 3, N))
    matrix, b = matrix.astype(np.float32), rng.standard_normal(N).astype(np.float32)
    plain, scaled = subspace_of(matrix, b, k=3), subspace_of(matrix, b * np.float32(scale), k=3)
    np.testing.assert_allclose(scaled.basis, plain.basis, atol=1e-5)
    np.testing.assert_allclose(scaled.matrix, plain.matrix, atol=1e-5)
    np.testing.assert_allclose(scaled.right, plain.right * np.float32(scale), rtol=1e-5, atol=1e-6 * scale)


def test_pytrees_and_dtypes():
    diagonal = {"u": jnp.arange(1.0, 5, dtype=jnp.bfloat16), "v": jnp.full((2, 3), 2.0, jnp.float32)}
    b = jax.tree.map(jnp.ones_like, diagonal)
    subspace = jax.jit(lambda d, b: solvers.krylov_subspace(curvax.Diagonal(d), b, num_vectors=3))(diagonal, b)
    assert subspace.basis["u"].dtype == jnp.bfloat16
    assert subspace.basis["v"].shape == (3, 2, 3)
    assert subspace.matrix.dtype == subspace.right.dtype == jnp.float32
    combined = subspace.combine(jnp.ones(3, jnp.float32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), combined) == jax.tree.map(lambda x: (x.shape, x.dtype), b)


@functools.partial(jax.jit, static_argnames=("objective", "steps"))
def minimize(objective, subspace, tolerance=1e-6, *, steps=40):
    return solvers.minimize_in_subspace(objective, subspace, max_iterations=steps, tolerance=tolerance)


MATRIX, RNG = symmetric(6, np.geomspace(1e-2, 1e2, N))
RIGHT = RNG.standard_normal(N)


def quadratic(x):
    return 0.5 * x @ MATRIX @ x - RIGHT @ x


def quartic(x):
    return quadratic(x) + 0.1 * jnp.sum(x**4)


def test_quadratic_is_minimised_in_few_steps():
    subspace = subspace_of(MATRIX, RIGHT, k=5)
    best = minimize(quadratic, subspace)
    coefficients = np.linalg.solve(subspace.matrix, subspace.right)
    np.testing.assert_allclose(best.value, subspace.combine(jnp.asarray(coefficients)), rtol=1e-5)
    np.testing.assert_allclose(best.objective, quadratic(best.value), rtol=1e-12)
    assert best.iterations <= 5


def test_function_that_is_not_quadratic_is_minimised():
    subspace = subspace_of(MATRIX, RIGHT, k=5)
    best = minimize(quartic, subspace)
    slope = np.asarray(subspace.basis) @ np.asarray(jax.jit(jax.grad(quartic))(best.value))
    assert np.linalg.norm(slope) < 1e-3 * np.linalg.norm(subspace.right)
    damped = minimize(quadratic, subspace)
    assert best.objective < jax.jit(quartic)(damped.value)


def test_never_above_the_start_and_finite():
    subspace = subspace_of(MATRIX, RIGHT, k=5)
    wall = minimize(lambda x: jnp.where(jnp.linalg.norm(x) > 1e-3, jnp.nan, -jnp.sum(x * RIGHT)), subspace)
    assert wall.objective <= 0
    assert np.all(np.isfinite(wall.value))
    nothing = minimize(quadratic, subspace_of(MATRIX, np.zeros(N), k=5))
    assert nothing.iterations == 0
    assert not np.any(nothing.value)


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        solvers.krylov_subspace(lambda v: v, jnp.ones(3), num_vectors=0)
    with pytest.raises(ValueError, match="extra"):
        solvers.krylov_subspace(lambda v: v, {"w": jnp.ones(3)}, num_vectors=2, extra={"w": jnp.ones(4)})
