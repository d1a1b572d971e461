"""Draws the spectrum of the Hessian and the Gauss-Newton matrix of a network on digits, before and after training.

python -m benchmarks.spectrum
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import curvax

RESULTS = Path(__file__).parent / "results"
SIZES = (64, 40, 10)


def main(arguments: list[str] | None = None) -> None:
    """Trains by Adam, takes both spectra by stochastic Lanczos quadrature, and writes ``spectrum.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    digits = load_digits()
    batch = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)
    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    tx = optax.adam(3e-3)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(objective)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=options.steps)[0][0]

    @jax.jit
    def spectra(params):
        at = objective.linearize(params, batch)
        maps = {"Hessian": curvax.hessian(at), "Gauss-Newton": curvax.ggn(at)}
        key = jax.random.key(1)
        return {
            name: curvax.estimators.spectral_density(matrix, key, num_steps=60, num_samples=4)
            for name, matrix in maps.items()
        }

    first = initial(jax.random.key(0))
    draw(
        {"before training": spectra(first), f"after {options.steps} steps of Adam": spectra(train(first))},
        options.output,
    )


def network(params, x):
    """Layers of tanh units and a linear one."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def initial(key):
    """Normal weights of variance one over the number of inputs."""
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": jax.random.normal(k, (m, n), jnp.float32) / m**0.5, "b": jnp.zeros(n, jnp.float32)}
        for k, m, n in zip(keys, SIZES, SIZES[1:], strict=False)
    ]


def draw(spectra, folder: Path) -> None:
    """One panel for each time; densities smoothed on a signed logarithmic axis of eigenvalues."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, densities) in zip(figure.subplots(1, len(spectra), sharey=True), spectra.items(), strict=True):
        for (name, density), colour in zip(densities.items(), ("#0072B2", "#D55E00"), strict=True):
            values, weights = (np.asarray(array).ravel() for array in (density.nodes, density.weights))
            places = np.arcsinh(values / 2e-4)
            grid = np.linspace(places.min() - 1, places.max() + 1, 400)
            kernel = np.exp(-0.5 * ((grid[:, None] - places) / 0.15) ** 2) / (0.15 * np.sqrt(2 * np.pi))
            axes.plot(2e-4 * np.sinh(grid), kernel @ weights / len(density.nodes), color=colour, label=name)
        axes.set(title=title, xlabel="eigenvalue", yscale="log", ylim=(1e-5, 3))
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_xticks([-1, -1e-2, 0, 1e-2, 1])
    figure.axes[0].set_ylabel("density")
    figure.axes[0].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "spectrum.png", dpi=100)


if __name__ == "__main__":
    main()
