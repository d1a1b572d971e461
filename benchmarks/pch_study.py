"""The study of the positive-curvature Hessian: three curvatures by two solvers, on a deep sigmoid network (CIFAR-10).

Run: ``python -m benchmarks.pch_study``; interrupted, it goes on by the same command. {Fisher, Gauss-Newton, PCH-1} by
{KFI, EA-CG}, momentum SGD and Adam train 3072-1024-512-256-128-64-32-16-10 with cross-entropy and with the bounded
criterion. Every setting of a method's grid is tried for ``--probe`` seconds from the same start; the one with the
lowest training loss is then run for ``--seconds``. Second-order methods are run by three rules: with the fixed rates
of the paper's grid, with the length of their steps taken from the exact Gauss-Newton matrix, and as ``curvax.ea_cg`` is
by default, which adapts alpha too. ``--errors`` alone makes the table of how far each curvature is from the absolute
value of the exact Hessian (Chen et al. 2018, tables 2 and 4).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks import data, plots
from benchmarks.machine import load, machine, on_machine
from benchmarks.progress import markdown, table
from benchmarks.training import Batches, train
from curvax.layers.recursions import propagate

SIZES = (3072, 1024, 512, 256, 128, 64, 32, 16, 10)
CRITERIA = {"cross-entropy": curvax.losses.softmax_cross_entropy(), "bounded": curvax.losses.bounded_softmax()}
CURVATURES = ("fisher", "gauss_newton", "pch1")
SOLVERS = ("kfi", "ea_cg")
PAPER = {"alpha": (0.01, 0.02, 0.05, 0.1), "learning_rate": (0.05, 0.1, 0.2)}
BEST_LENGTH = {"alpha": (1e-5, 1e-4, 1e-3, 1e-2)}
RULES = ["default", "best length", "paper"]
FIRST_ORDER = {"momentum sgd": (0.05, 0.1, 0.2, 0.5), "adam": (1e-4, 3e-4, 1e-3, 3e-3)}
PUBLISHED = {  # Chen et al. 2018, tables 2 and 4: Fisher, Gauss-Newton, PCH-1, PCH-2
    "cross-entropy": (0.1535, 0.0446, 0.0402, 0.0330),
    "bounded": (0.1198, None, 0.0349, 0.0853),
}
RESULTS = Path(__file__).parent / "results"


class Setting(NamedTuple):
    """A method with its settings.

    Attributes:
        method: "adam", "momentum sgd", or "<curvature> <solver>".
        rule: "paper" for fixed rates, "best length" for that of the exact matrix, "default" for an alpha that adapts
            too, "" for first-order methods.
        values: What is tried on the grid.
    """

    method: str
    rule: str
    values: tuple[tuple[str, float], ...]

    @property
    def family(self) -> str:
        """What competes for the longer run."""
        return f"{self.method}, {self.rule}" if self.rule else self.method

    @property
    def label(self) -> str:
        """All of it in words."""
        return ": ".join([self.family, *([", ".join(f"{n} {v:g}" for n, v in self.values)] if self.values else [])])

    def transformation(self, layers: curvax.Layers, criterion: str) -> optax.GradientTransformation:
        """The optimiser."""
        values = dict(self.values)
        if self.method == "adam":
            return optax.adam(values["learning_rate"])
        if self.method == "momentum sgd":
            return optax.sgd(values["learning_rate"], momentum=0.9)
        curvature, solver = self.method.split()
        # A criterion that is no negative log-density has no distribution to draw from.
        drawn = criterion == "cross-entropy" or curvature != "fisher"
        return curvax.ea_cg(layers, curvature=curvature if drawn else "empirical_fisher", solver=solver, **values)  # pyright: ignore


def settings(criterion: str, rules: list[str]) -> list[Setting]:
    """The grid: the paper leaves the Gauss-Newton matrix out where the criterion is not convex."""
    found = [Setting(m, "", (("learning_rate", r),)) for m, rates in FIRST_ORDER.items() for r in rates]
    grids: dict[str, dict[str, tuple[float, ...]]] = {"paper": PAPER, "best length": BEST_LENGTH, "default": {}}
    for rule, curvature, solver in itertools.product(rules, CURVATURES, SOLVERS):
        if criterion == "cross-entropy" or curvature != "gauss_newton":
            grid = grids[rule]
            chosen = itertools.product(*([(name, value) for value in values] for name, values in grid.items()))
            found += [Setting(f"{curvature} {solver}", rule, values) for values in chosen]
    return found


def network(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Sigmoid layers, and a linear one."""
    for layer in params[:-1]:
        x = jax.nn.sigmoid(x @ layer["weights"] + layer["bias"])
    return x @ params[-1]["weights"] + params[-1]["bias"]


