"""The papers' tables of image networks: CurveBall and L-SR1 next to their rivals, at a size that two cores can do.

Run: ``python -m benchmarks.image_tables`` (hours on two cores, or ``--minutes``). Every finished run is a
file, so the command goes on where it was stopped; ``--experiment NAME`` does one table, ``--list`` names them. A single
run of your own::

    python -m benchmarks.image_tables --network lenet --method lsr1 --set memory=10 --batch-size 500 --seconds 60

All runs of one experiment have the same time, or the same epochs; compiling and testing are not counted.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.image_training import METHODS, TASKS, Run, train
from benchmarks.machine import load, machine
from benchmarks.plots import COLOURS, plot_runs
from benchmarks.progress import markdown, table

RESULTS = pathlib.Path(__file__).parent / "results"


class Experiment(NamedTuple):
    """One table.

    Attributes:
        title: Above it.
        paper: What the paper has in its place.
        runs: Its rows.
        target: A test error in per cent; the epochs and seconds to it are shown.
        across: Whether the rows are the methods over all networks, median and quartiles, in place of the runs.
    """

    title: str
    paper: str
    runs: list[Run]
    target: float
    across: bool = False


# The rates of first-order methods that L-SR1's paper has for these networks.
NAG_RATE = {"lenet": 0.003, "cifar_net": 0.01}
SMALL_BATCH = {"lenet": 20, "cifar_net": 96}
TABLE_1 = {
    ("lenet", 500): "NAG 35, L-SR1 5, Adam 4 epochs to 1.1 %",
    ("lenet", 1000): "NAG 37, L-SR1 6, Adam 3 epochs to 1.2 %",
    ("lenet", 10000): "NAG 194, L-SR1 8, Adam 10 epochs to 1.5 %",
    ("cifar_net", 500): "NAG 9, L-SR1 16, Adam 6 epochs to 30 %",
    ("cifar_net", 1000): "NAG 17, L-SR1 14, Adam 6 epochs to 31 %",
    ("cifar_net", 10000): "NAG 125, L-SR1 41, Adam 15 epochs to 34 %",
}
CURVEBALL_TABLE_2 = {
    "basic_cnn": "best training/test error of 20 epochs, %: CurveBall 14.1/19.9, lambda fixed 15.3/19.3, SGD 18.9/21.1,"
    " Adam 15.7/19.7",
    "basic_cnn_bn": "best training/test error of 20 epochs, %: CurveBall 7.6/16.3, lambda fixed 9.4/15.8, SGD"
    " 10.0/16.1, Adam 9.6/16.1",
}
RANDOM_NETWORKS = 6
LEAST_EPOCHS = 2.9
"""A table with a run of fewer epochs says nothing: every method has only begun. Its runs stay on file."""


def experiments() -> dict[str, Experiment]:
    """All tables by name, in the order in which they are run."""
    result = {}
    for network, target in {"lenet": 3.0, "cifar_net": 50.0}.items():
        for batch_size, seconds in ((500, 60.0), (1000, 60.0), (10000, 90.0)):
            rivals = [("lsr1", {}), ("lbfgs", {}), ("nag", {"rate": NAG_RATE[network]}), ("adam", {})]
            result[f"{network}_{batch_size}"] = Experiment(
                f"L-SR1, table 1: {network} with batch normalisation, batches of {batch_size}",
                TABLE_1[network, batch_size] + " (60,000 or 50,000 training images)",
                [Run(network, name, settings, batch_size, seconds) for name, settings in rivals],
                target,
            )
    for network, batch_norm in itertools.product(("lenet", "cifar_net"), ("", "_plain")):
        rate = {"rate": NAG_RATE[network]}
        rivals = [("lsr1", {}, 400), ("lsr1_linesearch", {}, 400), ("lbfgs", {}, 400)]
        rivals += [("nag", rate, SMALL_BATCH[network]), ("sgd", rate, SMALL_BATCH[network])]
        result[f"{network}{batch_norm}_small"] = Experiment(
            f"L-SR1, figures 1 and 2: {network} {'without' if batch_norm else 'with'} batch normalisation, batches of"
            f" {SMALL_BATCH[network]} (first order) and 400 (second order)",
            "L-SR1 as good as the methods of first order or slightly better, much better than L-BFGS",
            [Run(network + batch_norm, name, settings, size, 25.0) for name, settings, size in rivals],
            3.0 if network == "lenet" else 50.0,
        )
    for network, damping in (("basic_cnn", 10.0), ("basic_cnn_bn", 1.0)):
        rivals = [("curveball", {"damping": damping}), ("curveball, lambda fixed", {"damping": damping})]
        rivals += [("sgd", {"rate": rate}) for rate in (0.01, 0.1)] + [("adam", {})]
        result[network] = Experiment(
            f"CurveBall, figure 2 and table 2: {network}, batches of 128",
            CURVEBALL_TABLE_2[network],
            [Run(network, name, settings, 128, 45.0) for name, settings in rivals],
            50.0,
        )
    rivals = [("curveball", {"damping": 1.0}), ("curveball", {"damping": 10.0})]
    rivals += [("sgd", {"rate": rate}) for rate in (0.01, 0.1)] + [("adam", {})]
    result["mlp"] = Experiment(
        "CurveBall, figure 2, bottom right: a tanh network 784-128-64-32-10 on MNIST, batches of 64",
        "CurveBall comparable to first-order solvers, K-FAC (not among the rivals here) behind until it has stabilised",
        [Run("mlp", name, settings, 64, 15.0) for name, settings in rivals],
        5.0,
    )
    result["resnet20"] = Experiment(
        "L-SR1, figure 5: ResNet-20, batches of 128",
        "L-SR1 ahead of SGD and Adam in early epochs, not in seconds",
        [Run("resnet20", name, s, 128, 80.0) for name, s in (("lsr1", {}), ("sgd", {"rate": 0.1}), ("adam", {}))],
        50.0,
    )
    sweep: list[dict[str, float]] = [{"memory": size} for size in (2, 10)]
    sweep += [{"decrease": d, "increase": i} for d, i in itertools.product((0.2, 0.5, 0.8), (1.2, 2.0))]
    result["sensitivity"] = Experiment(
        "L-SR1, figure 6: cifar_net, batches of 500, two epochs, memory and radius (the default is 5; 0.5, 2)",
        "insensitive to both",
        [Run("cifar_net", "lsr1", settings, 500, 300.0, 2.0) for settings in sweep],
        50.0,
    )
    result["random_architectures"] = Experiment(
        f"CurveBall, figure 3: {RANDOM_NETWORKS} random convolutional networks, batches of 256, three epochs",
        "50 networks: CurveBall's training error falls fastest, in median and in spread",
        [
            Run(f"random_{seed}", name, settings, 256, 300.0, 3.0)
            # By networks first: a table that was stopped is one of fewer networks.
            for seed in range(RANDOM_NETWORKS)
            for name, settings in (("curveball", {}), ("sgd", {"rate": 0.01}), ("sgd", {"rate": 0.1}), ("adam", {}))
        ],
        50.0,
        across=True,
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not on file yet and writes ``image_networks.md`` and its plots, or does a single run."""
    every = experiments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", choices=every, metavar="NAME", help="these tables only")
    parser.add_argument("--list", action="store_true", help="name the tables")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    parser.add_argument("--seconds", type=float, help="the time of every run (default: as the table has it)")
    parser.add_argument("--network", choices=TASKS, metavar="NETWORK", help="a single run of this network")
    parser.add_argument("--method", choices=METHODS, default="lsr1", help="of the single run")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="settings of its method")
    parser.add_argument("--batch-size", type=int, default=500, help="of the single run")
    parser.add_argument("--data-folder")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.list:
        table([{"name": name, "table": experiment.title} for name, experiment in every.items()], ["name", "table"])
        return
    if arguments.network:
        settings = {name: float(value) for name, value in (text.split("=") for text in arguments.set)}
        settings = {name: int(value) if value.is_integer() else value for name, value in settings.items()}
        run = Run(arguments.network, arguments.method, settings, arguments.batch_size, arguments.seconds or 60.0)
        source, records = train(run, arguments.data_folder)
        row = row_of(run.label, records, 50.0)
        table([row], list(row), f"{run.network}, batch {run.batch_size}; {source}")
        return
    deadline = time.perf_counter() + 60 * arguments.minutes
    sections, short = [], []
    for name, experiment in every.items():
        if arguments.seconds is not None:
            runs = [run._replace(seconds=arguments.seconds) for run in experiment.runs]
            experiment = experiment._replace(runs=runs)
        wanted = not arguments.experiment or name in arguments.experiment
        results = [
            _on_file_or_run(run, arguments.output, arguments.data_folder, deadline if wanted else -math.inf)
            for run in experiment.runs
        ]
        finished = [(run, result) for run, result in zip(experiment.runs, results, strict=True) if result is not None]
        if experiment.across:
            finished = _whole_networks(experiment, finished)
        if not finished:
            continue
        label, epochs = min(((run.label, r["records"][-1]["epoch"]) for run, r in finished), key=lambda pair: pair[1])
        if epochs < LEAST_EPOCHS:
            short.append(f"- {experiment.title}: {label} had {epochs:.1f} epochs")
        else:
            sections.append(_section(name, experiment, finished, arguments.output))
    _write(sections, short, arguments.output)


