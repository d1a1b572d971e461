"""Damping matrices lambda D: D the identity (Tikhonov), a diagonal that follows the curvature's scales, or B itself."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal
from curvax.matrices.curvature import Curvature
from curvax.matrices.linear_map import DenseMap, Diagonal, LeafScalars, LinearMap, Sum
from curvax.objectives.point import CurvaturePoint
from curvax.types import PyTree, Scalar

DiagonalEstimate = Callable[[LinearMap, jax.Array], PyTree]


class Damping(abc.ABC):
    """What is added to a curvature matrix: lambda D."""

    def matrix(self, at: CurvaturePoint, curvature: Curvature, strength: Scalar, key: jax.Array) -> LinearMap:
        """The damped matrix B + lambda D; what B draws, it draws by ``key`` itself.

        Its diagonal can be estimated by ``chapelle_erhan_diagonal`` where B's can, which is what preconditioners do.
        """
        matrix = curvature.at(at, key)
        return Sum((matrix, self.added(matrix, strength, trees.key_aside(key))))

    @abc.abstractmethod
    def added(self, matrix: LinearMap, strength: Scalar, key: jax.Array) -> LinearMap:
        """lambda D for the matrix B."""


@dataclasses.dataclass(frozen=True)
class Tikhonov(Damping):
    r"""Damping by lambda I: the damped matrix is B + lambda I (Martens 2016, section 4.6.1).

    Component j of the step, in the eigenvectors of B, shrinks by lambda_j / (lambda_j + lambda). lambda has the units
    of the curvature, so it depends on how parameters and objective are scaled.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> at = objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))))
        >>> curvax.damping.tikhonov().matrix(at, curvax.GaussNewton(), 2.0, jax.random.key(0)).to_dense()
        Array([[2.5, 0. ],
               [0. , 2.5]], dtype=float...)
    """

    def added(self, matrix: LinearMap, strength: Scalar, key: jax.Array) -> LinearMap:
        del key
        strength = jnp.asarray(strength)
        scalars = jax.tree.map(lambda leaf: strength.astype(trees.wide_dtype(leaf)), matrix.structure)
        return LeafScalars.of(scalars, matrix.structure)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ScaleSensitive(Damping):
    r"""Damping by lambda D with D = (diag(d) + kappa I)^xi, where d is the diagonal of B (Martens 2016, section 4.6.3).

    With xi = 1 and kappa = 0 this is the damping of Marquardt 1963: it does not depend on the scale of any single
    parameter, nor on that of the objective. Martens warns not to use it alone, as it can restrict far too much where B
    is far from diagonal; xi below 1 and kappa above 0 lie between it and Tikhonov's.

    Attributes:
        exponent: xi, in [0, 1].
        offset: kappa, not negative.
        diagonal: d as a fixed pytree shaped like the parameters, such as squared scales known in advance (D = C^T C),
            or a function (B, key) -> d; by default one unbiased estimate a step (``chapelle_erhan_diagonal``, squared
            per example), which needs a B with ``sample``: Gauss-Newton or Fisher. A dense B has its own diagonal.

    Raises:
        ValueError: ``exponent`` or ``offset`` is out of range.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
        >>> at = objective.linearize(jnp.zeros(2), (jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))))
        >>> damping = curvax.damping.scale_sensitive(diagonal=lambda B, key: B.diagonal())
        >>> damping.matrix(at, curvax.GaussNewton(), 0.5, jax.random.key(0)).diagonal()
        Array([ 1.5, 13.5], dtype=float...)
    """

    exponent: float = 1.0
    offset: float = 0.0
    diagonal: PyTree | DiagonalEstimate | None = None

    def __post_init__(self):
        if not (0 <= self.exponent <= 1 and self.offset >= 0):
            raise ValueError(
                f"scale_sensitive needs 0 <= exponent <= 1 and offset >= 0, got {self.exponent} and {self.offset}"
            )

    def added(self, matrix: LinearMap, strength: Scalar, key: jax.Array) -> LinearMap:
        diagonal = _own_or_estimated if self.diagonal is None else self.diagonal
        diagonal = diagonal(matrix, key) if callable(diagonal) else diagonal
        trees.check_like(diagonal, matrix.structure, "diagonal")

        def entries(leaf):
            leaf = jnp.asarray(leaf).astype(trees.wide_dtype(leaf))
            return jnp.asarray(strength).astype(leaf.dtype) * (leaf + self.offset) ** self.exponent

        return Diagonal(jax.tree.map(entries, diagonal))


@dataclasses.dataclass(frozen=True)
class Proportional(Damping):
    r"""Damping by D = B: the damped matrix is (1 + lambda) B (Martens 2016, section 4.6.3).

    Solved exactly, or by conjugate gradients from zero, the step is 1 / (1 + lambda) of the undamped one, whatever the
    parameterisation: the learning rate alpha is this with lambda = 1/alpha - 1. Along directions without curvature it
    restrains nothing, so Martens warns not to use it alone: leave it to where B is regular.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> at = objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))))
        >>> curvax.damping.proportional().matrix(at, curvax.GaussNewton(), 2.0, jax.random.key(0)).diagonal()
        Array([[1.5],
               [1.5]], dtype=float...)
    """

    def matrix(self, at: CurvaturePoint, curvature: Curvature, strength: Scalar, key: jax.Array) -> LinearMap:
        return (1 + jnp.asarray(strength)) * curvature.at(at, key)  # one product, not two

    def added(self, matrix: LinearMap, strength: Scalar, key: jax.Array) -> LinearMap:
        del key
        return strength * matrix


def _own_or_estimated(matrix, key):
    return matrix.diagonal() if isinstance(matrix, DenseMap) else chapelle_erhan_diagonal(matrix, key)


tikhonov = Tikhonov
scale_sensitive = ScaleSensitive
proportional = Proportional
