"""Hessian-free against tuned Adam and NAG on deep autoencoders: ``python -m benchmarks.autoencoder_bench``.

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
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import plots
from benchmarks.autoencoder import describe, fit, make_problem
from benchmarks.optimizers import OPTIMIZERS, settings_of

RESULTS = Path(__file__).parent / "results"
NAMES = ("hessian_free", "adam", "nag")
TIMES = (0.1, 0.25, 0.5, 0.75, 1.0)

ELSEWHERE = (
    "Figures from elsewhere for *curves*, measured on another machine and on images of another generator: Adam with a"
    " tuned rate 30.7 nats above the floor at 76 s and 9.3 at 199 s; the best K-FAC of other libraries 1.94 at 76 s and"
    " 0.86 at 193 s."
)


class Case(NamedTuple):
    """A problem of the bench.

    Attributes:
        options: For ``make_problem``.
        seconds: Seconds for each setting of the grids.
        note: What it is, in words.
    """

    options: dict[str, Any]
    seconds: float
    note: str


CASES = {
    "demo": Case(
        {"name": "curves", "sizes": (784, 200, 100, 50, 25, 6), "num_train": 4000, "num_test": 1000},
        30.0,
        "what `make demo` trains",
    ),
    "curves": Case(
        {"name": "curves", "sizes": (784, 1000, 500, 250, 30), "num_train": 10_000, "num_test": 2000},
        100.0,
        "full layer sizes, 10,000 images",
    ),
    "mnist": Case({"name": "mnist", "num_train": 10_000, "num_test": 2000}, 40.0, "full layer sizes, 10,000 images"),
    "faces": Case({"name": "faces", "num_train": 10_000, "num_test": 2000}, 30.0, "full layer sizes"),
}


def main(argv=None):
    """Runs what is not on file, until the time is over, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=36.0, help="start no run after so many minutes (default 36)")
    parser.add_argument("--seconds-scale", type=float, default=1.0, help="multiplies the time of every run")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--data-folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    deadline = time.perf_counter() + 60 * arguments.minutes
    sections, tuned = [], {}
    for name in arguments.cases:
        bench = Bench(name, arguments.output, arguments.data_folder, arguments.seconds_scale, deadline)
        if bench.run():
            sections.append(bench.report())
            tuned[name] = bench.best
    if not sections:
        raise SystemExit("no case was finished in the time given; start again to go on")
    (arguments.output / "tuned.json").write_text(json.dumps(tuned, indent=1) + "\n")
    (arguments.output / "autoencoders.md").write_text(heading() + "\n".join(sections))
    print(f"The report is {arguments.output / 'autoencoders.md'}")


class Bench:
    """The runs of one case: those on file, and those still to do."""

    def __init__(self, name: str, output: Path, folder: str | None, scale: float, deadline: float):
        self.name, self.case, self._output, self._scale, self._deadline = name, CASES[name], output, scale, deadline
        self.problem = make_problem(**self.case.options, folder=folder)
        self.grids: dict[str, list[tuple[dict[str, Any], float]]] = {}
        self.best: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, list[dict[str, float]]] = {}

    def run(self) -> bool:
        """Runs all grids; False if the time was over first."""
        for name in NAMES:
            tried = []
            for changes in OPTIMIZERS[name].grid:
                settings = settings_of(name, **changes)
                records = self._records(name, settings, self.case.seconds * self._scale)
                if records is None:
                    return False
                tried.append((settings, _last_loss(records), records))
            self.grids[name] = [(settings, loss) for settings, loss, _ in tried]
            self.best[name], _, self.runs[name] = min(tried, key=lambda entry: entry[1])
        return True

    def report(self) -> str:
        """The case as a section of Markdown, and its plot."""
        problem, label = self.problem, "training loss, nats above the floor"
        faces = problem.dataset.name == "faces"
        label = "training loss, squared error / 2" if faces else label
        picture = f"autoencoder_{self.name}.png"
        plots.plot_runs(self.runs, self._output / picture, title=f"autoencoder: {self.name}", label=label)
        times = [share * self.case.seconds * self._scale for share in TIMES]
        head = ["optimiser", "settings", "steps", *(f"loss at {t:.0f} s" for t in times), "test loss", "squared error"]
        rows = []
        for name, records in self.runs.items():
            last = records[-1]
            losses = [f"{_loss_at(records, t):.3f}" for t in times[:-1]]
            losses.append(f"{last['loss']:.3f}")  # the last step of a run may end late
            figures = [f"{last['test_loss']:.3f}", f"{last['squared_error']:.3f}"]
            rows.append([name, describe(self.best[name]), f"{last['step']}", *losses, *figures])
        layers = "-".join(map(str, problem.sizes))
        floor = "" if faces else f" The floor is the entropy of the images, {problem.floor:.3f} nats."
        lines = [
            f"## {self.name}: {self.case.note}",
            "",
            f"{problem.dataset} Encoder {layers} (decoder mirrored), tanh, linear code, sparse initialisation, float32."
            f" {label.capitalize()}.{floor}",
            "",
            *_markdown(head, rows),
            "",
            self._verdict(),
            "",
            f"![loss against steps and seconds]({picture})",
            "",
            f"Grids, {self.case.seconds * self._scale:.0f} s for each setting, loss at the end:",
            "",
        ]
        for name, tried in self.grids.items():
            lines += [f"- {name}: " + "; ".join(f"({describe(s)}) {loss:.3f}" for s, loss in tried)]
        if self.name == "curves":
            lines += ["", ELSEWHERE]
        return "\n".join([*lines, ""])

    def _verdict(self):
        finals = sorted((_last_loss(records), name) for name, records in self.runs.items())
        (lowest, winner), (second, runner_up) = finals[:2]
        return f"Lowest at the end: {winner} ({lowest:.3f}), before {runner_up} ({second:.3f})."

    def _records(self, name, settings, seconds):
        key = {"case": self.name, "options": str(self.case.options), "optimizer": name, **settings, "seconds": seconds}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        file = self._output / "autoencoders" / f"{self.name}-{name}-{seconds:.0f}s-{digest}.json"
        if file.exists():
            return json.loads(file.read_text())["records"]
        if time.perf_counter() > self._deadline:
            return None
        # Checkpoints outlive an interruption, and are of no use once the run is on file.
        folder = Path(tempfile.gettempdir()) / "curvax_autoencoder_bench" / digest
        title = f"{self.name}: {name} ({describe(settings)})"
        run = fit(self.problem, name, settings, seconds=seconds, folder=folder, title=title)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"key": key, "records": run.records}, default=float) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        return run.records


def heading() -> str:
    """What holds for all cases."""
    return (
        "# Deep autoencoders: Hessian-free against Adam and NAG\n\n"
        "By `python -m benchmarks.autoencoder_bench`. Seconds are those of training alone: compilation and evaluation"
        " are not counted. Every setting of the grids that are printed had the same time; the table shows the one with"
        f" the lowest training loss at the end. {os.cpu_count()} CPU cores, jax {jax.__version__}. NAG's momentum grows"
        " as in Sutskever et al. 2013 up to the value given. A batch size above the number of images takes them all."
        "\n\n"
    )


def _last_loss(records):
    loss = records[-1]["loss"]
    return loss if loss is not None and loss == loss else float("inf")


def _loss_at(records, seconds):
    """The last loss that was measured by then, or only just after."""
    return [record["loss"] for record in records if record["seconds"] <= seconds * 1.02][-1]


def _markdown(head, rows):
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]


if __name__ == "__main__":
    main()