def row_of(label: str, records: Sequence[Mapping[str, float]], target: float) -> dict[str, str]:
    """What a table says of a run."""
    last = records[-1]
    reached = [record for record in records if record["test_error"] <= target]
    # The last batch of an epoch is dropped where it is not whole.
    first_epoch = [record for record in records if record["epoch"] > 0.9]
    return {
        "method": label,
        "steps": f"{last['step']}",
        "epochs": f"{last['epoch']:.1f}",
        "seconds": f"{last['seconds']:.0f}",
        "training loss at the end": f"{last['loss']:.4f}",
        "lowest test error, %": f"{min(record['test_error'] for record in records):.2f}",
        "test error after an epoch, %": f"{first_epoch[0]['test_error']:.2f}" if first_epoch else "-",
        f"epochs to {target:g} %": f"{reached[0]['epoch']:.1f}" if reached else "-",
        f"seconds to {target:g} %": f"{reached[0]['seconds']:.0f}" if reached else "-",
        "skipped pairs": f"{last['skipped_fraction']:.1%}" if "skipped_fraction" in last else "",
    }


def rows_across(finished: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """For each method over its networks the quartiles of the loss at the end."""
    rows = []
    for label, results in _by_method(finished).items():
        ends = [records[-1] for records in results]
        errors = [min(record["test_error"] for record in records) for records in results]
        quartiles = np.nanpercentile([end["loss"] for end in ends], (25, 50, 75))
        rows.append(
            {
                "method": label,
                "networks": f"{len(ends)}",
                "training loss at the end, median": f"{quartiles[1]:.4f}",
                "25 %": f"{quartiles[0]:.4f}",
                "75 %": f"{quartiles[2]:.4f}",
                "lowest test error, %, median": f"{np.median(errors):.1f}",
                "seconds, median": f"{np.median([end['seconds'] for end in ends]):.0f}",
            }
        )
    return rows


def file_of(run: Run, output: pathlib.Path) -> pathlib.Path:
    """Where the result of a run lies."""
    settings = "".join(f"_{key}{value:g}" for key, value in run.settings.items())
    method = run.method.replace(",", "").replace(" ", "_")
    return output / "image_networks" / f"{run.network}_{run.batch_size}_{method}{settings}.json"


def _on_file_or_run(run: Run, output: pathlib.Path, folder: str | None, deadline: float) -> dict[str, Any] | None:
    """The result on file where it is of this very run, else a new one unless the deadline has passed."""
    file = file_of(run, output)
    if file.exists():
        result = json.loads(file.read_text())
        if result["run"] == run._asdict():
            return result
    if time.perf_counter() >= deadline:
        return None
    began = load()
    source, records = train(run, folder)
    result = {"run": run._asdict(), "data": source, "machine": machine(), "load": began, "records": records}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result) + "\n")
    return result


