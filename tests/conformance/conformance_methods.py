"""Every optimiser of the library, one line each; the tests beside this file run each through every property."""

from typing import Any, NamedTuple

import optax

import curvax


class Method(NamedTuple):
    """An optimiser under test.

    Attributes:
        name: Its name in ``curvax`` and in the test ids.
        learning_rate: What its updates must be multiplied by to be steps; None if they are steps already.
        choices: Its settings in the tests that make them short.
        numbers: Its further settings, which are traced under ``inject_hyperparams``.
        scheduled: The argument that is given as a schedule there; None for a method that takes none.
    """

    name: str
    learning_rate: float | None
    choices: dict[str, Any]
    numbers: dict[str, float]
    scheduled: str | None

    def __call__(self):
        return self.as_step(self.make(**self.choices, **self.numbers))

    @property
    def make(self):
        return getattr(curvax, self.name)

    def as_step(self, tx):
        return tx if self.learning_rate is None else optax.chain(tx, optax.scale(-self.learning_rate))


METHODS = [
    Method("levenberg_marquardt", None, {}, {"initial_damping": 0.5}, None),
    Method("scale_by_dense_curvature", 0.3, {}, {"damping": 0.5}, "damping"),
    # Few iterations: far from convergence the choice among iterates is not one between equals up to rounding.
    Method(
        "hessian_free",
        None,
        {"max_iterations": 6},
        {"progress_tolerance": 0.0, "initial_damping": 0.5},
        "sufficient_decrease",
    ),
    Method("newton_cg", None, {}, {"initial_radius": 0.5, "max_iterations": 6}, "acceptance"),
    Method("curveball", None, {}, {"initial_damping": 0.5}, "momentum"),
    Method("lsr1", None, {}, {"scale": 1.5}, "scale"),
    Method("lsr1_linesearch", None, {}, {"scale": 1.5}, "scale"),
    Method("scale_by_cubic_step", None, {"inner": optax.sgd(1.0)}, {"sigma": 10.0}, "sigma"),
    Method(
        "natural_gradient",
        None,
        {},
        {"learning_rate": 0.3, "damping": 0.5, "max_iterations": 6, "tolerance": 0.0},
        "learning_rate",
    ),
    Method(
        "scale_by_natural_gradient",
        0.3,
        {},
        {"damping": 0.5, "max_iterations": 6, "tolerance": 0.0, "warm_start": 0.5},
        "damping",
    ),
    Method(
        "krylov_subspace_descent",
        None,
        {"num_vectors": 3},
        {"max_subspace_iterations": 3, "tolerance": 1e-9},
        "tolerance",
    ),
    Method("scale_by_sample_space", 0.3, {}, {"damping": 0.5}, "damping"),
]
