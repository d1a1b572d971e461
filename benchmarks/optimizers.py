"""The optimisers of the benchmarks by name: how each is made, its default settings, and the grid it is tuned on."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import curvax

Settings = Mapping[str, Any]


class Optimizer(NamedTuple):
    """An entry of the registry.

    Attributes:
        make: (settings) -> transformation, with the problem's layers in front where ``needs_layers``; the settings
            without those of the runner, ``RUNNERS``.
        defaults: Settings where nothing else is said.
        grid: What tuning tries in place of the defaults.
        needs_layers: Whether it is made for the layers of a model.
        averaged: Whether its state has an average of the iterates.
    """

    make: Callable[..., optax.GradientTransformation]
    defaults: Settings
    grid: tuple[Settings, ...]
    needs_layers: bool = False
    averaged: bool = False

    def __call__(self, settings: Settings, layers: curvax.Layers | None = None) -> optax.GradientTransformation:
        """The transformation with these settings."""
        own = {name: value for name, value in settings.items() if name not in RUNNERS}
        return self.make(layers, **own) if self.needs_layers else self.make(**own)


RUNNERS = {
    "batch_size": "examples in a step, all if it is larger",
    "curvature_size": "how many of them the curvature is taken from",
    "decay": "'cosine' for a learning rate that falls to 0 over the run, or 'none'",
    "steps_to_whole": "from batch_size on, batches grow exponentially to all examples in so many steps",
}
"""The settings that are the runner's."""


def settings_of(name: str, **given: Any) -> dict[str, Any]:
    """The default settings of an optimiser, with what is given and not None in their place.

    Raises:
        ValueError: The optimiser is unknown, or has no such setting.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"there is no optimiser {name!r}; choose among {', '.join(OPTIMIZERS)}")
    given = {key: value for key, value in given.items() if value is not None}
    unknown = set(given) - set(OPTIMIZERS[name].defaults) - set(RUNNERS)
    if unknown:
        raise ValueError(f"{name} has no setting {unknown.pop()!r}; it has {', '.join(OPTIMIZERS[name].defaults)}")
    return {**OPTIMIZERS[name].defaults, **given}


def _nesterov(learning_rate, momentum):
    """v <- mu v - epsilon grad h(theta + mu v) in the form of optax, mu growing to its maximum (Sutskever 2013)."""

    def growing(step):
        mu = 1 - 2.0 ** (-1 - jnp.log2(jnp.floor(step / 250) + 1))
        return jnp.minimum(mu, momentum)

    sgd = optax.inject_hyperparams(optax.sgd, static_args="nesterov")
    return sgd(learning_rate, momentum=growing, nesterov=True)


def _hessian_free(damping, max_iterations, warm_start):
    return curvax.hessian_free(
        initial_damping=damping, max_iterations=max_iterations, warm_start=warm_start, choice="walk"
    )


def _kfac_averaged(layers):
    return optax.chain(curvax.kfac(layers), curvax.average_iterates())


def _products(**options):
    """All combinations of the values given for each setting."""
    return tuple(dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))


_KFAC = {"batch_size": 1000}

OPTIMIZERS: dict[str, Optimizer] = {
    "kfac": Optimizer(curvax.kfac, _KFAC, _products(batch_size=(1000, 500)), True),
    "kfac_tridiagonal": Optimizer(functools.partial(curvax.kfac, inverse="block_tridiagonal"), _KFAC, ({},), True),
    "ekfac": Optimizer(functools.partial(curvax.kfac, inverse="eigen_corrected"), _KFAC, ({},), True),
    "kfac_without_momentum": Optimizer(functools.partial(curvax.kfac, momentum=0.0), _KFAC, ({},), True),
    "kfac_averaged": Optimizer(_kfac_averaged, _KFAC, ({},), True, averaged=True),
    "kfac_growing": Optimizer(
        curvax.kfac,
        {"batch_size": 500, "steps_to_whole": 250},
        ({}, {"batch_size": 1000, "steps_to_whole": 500}),
        True,
    ),
    "kfac_tridiagonal_growing": Optimizer(
        functools.partial(curvax.kfac, inverse="block_tridiagonal"), {**_KFAC, "steps_to_whole": 200}, ({},), True
    ),
    "hessian_free": Optimizer(
        _hessian_free,
        {"batch_size": 1000, "damping": 1.0, "max_iterations": 20, "warm_start": 0.95},
        (*_products(batch_size=(1000, 2000)), {"steps_to_whole": 100}),
    ),
    "newton_cg": Optimizer(
        lambda radius, max_iterations: curvax.newton_cg(initial_radius=radius, max_iterations=max_iterations),
        {"batch_size": 2000, "radius": 1.0, "max_iterations": 30},
        _products(radius=(0.3, 3.0)),
    ),
    "natural_gradient": Optimizer(
        curvax.natural_gradient,
        {"batch_size": 2000, "learning_rate": 1.0, "damping": 10.0, "max_iterations": 20, "warm_start": 0.9},
        _products(damping=(1.0, 10.0, 100.0)),
    ),
    "krylov_subspace_descent": Optimizer(
        curvax.krylov_subspace_descent,
        {"batch_size": 2000, "num_vectors": 15, "max_subspace_iterations": 15},
        _products(num_vectors=(10, 20)),
    ),
    "curveball": Optimizer(
        lambda damping: curvax.curveball(initial_damping=damping),
        {"batch_size": 1000, "damping": 1.0},
        _products(damping=(0.1, 1.0, 10.0)),
    ),
    "cubic_sgd": Optimizer(
        lambda sigma: curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=sigma),
        {"batch_size": 1000, "sigma": 100.0},
        _products(sigma=(10.0, 100.0, 1000.0)),
    ),
    "lsr1": Optimizer(
        curvax.lsr1,
        {"batch_size": 2000, "memory_size": 5},
        _products(memory_size=(5, 10)),
    ),
    "adam": Optimizer(
        optax.adam,
        {"batch_size": 200, "learning_rate": 2e-3, "decay": "cosine"},
        (
            *_products(batch_size=(200,), learning_rate=(2e-3, 1e-3, 4e-3)),
            *_products(batch_size=(500,), learning_rate=(2e-3, 4e-3)),
            *_products(learning_rate=(1e-3, 2e-3, 5e-4, 2.5e-4), decay=("none",)),
        ),
    ),
    "nag": Optimizer(
        _nesterov,
        {"batch_size": 200, "learning_rate": 1e-3, "momentum": 0.99, "decay": "cosine"},
        _products(momentum=(0.99, 0.95), learning_rate=(1e-3, 3e-3, 1e-2)),
    ),
    "sgd": Optimizer(
        optax.sgd,
        {"batch_size": 200, "learning_rate": 1e-3, "momentum": 0.9, "decay": "none"},
        _products(learning_rate=(3e-4, 1e-3), momentum=(0.9, 0.99)),
    ),
}
