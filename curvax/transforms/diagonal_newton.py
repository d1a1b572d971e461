"""Newton's method with a diagonal in the place of the matrix: Becker and LeCun's, and LeCun's running average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.checks import check_at_least, check_choice
from curvax.damping.rules import DampingRule, next_batch_rule
from curvax.estimators.chapelle_erhan import chapelle_erhan_diagonal
from curvax.matrices.curvature import ggn
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._arguments import check_arguments
from curvax.transforms._judge import begun, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree

DiagonalOf = Callable[[CurvaturePoint, Array], PyTree]
"""(point, key) -> a diagonal, as a pytree like the parameters."""


def diagonal_newton(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    initial_damping: float | None = None,
    rule: DampingRule | None = None,
    diagonal: DiagonalOf | None = None,
    negative: Literal["absolute", "zero"] = "absolute",
    decay: optax.ScalarOrSchedule = 0.9,
    period: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Diagonal Newton: delta_j = -alpha g_j / (d_j + lambda), with lambda adapted by the loss of the next batch.

    d is a diagonal of the curvature averaged over the steps, and lambda Tikhonov's damping of the model: no one value
    suits a whole run (Martens 2016, section 3.4.4). It begins with the mean curvature along the first gradient, and a
    step that raises the loss of the next batch far beyond what noise explains is undone. The model is g^T delta + 1/2
    delta^T (G + lambda I) delta with the whole matrix G, one push forward, and alpha by default its minimum along the
    direction: a diagonal promises too much wherever parameters work together. The diagonal is

    - ``diagonal=None``: an unbiased estimate of that of the Gauss-Newton matrix, a sweep at every step,
    - LeCun et al. 1998: ``lambda at, key: curvax.estimators.becker_lecun_diagonal(at)``,
    - Becker and LeCun 1989: the same with ``hessian=True``, in absolute value, and ``decay=0``,
    - any other of ``curvax.estimators`` and, of tapped points, ``curvax.layers``: ``lambda at, key:
      curvax.layers.exact_ggn_diagonal(curvax.tap(layers, at))``.

    Whatever it is, a diagonal cannot see ravines across the axes: with B = u u^T + a v v^T, u = (-1, 1), v = (1, 1) it
    is a + 1 for both parameters, and O(a) steps are needed where the matrix needs one. ``update`` takes ``at=`` and
    optionally ``curvature_at=``, a point on another batch for the diagonal.

    Args:
        learning_rate: A bound on alpha, a number or a schedule, which the papers tune; without, and where that is
            smaller, alpha is the best one by the model.
        initial_damping: The lambda that adapting begins with; if None sum_j d_j g_j^2 / g^T g for the first gradient.
        rule: How it adapts, ``curvax.damping.next_batch_rule(period=1, base=0.9)`` if None.
        diagonal: (point, key) -> d; under ``optax.inject_hyperparams`` name it in ``static_args``.
        negative: What negative entries count as: their "absolute" values, which speeds up along small negative
            curvature and slows down along large, or "zero", which leaves them the step 1 / lambda.
        decay: Of the running average of d; 0 for the present one alone.
        period: d is estimated anew every so many steps.
        seed: Seed of the keys.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.diagonal_newton(initial_damping=1e-6)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 100.0]]), jnp.array([[1.0], [100.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Becker and LeCun 1989; LeCun, Bottou, Orr and Mueller 1998; Martens 2016, section 3.4.4.
    """
    check_arguments(diagonal_newton, locals())
    average = _Average("diagonal_newton", diagonal, negative, decay, period)
    following = next_batch_rule(period=1, base=0.9)
    _, judge = judging("next_batch", rule, following, following, damped=True)

    def step(given: Given) -> Step:
        d, total = average(given)
        gradient = trees.widened(given.gradient)

        def along_gradient():
            size = trees.norm(gradient).astype(given.dtype)
            unit = trees.scale(jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0), gradient)
            return trees.vdot(trees.multiply(d, unit), unit)

        if initial_damping is None:
            kept, strength = begun(given.strength, along_gradient)
        else:
            kept = strength = given.strength
        direction = trees.cast_like(_divided(gradient, d, strength, 1.0), given.gradient)
        slope = trees.vdot(given.gradient, direction).astype(given.dtype)
        bend = ggn(given.curvature_at).restrict(given.gradient).quadratic(direction).astype(given.dtype)
        bend = bend + strength * trees.vdot(direction, direction).astype(given.dtype)
        rate = jnp.where(bend > 0, slope / jnp.where(bend > 0, bend, 1), 0)
        if learning_rate is not None:
            rate = jnp.minimum(rate, given.number(learning_rate))
        figures = {
            "loss": given.at.loss,
            "damping": strength,
            "step_size": rate,
            "predicted_change": rate**2 * bend / 2 - rate * slope,
            "step_ratio": given.info.step_ratio,
        }
        finite = trees.all_finite(given.at.loss, total, rate)
        return Step(trees.scale(-rate, direction), figures, memory=total, strength=kept, finite=finite)

    return stepper(
        "diagonal_newton",
        step,
        start=average.start,
        strength=0.0 if initial_damping is None else initial_damping,
        seed=seed,
        points=("at", "curvature_at"),
        judge=judge,
    )


