"""Kronecker factors against dense curvature matrices and explicit second moments, wherever they are exact."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax
from curvax import trees
from curvax.layers import blocks
from curvax.layers.factor_damping import mean_curvature
from curvax.layers.factors import SomePositions, factors_of, zero_factors
from tests import oracles
from tests.layers.cases import CASES, N
from tests.problems import problem

L = curvax.losses
EXACT = curvax.GaussNewton()


@pytest.fixture(autouse=True)
def _promotion():
    """Modules of other libraries rely on jax's ordinary promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def factors_at(objective, params, batch, curvature=EXACT, key=None, fallback="error", sharing="expand", chained=False):
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)
    pairs = curvax.layers.BlockTridiagonal().pairs(layers) if chained else ()

    @jax.jit
    def compute(params, batch, key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return curvax.layers.kronecker_factors(tapped, key, curvature=curvature, sharing=sharing, pairs=pairs)

    return layers, compute(params, batch, key)


def krons(factors):
    """A (x) G of each block that has one matrix, dense."""
    sides = zip(factors.inputs, factors.outputs, strict=True)
    return [np.kron(*(np.diag(x[0]) if x.ndim == 2 else np.asarray(x[0]) for x in pair)) for pair in sides]


def places(params, *names):
    """The places of leaves, one after another, in the ravelled parameters."""
    paths, leaves = trees.leaf_paths(params), jax.tree.leaves(params)
    starts = dict(zip(paths, itertools.accumulate([0, *(leaf.size for leaf in leaves)]), strict=False))
    sizes = dict(zip(paths, (leaf.size for leaf in leaves), strict=True))
    return np.concatenate([np.arange(sizes[name]) + starts[name] for name in names])


def block_of(dense, params, *names):
    own = places(params, *names)
    return np.asarray(dense)[np.ix_(own, own)]


def affine(params, x):
    return x @ params["w"] + params["b"]


AFFINE = {"b": normal(0, 2), "w": normal(1, 3, 2)}


# --- where the factors are the whole matrix --------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_linear_layer_with_squared_error_is_its_whole_fisher_matrix(weighted):
    options = {"example_weights": lambda batch: jnp.exp(batch[0][:, 0]), "weight": 3.0} if weighted else {}
    objective = curvax.Objective.from_terms(curvax.Term(affine, L.squared_error(), **options))
    batch = normal(2, N, 3), normal(3, N, 2)
    _, factors = factors_at(objective, AFFINE, batch)
    exact = block_of(jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(AFFINE, batch), AFFINE, "w", "b")
    np.testing.assert_allclose(krons(factors)[0], exact, atol=1e-12)


def test_a_deep_linear_network_with_squared_error_is_its_block_diagonal():
    _, objective, params, batch = problem("deep_linear")
    _, factors = factors_at(objective, params, batch)
    dense = jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(params, batch)
    for i, found in enumerate(krons(factors)):
        np.testing.assert_allclose(found, block_of(dense, params, str(i)), atol=1e-12)


@pytest.mark.parametrize("curvature", [curvax.Fisher(), curvax.EmpiricalFisher()])
def test_one_example_of_any_network_is_its_block_diagonal(curvature):
    _, objective, params, batch = problem("mlp")
    batch = jax.tree.map(lambda leaf: leaf[:1], batch)
    _, factors = factors_at(objective, params, batch, curvature)
    oracle = oracles.dense_fisher if curvature == curvax.Fisher() else oracles.dense_empirical_fisher
    dense = jax.jit(lambda p, b: oracle(objective, p, b))(params, batch)
    for i, found in enumerate(krons(factors)):
        np.testing.assert_allclose(found, block_of(dense, params, f"{i}/kernel", f"{i}/bias"), atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_expand_is_exact_where_each_position_has_a_loss_of_its_own(masked):
    """Steps that a mask leaves out count in neither factor."""
    x, y, mask = normal(2, N, 4, 3), normal(3, N, 4, 2), np.arange(4) < np.array([[4], [1], [2], [3], [0]])
    options = {"mask": lambda batch: batch[0][1]} if masked else {}
    objective = curvax.Objective(lambda p, inputs: affine(p, inputs[0]), L.squared_error(), **options)
    batch = (x, jnp.asarray(mask)), y
    _, factors = factors_at(objective, AFFINE, batch)
    dense = jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(AFFINE, batch)
    np.testing.assert_allclose(krons(factors)[0], block_of(dense, AFFINE, "w", "b"), atol=1e-12)


def test_reduce_is_exact_where_linear_outputs_are_averaged():
    objective = curvax.Objective(lambda p, x: jnp.mean(affine(p, x), axis=1), L.squared_error())
    batch = normal(2, N, 4, 3), normal(3, N, 2)
    exact = block_of(jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(AFFINE, batch), AFFINE, "w", "b")
    reduced, expanded = (
        krons(factors_at(objective, AFFINE, batch, sharing=sharing)[1])[0] for sharing in ("reduce", "expand")
    )
    np.testing.assert_allclose(reduced, exact, atol=1e-12)
    assert np.linalg.norm(expanded - exact) > 0.1 * np.linalg.norm(exact)


CONVOLUTIONS = {
    "strided": ((3, 2, 2, 4), {"window_strides": (2, 1)}, (6, 5, 2)),
    "dilated": ((2, 3, 2, 3), {"rhs_dilation": (2, 2)}, (6, 7, 2)),
    "grouped": ((3, 2, 2, 6), {"feature_group_count": 2, "padding": "VALID"}, (4, 4, 4)),
    "depthwise": ((2, 2, 1, 6), {"feature_group_count": 3, "padding": [(1, 0), (0, 1)]}, (3, 4, 3)),
    "transposed": ((2, 3, 2, 3), {"lhs_dilation": (2, 2), "padding": [(1, 1), (2, 1)]}, (3, 3, 2)),
    "one axis": ((3, 2, 4), {"window_strides": (2,), "rhs_dilation": (2,)}, (7, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_with_squared_error_is_its_whole_matrix(name):
    """Every output position has a loss of its own, so A is the second moment of the patches, whatever the kind."""
    kernel, options, image = CONVOLUTIONS[name]
    axes = ("NHWC", "HWIO", "NHWC") if len(kernel) == 4 else ("NHC", "HIO", "NHC")
    options = {"window_strides": (1,) * (len(kernel) - 2), "padding": "SAME", **options}

    def model(params, x):
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=axes, **options) + params["b"]

    params = {"b": normal(0, kernel[-1]), "w": normal(1, *kernel)}
    x = normal(2, 2, *image)
    targets = jnp.zeros(jax.eval_shape(model, params, x).shape)
    objective = curvax.Objective(model, L.squared_error())
    layers, factors = factors_at(objective, params, (x, targets))
    (block,) = layers.treatment.kronecker
    assert block.bias is not None
    dense = jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(params, (x, targets))
    found = jax.jit(lambda f: curvax.kronecker_map(layers, f, params).to_dense())(factors)
    np.testing.assert_allclose(found, dense, atol=1e-11)


def test_patches_are_those_of_jax():
    kernel, x = normal(0, 3, 2, 2, 4), normal(1, N, 5, 6, 2)
    axes = ("NHWC", "HWIO", "NHWC")
    objective = curvax.Objective(
        lambda w, x: jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=axes), L.squared_error()
    )
    _, factors = factors_at(objective, kernel, (x, jnp.zeros((N, 3, 6, 4))))
    patches = jax.lax.conv_general_dilated_patches(x, (3, 2), (2, 1), "SAME", dimension_numbers=axes)
    rows = np.asarray(patches).reshape(-1, 2, 6).swapaxes(1, 2).reshape(-1, 12)  # they have the channels first
    np.testing.assert_allclose(factors.inputs[0][0], rows.T @ rows / len(rows), atol=1e-12)
    np.testing.assert_allclose(factors.outputs[0][0], len(rows) / N * np.eye(4), atol=1e-12)


def test_embeddings_count_their_rows():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 5, (N, 3)))
    objective = curvax.Objective(lambda table, t: table[t], L.squared_error())
    table, batch = normal(0, 5, 2), (tokens, normal(2, N, 3, 2))
    _, factors = factors_at(objective, table, batch)
    assert factors.inputs[0].shape == (1, 5)
    dense = jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(table, batch)
    np.testing.assert_allclose(krons(factors)[0], dense, atol=1e-12)


# --- weights that are used several times -----------------------------------------------------------------------------


def test_tied_uses_are_concatenated_positions():
    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2)}

    def several(params, x):
        return jnp.stack([jnp.tanh(x[:, i] @ params["w"]) @ params["v"] for i in range(3)], axis=1)

    def at_once(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    batch = normal(2, N, 3, 3), normal(3, N, 3, 2)
    both = [factors_at(curvax.Objective(model, L.squared_error()), params, batch)[1] for model in (several, at_once)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *both)


def test_exchanged_uses_are_brought_to_one_scale():
    """y = x W W^T with several columns: A_1 (x) G_1 + G_2 (x) A_2, nearly, with the trace of that."""
    w, x = normal(0, 4, 3), normal(1, N, 4)
    weights = np.exp(np.asarray(x[:, 0]))
    objective = curvax.Objective(
        lambda w, x: x @ w @ w.T, L.squared_error(), example_weights=lambda batch: jnp.exp(batch[0][:, 0])
    )
    _, factors = factors_at(objective, w, (x, jnp.zeros((N, 4))))
    share = weights / N
    a1 = np.einsum("n,ni,nj->ij", share / share.sum(), x, x)
    a2 = np.asarray(w).T @ a1 @ w
    g1, g2 = share.sum() * np.asarray(w).T @ w, share.sum() * np.eye(4)
    traces = [np.trace(m) for m in (a1, g1, g2, a2)]
    move = np.sqrt(traces[0] * traces[3] / (traces[1] * traces[2]))
    product = np.kron(a1 + move * g2, g1 + a2 / move)
    whole = traces[0] * traces[1] + traces[2] * traces[3]
    np.testing.assert_allclose(krons(factors)[0], product * whole / np.trace(product), rtol=1e-10)


def test_a_use_without_weight_has_no_part():
    """A term of weight zero neither adds to G nor to the mean of A."""
    terms = [
        curvax.Term(affine, L.squared_error(), select=lambda b: (b[0], b[2]), weight=2.0),
        curvax.Term(affine, L.squared_error(), select=lambda b: (b[1], b[2]), weight=0.0),
    ]
    batch = normal(1, N, 3), 7 + normal(2, N, 3), normal(3, N, 2)
    _, both = factors_at(curvax.Objective.from_terms(*terms), AFFINE, batch)
    _, one = factors_at(curvax.Objective.from_terms(terms[0]), AFFINE, batch)
    np.testing.assert_allclose(krons(both)[0], krons(one)[0], atol=1e-12)


def test_layers_under_scan_are_those_of_the_loop():
    params = {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4)}

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"]), None), x, params)[0]

    def unrolled(params, x):
        for p in params:
            x = jnp.tanh(x @ p["w"] + p["b"])
        return x

    batch = normal(2, N, 4), normal(3, N, 4)
    apart = [{key: leaf[i] for key, leaf in params.items()} for i in range(3)]
    _, together = factors_at(curvax.Objective(scanned, L.squared_error()), params, batch)
    _, loop = factors_at(curvax.Objective(unrolled, L.squared_error()), apart, batch)
    for i in range(3):
        np.testing.assert_allclose(together.inputs[0][i], loop.inputs[i][0], atol=1e-12)
        np.testing.assert_allclose(together.outputs[0][i], loop.outputs[i][0], atol=1e-12)


