"""A zoo of tiny problems: every kind of model and loss the library must be right on, small enough for dense oracles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax import losses
from curvax.objectives.objective import Objective
from curvax.objectives.term import Term

PyTree = Any


class Problem(NamedTuple):
    """An objective with parameters and a batch for it.

    Attributes:
        name: The problem's name.
        objective: The objective.
        params: Parameters of a scale at which units are neither linear nor saturated.
        batch: A batch of some examples.
    """

    name: str
    objective: Objective
    params: PyTree
    batch: PyTree


def problem(name: str, seed: int = 0, dtype: Any = None) -> Problem:
    """A problem of the zoo.

    Args:
        name: One of ``PROBLEMS``: "mlp", "convolution", "recurrent", "deep_linear", "tied", "sequence",
            "poisson", "gaussian", "two_terms", "weighted", "regularised".
        seed: Seed of parameters and batch.
        dtype: The floating-point dtype; jax's default if None.

    Returns:
        The problem.

    Raises:
        KeyError: There is no problem of that name.

    Example:
        >>> objective, params, batch = problem("mlp")[1:]
        >>> bool(objective(params, batch) > 0)
        True
    """
    if name not in PROBLEMS:
        raise KeyError(f"there is no problem {name!r}; the zoo has {', '.join(PROBLEMS)}")
    objective, params, batch = PROBLEMS[name](_Draw(seed))
    dtype = jnp.dtype(dtype or jnp.result_type(float))

    def to_jax(leaf):
        return jnp.asarray(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None)

    return Problem(name, objective, jax.tree.map(to_jax, params), jax.tree.map(to_jax, batch))


def _mlp(draw):
    objective = Objective(_dense_network, losses.softmax_cross_entropy())
    return objective, _dense_params(draw, 4, 5, 4, 3), (draw(6, 4), draw.integers(3, 6))


def _convolution(draw):
    def model(params, images):
        def convolve(x, kernel, stride):
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        x = jnp.tanh(convolve(images, params["first"], 1) + params["bias"])
        x = jax.nn.softplus(convolve(x, params["second"], 2))
        return jnp.mean(x, axis=(1, 2)) @ params["head"]

    params = {"first": draw(3, 3, 2, 3) / 3, "bias": draw(3), "second": draw(2, 2, 3, 2) / 2, "head": draw(2, 3)}
    objective = Objective(model, losses.softmax_cross_entropy())
    return objective, params, (draw(4, 5, 5, 2), draw.probabilities(4, 3))


def _recurrent(draw):
    def model(params, inputs):
        def step(state, x):
            state = jnp.tanh(x @ params["input"] + state @ params["recurrent"] + params["bias"])
            return state, state @ params["output"]

        start = jnp.zeros((inputs.shape[0], params["bias"].shape[0]), inputs.dtype)
        return jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(inputs, 0, 1))[1], 0, 1)

    params = {"input": draw(2, 3), "recurrent": draw(3, 3) / 2, "bias": draw(3), "output": draw(3, 2)}
    objective = Objective(model, losses.sigmoid_binary_cross_entropy())
    return objective, params, (draw(4, 5, 2), (draw(4, 5, 2) > 0).astype(np.int32))


def _deep_linear(draw):
    def model(params, x):
        for weight in params:
            x = x @ weight
        return x

    objective = Objective(model, losses.squared_error())
    return objective, [draw(3, 4), draw(4, 3), draw(3, 2)], (draw(5, 3), draw(5, 2))


def _tied(draw):
    def model(params, x):
        code = jnp.tanh(x @ params["weight"] + params["hidden"])
        return code @ params["weight"].T + params["visible"]

    params = {"weight": draw(5, 3) / 2, "hidden": draw(3), "visible": draw(5)}
    objective = Objective(model, losses.sigmoid_binary_cross_entropy())
    return objective, params, (draw(6, 5), 1 / (1 + np.exp(-draw(6, 5))))


def _sequence(draw):
    def model(params, batch):
        tokens, _ = batch
        x = params["embedding"][tokens]
        scores = jnp.einsum("bsd,de,bte->bst", x, params["attention"], x)
        causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
        x = x + jax.nn.softmax(jnp.where(causal, scores, -1e9)) @ x
        return x @ params["embedding"].T

    params = {"embedding": draw(5, 3), "attention": draw(3, 3) / 3}
    tokens = draw.integers(5, 3, 5)
    mask = np.arange(4) < np.array([[4], [2], [3]])
    objective = Objective(
        model, losses.softmax_cross_entropy(), mask=lambda batch: batch[0][1], example_axes=((0, 0), 0)
    )
    return objective, params, ((tokens[:, :-1], mask), tokens[:, 1:])


def _poisson(draw):
    objective = Objective(_dense_network, losses.poisson())
    return objective, _dense_params(draw, 3, 4, 2), (draw(5, 3), draw.integers(4, 5, 2))


def _gaussian(draw):
    def model(params, x):
        return tuple(jnp.split(_dense_network(params, x), 2, axis=-1))

    objective = Objective(model, losses.gaussian())
    return objective, _dense_params(draw, 3, 4, 4), (draw(5, 3), draw(5, 2))


def _two_terms(draw):
    def residual(params, points):
        """The derivative of the network along its first input, plus the network: a term on derivatives."""
        along = jnp.zeros_like(points).at[:, 0].set(1)
        value, derivative = jax.jvp(lambda x: _dense_network(params, x), (points,), (along,))
        return derivative + value

    objective = Objective.from_terms(
        Term(residual, losses.squared_error(), select=lambda batch: batch["interior"]),
        Term(_dense_network, losses.squared_error(), select=lambda batch: batch["boundary"], weight=3.0),
    )
    batch = {"interior": (draw(5, 2), draw(5, 1)), "boundary": (draw(3, 2), draw(3, 1))}
    return objective, _dense_params(draw, 2, 4, 1), batch


def _weighted(draw):
    objective = Objective(
        lambda params, inputs: _dense_network(params, inputs["x"]),
        losses.softmax_cross_entropy(),
        select=lambda batch: (batch, batch["y"]),
        example_weights=lambda batch: batch["weights"],
        mask=lambda batch: batch["mask"],
    )
    batch = {
        "x": draw(6, 3),
        "y": draw.integers(3, 6),
        "weights": np.exp(draw(6)),
        "mask": np.array([True, True, False, True, False, True]),
    }
    return objective, _dense_params(draw, 3, 4, 3), batch


def _regularised(draw):
    objective = Objective(
        _dense_network,
        losses.squared_error(),
        l2=0.3,
        l2_mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return objective, _dense_params(draw, 3, 4, 2), (draw(5, 3), draw(5, 2))


PROBLEMS: dict[str, Callable[[Any], tuple[Objective, PyTree, PyTree]]] = {
    "mlp": _mlp,
    "convolution": _convolution,
    "recurrent": _recurrent,
    "deep_linear": _deep_linear,
    "tied": _tied,
    "sequence": _sequence,
    "poisson": _poisson,
    "gaussian": _gaussian,
    "two_terms": _two_terms,
    "weighted": _weighted,
    "regularised": _regularised,
}


def _dense_network(params, x):
    """A tanh network with a linear last layer."""
    for index, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(x) if index < len(params) - 1 else x
    return x


def _dense_params(draw, *sizes):
    return [
        {"kernel": draw(fan_in, fan_out) / fan_in**0.5, "bias": draw(fan_out) / 2}
        for fan_in, fan_out in itertools.pairwise(sizes)
    ]


class _Draw:
    """Successive random arrays from one seed; numpy's, which compile nothing."""

    def __init__(self, seed):
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape):
        return self._generator.normal(size=shape)

    def integers(self, stop, *shape):
        return self._generator.integers(stop, size=shape)

    def probabilities(self, *shape):
        return self._generator.dirichlet(np.ones(shape[-1]), size=shape[:-1])
