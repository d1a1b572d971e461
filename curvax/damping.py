"""Rules that adapt the strength of damping to how well the quadratic model predicted the last step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Scalar = Any


@dataclasses.dataclass(frozen=True)
class DampingRule:
    r"""lambda <- decrease * lambda where rho > good_ratio, lambda <- increase * lambda where rho < bad_ratio.

    rho is the reduction ratio (``curvax.reduction_ratio``); the rule acts once in ``period`` steps. The defaults are
    those of Martens 2016, section 4.6.5 (after Levenberg and Marquardt).

    Attributes:
        good_ratio: Above it the damping falls.
        bad_ratio: Below it the damping grows; -inf, a step that failed, is below everything.
        decrease: The factor in (0, 1] for good steps.
        increase: The factor, at least 1, for bad steps.
        period: Steps from one adaptation to the next (T_1 in K-FAC).
        minimum: Damping never falls below it.
        maximum: Damping never rises above it.

    Example:
        >>> rule = curvax.damping.DampingRule()
        >>> print(f"{rule(jnp.array(1.0), jnp.array(0.9), jnp.array(1)):.4f}")
        0.6667
    """

    good_ratio: float = 3 / 4
    bad_ratio: float = 1 / 4
    decrease: float = 2 / 3
    increase: float = 3 / 2
    period: int = 1
    minimum: float = 1e-12
    maximum: float = 1e12

    def __post_init__(self):
        if not (0 < self.decrease <= 1 <= self.increase and self.bad_ratio <= self.good_ratio and self.period >= 1):
            raise ValueError(f"a damping rule needs 0 < decrease <= 1 <= increase and bad <= good ratio, got {self}")

    def __call__(self, damping: jax.Array, step_ratio: jax.Array, count: jax.Array) -> jax.Array:
        """The damping of the next step.

        Args:
            damping: lambda of the step taken.
            step_ratio: rho of the step taken.
            count: The number of the step taken, from 1; the rule acts where ``period`` divides it.

        Returns:
            The new lambda, in the dtype of ``damping``.
        """
        factor = jnp.where(step_ratio > self.good_ratio, self.decrease, 1.0)
        factor = jnp.where(step_ratio < self.bad_ratio, self.increase, factor)
        factor = jnp.where(count % self.period == 0, factor, 1.0)
        return jnp.clip(damping * factor.astype(damping.dtype), self.minimum, self.maximum)
