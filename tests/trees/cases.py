"""Pytrees whose leaves are of all sizes and several dtypes."""

import jax
import jax.numpy as jnp
import numpy as np

from curvax.trees import SMALL


def mixed():
    return {
        "large": np.arange(SMALL + 1.0, dtype=np.float32),
        "half": np.ones((2, 3), jnp.bfloat16),
        "kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(7.0, np.float32),
    }


def several():
    """Trees of one structure whose leaves are small, large, empty and of several dtypes."""
    generator = np.random.default_rng(0)
    return [
        jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), mixed()) for _ in "abcd"
    ]
