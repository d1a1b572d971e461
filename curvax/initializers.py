"""Initialisers of parameters that keep the first gradients of deep and recurrent networks neither tiny nor huge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def sparse(num_nonzeros: int = 15, stddev: float = 1.0) -> Initializer:
    r"""Sparse initialisation: every unit is connected to ``num_nonzeros`` units of the layer before, by N(0, stddev^2).

    The last axis numbers the units of a layer and all axes before it their incoming weights, as in ``x @ kernel`` and
    in the kernels of convolutions; the nonzero places are drawn without replacement for each unit on its own. A layer
    with no more incoming weights than that is dense.

    Martens 2010 takes 15 weights from N(0, 1) for feed-forward networks, with zero biases, or 0.5 for tanh units;
    Martens 2016 takes N(0, 1/15) for the recurrent and output weights of recurrent networks and N(0, 1) for their input
    weights. Source: Martens 2010, section 5; Martens 2016, section 4.13.

    Args:
        num_nonzeros: Incoming weights of a unit that are not zero.

    Returns:
        A function (key, shape, dtype) -> array, like those of ``jax.nn.initializers``; flax and haiku take it as it is.

    Raises:
        ValueError: ``num_nonzeros`` is below 1, or the shape has fewer than two axes (biases want zeros or a constant).

    Example:
        >>> kernel = curvax.initializers.sparse(num_nonzeros=3)(jax.random.key(0), (8, 5))
        >>> jnp.sum(kernel != 0, axis=0).tolist()
        [3, 3, 3, 3, 3]
    """
    if num_nonzeros < 1:
        raise ValueError(f"num_nonzeros is {num_nonzeros}; a unit without incoming weights cannot learn")

    def initialize(key: jax.Array, shape: Sequence[int], dtype: Any = float, **options: Any) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(f"sparse initialisation is for kernels of two axes or more, got shape {tuple(shape)}")
        incoming, units = math.prod(shape[:-1]), shape[-1]
        places_key, values_key = jax.random.split(key)
        ranks = jnp.argsort(jax.random.uniform(places_key, (incoming, units)), axis=0)  # a permutation in each column
        values = stddev * jax.random.normal(values_key, (incoming, units), dtype)
        kernel = jnp.where(ranks < num_nonzeros, values, jnp.zeros((), values.dtype))
        return kernel.reshape(shape, **options)

    return initialize
