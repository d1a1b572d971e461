"""Cubic learning rates on a plateau: 12 hidden ReLU layers of 128, started where nothing moves (methods CR-10).

Run: ``python -m benchmarks.cubic_plateau``, some minutes for each data set. Weights are U(-0.1, 0.1),
for which the signal of the first layers has died away at the output (U(-0.2, 0.2) in the run without a plateau). Every
base method runs with its own learning rate, decayed by 0.95 every 100 steps as in the paper, and with the cubic rate
along its direction. Writes error and learning rate against steps, and a table with how far the rate rises.

The paper does not say whether its networks have biases; its derivations leave them out. It decides how flat the plateau
is. Without biases the gradient dies away with the signal. With them the outputs' biases see the classes of each batch,
and the noise of a batch keeps the gradient, and by it the cubic rate, where it is (``noise_rate``). The networks here
have none, but for one more run of SGD.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import curvax
from benchmarks import data
from benchmarks.image_networks import mlp
from benchmarks.plots import COLOURS
from benchmarks.progress import markdown, table

HIDDEN, WIDTH, BATCH, PERIOD = 12, 128, 32, 100


class Case(NamedTuple):
    """A base method.

    Attributes:
        make: learning rate or schedule -> transformation.
        rate: The paper's learning rate.
        sigma: By data set.
    """

    make: Callable[[Any], optax.GradientTransformation]
    rate: float
    sigma: dict[str, float]


CASES = {
    "sgd": Case(optax.sgd, 0.02, {"mnist": 100.0, "cifar10": 1000.0}),
    "adagrad": Case(optax.adagrad, 0.1, {"mnist": 1000.0, "cifar10": 1000.0}),
    "adadelta": Case(optax.adadelta, 1.0, {"mnist": 1000.0, "cifar10": 1000.0}),
    "adam": Case(optax.adam, 1e-3, {"mnist": 1000.0, "cifar10": 1000.0}),
}


class Start(NamedTuple):
    """Where runs start from.

    Attributes:
        base: A key of ``CASES``.
        scale: Weights are uniform in (-scale, scale).
        biases: Whether the layers have them.
    """

    base: str
    scale: float
    biases: bool = False


STARTS = (Start("sgd", 0.2), *(Start(base, 0.1) for base in CASES), Start("sgd", 0.1, biases=True))


def noise_rate(sigma: float, classes: int = 10) -> float:
    """What the cubic rate along the gradient is near on a plateau with biases.

    Where the weights' slope and curvature vanish, alpha = sqrt(2 / (sigma ||g||)), and g is the mean over the batch of
    softmax minus one-hot at equal probabilities: ||g||^2 is (1 - 1 / classes) / batch in the mean.
    """
    return (2 / (sigma * ((1 - 1 / classes) / BATCH) ** 0.5)) ** 0.5


def train(dataset: data.Dataset, make, scale: float, steps: int, biases: bool = False, seed: int = 0):
    """(losses, learning rates) of every step; a rate is the length of the step over that of the gradient."""
    sizes = (dataset.train_inputs.shape[1], *(WIDTH,) * HIDDEN, dataset.num_classes or 10)
    network = mlp(sizes, jax.nn.relu, scale, biases)
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy())
    tx = optax.with_extra_args_support(make())
    params = network.init(jax.random.key(seed))
    images, labels = jnp.asarray(dataset.train_inputs), jnp.asarray(dataset.train_targets)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (BATCH,), 0, images.shape[0])
            loss, gradient, at = objective.value_and_grad(params, (images[chosen], labels[chosen]))
            updates, state = tx.update(gradient, state, params, at=at)
            rate = curvax.trees.norm(updates) / jnp.maximum(curvax.trees.norm(gradient), 1e-30)
            return (optax.apply_updates(params, updates), state), (loss, rate)

        keys = jax.random.split(jax.random.key(seed + 1), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    return tuple(np.asarray(x) for x in run(params))


def smoothed(values: np.ndarray) -> np.ndarray:
    """The moving average over a hundred steps."""
    sums = np.cumsum(np.insert(values.astype(float), 0, 0.0))
    return (sums[PERIOD:] - sums[:-PERIOD]) / PERIOD


def summary(name: str, losses: np.ndarray, rates: np.ndarray) -> dict[str, str]:
    """What the table says of a run."""
    error, rate = smoothed(losses), smoothed(rates)
    left = np.flatnonzero(error < 0.9 * error[0])
    return {
        "run": name,
        "loss at the start": f"{error[0]:.3f}",
        "at the end": f"{error[-1]:.3f}",
        "off the plateau at step": str(left[0]) if left.size else "never",
        "rate at the start": f"{rates[:10].mean():.3g}",
        "highest (mean of 100)": f"{rate.max():.3g}",
        "at the end ": f"{rate[-1]:.3g}",
        "highest over last": f"{rate.max() / max(rate[-1], 1e-30):.0f}",
    }


def main(argv=None):
    """Runs all cases and writes ``benchmarks/results/cubic_plateau.md`` with a picture for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("mnist", "cifar10"), default=["mnist", "cifar10"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--data-folder")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = ["# Cubic learning rates on a plateau", ""]
    lines += [
        f"{HIDDEN} hidden ReLU layers of {WIDTH}, softmax, batches of {BATCH}, {arguments.steps} steps, one seed. The"
        " learning rate is the length of the step over that of the gradient. Averages are over 100 steps.",
        "",
        "The paper: with SGD the rate is a hundred times higher on the plateau than after it, where it is about 0.05."
        " Its networks are taken to have no biases, as in its derivations. With biases the noise of a batch in the"
        f" outputs' keeps the gradient up, and the rate near {noise_rate(100.0):.2f} for sigma 100 and"
        f" {noise_rate(1000.0):.2f} for sigma 1000.",
        "",
    ]
    for name in arguments.data:
        dataset = data.load(name, arguments.data_folder)
        print(dataset, flush=True)
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        errors, rates_axes = figure.subplots(1, 2)
        rows = []
        for colour, (base, scale, biases) in zip(COLOURS, STARTS, strict=False):
            case = CASES[base]
            decayed = optax.exponential_decay(case.rate, PERIOD, 0.95)
            sigma = case.sigma[name]

            def cubic(case=case, sigma=sigma):
                return curvax.scale_by_cubic_step(case.make(case.rate), sigma=sigma)

            runs = {
                f"{base}, rate {case.rate:g}": lambda case=case, rate=decayed: case.make(rate),
                f"{base}, cubic, sigma {sigma:g}": cubic,
            }
            for style, (label, make) in zip((":", "-"), runs.items(), strict=True):
                label = f"{label}, weights +-{scale:g}{', biases' if biases else ''}"
                losses, rates = train(dataset, make, scale, arguments.steps, biases)
                rows.append(summary(label, losses, rates))
                errors.plot(smoothed(losses), style, color=colour, label=label)
                rates_axes.plot(smoothed(rates), style, color=colour)
                print(rows[-1], flush=True)
        errors.set(xlabel="steps", ylabel="training loss, mean of 100", title=name)
        rates_axes.set(xlabel="steps", ylabel="learning rate, mean of 100", yscale="log")
        errors.legend(fontsize="x-small")
        figure.savefig(arguments.output / f"cubic_plateau_{name}.png", dpi=120)
        columns = list(rows[0])
        table(rows, columns, f"{dataset}")
        lines += [f"## {name}", "", str(dataset), ""]
        lines += markdown(columns, ([row[c] for c in columns] for row in rows))
        lines += ["", f"![error and learning rate](cubic_plateau_{name}.png)", ""]
    (arguments.output / "cubic_plateau.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