# --- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [curvax.Fisher, curvax.GaussNewton])
def test_draws_converge_to_the_exact_factors(kind):
    _, objective, params, batch = problem("mlp")
    _, exact = factors_at(objective, params, batch, kind())
    _, drawn = factors_at(objective, params, batch, kind(num_samples=4000), jax.random.key(0))
    for a, b in zip(exact.inputs, drawn.inputs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    for a, b in zip(exact.outputs, drawn.outputs, strict=True):
        # Six standard errors of 24,000 draws, whose squares have a standard deviation of at most a few means.
        assert np.linalg.norm(a - b) < 6 * 3 / np.sqrt(24_000) * np.linalg.norm(a)


def test_the_empirical_factors_are_second_moments_of_explicit_gradients():
    _, objective, params, batch = problem("mlp")
    _, factors = factors_at(objective, params, batch, curvax.EmpiricalFisher())
    rows, scale = jax.jit(lambda p, b: oracles.case_gradients(objective.terms[0], p, b))(params, batch)
    for i, found in enumerate(factors.outputs):
        g = np.asarray(rows)[:, places(params, f"{i}/bias")]  # the gradient of a bias is that of its outputs
        np.testing.assert_allclose(found[0], np.einsum("n,ni,nj->ij", scale, g, g), atol=1e-12)
    a = np.concatenate([batch[0], np.ones((6, 1))], axis=1)
    np.testing.assert_allclose(factors.inputs[0][0], a.T @ a / 6, atol=1e-12)


def test_cross_factors_are_second_moments_of_two_layers():
    """E[a_0 a_1^T] and E[g_0 g_1^T], of weighted examples."""
    _, objective, params, batch = problem("weighted")
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=curvax.EmpiricalFisher(), pairs=((0, 1),))
        return factors, oracles.case_gradients(objective.terms[0], params, batch), zero_factors(layers, ((0, 1),))

    factors, (rows, scale), zeros = compute(params, batch)
    g = [np.asarray(rows)[:, places(params, f"{i}/bias")] for i in range(2)]
    np.testing.assert_allclose(factors.cross_outputs[0], np.einsum("n,ni,nj->ij", scale, *g), atol=1e-12)
    hidden = np.tanh(batch["x"] @ params[0]["kernel"] + params[0]["bias"])
    a = [np.concatenate([x, np.ones((6, 1))], axis=1) for x in (batch["x"], hidden)]
    np.testing.assert_allclose(factors.cross_inputs[0], np.einsum("n,ni,nj->ij", scale / scale.sum(), *a), atol=1e-12)
    assert jax.tree.map(jnp.shape, factors) == jax.tree.map(jnp.shape, zeros)


