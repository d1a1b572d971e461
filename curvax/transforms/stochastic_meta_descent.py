"""Stochastic meta-descent: step sizes of single parameters, learnt by gradient descent through the steps so far."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.matrices.curvature import Curvature, GaussNewton, check_curvature
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, stepper


def scale_by_stochastic_meta_descent(
    initial_scale: float,
    *,
    meta_rate: optax.ScalarOrSchedule = 1.0,
    memory_decay: optax.ScalarOrSchedule = 0.95,
    exponential: bool = False,
    min_factor: optax.ScalarOrSchedule = 0.5,
    max_factor: optax.ScalarOrSchedule = 2.0,
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates g by step sizes p of the parameters, which follow the gradient of the loss in log p.

    p <- p * (1 - mu g * v), elementwise, and then v <- lambda v - p * (g + lambda G v), where v is how the parameters
    depend on log p through all steps so far, of which lambda forgets. Chain ``optax.scale(-1.0)`` behind it: p are the
    learning rates, and with another factor v is not what it stands for. ``update`` takes ``at=``; a step takes one
    product with G.

    Fixed points. If nothing changes, v tends to -(lambda G + (1 - lambda) diag(1/p))^{-1} g, which is the Newton step
    only for lambda = 1. lambda = 0 leaves products of successive gradients, as in ``curvax.scale_by_almeida``. v itself
    is a gradient descent with rates p, and grows without bound where p is above 2 / lambda_max(G): the bounds of the
    factor are for that. As all methods of one number for each parameter it is of little help in ravines that run across
    the axes (Schraudolph et al. 2007).

    Args:
        initial_scale: p_0, the first learning rate of all parameters.
        meta_rate: mu, a number or a schedule; g * v has the scale of the loss, and so has 1 / mu.
        memory_decay: lambda, in [0, 1]; Schraudolph takes 1 minus a few hundredths or less.
        exponential: Multiply p by exp(-mu g * v), in place of what that is to first order.
        min_factor: The least factor by which an entry of p may change in a step, Schraudolph's 1/2.
        max_factor: The largest, which Schraudolph does not bound: ``jnp.inf``.
        curvature: G, ``curvax.GaussNewton()`` by default. ``curvax.Hessian()`` is what the derivation has, and is not
            positive semi-definite.
        seed: Seed of what ``curvature`` draws.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = optax.chain(curvax.scale_by_stochastic_meta_descent(0.1), optax.scale(-1.0))
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0], [2.0]]))
        >>> @jax.jit
        ... def step(w, state):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     return optax.apply_updates(w, updates), state
        >>> state = tx.init(w)
        >>> for _ in range(150):
        ...     w, state = step(w, state)
        >>> w.round(2)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Schraudolph 1999 and 2002; Martens 2016, section 3.4.3, where eq. 3.10 has the gradient one step too late.
    """
    check_arguments(scale_by_stochastic_meta_descent, locals())
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("scale_by_stochastic_meta_descent", curvature)

    def start(params):
        return trees.wide_full(params, initial_scale), trees.wide_full(params, 0.0)

    def step(given: Given) -> Step:
        p, v = given.memory
        gradient, decay, rate = trees.widened(given.gradient), given.number(memory_decay), given.number(meta_rate)
        falls = trees.scale(-rate, trees.multiply(gradient, v))
        factor = jax.tree.map(jnp.exp if exponential else lambda x: 1 + x, falls)
        p = trees.multiply(p, trees.clip(factor, given.number(min_factor), given.number(max_factor)))
        matrix = curvature.at(given.at, given.key).restrict(given.gradient)
        curved = trees.cast_like(matrix(trees.cast_like(v, given.gradient)), v)
        step_and_bend = trees.multiply(p, trees.add_scaled(gradient, decay, curved))
        v = trees.sub(trees.scale(decay, v), step_and_bend)
        return Step(trees.multiply(p, gradient), {}, memory=(p, v), finite=trees.all_finite(p, v))

    return stepper("scale_by_stochastic_meta_descent", step, start=start, seed=seed)
