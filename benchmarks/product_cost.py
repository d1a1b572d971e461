"""What curvature products cost, in gradients: counted operations, and times measured side by side in one process.

Run: ``python -m benchmarks.product_cost``. Solvers are loops, so products in a loop are measured beside single ones
and beside those that ``jax.linearize`` gives: on a CPU, XLA has a fast kernel for convolutions that it does not take in
loops by itself.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import curvax
from benchmarks.image_networks import small_cnn
from benchmarks.machine import load, on_machine
from benchmarks.operations import flops
from benchmarks.progress import markdown, table

SIZES = (784, 1024, 1024, 10)
BATCH = 512
IN_LOOP = 4


class Operation(NamedTuple):
    """A call that is measured; ``products`` are how many of what its name says it makes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    products: int = 1


def network(params, x):
    """A tanh network with a linear last layer."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def setting(sizes=SIZES, batch_size=BATCH):
    """The objective, parameters, batch and a vector, in float32."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(sizes) + 2))
    params = [
        {"kernel": jax.random.normal(next(keys), (m, n)) / m**0.5, "bias": jnp.zeros(n)}
        for m, n in itertools.pairwise(sizes)
    ]
    batch = (
        jax.random.normal(next(keys), (batch_size, sizes[0])),
        jax.random.randint(next(keys), (batch_size,), 0, sizes[-1]),
    )
    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    return objective, params, batch, curvax.trees.random_normal(next(keys), params)


def convolutional(batch_size=128):
    """The same for a small convolutional network, on noise."""
    network, keys = small_cnn(), jax.random.split(jax.random.key(0), 4)
    params = network.init(keys[0])
    images = jax.random.normal(keys[1], (batch_size, *network.image_shape))
    batch = images, jax.random.randint(keys[2], (batch_size,), 0, 10)
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy())
    return objective, params, batch, curvax.trees.random_normal(keys[3], params)


NETWORKS = {
    f"{'-'.join(map(str, SIZES))} tanh, softmax, batch {BATCH}": setting,
    "three 3x3 convolutions 32-64-64 with pools, dense 1024-128-10, softmax, batch 128": convolutional,
}


def operations(objective, params, batch, vector) -> dict[str, Operation]:
    """What is measured, by name."""
    at = objective.linearize(params, batch)
    matrices = {"GGN": curvax.ggn(at), "Hessian": curvax.hessian(at)}
    calls = {
        "gradient": Operation(jax.value_and_grad(objective), (params, batch)),
        "gradient with curvature point": Operation(lambda p, b: objective.value_and_grad(p, b)[:2], (params, batch)),
    }
    for name, matrix in matrices.items():
        calls[f"{name} product"] = Operation(lambda a, v: a(v), (matrix, vector))
        calls[f"{name} quadratic form"] = Operation(lambda a, v: a.quadratic(v), (matrix, vector))
    calls["GGN sample (diagonal estimate)"] = Operation(
        lambda a, key: a.sample(key, curvax.trees.random_rademacher), (matrices["GGN"], jax.random.key(1))
    )
    calls["linearise + GGN product"] = Operation(
        lambda p, b, v: curvax.ggn(objective.linearize(p, b))(v), (params, batch, vector)
    )
    calls["linearise + GGN products in a loop"] = Operation(
        lambda p, b, v: repeated(curvax.ggn(objective.linearize(p, b)), v), (params, batch, vector), IN_LOOP
    )
    calls["the same by jax.linearize alone"] = Operation(
        lambda p, b, v: repeated(plain_product(objective, p, b), v), (params, batch, vector), IN_LOOP
    )
    return calls


def repeated(product, vector):
    """A power of a matrix times a vector, by a loop."""

    def body(_, v):
        moved = product(v)
        return curvax.trees.scale(1 / curvax.trees.norm(moved), moved)

    return jax.lax.fori_loop(0, IN_LOOP, body, vector)


def plain_product(objective, params, batch):
    """J^T H J v as one would write it without curvax, for softmax and labels."""
    inputs, _ = batch
    outputs, push = jax.linearize(lambda p: objective.terms[0].model_fn(p, inputs), params)
    pull = jax.linear_transpose(push, params)
    p = jax.nn.softmax(outputs)

    def product(vector):
        z = push(vector)
        return pull(p * (z - jnp.sum(p * z, axis=-1, keepdims=True)) / len(outputs))[0]

    return product


def measure(calls, repeats):
    """Median seconds of a product of each compiled call, in turn so that drift of the machine hits all alike."""
    compiled = {name: (jax.jit(call.function), call.arguments) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, (function, arguments) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) / calls[name].products for name, times in seconds.items()}


def main(argv=None):
    """Prints the table and writes it to ``benchmarks/results/product_cost.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each operation (default 15)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)

    before = load()
    lines = ["# Curvature products in gradients, float32", ""]
    lines += [f"On {on_machine()}; load {before:g} before. Medians of {arguments.repeats} calls, taken in turn in one"]
    lines += [
        f"process; loops are of {IN_LOOP} products, and the figures those of one, its share of the linearisation in."
    ]
    for title, make in NETWORKS.items():
        columns, rows = measured(operations(*make()), arguments.repeats)
        table([dict(zip(columns, row, strict=True)) for row in rows], columns, title)
        lines += ["", f"## {title}", "", *markdown(columns, rows)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "product_cost.md").write_text("\n".join(lines) + "\n")


def measured(calls, repeats):
    """The columns and rows of a table."""
    counts = {name: flops(call.function, *call.arguments) / call.products for name, call in calls.items()}
    seconds = measure(calls, repeats)
    columns = ["operation", "GFLOP", "in gradients (counted)", "ms (median)", "in gradients (time)"]
    return columns, [
        [
            name,
            f"{counts[name] / 1e9:.2f}",
            f"{counts[name] / counts['gradient']:.3f}",
            f"{1e3 * seconds[name]:.1f}",
            f"{seconds[name] / seconds['gradient']:.2f}",
        ]
        for name in calls
    ]


if __name__ == "__main__":
    main()