def test_sides_that_are_too_large_keep_their_diagonal(monkeypatch):
    _, objective, params, batch = problem("mlp")
    _, full = factors_at(objective, params, batch)
    monkeypatch.setattr(blocks, "MAX_FACTOR", 4)  # of the sides 5, 5; 6, 4; 5, 3
    layers, factors = factors_at(objective, params, batch)
    assert [x.shape for x in factors.inputs + factors.outputs] == [(1, 5), (1, 6), (1, 5), (1, 5), (1, 4, 4), (1, 3, 3)]
    for a, b in zip(factors.inputs + factors.outputs, full.inputs + full.outputs, strict=True):
        np.testing.assert_allclose(a[0], np.diag(b[0]) if a.ndim == 2 else b[0], atol=1e-12)
    like = jax.eval_shape(lambda: zero_factors(layers))
    assert jax.tree.map(jnp.shape, factors) == jax.tree.map(jnp.shape, like)


def test_a_subset_has_the_factors_of_its_examples():
    _, objective, params, batch = problem("mlp")
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def both(params, batch):
        def at(point):
            return curvax.layers.kronecker_factors(curvax.tap(layers, point), curvature=EXACT)

        own = jax.tree.map(lambda leaf: leaf[1::2], batch)
        return at(objective.linearize(params, batch).subset(2, 1)), at(objective.linearize(params, own))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *both(params, batch))


