"""What the first step of a method costs: processor seconds of tracing and compiling it, beside Adam's.

Run: ``python -m benchmarks.compile_time``. The network is 64-32-32-10 with tanh units and softmax, batch 250; every
method is at its defaults. Processor seconds of all threads, as seconds on a clock depend on what else runs.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any, NamedTuple

import jax
import optax

import curvax
from benchmarks.machine import on_machine
from benchmarks.product_cost import setting
from benchmarks.progress import markdown, table

SIZES = (64, 32, 32, 10)
BATCH = 250
LAYERED = ("kfac", "ea_cg")
METHODS = (
    "hessian_free",
    "newton_cg",
    "natural_gradient",
    "levenberg_marquardt",
    "krylov_subspace_descent",
    "curveball",
    "lsr1",
    *LAYERED,
)
RESULTS = pathlib.Path(__file__).parent / "results"


class Cost(NamedTuple):
    """Seconds of tracing and lowering, seconds of compiling, and the instructions of the compiled program."""

    trace: float
    compile: float
    instructions: int


def cost(method: str) -> Cost:
    """The cost of a first step of a method by its name, "adam" among them."""
    objective, params, batch, _ = setting(SIZES, BATCH)
    layers = (curvax.find_layers(objective, params, batch),) if method in LAYERED else ()
    made: Any = optax.adam(1e-3) if method == "adam" else getattr(curvax, method)(*layers)
    tx = optax.with_extra_args_support(made)

    def step(params, state, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    start = time.process_time()
    lowered = jax.jit(step).lower(params, state, batch)
    middle = time.process_time()
    program = lowered.compile().as_text() or ""
    return Cost(middle - start, time.process_time() - middle, program.count(" = "))


def main(argv=None):
    """Prints the costs and writes ``benchmarks/results/compile_time.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "compile_time.md")
    arguments = parser.parse_args(argv)
    cost("adam")  # what JAX itself has to start
    rows = []
    for method in ("adam", *arguments.methods):
        found = cost(method)
        rows.append(
            {
                "first step": method,
                "tracing, s": f"{found.trace:.2f}",
                "compiling, s": f"{found.compile:.2f}",
                "instructions": found.instructions,
            }
        )
    columns = list(rows[0])
    table(rows, columns, "first steps")
    lines = [
        "# What the first step of a method costs",
        "",
        f"By `python -m benchmarks.compile_time`. Network {'-'.join(map(str, SIZES))}, tanh and softmax, batch {BATCH},"
        f" methods at their defaults; processor seconds, all threads. On {on_machine()}.",
        "",
        *markdown(columns, ([str(row[column]) for column in columns] for row in rows)),
    ]
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
