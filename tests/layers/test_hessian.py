"""Hessians as sums of outer products of layers' inputs and cotangents, against jax.hessian (methods CR-1 to CR-4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles
from tests.layers.test_layer_estimators import setting


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def check_against_dense(objective, params, batch):
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        structured = curvax.layer_hessian(curvax.tap(layers, objective.linearize(params, batch)))
        vector = trees.random_normal(jax.random.key(0), params)
        quadratic, diagonal = structured.quadratic(vector), trees.ravel(structured.diagonal())
        return structured.to_dense(), quadratic, diagonal, trees.ravel(vector), structured

    dense, quadratic, diagonal, vector, structured = compute(params, batch)
    exact = np.asarray(oracles.dense_hessian(objective, params, batch))
    atol = 1e-9 * max(np.abs(exact).max(), 1)
    np.testing.assert_allclose(dense, exact, atol=atol)
    np.testing.assert_allclose(quadratic, vector @ exact @ vector, atol=atol)
    np.testing.assert_allclose(diagonal, np.diag(exact), atol=atol)
    return structured


@pytest.mark.parametrize(
    "name",
    [
        "mlp_x_at_w",
        "scan_over_time",
        "scan_over_layers",
        "dense_used_twice",
        "tied_embedding",
        "convolutions_channels_first",
        "bias_before_and_scales",
    ],
)
def test_it_is_the_hessian(name):
    weights = jnp.array([0.5, 2.0, 1.0, 0.0, 3.0])
    check_against_dense(*setting(name, l2=0.1, example_weights=lambda batch: weights))


def test_relu_networks_of_the_paper():
    """No biases, softmax: between a layer and itself the block is that of the Gauss-Newton matrix (CR-2, r = k)."""
    generator = np.random.default_rng(0)
    shapes = {"w1": (3, 4), "w2": (4, 4), "w3": (4, 3), "u": (3, 3)}
    params = {name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()}
    batch = (jnp.asarray(generator.normal(size=(4, 3))), jnp.asarray(generator.integers(0, 3, 4)))

    def network(p, x):
        for name in ("w1", "w2", "w3"):
            x = jax.nn.relu(x @ p[name])
        return x @ p["u"]

    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    structured = check_against_dense(objective, params, batch)
    ggn = np.asarray(oracles.dense_ggn(objective, params, batch))
    blocks = jax.jit(lambda matrix: [matrix.restrict({name: params[name]}).to_dense() for name in sorted(shapes)])
    start = 0
    for block in blocks(structured):
        own = slice(start, start := start + len(block))
        np.testing.assert_allclose(block, ggn[own, own], atol=1e-12)
    assert start == len(ggn)


def test_it_keeps_far_less_than_the_dense_matrix():
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(50, 20))), "v": jnp.asarray(generator.normal(size=(20, 5)))}
    batch = (jnp.ones((2, 50)), jnp.zeros((2, 5)))
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], curvax.losses.squared_error())
    tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
    kept, dense = jax.jit(curvax.layer_hessian)(tapped).stored
    size = 25  # outputs of both layers
    assert kept == (50 + 20) + size + size**2 + (50 + 20) * size
    assert dense == 1100 * 1101 // 2
    assert kept < dense / 200


def test_what_has_no_structure_is_refused():
    objective = curvax.Objective(lambda p, x: x @ jnp.exp(p), curvax.losses.squared_error())
    w, batch = jnp.ones((3, 2)), (jnp.ones((5, 3)), jnp.ones((5, 2)))
    layers = curvax.find_layers(objective, w, batch, fallback="gradient")
    with pytest.raises(ValueError, match="no structure"):
        curvax.layer_hessian(curvax.tap(layers, objective.linearize(w, batch)))
    objective = curvax.Objective(lambda p, x: x @ p - (x @ p).mean(0), curvax.losses.squared_error())
    layers = curvax.find_layers(objective, w, batch)
    with pytest.raises(ValueError, match="couples examples"):
        curvax.layer_hessian(curvax.tap(layers, objective.linearize(w, batch)))