@pytest.mark.parametrize("fallback", ["diagonal", "gradient"])
def test_leaves_without_factors_have_their_diagonal_or_nothing(fallback):
    def model(params, x):
        x = jnp.tanh(x @ params["w"]) * params["gain"] + params["shift"]
        return x * jnp.exp(params["temperature"])

    params = {"gain": normal(0, 2), "shift": normal(1, 2), "temperature": jnp.array(0.3), "unused": normal(2, 3)}
    params["w"] = normal(3, 3, 2)
    objective = curvax.Objective(model, L.squared_error())
    batch = normal(4, N, 3), normal(5, N, 2)
    layers, factors = factors_at(objective, params, batch, fallback=fallback)
    dense = np.diag(np.asarray(jax.jit(lambda p, b: oracles.dense_ggn(objective, p, b))(params, batch)))
    named = [layers.paths[place] for place in layers.treatment.diagonal]
    assert named == ["gain", "shift", "temperature"][: 3 if fallback == "diagonal" else 2]
    assert [layers.paths[i] for i in layers.treatment.bare] == ["temperature", "unused"][fallback == "diagonal" :]
    for name, diagonal in zip(named, factors.diagonals, strict=True):
        np.testing.assert_allclose(np.ravel(diagonal), dense[places(params, name)], atol=1e-12)


