"""Blocks, Kronecker factors of a use, sampled cotangents, and what happens to parameters without structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles
from tests.layers.cases import CASES, FRAMEWORKS, N

L = curvax.losses


@pytest.fixture(autouse=True)
def _promotion():
    """Modules of other libraries rely on jax's ordinary promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tapped_objective(model, params, inputs, **options):
    outputs = jax.eval_shape(model, params, inputs)
    targets = jax.tree.map(lambda z: jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape), outputs)
    objective = curvax.Objective(model, L.squared_error())
    batch = (inputs, targets)
    return objective, batch, curvax.find_layers(objective, params, batch, fallback="gradient", **options)


@pytest.mark.many_compilations("the frameworks initialise their modules step by step")
@pytest.mark.parametrize("name", [name for name in CASES if not any(name.startswith(f) for f in FRAMEWORKS)])
def test_matrices_of_the_gradient_are_products_of_inputs_and_cotangents(name):
    """A^T dS for the weights and the sum of dS in the last row, wherever the model keeps its axes; and the way back."""
    case = CASES[name]()
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in jax.tree.leaves(case.params)) or case.couples:
        pytest.skip("gradients of single examples are not defined where the model couples them")
    objective, batch, layers = tapped_objective(case.model, case.params, case.inputs)
    blocks = [
        block
        for block in layers.blocks
        if block.is_kronecker
        and all(layer is None or layer.only_moves for layer in (block.weights, block.bias))
        and sum(set(block.leaves) & set(other.leaves) != set() for other in layers.blocks) == 1
    ]

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        uses = tapped.by_layer(tapped.pull_back(tapped.loss_cotangents()))
        gradient = jax.tree.map(lambda g: N * g, jax.grad(objective)(params, batch))
        found, expected, back = [], [], []
        for block in blocks:
            matrices = block.to_matrices(gradient)
            own = sum(use.gradient() for use in uses[block.name])
            if block.bias is not None:
                row = sum(jnp.sum(use.cotangents, axis=(1, 2)) for use in uses[block.name])
                own = jnp.concatenate([own, row[:, None]], axis=1)
            found.append(matrices)
            expected.append(own)
            back.append(block.to_params(matrices))
        return found, expected, back, gradient

    found, expected, back, gradient = compute(case.params, batch)
    leaves = jax.tree.leaves(gradient)
    for block, matrices, own, parts in zip(blocks, found, expected, back, strict=True):
        assert matrices.shape == block.shape
        np.testing.assert_allclose(matrices, own, atol=100 * case.atol, err_msg=block.name)
        for place, leaf in parts.items():
            np.testing.assert_allclose(leaf, leaves[place], atol=1e-12)


def test_biases_ride_on_their_weights_in_whatever_order_their_axes_are():
    """Features (heads, size) of a kernel that is kept transposed, and a bias that is kept the other way round."""

    def model(params, x):
        return jnp.einsum("ni,dhi->nhd", x, params["w"]) + params["b"].T

    params = {"w": normal(0, 3, 2, 4), "b": normal(1, 3, 2)}
    objective, batch, layers = tapped_objective(model, params, normal(2, N, 4))
    (block,) = layers.blocks  # looks at axes by small programs, some twenty of them
    assert (block.name, block.bias.name, block.shape) == ("w", "b", (1, 5, 6))
    matrices = np.asarray(jax.jit(lambda p, b: block.to_matrices(jax.grad(objective)(p, b)))(params, batch))[0]
    rows = np.concatenate([np.asarray(batch[0]), np.ones((N, 1))], axis=1)
    w, b = np.asarray(params["w"]), np.asarray(params["b"])
    residuals = (np.einsum("ni,dhi->nhd", batch[0], w) + b.T - np.asarray(batch[1])) / N
    of_outputs = np.einsum("ni,nhd->ihd", rows, residuals)
    # The outputs of the block lie as in the kernel, (size, heads).
    np.testing.assert_allclose(matrices, of_outputs.transpose(0, 2, 1).reshape(5, 6), atol=1e-12)


