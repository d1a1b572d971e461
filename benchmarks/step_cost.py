"""What a step of every optimiser costs, in steps of Adam: counted operations, and times taken in turn in one process.

Run: ``python -m benchmarks.step_cost``. Methods with periodic work are counted over a whole cycle. The loss and batch
are Adam's; a method that does not read the incoming gradient does not pay for it.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import curvax
from benchmarks.operations import flops
from benchmarks.product_cost import setting
from benchmarks.progress import table

NETWORKS = {
    "784-300-10, batch 256 (235k + parameters)": ((784, 300, 10), 256),
    "784-600-600-320-10, batch 512 (1M parameters)": ((784, 600, 600, 320, 10), 512),
}
KEEP = curvax.damping.DampingRule(decrease=1, increase=1)


class Entry(NamedTuple):
    """An optimiser: how it is made, and between what and what its steps alternate.

    Attributes:
        make: () -> transformation.
        loops: The iterations to count for loops without a known number.
        rare: () -> the transformation without its periodic work, which is done once in ``period`` steps.
        period: See ``rare``.
    """

    make: Callable[[], Any]
    loops: int | None = None
    rare: Callable[[], Any] | None = None
    period: int = 1


ENTRIES = {
    "adam": Entry(lambda: optax.adam(1e-3)),
    "momentum sgd": Entry(lambda: optax.sgd(1e-2, momentum=0.9)),
    "curveball": Entry(curvax.curveball, None, lambda: curvax.curveball(rule=KEEP), 5),
    "curveball, fixed damping": Entry(lambda: curvax.curveball(rule=KEEP)),
    "curveball, gradient recomputed": Entry(
        lambda: curvax.curveball(gradient="recomputed"),
        None,
        lambda: curvax.curveball(gradient="recomputed", rule=KEEP),
        5,
    ),
    "lsr1, memory 5": Entry(curvax.lsr1, 10),
    "lsr1_linesearch, memory 5, no halving": Entry(curvax.lsr1_linesearch, 1),
    "cubic step on sgd": Entry(lambda: curvax.scale_by_cubic_step(optax.sgd(1.0))),
    "hessian_free, 20 iterations": Entry(lambda: curvax.hessian_free(max_iterations=20, progress_tolerance=0.0), 20),
    "natural_gradient, 10 iterations": Entry(lambda: curvax.natural_gradient(max_iterations=10, tolerance=0.0), 10),
    "scale_by_sample_space": Entry(curvax.scale_by_sample_space, 40),
}


def training_step(objective, tx):
    """(params, state, batch) -> the next params and state."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    return step


def counted(objective, entry, params, batch):
    """Floating-point operations of a step, the mean over a cycle."""

    def of(tx):
        state = jax.eval_shape(tx.init, params)
        return flops(training_step(objective, tx), params, state, batch, while_trip_count=entry.loops)

    every = of(entry.make())
    if entry.rare is None:
        return every
    rare = of(entry.rare())
    return rare + (every - rare) / entry.period


def timed(objective, params, batch, repeats):
    """Median seconds of a step of every optimiser, taken in turn; cycles are in the median only as they occur."""
    runs = {}
    for name, entry in ENTRIES.items():
        tx = entry.make()
        step = jax.jit(training_step(objective, tx), donate_argnums=(0, 1))
        runs[name] = [step, jax.tree.map(jnp.copy, params), tx.init(params), []]
    for repeat in range(repeats + 1):
        for run in runs.values():
            step, theta, state, seconds = run
            start = time.perf_counter()
            run[1], run[2] = jax.block_until_ready(step(theta, state, batch))
            if repeat:
                seconds.append(time.perf_counter() - start)
    return {name: statistics.median(run[3]) for name, run in runs.items()}


def main(argv=None):
    """Prints the tables and writes them to ``benchmarks/results/step_cost.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each optimiser (default 10)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    columns = ["optimiser", "GFLOP", "in Adam's steps (counted)", "ms (median)", "in Adam's steps (time)"]
    lines = [f"# Steps in steps of Adam, tanh, softmax, float32, {jax.devices()[0]}", ""]
    lines += [
        f"Median of {arguments.repeats} steps, taken in turn in one process. Loops whose length depends on the data"
    ]
    lines += ["are counted as the name says; of `scale_by_sample_space` with 40 iterations.", ""]
    for title, (sizes, batch_size) in NETWORKS.items():
        objective, params, batch, _ = setting(sizes, batch_size)
        counts = {name: counted(objective, entry, params, batch) for name, entry in ENTRIES.items()}
        seconds = timed(objective, params, batch, arguments.repeats)
        rows = [
            [
                name,
                f"{counts[name] / 1e9:.2f}",
                f"{counts[name] / counts['adam']:.2f}",
                f"{1e3 * seconds[name]:.1f}",
                f"{seconds[name] / seconds['adam']:.2f}",
            ]
            for name in ENTRIES
        ]
        table([dict(zip(columns, row, strict=True)) for row in rows], columns, title)
        lines += [f"## {title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]] + [""]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "step_cost.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
