"""Models in every spelling whose layers must be found with no help, with what is expected of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

N = 5


class Case(NamedTuple):
    """A model, parameters, inputs, and the leaves (by path) that must come out without structure, with reasons."""

    model: Callable[[Any, Any], Any]
    params: Any
    inputs: Any
    without: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default is never changed
    kinds: dict[str, str] | None = None
    couples: bool = False
    atol: float = 1e-11


CASES: dict[str, Callable[[], Case]] = {}
FRAMEWORKS = ("flax", "equinox", "haiku")


def case(make):
    """Registers a case under its function's name."""
    CASES[make.__name__] = make
    return make


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 1.5)


@case
def mlp_x_at_w():
    params = [{"w": normal(0, 3, 4), "b": normal(1, 4)}, {"w": normal(2, 4, 2), "b": normal(3, 2)}]

    def model(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x

    return Case(model, params, normal(9, N, 3), kinds={"0/w": "dense", "0/b": "shift"})


@case
def w_at_x_under_vmap():
    params = {"w": normal(0, 4, 3), "b": normal(1, 4), "v": normal(2, 2, 4)}

    def one(params, x):
        return params["v"] @ jnp.tanh(params["w"] @ x + params["b"])

    return Case(jax.vmap(one, (None, 0)), params, normal(9, N, 3))


@case
def transposed_and_einsum():
    params = {"a": normal(0, 4, 3), "b": normal(1, 4, 2, 3), "c": normal(2, 6, 2)}

    def model(params, x):
        x = jnp.tanh(x @ params["a"].T)
        x = jnp.tanh(jnp.einsum("ni,iab->nba", x, params["b"]))
        return jnp.einsum("nk,ko->no", x.reshape(x.shape[0], -1), params["c"])

    return Case(model, params, normal(9, N, 3))


@case
def bias_before_and_scales():
    params = {"shift": normal(0, 3), "w": normal(1, 3, 4), "scale": normal(2, 4), "gain": normal(3), "c": normal(4, 1)}

    def model(params, x):
        x = (params["shift"] + x) @ params["w"]
        x = jnp.sin(x) * (1 + params["scale"])
        return (params["gain"] * x - params["c"]) * 2.0

    return Case(model, params, normal(9, N, 3), kinds={"scale": "scale", "shift": "shift", "gain": "scale"})


@case
def stacked_slices():
    params = {"w": normal(0, 3, 4, 4), "qkv": normal(1, 4, 12)}

    def model(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i])
        q, k, v = (x @ part for part in jnp.split(params["qkv"], 3, axis=1))
        return q * jax.nn.sigmoid(k) + v

    return Case(model, params, normal(9, N, 4))


@case
def joined_gates():
    params = {"i": normal(0, 3, 4), "f": normal(1, 3, 4), "bi": normal(2, 4), "bf": normal(3, 4)}

    def model(params, x):
        kernel = jnp.concatenate([params["i"], params["f"]], axis=1)
        bias = jnp.concatenate([params["bi"], params["bf"]])
        a, b = jnp.split(x @ kernel + bias, 2, axis=-1)
        return jax.nn.sigmoid(a) * jnp.tanh(b)

    return Case(model, params, normal(9, N, 3))


@case
def scaled_and_cast():
    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2)}

    def model(params, x):
        x = jnp.tanh(x @ (params["w"] / np.sqrt(3.0)))
        return x @ (0.5 * params["v"].T).T

    return Case(model, params, normal(9, N, 3))


@case
def jit_inside():
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 2)}

    @jax.jit
    def dense(w, b, x):
        return jax.nn.relu(x @ w + b)

    return Case(lambda p, x: jax.jit(lambda v, h: h @ v)(p["v"], dense(p["w"], p["b"], x)), params, normal(9, N, 3))