def _section(
    name: str, experiment: Experiment, finished: Sequence[tuple[Run, Mapping[str, Any]]], output: pathlib.Path
) -> str:
    """Heading, table and plot of one experiment."""
    missing = len(experiment.runs) - len(finished)
    if experiment.across:
        rows = rows_across(finished)
    else:
        rows = [row_of(run.label, result["records"], experiment.target) for run, result in finished]
        if not any(row["skipped pairs"] for row in rows):
            rows = [{key: value for key, value in row.items() if key != "skipped pairs"} for row in rows]
    columns = list(rows[0])
    table(rows, columns, experiment.title)
    picture = f"image_networks_{name}.png"
    if experiment.across:
        _plot_across(finished, output / picture, experiment.title)
    else:
        runs = {run.label: result["records"] for run, result in finished}
        plot_runs(runs, output / picture, title=experiment.title, label="training loss")
    sources = dict.fromkeys(result["data"] for _, result in finished)
    lines = [f"## {experiment.title}", "", f"{' '.join(sources)} l2 {TASKS[finished[0][0].network].l2:g}."]
    lines += [f"Runs missing: {missing}."] if missing else []
    lines += [f"The paper: {experiment.paper}.", ""]
    lines += markdown(columns, (row.values() for row in rows))
    return "\n".join(
        [*lines, "", _conditions([result for _, result in finished]), "", f"![training loss]({picture})", ""]
    )


