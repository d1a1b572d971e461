"""K-FAC over devices: batches and factors that are sharded, and two processes, equal to one device."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import curvax

SETTINGS = {"initial_damping": 0.1, "statistics": curvax.Fisher(), "statistics_stride": 1, "curvature_stride": 1}


def problem():
    """A network of eight layers under a scan and a matrix of 16 rows, on 16 examples."""

    def model(params, x):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x @ params["in"], params["layers"])
        return x @ params["out"]

    draw = np.random.default_rng(0)
    shapes = {"in": (16, 6), "layers": (8, 6, 6), "out": (6, 3)}
    params = {name: jnp.asarray(0.4 * draw.normal(size=shape)) for name, shape in shapes.items()}
    batch = jnp.asarray(draw.normal(size=(16, 16))), jnp.asarray(draw.integers(0, 3, 16))
    return curvax.Objective(model, curvax.losses.softmax_cross_entropy()), params, batch


def with_biases():
    """Sides that eight devices share out, but for the ones behind the inputs."""

    def model(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["out"] + params["c"]

    draw = np.random.default_rng(1)
    shapes = {"w": (16, 8), "b": (8,), "out": (8, 8), "c": (8,)}
    params = {name: jnp.asarray(0.4 * draw.normal(size=shape)) for name, shape in shapes.items()}
    batch = jnp.asarray(draw.normal(size=(16, 16))), jnp.asarray(draw.integers(0, 8, 16))
    return curvax.Objective(model, curvax.losses.softmax_cross_entropy()), params, batch


def make(objective, params, batch, inverse="block_diagonal", **options):
    """The transformation, and a step of it."""
    tx = curvax.kfac(curvax.find_layers(objective, params, batch, **options), inverse=inverse, **SETTINGS)

    def step(params, state, batch):
        _, grads, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, at=at)
        return optax.apply_updates(params, updates), state

    return tx, step


def steps(tx, step, params, state, batch):
    for _ in range(3):
        params, state = step(params, state, batch)
    return params, state


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (problem, {}),
        (with_biases, {"bias": "separate"}),
        (with_biases, {"bias": "separate", "inverse": "block_tridiagonal"}),
    ],
)
def test_factors_and_inverses_are_split_when_asked(made, options):
    objective, params, batch = made()
    tx, step = make(objective, params, batch, **options)
    expected, _ = steps(tx, jax.jit(step), params, jax.jit(tx.init)(params), batch)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = curvax.layers.factor_shardings(jax.eval_shape(tx.init, params), mesh, "data")
    copied = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(jax.jit(tx.init)(params), shardings)
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    jitted = jax.jit(step, out_shardings=(copied, shardings))
    found, state = steps(tx, jitted, jax.device_put(params, copied), state, sharded)
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-9, atol=1e-12)
    blocks = [x for x in jax.tree.leaves(state.memory) if x.ndim == 3]
    assert sum(map(is_split, blocks)) >= len(blocks) / 2
    if "inverse" in options:
        (link,), factors = state.memory.prepared.links, state.memory.factors
        assert all(is_split(x) for x in (link.inputs, link.outputs, *factors.cross_inputs, *factors.cross_outputs))


def is_split(array):
    """Whether each of the eight devices has a part of its own."""
    return array.addressable_shards[0].data.size == array.size / 8


WORKER = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.transforms.test_kfac_devices import make, problem, steps
objective, params, batch = problem()
tx, step = make(objective, params, batch)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
copied, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
def everywhere(tree, sharding):
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: np.asarray(x)[i]), tree)
state = everywhere(tx.init(params), copied)
jitted = jax.jit(step, out_shardings=copied)
found, _ = steps(tx, jitted, everywhere(params, copied), state, everywhere(batch, split))
print("FOUND", [float(x) for leaf in jax.tree.leaves(found) for x in np.ravel(leaf.addressable_data(0))])
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one():
    objective, params, batch = problem()
    tx, step = make(objective, params, batch)
    expected, _ = steps(tx, jax.jit(step), params, jax.jit(tx.init)(params), batch)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(index)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    for text in printed:
        (line,) = [line for line in text.splitlines() if line.startswith("FOUND")]
        found = [float(number) for number in line.removeprefix("FOUND [").rstrip("]").split(",")]
        every = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(expected)])
        np.testing.assert_allclose(found, every, rtol=1e-8, atol=1e-12)