@case
def remat_inside():
    params = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 4, 4)}

    def block(params, x):
        return jnp.tanh(jnp.tanh(x @ params["w"] + params["b"]) @ params["v"])

    return Case(jax.checkpoint(block), params, normal(9, N, 3))


@case
def scan_over_time():
    params = {
        "w": normal(0, 3, 4),
        "u": normal(1, 4, 4),
        "b": normal(2, 4),
        "start": normal(3, 4),
        "v": normal(4, 4, 2),
    }

    def model(params, x):
        def step(h, x):
            h = jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
            return h, h

        start = jnp.broadcast_to(params["start"], (x.shape[0], 4))
        _, hs = jax.lax.scan(step, start, x.swapaxes(0, 1))
        return hs.swapaxes(0, 1) @ params["v"]

    return Case(model, params, normal(9, N, 6, 3))


@case
def scan_over_layers():
    params = {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4), "scale": normal(2, 3, 4), "v": normal(3, 4, 2)}

    def model(params, x):
        def layer(x, p):
            return jnp.tanh(x @ p["w"] + p["b"]) * p["scale"] + x, None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, {k: params[k] for k in ("w", "b", "scale")})
        return x @ params["v"]

    return Case(model, params, normal(9, N, 4))


@case
def scan_of_scan():
    params = {"w": normal(0, 2, 4, 4), "u": normal(1, 2, 4, 4), "b": normal(2, 2, 4)}

    def model(params, x):
        def layer(x, p):
            def step(h, x):
                h = jnp.tanh(x @ p["w"] + h @ p["u"].T + p["b"])
                return h, h

            return jax.lax.scan(step, jnp.zeros_like(x[0]), x, reverse=True)[1], None

        return jax.lax.scan(layer, x.swapaxes(0, 1), params)[0].swapaxes(0, 1)

    return Case(model, params, normal(9, N, 3, 4))


@case
def vmapped_experts():
    params = {"w": normal(0, 3, 4, 5), "b": normal(1, 3, 5), "v": normal(2, 3, 5, 2), "gate": normal(3, 4, 3)}

    def model(params, x):
        def expert(w, b, v):
            return jnp.tanh(x @ w + b) @ v

        out = jax.vmap(expert)(params["w"], params["b"], params["v"])
        return jnp.einsum("eno,ne->no", out, jax.nn.softmax(x @ params["gate"]))

    return Case(model, params, normal(9, N, 4))


@case
def tied_embedding():
    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 4), "position": normal(2, 3, 4)}

    def model(params, tokens):
        x = params["table"][tokens] + params["position"]
        return jnp.tanh(x @ params["w"]) @ params["table"].T

    tokens = jnp.asarray(np.random.default_rng(8).integers(0, 7, (N, 3)))
    return Case(model, params, tokens)


@case
def dense_used_twice():
    params = {"w": normal(0, 4, 4), "b": normal(1, 4)}

    def model(params, x):
        for _ in range(3):
            x = jnp.tanh(x @ params["w"] + params["b"])
        return x @ params["w"].T

    return Case(model, params, normal(9, N, 4))


@case
def custom_jvp_activation():
    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2)}

    @jax.custom_jvp
    def act(x):
        return jnp.where(x > 0, x, 0.1 * x)

    act.defjvp(lambda primals, tangents: (act(*primals), jnp.where(primals[0] > 0, 1.0, 0.1) * tangents[0]))
    return Case(lambda p, x: jax.nn.softplus(act(x @ p["w"])) @ p["v"], params, normal(9, N, 3))


@case
def custom_vjp_layer():
    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2)}

    @jax.custom_vjp
    def layer(x, w):
        return x @ w

    layer.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    return Case(lambda p, x: jnp.tanh(layer(x, p["w"])) @ p["v"], params, normal(9, N, 3), {"w": "custom derivatives"})