def treatment_of(model, params, x):
    objective = curvax.Objective(model, L.squared_error())
    layers = curvax.find_layers(objective, params, (x, jnp.zeros(jax.eval_shape(model, params, x).shape)))
    named = [layers.paths[place] for place in layers.treatment.diagonal]
    return [block.name for block in layers.treatment.kronecker], named, layers.treatment


@pytest.mark.many_compilations("maps are looked at while tracing, one equation at a time")
def test_blocks_that_cannot_be_told_apart_have_diagonals():
    """Slices that overlap, and a map that mixes entries; slices that do not overlap are blocks."""
    params, x, mixing = {"v": normal(0, 5, 3), "w": normal(1, 3, 3)}, normal(2, N, 3), normal(3, 3, 3)

    def overlapping(p, x):
        return jnp.tanh(jnp.tanh(x @ p["v"][:3]) @ p["v"][2:]) @ p["w"]

    kronecker, diagonal, treatment = treatment_of(overlapping, params, x)
    assert (kronecker, diagonal) == (["w"], ["v"])
    assert set(treatment.reasons.values()) == {"shares entries of its parameters with another block"}
    kronecker, diagonal, treatment = treatment_of(lambda p, x: x @ (mixing @ p["w"]) @ p["v"].T, params, x)
    assert (kronecker, diagonal) == (["v"], ["w"])
    assert "not the parameters moved, scaled or added" in treatment.reasons["w"]

    def apart(p, x):
        return (jnp.tanh(x @ p["v"][:3]) * p["v"][3] + p["v"][4]) @ p["w"]

    kronecker, diagonal, treatment = treatment_of(apart, params, x)
    assert (kronecker, diagonal, treatment.bare) == (["v", "w"], ["v"], ())
    np.testing.assert_array_equal(treatment.covered[0], np.arange(15).reshape(5, 3) < 9)


# --- every spelling --------------------------------------------------------------------------------------------------


@pytest.mark.many_compilations("the frameworks initialise their modules step by step")
@pytest.mark.parametrize("name", CASES)
def test_factors_in_every_spelling(name):
    """Second moments, one treatment for every leaf; the diagonal whole; one example with one position exactly."""
    case = CASES[name]()
    if case.couples:
        pytest.skip("gradients of single examples are not defined where the model couples them")
    if name == "custom_vjp_layer":
        pytest.skip("the oracle differentiates forwards, which the model has no rule for")
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    targets = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), outputs)
    objective = curvax.Objective(case.model, L.squared_error())
    batch = case.inputs, targets
    layers = curvax.find_layers(objective, case.params, batch, fallback="diagonal")
    treatment = layers.treatment

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=EXACT)
        K = curvax.kronecker_map(layers, factors, params).decomposed()
        plain = tuple(tuple(_identity(q) for q in basis) for basis in K.bases)
        s = curvax.layers.eigenvalue_corrections(tapped, plain, curvature=EXACT)
        E = curvax.layers.EigenKroneckerMap(plain, s, factors.diagonals, layers, K.like)
        one = jax.tree.map(lambda leaf: leaf[:1], batch)
        single = curvax.layers.kronecker_factors(curvax.tap(layers, objective.linearize(params, one)), curvature=EXACT)
        dense = curvax.kronecker_map(layers, single, params).to_dense()
        exact = (oracles.dense_ggn(objective, params, b) for b in (batch, one))
        return factors, trees.ravel(E.diagonal()), dense, *exact

    factors, diagonal, dense, whole, of_one = compute(case.params, batch)
    like = jax.eval_shape(lambda: zero_factors(layers))
    assert jax.tree.structure(factors) == jax.tree.structure(like)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), factors, like)
    for factor in factors.inputs + factors.outputs:
        matrices = np.stack([np.diag(m) for m in factor]) if factor.ndim == 2 else np.asarray(factor)
        values = np.linalg.eigvalsh(matrices)
        assert np.all(values >= -1e-12 * np.abs(values).max())
    held = {place for block in treatment.kronecker for place in block.leaves}
    both = {p for p, covered in zip(treatment.diagonal, treatment.covered, strict=True) if covered is not None}
    assert sorted([*(held - both), *treatment.diagonal, *treatment.bare]) == list(range(len(layers.paths)))
    scale = np.abs(whole).max()
    # Entries that are in a matrix and in a scale besides have the curvature of the matrix alone.
    alike = np.concatenate([np.full(s.size, place not in both) for place, s in enumerate(layers.structs)])
    np.testing.assert_allclose(diagonal[alike], np.diag(whole)[alike], atol=100 * case.atol * scale)
    for block in treatment.kronecker:
        alone = block.weights.shared == 1 and (block.bias is None or block.bias.shared == 1)
        others = {leaf for layer in layers if layer not in (block.weights, block.bias) for leaf in layer.leaves}
        if alone and block.shape[0] == 1 and not others & set(block.leaves):
            own = np.concatenate([_places_of(layers, place) for place in block.leaves])
            np.testing.assert_allclose(
                dense[np.ix_(own, own)], of_one[np.ix_(own, own)], atol=100 * case.atol * scale, err_msg=block.name
            )


