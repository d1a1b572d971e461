"""The image networks of the papers as plain functions: LeNet, small CIFAR networks, ResNet-18, ResNet-20, VGG-f, MLPs.

Batch normalisation takes the statistics of the batch it is given, as CurveBall's paper does for curvature and gradient
alike, so every network is a pure function of (parameters, images) without state. Images are (N, height, width,
channels).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Array = jax.Array


class Network(NamedTuple):
    """A network.

    Attributes:
        init: key -> parameters.
        apply: (parameters, images) -> logits.
        image_shape: (height, width, channels).
    """

    init: Callable[[Array], PyTree]
    apply: Callable[[PyTree, Array], Array]
    image_shape: tuple[int, int, int]


def mlp(
    sizes: Sequence[int], activation: Callable = jnp.tanh, scale: float | None = None, biases: bool = True
) -> Network:
    """Dense layers; weights are normal with variance 1 / inputs, or uniform in (-scale, scale)."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        layers = []
        for k, (m, n) in zip(keys, itertools.pairwise(sizes), strict=True):
            if scale is None:
                kernel = jax.random.normal(k, (m, n)) / m**0.5
            else:
                kernel = jax.random.uniform(k, (m, n), minval=-scale, maxval=scale)
            layers.append({"kernel": kernel, "bias": jnp.zeros(n)} if biases else {"kernel": kernel})
        return layers

    def dense(layer, x):
        x = x @ layer["kernel"]
        return x + layer["bias"] if biases else x

    def apply(params, x):
        x = x.reshape(x.shape[0], -1)
        for layer in params[:-1]:
            x = activation(dense(layer, x))
        return dense(params[-1], x)

    return Network(init, apply, (1, 1, sizes[0]))


def lenet(batch_norm: bool = True, classes: int = 10) -> Network:
    """conv 5x5x20, pool, conv 5x5x50, pool, dense 500 tanh, dense; weights N(0, 0.1) (L-SR1's paper, MNIST)."""
    blocks = [(5, 20, "VALID"), (5, 50, "VALID")]

    def init(key):
        keys = jax.random.split(key, 4)
        params = {"conv": [], "dense": []}
        for k, (m, (size, n, _)) in zip(keys, zip((1, 20), blocks, strict=True), strict=False):
            params["conv"].append(_conv_params(k, size, m, n, 0.1, batch_norm))
        for k, (m, n) in zip(keys[2:], ((800, 500), (500, classes)), strict=True):
            params["dense"].append(_dense_params(k, m, n, 0.1, batch_norm and n == 500))
        return params

    def apply(params, x):
        for layer, (_, _, padding) in zip(params["conv"], blocks, strict=True):
            x = _pool(jax.nn.relu(_conv(layer, x, padding=padding)), 2, 2)
        x = x.reshape(x.shape[0], -1)
        x = jnp.tanh(_dense(params["dense"][0], x))
        return _dense(params["dense"][1], x)

    return Network(init, apply, (28, 28, 1))


def basic_cnn(batch_norm: bool = False, classes: int = 10) -> Network:
    """5x5 filters, channels 32, 32, 64, 64, 10, ReLU, 3x3 max pooling of stride 2 after the first three (CurveBall)."""
    channels = (32, 32, 64, 64, classes)

    def init(key):
        keys = jax.random.split(key, 5)
        sizes = (5, 5, 5, 4, 1)
        pairs = zip(keys, sizes, itertools.pairwise((3, *channels)), strict=True)
        return [
            _conv_params(k, s, m, n, (2 / (s * s * m)) ** 0.5, batch_norm and n != classes) for k, s, (m, n) in pairs
        ]

    def apply(params, x):
        for index, layer in enumerate(params):
            x = _conv(layer, x, padding="SAME" if index < 3 else "VALID")
            x = jax.nn.relu(x) if index < 4 else x
            x = _pool(x, 3, 2) if index < 3 else x
        return x.reshape(x.shape[0], -1)

    return Network(init, apply, (32, 32, 3))


