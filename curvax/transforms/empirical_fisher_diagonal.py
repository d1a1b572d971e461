"""Methods that divide by a power of averaged squares of gradients, the diagonal of an empirical Fisher matrix."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, stepper
from curvax.types import PyTree


def scale_by_empirical_fisher_diagonal(
    *,
    exponent: optax.ScalarOrSchedule = 0.5,
    damping: optax.ScalarOrSchedule = 1e-8,
    average: Literal["decayed", "uniform", "sum"] = "decayed",
    decay: optax.ScalarOrSchedule = 0.99,
    momentum: optax.ScalarOrSchedule = 0.0,
    debias: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The family g / (p + lambda)^xi, elementwise, with p averaged squares of the gradients so far.

    Chain a learning rate behind it. It needs gradients alone, no point. Members that optax has are

    - ``optax.scale_by_rss`` (AdaGrad): "sum", xi = 1/2, lambda its ``initial_accumulator_value`` and ``eps`` together,
    - ``optax.scale_by_rms(eps_in_sqrt=True)`` (RMSProp): "decayed", xi = 1/2, ``debias`` its ``bias_correction``,
    - ``optax.scale_by_adam(eps=0)`` (Adam): "decayed", xi = 1/2, ``momentum`` its b1, lambda its ``eps_root``.

    Here are the others: xi = 1, as for a curvature matrix, with which an average of *all* gradients ("uniform") has
    the better bounds on regret (Hazan et al. 2007), and xi = 3/4 (Martens 2010). The squares are those of the mean
    over a mini-batch; ``curvax.scale_by_diagonal_curvature`` takes those of single examples, or a curvature matrix.

    What to know of it: with xi = 1 a step grows as the gradient falls, so that at a minimum only lambda, or the memory
    of larger gradients, holds it back; "uniform" and "sum" never forget and are poor in practice; with "sum" steps
    shrink like k^-xi, so that xi = 1 wants a learning rate that grows like sqrt(k) for those of AdaGrad; and no one
    lambda suits a whole run, which is a damping and not there for the division alone.

    Args:
        exponent: xi, in (0, 1], a number or a schedule.
        damping: lambda, inside of the power.
        average: Of the squares: "decayed", "uniform" or their "sum".
        decay: Of the first.
        momentum: The decay of an average of the gradients that takes their place above the line, as in Adam.
        debias: Whether averages are divided by 1 minus what they still have of the zero they began with, which the
            first RMSProp does not do.

    Example:
        >>> tx = curvax.scale_by_empirical_fisher_diagonal(exponent=1.0, damping=0.0, average="sum")
        >>> tx.update(jnp.array([4.0, -0.5]), tx.init(jnp.zeros(2)))[0]
        Array([ 0.25, -2.  ], dtype=float...)

    Source: Martens 2016, eq. 5.7.
    """
    check_arguments(scale_by_empirical_fisher_diagonal, locals())
    check_choice("average", average, ("decayed", "uniform", "sum"))

    def start(params: PyTree) -> tuple[PyTree, PyTree]:
        return trees.wide_full(params, 0.0), trees.wide_full(params, 0.0)

    def step(given: Given) -> Step:
        (first, second), gradient = given.memory, trees.widened(given.gradient)
        k = (given.steps + 1).astype(given.dtype)
        b1, b2 = given.number(momentum), given.number(decay)
        old, new = {"decayed": (b2, 1 - b2), "uniform": (1 - 1 / k, 1 / k), "sum": (1.0, 1.0)}[average]
        first = trees.add_scaled(trees.scale(b1, first), 1 - b1, gradient)
        second = trees.add_scaled(trees.scale(old, second), new, trees.multiply(gradient, gradient))
        numerator, p = first, second
        if debias:
            numerator = trees.scale(1 / (1 - b1**k), first)
            p = trees.scale(1 / (1 - b2**k), second) if average == "decayed" else second
        strength, xi = given.number(damping), given.number(exponent)

        def entry(x, square):
            base = square + strength.astype(square.dtype)
            # Where no gradient has ever been there is nothing to divide.
            return x / jnp.where(base > 0, base, 1) ** xi.astype(square.dtype)

        figures = {"damping": strength}
        update = jax.tree.map(entry, numerator, p)
        return Step(update, figures, memory=(first, second), finite=trees.all_finite(second))

    return stepper("scale_by_empirical_fisher_diagonal", step, start=start, points=())
