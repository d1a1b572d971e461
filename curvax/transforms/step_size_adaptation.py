"""Step sizes of single parameters that grow where successive gradients agree and shrink where they do not.

R-prop, the same with steps of the sign of the gradient alone, is ``optax.rprop`` (whose updates, in optax 0.2.8, are
those of the gradient before). It is for whole batches: noise turns signs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, stepper


def scale_by_silva_almeida(
    *,
    up: optax.ScalarOrSchedule = 1.2,
    down: optax.ScalarOrSchedule | None = None,
    grow_at_zero: bool = False,
    min_scale: optax.ScalarOrSchedule = 1e-6,
    max_scale: optax.ScalarOrSchedule = 1e3,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by P, of which P_jj <- u P_jj where g_j has kept its sign, and d P_jj where it has not.

    P begins with ones; the learning rate behind it, ``optax.chain(curvax.scale_by_silva_almeida(),
    optax.scale_by_learning_rate(0.01))``, is that of the first step. It needs gradients alone, no point. With noisy
    gradients, whose signs agree by chance as often as not, log P drifts by (log u + log d) / 2 in a step: without bound
    unless d = 1 / u (Almeida et al. 1998). ``optax.rprop`` is the same rule for steps of the sign of the gradient.

    Args:
        up: u, above 1, a number or a schedule.
        down: d, below 1; None for 1 / u.
        grow_at_zero: Whether a product of zero raises P, as the equation reads: parameters that have no gradient for
            long, as rows of an embedding, then leap once they have one. By default it leaves P.
        min_scale: The least entry of P; 0 for none.
        max_scale: The largest entry of P; ``jnp.inf`` for none.

    Example:
        >>> tx = curvax.scale_by_silva_almeida(up=2.0)
        >>> state = tx.init(jnp.zeros(3))
        >>> _, state = tx.update(jnp.array([1.0, 1.0, 0.0]), state)
        >>> tx.update(jnp.array([3.0, -3.0, 3.0]), state)[0]
        Array([ 6. , -1.5,  3. ], dtype=float...)

    Source: Silva and Almeida 1990; Martens 2016, eq. 3.1.
    """
    check_arguments(scale_by_silva_almeida, locals())

    def step(given: Given) -> Step:
        p, last = given.memory
        gradient, u = trees.widened(given.gradient), given.number(up)
        d = 1 / u if down is None else given.number(down)
        # At first there is no last gradient.
        still = jnp.where(given.steps > 0, u, 1) if grow_at_zero else jnp.ones((), given.dtype)

        def factor(product):
            return jnp.where(product > 0, u, jnp.where(product < 0, d, still)).astype(product.dtype)

        p = trees.multiply(p, jax.tree.map(factor, trees.multiply(gradient, last)))
        p = trees.clip(p, given.number(min_scale), given.number(max_scale))
        return Step(trees.multiply(p, gradient), {}, memory=(p, gradient))

    return stepper(
        "scale_by_silva_almeida",
        step,
        start=lambda params: (trees.wide_full(params, 1.0), trees.wide_full(params, 0.0)),
        points=(),
    )


def scale_by_almeida(
    meta_rate: optax.ScalarOrSchedule = 0.05,
    *,
    decay: optax.ScalarOrSchedule = 0.95,
    exponential: bool = False,
    min_factor: optax.ScalarOrSchedule = 0.5,
    max_factor: optax.ScalarOrSchedule = 2.0,
    min_scale: optax.ScalarOrSchedule = 1e-6,
    max_scale: optax.ScalarOrSchedule = 1e3,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by P, of which P_jj <- P_jj (1 + alpha g_j g_j^- / v_j) for the last gradient g^-.

    A step of gradient descent on the loss behind the last step, as a function of P: its derivative by P_jj is -g_j
    g_j^-, and alpha P_jj / v_j its rate, with v_j the running average of g_j^2. P begins with ones; the learning rate
    stands behind it, and so does the momentum of the paper: ``optax.chain(curvax.scale_by_almeida(), optax.trace(0.9),
    optax.scale_by_learning_rate(0.01))``. It needs gradients alone, no point. The products are unbiased where the two
    gradients are of independent data, as those of successive mini-batches; on one batch they favour large steps.

    The average v is divided by 1 minus what it still has of its first value, zero, without which the first factors
    would be 1 / (1 - gamma^2) times too far from 1. Source: Almeida, Langlois, Amaral and Plakhov 1998; Martens 2016,
    eq. 3.2.

    Args:
        meta_rate: alpha, a number or a schedule.
        decay: gamma, of the average v.
        exponential: Multiply by exp(alpha g_j g_j^- / v_j), a step in log P_jj. With |g_j g_j^-| in place of v_j that
            is ``curvax.scale_by_silva_almeida`` with u = exp(alpha) = 1 / d.
        min_factor: The least factor in a step; the formula's may be negative.
        max_factor: The largest factor in a step.
        min_scale: The least entry of P.
        max_scale: The largest entry of P; ``jnp.inf`` for none.

    Example:
        >>> tx = curvax.scale_by_almeida(0.1, decay=0.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> _, state = tx.update(jnp.array([1.0, 1.0]), state)
        >>> tx.update(jnp.array([1.0, -2.0]), state)[0]
        Array([ 1.1, -1.9], dtype=float...)
    """
    check_arguments(scale_by_almeida, locals())

    def step(given: Given) -> Step:
        p, last, squares = given.memory
        gradient, rate, gamma = trees.widened(given.gradient), given.number(meta_rate), given.number(decay)
        squares = trees.add_scaled(trees.scale(gamma, squares), 1 - gamma, trees.multiply(gradient, gradient))
        unbiased = 1 - gamma ** (given.steps + 1).astype(given.dtype)

        def factor(product, square):
            mean = square / unbiased.astype(square.dtype)
            change = rate.astype(product.dtype) * product / jnp.where(mean > 0, mean, 1)
            return jnp.exp(change) if exponential else 1 + change

        factors = jax.tree.map(factor, trees.multiply(gradient, last), squares)
        p = trees.multiply(p, trees.clip(factors, given.number(min_factor), given.number(max_factor)))
        p = trees.clip(p, given.number(min_scale), given.number(max_scale))
        return Step(trees.multiply(p, gradient), {}, memory=(p, gradient, squares), finite=trees.all_finite(squares))

    return stepper(
        "scale_by_almeida",
        step,
        start=lambda params: (trees.wide_full(params, 1.0), trees.wide_full(params, 0.0), trees.wide_full(params, 0.0)),
        points=(),
    )
