"""Long time lags learned by Hessian-free optimisation: ``python -m benchmarks.rnn_tasks --task addition --lag 30``.

The recurrent networks of Martens 2016, section 4.13 (Martens and Sutskever 2011), with their settings: 100 tanh units,
sparse initialisation, fresh sequences at every step, 10,000 of them for the gradient and 1,000 of these for the
curvature, at most 300 iterations of conjugate gradients, which stop by the 90 per cent rule; the iterate with the
lowest loss on the gradient's batch is the step, and that batch judges it. A run has solved its task when less than 1
per cent of the test sequences are misclassified (numbers: when off by more than 0.04; several bits: when one is wrong;
random permutation: by the last symbol), and has failed after 50 million sequences (50,000 mini-batches of 1,000),
those of a gradient and those of every curvature product.

``--table`` runs all tasks over lags and seeds, with and without structural damping, on batches that two processor cores
can do, and writes ``benchmarks/results/rnn_tasks.md``. Each finished run is a file, so a table can be stopped
(``--minutes``) and taken up again by the same command. A second core makes a run a fifth shorter; two tables side by
side on one core each (``taskset -c 0 ... --damping structural``) do half as much again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import operator
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks.machine import load, machine
from benchmarks.progress import Progress, log_json, markdown, table
from benchmarks.rnn_data import TASKS, Task

PyTree = Any

NUM_CONNECTIONS = 15
STRENGTH = 1 / 30
ERROR_ALLOWED = 0.01
NUMBER_TOLERANCE = 0.04
RESULTS = pathlib.Path(__file__).parent / "results"
# The sources do not say whether the strength of structural damping is multiplied by lambda ("structural") or not
# ("structural_fixed"). Only the former lets the hidden states move freely once the model is trusted.
DAMPINGS = ("structural", "structural_fixed", "tikhonov")
TABLE_LAGS = (10, 20, 30, 50, 100)
TABLE_DAMPINGS = ("structural", "tikhonov")
TABLE_SEEDS = [0, 1, 2]
TABLE_SIZES: dict[str, Any] = {
    "gradient_batch": 2000,
    "curvature_batch": 500,
    "test_batch": 1000,
    "max_sequences": 3_000_000,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a run, but for its seed; the defaults are the paper's."""

    task: str
    lag: int
    damping: str = "structural"
    hidden: int = 100
    gradient_batch: int = 10_000
    curvature_batch: int = 1000
    test_batch: int = 10_000
    max_iterations: int = 300
    max_sequences: int = 50_000_000

    def __post_init__(self):
        population = TASKS[self.task].population
        if population is not None:
            for name in ("gradient_batch", "curvature_batch", "test_batch"):
                object.__setattr__(self, name, population)
        if self.curvature_batch > self.gradient_batch:
            raise ValueError(
                f"the curvature batch is a part of the gradient batch of {self.gradient_batch} sequences and cannot"
                f" have {self.curvature_batch}"
            )

    @property
    def initial_damping(self) -> float:
        """lambda_0: 0.1 with structural damping and 0.3 without, but 0.1 T for random permutation."""
        if self.task == "random_permutation":
            return 0.1 * self.lag
        return 0.3 if self.damping == "tikhonov" else 0.1


def main(argv=None):
    """One task, or the table."""
    arguments = _parser().parse_args(argv)
    deadline = math.inf if arguments.minutes is None else time.perf_counter() + 60 * arguments.minutes
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.table:
        cells = [
            Settings(**dict[str, Any](task=task, lag=lag, damping=damping) | TABLE_SIZES | chosen)
            for task, lag, damping in itertools.product(TASKS, TABLE_LAGS, TABLE_DAMPINGS)
        ]
        run_table(list(dict.fromkeys(cells)), arguments.seeds or TABLE_SEEDS, arguments.output, deadline)
        return
    if arguments.task is None or arguments.lag is None:
        raise SystemExit("a single run needs --task and --lag; --table runs all tasks")
    settings = Settings(**chosen)
    print(settings)
    for seed in arguments.seeds or [0]:
        record = run(settings, seed, deadline)
        if record is None:
            print(f"Seed {seed}: neither solved nor failed in the time given")
            break
        table([record], ["seed", "outcome", "sequences", "steps", "seconds", "test_error"])
        if arguments.json is not None:
            log_json(arguments.json, record)


