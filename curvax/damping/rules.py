"""Rules that adapt damping or a trust region's radius to how well the quadratic model predicted the last step.

==========================  ================================  =====================  =====================  ======
rule                        tests                             good                   bad                    period
==========================  ================================  =====================  =====================  ======
``DampingRule()``           rho = actual / predicted change   > 3/4: times 2/3       < 1/4: times 3/2       1
``kfac_rule()``             the same                          > 3/4: times 0.95^5    < 1/4: over 0.95^5     5
``next_batch_rule``         rho on the next batch             > 1/2: times 0.95^5    < -1/2: over 0.95^5    5
``curveball_rule()``        the same                          > 3/2: times 0.999     < 1/2: over 0.999      5
``cubic_rule()``            the same                          > 9/10: times 1/2      < 1/10: times 2        1
``RadiusRule()``            rho, and whether the step is long > 3/4: radius times 2  < 1/10: radius halved  1
``next_batch_radius_rule``  the same on the next batch        > 1/2: radius over 0.9 < -1/2: times 0.9      1
``BestOfThree()``           the model at three candidates     the best of gamma, gamma omega, gamma / omega 20
==========================  ================================  =====================  =====================  ======
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Rule(Protocol):
    """How a strength, lambda or a radius, adapts to the ratio of a step."""

    @property
    def period(self) -> int:
        """Steps from one adaptation to the next."""
        ...

    def adapt(self, strength: jax.Array, step_ratio: jax.Array, /, *, count: jax.Array, step_norm: jax.Array) -> Any:
        """The strength after step number ``count``, from 1, of that norm."""
        ...

    def retreat(self, strength: jax.Array, /) -> jax.Array:
        """The strength after a step that had to be undone."""
        ...


@dataclasses.dataclass(frozen=True)
class DampingRule:
    r"""lambda <- decrease * lambda where rho > good_ratio, lambda <- increase * lambda where rho < bad_ratio.

    rho is the reduction ratio (``curvax.reduction_ratio``); the rule acts once in ``period`` steps and keeps lambda
    from ``minimum`` to ``maximum``. The defaults are those of Martens 2016, section 4.6.5, after Levenberg-Marquardt.

    Attributes:
        good_ratio: Above it the damping falls.
        bad_ratio: Below it the damping grows; -inf, a step that failed, is below everything.
        decrease: The factor in (0, 1] for good steps.
        increase: The factor, at least 1, for bad steps.
        period: Steps from one adaptation to the next (T_1 in K-FAC).
        excess_ratio: Above it, where far more was gained than predicted, the damping hides the curvature and falls by
            ``excess_decrease``; inf for never.
        excess_limit: Up to it: a ratio beyond is noise, and only good.

    Example:
        >>> rule = curvax.damping.DampingRule()
        >>> print(f"{rule.adapt(jnp.array(1.0), jnp.array(0.9), count=1):.4f}")
        0.6667
    """

    good_ratio: float = 3 / 4
    bad_ratio: float = 1 / 4
    decrease: float = 2 / 3
    increase: float = 3 / 2
    period: int = 1
    minimum: float = 1e-12
    maximum: float = 1e12
    excess_ratio: float = math.inf
    excess_limit: float = math.inf
    excess_decrease: float = 1.0

    def __post_init__(self):
        if not (0 < self.decrease <= 1 <= self.increase and self.bad_ratio <= self.good_ratio and self.period >= 1):
            raise ValueError(f"a damping rule needs 0 < decrease <= 1 <= increase and bad <= good ratio, got {self}")

    def adapt(
        self, damping: jax.Array, step_ratio: jax.Array, *, count: jax.Array, step_norm: jax.Array | None = None
    ) -> jax.Array:
        """The damping after step number ``count``, from 1; the rule acts where ``period`` divides it."""
        del step_norm  # is for rules of radii
        factor = jnp.where(step_ratio > self.good_ratio, self.decrease, 1.0)
        excess = (step_ratio > self.excess_ratio) & (step_ratio < self.excess_limit)
        factor = jnp.where(excess, self.excess_decrease, factor)
        factor = jnp.where(step_ratio < self.bad_ratio, self.increase, factor)
        factor = jnp.where(count % self.period == 0, factor, 1.0)
        return jnp.clip(damping * factor.astype(damping.dtype), self.minimum, self.maximum)

    def retreat(self, damping: jax.Array) -> jax.Array:
        """The damping after a step that had to be undone: four times as large."""
        return jnp.minimum(4 * damping, self.maximum)


def kfac_rule(period: int = 5, base: float = 19 / 20) -> DampingRule:
    """The rule of K-FAC: lambda times omega_1 = base^period for good steps, divided by it for bad ones.

    Args:
        period: T_1, steps from one adaptation to the next.
        base: What omega_1 is the ``period``-th power of, so that the rate of change does not depend on the period.

    Example:
        >>> rule = curvax.damping.kfac_rule()
        >>> print(f"{rule.adapt(jnp.array(150.0), jnp.array(0.9), count=5):.2f}")
        116.07

    Source: Martens 2016, section 6.6.5.
    """
    return DampingRule(decrease=base**period, increase=base**-period, period=period)


def next_batch_rule(period: int = 5, base: float = 19 / 20) -> DampingRule:
    """The rule for ratios on data that the step was not computed from: lambda falls above 1/2 and grows below -1/2.

    A step fits its own batch, so on another one it falls short of what was predicted, by more the smaller the batch. In
    the long run of mini-batches the loss stands still and steps only follow the noise: their ratios are zero on
    average, and a lambda that grew there would grow without end. Between the two thresholds it stays, which on deep
    autoencoders leaves it near the best constant (``benchmarks/results/kfac.md``). Between 3/2 and 5/2 more was gained
    than the damped model has, so lambda stands in the way and falls four times as fast: without curvature a step gains
    twice what that model promises, and what is beyond is noise again. Where methods promise the change of their damped
    model, they tell this rule so only if lambda has a part in it that explains the gain.

    Example:
        >>> rule = curvax.damping.next_batch_rule(period=1)
        >>> [round(rule.adapt(jnp.array(1.0), jnp.array(x), count=1).item(), 3) for x in (9.0, 2.0, 0.8, 0.0, -0.8)]
        [0.95, 0.815, 0.95, 1.0, 1.053]
    """
    return DampingRule(
        good_ratio=1 / 2,
        bad_ratio=-1 / 2,
        decrease=base**period,
        increase=base**-period,
        period=period,
        excess_ratio=3 / 2,
        excess_limit=5 / 2,
        excess_decrease=base ** (4 * period),
    )


def curveball_rule(period: int = 5, factor: float = 0.999) -> DampingRule:
    """The rule of CurveBall: lambda times 0.999 where the change is above 3/2 of the predicted, over it below 1/2.

    Example:
        >>> curvax.damping.curveball_rule().adapt(jnp.array(1.0), jnp.array(2.0), count=5).item()
        0.999

    Source: Henriques et al. 2018, section 3.
    """
    return DampingRule(good_ratio=3 / 2, bad_ratio=1 / 2, decrease=factor, increase=1 / factor, period=period)


def cubic_rule(decrease: float = 0.5, increase: float = 2.0) -> DampingRule:
    """The rule of adaptive cubic regularisation: sigma halved above rho = 9/10, doubled below 1/10.

    Example:
        >>> curvax.damping.cubic_rule().adapt(jnp.array(100.0), jnp.array(0.95), count=1).item()
        50.0

    Source: Cartis, Gould and Toint 2011, algorithm 2.1.
    """
    return DampingRule(good_ratio=0.9, bad_ratio=0.1, decrease=decrease, increase=increase)


@dataclasses.dataclass(frozen=True)
class RadiusRule:
    r"""Radius r <- grow * r where rho > good_ratio and the step is long, r <- shrink * r where rho < bad_ratio.

    A step is long if its norm is above ``long_step * r``; a short one says nothing about the edge of the region.
    Source: Nocedal and Wright 2006, algorithm 6.2, which Ramamurthy and Duffy 2017 use for L-SR1.

    Attributes:
        good_ratio: Above it the region may grow.
        bad_ratio: Below it the region shrinks; -inf, a step that failed, is below everything.
        grow: The factor, at least 1, for good long steps.
        shrink: The factor in (0, 1) for bad steps.
        long_step: The fraction of the radius from which on a step is long.

    Example:
        >>> rule = curvax.damping.RadiusRule()
        >>> [rule.adapt(jnp.array(1.0), ratio, step_norm=1.0).item() for ratio in (0.9, 0.5, -1.0)]
        [2.0, 1.0, 0.5]
    """

    good_ratio: float = 3 / 4
    bad_ratio: float = 1 / 10
    grow: float = 2.0
    shrink: float = 1 / 2
    long_step: float = 4 / 5
    minimum: float = 1e-12
    maximum: float = 1e12

    @property
    def period(self) -> int:
        """1: a radius adapts at every step."""
        return 1

    def __post_init__(self):
        if not (0 < self.shrink < 1 <= self.grow and self.bad_ratio <= self.good_ratio and self.long_step >= 0):
            raise ValueError(f"a radius rule needs 0 < shrink < 1 <= grow and bad <= good ratio, got {self}")

    def adapt(
        self, radius: jax.Array, step_ratio: jax.Array, *, step_norm: jax.Array, count: jax.Array | None = None
    ) -> jax.Array:
        """The radius after a step whose norm, in the norm of the region, is ``step_norm``."""
        del count  # is for rules with a period
        factor = jnp.where((step_ratio > self.good_ratio) & (step_norm > self.long_step * radius), self.grow, 1.0)
        factor = jnp.where(step_ratio < self.bad_ratio, self.shrink, factor)
        return jnp.clip(radius * factor.astype(radius.dtype), self.minimum, self.maximum)

    def retreat(self, radius: jax.Array) -> jax.Array:
        """The radius after a step that had to be undone: a quarter."""
        return jnp.maximum(radius / 4, self.minimum)


def next_batch_radius_rule(base: float = 0.9) -> RadiusRule:
    """The rule of ``next_batch_rule`` for radii: r over 0.9 above 1/2 where the step is long, times 0.9 below -1/2.

    Example:
        >>> rule = curvax.damping.next_batch_radius_rule()
        >>> [round(rule.adapt(jnp.array(1.0), x, step_norm=1.0).item(), 3) for x in (0.9, 0.0, -1.0)]
        [1.111, 1.0, 0.9]
    """
    return RadiusRule(good_ratio=1 / 2, bad_ratio=-1 / 2, grow=1 / base, shrink=base)


@dataclasses.dataclass(frozen=True)
class BestOfThree:
    r"""The greedy rule of K-FAC's factored damping gamma: of gamma, omega gamma and gamma / omega the best.

    A damping that enters an approximate inverse cannot be judged by the reduction ratio alone; every ``period`` steps
    all three candidates are tried, and the one with the lowest value of the exact quadratic model is kept. Source:
    Martens 2016, section 6.6.6.

    Attributes:
        factor: omega_2, in (0, 1).
        period: T_2, steps from one trial to the next.

    Example:
        >>> rule = curvax.damping.BestOfThree(factor=0.5)
        >>> rule.candidates(jnp.array(4.0)).tolist(), rule.prefers(jnp.array(-3.0), jnp.array(-1.0)).item()
        ([4.0, 2.0, 8.0], True)
    """

    factor: float = (19 / 20) ** 10
    period: int = 20
    minimum: float = 1e-12
    maximum: float = 1e12

    def __post_init__(self):
        if not (0 < self.factor < 1 and self.period >= 1):
            raise ValueError(f"the rule needs 0 < factor < 1 and a positive period, got {self}")

    def due(self, count: jax.Array) -> jax.Array:
        """Whether the step of that number, from 1, is one of those that try the candidates."""
        return count % self.period == 0

    def candidates(self, gamma: jax.Array) -> jax.Array:
        """gamma, omega gamma and gamma / omega, shape (3,)."""
        factors = jnp.array([1.0, self.factor, 1 / self.factor], gamma.dtype)
        return jnp.clip(gamma * factors, self.minimum, self.maximum)

    def prefers(self, found: jax.Array, best: jax.Array) -> jax.Array:
        """Whether a candidate with the model value ``found`` takes the place of the best one so far."""
        return jnp.isfinite(found) & ((found < best) | ~jnp.isfinite(best))
