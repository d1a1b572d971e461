"""Second order against first order on real data: ``python -m benchmarks.demo``.

A small classifier and a small autoencoder learn the handwritten digits that scikit-learn ships, by damped Gauss-Newton
steps (Hessian-free, by conjugate gradients) on the whole training set and by Adam on mini-batches, for the same number
of seconds each. Adam's learning rate is the best of a grid that is printed. Writes a table and plots to ``demo/``.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks import data, plots, training
from benchmarks.progress import table

ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ADAM_BATCH = 128
NAME, SETTINGS = "Hessian-free", {"initial_damping": 1.0, "max_iterations": 50}


def main(argv=None):
    """Runs both problems with both optimisers and shows the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="training time of each run (default 15)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo"))
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)

    digits = data.load("digits")
    print(f"Data: {digits}\n{NAME}: whole training set, {SETTINGS}")
    print(f"Adam: batch {ADAM_BATCH}, learning rate the best of {ADAM_RATES} by final training loss")
    rows = []
    for problem in (classifier(digits), autoencoder(digits)):
        runs, finals = compare(problem, arguments.seconds)
        rows += [[problem["name"], name, *finals[name]] for name in runs]
        plots.plot_runs(runs, arguments.output / f"{problem['name']}.png", title=f"digits, {problem['name']}")
        if problem["name"] == "autoencoder":
            shown = digits.test_inputs[:12]
            decoded = {name: jax.nn.sigmoid(network(params, shown)) for name, params in problem["trained"].items()}
            pictures = {name: np.asarray(images) for name, images in decoded.items()}
            plots.plot_reconstructions(shown, pictures, (8, 8), arguments.output / "reconstructions.png")
    columns = ["problem", "optimiser", "parameters", "steps", "seconds", "training loss", "test loss", "test error %"]
    rows = [dict(zip(columns, row, strict=True)) for row in rows]
    table(rows, columns, "Digits: training loss after equal time")
    print(f"Plots are in {arguments.output}/")


def classifier(digits):
    """64-16-10, tanh, softmax."""
    return {
        "name": "classifier",
        "sizes": (64, 16, 10),
        "loss": curvax.losses.softmax_cross_entropy(),
        "train": (digits.train_inputs, digits.train_targets),
        "test": (digits.test_inputs, digits.test_targets),
        "trained": {},
    }


def autoencoder(digits):
    """64-16-4-16-64, tanh, sigmoid cross-entropy of the pixels."""
    return {
        "name": "autoencoder",
        "sizes": (64, 16, 4, 16, 64),
        "loss": curvax.losses.sigmoid_binary_cross_entropy(),
        "train": (digits.train_inputs, digits.train_inputs),
        "test": (digits.test_inputs, digits.test_inputs),
        "trained": {},
    }


def compare(problem, seconds):
    """The records of both optimisers, and the last figures of each as table cells."""
    objective = curvax.Objective(network, problem["loss"], l2=1e-4)
    params = initial(problem["sizes"])
    value = jax.jit(objective)
    train, test = jax.tree.map(jnp.asarray, (problem["train"], problem["test"]))

    def evaluate(params):
        return {"loss": float(value(params, train)), "test_loss": float(value(params, test))}

    def run(name, tx, batches, budget):
        title = f"{problem['name']}: {name}"
        return training.train(title, tx, objective, params, batches, seconds=budget, evaluate=evaluate)

    inputs, targets = problem["train"]

    def adam(rate, budget):
        return run(f"Adam {rate:g}", optax.adam(rate), training.minibatches(inputs, targets, ADAM_BATCH), budget)

    trials = {rate: adam(rate, seconds / 3)[1][-1]["loss"] for rate in ADAM_RATES}
    best = min(trials, key=trials.__getitem__)
    print("Adam's grid: " + ", ".join(f"{rate:g} -> {loss:.4f}" for rate, loss in trials.items()))
    whole = iter(lambda: train, None)
    results = {
        NAME: run(NAME, curvax.hessian_free(objective, **SETTINGS), whole, seconds),
        f"Adam {best:g}": adam(best, seconds),
    }
    count = curvax.trees.size(params)
    finals = {}
    for name, (trained, records) in results.items():
        problem["trained"][name] = trained
        last = records[-1]
        cells = [f"{count}", f"{last['step']:.0f}", f"{last['seconds']:.1f}"]
        finals[name] = [*cells, f"{last['loss']:.4f}", f"{last['test_loss']:.4f}", error(problem, trained, test)]
    return {name: records for name, (_, records) in results.items()}, finals


def error(problem, params, test):
    """Test error of the classifier in per cent."""
    if problem["name"] != "classifier":
        return "-"
    predicted = jnp.argmax(network(params, test[0]), axis=-1)
    return f"{100 * float(jnp.mean(predicted != test[1])):.1f}"


def network(params, x):
    """A tanh network with a linear last layer."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def initial(sizes, seed=0):
    """Glorot-normal kernels, zero biases."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    glorot = jax.nn.initializers.glorot_normal()
    shapes = list(itertools.pairwise(sizes))
    return [
        {"kernel": glorot(key, shape), "bias": jnp.zeros(shape[1])} for key, shape in zip(keys, shapes, strict=True)
    ]


if __name__ == "__main__":
    main()
