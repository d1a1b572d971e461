"""Second order against first order: ``python -m benchmarks.demo``, which is ``make demo``.

A deep autoencoder learns generated images of smooth curves (CURVES, after Hinton and Salakhutdinov 2006) by K-FAC,
Hessian-free optimisation, Adam and NAG for the same number of seconds each: at their defaults, or with the settings
that the autoencoder bench found best on its grids where it has been run (``benchmarks/results/tuned.json``). Writes a
table and plots to ``demo/``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import curvax
from benchmarks.autoencoder import COLUMNS, at_mark, draw, fit, make_problem, row
from benchmarks.autoencoder_bench import CASES, RESULTS
from benchmarks.machine import machine, on_machine
from benchmarks.optimizers import settings_of
from benchmarks.progress import log_json, table

NAMES = ("kfac", "hessian_free", "adam", "nag")


def main(argv=None):
    """Runs the optimisers and shows the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=25.0, help="training time of each run (default 25)")
    parser.add_argument("--output", type=Path, default=Path("demo"))
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)

    problem = make_problem(**CASES["demo"].options)
    layers = "-".join(map(str, problem.sizes))
    print(f"{problem.dataset}\nEncoder {layers}, decoder mirrored: {curvax.trees.size(problem.params)} parameters")
    tuned, source = settings_in_use()
    print(f"Settings: {source}\nOn {on_machine()}")
    marks = [mark for mark in CASES["demo"].marks if mark <= arguments.seconds]
    runs, rows = {}, []
    (arguments.output / "log.jsonl").unlink(missing_ok=True)
    for name in NAMES:
        runs[name] = fit(problem, name, tuned[name], seconds=arguments.seconds, marks=marks)
        rows.append(row(name, tuned[name], runs[name], marks))
        for record in runs[name].records:
            log_json(arguments.output / "log.jsonl", {"optimizer": name, **machine(), **record})
    table(
        rows,
        [*COLUMNS[:4], *map(at_mark, marks), *COLUMNS[4:]],
        f"CURVES, encoder {layers}: nats per image above the entropy of the images",
    )
    draw(problem, runs, arguments.output)
    first, second, *_ = sorted(rows, key=lambda line: line["loss"])
    print(
        f"After {arguments.seconds:g} s each, {first['optimizer']} has the lowest training loss"
        f" ({first['loss']:.3f} nats above the floor), before {second['optimizer']} ({second['loss']:.3f})."
        f" Plots are in {arguments.output}/"
    )


def settings_in_use():
    """The settings of each optimiser, and where they are from."""
    file = RESULTS / "tuned.json"
    tuned = json.loads(file.read_text()).get("demo", {}) if file.exists() else {}
    if not set(NAMES) <= set(tuned):
        return {name: settings_of(name) for name in NAMES}, "defaults, as the bench has not been run"
    return tuned, "tuned by `python -m benchmarks.autoencoder_bench`; grids in benchmarks/results/autoencoders.md"


if __name__ == "__main__":
    main()
