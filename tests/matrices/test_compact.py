"""Matrices in compact form against the same matrices dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees

LIKE = {"a": (2, 3), "b": (4,)}


def vectors(seed, count):
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.normal(size=(count, *shape))) for name, shape in LIKE.items()}


def one(seed):
    return jax.tree.map(lambda leaf: leaf[0], vectors(seed, 1))


def matrix(seed=0, count=3, scale=1.5, used=None):
    generator = np.random.default_rng(seed + 100)
    core = generator.normal(size=(count, count))
    return curvax.compact_map(scale, vectors(seed, count), jnp.asarray(core + core.T), used)


def dense(compact):
    """gamma I + Psi C^{-1} Psi^T by hand."""
    psi = np.stack(
        [np.asarray(trees.ravel(jax.tree.map(lambda leaf, i=i: leaf[i], compact.vectors))) for i in range(3)]
    )
    used = np.asarray(compact.used)
    core = np.asarray(compact.core)[np.ix_(used, used)]
    return float(compact.scale) * np.eye(10) + psi[used].T @ np.linalg.inv(core) @ psi[used]


@pytest.mark.parametrize("used", [None, [True, False, True], [False, False, False]])
def test_products_solves_and_functions_are_those_of_the_dense_matrix(used):
    compact = matrix(used=None if used is None else jnp.array(used))
    truth = dense(compact)
    v, u = one(7), one(8)
    flat, other = np.asarray(trees.ravel(v)), np.asarray(trees.ravel(u))
    np.testing.assert_allclose(compact.to_dense(), truth, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(trees.ravel(compact(v)), truth @ flat, rtol=1e-11)
    np.testing.assert_allclose(compact.bilinear(u, v), other @ truth @ flat, rtol=1e-11)
    np.testing.assert_allclose(compact.quadratic(v), flat @ truth @ flat, rtol=1e-11)
    np.testing.assert_allclose(trees.ravel(compact.diagonal()), np.diag(truth), rtol=1e-11)
    np.testing.assert_allclose(compact.trace(), np.trace(truth), rtol=1e-11)
    solved = np.linalg.solve(truth + 0.3 * np.eye(10), flat)
    np.testing.assert_allclose(trees.ravel(compact.solve(v, damping=0.3)), solved, rtol=1e-9)
    logdet = np.linalg.slogdet(truth + 0.3 * np.eye(10))[1]
    np.testing.assert_allclose(compact.logdet(damping=0.3), logdet, rtol=1e-10)
    values, axes = np.linalg.eigh(truth)
    root = axes @ np.diag(np.sqrt(np.maximum(values, 0))) @ axes.T
    np.testing.assert_allclose(trees.ravel(compact.sqrt(v)), root @ flat, rtol=1e-9, atol=1e-10)


def test_dependent_vectors_and_more_vectors_than_parameters():
    repeated = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2)))
    psi = jnp.concatenate([repeated, 2 * repeated, jnp.eye(2)])
    compact = curvax.compact_map(0.5, psi, jnp.diag(jnp.array([1.0, -3.0, 2.0, -0.2])))
    truth = 0.5 * np.eye(2) + psi.T @ np.diag([1.0, -1 / 3, 0.5, -5.0]) @ psi
    np.testing.assert_allclose(compact.to_dense(), truth, rtol=1e-12)
    spectrum = compact.spectrum()
    assert int(spectrum.rank) == 2
    kept = np.any(np.asarray(spectrum.basis) != 0, axis=0)
    np.testing.assert_allclose(np.sort(spectrum.values[kept]), np.linalg.eigvalsh(truth), rtol=1e-10)
    basis = psi.T @ np.asarray(spectrum.basis)[:, kept]
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-10)


def test_it_passes_through_jit_and_vmap():
    compact = matrix()
    product = jax.jit(lambda c, v: c(v))(compact, one(7))
    np.testing.assert_allclose(trees.ravel(product), trees.ravel(compact(one(7))), rtol=1e-12)
    many = jax.vmap(lambda scale: curvax.compact_map(scale, vectors(0, 3), compact.core).trace())(jnp.arange(1.0, 4.0))
    np.testing.assert_allclose(np.diff(many), 10.0, rtol=1e-12)


@pytest.mark.parametrize(("scale", "damping"), [(0.0, 0.0), (1.0, -1.0), (-1.0, 0.0), (-1.0, 1.0)])
def test_where_the_vectors_span_everything_the_scale_is_no_eigenvalue(scale, damping):
    core = jnp.linalg.inv(jnp.array([[2.0, 0.5], [0.5, 3.0]]))
    matrix = curvax.compact_map(scale, jnp.eye(2), core)
    dense = np.asarray(matrix.to_dense()) + damping * np.eye(2)
    v = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(matrix.solve(v, damping=damping), np.linalg.solve(dense, v), rtol=1e-10)
    np.testing.assert_allclose(matrix.logdet(damping=damping), np.log(abs(np.linalg.det(dense))), rtol=1e-10)
    values, vectors = np.linalg.eigh(matrix.to_dense())
    truth = vectors @ (vectors.T @ v / np.sqrt(values))
    np.testing.assert_allclose(matrix.inverse_sqrt(v), truth, rtol=1e-10)


def test_no_rank_is_promoted():
    compact = matrix()
    with jax.numpy_rank_promotion("raise"):
        spectrum = jax.jit(lambda compact: compact.spectrum())(compact)
        product = compact(one(7))
        np.testing.assert_allclose(trees.ravel(compact.solve(product)), trees.ravel(one(7)), rtol=1e-9)
    expected = np.linalg.eigvalsh(dense(compact))
    got = np.sort(np.append(spectrum.values, np.full(7, spectrum.rest)))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