def _identity(q):
    return jnp.ones_like(q) if q.ndim == 2 else jnp.broadcast_to(jnp.eye(q.shape[-1]), q.shape).astype(q.dtype)


def _places_of(layers, place):
    starts = list(itertools.accumulate([0, *(s.size for s in layers.structs)]))
    return np.arange(starts[place], starts[place + 1])


# --- averages and damping --------------------------------------------------------------------------------------------


def test_batches_add_up_to_the_data_set():
    _, objective, params, batch = problem("mlp")
    layers, whole = factors_at(objective, params, batch, chained=True)
    pairs = curvax.layers.BlockTridiagonal().pairs(layers)
    assert whole.cross_inputs
    assert whole.cross_outputs
    parts = [jax.tree.map(lambda leaf, cut=cut: leaf[cut], batch) for cut in (slice(0, 2), slice(2, 6))]
    found = curvax.layers.factors_over_batches(layers, objective, params, iter(parts), curvature=EXACT, pairs=pairs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, whole)
    with pytest.raises(ValueError, match="factors_over_batches got no batches"):
        curvax.layers.factors_over_batches(layers, objective, params, [], curvature=EXACT)


@pytest.mark.many_compilations("the map's answers are worked out one operation at a time")
def test_factors_of_a_data_set_are_arrays_that_are_saved_and_read_again(tmp_path):
    """Without an optimiser: the leaves of one process, in the structure that the layers of another give."""
    _, objective, params, batch = problem("mlp")
    layers = curvax.find_layers(objective, params, batch)
    factors = curvax.layers.factors_over_batches(layers, objective, params, [batch], curvature=EXACT)
    np.savez(tmp_path / "factors.npz", *jax.tree.leaves(factors))
    with np.load(tmp_path / "factors.npz") as read:
        leaves = [jnp.asarray(read[name]) for name in read.files]
    again = curvax.find_layers(objective, params, batch)
    structure = jax.tree.structure(jax.eval_shape(lambda: zero_factors(again)))
    found = curvax.kronecker_map(again, structure.unflatten(leaves), params)
    expected = curvax.kronecker_map(layers, factors, params)
    for one, other in (
        (found(params), expected(params)),
        (found.solve(params, damping=0.1), expected.solve(params, damping=0.1)),
    ):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_array_equal(found.logdet(damping=0.1), expected.logdet(damping=0.1))


def test_running_averages():
    """eps = min(1 - 1/k, decay): a mean at first, exponential later; what is not finite leaves the old one."""
    new = [curvax.layers.KroneckerFactors((jnp.full((1, 1, 1), x),), (), (), (), ()) for x in (1.0, 2.0, 6.0, np.nan)]
    step = jax.jit(lambda old, new, k: curvax.layers.average_factors(old, new, k, decay=0.6))
    average, expected = jax.tree.map(lambda x: jnp.full_like(x, np.nan), new[0]), [1.0, 1.5, 0.6 * 1.5 + 0.4 * 6]
    for k, (one, value) in enumerate(zip(new, [*expected, expected[-1]], strict=True), 1):
        average = step(average, one, jnp.asarray(k))
        np.testing.assert_allclose(average.inputs[0].item(), value, rtol=1e-12)


def test_factored_damping_and_factors_without_trace():
    a, g = np.diag([1.0, 5.0]), np.diag([2.0, 0.0, 1.0])
    A, G = jax.jit(curvax.layers.damped_factors)(jnp.asarray(a)[None], jnp.asarray(g)[None], 0.3)
    pi = np.sqrt(3 / 1)
    np.testing.assert_allclose(A[0], a + 0.3 * pi * np.eye(2), rtol=1e-12)
    np.testing.assert_allclose(G[0], g + 0.3 / pi * np.eye(3), rtol=1e-12)
    A, G = jax.jit(curvax.layers.damped_factors)(jnp.zeros((1, 2)), jnp.asarray(g)[None], 0.3)
    np.testing.assert_allclose(A, np.full((1, 2), 0.3))
    np.testing.assert_allclose(G[0], g + 0.3 * np.eye(3), rtol=1e-12)


