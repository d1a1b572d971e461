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
    psi = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(compact.vectors)], axis=1)
    used = np.asarray(compact.used)
    core = np.asarray(compact.core)[np.ix_(used, used)]
    return float(compact.scale) * np.eye(10) + psi[used].T @ np.linalg.inv(core) @ psi[used]


@pytest.mark.parametrize("used", [None, [True, False, True], [False, False, False]])
def test_products_solves_and_functions_are_those_of_the_dense_matrix(used):
    compact = matrix(used=None if used is None else jnp.array(used))
    truth = dense(compact)
    v, u = one(7), one(8)
    flat, other = np.asarray(trees.ravel(v)), np.asarray(trees.ravel(u))
    got = everything(compact, u, v)
    np.testing.assert_allclose(got["dense"], truth, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got["product"], truth @ flat, rtol=1e-11)
    np.testing.assert_allclose(got["bilinear"], other @ truth @ flat, rtol=1e-11)
    np.testing.assert_allclose(got["quadratic"], flat @ truth @ flat, rtol=1e-11)
    np.testing.assert_allclose(got["diagonal"], np.diag(truth), rtol=1e-11)
    np.testing.assert_allclose(got["trace"], np.trace(truth), rtol=1e-11)
    solved = np.linalg.solve(truth + 0.3 * np.eye(10), flat)
    np.testing.assert_allclose(got["solve"], solved, rtol=1e-9)
    logdet = np.linalg.slogdet(truth + 0.3 * np.eye(10))[1]
    np.testing.assert_allclose(got["logdet"], logdet, rtol=1e-10)
    values, axes = np.linalg.eigh(truth)
    root = axes @ np.diag(np.sqrt(np.maximum(values, 0))) @ axes.T
    np.testing.assert_allclose(got["sqrt"], root @ flat, rtol=1e-9, atol=1e-10)


@jax.jit
def everything(matrix, u, v):
    return {
        "dense": matrix.to_dense(),
        "product": trees.ravel(matrix(v)),
        "bilinear": matrix.bilinear(u, v),
        "quadratic": matrix.quadratic(v),
        "diagonal": trees.ravel(matrix.diagonal()),
        "trace": matrix.trace(),
        "solve": trees.ravel(matrix.solve(v, damping=0.3)),
        "logdet": matrix.logdet(damping=0.3),
        "sqrt": trees.ravel(matrix.sqrt(v)),
    }


def test_dependent_vectors_and_more_vectors_than_parameters():
    repeated = np.random.default_rng(0).normal(size=(1, 2))
    psi = np.concatenate([repeated, 2 * repeated, np.eye(2)])

    @jax.jit
    def evaluate(psi):
        compact = curvax.compact_map(0.5, psi, jnp.diag(jnp.array([1.0, -3.0, 2.0, -0.2])))
        return compact.to_dense(), compact.spectrum()

    matrix, spectrum = evaluate(jnp.asarray(psi))
    truth = 0.5 * np.eye(2) + psi.T @ np.diag([1.0, -1 / 3, 0.5, -5.0]) @ psi
    np.testing.assert_allclose(matrix, truth, rtol=1e-12)
    assert int(spectrum.rank) == 2
    kept = np.any(np.asarray(spectrum.basis) != 0, axis=0)
    np.testing.assert_allclose(np.sort(np.asarray(spectrum.values)[kept]), np.linalg.eigvalsh(truth), rtol=1e-10)
    basis = psi.T @ np.asarray(spectrum.basis)[:, kept]
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-10)


def test_it_passes_through_jit_and_vmap():
    compact = matrix()
    flat = np.asarray(trees.ravel(one(7)))
    product = jax.jit(lambda c, v: trees.ravel(c(v)))(compact, one(7))
    np.testing.assert_allclose(product, dense(compact) @ flat, rtol=1e-12)
    traces = jax.jit(jax.vmap(lambda scale: curvax.compact_map(scale, compact.vectors, compact.core).trace()))
    many = traces(jnp.arange(1.0, 4.0))
    np.testing.assert_allclose(np.diff(many), 10.0, rtol=1e-12)


@pytest.mark.parametrize(("scale", "damping"), [(0.0, 0.0), (1.0, -1.0), (-1.0, 0.0), (-1.0, 1.0)])
def test_where_the_vectors_span_everything_the_scale_is_no_eigenvalue(scale, damping):
    inner = np.array([[2.0, 0.5], [0.5, 3.0]])
    v = np.array([1.0, 2.0])

    @jax.jit
    def evaluate(scale, damping, v):
        matrix = curvax.compact_map(scale, jnp.eye(2), jnp.linalg.inv(inner))
        return matrix.solve(v, damping=damping), matrix.logdet(damping=damping), matrix.inverse_sqrt(v)

    solution, logdet, root = evaluate(scale, damping, v)
    truth = inner + scale * np.eye(2)
    damped = truth + damping * np.eye(2)
    np.testing.assert_allclose(solution, np.linalg.solve(damped, v), rtol=1e-10)
    np.testing.assert_allclose(logdet, np.log(abs(np.linalg.det(damped))), rtol=1e-10)
    values, axes = np.linalg.eigh(truth)
    np.testing.assert_allclose(root, axes @ (axes.T @ v / np.sqrt(values)), rtol=1e-10)


def test_no_rank_is_promoted():
    compact = matrix()
    with jax.numpy_rank_promotion("raise"):
        spectrum, solution = jax.jit(lambda c, v: (c.spectrum(), c.solve(c(v))))(compact, one(7))
        np.testing.assert_allclose(trees.ravel(solution), trees.ravel(one(7)), rtol=1e-9)
    expected = np.linalg.eigvalsh(dense(compact))
    got = np.sort(np.append(spectrum.values, np.full(7, spectrum.rest)))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