def _conditions(results: Sequence[Mapping[str, Any]]) -> str:
    """Where the runs were made: without it, their seconds say nothing to others."""
    known = [result for result in results if "machine" in result]
    unknown = len(results) - len(known)
    words = [f"Of {unknown} runs machine and load were not recorded."] if unknown else []
    if known:
        machines = dict.fromkeys(", ".join(f"{k} {v}" for k, v in result["machine"].items()) for result in known)
        loads = [result["load"] for result in known]
        words.insert(0, f"On {'; '.join(machines)}; load {min(loads):.1f} to {max(loads):.1f} when the runs began.")
    return " ".join(words)


def _write(sections: Sequence[str], short: Sequence[str], output: pathlib.Path) -> None:
    head = [
        "# Image networks",
        "",
        "By `python -m benchmarks.image_tables`, float32, one seed. Test errors are over 2,000 test images at most;"
        " batch normalisation takes the statistics of its batch there too. The training loss is the mean since the"
        " record before, with the penalty. Rates of methods of first order are the papers' where they state them; where"
        " several were tried each has its row.",
        "",
    ]
    tail = []
    if short:
        tail = [
            "## Too short to say anything",
            "",
            f"Some run had less than {LEAST_EPOCHS:g} epochs here.",
            "",
            *short,
            "",
        ]
    (output / "image_networks.md").write_text("\n".join([*head, *sections, *tail]))


def _plot_across(finished: Sequence[tuple[Run, Mapping[str, Any]]], path: pathlib.Path, title: str) -> None:
    """Median and quartiles of the training loss over the networks."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for colour, (label, results) in zip(COLOURS, _by_method(finished).items(), strict=False):
        length = min(len(records) for records in results)
        epochs = [record["epoch"] for record in results[0][:length]]
        low, middle, high = np.nanpercentile([[r["loss"] for r in rs[:length]] for rs in results], (25, 50, 75), axis=0)
        axes.plot(epochs, middle, color=colour, label=label)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="epochs", ylabel="training loss, median and quartiles", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def _whole_networks(experiment, finished):
    """The runs of the networks that every method has finished."""
    counts = collections.Counter(run.network for run, _ in finished)
    methods = len({run.label for run in experiment.runs})
    return [(run, result) for run, result in finished if counts[run.network] == methods]


def _by_method(finished: Sequence[tuple[Run, Mapping[str, Any]]]) -> dict[str, list[list[dict[str, float]]]]:
    result: dict[str, list[list[dict[str, float]]]] = {}
    for run, outcome in finished:
        result.setdefault(run.label, []).append(outcome["records"])
    return result


if __name__ == "__main__":
    main()