def test_a_bias_that_is_shared_otherwise_than_its_weights_is_a_block_of_its_own():
    def model(params, x):
        for w in params["w"]:
            x = jnp.tanh(x @ w + params["b"])
        return x

    params = {"w": [normal(0, 3, 3), normal(1, 3, 3)], "b": normal(2, 3)}
    _, _, layers = tapped_objective(model, params, normal(3, N, 3))
    assert sorted(block.name for block in layers.blocks) == ["b", "w/0", "w/1"]
    assert all(block.bias is None for block in layers.blocks)


NO_ROW = {
    "subtracted": lambda p, x: x @ p["w"] - p["b"],
    "subtracted from": lambda p, x: p["b"] - x @ p["w"],
    "along another axis": lambda p, x: jnp.tanh(x @ p["w"] + p["b"][:, None]),
}


@pytest.mark.parametrize("name", NO_ROW)
def test_what_is_no_row_of_ones_is_no_homogeneous_coordinate(name):
    """A bias with the other sign, or of another axis that happens to be as long, is a block of its own."""
    params = {"b": normal(0, 4), "w": normal(1, 3, 4)}
    _, _, layers = tapped_objective(NO_ROW[name], params, normal(2, N, 4, 3))
    assert sorted((block.name, block.bias) for block in layers.blocks) == [("b", None), ("w", None)]


def test_sums_and_multiples_of_entries_are_not_taken_for_a_third_one():
    """Entries 1 and 2 add up to the number of entry 3, and half of entry 2 to that of entry 1."""

    def model(params, x):
        return x @ params["w"] + (params["b"][0] + params["b"][1]) + 0.5 * params["s"][1]

    params = {"b": normal(0, 3), "s": normal(1, 2), "w": normal(2, 3, 4)}
    _, _, layers = tapped_objective(model, params, normal(3, N, 3))
    moving = {layer.name: layer.only_moves for layer in layers}
    assert moving["w"]
    assert not any(moves for name, moves in moving.items() if name != "w")


def test_entries_of_one_leaf_that_are_added_one_by_one_are_layers_of_their_own():
    def model(params, x):
        return x @ params["w"] + params["b"][0] + params["b"][1]

    params = {"b": normal(0, 3), "w": normal(2, 3, 4)}
    objective, batch, layers = tapped_objective(model, params, normal(3, N, 3))
    own = [block for block in layers.blocks if block.name != "w"]
    gradient = jax.jit(jax.grad(objective))(params, batch)
    found = jax.jit(lambda g: [block.to_matrices(g) for block in own])(gradient)
    np.testing.assert_allclose(np.ravel(found), gradient["b"][:2], rtol=1e-12)
    assert all(block.weights.only_moves for block in own)


