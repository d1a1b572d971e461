"""Deep autoencoders: ``python -m benchmarks.autoencoder --data curves --optimizer kfac --optimizer adam``.

The problems of Hinton and Salakhutdinov 2006, on which Martens 2010 showed Hessian-free optimisation, at their full
layer sizes or scaled. Runs show their progress, end in a table, and leave in the output folder a line of JSON for each
evaluation, plots of the loss against steps and seconds, and a picture of reconstructions. A run that was interrupted
goes on where it was when it is started again with the same settings.

The loss is the cross-entropy of the pixels, in nats per image, above the entropy of the images, which no reconstruction
can get below; for the faces, half the squared error. Initial weights are those of sparse initialisation. The loss at a
time is the last one before it; compilation and evaluation do not count as time. ``--grid`` runs every setting that the
bench would try.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from benchmarks import data, plots
from benchmarks.machine import machine, on_machine
from benchmarks.optimizers import OPTIMIZERS, RUNNERS, settings_of
from benchmarks.progress import log_json, table
from benchmarks.training import Batches, Run, loss_at, train

PyTree = Any

SIZES = {
    "curves": (784, 400, 200, 100, 50, 25, 6),
    "mnist": (784, 1000, 500, 250, 30),
    "faces": (625, 2000, 1000, 500, 30),
    "digits": (64, 60, 30, 10),
}
MARKS = (3.0, 8.0, 15.0, 25.0, 36.0, 50.0, 60.0, 76.0, 100.0)
SETTINGS = ("learning_rate", "damping", "max_iterations", "momentum", "warm_start")
COLUMNS = ["optimizer", "settings", "steps", "seconds", "loss", "test loss", "squared error", "test squared error"]


class Problem(NamedTuple):
    """An autoencoder to train.

    Attributes:
        dataset: The images.
        sizes: Units of the encoder's layers, from the images to the code.
        objective: The objective.
        params: Initial parameters.
        floor: What every loss is reported above.
    """

    dataset: data.Dataset
    sizes: tuple[int, ...]
    objective: curvax.Objective
    params: PyTree
    floor: float

    def layers(self) -> curvax.Layers:
        """The layers of the network."""
        images = self.dataset.train_inputs[:2]
        return curvax.find_layers(self.objective, self.params, (images, images))

    def evaluate(self):
        """params -> the losses above the floor and the squared errors, on training and test images."""

        @jax.jit
        def figures(params, images):
            outputs = network(params, images)
            shown = outputs if self.dataset.name == "faces" else jax.nn.sigmoid(outputs)
            loss = self.objective.terms[0].loss.value(outputs, images)
            return jnp.mean(jnp.sum(loss, axis=-1)), jnp.mean(jnp.sum((shown - images) ** 2, axis=-1))

        train_images, test_images = map(jnp.asarray, (self.dataset.train_inputs, self.dataset.test_inputs))
        test_floor = 0.0 if self.floor == 0 else data.entropy_floor(self.dataset.test_inputs)

        def evaluate(params):
            loss, error = figures(params, train_images)
            test_loss, test_error = figures(params, test_images)
            return {
                "loss": float(loss) - self.floor,
                "test_loss": float(test_loss) - test_floor,
                "squared_error": float(error),
                "test_squared_error": float(test_error),
            }

        return evaluate


def main(argv=None):
    """Trains with every optimiser that was named, and compares."""
    arguments = _parser().parse_args(argv)
    sizes = None if arguments.sizes is None else tuple(map(int, arguments.sizes.split("-")))
    problem = make_problem(
        arguments.data,
        sizes,
        scale=arguments.scale,
        l2=arguments.l2,
        activation=arguments.activation,
        num_train=arguments.num_train,
        folder=arguments.data_folder,
        seed=arguments.seed,
    )
    layers = "-".join(map(str, problem.sizes))
    print(f"{problem.dataset}\nEncoder {layers}, decoder mirrored: {curvax.trees.size(problem.params)} parameters")
    print(f"On {on_machine()}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    marks = [mark for mark in arguments.marks if arguments.steps or mark <= arguments.seconds]
    runs, rows, lines = {}, [], []
    for label, name, settings in _chosen(arguments):
        key = {"sizes": layers, "name": name, "settings": settings, "l2": arguments.l2, "seed": arguments.seed}
        if settings.get("decay") == "cosine":  # the same steps on another budget are another run
            key["budget"] = (arguments.seconds, arguments.steps)
        folder = arguments.output / f"{name}-{_digest({**vars(arguments), **key})}"
        if not arguments.resume:
            shutil.rmtree(folder, ignore_errors=True)
        run = fit(
            problem,
            name,
            settings,
            seconds=arguments.seconds,
            steps=arguments.steps,
            folder=folder,
            seed=arguments.seed,
            marks=marks,
            title=f"{problem.dataset.name}: {label}",
        )
        runs[label] = run
        rows.append(row(name, settings, run, marks))
        lines.append({**key, "optimizer": name, "machine": machine(), "records": run.records})
        results = arguments.output / f"{arguments.data}-{layers}.json"
        results.write_text(json.dumps(lines, default=str) + "\n")
    table(rows, [*COLUMNS[:4], *map(at_mark, marks), *COLUMNS[4:]], f"{arguments.data}, encoder {layers}")
    draw(problem, runs, arguments.output)
    print(f"Logs, plots and checkpoints are in {arguments.output}/")


def _chosen(arguments):
    """The runs: a name for each, the optimiser, its settings."""
    for name in arguments.optimizer or ["kfac", "adam"]:
        given = _given(arguments, name)
        if not arguments.grid:
            yield name, name, settings_of(name, **given)
        else:
            for changes in OPTIMIZERS[name].grid:
                settings = settings_of(name, **{**changes, **given})
                yield f"{name}, {describe(settings)}", name, settings


def make_problem(
    name: str,
    sizes: tuple[int, ...] | None = None,
    *,
    scale: float = 1.0,
    l2: float | None = None,
    activation: str = "tanh",
    num_train: int | None = None,
    num_test: int | None = None,
    folder: str | None = None,
    seed: int = 0,
) -> Problem:
    """The autoencoder of a data set; ``scale`` multiplies the widths of its hidden layers."""
    dataset = data.load(name, folder, num_train=num_train, num_test=num_test)
    sizes = SIZES[name] if sizes is None else sizes
    if sizes[0] != dataset.train_inputs.shape[1]:
        raise ValueError(f"the first layer of {name} has {dataset.train_inputs.shape[1]} units, not {sizes[0]}")
    sizes = (sizes[0], *(max(1, round(scale * size)) for size in sizes[1:]))
    faces = name == "faces"
    loss = curvax.losses.squared_error() if faces else curvax.losses.sigmoid_binary_cross_entropy()
    model = network if activation == "tanh" else sigmoid_network
    objective = curvax.Objective(model, loss, l2=l2)
    floor = 0.0 if faces else data.entropy_floor(dataset.train_inputs)
    return Problem(dataset, sizes, objective, initial((*sizes, *sizes[-2::-1]), seed), floor)


def fit(
    problem: Problem,
    name: str,
    settings: dict[str, Any],
    *,
    seconds: float | None = None,
    steps: int | None = None,
    folder: Path | None = None,
    seed: int = 0,
    title: str = "",
    marks: Sequence[float] = (),
) -> Run:
    """Trains a problem with one optimiser; with a folder it logs, saves checkpoints, and goes on from them."""
    images = problem.dataset.train_inputs
    size: Any = min(settings["batch_size"], len(images))
    if "steps_to_whole" in settings:  # few sizes, as each compiles a step
        size = curvax.schedules.exponential_batch_size(
            size, len(images), steps_to_whole=settings["steps_to_whole"], multiple_of=-(-len(images) // 8)
        )
    optimizer = OPTIMIZERS[name]
    run = train(
        title or f"{problem.dataset.name}: {name}",
        optimizer(settings, problem.layers() if optimizer.needs_layers else None),
        problem.objective,
        problem.params,
        Batches(images, images, size, seed),
        seconds=seconds,
        steps=steps,
        evaluate=problem.evaluate(),
        marks=marks,
        curvature_size=settings.get("curvature_size"),
        cosine_decay=settings.get("decay") == "cosine",
        averaged=optimizer.averaged,
        checkpoints=None if folder is None else folder / "checkpoints",
    )
    if folder is not None:
        log = folder / "log.jsonl"
        log.unlink(missing_ok=True)
        for record in run.records:
            log_json(log, {"optimizer": name, **machine(), **record})
    return run


def row(name: str, settings: dict[str, Any], run: Run, marks: Sequence[float] = ()) -> dict[str, Any]:
    """A run as a line of the table."""
    last = run.records[-1]
    return {
        "optimizer": name,
        "settings": describe(settings),
        "steps": last["step"],
        **{at_mark(mark): loss_at(run.records, mark) for mark in marks},
        **{column: last[column.replace(" ", "_")] for column in COLUMNS[3:]},
    }


def at_mark(mark: float) -> str:
    """The column of the loss at that time."""
    return f"at {mark:g} s"


def describe(settings: dict[str, Any]) -> str:
    """Settings as text."""
    return ", ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in settings.items()
    )


def draw(problem: Problem, runs: dict[str, Run], output: Path) -> None:
    """The curves of the loss, and reconstructions of test images."""
    name = problem.dataset.name
    records = {key: run.records for key, run in runs.items()}
    label = "squared error / 2" if name == "faces" else "training loss above its floor, nats"
    plots.plot_runs(records, output / f"{name}.png", title=f"autoencoder on {name}", label=label)
    shown = problem.dataset.test_inputs[:12]
    pictures = {}
    for key, run in runs.items():
        outputs = problem.objective.terms[0].model_fn(run.params, jnp.asarray(shown))
        pictures[key] = problem.dataset.pixels(np.asarray(outputs if name == "faces" else jax.nn.sigmoid(outputs)))
    shape = problem.dataset.image_shape
    assert shape is not None
    plots.plot_reconstructions(
        problem.dataset.pixels(shown), pictures, shape, output / f"{name}_reconstructions.png", title=f"{name}, test"
    )


def network(params: PyTree, x: jax.Array, activation=jnp.tanh) -> jax.Array:
    """Encoder and decoder with a linear code layer and linear outputs (the loss brings the sigmoid)."""
    code = len(params) // 2 - 1
    for index, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        if index not in (code, len(params) - 1):
            x = activation(x)
    return x


def sigmoid_network(params: PyTree, x: jax.Array) -> jax.Array:
    """The same with sigmoid units, as Hinton and Salakhutdinov have them."""
    return network(params, x, jax.nn.sigmoid)


def initial(sizes: tuple[int, ...], seed: int) -> PyTree:
    """Sparse initialisation with zero biases (Martens 2010), scaled by the root of 1/15 to unit variance."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    sparse = curvax.initializers.sparse(15, stddev=15**-0.5)
    return [
        {"kernel": sparse(key, shape, jnp.float32), "bias": jnp.zeros(shape[1], jnp.float32)}
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def _given(arguments, name):
    """The settings of the command line that this optimiser has; those it lacks are for the others that are named."""
    values = {key: getattr(arguments, key) for key in [*RUNNERS, *SETTINGS]}
    own = set(OPTIMIZERS[name].defaults) | {"curvature_size", "steps_to_whole"}
    return {key: value for key, value in values.items() if key in own and value is not None}


def _digest(settings):
    ignored = ("seconds", "steps", "output", "resume", "optimizer", "grid", "marks", *RUNNERS, *SETTINGS)
    text = json.dumps({key: str(value) for key, value in sorted(settings.items()) if key not in ignored})
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(SIZES), default="curves")
    parser.add_argument("--optimizer", action="append", choices=list(OPTIMIZERS), help="several times to compare")
    parser.add_argument("--grid", action="store_true", help="every setting of the grid of each optimiser")
    parser.add_argument("--marks", type=float, nargs="+", default=MARKS, help="seconds at which the table has losses")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of each run (default 60)")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--sizes", help="units of the encoder, such as 784-200-100-6")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the widths of the hidden layers")
    parser.add_argument("--num-train", type=int, help="training images, the first ones")
    parser.add_argument("--activation", choices=("tanh", "sigmoid"), default="tanh")
    parser.add_argument("--l2", type=float, help="strength of the penalty")
    for name, meaning in {**RUNNERS, **dict.fromkeys(SETTINGS, "of the optimisers that have it")}.items():
        kind = {"decay": str, "learning_rate": float, "momentum": float, "damping": float, "warm_start": float}
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind.get(name, int), help=meaning)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-folder", help="where the data sets are (default: CURVAX_DATA)")
    parser.add_argument("--output", type=Path, default=Path("autoencoder"))
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="begin anew")
    return parser


if __name__ == "__main__":
    main()
