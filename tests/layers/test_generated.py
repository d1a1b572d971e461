"""Random chains of layers: what is found and tapped is what autodiff gives, for every example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax

N, STEPS, WIDTH = 3, 4, 4


def dense(p, x):
    return x @ p["w"] + p["b"]


def transposed(p, x):
    return jnp.einsum("oi,nti->nto", p["w"], x)


def over_flat_positions(p, x):
    return jnp.reshape(jnp.reshape(x, (-1, WIDTH)) @ p["w"], x.shape) * p["b"]


def norm(p, x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 0.1) * (1 + p["b"])


def convolution(p, x):
    kernel = jnp.reshape(p["w"], (2, 2, WIDTH))
    halves = jax.lax.conv_general_dilated(
        x[..., :2], kernel, (1,), "SAME", rhs_dilation=(2,), dimension_numbers=("NHC", "HIO", "NHC")
    )
    return halves + p["b"]


def recurrent(p, x):
    def step(h, x):
        h = jnp.tanh(x + h @ p["w"] + p["b"])
        return h, h

    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def attention(p, x):
    scores = jnp.einsum("ntd,nsd->nts", x @ p["w"], x)
    return jax.nn.softmax(scores) @ x + p["b"]


def residual_block(p, x):
    return x + jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["w"], x)


def jitted(p, x):
    return jax.jit(lambda w, b, x: b - x @ w)(p["w"], p["b"], x)


LAYERS = [dense, transposed, over_flat_positions, norm, convolution, recurrent, attention, residual_block, jitted]


def setting(chain, tied, seed):
    generator = np.random.default_rng(seed)
    count = 1 if tied else len(chain)
    params = [
        {"w": jnp.asarray(generator.normal(size=(WIDTH, WIDTH)) / 2), "b": jnp.asarray(generator.normal(size=WIDTH))}
        for _ in range(count)
    ]

    def model(params, x):
        for index, layer in enumerate(chain):
            x = jnp.tanh(layer(params[0 if tied else index], x))
        return x

    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = tuple(jnp.asarray(generator.normal(size=(N, STEPS, WIDTH))) for _ in range(2))
    return objective, params, batch


@pytest.mark.many_compilations("elementwise uses are looked at while tracing, one equation at a time")
@settings(max_examples=8, deadline=None)
@given(
    chain=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4), tied=st.booleans(), seed=st.integers(0, 2**31 - 1)
)
def test_chains_of_layers(chain, tied, seed):
    objective, params, batch = setting(chain, tied, seed)
    layers = curvax.find_layers(objective, params, batch, fallback="gradient")
    assert not layers.unstructured, str(layers)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return curvax.layers.per_example_gradients(tapped), curvax.layers.gradient_norms(tapped)

    @jax.jit
    def oracle(params, batch):
        def one(example):
            return jax.grad(objective)(params, jax.tree.map(lambda leaf: leaf[None], example))

        return jax.vmap(one)(batch)

    each, norms = compute(params, batch)
    truth = oracle(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), each, truth)
    rows = np.concatenate([np.asarray(leaf).reshape(N, -1) for leaf in jax.tree.leaves(truth)], axis=1)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-9)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_batch_sharded_over_devices_gives_the_same(axis_type):
    generator = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(generator.normal(size=(3, 4))),
        "b": jnp.ones(4),
        "v": jnp.asarray(generator.normal(size=(4, 2))),
    }
    batch = (jnp.asarray(generator.normal(size=(8, 3))), jnp.asarray(generator.normal(size=(8, 2))))
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        _, gradient, _ = tapped.value_and_gradient()
        norms, diagonal = curvax.layers.gradient_norms(tapped), curvax.layers.empirical_fisher_diagonal(tapped)
        return gradient, norms, diagonal

    expected = compute(params, batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        result = compute(replicated, sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-12), result, expected)
