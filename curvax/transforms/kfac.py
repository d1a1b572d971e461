"""K-FAC: natural gradient steps by Kronecker-factored curvature (Martens and Grosse 2015; Martens 2016, chapter 6)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.damping.rules import BestOfThree, DampingRule, kfac_rule, next_batch_rule
from curvax.layers.factors import KroneckerFactors, Sharing, average_factors, factors_of, zero_factors
from curvax.layers.find import Layers
from curvax.layers.inverses import BlockDiagonal, Inverse, precondition
from curvax.layers.taps import tap
from curvax.matrices.curvature import Fisher, GaussNewton, OutputCurvature, check_curvature
from curvax.matrices.plane import inner_products, minimum_in_plane, products_in_plane
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._step import Given, LastStep, Step, Verdict, static_count, stepper
from curvax.types import Array, PyTree


def kfac(
    layers: Layers,
    *,
    inverse: Inverse | None = None,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    judged_by: Literal["next_batch", "same_batch"] = "next_batch",
    gamma_rule: BestOfThree | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: optax.ScalarOrSchedule | None = None,
    max_divergence: optax.ScalarOrSchedule | None = None,
    refresh_period: optax.ScalarOrSchedule = 20,
    statistics_stride: int = 8,
    curvature_stride: int = 4,
    decay: optax.ScalarOrSchedule = 0.95,
    curvature: OutputCurvature | None = None,
    statistics: OutputCurvature | None = None,
    sharing: Sharing = "expand",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    check_choice("judged_by", judged_by, ("next_batch", "same_batch"))
    if rule is None:
        rule = next_batch_rule() if judged_by == "next_batch" else kfac_rule()
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("kfac", curvature, OutputCurvature)
    preconditioner = _Preconditioner(
        "kfac", layers, inverse, statistics, sharing, statistics_stride, refresh_period, decay
    )

    def start(params):
        own = preconditioner.start(params)
        root = jnp.sqrt(jnp.asarray(initial_damping).astype(trees.wide_dtype(*jax.tree.leaves(params))))
        return own if gamma_rule is None else own._replace(gamma=root)

    def step(given: Given) -> Step:
        at, damping, dtype = given.curvature_at, given.strength, given.dtype
        statistics_key, curvature_key = jax.random.split(given.key)
        factors = preconditioner.averaged(given, at, statistics_key)
        part = at.subset(curvature_stride, given.steps)
        gradient, before = (trees.embed(v, at.params) for v in (given.gradient, given.last_change))
        fixed = tuple(None if x is None else given.number(x) for x in (learning_rate, momentum))

        def model(direction) -> tuple[Array, Array]:
            """(alpha, mu) and M(alpha direction + mu before) - M(0), exactly on its part of the batch (KF-10, KF-11)."""
            products = products_in_plane(part, curvature, direction, before, curvature_key).astype(dtype)
            products = products + damping * inner_products(direction, before).astype(dtype)
            slopes = jnp.stack([trees.vdot(gradient, v) for v in (direction, before)]).astype(dtype)
            coefficients = minimum_in_plane(products, slopes, fixed)
            return coefficients, coefficients @ slopes + coefficients @ products @ coefficients / 2

        if gamma_rule is None:
            gamma = jnp.sqrt(damping)
            prepared = preconditioner.refreshed(given, factors, gamma)
            direction = preconditioner.direction(given, prepared, factors, gamma, gradient)
            coefficients, predicted = model(direction)
        else:
            raise NotImplementedError
        alpha, mu = coefficients
        delta = trees.extract(trees.add_scaled(trees.scale(alpha, direction), mu, before), given.gradient)
        loss = given.at.loss.astype(dtype)
        figures = {
            "loss": loss,
            "predicted_change": predicted,
            "damping": damping,
            "step_ratio": given.info.step_ratio,
            "step_size": alpha,
            "momentum": mu,
            "gamma": gamma,
        }
        strength = damping
        if judged_by == "same_batch":

            def measure():
                return reduction_ratio(loss, given.at.loss_along(delta), predicted).astype(dtype)

            count = given.steps + 1
            ratio = jax.lax.cond(count % rule.period == 0, measure, lambda: given.info.step_ratio)
            figures["step_ratio"] = ratio
            strength = rule.adapt(damping, ratio, count=count)
        return Step(
            delta,
            figures,
            memory=Memory(factors, prepared, given.memory.gamma if gamma_rule is None else gamma),
            strength=strength,
            finite=trees.all_finite(loss, predicted),
            guarded=True,
        )

    def judge(last: LastStep, given: Given) -> Verdict:
        """By the loss of this batch, which the last step has not seen, there and here."""
        here, before = given.at.loss.astype(given.dtype), given.info.loss
        bound = 10 * jnp.abs(last.predicted_change)
        # Another batch has another loss: only a rise that no noise explains is worth a forward pass by itself.
        alarming = ~(here - before <= bound + jnp.abs(before) / 4)
        due = (given.steps % rule.period == 0) | alarming

        def measure():
            whole = trees.add(given.at.params, trees.embed(trees.scale(-1.0, given.last_change), given.at.params))
            there = given.at.loss_at(whole).astype(given.dtype)
            return reduction_ratio(there, here, last.predicted_change).astype(given.dtype), ~(here - there <= bound)

        ratio, absurd = jax.lax.cond(due, measure, lambda: (given.info.step_ratio, jnp.array(False)))
        judged = due & (last.predicted_change < 0) & (given.steps > 0)
        strength = jnp.where(judged, rule.adapt(given.strength, ratio, count=given.steps), given.strength)
        return Verdict(jnp.where(judged & absurd, 4 * given.strength, strength), judged & absurd)

    return stepper(
        "kfac",
        step,
        start=start,
        strength=initial_damping,
        seed=seed,
        extra={"momentum": None, "gamma": None},
        points=("at", "curvature_at"),
        judge=judge if judged_by == "next_batch" else None,
        keeps_last=True,
    )


class Memory(NamedTuple):
    """What K-FAC carries from step to step.

    Attributes:
        prepared: What the inverse keeps.
        gamma: The square root of the damping of the factors where it has a life of its own, else ().
    """

    factors: KroneckerFactors
    prepared: Any
    gamma: Any


class _Preconditioner:
    """Statistics and inverses, which ``kfac`` and ``scale_by_kfac`` have in common."""

    def __init__(self, name, layers, inverse, statistics, sharing, stride, period, decay):
        if not isinstance(layers, Layers):
            raise TypeError(f"{name}: the first argument is curvax.find_layers(objective, params, batch), got {layers!r}")
        self.name, self.layers, self.sharing = name, layers, sharing
        self.inverse = BlockDiagonal() if inverse is None else inverse
        self.statistics = Fisher(num_samples=1) if statistics is None else statistics
        check_curvature(name, self.statistics, OutputCurvature)
        self.stride, self.period, self.decay = stride, period, decay

    def own(self, tree: PyTree) -> Layers:
        """The layers of the leaves that this tree has."""
        return self.layers.restricted(trees.leaf_paths(tree))

    def start(self, params: PyTree) -> Memory:
        layers = self.own(params)
        return Memory(zero_factors(layers, self.inverse.pairs(layers)), self.inverse.start(layers), ())

    def averaged(self, given: Given, at: CurvaturePoint, key: Array) -> KroneckerFactors:
        """The running average with the factors of this batch, or of its part for statistics (KF-3, KF-14)."""
        layers = self.own(given.gradient)
        tapped = tap(layers, at.subset(self.stride, given.steps))
        new = factors_of(tapped, key, self.statistics, self.sharing, self.inverse.pairs(layers))
        return average_factors(given.memory.factors, new, given.steps + 1, decay=given.number(self.decay))

    def refreshed(self, given: Given, factors: KroneckerFactors, gamma: Array) -> Any:
        """The inverses, worked out anew where it is time."""
        layers, count = self.own(given.gradient), given.steps + 1
        period = jnp.maximum(jnp.asarray(given.number(self.period)).astype(jnp.int32), 1)
        return jax.lax.cond(
            (count % period == 0) | (count <= 3),
            lambda: self.inverse.prepare(layers, factors, gamma, given.memory.prepared),
            lambda: given.memory.prepared,
        )

    def direction(self, given: Given, prepared: Any, factors: KroneckerFactors, gamma: Array, gradient: PyTree):
        """-F^{-1} g."""
        layers = self.own(given.gradient)
        return trees.scale(-1.0, precondition(layers, self.inverse, prepared, factors, gamma, gradient))
