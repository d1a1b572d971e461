"""Kronecker maps against the dense matrices that factors stand for, written out entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles
from tests.problems import problem
from tests.tolerances import rounding

L = curvax.losses
EXACT = curvax.GaussNewton()
N = 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def mlp():
    """Joined biases, in the order of the leaves bias, kernel."""
    return problem("mlp")[1:], "error"


def stacked_and_partly_used():
    """Slices of one leaf as blocks, one of them unused; a scale with a diagonal; a leaf without use."""

    def model(params, x):
        for i in range(2):
            x = jnp.tanh(x @ params["w"][i])
        return x * params["gain"]

    params = {"gain": normal(0, 3), "unused": normal(1, 2), "w": normal(2, 3, 3, 3)}
    return (curvax.Objective(model, L.squared_error()), params, (normal(3, N, 3), normal(4, N, 3))), "error"


def scaled_and_added():
    """Maps L that scale and add: W = 3 (p + q^T), with a bias scaled otherwise."""

    def model(params, x):
        return x @ (3.0 * (params["p"] + params["q"].T)) + 2.0 * params["b"]

    params = {"b": normal(0, 2), "p": normal(1, 3, 2), "q": normal(2, 2, 3)}
    return (curvax.Objective(model, L.softmax_cross_entropy()), params, (normal(3, N, 3), jnp.arange(N) % 2)), "error"


def experts_and_embedding():
    def model(params, tokens):
        x = params["table"][tokens]
        out = jnp.tanh(jnp.einsum("nd,edo->neo", x, params["experts"]))
        return jnp.einsum("neo,eop->np", out, params["heads"]) * jnp.exp(params["temperature"])

    params = {"experts": normal(0, 2, 2, 3), "heads": normal(1, 2, 3, 2), "table": normal(2, 4, 2)}
    params["temperature"] = jnp.array(0.2)
    return (curvax.Objective(model, L.squared_error()), params, (jnp.arange(N) % 4, normal(4, N, 2))), "diagonal"


def matrix_and_scale():
    """One leaf whose rows are a matrix and a scale."""

    def model(params, x):
        return jnp.tanh(x @ params["w"][:3]) * params["w"][3]

    params = {"w": normal(0, 4, 2)}
    return (curvax.Objective(model, L.squared_error()), params, (normal(1, N, 3), normal(2, N, 2))), "error"


PROBLEMS = [mlp, stacked_and_partly_used, scaled_and_added, experts_and_embedding, matrix_and_scale]


def dense_of(layers, factors, params):
    """sum_blocks L^T (A (x) G) L with L by products with unit vectors, and the diagonals."""
    size = trees.size(params)
    dense, held = np.zeros((size, size)), np.zeros(size, bool)
    for block, a, g in zip(layers.treatment.kronecker, factors.inputs, factors.outputs, strict=True):
        # L^+ with L^+ L^+^T = 1 / d gives L^T = L^+ d.
        plus = jax.jit(jax.vmap(lambda v, block=block: _flat(block.to_params(v), params)))(
            np.eye(int(np.prod(block.shape))).reshape(-1, *block.shape)
        )
        plus = np.asarray(plus).T
        transpose = plus / np.sum(plus**2, axis=0)
        full = [np.stack([np.diag(m) for m in x]) if x.ndim == 2 else np.asarray(x) for x in (a, g)]
        inner = [np.kron(x, y) for x, y in zip(*full, strict=True)]
        count = len(inner)
        middle = np.block([[inner[i] if i == j else 0 * inner[i] for j in range(count)] for i in range(count)])
        dense += transpose @ middle @ transpose.T
        held |= np.any(transpose != 0, axis=1)
    starts = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(params))])
    for place, d in zip(layers.treatment.diagonal, factors.diagonals, strict=True):
        own = np.arange(starts[place], starts[place + 1])
        values = np.where(held[own], np.diag(dense)[own], np.ravel(d))
        dense[own, own] = values
    return dense


def _flat(moved, params):
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.zeros_like, params))
    for place, leaf in moved.items():
        leaves[place] = leaf
    return trees.ravel(treedef.unflatten(leaves))


def function_of(matrix, function):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(function(values)) @ vectors.T


def answers(K, vector, key, damping):
    return {
        "product": trees.ravel(K(vector)),
        "quadratic": K.quadratic(vector),
        "solve": trees.ravel(K.solve(vector, damping=damping)),
        "sqrt": trees.ravel(K.sqrt(vector)),
        "inverse_sqrt": trees.ravel(K.inverse_sqrt(vector, damping=damping)),
        "logdet": K.logdet(damping=damping),
        "trace": K.trace(),
        "diagonal": trees.ravel(K.diagonal()),
        "dense": K.to_dense(),
        "sample": trees.ravel(K.sample(key)),
    }


def expected_answers(dense, v, noise, damping):
    damped = dense + damping * np.eye(len(dense))
    return {
        "product": dense @ v,
        "quadratic": v @ dense @ v,
        "solve": np.linalg.solve(damped, v),
        "sqrt": function_of(dense, lambda x: np.sqrt(np.maximum(x, 0))) @ v,
        "inverse_sqrt": function_of(damped, lambda x: 1 / np.sqrt(x)) @ v,
        "logdet": np.linalg.slogdet(damped)[1],
        "trace": np.trace(dense),
        "diagonal": np.diag(dense),
        "dense": dense,
        "sample": function_of(dense, lambda x: np.sqrt(np.maximum(x, 0))) @ noise,
    }


def check(found, dense, v, noise, damping):
    largest = np.linalg.eigvalsh(dense)[-1]
    for name, value in expected_answers(dense, v, noise, damping).items():
        # The root of an eigenvalue that rounding moved from zero by eps is sqrt(eps).
        roots = name in ("sqrt", "sample")
        scale = max(float(np.max(np.abs(value))), largest)
        tolerance = rounding(float, 100 * len(dense), scale, 1 + largest / damping)
        np.testing.assert_allclose(
            found[name], value, atol=np.sqrt(rounding(float, len(dense))) * scale if roots else tolerance, err_msg=name
        )


@pytest.mark.many_compilations("blocks are looked at by small programs, which the dense oracle does for every one")
@pytest.mark.parametrize("make", PROBLEMS)
def test_every_answer_is_that_of_the_dense_matrix(make):
    (objective, params, batch), fallback = make()
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)
    vector = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), params)
    key, damping = jax.random.key(1), 0.3

    @jax.jit
    def compute(params, batch, vector):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        K = curvax.kronecker_map(layers, factors, params)
        return factors, answers(K, vector, key, damping), answers(K.decomposed(), vector, key, damping)

    factors, plain, by_eigenvectors = compute(params, batch, vector)
    dense = dense_of(layers, factors, params)
    noise = np.asarray(trees.ravel(jax.jit(lambda: trees.random_normal(key, params))()))
    for found in (plain, by_eigenvectors):
        check(found, dense, np.asarray(trees.ravel(vector)), noise, damping)


@pytest.mark.many_compilations("the squares of the layers' maps are found by small programs of their own")
def test_scaled_blocks_have_the_curvature_of_their_parameters():
    """For one example the map is the Gauss-Newton matrix itself, the null space of the sum p + q^T included."""
    (objective, params, batch), _ = scaled_and_added()
    batch = jax.tree.map(lambda leaf: leaf[:1], batch)
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        K = curvax.kronecker_map(layers, factors, params)
        return K.to_dense(), oracles.dense_ggn(objective, params, batch)

    found, exact = compute(params, batch)
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_maps_are_pytrees_and_not_retraced():
    (objective, params, batch), _ = mlp()
    layers = curvax.find_layers(objective, params, batch)
    traces = []

    @jax.jit
    def product(K, vector):
        traces.append(1)
        return K(vector), K.decomposed().solve(vector, damping=1.0)

    for seed in range(2):
        factors = curvax.layers.KroneckerFactors(
            *(tuple(seed + jnp.ones(b.shape[:1] + (b.shape[i],) * 2) for b in layers.blocks) for i in (1, 2)),
            (),
            (),
            (),
        )
        product(curvax.kronecker_map(layers, factors, params), params)
    assert len(traces) == 1


def test_dtypes_of_the_parameters_are_kept():
    """Products are worked out in float32 for parameters in bfloat16; a diagonal, of squares, stays in it."""
    objective = curvax.Objective(lambda w, x: x @ w, L.squared_error())
    w, batch = normal(0, 3, 2).astype(jnp.bfloat16), (normal(1, N, 3).astype(jnp.bfloat16), jnp.zeros((N, 2)))
    batch = batch[0], batch[1].astype(jnp.bfloat16)
    layers = curvax.find_layers(objective, w, batch)

    @jax.jit
    def compute(w, batch):
        tapped = curvax.tap(layers, objective.linearize(w, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        K = curvax.kronecker_map(layers, factors, w)
        return (factors, K.diagonal()), (K(w), K.solve(w, damping=0.5)), K.trace()

    wide, leaves, trace = compute(w, batch)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} | {trace.dtype} == {jnp.dtype(jnp.float32)}


@pytest.mark.many_compilations("maps are looked at while tracing, one equation at a time")
def test_what_has_no_kronecker_product_is_refused():
    x, v = normal(0, N, 3), normal(1, 3, 2)
    scales = jnp.asarray(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]))
    objective = curvax.Objective(lambda w, x: x @ (w * scales), L.squared_error())
    layers = curvax.find_layers(objective, v, (x, jnp.zeros((N, 2))))
    factors = jax.eval_shape(lambda: curvax.layers.zero_factors(layers))
    with pytest.raises(ValueError, match="its entries are scaled each by a factor of its own"):
        curvax.kronecker_map(layers, factors, v)

    def rotated(params, x):
        return x @ jnp.concatenate([params["p"] + params["q"], params["p"] - params["q"]])

    params = {"p": normal(2, 2, 2), "q": normal(3, 2, 2)}
    objective = curvax.Objective(rotated, L.squared_error())
    layers = curvax.find_layers(objective, params, (normal(4, N, 4), jnp.zeros((N, 2))))
    factors = jax.eval_shape(lambda: curvax.layers.zero_factors(layers))
    with pytest.raises(ValueError, match="an entry of a parameter is in several of its matrices' entries"):
        curvax.kronecker_map(layers, factors, params)


def test_arguments_are_checked():
    (objective, params, batch), _ = mlp()
    layers = curvax.find_layers(objective, params, batch)
    factors = jax.jit(lambda: curvax.layers.zero_factors(layers))()
    with pytest.raises(ValueError, match="the parameters are not those that find_layers saw"):
        curvax.kronecker_map(layers, factors, params[:1])
    with pytest.raises(ValueError, match="the factors are not those of these layers"):
        curvax.kronecker_map(layers, factors._replace(inputs=()), params)
    with pytest.raises(ValueError, match="vector"):
        curvax.kronecker_map(layers, factors, params)(params[:1])
