"""Any classifier by methods of curvature, and by Adam at several rates with cosine decay, for as many seconds each.

The runs go on where they were when they are started again with the same settings. The loss is that of the first
examples of the training set and of the test set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import curvax
from benchmarks import plots
from benchmarks.data import Dataset
from benchmarks.machine import load, machine, on_machine
from benchmarks.progress import table
from benchmarks.training import Batches, train

RUNS = Path(__file__).parent / "results" / "runs"
EVALUATED = 500


def parser(description: str | None, output: str, batch_size: int, seconds: float = 120.0) -> argparse.ArgumentParser:
    """The command line of a comparison."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=seconds, help="training time of each run (default %(default)g)")
    made.add_argument("--batch-size", type=int, default=batch_size, help="default %(default)s")
    made.add_argument("--rates", type=float, nargs="*", default=[1e-3, 3e-3, 1e-2], help="learning rates of Adam")
    made.add_argument("--damping", type=float, help="of K-FAC, at the start (default: the mean curvature)")
    made.add_argument("--output", type=Path, default=RUNS / output)
    return made


def layers_of(objective: curvax.Objective, params: Any, dataset: Dataset) -> curvax.Layers:
    """The layers of the model."""
    return curvax.find_layers(objective, params, _first(dataset.train_inputs, dataset.train_targets, 2))


def compare(
    objective: curvax.Objective,
    params: Any,
    dataset: Dataset,
    methods: Mapping[str, optax.GradientTransformation],
    arguments: argparse.Namespace,
) -> dict[str, list[dict[str, float]]]:
    """Runs the methods and Adam; prints a table, and leaves records and plots in the output folder.

    Each method runs a second time with an average of its iterates, which does for a method without a learning rate what
    the decay of the rate does for Adam: figures are those of the average where its training loss is lower. Losses are
    means over the targets: per character where targets are rows of characters.

    Returns:
        The records of every run, by its name. ``seen`` counts the targets trained on so far.
    """
    inputs, targets = _first(dataset.train_inputs, dataset.train_targets, None)
    seen, unseen = (
        _first(x, y, EVALUATED) for x, y in ((inputs, targets), (dataset.test_inputs, dataset.test_targets))
    )
    per_example = targets[0].size
    print(f"{dataset}\n{curvax.trees.size(params)} parameters. On {on_machine()}")

    @jax.jit
    def figures(params, inputs, targets):
        errors = jnp.argmax(objective.terms[0].model_fn(params, inputs), axis=-1) != targets
        return objective(params, (inputs, targets)) / per_example, jnp.mean(errors)

    def evaluate(params):
        (loss, _), (test_loss, test_error) = figures(params, *seen), figures(params, *unseen)
        return {"loss": float(loss), "test_loss": float(test_loss), "test_error": float(test_error)}

    decayed = {f"adam {rate:g}, cosine decay": optax.adam(rate) for rate in arguments.rates}
    averaged = {f"{name}, averaged": optax.chain(tx, curvax.average_iterates()) for name, tx in methods.items()}
    runs, rows = {}, []
    for name, tx in {**methods, **averaged, **decayed}.items():
        budget, before = f"{name}, batch {arguments.batch_size}, {arguments.seconds:g} s", load()
        runs[name] = train(
            name,
            tx,
            objective,
            params,
            Batches(inputs, targets, arguments.batch_size),
            seconds=arguments.seconds,
            evaluate=evaluate,
            evaluations=20,
            cosine_decay=name in decayed,
            averaged=name in averaged,
            checkpoints=(arguments.output / budget).absolute(),
        ).records
        for record in runs[name]:
            record["seen"] = record["step"] * arguments.batch_size * per_example
        rows.append({"optimizer": name, **runs[name][-1]})
        text = json.dumps({"machine": machine(), "load": before, "records": runs[name]})
        (arguments.output / f"{budget}.json").write_text(text + "\n")
    table(rows, ["optimizer", "step", "seen", "seconds", "loss", "test_loss", "test_error"], dataset.name)
    plots.plot_runs(runs, arguments.output / "loss.png", title=dataset.name, label="training loss", count="seen")
    return runs


def _first(inputs, targets, count):
    assert targets is not None
    return inputs[:count], targets[:count]
