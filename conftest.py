"""Doctests see what their reader would have imported, in the precision of the tests."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest

import curvax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile much and run little: with these two flags XLA compiles them three times as fast. XLA stops at a flag
# that it does not know, so they are given to the versions that they were tried with alone.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, curvax=curvax)
