"""The Kullback-Leibler divergence of a model's predictions between two parameters, and its second order."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_drawn
from curvax.matrices.curvature import Fisher, example_keys
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import weighted_sum
from curvax.types import Array, PyTree


def kl_divergence(
    at: CurvaturePoint,
    params: PyTree,
    *,
    reverse: bool = False,
    key: jax.Array | None = None,
    num_samples: int | None = None,
) -> Array:
    r"""KL(P(theta') || P(theta)) of the predictions at theta' = ``params`` and at the theta of the point.

        KL(P(theta') || P(theta)) = (1/N) sum_i KL(R_{f(x_i, theta')} || R_{f(x_i, theta)})

    Weights and masks count as in the objective; its penalty does not, and targets only where they say which cases have
    one. It has a closed form for the losses of the library and for a loss ``from_function`` with a ``support``. With
    ``key`` and ``num_samples`` it is estimated without bias from targets drawn from the first of the two distributions,
    at the outputs of each example. Such an estimate comes from differences of losses, so that it sees nothing below the
    rounding of these.

    Args:
        params: theta', shaped like the parameters of the point.
        reverse: For KL(P(theta) || P(theta')).
        num_samples: Targets drawn for each example.

    Returns:
        A scalar.

    Raises:
        ValueError: Only one of ``key`` and ``num_samples`` is given, or there is neither closed form nor sampler.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.poisson())
        >>> at = objective.linearize(jnp.zeros((1, 1)), (jnp.ones((1, 1)), jnp.zeros((1, 1))))
        >>> twice = jnp.log(jnp.full((1, 1), 2.0))
        >>> curvax.kl_divergence(at, twice), curvax.kl_divergence(at, twice, reverse=True)
        (Array(0.3862..., dtype=float...), Array(0.3068..., dtype=float...))

    Source: Martens 2016, sections 5.1 and 5.3.
    """
    check_drawn("kl_divergence", key, num_samples)
    trees.check_like(params, at.params, "params")

    def one(piece):
        old, new = piece.outputs, piece.outputs_at(params)
        first, second = (old, new) if reverse else (new, old)
        if num_samples is None:
            return weighted_sum(piece.scale, piece.loss.divergence(first, second, piece.targets))

        def draw(index):
            keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(piece.extra)
            return piece.loss.draw_divergence(keys, first, second, piece.targets)

        return weighted_sum(piece.scale, jnp.mean(jax.vmap(draw)(jnp.arange(num_samples)), axis=0))

    return at.accumulate(one, None if key is None else example_keys(at, key))


def quadratic_divergence(
    at: CurvaturePoint, step: PyTree, *, key: jax.Array | None = None, num_samples: int | None = None
) -> Array:
    r"""1/2 delta^T F delta, which both divergences between theta and theta + delta are to second order.

        KL(P(theta + delta) || P(theta)) = 1/2 delta^T F(theta) delta + O(||delta||^3)

    and so is KL(P(theta) || P(theta + delta)), with another rest. The point may be at either end: F(theta + delta) does
    as well. The mean of both divergences is the mean of both forms up to O(||delta||^4). F is without the objective's
    penalty.

    Args:
        step: delta, shaped like the parameters.
        num_samples: With ``key``, for the Monte-Carlo Fisher matrix; see ``curvax.fisher``.

    Returns:
        A scalar.

    Raises:
        ValueError: Only one of ``key`` and ``num_samples`` is given, or the loss has no exact Fisher matrix.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.poisson())
        >>> at = objective.linearize(jnp.zeros((1, 1)), (jnp.ones((1, 1)), jnp.zeros((1, 1))))
        >>> curvax.quadratic_divergence(at, jnp.log(jnp.full((1, 1), 2.0)))
        Array(0.2402..., dtype=float...)

    Source: Martens 2016, section 5.3.
    """
    check_drawn("quadratic_divergence", key, num_samples)
    return Fisher(num_samples).pullback(at, key).quadratic(step) / 2
