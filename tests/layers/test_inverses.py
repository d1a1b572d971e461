"""Inverses of Kronecker-factored curvature against dense matrices that are formed and solved with in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from curvax.layers.ekfac import EigenCorrected
from curvax.layers.factor_damping import mean_curvature
from curvax.layers.factors import KroneckerFactors, zero_factors
from curvax.layers.inverses import BlockDiagonal, ExactTikhonov, precondition, two_sided
from curvax.layers.tridiagonal import BlockTridiagonal
from tests import oracles

GAMMA = 0.3
INVERSES = [BlockDiagonal(m) for m in ("cholesky", "schur", "eigen", "newton_schulz")]
INVERSES += [ExactTikhonov(), BlockTridiagonal(), BlockTridiagonal("newton_schulz"), BlockTridiagonal(doublings=6)]
INVERSES += [EigenCorrected()]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def every_kind():
    """An embedding, layers under scan, a dense layer with its bias, a scale, and a leaf without structure."""

    def model(params, tokens):
        x = params["table"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return (x @ params["w"] + params["b"]) * params["gain"] * jnp.exp(params["temperature"])

    params = {
        "b": normal(0, 4),
        "gain": normal(1, 4),
        "stack": normal(2, 2, 3, 3),
        "table": normal(3, 6, 3),
        "temperature": jnp.array(0.2),
        "w": normal(4, 3, 4),
    }
    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = (jnp.arange(5) % 6, jnp.zeros((5, 4)))
    return curvax.find_layers(objective, params, batch, fallback="gradient"), params


def random_factors(layers, seed, pairs=()):
    """Definite factors, no two alike, and cross factors that are small."""
    rng = np.random.default_rng(seed)

    def of(zeros):
        if zeros.ndim == 2:
            return rng.uniform(0.5, 2, zeros.shape)
        rows = rng.normal(size=zeros.shape)
        return rows @ rows.swapaxes(1, 2) / zeros.shape[-1]

    zeros = jax.tree.map(np.asarray, zero_factors(layers, pairs))
    sides = (tuple(map(of, side)) for side in (zeros.inputs, zeros.outputs))
    cross = (tuple(0.05 * rng.normal(size=x.shape) for x in side) for side in (zeros.cross_inputs, zeros.cross_outputs))
    diagonals = tuple(rng.uniform(0.5, 2, x.shape) for x in zeros.diagonals)
    return KroneckerFactors(*sides, diagonals, *cross)


def full(factor):
    """Each matrix of a factor, in full."""
    return [np.diag(x) if x.ndim == 1 else np.asarray(x) for x in factor]


def damped(a, g, gamma, balanced=True):
    """Martens 2016, eq. 6.7, for one matrix; else Heskes 2000."""
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g))) if balanced else 1.0
    return a + pi * gamma * np.eye(len(a)), g + gamma / pi * np.eye(len(g))


def dense_solution(a, g, v, exact, balanced=True):
    """By the matrix on the rows of V one behind another, A (x) G."""
    matrix = np.kron(a, g) + GAMMA**2 * np.eye(v.size) if exact else np.kron(*damped(a, g, GAMMA, balanced))
    return np.linalg.solve(matrix, np.ravel(v)).reshape(v.shape)


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("inverse", [BlockDiagonal(), BlockDiagonal(balanced=False), ExactTikhonov()])
def test_every_leaf_is_solved_with_its_own_matrix(inverse):
    layers, params = every_kind()
    factors, gradient = random_factors(layers, 0), jax.tree.map(lambda x: normal(7, *x.shape), params)

    @jax.jit
    def compute(factors, gradient):
        prepared = inverse.prepare(layers, factors, GAMMA, None)
        return precondition(layers, inverse, prepared, factors, GAMMA, gradient)

    found = compute(factors, gradient)
    exact = isinstance(inverse, ExactTikhonov)
    blocks = {block.name: i for i, block in enumerate(layers.treatment.kronecker)}
    assert set(blocks) == {"table", "stack", "w"}
    gradients = {
        "table": [np.asarray(gradient["table"])],
        "stack": list(np.asarray(gradient["stack"])),
        "w": [np.concatenate([gradient["w"], gradient["b"][None]])],
    }
    solved = {
        name: [
            dense_solution(a, g, v, exact, getattr(inverse, "balanced", True))
            for a, g, v in zip(full(factors.inputs[i]), full(factors.outputs[i]), gradients[name], strict=True)
        ]
        for name, i in blocks.items()
    }
    np.testing.assert_allclose(found["table"], solved["table"][0], rtol=1e-9)
    np.testing.assert_allclose(found["stack"], solved["stack"], rtol=1e-9)
    np.testing.assert_allclose(found["w"], solved["w"][0][:3], rtol=1e-9)
    np.testing.assert_allclose(found["b"], solved["w"][0][3], rtol=1e-9)
    (gain,) = factors.diagonals
    np.testing.assert_allclose(found["gain"], gradient["gain"] / (gain + GAMMA**2), rtol=1e-12)
    # What has no curvature has the mean of all that have one.
    pairs = [(full(a), full(g)) for a, g in zip(factors.inputs, factors.outputs, strict=True)]
    values = [np.diag(np.kron(a, g)) for one in pairs for a, g in zip(*one, strict=True)]
    mean = np.mean(np.concatenate([*values, gain])) + GAMMA**2
    np.testing.assert_allclose(found["temperature"], gradient["temperature"] / mean, rtol=1e-12)


def with_parts_that_no_block_holds():
    """A slice without use, a bias that is used in part, and two leaves that are added up."""

    def model(params, x):
        x = jnp.tanh(x @ params["stack"][0] + params["b"][:3])
        return jnp.tanh(x @ params["stack"][2]) @ (params["p"] + 2 * params["q"].T)

    params = {"b": normal(0, 5), "p": normal(1, 3, 2), "q": normal(2, 2, 3), "stack": normal(3, 3, 3, 3)}
    objective = curvax.Objective(model, curvax.losses.squared_error())
    return curvax.find_layers(objective, params, (jnp.ones((4, 3)), jnp.zeros((4, 2)))), params


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("inverse", [BlockDiagonal(), ExactTikhonov()])
def test_what_no_block_holds_has_the_mean_curvature(inverse):
    """The matrix is invertible on all parameters, and symmetric: a preconditioner for any vector."""
    layers, params = with_parts_that_no_block_holds()
    factors = random_factors(layers, 0)

    @jax.jit
    def compute(factors, vectors):
        prepared = inverse.prepare(layers, factors, GAMMA, None)
        apply = lambda v: precondition(layers, inverse, prepared, factors, GAMMA, v)  # noqa: E731
        return jax.vmap(apply)(vectors), mean_curvature(layers, factors)

    size = trees.size(params)
    vectors = jax.vmap(lambda v: trees.unravel(v, params))(jnp.eye(size))
    found, mean = compute(factors, vectors)
    matrix = np.stack([np.concatenate([np.ravel(leaf[i]) for leaf in jax.tree.leaves(found)]) for i in range(size)])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.min(np.linalg.eigvalsh(matrix)) > 1e-3
    # b, p, q, stack; without use are two entries of b and the second matrix of the stack, and of p and q what does not
    # change p + 2 q^T.
    unused = [3, 4, *range(5 + 12 + 9, 5 + 12 + 18)]
    np.testing.assert_allclose(matrix[unused], np.eye(size)[unused] / (mean + GAMMA**2), rtol=1e-12)
    apart = np.zeros(size)
    apart[5], apart[5 + 6] = 2.0, -1.0
    np.testing.assert_allclose(matrix @ apart, apart / (mean + GAMMA**2), atol=1e-12)


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_what_a_block_holds_is_not_left_over_where_the_model_rounds(scale):
    """Leaves that a model casts to half precision, in a net whose parameters and gradients are float32."""

    def model(params, x):
        w, b = (params[name].astype(jnp.bfloat16) * scale for name in ("w", "b"))
        return (x.astype(jnp.bfloat16) @ w + b[:2]).astype(jnp.float32)

    params = {"b": normal(0, 3).astype(jnp.float32), "w": normal(1, 4, 2).astype(jnp.float32)}
    objective = curvax.Objective(model, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, (jnp.ones((5, 4), jnp.float32), jnp.zeros((5, 2), jnp.float32)))
    assert layers.treatment.incomplete == (0, 1)
    rest = jax.jit(layers.treatment.left_over)(params)
    np.testing.assert_allclose(rest[0], params["b"] * np.array([0, 0, 1], np.float32), atol=1e-6)
    np.testing.assert_allclose(rest[1], 0, atol=1e-6)
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_factors(layers, 0))
    solve = jax.jit(lambda v: curvax.layers.kronecker_preconditioner(layers, factors, damping=jnp.float32(0.1))(v))
    assert trees.structure_of(solve(params)) == trees.structure_of(params)


def badly_scaled():
    """Inputs that are mixed after they were scaled, of a net of two layers; its exact factors with their pairs."""
    draw = np.random.default_rng(2)
    x = draw.normal(size=(60, 12)) * np.geomspace(10, 0.01, 12) @ np.linalg.qr(draw.normal(size=(12, 12)))[0]
    params = {"u": jnp.asarray(draw.normal(size=(12, 5)) / 12), "v": jnp.asarray(draw.normal(size=(5, 3)))}
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"], curvax.losses.softmax_cross_entropy())
    batch = jnp.asarray(x), jnp.asarray(draw.integers(0, 3, 60))
    return objective, params, batch, curvax.find_layers(objective, params, batch)


@pytest.mark.parametrize("inverse", [BlockDiagonal(), BlockTridiagonal(), ExactTikhonov()], ids=str)
def test_conjugate_gradients_need_fewer_iterations_with_it(inverse):
    objective, params, batch, layers = badly_scaled()
    damping, vector = 1e-4, jax.tree.map(lambda x: normal(5, *x.shape), params)

    @jax.jit
    def compute(params, batch):
        at = objective.linearize(params, batch)
        factors = curvax.layers.kronecker_factors(
            curvax.tap(layers, at), curvature=curvax.Fisher(), pairs=inverse.pairs(layers)
        )
        matrix = lambda v: trees.add_scaled(curvax.ggn(at)(v), damping, v)  # noqa: E731
        P = curvax.layers.kronecker_preconditioner(layers, factors, damping=damping, inverse=inverse)
        options = {"max_iterations": 1000, "tolerance": 1e-8}
        return [curvax.solvers.cg(matrix, vector, preconditioner=p, **options) for p in (P, None)]

    with_it, without = compute(params, batch)
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    exact = np.linalg.solve(dense + damping * np.eye(len(dense)), flat(vector))
    for found in (with_it, without):
        np.testing.assert_allclose(flat(found.value), exact, atol=1e-4 * np.max(np.abs(exact)))
    assert int(with_it.iterations) < 0.75 * int(without.iterations)


def test_a_preconditioner_says_what_its_factors_lack():
    objective, params, batch, layers = badly_scaled()
    factors = curvax.layers.kronecker_factors(
        curvax.tap(layers, objective.linearize(params, batch)), curvature=curvax.Fisher()
    )
    for inverse, advice in (
        (BlockTridiagonal(), r"1 pairs of blocks.*pairs=inverse.pairs\(layers\)"),
        (EigenCorrected(), r"(?s)learns from gradients.*with_values\(s\)"),
    ):
        with pytest.raises(ValueError, match=advice):
            curvax.layers.kronecker_preconditioner(layers, factors, damping=0.1, inverse=inverse)
    more = curvax.layers.kronecker_factors(
        curvax.tap(layers, objective.linearize(params, batch)), curvature=curvax.Fisher(), pairs=((0, 1),)
    )
    plain, same = (
        jax.jit(lambda v, own=own: curvax.layers.kronecker_preconditioner(layers, own, damping=0.1)(v))(params)
        for own in (factors, more)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), plain, same)


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("inverse", INVERSES, ids=str)
def test_what_is_prepared_is_a_fixed_point_and_starts_from_shapes(inverse):
    """It is carried by a scan and chosen by a cond, in the dtype of the factors; gamma may be of another."""
    layers, _ = every_kind()
    pairs = inverse.pairs(layers)
    start = inverse.start(layers)

    @jax.jit
    def compute(factors, gamma):
        def step(prepared, number):
            new = lambda old: inverse.prepare(layers, factors, gamma, old)  # noqa: E731
            return jax.lax.cond(number < 2, new, lambda old: old, prepared), None

        found, _ = jax.lax.scan(step, start, jnp.arange(3))
        return (
            found,
            inverse.redamp(layers, factors, 2 * gamma, found),
            inverse.prepare(layers, factors, 2 * gamma, None),
        )

    found, again, afresh = compute(random_factors(layers, 1, pairs), jnp.asarray(GAMMA, jnp.float32))
    assert trees.structure_of(found) == trees.structure_of(start)
    for own, other in zip(jax.tree.leaves(again), jax.tree.leaves(afresh), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-9, atol=1e-9)


def test_exact_damping_of_a_factor_that_rounding_made_indefinite_is_positive():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w, batch = jnp.zeros((2, 2), jnp.float32), (jnp.ones((3, 2), jnp.float32), jnp.zeros((3, 2), jnp.float32))
    layers = curvax.find_layers(objective, w, batch)
    a = np.array([[[1.0, 1.0], [1.0, 1.0 - 1e-6]]], np.float32)
    factors = KroneckerFactors((a,), (a,), (), (), ())

    @jax.jit
    def compute(factors, v):
        inverse = ExactTikhonov()
        return inverse.apply(layers, inverse.prepare(layers, factors, 1e-3, None), (v,))

    v = np.array([[[1.0, -1.0], [-1.0, 1.0]]], np.float32)  # where both are nearly zero
    (found,) = compute(factors, v)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, v / 1e-6, rtol=1e-3)


def test_products_from_both_sides():
    a, v, g = np.random.default_rng(0).normal(size=(3, 2, 3, 3))
    found = jax.jit(lambda: (two_sided(a, v, g), two_sided(a[0][:2], v, g), two_sided(a, v, g[0][:2])))()
    for own, left, right in zip(found, (a, map(np.diag, a[0][:2]), a), (g, g, map(np.diag, g[0][:2])), strict=True):
        exact = [x @ y @ z for x, y, z in zip(left, v, right, strict=True)]
        np.testing.assert_allclose(own, exact, atol=1e-12)
