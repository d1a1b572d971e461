"""Every optimiser of the library, one line each; the tests beside this file run each through every property."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax

import curvax


class Method(NamedTuple):
    """An optimiser under test.

    Attributes:
        name: Its name in the test ids.
        make: (objective, **hyperparameters) -> transformation.
        learning_rate: What its updates must be multiplied by to be steps; None if they are steps already.
        hyperparameters: Its settings in the tests, which ``inject_hyperparams`` makes traced.
        static: Its further arguments, which ``inject_hyperparams`` must leave alone.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    learning_rate: float | None
    hyperparameters: dict[str, float]
    static: tuple[str, ...]

    def __call__(self, objective):
        method = self.make(objective, **self.hyperparameters)
        return method if self.learning_rate is None else optax.chain(method, optax.scale(-self.learning_rate))


METHODS = [
    Method(
        "levenberg_marquardt",
        curvax.levenberg_marquardt,
        None,
        {"initial_damping": 0.5},
        ("objective", "rule", "scaling", "curvature"),
    ),
    Method(
        "scale_by_dense_curvature",
        curvax.scale_by_dense_curvature,
        0.3,
        {"damping": 0.5},
        ("objective", "scaling", "curvature"),
    ),
    Method(
        # Few iterations: far from convergence the choice among iterates is not one between equals up to rounding.
        "hessian_free",
        functools.partial(curvax.hessian_free, max_iterations=6, progress_tolerance=0.0),
        None,
        {"initial_damping": 0.5},
        (
            "objective",
            "rule",
            "preconditioner_exponent",
            "warm_start",
            "max_iterations",
            "progress_tolerance",
            "sufficient_decrease",
            "curvature",
            "seed",
        ),
    ),
]
