"""Matrix momentum: a velocity that one step of gradient descent at a time draws to the Newton step."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax

from curvax import trees
from curvax.checks import check_choice
from curvax.matrices.curvature import Curvature, GaussNewton, check_curvature
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, stepper


def scale_by_matrix_momentum(
    inner_rate: optax.ScalarOrSchedule | None = None,
    *,
    damping: optax.ScalarOrSchedule = 0.1,
    moved_by: Literal["new", "old"] = "new",
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the updates g by m <- m + eta (g - B m - lambda m), which tends to (B + lambda I)^{-1} g.

    With a learning rate alpha behind it, ``optax.chain(curvax.scale_by_matrix_momentum(),
    optax.scale_by_learning_rate(alpha))``, the step delta = -alpha m obeys delta <- delta - eta (alpha g + B delta), a
    step of gradient descent on the quadratic model (Martens 2016, eq. 3.6). ``update`` takes ``at=``, whose batch both
    terms are of. It takes one product with B, and without an ``inner_rate`` one quadratic form.

    What to know of it. Where h is quadratic, B its Hessian, alpha = 1 and eta fixed, it is momentum mu = 1 - eta lambda
    with learning rate eta: by the "old" delta classical momentum, by the "new" one Nesterov's. Without damping friction
    is eta B alone, which hardly slows the directions of little curvature: moved by the old delta with alpha = 1 it then
    never comes to rest, and at its best settings it converges like 1 - 1 / kappa, half as fast as gradient descent. As
    B and g are of one batch, and change while m follows them, it is usually begun late, from parameters near a minimum.
    ``curvax.curveball`` is this iteration with the best eta and decay in closed form, and a damping that adapts.

    Args:
        inner_rate: eta, a number or a schedule, below 1 / (lambda_max(B) + lambda); None for the best one along the
            residual r = g - B m - lambda m, r^T r / r^T (B + lambda I) r, with which the model never grows.
        damping: lambda; 0 is the method as published, with which runs on mini-batches often diverge.
        moved_by: The m that is handed on: the "new" one, as in CurveBall, or the "old" one, as the equation reads.
        curvature: B, ``curvax.GaussNewton()`` by default, ``curvax.Fisher()`` (Scarpetta et al. 1999) or
            ``curvax.Hessian()``.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation, with ``inner_rate`` in ``state.info.extra``.

    Raises:
        ValueError: The curvature may be indefinite and there is no ``inner_rate``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = optax.chain(curvax.scale_by_matrix_momentum(damping=0.0), optax.scale(-1.0))
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0], [2.0]]))
        >>> @jax.jit
        ... def step(w, state):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     return optax.apply_updates(w, updates), state
        >>> state = tx.init(w)
        >>> for _ in range(40):
        ...     w, state = step(w, state)
        >>> w.round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Orr and Leen 1996; Rattray and Saad 1998; Martens 2016, section 3.4.2.
    """
    check_arguments(scale_by_matrix_momentum, locals())
    check_choice("moved_by", moved_by, ("new", "old"))
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("scale_by_matrix_momentum", curvature)
    if inner_rate is None and not curvature.definite:
        raise ValueError(
            f"scale_by_matrix_momentum: {curvature} may be indefinite, so that no inner_rate is the best; give one"
        )

    def step(given: Given) -> Step:
        matrix = curvature.at(given.at, given.key).restrict(given.gradient)
        strength, m = given.number(damping), given.memory
        residual = trees.sub(given.gradient, trees.add_scaled(matrix(m), strength, m))
        if inner_rate is None:
            # Along the residual's direction: squares of a small one would vanish.
            norm = trees.norm(residual).astype(given.dtype)
            unit = trees.scale(jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0), residual)
            bend = matrix.quadratic(unit).astype(given.dtype) + strength
            eta = jnp.where(bend > 0, 1 / jnp.where(bend > 0, bend, 1), 0)
        else:
            eta = given.number(inner_rate)
        new = trees.add_scaled(m, eta, residual)
        figures = {"damping": strength, "inner_rate": eta}
        return Step(new if moved_by == "new" else m, figures, memory=new, finite=trees.all_finite(new))

    extra = {"inner_rate": None}
    return stepper("scale_by_matrix_momentum", step, start=trees.zeros_like, seed=seed, extra=extra)