def scale_by_diagonal_curvature(
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    exponent: optax.ScalarOrSchedule = 1.0,
    diagonal: DiagonalOf | None = None,
    negative: Literal["absolute", "zero"] = "absolute",
    decay: optax.ScalarOrSchedule = 0.9,
    period: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides the updates by (d + lambda)^xi, with a diagonal d of the curvature averaged over the steps.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate behind it:
    ``optax.chain(curvax.scale_by_diagonal_curvature(), optax.scale_by_learning_rate(0.1))``. With the squares of the
    gradients of single examples, ``diagonal=lambda at, key: curvax.layers.empirical_fisher_diagonal(curvax.tap(layers,
    at))``, and xi = 3/4 it is the preconditioner of Martens 2010; ``curvax.scale_by_empirical_fisher_diagonal`` has
    squares of the mean gradient. The other arguments are those of ``curvax.diagonal_newton``.

    Args:
        damping: lambda, a number or a schedule.
        exponent: xi, from 0 to 1; below 1 it relies less on the diagonal.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_diagonal_curvature(damping=0.5)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> tx.update(jnp.ones((2, 1)), tx.init(w), w, at=objective.linearize(w, batch))[0]
        Array([[1.],
               [1.]], dtype=float...)

    Source: LeCun, Bottou, Orr and Mueller 1998; Martens 2016, sections 3.4.4 and 5.6.2.
    """
    check_arguments(scale_by_diagonal_curvature, locals())
    average = _Average("scale_by_diagonal_curvature", diagonal, negative, decay, period)

    def step(given: Given) -> Step:
        d, total = average(given)
        strength = given.number(damping)
        scaled = _divided(trees.widened(given.gradient), d, strength, given.number(exponent))
        return Step(scaled, {"damping": strength}, memory=total, finite=trees.all_finite(total))

    points = ("at", "curvature_at")
    return stepper("scale_by_diagonal_curvature", step, start=average.start, seed=seed, points=points)


class _Average:
    """The running average of a diagonal, no entry below zero, and for the memory the total that it comes from."""

    def __init__(self, name, diagonal, negative, decay, period):
        if diagonal is not None and not callable(diagonal):
            raise TypeError(f"{name}: diagonal= takes a function (point, key) -> diagonal, got {diagonal!r}")
        check_choice("negative", negative, ("absolute", "zero"))
        self.diagonal = _sampled if diagonal is None else diagonal
        self.negative, self.decay, self.period = negative, decay, check_at_least("period", period, 1)

    def start(self, params: PyTree) -> PyTree:
        return trees.wide_full(params, 0.0)

    def __call__(self, given: Given) -> tuple[PyTree, PyTree]:
        decay = given.number(self.decay)

        def estimated():
            found = trees.extract(self.diagonal(given.curvature_at, given.key), given.gradient)
            return trees.add_scaled(trees.scale(decay, given.memory), 1 - decay, found)

        total = jax.lax.cond(given.steps % self.period == 0, estimated, lambda: given.memory)
        share = 1 - decay ** (given.steps // self.period + 1).astype(given.dtype)  # the rest is the zero it began with
        mean = trees.scale(1 / share, total)
        return jax.tree.map(jnp.abs if self.negative == "absolute" else jax.nn.relu, mean), total


def _sampled(at, key):
    return chapelle_erhan_diagonal(ggn(at), key)


def _divided(gradient, d, strength, exponent):
    """g / (d + lambda)^xi, 0 where both are 0."""

    def entry(g, x):
        shifted = x + strength.astype(x.dtype)
        return jnp.where(g == 0, 0, g / jnp.where(g == 0, 1, shifted) ** jnp.asarray(exponent, x.dtype))

    return jax.tree.map(entry, gradient, d)
