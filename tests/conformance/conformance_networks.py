"""One tiny tanh network, 3-4-2, with the same weights in every framework that users bring."""

from typing import NamedTuple

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import curvax


class Network(NamedTuple):
    model_fn: object
    params: object
    build: object = None  # () -> a module with these parameters


def weights(dtype=jnp.float64):
    generator = np.random.default_rng(0)
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}
    return {name: jnp.asarray(generator.normal(size=shape) / 2, dtype) for name, shape in shapes.items()}


def batch(size=8, seed=1, dtype=jnp.float64):
    generator = np.random.default_rng(100 + seed)
    return jnp.asarray(generator.normal(size=(size, 3)), dtype), jnp.asarray(generator.integers(0, 2, size))


def objective(network):
    return curvax.Objective(network.model_fn, curvax.losses.softmax_cross_entropy())


def plain(w=None):
    def model_fn(params, x):
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    return Network(model_fn, weights() if w is None else w)


def with_none(w=None):
    network = plain(w)
    return Network(lambda params, x: network.model_fn(params["net"], x), {"unused": None, "net": network.params})


def flax_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(linen.Dense(4, param_dtype=jnp.float64)(x))
            return linen.Dense(2, param_dtype=jnp.float64)(x)

    w = weights()
    params = {
        "params": {
            "Dense_0": {"kernel": w["w1"], "bias": w["b1"]},
            "Dense_1": {"kernel": w["w2"], "bias": w["b2"]},
        }
    }
    return Network(Net().apply, params)


def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
            self.second = nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    model, w = Net(nnx.Rngs(0)), weights()
    model.first.kernel[...], model.first.bias[...] = w["w1"], w["b1"]
    model.second.kernel[...], model.second.bias[...] = w["w2"], w["b2"]
    graph, params = nnx.split(model)
    return Network(lambda params, x: nnx.merge(graph, params)(x), params, lambda: nnx.merge(graph, params))


def equinox():
    class Net(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear
        activation: object = jnp.tanh

        def __call__(self, x):
            return self.second(self.activation(self.first(x)))

    key, w = jax.random.key(0), weights()
    model = Net(eqx.nn.Linear(3, 4, key=key), eqx.nn.Linear(4, 2, key=key))
    where = lambda m: (m.first.weight, m.first.bias, m.second.weight, m.second.bias)  # noqa: E731
    model = eqx.tree_at(where, model, (w["w1"].T, w["b1"], w["w2"].T, w["b2"]))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Network(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params)


def haiku():
    def forward(x):
        return hk.Linear(2, name="second")(jnp.tanh(hk.Linear(4, name="first")(x)))

    net, w = hk.without_apply_rng(hk.transform(forward)), weights()
    params = {"first": {"w": w["w1"], "b": w["b1"]}, "second": {"w": w["w2"], "b": w["b2"]}}
    return Network(net.apply, params)


FRAMEWORKS = {f.__name__: f for f in (with_none, flax_linen, flax_nnx, equinox, haiku)}