def small_cnn(classes: int = 10) -> Network:
    """conv 3x3x32, 3x3x64, 3x3x64 with ReLU, 2x2 average pooling after each, dense 128 with ReLU, dense."""
    channels = (3, 32, 64, 64)

    def init(key):
        keys = jax.random.split(key, 5)
        pairs = zip(keys, itertools.pairwise(channels), strict=False)
        return {
            "conv": [_conv_params(k, 3, m, n, (2 / (9 * m)) ** 0.5, False) for k, (m, n) in pairs],
            "dense": [
                _dense_params(keys[3], 1024, 128, (2 / 1024) ** 0.5, False),
                _dense_params(keys[4], 128, classes, 128**-0.5, False),
            ],
        }

    def apply(params, x):
        for layer in params["conv"]:
            x = jax.nn.relu(_conv(layer, x))
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        x = jax.nn.relu(_dense(params["dense"][0], x.reshape(x.shape[0], -1)))
        return _dense(params["dense"][1], x)

    return Network(init, apply, (32, 32, 3))


def cifar_net(batch_norm: bool = True, classes: int = 10) -> Network:
    """conv 5x5x32, 5x5x32, 5x5x64 with pooling, dense 64, dense (L-SR1's paper, CIFAR-10)."""

    def init(key):
        keys = jax.random.split(key, 5)
        sizes = zip(keys, itertools.pairwise((3, 32, 32, 64)), (0.01, 0.05, 0.05), strict=False)
        return {
            "conv": [_conv_params(k, 5, m, n, std, batch_norm) for k, (m, n), std in sizes],
            "dense": [
                _dense_params(keys[3], 1024, 64, 0.1, batch_norm),
                _dense_params(keys[4], 64, classes, 0.1, False),
            ],
        }

    def apply(params, x):
        for layer in params["conv"]:
            x = jax.nn.relu(_pool(_conv(layer, x), 2, 2))
        x = jax.nn.relu(_dense(params["dense"][0], x.reshape(x.shape[0], -1)))
        return _dense(params["dense"][1], x)

    return Network(init, apply, (32, 32, 3))


def resnet(stages: Sequence[tuple[int, int]], stem: int, classes: int = 10) -> Network:
    """Basic residual blocks of two 3x3 convolutions; ``stages`` are (blocks, channels), halved in size from the second.

    ``resnet(((3, 16), (3, 32), (3, 64)), 16)`` is ResNet-20, ``resnet(((2, 64), (2, 128), (2, 256), (2, 512)), 64)`` is
    ResNet-18 for images of 32 x 32.
    """

    def shapes():
        channels = stem
        for index, (blocks, width) in enumerate(stages):
            for block in range(blocks):
                yield channels, width, 2 if index and not block else 1
                channels = width

    def init(key):
        keys = iter(jax.random.split(key, 2 + 3 * len(list(shapes()))))

        def he(size, m, n):
            return _conv_params(next(keys), size, m, n, (2 / (size * size * m)) ** 0.5, True)

        params = {"stem": he(3, 3, stem), "blocks": []}
        for m, n, stride in shapes():
            block = {"first": he(3, m, n), "second": he(3, n, n)}
            if stride > 1 or m != n:
                block["shortcut"] = he(1, m, n)
            params["blocks"].append(block)
        params["dense"] = _dense_params(next(keys), stages[-1][1], classes, 0.01, False)
        return params

    def apply(params, x):
        x = jax.nn.relu(_conv(params["stem"], x))
        for block, (_, _, stride) in zip(params["blocks"], shapes(), strict=True):
            y = jax.nn.relu(_conv(block["first"], x, stride))
            y = _conv(block["second"], y)
            x = jax.nn.relu(y + (_conv(block["shortcut"], x, stride) if "shortcut" in block else x))
        return _dense(params["dense"], jnp.mean(x, axis=(1, 2)))

    return Network(init, apply, (32, 32, 3))


def resnet18(classes: int = 10) -> Network:
    """ResNet-18 for images of 32 x 32."""
    return resnet(((2, 64), (2, 128), (2, 256), (2, 512)), 64, classes)