@case
def products_of_parameters():
    params = {"w": normal(0, 3, 4), "a": normal(1, 3, 2), "b": normal(2, 2, 4), "v": normal(3, 4, 2)}

    def model(params, x):
        x = x @ (params["w"] + params["a"] @ params["b"])
        return jnp.tanh(x) @ (params["v"] / jnp.linalg.norm(params["v"]))

    return Case(
        model,
        params,
        normal(9, N, 3),
        {
            "a": "multiplied by another parameter",
            "b": "multiplied by another parameter",
            "v": "multiplied by itself",
        },
    )


@case
def weight_norm():
    def model(params, x):
        direction = params["v"] / jnp.linalg.norm(params["v"], axis=0)
        return jnp.tanh(x @ (params["g"] * direction) + params["b"])

    params = {"v": normal(1, 3, 4), "g": normal(2, 4), "b": normal(3, 4)}
    return Case(model, params, normal(9, N, 3), without={"v": "multiplied by itself"})


@case
def low_rank_adapter():
    params = {"w": normal(0, 3, 4), "a": normal(1, 3, 2), "b": normal(2, 2, 4)}
    return Case(lambda p, x: jnp.tanh(x @ p["w"] + x @ p["a"] @ p["b"]), params, normal(9, N, 3))


@case
def branches():
    params = {"w": normal(0, 3, 4), "v": normal(1, 4, 2), "switch": jnp.ones(())}

    def model(params, x):
        h = jax.lax.cond(params["switch"] > 0, lambda: x @ params["w"], lambda: -x @ params["w"])
        return jnp.tanh(h) @ params["v"]

    return Case(model, params, normal(9, N, 3), {"w": "cond", "switch": "gt"})


@case
def convolutions():
    params = {
        "strided": normal(0, 3, 3, 2, 4),
        "bias": normal(1, 4),
        "dilated": normal(2, 3, 3, 4, 4),
        "grouped": normal(3, 3, 3, 2, 6),
        "depthwise": normal(4, 3, 3, 1, 6),
        "transposed": normal(5, 2, 2, 6, 3),
        "out": normal(6, 3, 2),
    }

    def conv(x, w, **options):
        return jax.lax.conv_general_dilated(
            x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **{"window_strides": (1, 1), "padding": "SAME", **options}
        )

    def model(params, x):
        x = jnp.tanh(conv(x, params["strided"], window_strides=(2, 2)) + params["bias"])
        x = jnp.tanh(conv(x, params["dilated"], rhs_dilation=(2, 2)))
        x = jnp.tanh(conv(x, params["grouped"], feature_group_count=2, padding="VALID"))
        x = jnp.tanh(conv(x, params["depthwise"], feature_group_count=6, padding=[(1, 2), (0, 1)]))
        x = jnp.tanh(jax.lax.conv_transpose(x, params["transposed"], (2, 2), "SAME"))
        return jnp.mean(x, axis=(1, 2)) @ params["out"]

    return Case(model, params, normal(9, N, 8, 8, 2))