def initial(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> list[dict[str, jax.Array]]:
    """Weights after Glorot and Bengio, biases of zero."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    make = jax.nn.initializers.glorot_uniform()
    return [
        {"weights": make(key, shape, jnp.float32), "bias": jnp.zeros(shape[1], jnp.float32)}
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


class Problem(NamedTuple):
    """One criterion on the images."""

    criterion: str
    dataset: data.Dataset
    objective: curvax.Objective
    params: Any
    layers: curvax.Layers
    batch_size: int

    def evaluate(self):
        """params -> figures, on the first 2,500 training examples and on the test set."""
        d: Any = self.dataset
        pairs = (d.train_inputs, d.train_targets), (d.test_inputs, d.test_targets)
        sets = [(jnp.asarray(x[:2500]), jnp.asarray(y[:2500])) for x, y in pairs]

        @jax.jit
        def figures(params):
            (loss, right), (test_loss, test_right) = (
                (self.objective(params, pair), jnp.mean(jnp.argmax(network(params, pair[0]), -1) == pair[1]))
                for pair in sets
            )
            return {"loss": loss, "accuracy": right, "test_loss": test_loss, "test_accuracy": test_right}

        return lambda params: {name: float(value) for name, value in figures(params).items()}


def problem(criterion: str, batch_size: int) -> Problem:
    """The images and the network at its start."""
    dataset = data.load("cifar10")
    assert dataset.train_targets is not None
    objective = curvax.Objective(network, CRITERIA[criterion])
    params = initial()
    example = (dataset.train_inputs[:2], dataset.train_targets[:2])
    return Problem(criterion, dataset, objective, params, curvax.find_layers(objective, params, example), batch_size)


def file_of(case: Problem, setting: Setting, seconds: float, folder: Path) -> Path:
    """Where the records of a run are kept."""
    label = setting.label.replace(":", "")
    return folder / f"{case.criterion}, batch {case.batch_size}, {label}, {seconds:g} s.json"


def run(case: Problem, setting: Setting, seconds: float, folder: Path) -> list[dict[str, float]]:
    """The records of a run; those of an earlier one where there are some."""
    path = file_of(case, setting, seconds, folder)
    if not path.exists():
        batches, before = _batches(case), load()
        records = train(
            f"{case.criterion}, {setting.label}",
            setting.transformation(case.layers, case.criterion),
            case.objective,
            case.params,
            batches,
            seconds=seconds,
            evaluate=case.evaluate(),
            evaluations=12,
        ).records
        for record in records:
            record["epoch"] = record["step"] * case.batch_size / len(case.dataset.train_inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"machine": machine(), "load": before, "records": records}) + "\n")
        part.replace(path)
    return json.loads(path.read_text())["records"]


def _batches(case):
    return Batches(case.dataset.train_inputs, case.dataset.train_targets, case.batch_size)


def study(case: Problem, arguments: argparse.Namespace, over: float) -> list[str]:
    """Tries the grid, runs the best of each family for longer; the report of what is there when time is up."""
    grid = settings(case.criterion, arguments.rules)
    if arguments.methods:
        grid = [setting for setting in grid if setting.method in arguments.methods]
    tried: dict[str, list[tuple[float, Setting]]] = {}
    for setting in grid:
        if file_of(case, setting, arguments.probe, arguments.records).exists() or time.perf_counter() < over:
            loss = run(case, setting, arguments.probe, arguments.records)[-1]["loss"]
            loss = loss if np.isfinite(loss) else np.inf
            tried.setdefault(setting.family, []).append((loss, setting))
    long: dict[str, list[dict[str, float]]] = {}
    for attempts in tried.values():
        best = min(attempts, key=lambda attempt: attempt[0])[1]
        if file_of(case, best, arguments.seconds, arguments.records).exists() or time.perf_counter() < over:
            long[best.label] = run(case, best, arguments.seconds, arguments.records)
    return report(case, arguments, grid, tried, long)


def report(case, arguments, grid, tried, long) -> list[str]:
    """Tables and plots."""
    name = case.criterion.replace("-", "_")
    lines = [
        f"## {case.criterion}, batches of {case.batch_size}",
        "",
        f"{case.dataset} Start: loss {next(iter(long.values()))[0]['loss']:.4f}." if long else f"{case.dataset}",
        f"{sum(map(len, tried.values()))} of {len(grid)} settings of the grid were tried, {arguments.probe:g} s each.",
        "",
    ]
    cells = []
    for family, attempts in tried.items():
        losses = [loss for loss, _ in attempts]
        best = min(attempts, key=lambda attempt: attempt[0])
        values = best[1].label.partition(": ")[2]
        cells.append([family, f"{len(attempts)}", values, f"{best[0]:.4f}", f"{max(losses):.4f}"])
    lines += markdown(["family", "tried", "best", "loss", "worst loss"], cells)
    if long:
        lines += ["", f"The best of each family for {arguments.seconds:g} s:", ""]
        rows = sorted(long.items(), key=lambda item: item[1][-1]["loss"])
        formats = {"step": "d", "epoch": ".0f", "loss": ".4f", "test_loss": ".4f", "test_accuracy": ".3f"}
        ends = ([label, *(format(records[-1][key], form) for key, form in formats.items())] for label, records in rows)
        lines += markdown(["run", "steps", "epochs", "loss", "test loss", "test accuracy"], ends)
        table([{"run": k, **v[-1]} for k, v in rows], ["run", "step", "epoch", "loss", "test_accuracy"], case.criterion)
        plots.plot_runs(
            long, RESULTS / f"pch_study_{name}.png", title=case.criterion, label="training loss", count="epoch"
        )
        picture = RESULTS / f"pch_study_{name}_accuracy.png"
        plots.plot_accuracy(long, picture, title=case.criterion, label="test accuracy", count="epoch")
        lines += ["", f"![loss](pch_study_{name}.png)", f"![accuracy](pch_study_{name}_accuracy.png)"]
    return [*lines, ""]


def errors(case: Problem, along: str, steps: int, every: int, examples: int) -> list[str]:
    """|| H_t - |E[H_t]| ||_F for each layer and curvature, a mean over iterates of a run (Chen et al., table 2)."""
    kinds: tuple[Any, ...] = ("fisher", "gauss_newton", "pch1", "pch2")
    kinds = tuple(k for k in kinds if case.criterion == "cross-entropy" or k != "gauss_newton")
    tx: Any = {"ea_cg": curvax.ea_cg(case.layers), "adam": optax.adam(1e-3), "momentum sgd": optax.sgd(0.1, 0.9)}[along]
    tx = optax.with_extra_args_support(tx)
    batches = _batches(case)
    criterion_kind: dict[str, Any] = {"fisher": "fisher" if case.criterion == "cross-entropy" else "empirical_fisher"}

    @jax.jit
    def step(params, state, batch):
        _, gradient, at = case.objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def approximate(params, batch, key):
        tapped = curvax.tap(case.layers, case.objective.linearize(params, batch))
        return {k: propagate(tapped, criterion_kind.get(k, k), key).outputs for k in kinds}  # pyright: ignore

    @jax.jit
    def exact(params, batch):
        tapped = curvax.tap(case.layers, case.objective.linearize(params, batch))
        return [jnp.mean(h, axis=0) for h in curvax.layers.block_hessian(tapped).curvatures]  # pyright: ignore

    params, state, found = case.params, tx.init(case.params), []
    part = 20  # examples at once: each has a Hessian for every layer
    for count in range(steps + 1):
        if count % every == 0:
            batch = tuple(x[:examples] for x in batches.at(count))
            parts = [exact(params, tuple(x[i : i + part] for x in batch)) for i in range(0, examples, part)]
            lengths = [len(batch[0][i : i + part]) for i in range(0, examples, part)]
            means = [np.average(np.stack(layer), axis=0, weights=lengths) for layer in zip(*parts, strict=True)]
            absolute = [_absolute(mean) for mean in means]
            ours = approximate(params, batch, jax.random.key(count))
            found.append(
                [[float(np.linalg.norm(h - a)) for h, a in zip(ours[k], absolute, strict=True)] for k in kinds]
            )
        params, state = step(params, state, batches.at(count))
    means = np.mean(found, axis=0)
    names = ("fisher", "gauss_newton", "pch1", "pch2")
    published: dict[str, Any] = dict(zip(names, PUBLISHED[case.criterion], strict=True))
    lines = [
        f"## Errors of the curvature of biases, {case.criterion}",
        "",
        f"|| H_t - abs(E[H_t]) ||_F over {examples} examples, the mean over {len(found)} iterates of {steps} steps of"
        f" {along} (the paper: over those of its own runs).",
        "",
    ]
    total = np.sqrt(np.sum(means**2, axis=1))
    figures = [*zip(range(1, means.shape[1] + 1), means.T, strict=True), ("total", total)]
    figures.append(("total, paper", [published[k] for k in kinds]))
    lines += markdown(["layer", *kinds], ([f"{name}", *(f"{value:.4f}" for value in row)] for name, row in figures))
    order = " < ".join(kinds[i] for i in np.argsort(total))
    text = f"Order here: {order}; the paper's: " + " < ".join(sorted(kinds, key=lambda k: published[k])) + "."
    print("\n".join([*lines, "", text]))
    return [*lines, "", text, ""]


def _absolute(matrix):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * np.abs(values)) @ vectors.T


def main(argv=None):
    """Writes ``benchmarks/results/pch_study.md`` and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="+", choices=list(CRITERIA), default=list(CRITERIA))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--methods", nargs="+", help="some of them alone, such as 'pch1 ea_cg' adam")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--probe", type=float, default=15.0, help="seconds for each setting (default %(default)g)")
    parser.add_argument("--seconds", type=float, default=75.0, help="of the best of each method (default %(default)g)")
    parser.add_argument("--minutes", type=float, default=60.0, help="what is begun after that waits for the next call")
    parser.add_argument("--errors", action="store_true", help="make the table of errors alone")
    parser.add_argument("--error-steps", type=int, default=200)
    choices = ["ea_cg", "adam", "momentum sgd"]
    parser.add_argument("--error-along", nargs="+", choices=choices, default=choices[:2], help="whose iterates")
    parser.add_argument("--examples", type=int, default=100, help="of the exact Hessians in the table of errors")
    parser.add_argument("--records", type=Path, default=RESULTS / "pch_study")
    arguments = parser.parse_args(argv)
    over = time.perf_counter() + 60 * arguments.minutes
    for criterion in arguments.criteria:
        case, name = problem(criterion, arguments.batch_size), criterion.replace("-", "_")
        print(f"{case.dataset}\n{curvax.trees.size(case.params)} parameters. On {on_machine()}")
        if not arguments.errors:
            _write(f"{name}_runs", study(case, arguments, over))
        if arguments.errors or time.perf_counter() < over:
            steps, by = arguments.error_steps, arguments.error_along
            found = [errors(case, along, steps, max(1, steps // 5), arguments.examples) for along in by]
            _write(f"{name}_errors", [line for lines in found for line in lines])
    parts = [f"{c.replace('-', '_')}_{part}.md" for c in CRITERIA for part in ("runs", "errors")]
    head = [
        "# The positive-curvature Hessian",
        "",
        "By `python -m benchmarks.pch_study`. Network " + "-".join(map(str, SIZES)) + ", sigmoid, Glorot's start,"
        f" float32. On {on_machine()}.",
        "Grid of the paper: alpha "
        + ", ".join(f"{a:g}" for a in PAPER["alpha"])
        + "; learning rate "
        + ", ".join(f"{r:g}" for r in PAPER["learning_rate"])
        + "; at most 20 iterations, residual 1e-2. With the best"
        " length: alpha "
        + ", ".join(f"{a:g}" for a in BEST_LENGTH["alpha"])
        + ". Momentum SGD: "
        + ", ".join(f"{r:g}" for r in FIRST_ORDER["momentum sgd"])
        + "; Adam: "
        + ", ".join(f"{r:g}" for r in FIRST_ORDER["adam"])
        + ".",
        "",
    ]
    folder = RESULTS / "pch_study"
    body = [(folder / part).read_text() for part in parts if (folder / part).exists()]
    (RESULTS / "pch_study.md").write_text("\n".join([*head, *body]).rstrip() + "\n")


def _write(part, lines):
    folder = RESULTS / "pch_study"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
