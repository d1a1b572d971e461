"""Biases as blocks of their own: the joint factors without the homogeneous coordinate, and every method on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import layers as kronecker
from curvax.layers.tridiagonal import chains

N = 5


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["out"] + params["c"][None]


def turned(params, x):
    """The features of the bias in another order than those of the weights."""
    h = jnp.einsum("ni,iab->nba", x, params["w"]) + params["b"][None]
    return jnp.tanh(h).reshape(len(x), 6) @ params["out"] + params["c"][None]


def grouped(params, x):
    images = x.reshape(len(x), 2, 2, 2)
    h = jax.lax.conv_general_dilated(
        images,
        params["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return jnp.tanh(h + params["b"][None, None, None]).reshape(len(x), -1)[:, :6] @ params["out"] + params["c"][None]


def scanned(params, x):
    def layer(h, own):
        return jnp.tanh(h @ own[0] + own[1][None]), None

    return jax.lax.scan(layer, x, (params["w"], params["b"]))[0][:, :6] @ params["out"] + params["c"][None]


SHAPES = {
    dense: ((8, 6), (6,)),
    turned: ((8, 2, 3), (3, 2)),
    grouped: ((2, 2, 1, 4), (4,)),
    scanned: ((3, 8, 8), (3, 8)),
}


def problem(network):
    w, b = SHAPES[network]
    shapes = {"w": w, "b": b, "out": (6, 2), "c": (2,)}
    rng = np.random.default_rng(len(w))
    params = {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}
    batch = tuple(jnp.asarray(rng.normal(size=(N, size))) for size in (8, 2))
    return curvax.Objective(network, curvax.losses.squared_error()), params, batch


def factors_of(objective, params, batch, sharing="expand", **options):
    layers = curvax.find_layers(objective, params, batch, **options)
    tapped = curvax.tap(layers, objective.linearize(params, batch))
    factors = kronecker.kronecker_factors(tapped, curvature=curvax.GaussNewton(), sharing=sharing)
    blocks = layers.treatment.kronecker
    return layers, factors, {b.name: (a, g) for b, a, g in zip(blocks, factors.inputs, factors.outputs, strict=True)}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("network", list(SHAPES))
def test_factors_are_parts_of_the_joint_ones(network, sharing):
    setting = problem(network)
    *_, joint = factors_of(*setting, sharing)
    *_, separate = factors_of(*setting, sharing, bias="separate")
    assert set(separate) == {"w", "b", "out", "c"}
    for weights, bias in (("w", "b"), ("out", "c")):
        a, g = joint[weights]
        np.testing.assert_allclose(separate[weights][0], a[:, :-1, :-1], rtol=1e-12)
        np.testing.assert_allclose(separate[bias][0], np.ones((len(a), 1, 1)), rtol=1e-12)
        for name in (weights, bias):
            np.testing.assert_allclose(separate[name][1], g, rtol=1e-12)


@pytest.mark.parametrize("network", list(SHAPES))
def test_a_bias_block_is_the_matrix_itself_where_no_positions_share_it(network):
    objective, params, batch = setting = problem(network)
    layers, factors, _ = factors_of(*setting, "reduce", bias="separate")
    dense_map = np.asarray(curvax.kronecker_map(layers, factors, params).to_dense())
    exact = np.asarray(curvax.ggn(objective.linearize(params, batch)).to_dense())
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]  # b, c, out, w
    first, second = slice(0, sizes[0]), slice(sizes[0], sizes[0] + sizes[1])
    np.testing.assert_allclose(dense_map[second, second], exact[second, second], rtol=1e-11)
    # The layers of a scan and the groups of a convolution meet in the matrix and not in the factors.
    blocks = {scanned: 3, grouped: 2}.get(network, 1)
    kept = np.kron(np.eye(blocks), np.ones(2 * (sizes[0] // blocks,)))
    np.testing.assert_allclose(dense_map[first, first], exact[first, first] * kept, rtol=1e-11, atol=1e-15)
    assert not dense_map[first, second].any()


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", kronecker.EigenCorrected()])
@pytest.mark.parametrize("network", [dense, grouped])
def test_kfac_goes_down_with_them(network, inverse):
    objective, params, batch = problem(network)
    tx = curvax.kfac(curvax.find_layers(objective, params, batch, bias="separate"), inverse=inverse)

    @jax.jit
    def step(params, state):
        loss, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(tx.init)(params), []
    for _ in range(15):
        params, state, loss = step(params, state)
        losses.append(loss)
    assert losses[-1] < losses[0] / 5


@pytest.mark.many_compilations("three functions of a network, each compiled once, and what stands between them")
def test_eigenvalue_corrections_of_a_bias_are_squares_along_the_eigenvectors():
    objective, params, batch = setting = problem(turned)
    layers, factors, _ = factors_of(*setting, bias="separate")
    tapped = curvax.tap(layers, objective.linearize(params, batch))
    bases = curvax.kronecker_map(layers, factors, params).decomposed().bases
    s = kronecker.eigenvalue_corrections(tapped, bases, curvature=curvax.GaussNewton())
    exact = np.asarray(curvax.ggn(tapped.point).to_dense())[:6, :6]
    place = [block.name for block in layers.treatment.kronecker].index("b")
    vectors = np.asarray(bases[place][1][0])
    order = np.argsort(np.arange(6).reshape(2, 3).T.ravel())  # of the bias in the order of the weights
    np.testing.assert_allclose(s[place].ravel(), np.diag(vectors.T @ exact[np.ix_(order, order)] @ vectors), rtol=1e-11)


def test_the_table_has_them_and_chains_leave_them_out():
    objective, params, batch = problem(dense)
    layers = curvax.find_layers(objective, params, batch, bias="separate")
    assert "b      (6,)    shift        1     1       1 x 6" in str(layers)
    names = [block.name for block in layers.treatment.kronecker]
    assert [[names[place] for place in chain] for chain in chains(layers)] == [["w", "out"], ["b"], ["c"]]


def test_what_needs_joint_biases_says_so():
    objective, params, batch = problem(dense)
    layers = curvax.find_layers(objective, params, batch, bias="separate")
    with pytest.raises(ValueError, match=r"'b' is apart from its weights.*bias='joint'"):
        kronecker.layerwise_curvature(curvax.tap(layers, objective.linearize(params, batch)))
    with pytest.raises(ValueError, match="bias must be one of"):
        curvax.find_layers(objective, params, batch, bias="both")


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", kronecker.EigenCorrected()])
@pytest.mark.parametrize("network", [turned, grouped, scanned])
def test_nothing_is_promoted(network, inverse):
    objective, params, batch = problem(network)
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, batch))

    def step(params, batch):
        layers = curvax.find_layers(objective, params, batch, bias="separate")
        tx = curvax.kfac(layers, inverse=inverse)
        state = tx.init(params)
        _, gradient, at = objective.value_and_grad(params, batch)
        return tx.update(gradient, state, params, at=at)[0]

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates = jax.eval_shape(step, params, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))


def test_cubic_rates_are_for_the_weights_with_their_bias_all_the_same():
    objective, params, batch = problem(dense)

    def rates(bias):
        layers = curvax.find_layers(objective, params, batch, bias=bias)
        tx = curvax.scale_by_cubic_step(optax.sgd(1.0), scope="layer", layers=layers)

        @jax.jit
        def update(params):
            _, gradient, at = objective.value_and_grad(params, batch)
            return tx.update(gradient, tx.init(params), params, at=at)[0]

        return update(params)

    jax.tree.map(np.testing.assert_array_equal, rates("joint"), rates("separate"))