@case
def convolutions_channels_first():
    params = {"one": normal(0, 4, 2, 3, 3), "two": normal(1, 3, 4, 3), "w": normal(2, 12, 2)}

    def model(params, x):
        x = jnp.tanh(jax.lax.conv(x, params["one"], (1, 2), "VALID"))
        x = x.mean(axis=2)
        x = jnp.tanh(
            jax.lax.conv_general_dilated(x, params["two"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NHC"))
        )
        return x.reshape(x.shape[0], -1)[:, :12] @ params["w"]

    return Case(model, params, normal(9, N, 2, 6, 9))


@case
def attention_with_merged_axes():
    params = {"qkv": normal(0, 4, 3, 2, 3), "out": normal(1, 2, 3, 4), "scale": normal(2, 4), "bias": normal(3, 4)}

    def model(params, x):
        n, t, d = x.shape
        centred = x - x.mean(-1, keepdims=True)
        x = centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]
        flat = x.reshape(n * t, d)  # examples and steps in one axis
        q, k, v = (jnp.einsum("md,dhk->mhk", flat, params["qkv"][:, i]).reshape(n, t, 2, 3) for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("nqhk,nshk->nhqs", q, k))
        return jnp.einsum("nhqs,nshk->nqhk", weights, v).reshape(n, t, 6) @ params["out"].reshape(6, 4)

    return Case(model, params, normal(9, N, 3, 4))


@case
def derivatives_of_the_network():
    params = [{"w": normal(0, 2, 4), "b": normal(1, 4)}, {"w": normal(2, 4, 1), "b": normal(3, 1)}]

    def network(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return (x @ params[-1]["w"] + params[-1]["b"])[0]

    def model(params, xs):
        def residual(x):
            hessian = jax.hessian(lambda x: network(params, x))(x)
            along = jax.jvp(lambda x: network(params, x), (x,), (jnp.array([1.0, 0.0]),))[1]
            return jnp.stack([jnp.trace(hessian) + along, network(params, x)])

        return jax.vmap(residual)(xs)

    return Case(model, params, normal(9, N, 2))


@case
def class_token():
    params = {"token": normal(0, 4), "w": normal(1, 4, 4), "v": normal(2, 4, 2)}

    def model(params, x):
        token = jnp.broadcast_to(params["token"], (x.shape[0], 1, 4))
        x = jnp.tanh(jnp.concatenate([token, x], axis=1) @ params["w"])
        return x.mean(axis=1) @ params["v"]

    return Case(model, params, normal(9, N, 3, 4))


@case
def dropout_and_keys():
    params = {"w": normal(0, 3, 6), "v": normal(1, 6, 2)}

    def model(params, inputs):
        x, mask = inputs
        return (jnp.tanh(x @ params["w"]) * mask) @ params["v"]

    mask = jnp.asarray(np.random.default_rng(7).integers(0, 2, (N, 6)), float)
    return Case(model, params, (normal(9, N, 3), mask))


def perturbed(leaf):
    """A leaf in double precision, moved a little, so that biases are not zero."""
    return jnp.asarray(np.asarray(leaf, float) + np.asarray(normal(5, *leaf.shape)) / 4)


def linen_case(name, make, inputs, **options):
    """A case of a flax linen module."""

    def build():
        import flax.linen as nn

        module = make(nn)
        variables = jax.jit(module.init)(jax.random.key(0), inputs)
        rest = {key: jax.tree.map(perturbed, value) for key, value in variables.items() if key != "params"}

        def model(params, x):
            return module.apply({"params": params, **rest}, x)

        params = jax.tree.map(perturbed, variables["params"])
        return Case(model, params, inputs, **options)

    CASES[f"linen_{name}"] = build


def sequential(*layers):
    """A linen module of layers."""
    return lambda nn: nn.Sequential([layer(nn) for layer in layers])


linen_case("dense", sequential(lambda nn: nn.Dense(4), lambda nn: nn.tanh, lambda nn: nn.Dense(2)), normal(9, N, 3))
linen_case(
    "dense_general",
    sequential(
        lambda nn: nn.DenseGeneral((2, 3)),
        lambda nn: nn.tanh,
        lambda nn: nn.DenseGeneral(4, axis=(-2, -1)),
        lambda nn: nn.gelu,
    ),
    normal(9, N, 3, 4),
)
linen_case(
    "convolutions",
    sequential(
        lambda nn: nn.Conv(4, (3, 3), strides=2),
        lambda nn: nn.relu,
        lambda nn: nn.Conv(4, (3, 3), kernel_dilation=2, padding="VALID", feature_group_count=2),
        lambda nn: nn.silu,
        lambda nn: nn.ConvTranspose(3, (3, 3), strides=(2, 2), padding="SAME"),
        lambda nn: nn.ConvTranspose(2, (2, 2), kernel_dilation=(1, 2), transpose_kernel=True),
        lambda nn: nn.Conv(2, (3, 2), padding="CIRCULAR", use_bias=False),
    ),
    normal(9, N, 12, 12, 2),
)
linen_case("conv_1d", sequential(lambda nn: nn.Conv(4, (3,), padding="CAUSAL"), lambda nn: nn.relu), normal(9, N, 6, 3))
linen_case(
    "norms",
    sequential(
        lambda nn: nn.Dense(4),
        lambda nn: nn.LayerNorm(),
        lambda nn: nn.GroupNorm(2),
        lambda nn: nn.RMSNorm(),
        lambda nn: nn.BatchNorm(use_running_average=True),
        lambda nn: nn.Dense(2),
    ),
    normal(9, N, 3, 3),
)
linen_case(
    "embed",
    sequential(lambda nn: nn.Embed(7, 4), lambda nn: nn.Dense(3)),
    jnp.asarray(np.random.default_rng(8).integers(0, 7, (N, 3))),
)
linen_case("attention", lambda nn: nn.MultiHeadDotProductAttention(num_heads=2), normal(9, N, 3, 4))
for cell in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"):
    linen_case(cell, lambda nn, cell=cell: nn.RNN(getattr(nn, cell)(4, param_dtype=float)), normal(9, N, 3, 2))
linen_case("remat_scan", lambda nn: nn.remat(nn.Dense)(4), normal(9, N, 3))


@case
def linen_scan_over_layers():
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(4)(x)), None

    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(2)(blocks()(x, None)[0])

    x = normal(9, N, 4)
    params = jax.tree.map(perturbed, jax.jit(Tower().init)(jax.random.key(0), x)["params"])
    return Case(lambda p, x: Tower().apply({"params": p}, x), params, x)


@case
def linen_batch_norm_in_training():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))))

    x = normal(9, N, 3)
    variables = jax.tree.map(perturbed, jax.jit(Net().init)(jax.random.key(0), x))

    def model(params, x):
        return Net().apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    return Case(model, variables["params"], x, couples=True)


