"""SGD-QN: a diagonal of inverse curvature from secant pairs of successive stochastic gradients."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, stepper


def scale_by_sgd_qn(
    *,
    rule: Literal["sum", "average"] = "sum",
    initial_curvature: float = 1.0,
    min_curvature: optax.ScalarOrSchedule = 1e-2,
    max_curvature: optax.ScalarOrSchedule = 1e2,
    weight: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by P, a diagonal of inverse curvature from changes of gradients and of parameters.

    With s the last change of the parameters and y that of the gradient of one batch along it, the rules are, for each
    entry,

    - "sum" (Bordes et al. 2010): 1 / P <- 1 / P + y / s, so that steps shrink like 1 / k by themselves, as is best for
      a strongly convex loss; chain a constant learning rate,
    - "average" (Bordes et al. 2009): P <- (1 - gamma_k) P + gamma_k s / y, gamma_k = 1 / (k + 1): P tends to an inverse
      diagonal, and the learning rate behind it is to fall.

    Whatever stands behind it in a chain has its effect on s. The pair is of the *next* batch, that of ``at=``: both
    gradients are worked out at the new step, one sweep more. The batch of the step itself, as published first, is
    biased, as s is along what is steep for that batch: with single examples of n independent inputs y / s comes out n
    times too large. To have it all the same, or another batch, pass ``curvature_at=``, here
    ``objective.linearize(params, last_batch)``. Ratios along s are those of the diagonal on average only if the entries
    of s are independent of one another (``curvax.estimators.secant_ratios``).

    Args:
        rule: "sum" or "average".
        initial_curvature: 1 / P_0.
        min_curvature: The least that a pair may say of the curvature: y / s and 1 / (s / y) are kept within these
            bounds, as in the papers.
        max_curvature: The most.
        weight: gamma_k of "average", a number or a schedule of k from 0 on.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
        >>> tx = optax.chain(curvax.scale_by_sgd_qn(initial_curvature=10.0), optax.scale(-1.0))
        >>> w, batch = jnp.zeros(2), (jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     _, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     w = optax.apply_updates(w, updates)
        >>> (1 / state[0].memory).round(3)                                  # 10 + 2 h, after two pairs
        Array([12., 18.], dtype=float...)

    Source: Bordes, Bottou and Gallinari 2009; Bordes, Bottou, Gallinari, Chang and Smith 2010; Martens 2016, section
    3.4.5.
    """
    check_arguments(scale_by_sgd_qn, locals())
    check_choice("rule", rule, ("sum", "average"))

    def step(given: Given) -> Step:
        at, like = given.curvature_at, given.gradient
        s = given.last_change
        y = trees.sub(at.value_and_gradient()[1], at.gradient_at(given.last_params))
        s, y = trees.widened(s), trees.widened(trees.extract(y, like))
        least, most = given.number(min_curvature), given.number(max_curvature)
        gamma = 1 / (given.steps.astype(given.dtype) + 1) if weight is None else given.number(weight)

        def secant(p, s, y):
            some = s != 0  # no change, no pair
            if rule == "sum":
                return jnp.where(some, 1 / (1 / p + trees.clip(y / jnp.where(some, s, 1), least, most)), p)
            # No change of the gradient is the least curvature.
            inverse = jnp.where(y == 0, 1 / least, trees.clip(s / jnp.where(y == 0, 1, y), 1 / most, 1 / least))
            return jnp.where(some, p + gamma.astype(p.dtype) * (inverse - p), p)

        p = jax.tree.map(secant, given.memory, s, y)
        return Step(trees.multiply(p, trees.widened(like)), {}, memory=p, finite=trees.all_finite(y))

    return stepper(
        "scale_by_sgd_qn",
        step,
        start=lambda params: trees.wide_full(params, 1 / initial_curvature),
        points=("at", "curvature_at"),
        keeps_last=True,
    )
