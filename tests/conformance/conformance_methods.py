"""Every optimiser of the library, one line each; the tests beside this file run each through every property."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from conformance_networks import batch, objective, plain, weights

import curvax


class Method(NamedTuple):
    """An optimiser under test.

    Attributes:
        name: Its name in ``curvax``.
        learning_rate: What its updates must be multiplied by to be steps; None if they are steps already.
        choices: Its settings in the tests that make them short.
        numbers: Its further settings, which are traced under ``inject_hyperparams``.
        scheduled: The argument that is given as a schedule there; None for a method that takes none.
        by_layers: Whether its first argument is the layers of the model.
        takes_point: Whether ``update`` takes ``at=``; methods of gradients alone ignore it.
        coasts: Whether it moves on without a gradient, by what it remembers of others.
        variant: What tells it from others of the same name.
        keeps_eigenvectors: Whether they are in its state.
    """

    name: str
    learning_rate: float | None
    choices: dict[str, Any]
    numbers: dict[str, float]
    scheduled: str | None
    by_layers: bool = False
    takes_point: bool = True
    coasts: bool = False
    variant: str = ""
    keeps_eigenvectors: bool = False

    @property
    def id(self):
        """Its name in the test ids."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def __call__(self, goal=None, params=None):
        """The transformation, for the plain network or for another objective and its parameters."""
        return self.as_step(self.make(goal, params)(**self.choices, **self.numbers))

    def make(self, goal=None, params=None):
        """settings -> transformation."""
        made = getattr(curvax, self.name)
        if not self.by_layers:
            return made
        goal, params = (objective(plain()), weights()) if goal is None else (goal, params)
        data = batch(dtype=jax.tree.leaves(params)[0].dtype)
        return functools.partial(made, curvax.find_layers(goal, params, data))

    def as_step(self, tx):
        return tx if self.learning_rate is None else optax.chain(tx, optax.scale(-self.learning_rate))


def exact_diagonal(at, key):
    """A diagonal without draws, which depend on the dtype."""
    del key
    return curvax.ggn(at).diagonal()


def becker_lecun_diagonal(at, key):
    """Another."""
    del key
    return curvax.estimators.becker_lecun_diagonal(at)


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
    # All examples, as their number, eight, is also that of the devices they are sharded over; and exact statistics, as
    # draws depend on the dtype.
    *(
        Method(
            "kfac",
            None,
            {"statistics_stride": 1, "curvature_stride": 1, "statistics": curvax.Fisher()} | inverse,
            {"initial_damping": 0.5, "decay": 0.9},
            "max_divergence",
            by_layers=True,
            variant=inverse.get("inverse", ""),
            keeps_eigenvectors=bool(inverse),
        )
        for inverse in ({}, *({"inverse": name} for name in ("block_tridiagonal", "exact_tikhonov", "eigen_corrected")))
    ),
    Method(
        "scale_by_kfac",
        0.3,
        {"statistics_stride": 1, "statistics": curvax.Fisher()},
        {"damping": 0.5},
        "damping",
        by_layers=True,
    ),
    Method(
        "ea_cg",
        None,
        {"curvature_stride": 1},
        {"initial_alpha": 0.3, "max_iterations": 6, "tolerance": 0.0, "learning_rate": 0.5},
        "learning_rate",
        by_layers=True,
    ),
    Method("scale_by_ea_cg", 0.3, {}, {"alpha": 0.3, "max_iterations": 6, "tolerance": 0.0}, "alpha", by_layers=True),
    Method("scale_by_sample_space", 0.3, {}, {"damping": 0.5}, "damping"),
    Method("diagonal_newton", None, {"diagonal": exact_diagonal}, {"initial_damping": 0.5}, "decay"),
    Method("scale_by_diagonal_curvature", 0.3, {"diagonal": becker_lecun_diagonal}, {"damping": 0.5}, "damping"),
    Method("scale_by_matrix_momentum", 0.3, {}, {"inner_rate": 0.5, "damping": 0.5}, "inner_rate", coasts=True),
    Method("scale_by_stochastic_meta_descent", 1.0, {}, {"initial_scale": 0.3}, "meta_rate"),
    Method("scale_by_sgd_qn", 1.0, {}, {"initial_curvature": 2.0, "min_curvature": 1e-3}, "max_curvature"),
    Method("scale_by_silva_almeida", 0.3, {}, {}, "up", takes_point=False),
    Method("scale_by_almeida", 0.3, {}, {}, "meta_rate", takes_point=False),
    Method("scale_by_empirical_fisher_diagonal", 0.03, {}, {"damping": 1e-3}, "exponent", takes_point=False),
]
