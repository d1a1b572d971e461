"""What curvature products cost, in gradients: counted operations, and times measured side by side in one process.

Run: ``python -m benchmarks.product_cost``. The network is 784-1024-1024-10 with tanh units and softmax, batch 512.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

import curvax
from benchmarks.operations import flops
from benchmarks.progress import markdown, table

SIZES = (784, 1024, 1024, 10)
BATCH = 512


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


def operations(objective, params, batch, vector):
    """What is measured: name -> (function, arguments, operations shared with the linearisation or 0)."""
    at = objective.linearize(params, batch)
    matrices = {"GGN": curvax.ggn(at), "Hessian": curvax.hessian(at)}
    calls = {
        "gradient": (jax.value_and_grad(objective), (params, batch)),
        "gradient with curvature point": (lambda p, b: objective.value_and_grad(p, b)[:2], (params, batch)),
    }
    for name, matrix in matrices.items():
        calls[f"{name} product"] = (lambda a, v: a(v), (matrix, vector))
        calls[f"{name} quadratic form"] = (lambda a, v: a.quadratic(v), (matrix, vector))
    calls["GGN sample (diagonal estimate)"] = (
        lambda a, key: a.sample(key, curvax.trees.random_rademacher),
        (matrices["GGN"], jax.random.key(1)),
    )
    calls["linearise + GGN product"] = (
        lambda p, b, v: curvax.ggn(objective.linearize(p, b))(v),
        (params, batch, vector),
    )
    return calls


def measure(calls, repeats):
    """Median seconds of each compiled call, taken in turn so that drift of the machine hits all alike."""
    compiled = {name: (jax.jit(function), arguments) for name, (function, arguments) in calls.items()}
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, (function, arguments) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(argv=None):
    """Prints the table and writes it to ``benchmarks/results/product_cost.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each operation (default 15)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)

    calls = operations(*setting())
    counts = {name: flops(function, *inputs) for name, (function, inputs) in calls.items()}
    seconds = measure(calls, arguments.repeats)
    columns = ["operation", "GFLOP", "in gradients (counted)", "ms (median)", "in gradients (time)"]
    rows = [
        [
            name,
            f"{counts[name] / 1e9:.2f}",
            f"{counts[name] / counts['gradient']:.3f}",
            f"{1e3 * seconds[name]:.1f}",
            f"{seconds[name] / seconds['gradient']:.2f}",
        ]
        for name in calls
    ]
    title = f"Curvature products, {'-'.join(map(str, SIZES))} tanh, softmax, batch {BATCH}, float32, {jax.devices()[0]}"
    table([dict(zip(columns, row, strict=True)) for row in rows], columns, title)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", f"Median of {arguments.repeats} calls, taken in turn in one process.", ""]
    lines += markdown(columns, rows)
    (arguments.output / "product_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
