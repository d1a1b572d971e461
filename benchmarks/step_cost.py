"""What a step of every optimiser costs, in steps of Adam: counted operations, seconds and bytes.

Run: ``python -m benchmarks.step_cost``, or with ``--networks`` some of the networks alone. Loss and batch are Adam's; a
method that does not read the incoming gradient does not pay for it. Periodic work is counted and timed as it occurs:
all is the mean over a whole cycle of a method's steps, after its first, and the slowest step stands beside it.

On CPUs steps are timed a second time with XLA's memory in pieces, see ``benchmarks.machine.in_pieces``.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks.image_networks import small_cnn
from benchmarks.machine import in_pieces, load, on_machine
from benchmarks.operations import flops
from benchmarks.product_cost import setting
from benchmarks.progress import markdown, table

KEEP = curvax.damping.DampingRule(decrease=1, increase=1)
CYCLE = 20


class Entry(NamedTuple):
    """An optimiser.

    Attributes:
        make: layers -> transformation.
        loops: The iterations to count for loops without a known number. Conditionals on data are alarms.
        cycle: Steps of a cycle of its periodic work.
    """

    make: Callable[[curvax.Layers], Any]
    loops: int | None = None
    cycle: int = 1


def algorithm_7(layers, **options):
    """K-FAC with all that the paper's algorithm adapts, and the paper's periods and parts of the batch."""
    return curvax.kfac(
        layers,
        initial_damping=150.0,
        judged_by="same_batch",
        gamma_rule=curvax.damping.BestOfThree(),
        refresh_period=20,
        decay=0.95,
        statistics_stride=8,
        curvature_stride=4,
        **options,
    )


FIRST_ORDER = {
    "adam": Entry(lambda _: optax.adam(1e-3), cycle=CYCLE),
    "momentum sgd": Entry(lambda _: optax.sgd(1e-2, momentum=0.9)),
}
KRONECKER = {
    "scale_by_kfac, momentum": Entry(
        lambda layers: optax.chain(curvax.scale_by_kfac(layers), optax.trace(0.9), optax.scale(-1e-3)), cycle=CYCLE
    ),
    "kfac, defaults": Entry(lambda layers: curvax.kfac(layers), cycle=CYCLE),
    # Once a cycle it tries two more values of gamma, unless the batch is not finite.
    "kfac, algorithm 7": Entry(algorithm_7, 2, CYCLE),
    "kfac, algorithm 7, block-tridiagonal": Entry(
        lambda layers: algorithm_7(layers, inverse="block_tridiagonal"), 2, CYCLE
    ),
    "kfac, EKFAC": Entry(lambda layers: curvax.kfac(layers, inverse="eigen_corrected"), cycle=CYCLE),
}
LAYER_WISE = {
    # As in the paper, alpha and the learning rate fixed; conjugate gradients for as many iterations as there may be.
    f"ea_cg, {curvature}": Entry(
        functools.partial(curvax.ea_cg, curvature=curvature, alpha=0.05, learning_rate=0.1, tolerance=0.0), 20
    )
    for curvature in ("pch1", "gauss_newton", "fisher")
} | {
    "ea_cg, defaults": Entry(functools.partial(curvax.ea_cg, tolerance=0.0), 20, CYCLE),
    "ea_cg, pch1, kfi": Entry(lambda layers: curvax.ea_cg(layers, solver="kfi", alpha=0.05, learning_rate=0.1)),
}
BY_PRODUCTS = {
    "curveball": Entry(lambda _: curvax.curveball(), cycle=5),
    "curveball, fixed damping": Entry(lambda _: curvax.curveball(rule=KEEP)),
    "curveball, gradient recomputed": Entry(lambda _: curvax.curveball(gradient="recomputed"), cycle=5),
    "lsr1, memory 5": Entry(lambda _: curvax.lsr1(), 10),
    "lsr1_linesearch, memory 5, no halving": Entry(lambda _: curvax.lsr1_linesearch(), 1),
    "cubic step on sgd": Entry(lambda _: curvax.scale_by_cubic_step(optax.sgd(1.0))),
    "hessian_free, 20 iterations": Entry(lambda _: curvax.hessian_free(max_iterations=20, progress_tolerance=0.0), 20),
    "natural_gradient, 10 iterations": Entry(lambda _: curvax.natural_gradient(max_iterations=10, tolerance=0.0), 10),
    "scale_by_sample_space": Entry(lambda _: curvax.scale_by_sample_space(), 40),
}


class Network(NamedTuple):
    """A network with its loss and batch, and the optimisers that take steps on it.

    Attributes:
        make: () -> (objective, params, batch).
    """

    title: str
    make: Callable[[], tuple[curvax.Objective, Any, Any]]
    entries: dict[str, Entry]


def dense(sizes, batch_size):
    """A classifier with tanh units."""
    return setting(sizes, batch_size)[:3]


def autoencoder(batch_size):
    """The deep autoencoder of the images of curves, on noise."""
    from benchmarks.autoencoder import initial, network

    sizes = (784, 1000, 500, 250, 30)
    objective = curvax.Objective(network, curvax.losses.sigmoid_binary_cross_entropy())
    images = jax.random.uniform(jax.random.key(0), (batch_size, sizes[0]))
    return objective, initial((*sizes, *sizes[-2::-1]), 0), (images, images)


def convolutions(batch_size):
    """A small convolutional classifier, on noise."""
    network = small_cnn()
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], (batch_size, *network.image_shape))
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy())
    return objective, network.init(keys[1]), (images, jax.random.randint(keys[2], (batch_size,), 0, 10))


def sigmoids(batch_size):
    """The deep sigmoid classifier of the positive-curvature Hessian's experiments, on noise."""
    from benchmarks.pch_study import CRITERIA, SIZES, initial, network

    images = jax.random.normal(jax.random.key(0), (batch_size, SIZES[0]))
    labels = jax.random.randint(jax.random.key(1), (batch_size,), 0, SIZES[-1])
    return curvax.Objective(network, CRITERIA["cross-entropy"]), initial(), (images, labels)