def run(settings: Settings, seed: int, deadline: float = math.inf) -> dict[str, Any] | None:
    """Trains one network until it has solved its task or failed.

    Args:
        settings: The settings.
        seed: Of the initial parameters and of the sequences.
        deadline: When to give up, on the clock of ``time.perf_counter``.

    Returns:
        A record: outcome ("solved" or "failed"), sequences, steps, seconds, test_error, ``settings`` and ``seed``, the
        machine and its load when the run began; None if the deadline came first.
    """
    trainer = make_trainer(settings)
    task = TASKS[settings.task]
    training, testing = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    test = task.draw(testing, settings.lag, settings.test_batch)
    params = initial(task, settings.hidden, jax.random.key(seed))
    state = trainer.init(params)
    sequences, steps, test_error, began = 0, 0, 1.0, load()
    title = f"{settings.task}, lag {settings.lag}, {settings.damping}, seed {seed}; step = a thousand sequences"
    budget = None if math.isinf(deadline) else deadline - time.perf_counter()
    with Progress(settings.max_sequences // 1000, budget, title) as progress:
        while test_error >= ERROR_ALLOWED and sequences <= settings.max_sequences:
            if time.perf_counter() > deadline:
                return None
            batch = task.draw(training, settings.lag, settings.gradient_batch)
            params, state = trainer.step(params, state, batch)
            steps += 1
            sequences += settings.gradient_batch + settings.curvature_batch * int(state.info.inner_iterations)
            test_error = error_rate(trainer.misclassified, params, test)
            shown = {name: getattr(state.info, name) for name in ("damping", "step_ratio", "inner_iterations")}
            progress.update(sequences // 1000, {"loss": state.info.loss, "error_rate": test_error} | shown)
        seconds = progress.seconds
    return {
        "outcome": "solved" if test_error < ERROR_ALLOWED else "failed",
        "sequences": sequences,
        "steps": steps,
        "seconds": seconds,
        "test_error": test_error,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "machine": machine(),
        "load": began,
    }


class Trainer(NamedTuple):
    """The compiled functions of a run."""

    init: Callable[[PyTree], PyTree]
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    misclassified: Callable[[PyTree, PyTree], jax.Array]


@functools.cache
def make_trainer(settings: Settings) -> Trainer:
    """Hessian-free optimisation with the settings of section 4.13."""
    task = TASKS[settings.task]
    model = network(task)
    loss = {
        "number": curvax.losses.squared_error,
        "bit": curvax.losses.sigmoid_binary_cross_entropy,
        "class": curvax.losses.softmax_cross_entropy,
    }[task.target]()
    objective = curvax.Objective(model, loss, has_aux=True)
    damping = curvax.damping.tikhonov()
    if settings.damping != "tikhonov":
        relative = settings.damping == "structural"
        damping = curvax.damping.structural(operator.itemgetter("hidden"), strength=STRENGTH, relative=relative)
    tx = curvax.hessian_free(
        initial_damping=settings.initial_damping,
        max_iterations=settings.max_iterations,
        preconditioner_exponent=None,
        stop="reduction",
        choice="best",
        judged_by="same_batch",
        damping_matrix=damping,
    )

    @jax.jit
    def step(params, state, batch):
        curvature_batch = jax.tree.map(lambda leaf: leaf[: settings.curvature_batch], batch)
        _, gradient, at = objective.value_and_grad(params, batch, chunk_size=settings.curvature_batch)
        curvature_at = objective.linearize(params, curvature_batch)
        updates, state = tx.update(gradient, state, params, at=at, curvature_at=curvature_at)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def misclassified(params, batch):
        inputs, targets = batch
        return wrong(task, model(params, inputs)[0], targets)

    return Trainer(tx.init, step, misclassified)


def network(task: Task) -> Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]:
    """A recurrent tanh network with linear outputs at the last steps, h_t = tanh(W x_t + V h_{t-1} + b), h_0 = 0.

    The outputs have shape (batch, output steps, outputs); with them come the hidden states, (batch, steps, hidden).
    """

    def model(params, inputs):
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = jax.nn.one_hot(inputs, task.num_inputs, dtype=params["input"].dtype)
        driven = inputs @ params["input"] + params["hidden_bias"]

        def advance(hidden, driven):
            hidden = jnp.tanh(driven + hidden @ params["recurrent"])
            return hidden, hidden

        _, hidden = jax.lax.scan(advance, jnp.zeros_like(driven[:, 0]), driven.swapaxes(0, 1))
        hidden = hidden.swapaxes(0, 1)
        last = hidden if task.output_steps is None else hidden[:, -task.output_steps :]
        return last @ params["output"] + params["output_bias"], {"hidden": hidden}

    return model


def initial(task: Task, hidden: int, key: jax.Array) -> PyTree:
    """Each unit has 15 incoming connections: N(0, 1) from inputs, N(0, 1/15) else, and biases N(0, 1/15)."""
    keys = jax.random.split(key, 5)
    stddev = NUM_CONNECTIONS**-0.5
    from_inputs = curvax.initializers.sparse(NUM_CONNECTIONS, stddev=1.0)
    from_hidden = curvax.initializers.sparse(NUM_CONNECTIONS, stddev=stddev)
    bias = jax.nn.initializers.normal(stddev)
    return {
        "input": from_inputs(keys[0], (task.num_inputs, hidden), jnp.float32),
        "recurrent": from_hidden(keys[1], (hidden, hidden), jnp.float32),
        "hidden_bias": bias(keys[2], (hidden,), jnp.float32),
        "output": from_hidden(keys[3], (hidden, task.num_outputs), jnp.float32),
        "output_bias": bias(keys[4], (task.num_outputs,), jnp.float32),
    }


def wrong(task: Task, outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether each sequence is misclassified, shape (batch,)."""
    if task.target == "number":
        wrong = jnp.abs(outputs - targets) > NUMBER_TOLERANCE
    elif task.target == "bit":
        wrong = (outputs > 0) != (targets > 0.5)
    else:
        wrong = (jnp.argmax(outputs, axis=-1) != targets)[:, -1:]
    return jnp.any(wrong.reshape(len(wrong), -1), axis=-1)


def error_rate(misclassified, params, sequences, size=1000):
    """The share of misclassified sequences, some at a time."""
    inputs, targets = sequences
    parts = [slice(start, start + size) for start in range(0, len(inputs), size)]
    return sum(int(misclassified(params, (inputs[part], targets[part])).sum()) for part in parts) / len(inputs)


def run_table(cells: list[Settings], seeds: list[int], output: pathlib.Path, deadline: float = math.inf) -> None:
    """Runs what is not on file yet, until the deadline, and writes the table of what is.

    Runs go through all cells with the first seed, short lags first, then with the second, so that a table that was
    stopped is a table with fewer seeds. A run on file with other settings is done again.
    """
    cells = sorted(cells, key=lambda cell: cell.lag)
    records = []
    for seed, settings in itertools.product(seeds, cells):
        file = output / "rnn_tasks" / f"{settings.task}_lag{settings.lag}_{settings.damping}_seed{seed}.json"
        record = json.loads(file.read_text()) if file.exists() else None
        if record is None or record["settings"] != dataclasses.asdict(settings):
            record = run(settings, seed, deadline) if time.perf_counter() < deadline else None
            if record is None:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record, indent=1) + "\n")
        records.append(record)
        (output / "rnn_tasks.md").write_text(report(records, len(seeds) * len(cells)))
    missing = len(seeds) * len(cells) - len(records)
    print(f"{len(records)} runs are in {output / 'rnn_tasks.md'}", end="")
    print(f"; {missing} are missing, the same command goes on with them" if missing else "")


def report(records: list[dict[str, Any]], planned: int) -> str:
    """The table as Markdown: for each task, lag and damping the sequences to success and the failure rate."""

    def cell(record):
        settings = record["settings"]
        return list(TASKS).index(settings["task"]), settings["lag"], DAMPINGS.index(settings["damping"])

    groups = [list(group) for _, group in itertools.groupby(sorted(records, key=cell), key=cell)]
    columns = [
        "task",
        "lag",
        "damping",
        "runs",
        "thousand sequences to success: mean (min, max)",
        "failure rate",
        "seconds",
    ]
    rows = []
    for group in groups:
        settings = group[0]["settings"]
        counts = [record["sequences"] / 1000 for record in group if record["outcome"] == "solved"]
        spread = f"{np.mean(counts):.0f} ({min(counts):.0f}, {max(counts):.0f})" if counts else "-"
        rate = f"{100 * (1 - len(counts) / len(group)):.0f} %"
        taken = [record["seconds"] for record in group if record["seconds"] is not None]
        seconds = f"{np.mean(taken):.0f}" if taken else "-"
        name = [settings["task"], str(settings["lag"]), settings["damping"]]
        rows.append([*name, str(len(group)), spread, rate, seconds])

    sizes = [record["settings"] for record in records if TASKS[record["settings"]["task"]].population is None]
    sizes = sizes[0] if sizes else records[0]["settings"]
    lines = [
        "# Long time lags by Hessian-free optimisation",
        "",
        f"By `python -m benchmarks.rnn_tasks --table`; {len(records)} of {planned} runs, float32.",
        "",
        f"- Network: {sizes['hidden']} tanh units, sparse initialisation, first hidden state zero.",
        f"- Batches: fresh sequences at every step, {sizes['gradient_batch']} for the gradient, the first"
        f" {sizes['curvature_batch']} of them for curvature (the paper: 10,000 and 1,000), {sizes['test_batch']} for"
        " the test (10,000). Memorization takes its 32 sequences for all three, as in the paper.",
        "- Sequences are counted through gradients and curvature products. The gradient's batch judges the step: the"
        " iterate with the lowest loss there is taken.",
        f"- Success: less than {ERROR_ALLOWED:.0%} of the test sequences misclassified; failure: more than"
        f" {sizes['max_sequences']:,} sequences (the paper: 50,000 mini-batches of 1,000).",
        f"- At most {sizes['max_iterations']} iterations of conjugate gradients, stopped by the 90 per cent rule"
        " (checked at every fifth) or by relative progress; no preconditioner.",
        "- structural: lambda (I + D/30) with D of the hidden states, lambda from 0.1; structural_fixed: lambda I +"
        " D/30; tikhonov: lambda I, lambda from 0.3. Random permutation starts from 0.1 times the lag.",
        "- Seconds are the mean of all runs, solved or not, without those that were halted in between; the first of a"
        " cell in a process compiles.",
        "",
        *markdown(columns, rows),
        *_machines(records),
    ]
    return "\n".join(lines) + "\n"


def _machines(records):
    """Where the runs were made, and under what load; those of before this was noted are left out."""
    noted = [record for record in records if "machine" in record]
    if not noted:
        return []
    kinds = {", ".join(f"{key} {value}" for key, value in record["machine"].items()) for record in noted}
    loads = [record["load"] for record in noted]
    return ["", f"On {'; '.join(sorted(kinds))}; load {min(loads):.1f} to {max(loads):.1f} when the runs began."]


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--lag", type=int, help="T, the number of steps of a sequence")
    parser.add_argument("--damping", choices=DAMPINGS, help="default structural; the table has structural and tikhonov")
    for field in dataclasses.fields(Settings)[3:]:
        option = "--" + field.name.replace("_", "-")
        default = f"default {field.default}"
        if field.name in TABLE_SIZES:
            default += f"; {TABLE_SIZES[field.name]} in the table"
        parser.add_argument(option, type=int, help=default)
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0; 0 1 2 in the table")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; no limit by default")
    parser.add_argument("--json", type=pathlib.Path, help="a file that the records of single runs are appended to")
    parser.add_argument("--table", action="store_true", help="all tasks, or those that the other options leave")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder of the table and its runs")
    return parser


if __name__ == "__main__":
    main()
