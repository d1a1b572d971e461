"""K-FAC and Hessian-free against tuned Adam and NAG on deep autoencoders: ``python -m benchmarks.autoencoder_bench``.

Every setting of every optimiser's grid runs for the same number of seconds, and the one with the lowest training loss
at the end is the optimiser's; to choose by shorter runs would favour settings that are fast at first and stall. All
finished runs are files under ``benchmarks/results/autoencoders/``: a bench that was stopped goes on when it is started
again, and writes what there is to ``benchmarks/results/autoencoders.md``, with plots beside it, and the settings it
found to ``tuned.json``, where the demo reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots
from benchmarks.autoencoder import at_mark, describe, fit, make_problem
from benchmarks.machine import load, machine
from benchmarks.optimizers import OPTIMIZERS, settings_of
from benchmarks.progress import format_number, markdown
from benchmarks.training import loss_at

RESULTS = Path(__file__).parent / "results"
METHODS = ("kfac", "kfac_tridiagonal", "adam", "nag", "hessian_free")
VARIANTS = ("kfac_growing", "kfac_tridiagonal_growing", "ekfac", "kfac_without_momentum", "kfac_averaged")


class Case(NamedTuple):
    """A problem of the bench.

    Attributes:
        options: For ``make_problem``.
        marks: Seconds at which the report has the losses; the last is the time of each setting of the grids.
        note: What it is, in words.
        names: The optimisers that it compares.
    """

    options: dict[str, Any]
    marks: tuple[float, ...]
    note: str
    names: tuple[str, ...] = METHODS


CASES = {
    "demo": Case(
        {"name": "curves", "sizes": (784, 200, 100, 50, 25, 6), "num_train": 4000, "num_test": 1000},
        (1, 3, 8, 15, 25),
        "what `make demo` trains",
    ),
    "deep": Case(
        {"name": "curves", "num_train": 10_000, "num_test": 2000},
        (3, 8, 15, 25, 36, 50, 60),
        "the layers of Hinton and Salakhutdinov 2006, 10,000 images",
        METHODS + VARIANTS,
    ),
    "curves": Case(
        {"name": "curves", "sizes": (784, 1000, 500, 250, 30), "num_train": 10_000, "num_test": 2000},
        (8, 15, 25, 36, 50, 76, 100),
        "wide layers, 10,000 images",
        METHODS + VARIANTS,
    ),
    "mnist": Case(
        {"name": "mnist", "num_train": 10_000, "num_test": 2000},
        (4, 10, 20, 40),
        "full layer sizes, 10,000 images",
        METHODS + VARIANTS,
    ),
    "faces": Case(
        {"name": "faces", "num_train": 10_000, "num_test": 2000},
        (4, 10, 20, 40, 60),
        "full layer sizes",
        METHODS + VARIANTS,
    ),
}


def main(argv=None):
    """Runs what is not on file, until the time is over, and writes the report of the cases that have been begun."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=36.0, help="start no run after so many minutes (default 36)")
    parser.add_argument("--seconds-scale", type=float, default=1.0, help="multiplies the time of every run")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--optimizers", nargs="+", choices=METHODS + VARIANTS, default=METHODS + VARIANTS)
    parser.add_argument("--data-folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    deadline = time.perf_counter() + 60 * arguments.minutes
    sections, settings = [], arguments.output / "tuned.json"
    tuned = json.loads(settings.read_text()) if settings.exists() else {}
    for name in CASES:
        until = deadline if name in arguments.cases else float("-inf")
        bench = Bench(name, arguments.output, arguments.data_folder, arguments.seconds_scale, until)
        if not bench.run(arguments.optimizers) and name in arguments.cases:
            print(f"{name} has optimisers without a run: start again to go on")
        if len(bench.runs) > 1:
            tuned[name] = tuned.get(name, {}) | bench.best
            sections.append(bench.report())
    if not sections:
        raise SystemExit("no case has runs of two optimisers yet; start again to go on")
    settings.write_text(json.dumps(tuned, indent=1) + "\n")
    (arguments.output / "autoencoders.md").write_text(heading() + "\n".join(sections))
    print(f"The report is {arguments.output / 'autoencoders.md'}")


class Bench:
    """The runs of one case: those on file, and those still to do."""

    def __init__(self, name: str, output: Path, folder: str | None, scale: float, deadline: float):
        self.name, self.case, self._output, self._deadline = name, CASES[name], output, deadline
        self.marks = [scale * mark for mark in self.case.marks]
        self.problem = make_problem(**self.case.options, folder=folder)
        self.grids: dict[str, list[tuple[dict[str, Any], float]]] = {}
        self.best: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, list[dict[str, float]]] = {}
        self._machines: set[str] = set()
        self._loads: list[float] = []
        self._days: set[str] = set()

    def run(self, allowed: Sequence[str]) -> bool:
        """Runs the grids, the first settings of all optimisers first; whether each one allowed has a run on file."""
        grids = {name: [settings_of(name, **changes) for changes in OPTIMIZERS[name].grid] for name in self.case.names}
        tried: dict[str, list[Any]] = {name: [] for name in grids}
        for place in range(max(map(len, grids.values()))):
            for name, settings in grids.items():
                records = self._records(name, settings[place], name in allowed) if place < len(settings) else None
                if records is not None:
                    tried[name].append((settings[place], _last_loss(records), records))
        for name, runs in tried.items():
            if runs:
                self.grids[name] = [(settings, loss) for settings, loss, _ in runs]
                self.best[name], _, self.runs[name] = min(runs, key=lambda entry: entry[1])
        return all(tried[name] for name in grids if name in allowed)

    def report(self) -> str:
        """The case as a section of Markdown, and its plot."""
        problem, label = self.problem, "training loss, nats above the floor"
        faces = problem.dataset.name == "faces"
        label = "training loss, squared error / 2" if faces else label
        picture = f"autoencoder_{self.name}.png"
        plots.plot_runs(self.runs, self._output / picture, title=f"autoencoder: {self.name}", label=label)
        ends = ["test loss", "squared error"]
        head = ["optimiser", "settings", "steps", *map(at_mark, self.marks), *ends]
        rows = []
        for name, records in self.runs.items():
            last = records[-1]
            losses = [format_number(loss_at(records, mark)) for mark in self.marks]
            rows.append(
                [name, describe(self.best[name]), f"{last['step']}", *losses]
                + [format_number(last[end.replace(" ", "_")]) for end in ends]
            )
        layers = "-".join(map(str, problem.sizes))
        floor = "" if faces else f" The floor is the entropy of the images, {problem.floor:.3f} nats."
        lines = [
            f"## {self.name}: {self.case.note}",
            "",
            f"{problem.dataset} Encoder {layers} (decoder mirrored), tanh, linear code, sparse initialisation, float32."
            f" {label.capitalize()}.{floor}",
            "",
            *markdown(head, rows),
            "",
            self._verdict(),
            "",
            f"![loss against steps and seconds]({picture})",
            "",
            f"Grids, {self.marks[-1]:g} s for each setting, loss at the end:",
            "",
        ]
        for name, tried in self.grids.items():
            rest = len(OPTIMIZERS[name].grid) - len(tried)
            more = f"; {rest} more of its grid not run" if rest else ""
            lines += [f"- {name}: " + "; ".join(f"({describe(s)}) {loss:.3f}" for s, loss in tried) + more]
        lines += [f"- {name}: not run" for name in self.case.names if name not in self.grids]
        loads = f"load {min(self._loads):.1f} to {max(self._loads):.1f} when the runs began"
        lines += ["", f"On {'; '.join(sorted(self._machines))}; {loads}. Runs of {', '.join(sorted(self._days))}."]
        return "\n".join([*lines, ""])

    def _verdict(self):
        finals = sorted((_last_loss(records), name) for name, records in self.runs.items())
        (lowest, winner), (second, runner_up) = finals[:2]
        return f"Lowest at the end: {winner} ({lowest:.3f}), before {runner_up} ({second:.3f})."

    def _records(self, name, settings, start):
        key = {"case": self.name, "options": str(self.case.options), "optimizer": name, **settings, "marks": self.marks}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        file = self._output / "autoencoders" / f"{self.name}-{name}-{self.marks[-1]:g}s-{digest}.json"
        if not file.exists() and start and time.perf_counter() < self._deadline:
            # Checkpoints outlive an interruption, and are of no use once the run is on file.
            folder = Path(tempfile.gettempdir()) / "curvax_autoencoder_bench" / digest
            title, began = f"{self.name}: {name} ({describe(settings)})", load()
            seconds = self.marks[-1]
            run = fit(self.problem, name, settings, seconds=seconds, folder=folder, title=title, marks=self.marks)
            file.parent.mkdir(parents=True, exist_ok=True)
            began_on = {"day": time.strftime("%Y-%m-%d"), "machine": machine(), "load": began}
            text = json.dumps({"key": key, **began_on, "records": run.records}, default=float)
            file.write_text(text + "\n")
            shutil.rmtree(folder, ignore_errors=True)
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        self._machines.add(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
        self._loads.append(found["load"])
        self._days.add(found["day"])
        return found["records"]


def heading() -> str:
    """What holds for all cases."""
    return (
        "# Deep autoencoders: K-FAC and Hessian-free against Adam and NAG\n\n"
        "By `python -m benchmarks.autoencoder_bench`. Seconds are those of training alone: compilation and evaluation"
        " are not counted, and the loss at a time is the last one before it. Every setting of the grids that are"
        " printed had the same time; the table shows the one with the lowest training loss at the end."
        " A cosine decay takes the learning rate to 0 over the time of the run. NAG's momentum grows as in Sutskever et"
        " al. 2013 up to the value given. A batch size above the number of images takes them all. The machine was half"
        " as fast on some days as on others, so that only runs of one case are to be compared.\n\n"
    )


def _last_loss(records):
    loss = records[-1]["loss"]
    return loss if loss is not None and loss == loss else float("inf")


if __name__ == "__main__":
    main()
