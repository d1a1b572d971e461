"""Every matrix on the outputs against the dense matrix it stands for, made independently in numpy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree
from scipy.linalg import block_diag
from scipy.special import log_softmax

from curvax.objectives.output_matrix import (
    AutodiffOutputs,
    DiagonalOutputs,
    EigenOutputs,
    RankOneOutputs,
    SoftmaxOutputs,
)

few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def dense(product, like):
    """The matrix of a linear map on all outputs of the batch together, so that examples must not mix."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like))
    return jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0], out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))


class Measured(NamedTuple):
    """The dense matrices of a matrix's products, each from its own product, and u^T C^+ u."""

    product: jax.Array
    pinv: jax.Array
    root: jax.Array | None
    root_transpose: jax.Array | None
    quadratic: jax.Array


@jax.jit
def measure(matrix, u):
    has_root = not (isinstance(matrix, AutodiffOutputs) and matrix.treatment == "exact" and not matrix.convex)
    root_like = u if isinstance(matrix, EigenOutputs) else matrix.root_structure
    return Measured(
        dense(matrix.product, u),
        dense(matrix.pinv_product, u),
        dense(matrix.sqrt_product, u) if has_root else None,
        dense(matrix.sqrt_transpose_product, root_like) if has_root else None,
        matrix.pinv_quadratic(u),
    )


@functools.partial(jax.jit, static_argnums=0)
def per_example_hessians(function, outputs, targets):
    """The block-diagonal matrix of the examples' Hessians; rows ordered as ``ravel_pytree`` orders the whole batch."""
    flat, unravel = ravel_pytree(outputs)
    return jax.hessian(lambda z: jnp.sum(jax.vmap(function)(unravel(z), targets)))(flat)


def wiggly(z, y):
    """A loss of one example that is not convex, on a dictionary of outputs."""
    return jnp.sum(jnp.sin(z["a"]) * y) + jnp.sum(z["b"] ** 2) * jnp.sum(z["a"]) / 2


def bowl(z, y):
    """A convex loss whose Hessian is singular: it does not depend on the second output."""
    return jnp.exp(z[0] - z[2] - y) + (z[2] - 2 * z[0]) ** 4


