"""The quadratic model of an objective around a point, and how well it predicts: reduction ratio and lower bound."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.matrices.curvature import Curvature, GaussNewton, check_curvature
from curvax.matrices.linear_map import LinearMap
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import weighted_sum
from curvax.types import PyTree, Scalar


def quadratic_model(at: CurvaturePoint, *, curvature: Curvature | None = None, damping: Scalar = 0.0) -> QuadraticModel:
    r"""The model M(delta) = h(theta) + g^T delta + 1/2 delta^T (B + damping I) delta of an objective at theta.

    Args:
        curvature: B, ``curvax.GaussNewton()`` if None.
        damping: lambda, Tikhonov damping (Martens 2016, section 4.6.1).

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batch = (jnp.eye(2), jnp.ones((2, 1)))
        >>> M = curvax.quadratic_model(objective.linearize(jnp.zeros((2, 1)), batch))
        >>> M(jnp.ones((2, 1))).item(), objective(jnp.ones((2, 1)), batch).item()
        (0.0, 0.0)
    """
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("quadratic_model", curvature)
    loss, gradient = at.value_and_gradient()
    return QuadraticModel(loss, gradient, curvature.at(at), damping)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuadraticModel:
    """M(delta) = h + g^T delta + 1/2 delta^T (B + damping I) delta (Martens 2016, eq. 4.1)."""

    loss: jax.Array
    gradient: PyTree
    curvature: LinearMap
    damping: Scalar = 0.0

    def __call__(self, delta: PyTree) -> jax.Array:
        """M(delta)."""
        return self.loss + self.change(delta).astype(self.loss.dtype)

    def change(self, delta: PyTree) -> jax.Array:
        """M(delta) - M(0), the predicted change of the objective, by forward passes alone."""
        quadratic = self.curvature.quadratic(delta)
        squared_norm = trees.vdot(delta, delta)
        linear = trees.vdot(self.gradient, delta).astype(quadratic.dtype)
        return linear + (quadratic + trees.scale(self.damping, squared_norm).astype(quadratic.dtype)) / 2


def reduction_ratio(loss: Scalar, new_loss: Scalar, predicted_change: Scalar) -> jax.Array:
    r"""rho = (h(theta + delta) - h(theta)) / (M(delta) - M(0)), made safe: Martens 2016, eq. 4.9, with M(0) subtracted.

    Both changes are shifted down by ten units of rounding of the loss, so that at convergence, where both are nothing
    but rounding, rho is close to 1 (Conn, Gould, Toint 2000, section 17.4.2). Where the model predicts no decrease, or
    either value is not finite, rho is -inf: bad by any rule.


    Example:
        >>> print(f"{curvax.reduction_ratio(jnp.array(2.0), jnp.array(1.0), jnp.array(-2.0)):.6f}")
        0.500000
        >>> curvax.reduction_ratio(jnp.array(2.0), jnp.array(jnp.nan), jnp.array(-2.0)).item()
        -inf
    """
    loss = jnp.asarray(loss)
    change, predicted = (jnp.asarray(x).astype(loss.dtype) for x in (jnp.asarray(new_loss) - loss, predicted_change))
    rounding = 10 * jnp.finfo(loss.dtype).eps * jnp.abs(loss)
    # Not the shifted prediction: one of zero, or of a slight rise, would become a slight decrease, and any real
    # decrease of the loss a huge ratio.
    decreases = (predicted < 0) & jnp.isfinite(change) & jnp.isfinite(predicted)
    ratio = (change - rounding) / jnp.where(decreases, predicted - rounding, -1)
    nothing = (jnp.abs(change) <= rounding) & (jnp.abs(predicted) <= rounding)
    return jnp.where(decreases, ratio, jnp.where(nothing, 1.0, -jnp.inf).astype(loss.dtype))


def model_lower_bound(at: CurvaturePoint) -> jax.Array:
    r"""A lower bound on M(delta) - M(0) over all delta, for the Gauss-Newton model with gradient from the same batch.

    It is -1/2 mean_i g_i^T C_i^+ g_i - l2/2 ||theta||^2, with g_i the gradient and C_i the curvature of the loss in the
    outputs of case i (Martens 2016, section 4.10.1). A model below it means a bug, or gradient and curvature from
    different data. The bound is -inf where the loss has slope but no curvature.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> curvax.model_lower_bound(objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))))
        Array(-0.5, dtype=float...)
    """

    def one(piece):
        return weighted_sum(piece.scale, piece.loss.squared_newton_decrement(piece.outputs, piece.targets))

    data = at.accumulate(one)
    return -(data / 2 + at.penalty.value(at.params).astype(data.dtype))