def test_shares_of_the_damping_keep_the_product_nearest_to_a_damped_one():
    """Against gamma for both, Heskes 2000 (KF-26), in the trace norm: the more so the more the factors differ."""
    draw, gamma = np.random.default_rng(0), 0.3
    for ratio in (1.0, 100.0):
        a, g = (x @ x.T for x in draw.normal(size=(2, 3, 3)))
        a, g = a * ratio * 3 / np.trace(a), g * 3 / np.trace(g)
        errors = {}
        for balanced in (True, False):
            function = jax.jit(functools.partial(curvax.layers.damped_factors, balanced=balanced))
            A, G = function(jnp.asarray(a)[None], jnp.asarray(g)[None], gamma)
            off = np.kron(A[0], G[0]) - np.kron(a, g) - gamma**2 * np.eye(9)
            errors[balanced] = np.linalg.norm(off, "nuc")
        # 9 gamma (mean eigenvalue of A / pi + pi mean eigenvalue of G).
        np.testing.assert_allclose(errors[True], 9 * gamma * 2 * np.sqrt(ratio), rtol=1e-9)
        np.testing.assert_allclose(errors[False], 9 * gamma * (ratio + 1), rtol=1e-9)


def test_curvature_is_a_value_and_sharing_has_two():
    _, objective, params, batch = problem("mlp")
    layers = curvax.find_layers(objective, params, batch)
    tapped = curvax.tap(layers, objective.linearize(params, batch))
    with pytest.raises(TypeError, match="kronecker_factors: curvature= takes a value"):
        curvax.layers.kronecker_factors(tapped, curvature=curvax.ggn)
    with pytest.raises(ValueError, match="kronecker_factors: sharing"):
        curvax.layers.kronecker_factors(tapped, sharing="both")
    with pytest.raises(ValueError, match="factors_over_batches: sharing"):
        curvax.layers.factors_over_batches(layers, objective, params, [batch], sharing="both")


def test_weighted_batches_and_terms_of_their_own_add_up_to_the_data_set():
    """A of every batch counts by its weights, G by its number of cases, each by those of the layer's own term."""

    def term(name, **options):
        return curvax.Term(
            lambda params, x: x @ params[name],
            curvax.losses.squared_error(),
            select=lambda batch: batch[name],
            **options,
        )

    objective = curvax.Objective.from_terms(
        term("u", example_weights=lambda batch: batch["weights"]), term("v", mask=lambda batch: batch["mask"])
    )
    draw = np.random.default_rng(8)
    params = {name: jnp.asarray(draw.normal(size=(3, 2))) for name in "uv"}
    pairs = {name: tuple(jnp.asarray(draw.normal(size=(8, n))) for n in (3, 2)) for name in "uv"}
    batch = pairs | {"weights": jnp.arange(1.0, 9), "mask": jnp.arange(8) % 4 < jnp.where(jnp.arange(8) < 4, 1, 3)}
    layers, whole = factors_at(objective, params, batch)
    parts = [jax.tree.map(lambda leaf, cut=cut: leaf[cut], batch) for cut in (slice(0, 4), slice(4, 8))]
    found = curvax.layers.factors_over_batches(layers, objective, params, parts, curvature=EXACT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, whole)


