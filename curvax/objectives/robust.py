r"""Robust losses of residuals r = z - y: bounded, so that an outlier has no say, and therefore not convex.

Near zero each is half the squared error; ``scale`` c says from where on a residual is an outlier. With the influence
psi = L' the Gauss-Newton matrix takes psi(r) / r, the weights of iteratively reweighted least squares, which are
positive where the Hessian is not: the step is that of a convex quadratic above the loss. The Hessian is exact. A
bounded loss is no negative log-density, so there is no Fisher matrix.
"""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp

from curvax.objectives.loss import OutputLoss, check_array, check_targets
from curvax.objectives.output_matrix import DiagonalOutputs
from curvax.types import Array


@dataclasses.dataclass(frozen=True)
class Robust(OutputLoss):
    """A loss c^2 rho(r / c) of each residual; outputs and targets are floating-point arrays of one shape."""

    scale: float = 1.0
    convex = False
    nonnegative = True

    @abc.abstractmethod
    def rho(self, square: Array) -> Array:
        """The loss for scale 1, as a function of r^2."""

    @abc.abstractmethod
    def weight(self, square: Array) -> Array:
        """psi(r) / r for scale 1, as a function of r^2: twice the derivative of rho."""

    def value(self, outputs, targets):
        return self.scale**2 * self.rho(self._square(outputs, targets))

    def gradient(self, outputs, targets):
        return self.weight(self._square(outputs, targets)) * (outputs - targets.astype(outputs.dtype))

    def curvature(self, outputs, targets):
        return DiagonalOutputs(self.weight(self._square(outputs, targets)))

    def fisher(self, outputs, targets=None):
        raise ValueError(
            f"{self} is bounded, so it is no negative log-density and has no Fisher matrix; take GaussNewton() or"
            " EmpiricalFisher()"
        )

    def check(self, outputs, targets):
        self.check_outputs(outputs)
        check_targets(self, targets, outputs.shape, floating=True)

    def check_outputs(self, outputs):
        check_array(self, outputs)

    def _square(self, outputs, targets):
        return ((outputs - targets.astype(outputs.dtype)) / self.scale) ** 2


@dataclasses.dataclass(frozen=True)
class TukeyBiweight(Robust):
    r"""Tukey's biweight, L = c^2/6 (1 - (1 - (r/c)^2)^3) for |r| <= c, and c^2/6 beyond.

    Residuals beyond c have no gradient at all. c = 4.685 keeps 95 % of the efficiency of least squares for normal
    residuals of variance 1.

    Example:
        >>> loss = curvax.losses.tukey_biweight(scale=2.0)
        >>> loss.value(jnp.array([0.0, 2.0, 9.0]), jnp.zeros(3)).round(4)
        Array([0.    , 0.6667, 0.6667], dtype=float...)

    Source: Beaton and Tukey 1974.
    """

    scale: float = 4.685

    def rho(self, square):
        # Not 1 - (1 - s)^3, of which small residuals cancel away.
        s = jnp.minimum(square, 1)
        return s * (3 - 3 * s + s**2) / 6

    def weight(self, square):
        return (1 - jnp.minimum(square, 1)) ** 2


@dataclasses.dataclass(frozen=True)
class Welsch(Robust):
    r"""Welsch's loss, L = c^2/2 (1 - exp(-(r/c)^2)), also named after Leclerc; 95 % efficient at c = 2.985.

    Example:
        >>> curvax.losses.welsch(scale=1.0).value(jnp.array([0.0, 1.0, 9.0]), jnp.zeros(3)).round(4)
        Array([0.    , 0.3161, 0.5   ], dtype=float...)

    Source: Dennis and Welsch 1978.
    """

    scale: float = 2.985

    def rho(self, square):
        return -jnp.expm1(-square) / 2

    def weight(self, square):
        return jnp.exp(-square)


@dataclasses.dataclass(frozen=True)
class GemanMcClure(Robust):
    r"""The loss of Geman and McClure, L = r^2 / (2 (1 + (r/c)^2)), which approaches c^2 / 2.

    Example:
        >>> curvax.losses.geman_mcclure().value(jnp.array([0.0, 1.0, 9.0]), jnp.zeros(3)).round(4)
        Array([0.    , 0.25  , 0.4939], dtype=float...)

    Source: Geman and McClure 1987.
    """

    def rho(self, square):
        # Not s / (1 + s) of large residuals, whose squares overflow: both quotients are taken where they are finite.
        large = square > 1
        inverse = 1 / jnp.where(large, square, 1)
        small = jnp.where(large, 1, square)
        return jnp.where(large, 1 / (2 * (1 + inverse)), small / (2 * (1 + small)))

    def weight(self, square):
        return 1 / (1 + square) ** 2


tukey_biweight = TukeyBiweight
welsch = Welsch
geman_mcclure = GemanMcClure