def resnet20(classes: int = 10) -> Network:
    """ResNet-20 (He et al. 2016, n = 3)."""
    return resnet(((3, 16), (3, 32), (3, 64)), 16, classes)


def vgg_f(classes: int = 1000, image_size: int = 224) -> Network:
    """VGG-f (Chatfield et al. 2014) without local response normalisation."""
    layers = [(11, 64, 4, True), (5, 256, 1, True), (3, 256, 1, False), (3, 256, 1, False), (3, 256, 1, True)]

    def features(params, x):
        for layer, (size, _, stride, pooled) in zip(params["conv"], layers, strict=True):
            x = jax.nn.relu(_conv(layer, x, stride, "VALID" if size == 11 else "SAME"))
            x = _pool(x, 3, 2, ((0, 0), (0, 1), (0, 1), (0, 0))) if pooled else x
        return x.reshape(x.shape[0], -1)

    def init(key):
        keys = jax.random.split(key, 8)
        channels = (3, *(n for _, n, _, _ in layers))
        params: dict[str, Any] = {
            "conv": [
                _conv_params(k, size, m, n, (2 / (size * size * m)) ** 0.5, False)
                for k, (size, n, _, _), m in zip(keys, layers, channels, strict=False)
            ]
        }
        shape = jax.eval_shape(features, params, jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32))
        sizes = (shape.shape[1], 4096, 4096, classes)
        params["dense"] = [
            _dense_params(k, m, n, (2 / m) ** 0.5, False)
            for k, (m, n) in zip(keys[5:], itertools.pairwise(sizes), strict=True)
        ]
        return params

    def apply(params, x):
        x = features(params, x)
        for layer in params["dense"][:-1]:
            x = jax.nn.relu(_dense(layer, x))
        return _dense(params["dense"][-1], x)

    return Network(init, apply, (image_size, image_size, 3))


def random_network(seed: int, classes: int = 10, widths: Sequence[int] = (4, 8, 16, 32)) -> Network:
    """3 to 10 convolutions 3x3 with batch normalisation and ReLU, pooled with probability 1/2 (CurveBall, figure 3).

    The paper draws the channels from 32, 64, 128, 256; here they are an eighth of that by default. The last convolution
    gives the classes, without either, and the mean over what is left of the image is taken.
    """
    generator = np.random.default_rng(seed)
    depth = int(generator.integers(3, 11))
    channels = [3, *(int(width) for width in generator.choice(widths, depth - 1)), classes]
    pooled = generator.random(depth - 1) < 0.5

    def init(key):
        keys = jax.random.split(key, depth)
        sizes = zip(keys, itertools.pairwise(channels), strict=True)
        return [
            _conv_params(k, 3, m, n, (2 / (9 * m)) ** 0.5, index < depth - 1) for index, (k, (m, n)) in enumerate(sizes)
        ]

    def apply(params, x):
        for layer, pool in zip(params[:-1], pooled, strict=True):
            x = jax.nn.relu(_conv(layer, x))
            x = _pool(x, 3, 2) if pool and x.shape[1] > 1 else x
        return jnp.mean(_conv(params[-1], x), axis=(1, 2))

    return Network(init, apply, (32, 32, 3))


def _conv_params(key, size, inputs, outputs, stddev, batch_norm):
    params = {"kernel": stddev * jax.random.normal(key, (size, size, inputs, outputs)), "bias": jnp.zeros(outputs)}
    return {**params, "scale": jnp.ones(outputs)} if batch_norm else params


def _dense_params(key, inputs, outputs, stddev, batch_norm):
    params = {"kernel": stddev * jax.random.normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}
    return {**params, "scale": jnp.ones(outputs)} if batch_norm else params


def _conv(layer, x, stride=1, padding="SAME"):
    x = jax.lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _normalised(layer, x)


def _dense(layer, x):
    return _normalised(layer, x @ layer["kernel"])


def _normalised(layer, x):
    if "scale" not in layer:
        return x + layer["bias"]
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axis=axes)
    variance = jnp.mean(jnp.square(x - mean), axis=axes)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["bias"]


def _pool(x, size, stride, padding: Any = "SAME"):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), padding)