def nnx_case(name, make, inputs, **options):
    """A case of a flax nnx module."""

    def build():
        from flax import nnx

        graph, params, rest = nnx.split(make(nnx, nnx.Rngs(0)), nnx.Param, ...)
        pure = nnx.to_pure_dict(params)

        def model(pure, x):
            state = jax.tree.map(lambda leaf: leaf, params)
            nnx.replace_by_pure_dict(state, pure)
            return nnx.merge(graph, state, jax.tree.map(lambda leaf: leaf, rest))(x)

        return Case(model, jax.tree.map(perturbed, pure), inputs, **options)

    CASES[f"nnx_{name}"] = build


nnx_case("linear", lambda nnx, rngs: nnx.Linear(3, 4, rngs=rngs), normal(9, N, 3))
nnx_case(
    "linear_general", lambda nnx, rngs: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs), normal(9, N, 3, 4)
)
nnx_case(
    "conv",
    lambda nnx, rngs: nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs),
        nnx.relu,
        nnx.ConvTranspose(4, 2, (2, 2), strides=(2, 2), rngs=rngs),
    ),
    normal(9, N, 6, 6, 2),
)
nnx_case(
    "norms",
    lambda nnx, rngs: nnx.Sequential(nnx.LayerNorm(4, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)),
    normal(9, N, 3, 4),
)
nnx_case("embed", lambda nnx, rngs: nnx.Embed(7, 4, rngs=rngs), jnp.asarray(np.arange(N) % 7))
nnx_case(
    "attention",
    lambda nnx, rngs: nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=rngs),
    normal(9, N, 3, 4),
    atol=1e-6,  # it computes its softmax in single precision, and the gradient of a key's bias is exactly zero
)
for cell in ("LSTMCell", "OptimizedLSTMCell", "GRUCell"):
    nnx_case(
        cell,
        lambda nnx, rngs, cell=cell: nnx.RNN(getattr(nnx, cell)(2, 4, param_dtype=float, rngs=rngs)),
        normal(9, N, 3, 2),
    )