LAYERED = FIRST_ORDER | KRONECKER
NETWORKS = {
    "small": Network(
        "784-300-10, batch 256", lambda: dense((784, 300, 10), 256), {**FIRST_ORDER, **KRONECKER, **BY_PRODUCTS}
    ),
    "wide": Network(
        "784-600-600-320-10, batch 512",
        lambda: dense((784, 600, 600, 320, 10), 512),
        {**FIRST_ORDER, **KRONECKER, **BY_PRODUCTS},
    ),
    "sigmoid": Network(
        "3072-1024-512-256-128-64-32-16-10, sigmoid, batch 500", lambda: sigmoids(500), FIRST_ORDER | LAYER_WISE
    ),
    "autoencoder_1000": Network(
        "autoencoder 784-1000-500-250-30 mirrored, batch 1000", lambda: autoencoder(1000), LAYERED
    ),
    "autoencoder_256": Network(
        "autoencoder 784-1000-500-250-30 mirrored, batch 256", lambda: autoencoder(256), LAYERED
    ),
    "mlp": Network(
        "3072-1024-512-256-128-64-32-16-10, batch 500",
        lambda: dense((3072, 1024, 512, 256, 128, 64, 32, 16, 10), 500),
        LAYERED,
    ),
    "cnn": Network(
        "three 3x3 convolutions 32-64-64, each with 2x2 average pool, dense 1024-128-10, batch 128",
        lambda: convolutions(128),
        LAYERED,
    ),
}


