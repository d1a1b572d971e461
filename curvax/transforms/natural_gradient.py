"""Natural gradient descent: steepest descent in the Kullback-Leibler divergence of the model's predictions."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.matrices.curvature import Curvature, Fisher, check_curvature
from curvax.transforms._step import Given, Step, check_arguments, stepper


def natural_gradient(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    max_divergence: optax.ScalarOrSchedule | None = None,
    max_iterations: int = 20,
    tolerance: optax.ScalarOrSchedule = 1e-4,
    warm_start: optax.ScalarOrSchedule = 0.0,
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent, delta = -alpha (F + lambda I)^{-1} g, solved by conjugate gradients.

    With ``max_divergence`` the step is shortened where needed so that 1/2 delta^T F delta, the divergence KL(p_new ||
    p_old) of the predictions to second order, stays within it: alpha is multiplied by min(1, sqrt(2 c / delta^T F
    delta)). Martens 2016 (section 5.5) finds an adapted damping far better than rescaling the undamped step;
    ``hessian_free`` has that. ``update`` takes ``at=`` and optionally ``curvature_at=``, a point on another batch for
    F.

    Args:
        learning_rate: alpha, a number or a schedule.
        damping: lambda, above 0, a number or a schedule.
        max_divergence: The bound c on the divergence of a step, a number or a schedule; None for none.
        tolerance: The relative residual to stop at.
        warm_start: The solve starts from this times the last solution; above 0 only where F changes little.
        curvature: F, ``curvax.Fisher()`` by default; ``curvax.Fisher(num_samples=1)`` draws targets anew at every step.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation, with ``residual``, ||(F + lambda I) x - g|| / ||g||, and ``divergence``, 1/2 delta^T F delta
        (0 without ``max_divergence``) in ``state.info.extra``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.natural_gradient(damping=1e-9)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Amari 1998; Martens 2016, sections 5.3 and 5.5.
    """
    check_arguments(natural_gradient, locals())

    def finished(solution, matrix, given):
        step = trees.scale(-given.number(learning_rate), solution)
        if max_divergence is None:
            return step, 0.0
        divergence = matrix.quadratic(step) / 2
        limit = given.number(max_divergence).astype(divergence.dtype)
        within = divergence <= limit
        factor = jnp.where(within, 1, jnp.sqrt(limit / jnp.where(within, 1, divergence)))
        return trees.scale(factor, step), factor**2 * divergence

    solve = (damping, max_iterations, tolerance, warm_start, curvature, seed)
    return _transformation("natural_gradient", finished, *solve)


def scale_by_natural_gradient(
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    max_iterations: int = 20,
    tolerance: optax.ScalarOrSchedule = 1e-4,
    warm_start: optax.ScalarOrSchedule = 0.0,
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (F + lambda I)^{-1}, by conjugate gradients.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate, momentum or a line search
    behind it: ``optax.chain(curvax.scale_by_natural_gradient(), optax.scale_by_learning_rate(0.1))``. Arguments and
    figures are those of ``curvax.natural_gradient``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_natural_gradient(damping=0.5)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> tx.update(jnp.ones((2, 1)), tx.init(w), w, at=objective.linearize(w, batch))[0]
        Array([[1.],
               [1.]], dtype=float...)

    Source: Amari 1998; Martens 2016, section 5.2.
    """
    check_arguments(scale_by_natural_gradient, locals())
    solve = (damping, max_iterations, tolerance, warm_start, curvature, seed)
    return _transformation("scale_by_natural_gradient", lambda solution, *_: (solution, 0.0), *solve)


def _transformation(name, finished, damping, max_iterations, tolerance, warm_start, curvature, seed):
    """The transformation whose updates are ``finished(solution, F, given)``, with the divergence."""
    curvature = Fisher() if curvature is None else curvature
    check_curvature(name, curvature)

    def step(given: Given) -> Step:
        strength = given.number(damping)
        matrix = curvature.at(given.curvature_at, given.key).restrict(given.gradient)
        result = solvers.cg(
            lambda v: trees.add_scaled(matrix(v), strength, v),
            given.gradient,
            x0=trees.scale(given.number(warm_start), given.memory),
            max_iterations=max_iterations,
            tolerance=given.number(tolerance),
        )
        delta, divergence = finished(result.value, matrix, given)
        norm = trees.norm(given.gradient).astype(given.dtype)
        figures = {
            "damping": strength,
            "inner_iterations": result.iterations,
            "reason": result.reason,
            "gradient_norm": norm,
            "residual": result.residual_norm.astype(given.dtype) / jnp.where(norm > 0, norm, 1),
            "divergence": divergence,
        }
        # A matrix that is not finite ends the solve at its start, which is finite: the reason tells.
        finite = result.reason != solvers.StopReason.NON_FINITE
        return Step(delta, figures, memory=result.value, finite=finite)

    extra = {"residual": None, "divergence": None}
    points = ("at", "curvature_at")
    return stepper(name, step, start=trees.zeros_like, seed=seed, extra=extra, points=points)