def equinox_case(name, make, inputs, call=None):
    """A case of an equinox module."""

    def build():
        import equinox as eqx

        module = make(eqx, jax.random.key(0))
        params, static = eqx.partition(module, eqx.is_inexact_array)

        def model(params, x):
            module = eqx.combine(params, static)
            return jax.vmap(lambda one: (call or (lambda m, one: m(one)))(module, one))(x)

        return Case(model, jax.tree.map(perturbed, params), inputs)

    CASES[f"equinox_{name}"] = build


equinox_case("mlp", lambda eqx, key: eqx.nn.MLP(3, 2, 4, 2, key=key), normal(9, N, 3))
equinox_case("conv", lambda eqx, key: eqx.nn.Conv2d(2, 4, 3, stride=2, groups=2, key=key), normal(9, N, 2, 6, 6))
equinox_case(
    "conv_transpose",
    lambda eqx, key: eqx.nn.ConvTranspose1d(2, 4, 3, stride=2, dilation=2, key=key),
    normal(9, N, 2, 6),
)
equinox_case("layer_norm", lambda eqx, key: eqx.nn.LayerNorm(4), normal(9, N, 4))
equinox_case("group_norm", lambda eqx, key: eqx.nn.GroupNorm(2, 4), normal(9, N, 4, 3))
equinox_case("embedding", lambda eqx, key: eqx.nn.Embedding(7, 4, key=key), jnp.asarray(np.arange(N) % 7))
equinox_case(
    "attention", lambda eqx, key: eqx.nn.MultiheadAttention(2, 4, key=key), normal(9, N, 3, 4), lambda m, x: m(x, x, x)
)


def _over_time(cell, x):
    start = jnp.zeros(cell.hidden_size)
    start = (start, start) if type(cell).__name__ == "LSTMCell" else start
    return jax.tree.leaves(jax.lax.scan(lambda h, x: (cell(x, h), None), start, x)[0])[0]


for cell in ("LSTMCell", "GRUCell"):
    equinox_case(cell, lambda eqx, key, cell=cell: getattr(eqx.nn, cell)(2, 4, key=key), normal(9, N, 3, 2), _over_time)


def haiku_case(name, make, inputs):
    """A case of a haiku function."""

    def build():
        import haiku as hk

        transformed = hk.without_apply_rng(hk.transform(lambda x: make(hk)(x)))
        params = jax.jit(transformed.init)(jax.random.key(0), inputs)
        return Case(transformed.apply, jax.tree.map(perturbed, params), inputs)

    CASES[f"haiku_{name}"] = build


haiku_case("mlp", lambda hk: hk.nets.MLP([4, 2]), normal(9, N, 3))
haiku_case(
    "conv", lambda hk: hk.Sequential([hk.Conv2D(4, 3, 2), jax.nn.relu, hk.Conv2DTranspose(2, 3)]), normal(9, N, 6, 6, 2)
)
haiku_case("layer_norm", lambda hk: hk.LayerNorm(-1, True, True), normal(9, N, 4))
haiku_case("embed", lambda hk: hk.Embed(7, 4), jnp.asarray(np.arange(N) % 7))
haiku_case(
    "attention",
    lambda hk: lambda x: hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling())(x, x, x),
    normal(9, N, 3, 4),
)
haiku_case(
    "lstm",
    lambda hk: lambda x: hk.dynamic_unroll(core := hk.LSTM(4), x, core.initial_state(x.shape[0]), time_major=False)[0],
    normal(9, N, 3, 2),
)
haiku_case(
    "gru",
    lambda hk: lambda x: hk.dynamic_unroll(core := hk.GRU(4), x, core.initial_state(x.shape[0]), time_major=False)[0],
    normal(9, N, 3, 2),
)
