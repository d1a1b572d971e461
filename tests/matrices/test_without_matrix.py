"""Solves, roots and log-determinants of maps from products alone, and what a map answers like an array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import curvax
from curvax import trees
from curvax.matrices import linear_map as module
from tests.tolerances import rounding

SIZE = 40
SPECTRA = {
    "well conditioned": np.linspace(1, 10, SIZE),
    "ill conditioned": np.geomspace(1e-3, 10, SIZE),
    "singular": np.concatenate([np.linspace(1, 10, SIZE // 2), np.zeros(SIZE // 2)]),
}
METHODS = {
    "cg": lambda a, v, damping: a.solve(v, damping=damping, method="cg"),
    "lanczos": lambda a, v, damping: a.solve(v, damping=damping, method="lanczos", tolerance=1e-6),
    "sqrt": lambda a, v, damping: a.sqrt(v, method="lanczos"),
    "inverse_sqrt": lambda a, v, damping: a.inverse_sqrt(v, damping=damping, method="lanczos", tolerance=1e-6),
}
EXACT = {
    "cg": lambda values, damping: 1 / (values + damping),
    "lanczos": lambda values, damping: 1 / (values + damping),
    "sqrt": lambda values, damping: np.sqrt(values),
    "inverse_sqrt": lambda values, damping: 1 / np.sqrt(values + damping),
}


def dense(kind):
    axes, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, SIZE)))
    return SPECTRA[kind], axes


def product(matrix, vector):
    return trees.unravel(jnp.matmul(matrix, trees.ravel(vector), precision="highest"), vector)


def made(matrix, dtype=jnp.float64):
    like = {"kernel": jnp.zeros((4, 5), dtype), "bias": jnp.zeros(SIZE - 20, dtype)}
    return curvax.from_matvec(jax.tree_util.Partial(product, jnp.asarray(matrix, dtype)), like)


def vector_for(linear_map):
    flat = jnp.asarray(np.random.default_rng(2).normal(size=SIZE))
    return trees.unravel(flat, linear_map.structure)


@functools.cache
def compiled(dtype):
    def run(matrix, vector, damping):
        linear_map = made(matrix, dtype)
        return {name: trees.ravel(method(linear_map, vector, damping)) for name, method in METHODS.items()}

    return jax.jit(run)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", SPECTRA)
def test_without_the_matrix_as_documented(kind, dtype):
    values, axes = dense(kind)
    damping = 0.1 if kind == "singular" else 0.0
    matrix = (axes * values) @ axes.T
    vector = vector_for(made(matrix, dtype))
    flat = np.asarray(trees.ravel(vector), float)
    got = compiled(dtype)(jnp.asarray(matrix), vector, damping)
    largest, smallest = values.max() + damping, values.min() + damping
    condition = largest / smallest
    for name, result in got.items():
        expected = axes @ (EXACT[name](values, damping) * (axes.T @ flat))
        noise = rounding(dtype, 4 * SIZE, condition=condition) * np.linalg.norm(expected)
        if name == "cg":  # |x - x*| <= |r| / smallest, with |r| <= tolerance |v|
            bound = float(jnp.finfo(dtype).eps) ** (2 / 3) * np.linalg.norm(flat) / smallest + noise
        elif name == "sqrt":  # an eigenvalue off by u |A| at zero makes a root of sqrt(u |A|)
            bound = 2 * np.sqrt(rounding(dtype, SIZE, scale=largest)) * np.linalg.norm(flat)
        else:
            bound = 1e-6 * np.linalg.norm(expected) + noise
        assert np.linalg.norm(np.asarray(result, float) - expected) <= bound, (name, kind)


def test_what_was_not_reached_is_not_a_number():
    values, axes = dense("ill conditioned")
    linear_map = made((axes * values) @ axes.T)
    vector = vector_for(linear_map)

    @jax.jit
    def run(linear_map, vector):
        return {
            "too few iterations": linear_map.solve(vector, method="cg", max_iterations=3),
            "indefinite": linear_map.solve(vector, damping=-5.0, method="cg"),
            "too few steps": linear_map.inverse_sqrt(vector, method="lanczos", num_steps=8),
            "no root": linear_map.inverse_sqrt(vector, damping=-5.0, method="lanczos"),
        }

    for name, result in run(linear_map, vector).items():
        assert np.isnan(trees.ravel(result)).all(), name
    indefinite = jax.jit(lambda a, v: a.solve(v, damping=-5.0, method="lanczos"))(linear_map, vector)
    expected = axes @ ((axes.T @ np.asarray(trees.ravel(vector))) / (values - 5))
    np.testing.assert_allclose(trees.ravel(indefinite), expected, rtol=1e-9)
    zero = trees.zeros_like(vector)
    assert np.all(trees.ravel(jax.jit(lambda a, v: a.sqrt(v, method="lanczos"))(linear_map, zero)) == 0)


def test_logdet_is_within_the_standard_error_of_its_estimator():
    values, axes = dense("well conditioned")
    key = jax.random.key(0)

    @jax.jit
    def run(linear_map):
        estimate = curvax.estimators.slq_logdet(linear_map, key, num_steps=30, num_samples=20, damping=0.5)
        return linear_map.logdet(damping=0.5, method="lanczos", key=key, num_steps=30, num_samples=20), estimate

    value, estimate = run(made((axes * values) @ axes.T))
    assert value == estimate.value
    assert abs(value - np.sum(np.log(values + 0.5))) < 4 * estimate.standard_error


def test_the_method_is_exact_up_to_the_limit_and_without_the_matrix_above(monkeypatch):
    values, axes = dense("well conditioned")
    linear_map = made((axes * values) @ axes.T)
    vector, key = vector_for(linear_map), jax.random.key(0)
    monkeypatch.setattr(module, "_DENSE_LIMIT", SIZE - 1)

    def run(linear_map, vector):
        kinds = linear_map.solve(vector), linear_map.sqrt(vector), linear_map.inverse_sqrt(vector)
        return *kinds, linear_map.sample(key), linear_map.logdet(key=key)

    results = jax.eval_shape(run, linear_map, vector)
    assert jax.tree.structure(results[0]) == jax.tree.structure(vector)
    with pytest.raises(ValueError, match="of 40 parameters is an estimate from random vectors: pass key="):
        linear_map.logdet()
    with pytest.raises(ValueError, match="solve"):
        linear_map.solve(vector, method="exact")
    diagonal = curvax.Diagonal(jnp.ones(SIZE))
    assert diagonal.logdet() == 0  # its own form at any size
    with pytest.raises(ValueError, match="method"):
        linear_map.solve(vector, method="newton")


def test_like_an_array():
    values, axes = dense("well conditioned")
    matrix = (axes * values) @ axes.T
    linear_map = made(matrix)
    vector = vector_for(linear_map)
    assert linear_map.shape == (SIZE, SIZE)
    assert repr(linear_map) == "MatvecMap(40 x 40, 2 leaves, float64)"
    assert repr(np.float64(2) * linear_map) == "Scaled(40 x 40, 2 leaves, float64)"

    @jax.jit
    def run(a, v):
        return jax.tree.map(trees.ravel, [a @ v, (-a) @ v, (a - 3.0 * a)(v)], is_leaf=lambda x: isinstance(x, dict))

    flat = np.asarray(trees.ravel(vector))
    for got, factor in zip(run(linear_map, vector), (1, -1, -2), strict=True):
        np.testing.assert_allclose(got, factor * matrix @ flat, rtol=1e-12, atol=1e-12)
    operator = linear_map.as_scipy_operator()
    assert (operator.shape, operator.dtype) == ((SIZE, SIZE), np.float64)
    np.testing.assert_allclose(operator @ flat, matrix @ flat, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        operator.T @ np.stack([flat, 2 * flat], 1)[:, 1], 2 * matrix @ flat, rtol=1e-12, atol=1e-12
    )
    found = scipy.sparse.linalg.eigsh(operator, k=2, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), values[-2:], rtol=1e-9)


def test_maps_at_a_point_are_shown_by_their_size():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    linear_map = curvax.ggn(objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))))
    assert repr(linear_map) == "Pullback(2 x 2, 1 leaf, float64)"


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_few_lanczos_steps_are_not_taken_for_enough(num_steps):
    linear_map = curvax.from_matvec(lambda v: jnp.logspace(0, -4, 40) * v, jnp.zeros(40))

    @jax.jit
    def both(vector):
        solved = linear_map.solve(vector, damping=1e-4, method="lanczos", max_iterations=num_steps)
        return solved, linear_map.inverse_sqrt(vector, damping=1e-4, method="lanczos", num_steps=num_steps)

    assert all(np.all(np.isnan(result)) for result in both(jnp.ones(40)))