@pytest.mark.many_compilations("the squares of a layer's map are found by small programs of their own")
def test_the_mean_curvature_is_the_trace_of_the_map_over_its_size():
    """In the units of the parameters, of a weight that is scaled before it is used, too."""
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ (p["w"] / 100) + p["b"]) * p["s"], curvax.losses.squared_error()
    )
    draw = np.random.default_rng(9)
    params = {name: jnp.asarray(draw.normal(size=shape)) for name, shape in {"w": (3, 2), "b": (2,), "s": (2,)}.items()}
    batch = jnp.asarray(draw.normal(size=(5, 3))), jnp.asarray(draw.normal(size=(5, 2)))
    layers, factors = factors_at(objective, params, batch)
    trace = curvax.kronecker_map(layers, factors, params).trace()
    np.testing.assert_allclose(mean_curvature(layers, factors), trace / 10, rtol=1e-10)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_cross_factors_of_a_sharded_batch(axis_type):
    def model(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])

    draw = np.random.default_rng(10)
    params = {name: jnp.asarray(draw.normal(size=shape)) for name, shape in {"a": (4, 3), "b": (3, 2)}.items()}
    batch = jnp.asarray(draw.normal(size=(8, 4))), jnp.asarray(draw.normal(size=(8, 2)))
    objective = curvax.Objective(model, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return curvax.layers.kronecker_factors(tapped, curvature=EXACT, pairs=((0, 1),))

    expected = compute(params, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        found = compute(
            jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
            jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


@pytest.mark.parametrize(("weighted", "enough"), [(False, (20, 1)), (True, (20, 1)), (False, (1, 60))])
def test_moments_of_inputs_by_some_positions_are_those_of_all_on_average(weighted, enough):
    """By 10 of 31 positions: within five standard errors, and exactly where all inputs are alike."""
    weights = (lambda batch: batch[2]) if weighted else None
    pair = {"select": lambda batch: batch[:2], "example_weights": weights}
    objective = curvax.Objective(affine, curvax.losses.squared_error(), **pair)
    params, x = {"w": normal(0, 3, 2), "b": normal(1, 2)}, normal(2, 6, 31, 3)
    batch = (x, normal(3, 6, 31, 2), 0.5 + jnp.arange(6.0))
    batch = batch if weighted else batch[:2]
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def moments(batch, keys):
        tapped = curvax.tap(layers, objective.linearize(params, batch))

        def by_some(key):
            return factors_of(tapped, key, EXACT, "expand", (), SomePositions(key, *enough)).inputs[0]

        return factors_of(tapped, None, EXACT, "expand", ()).inputs[0], jax.vmap(by_some)(keys)

    keys = jax.random.split(jax.random.key(4), 400)
    whole, some = moments(batch, keys)
    spread = np.std(some, axis=0)
    assert np.all(spread[0, :3] > 0.01 * np.abs(whole[0, :3])), "they are not the same positions every time"
    assert np.all(np.abs(np.mean(some, axis=0) - whole) < 5 * spread / np.sqrt(len(keys)) + 1e-12)
    alike = jnp.broadcast_to(x[:, :1], x.shape), *batch[1:]
    whole, some = moments(alike, keys[:3])
    np.testing.assert_allclose(some, np.broadcast_to(whole, some.shape), rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scanned", [False, True])
def test_some_patches_of_a_convolution_are_taken_without_the_others(groups, scanned):
    """Nothing as large as all patches of the images is formed, and what is taken stands for all."""
    channels, side, kernel = 4, 12, normal(1, 3, 3, 4 // groups, 4)
    dims = ("NHWC", "HWIO", "NHWC")

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups)

    def model(params, x):
        if scanned:
            return jax.lax.scan(lambda x, w: (jnp.tanh(convolve(x, w)), None), x, params["w"])[0]
        return convolve(x, params["w"])

    params = {"w": jnp.stack([kernel, -kernel]) if scanned else kernel}
    batch = normal(2, 6, side, side, channels), normal(3, 6, side, side, channels)
    objective = curvax.Objective(model, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, batch)
    some = SomePositions(jax.random.key(0), 2, 1)

    def compute(params, batch, some=some):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return factors_of(tapped, None, EXACT, "expand", (), some).inputs[0]

    by_some, whole = (lambda params, batch, some=some: compute(params, batch, some) for some in (some, None))
    patches = 8 * (1 + scanned) * 6 * side * side * 9 * channels
    few, all_of_them = (
        jax.jit(f).lower(params, batch).compile().memory_analysis().temp_size_in_bytes for f in (by_some, whole)
    )
    assert few < patches / 2 < patches <= all_of_them
    means = jax.jit(jax.vmap(lambda key: compute(params, batch, some._replace(key=key))))(
        jax.random.split(jax.random.key(1), side * side)
    )
    exact = jax.jit(whole)(params, batch)
    spread = np.std(means, axis=0)
    assert np.all(np.abs(np.mean(means, axis=0) - exact) < 5 * spread / np.sqrt(len(means)) + 1e-12)
