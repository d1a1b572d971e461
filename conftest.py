"""Doctests see what their reader would have imported, in the precision of the tests."""

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile much and run little.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, curvax=curvax)