@pytest.mark.many_compilations("biases and maps are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_maps_that_scale_or_add_are_inverted(scale):
    """W = c (p + q^T): L^+ W is the change of least norm whose matrices are W, and to_matrices is its transpose."""

    def model(params, x):
        return x @ (scale * (params["p"] + params["q"].T)) + 2.0 * params["b"]

    params = {"p": normal(0, 3, 2), "q": normal(1, 2, 3), "b": normal(2, 2)}
    _, _, layers = tapped_objective(model, params, normal(3, N, 3))
    (block,) = layers.blocks
    wanted = normal(4, *block.shape)
    vector = {"p": normal(5, 3, 2), "q": normal(6, 2, 3), "b": normal(7, 2)}
    change, back = jax.jit(lambda w, v: (block.to_params(w), block.to_matrices(v)))(wanted, vector)
    p, q, b = (np.asarray(change[layers.paths.index(name)]) for name in "pqb")
    np.testing.assert_allclose(scale * (p + q.T), wanted[0, :3], atol=1e-12)
    np.testing.assert_allclose(p, q.T, atol=1e-12)
    np.testing.assert_allclose(2.0 * b, wanted[0, 3], atol=1e-12)
    inner = sum(np.vdot(vector[name], change[layers.paths.index(name)]) for name in "pqb")
    np.testing.assert_allclose(np.vdot(back, wanted), inner, rtol=1e-12)


def test_a_map_that_mixes_entries_is_refused():
    mixing = normal(0, 3, 3)
    _, _, layers = tapped_objective(lambda p, x: x @ (mixing @ p["w"]), {"w": normal(1, 3, 2)}, normal(2, N, 3))
    (block,) = layers.blocks
    with pytest.raises(ValueError, match="layer 'w': its matrices are not the parameters moved, scaled or added"):
        block.to_params(jnp.zeros(block.shape))


def test_factors_of_one_example_are_its_whole_fisher_matrix():
    """For one example and one position F = A (x) G exactly, with the homogeneous coordinate of the bias."""

    def model(params, x):
        return x @ params["w"] + params["b"]

    params = {"b": normal(0, 2), "w": normal(1, 3, 2)}
    objective = curvax.Objective(model, L.softmax_cross_entropy())
    batch = (normal(2, 1, 3), jnp.array([1]))
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def factors(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        uses = tapped.by_layer(tapped.pull_back(tapped.loss_cotangents()))["w"]
        return uses[0].input_factor(homogeneous=True)[0], uses[0].output_factor()[0]

    a, g = factors(params, batch)
    order = [*range(2, 8), 0, 1]  # of the leaves b, w in the homogeneous matrix
    exact = np.asarray(oracles.dense_empirical_fisher(objective, params, batch))[np.ix_(order, order)]
    np.testing.assert_allclose(np.kron(a, g), exact, atol=1e-12)


def test_factors_of_an_embedding_count_rows_and_those_of_a_scale_do_not_exist():
    def model(params, tokens):
        return params["table"][tokens] * params["gain"]

    params = {"table": normal(0, 4, 2), "gain": normal(1, 2)}
    tokens = jnp.array([[0, 3, 3], [1, 3, 7]])  # the last is outside of the table and reads NaN or clips, by the mode
    model_in = lambda p, t: model(p, jnp.minimum(t, 3))  # noqa: E731
    objective = curvax.Objective(model_in, L.squared_error())
    batch = (tokens, jnp.zeros((2, 3, 2)))
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def counts(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        uses = tapped.by_layer(tapped.pull_back(tapped.loss_cotangents()))
        return uses["table"][0].input_factor(), uses["table"][0].input_factor(jnp.array([1.0, 10.0]))

    plain, weighted = counts(params, batch)
    np.testing.assert_allclose(plain, [[1, 1, 0, 4]])
    np.testing.assert_allclose(weighted, [[1, 10, 0, 22]])

    def of_the_gain(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        (gain,) = tapped.by_layer(tapped.pull_back(tapped.loss_cotangents()))["gain"]
        return gain.input_factor()

    with pytest.raises(ValueError, match="layer 'gain' is a scale: its curvature has no Kronecker factors"):
        jax.eval_shape(of_the_gain, params, batch)

    def with_ones(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        (use,) = tapped.by_layer(tapped.pull_back(tapped.loss_cotangents()))["table"]
        return use.input_factor(homogeneous=True)

    with pytest.raises(ValueError, match="no bias rides on an embedding"):
        jax.eval_shape(with_ones, params, batch)


def test_sampled_cotangents_have_the_second_moment_of_the_fisher_matrix():
    objective = curvax.Objective(lambda w, x: x @ w, L.softmax_cross_entropy())
    w, batch = normal(0, 3, 4), (normal(1, N, 3), jnp.arange(N) % 4)
    layers = curvax.find_layers(objective, w, batch)
    at = objective.linearize(w, batch)

    @jax.jit
    def moments(keys):
        draws = jax.vmap(lambda key: curvax.tap(layers, at).sampled_cotangents(key)[0])(keys)
        return jnp.mean(draws, axis=0), jnp.einsum("sni,snj->nij", draws, draws) / len(keys)

    mean, second = moments(jax.random.split(jax.random.key(0), 20_000))
    p = np.asarray(jax.nn.softmax(batch[0] @ w))
    exact = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    # Six standard errors: entries are bounded by one.
    np.testing.assert_allclose(mean, np.zeros_like(p), atol=6 / np.sqrt(20_000))
    np.testing.assert_allclose(second, exact, atol=6 / np.sqrt(20_000))


def without_structure():
    """A network whose temperature and rotation enter functions, so that they have no structure."""

    def model(params, x):
        return jnp.tanh(x @ params["w"]) * jnp.exp(params["temperature"]) + jnp.sin(params["phase"]) * x[:, :2]

    params = {"phase": normal(0, 2), "temperature": jnp.array(0.3), "w": normal(1, 3, 2)}
    return curvax.Objective(model, L.squared_error()), params, (normal(2, N, 3), normal(3, N, 2))


@pytest.mark.parametrize("fallback", ["diagonal", "gradient"])
def test_fallback_means_what_it_says_in_diagonals(fallback):
    objective, params, batch = without_structure()
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)

    @jax.jit
    def compute(params, batch, key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return (
            curvax.layers.exact_ggn_diagonal(tapped),
            curvax.layers.empirical_fisher_diagonal(tapped),
            curvax.layers.sampled_ggn_diagonal(tapped, key, num_samples=4000),
        )

    ggn, empirical, sampled = (trees.ravel(x) for x in compute(params, batch, jax.random.key(0)))
    kept = np.array([fallback == "diagonal"] * 3 + [True] * 6)
    exact = np.diag(np.asarray(oracles.dense_ggn(objective, params, batch))) * kept
    np.testing.assert_allclose(ggn, exact, atol=1e-11)
    np.testing.assert_allclose(sampled, exact, rtol=0.1)
    truth = np.diag(np.asarray(oracles.dense_empirical_fisher(objective, params, batch))) * kept
    np.testing.assert_allclose(empirical, truth, atol=1e-11)


@pytest.mark.parametrize("fallback", ["diagonal", "gradient"])
@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_fallback_means_what_it_says_in_the_space_of_the_samples(fallback, method):
    objective, params, batch = without_structure()
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)
    tx = curvax.scale_by_sample_space(layers, damping=0.1, method=method, tolerance=1e-12)
    vector = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def solve(params, batch):
        return tx.update(vector, tx.init(params), params, at=objective.linearize(params, batch))[0]

    found = trees.ravel(solve(params, batch))
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    own = np.linalg.solve(dense[3:, 3:] + 0.1 * np.eye(6), np.ones(6))
    rest = 1 / (np.diag(dense)[:3] + 0.1) if fallback == "diagonal" else np.ones(3)
    np.testing.assert_allclose(found, np.concatenate([rest, own]), atol=1e-7)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_norms_where_indices_are_outside_of_the_table(mode):
    """Positions that read no row of the table are in no norm; those that repeat a row are added before squaring."""

    def model(params, tokens):
        return params.at[tokens].get(mode=mode, fill_value=0.0).sum(1)

    table, batch = normal(0, 3, 2), (jnp.array([[0, 3], [3, 3], [1, 1], [2, 0]]), normal(1, 4, 2))
    objective = curvax.Objective(model, L.squared_error())
    layers = curvax.find_layers(objective, table, batch)

    @jax.jit
    def norms(table, batch):
        return curvax.layers.gradient_norms(curvax.tap(layers, objective.linearize(table, batch)))

    def alone(table, one):
        return objective(table, jax.tree.map(lambda leaf: leaf[None], one))

    each = np.asarray(jax.jit(jax.vmap(jax.grad(alone), (None, 0)))(table, batch)).reshape(4, -1)
    np.testing.assert_allclose(norms(table, batch), np.linalg.norm(each, axis=1), atol=1e-12)
