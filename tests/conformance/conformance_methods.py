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
            "damping",
            "preconditioner_exponent",
            "warm_start",
            "warm_start_from",
            "max_iterations",
            "progress_tolerance",
            "stop",
            "stop_period",
            "choice",
            "sufficient_decrease",
            "curvature",
            "layers",
            "seed",
        ),
    ),
    Method(
        "newton_cg",
        functools.partial(curvax.newton_cg, max_iterations=6),
        None,
        {"initial_radius": 0.5},
        ("objective", "rule", "max_iterations", "tolerance", "acceptance", "curvature"),
    ),
    Method(
        "curveball",
        functools.partial(curvax.curveball, gradient="incoming"),
        None,
        {"initial_damping": 0.5},
        ("objective", "momentum", "learning_rate", "rule", "damped_model", "gradient"),
    ),
    Method(
        "lsr1",
        curvax.lsr1,
        None,
        {"scale": 1.5},
        ("objective", "memory_size", "rule", "skip_tolerance"),
    ),
    Method(
        "lsr1_linesearch",
        curvax.lsr1_linesearch,
        None,
        {"scale": 1.5},
        ("objective", "memory_size", "skip_tolerance"),
    ),
    Method(
        "scale_by_cubic_step",
        functools.partial(curvax.scale_by_cubic_step, inner=optax.sgd(1.0)),
        None,
        {"sigma": 10.0},
        ("objective", "inner", "scope", "rule", "acceptance", "ascent", "diagonal"),
    ),
    Method(
        "natural_gradient",
        functools.partial(curvax.natural_gradient, max_iterations=6, tolerance=0.0),
        None,
        {"learning_rate": 0.3, "damping": 0.5},
        ("objective", "max_divergence", "max_iterations", "tolerance", "warm_start", "curvature"),
    ),
    Method(
        "scale_by_natural_gradient",
        functools.partial(curvax.scale_by_natural_gradient, max_iterations=6, tolerance=0.0, warm_start=0.5),
        0.3,
        {"damping": 0.5},
        ("objective", "max_iterations", "tolerance", "warm_start", "curvature"),
    ),
    Method(
        "krylov_subspace_descent",
        functools.partial(curvax.krylov_subspace_descent, num_vectors=3, max_subspace_iterations=3),
        None,
        {"tolerance": 1e-9},
        ("objective", "num_vectors", "max_subspace_iterations", "curvature"),
    ),
    Method(
        "scale_by_sample_space",
        curvax.scale_by_sample_space,
        0.3,
        {"damping": 0.5},
        ("objective", "layers", "momentum", "curvature", "method", "max_iterations", "tolerance"),
    ),
]