def flatten(tree):
    """``ravel_pytree`` without a compilation."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def unflatten(flat, like):
    leaves, treedef = jax.tree.flatten(like)
    parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def spectral(matrix, function):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(function(values)) @ vectors.T


def softmax_case(rng, shape, mass):
    log_p = log_softmax(3 * rng.normal(size=shape), axis=-1)
    cases = zip(mass.ravel(), np.exp(log_p).reshape(-1, shape[-1]), strict=True)
    rows = [a * (np.diag(p) - np.outer(p, p)) for a, p in cases]
    return SoftmaxOutputs(jnp.asarray(log_p), jnp.asarray(mass)), np.zeros(shape), block_diag(*rows)


def make_diagonal(rng):
    entries = {"a": rng.uniform(0.1, 3, (2, 3)), "b": rng.uniform(0.1, 3, (2,)) * [0, 1]}
    entries = jax.tree.map(jnp.asarray, entries)
    return DiagonalOutputs(entries), entries, np.diag(flatten(entries))


def make_softmax(rng):
    shape = [(3, 1), (3, 2), (2, 2, 4)][rng.integers(3)]
    return softmax_case(rng, shape, np.ones(shape[:-1]))


def make_weighted_softmax(rng):
    return softmax_case(rng, (2, 2, 3), rng.uniform(0.5, 2, (2, 2)) * [[1, 0], [1, 1]])


def make_rank_one_steps(rng):
    g = rng.normal(size=(2, 3, 4, 2))
    blocks = [sum(np.outer(v, v) for v in step) / 4 for example in g for step in example]
    return RankOneOutputs(jnp.asarray(g), case_axes=2), np.zeros((2, 3, 2)), block_diag(*blocks)


def make_rank_one_pytree(rng):
    g = {"a": rng.normal(size=(2, 5, 2)), "b": rng.normal(size=(2, 5))}
    like = {"a": np.zeros((2, 2)), "b": np.zeros(2)}
    matrix = np.zeros((6, 6))
    for i in range(2):
        for s in range(5):
            whole = {"a": np.zeros((2, 2)), "b": np.zeros(2)}
            whole["a"][i], whole["b"][i] = g["a"][i, s], g["b"][i, s]
            flat = flatten(whole)
            matrix += np.outer(flat, flat) / 5
    return RankOneOutputs(jax.tree.map(jnp.asarray, g)), like, matrix


def make_convex(rng):
    z, y = jnp.asarray(rng.uniform(-1, 1, (3, 3))), jnp.asarray(rng.normal(size=3))
    return AutodiffOutputs(bowl, z, y), z, per_example_hessians(bowl, z, y)


def make_wiggly(rng, treatment, treat):
    z = {"a": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal(size=(2, 2)))}
    y = jnp.asarray(rng.normal(size=(2, 3)))
    matrix = AutodiffOutputs(wiggly, z, y, treatment, convex=False)
    return matrix, z, spectral(per_example_hessians(wiggly, z, y), treat)


def make_exact(rng):
    return make_wiggly(rng, "exact", lambda values: values)


def make_absolute(rng):
    return make_wiggly(rng, "absolute", np.abs)


def make_clipped(rng):
    return make_wiggly(rng, "clipped", lambda values: np.maximum(values, 0))


def make_eigen(rng):
    factors = rng.normal(size=(2, 2, 3))
    blocks = np.swapaxes(factors, 1, 2) @ factors
    values, vectors = np.linalg.eigh(blocks)
    like = {"a": np.zeros((2, 3))}
    return EigenOutputs(jnp.asarray(np.maximum(values, 0)), jnp.asarray(vectors)), like, block_diag(*blocks)


INDEFINITE = [make_exact]
SEMI_DEFINITE = [
    make_diagonal,
    make_softmax,
    make_weighted_softmax,
    make_rank_one_steps,
    make_rank_one_pytree,
    make_convex,
    make_absolute,
    make_clipped,
    make_eigen,
]


@pytest.mark.parametrize("make", SEMI_DEFINITE + INDEFINITE)
@given(seed=seeds)
@few
def test_product_is_that_of_the_dense_matrix(make, seed):
    matrix, like, expected = make(np.random.default_rng(seed))
    np.testing.assert_allclose(measure(matrix, like).product, expected, rtol=1e-11, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("make", SEMI_DEFINITE)
@given(seed=seeds)
@few
def test_square_root_squares_to_the_matrix_and_has_the_right_transpose(make, seed):
    matrix, like, expected = make(np.random.default_rng(seed))
    measured = measure(matrix, like)
    root = np.asarray(measured.root)
    np.testing.assert_allclose(measured.root_transpose, root.T, atol=1e-12)
    np.testing.assert_allclose(root.T @ root, expected, atol=1e-11 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("make", [make for make in SEMI_DEFINITE if make is not make_eigen])
def test_root_structure_is_that_of_the_root(make):
    matrix, like, _ = make(np.random.default_rng(0))
    root = jax.eval_shape(lambda m, u: m.sqrt_product(u), matrix, like)
    described = jax.tree.map(lambda s: (s.shape, s.dtype), (root, matrix.root_structure))
    assert described[0] == described[1]


@pytest.mark.parametrize("make", SEMI_DEFINITE + INDEFINITE)
@given(seed=seeds)
@few
def test_pseudo_inverse_meets_the_penrose_conditions(make, seed):
    matrix, like, c = make(np.random.default_rng(seed))
    x = np.asarray(measure(matrix, like).pinv)
    c_size, x_size = 1 + np.abs(c).max(), 1 + np.abs(x).max()
    rounding = 1e-14 * c_size * x_size
    np.testing.assert_allclose(c @ x @ c, c, rtol=0, atol=rounding * c_size)
    np.testing.assert_allclose(x @ c @ x, x, rtol=0, atol=rounding * x_size)
    np.testing.assert_allclose(c @ x, (c @ x).T, rtol=0, atol=rounding)
    np.testing.assert_allclose(x @ c, (x @ c).T, rtol=0, atol=rounding)


@pytest.mark.parametrize("make", SEMI_DEFINITE)
@given(seed=seeds)
@few
def test_pinv_quadratic_in_the_range(make, seed):
    rng = np.random.default_rng(seed)
    matrix, like, c = make(rng)
    x = rng.normal(size=len(c))
    values = measure(matrix, unflatten(c @ x, like)).quadratic
    assert values.shape == (jax.tree.leaves(like)[0].shape[0],)
    np.testing.assert_allclose(np.sum(values), x @ c @ x, rtol=1e-9, atol=1e-14)  # (C x)^T C^+ (C x) = x^T C x


@pytest.mark.parametrize("make", [make_weighted_softmax, make_softmax, make_rank_one_pytree, make_convex, make_clipped])
@given(seed=seeds)
@few
def test_pinv_quadratic_is_infinite_along_a_slope_without_curvature(make, seed):
    rng = np.random.default_rng(seed)
    matrix, like, c = make(rng)
    u = rng.normal(size=len(c))
    outside = unflatten(u - c @ np.linalg.pinv(c, rcond=1e-10) @ u, like)
    squares = [np.sum(np.reshape(leaf, (leaf.shape[0], -1)) ** 2, axis=1) for leaf in jax.tree.leaves(outside)]
    computed = measure(matrix, unflatten(u, like)).quadratic
    np.testing.assert_array_equal(np.isinf(computed), sum(squares) > 1e-10)


def test_pinv_quadratic_of_a_zero_matrix_and_of_an_indefinite_one():
    diagonal = DiagonalOutputs(np.zeros((2, 2)))
    measured = measure(diagonal, jnp.array([[0.0, 0.0], [0.0, 1e-9]]))
    np.testing.assert_array_equal(measured.quadratic, [0, np.inf])
    matrix, like, _ = make_exact(np.random.default_rng(0))
    np.testing.assert_array_equal(measure(matrix, like).quadratic, [np.inf, np.inf])


@given(
    values=hnp.arrays(np.float64, (4, 3), elements=st.sampled_from([0.0, 1e-20, 1e-9, 1e-3, 1.0, 30.0])),
    slopes=hnp.arrays(np.float64, (4, 3), elements=st.sampled_from([0.0, 1e-12, 1e-3, 1.0])),
    seed=seeds,
)
@few
def test_pinv_quadratic_never_under_estimates(values, slopes, seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 3, 3)))[0]
    u = (rotation @ slopes[..., None])[..., 0]
    terms = np.divide(slopes**2, values, out=np.where(slopes > 0, np.inf, 0.0), where=values > 0)
    computed = np.asarray(measure(EigenOutputs(jnp.asarray(values), jnp.asarray(rotation)), jnp.asarray(u)).quadratic)
    rounding = 3 * np.finfo(np.float64).eps
    taken_for_rounding = (values <= rounding * values.max(axis=1, keepdims=True)) & (
        slopes < 2e-8 * np.linalg.norm(slopes, axis=1, keepdims=True)
    )
    terms[taken_for_rounding] = 0
    assert np.all(computed >= terms.sum(axis=1) * (1 - 1e-10) - 1e-12)


def test_softmax_pinv_ignores_classes_of_probability_zero():
    log_p = jnp.array([[-1e3, np.log(0.25), np.log(0.75)], [0.0, -1e3, -np.inf]])
    matrix = SoftmaxOutputs(log_p, jnp.ones(2))
    p = np.array([0.0, 0.25, 0.75])
    expected = block_diag(np.linalg.pinv(np.diag(p) - np.outer(p, p)), np.zeros((3, 3)))
    np.testing.assert_allclose(measure(matrix, log_p).pinv, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_softmax_keeps_relative_accuracy_where_one_probability_is_close_to_one(dtype):
    logits = np.array([[0.0, -17.0, -15.0, -20.0], [9.0, 0.0, 1.0, -3.0], [0.0, -34.0, -35.0, -33.0]])
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p = log_p - np.log1p(np.sum(np.where(log_p == 0, 0, np.exp(log_p)), axis=1, keepdims=True))
    matrix = SoftmaxOutputs(jnp.asarray(log_p, dtype), jnp.ones(3, dtype))
    blocks = []
    for row in np.exp(log_p):
        others = np.array([np.sum(np.delete(row, i)) for i in range(4)])  # 1 - p without cancellation
        blocks.append(np.where(np.eye(4), np.diag(row * others), -np.outer(row, row)))
    measured = measure(matrix, matrix.log_probabilities)
    root_transpose = np.asarray(measured.root_transpose, np.float64)
    rounding = 20 * 4 * float(jnp.finfo(dtype).eps)  # eps |log p| in exp(log p), four entries
    np.testing.assert_allclose(measured.product, block_diag(*blocks), rtol=rounding)
    np.testing.assert_allclose(root_transpose @ root_transpose.T, block_diag(*blocks), rtol=rounding)


def test_indefinite_matrix_has_no_square_root():
    matrix, like, _ = make_exact(np.random.default_rng(0))
    with pytest.raises(ValueError, match="no square root; make the loss with another curvature"):
        matrix.sqrt_product(like)
    with pytest.raises(ValueError, match="no square root"):
        matrix.sqrt_transpose_product(like)


def test_rank_one_is_a_mean_over_the_samples():
    same = RankOneOutputs(jnp.broadcast_to(jnp.array([1.0, 2.0]), (1, 7, 2)))
    np.testing.assert_allclose(same.product(jnp.array([[1.0, 0.0]])), [[1.0, 2.0]], rtol=1e-14)


def test_leaves_of_different_dtypes():
    g = {"a": jnp.ones((2, 3, 2), jnp.float32), "b": jnp.ones((2, 3), jnp.float64)}
    u = {"a": jnp.ones((2, 2), jnp.float32), "b": jnp.ones(2, jnp.float64)}
    matrix = RankOneOutputs(g)
    assert matrix.root_structure.dtype == matrix.sqrt_product(u).dtype == jnp.float64
    assert jax.tree.map(lambda x: x.dtype, matrix.product(u)) == jax.tree.map(lambda x: x.dtype, u)
    np.testing.assert_allclose(matrix.product(u)["b"], [3.0, 3.0], rtol=1e-7)


@pytest.mark.parametrize("make", SEMI_DEFINITE + INDEFINITE)
def test_passes_through_jit_without_tracing_anew_and_through_vmap(make):
    traces = 0

    @jax.jit
    def product(matrix, u):
        nonlocal traces
        traces += 1
        return matrix.product(u)

    made = [make(np.random.default_rng(0)) for _ in range(2)]
    pairs = [
        (matrix, jax.tree.map(lambda x, i=i: np.full(x.shape, i + 0.1), like))
        for i, (matrix, like, _) in enumerate(made)
    ]
    for pair in pairs:
        product(*pair)
    assert traces == 1
    mapped = jax.vmap(measure)(*jax.tree.map(lambda *leaves: np.stack(leaves), *pairs))
    for i, pair in enumerate(pairs):
        got = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], mapped)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, measure(*pair))