class Measured:
    """One optimiser on one network: its compiled step, what it took to get there, and the cycles it has run."""

    def __init__(
        self,
        entry: Entry,
        objective: curvax.Objective,
        params: Any,
        batch: Any,
        layers: curvax.Layers,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.entry, self.batch = entry, batch
        tx = entry.make(layers)
        self._step = jax.jit(training_step(objective, tx), donate_argnums=(0, 1))
        # Copies, as the step takes the place of its arguments.
        self._carried = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        start = time.perf_counter()
        self._compiled = self._step.lower(*self._carried, batch).compile(compiler_options)
        self.compile_seconds = time.perf_counter() - start
        self.state_bytes = _bytes(self._carried[1]) / _bytes(params)
        memory = self._compiled.memory_analysis()
        self.temporary_bytes = float("nan") if memory is None else memory.temp_size_in_bytes
        self.cycles: list[list[float]] = []
        self._counters: list[Any] = []

    def run_cycle(self, kept: bool = True) -> None:
        """Keeps the seconds of a cycle of steps, and the counters of the state at each of them."""
        seconds, counters = [], []
        for _ in range(self.entry.cycle):
            counters.append([np.asarray(leaf) if _counts(leaf) else None for leaf in jax.tree.leaves(self._carried[1])])
            start = time.perf_counter()
            self._carried = jax.block_until_ready(self._compiled(*self._carried, self.batch))
            seconds.append(time.perf_counter() - start)
        self._counters = counters
        if kept:
            self.cycles.append(seconds)

    @property
    def seconds(self) -> float:
        """The mean step, the median over the cycles."""
        return statistics.median(sum(cycle) / len(cycle) for cycle in self.cycles)

    @property
    def slowest(self) -> float:
        """The slowest step of the cycle, each being the median over the cycles."""
        return max(statistics.median(place) for place in zip(*self.cycles, strict=True))

    def operations(self) -> float:
        """Floating-point operations of a step, the mean over the last cycle."""
        leaves, treedef = jax.tree.flatten(self._carried[1])
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

        def at(counters):
            def step(params, state, batch):  # counters are constants of it, so that conditionals on them are known
                state = [x if known is None else known for x, known in zip(state, counters, strict=True)]
                return self._step(params, treedef.unflatten(state), batch)

            return flops(step, self._carried[0], shapes, self.batch, while_trip_count=self.entry.loops, alarms=True)

        return statistics.mean(map(at, self._counters))


def training_step(objective, tx):
    """(params, state, batch) -> the next params and state."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    return step


def measure(network: Network, repeats: int) -> list[dict[str, str]]:
    """A row for every optimiser, Adam first; the cycles are taken in turn, and ratios are to Adam's cycle beside."""
    objective, params, batch = network.make()
    layers = curvax.find_layers(objective, params, batch)

    def runs(options):
        measured = functools.partial(Measured, objective=objective, params=params, batch=batch, layers=layers)
        own = {name: measured(entry, compiler_options=options) for name, entry in network.entries.items()}
        return own, _ratios_to_adam(own, repeats)

    whole, ratios = runs({})
    pieces, ratios_in_pieces = runs(in_pieces()) if in_pieces() else (whole, ratios)
    counts = {name: run.operations() for name, run in whole.items()}
    return [
        {
            "optimiser": name,
            "GFLOP": f"{counts[name] / 1e9:.2f}",
            "in Adam's steps (counted)": f"{counts[name] / counts['adam']:.2f}",
            "ms": f"{1e3 * run.seconds:.1f}",
            "slowest ms": f"{1e3 * run.slowest:.1f}",
            "in Adam's steps (time)": f"{ratios[name]:.2f}",
            "in pieces, ms": f"{1e3 * pieces[name].seconds:.1f}",
            "in pieces, in Adam's steps": f"{ratios_in_pieces[name]:.2f}",
            "first compile s": f"{run.compile_seconds:.1f}",
            "state / parameters": f"{run.state_bytes:.2f}",
            "temporary MB": f"{run.temporary_bytes / 1e6:.1f}",
        }
        for name, run in whole.items()
    ]


def _ratios_to_adam(runs, repeats):
    """For each optimiser the median of its cycles' means over Adam's beside them."""
    for repeat in range(repeats + 1):  # the first cycle holds what a method does at its start alone
        for run in runs.values():
            run.run_cycle(repeat > 0)
    means = {name: [statistics.mean(cycle) for cycle in run.cycles] for name, run in runs.items()}
    return {
        name: statistics.median(own / adam for own, adam in zip(cycles, means["adam"], strict=True))
        for name, cycles in means.items()
    }


HEADING = f"""# Steps in steps of Adam, float32

By `python -m benchmarks.step_cost`. Means over a cycle of {CYCLE} steps where there is periodic work, taken in turn in
one process. Loops whose length depends on the data are counted as the name says; of `scale_by_sample_space` with 40
iterations. What a step does only when the data alarm it is not counted. First compile is tracing, lowering and
compiling the step. State in bytes of the parameters. Temporary bytes are XLA's, in one piece, which glibc maps anew at
every step if it is larger than 32 MB; "in pieces" are the same steps, Adam's as well, with
`compiler_options={{"xla_multiheap_size_constraint_per_heap": 33_000_000}}` of `jax.jit`.
"""


def main(argv=None):
    """Prints the tables and writes them to ``benchmarks/results/step_cost.md``, with those of earlier networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed cycles of each optimiser (default 5)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    sections = arguments.output / "step_cost"
    sections.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks:
        network, before = NETWORKS[name], load()
        rows = measure(network, arguments.repeats)
        columns = list(rows[0])
        conditions = f"On {on_machine()}; load {before:g} before. Medians of {arguments.repeats} cycles."
        table(rows, columns, f"{network.title}. {conditions}")
        cells = ([row[column] for column in columns] for row in rows)
        lines = [f"## {network.title}", "", conditions, "", *markdown(columns, cells)]
        (sections / f"{name}.md").write_text("\n".join(lines) + "\n")
        jax.clear_caches()
    files = [sections / f"{name}.md" for name in NETWORKS]
    report = "\n".join([HEADING, *(file.read_text() for file in files if file.exists())])
    (arguments.output / "step_cost.md").write_text(report)


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _counts(leaf):
    """Whether a leaf of a state may be a counter."""
    return leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer)


if __name__ == "__main__":
    main()
