"""Krylov subspace descent: the loss itself minimised over a Krylov space of the curvature (Vinyals and Povey 2012)."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.matrices.curvature import Curvature, GaussNewton, check_curvature
from curvax.transforms._step import Given, Step, check_arguments, static_count, stepper


def krylov_subspace_descent(
    *,
    num_vectors: int | None = None,
    max_subspace_iterations: int = 20,
    tolerance: optax.ScalarOrSchedule = 1e-3,
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Krylov subspace descent: delta minimises h(theta + delta) over span{g, B g, B^2 g, ..., last step} by L-BFGS.

    The space contains the conjugate-gradient iterates of every Tikhonov-damped model, so there is no damping to adapt;
    the price is the memory of its basis, and evaluations of loss and gradient in place of products. ``update`` takes
    ``at=``, optionally ``curvature_at=``, a point on another batch for B, and ``held_out_at=``, a point on a batch
    whose loss is minimised over the subspace (that of the curvature otherwise; Vinyals and Povey take three different
    batches).

    Args:
        num_vectors: The dimension of the Krylov space, 20 if None; memory is one copy of the parameters for each.
        tolerance: They stop where the gradient in the subspace has shrunk to this fraction.
        curvature: B, ``curvax.GaussNewton()`` by default.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation, with the subspace's ``dimension``, the last direction counted, in ``state.info.extra``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.krylov_subspace_descent(num_vectors=2, tolerance=1e-6)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 10.0]]), jnp.array([[1.0], [10.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = jax.jit(tx.update)(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)

    Source: Vinyals and Povey 2012; Martens 2016, section 4.6.1.
    """
    check_arguments(krylov_subspace_descent, locals())
    curvature = GaussNewton() if curvature is None else curvature
    check_curvature("krylov_subspace_descent", curvature)

    def step(given: Given) -> Step:
        judged = given.curvature_at if given.held_out_at is None else given.held_out_at
        norm = trees.norm(given.gradient).astype(given.dtype)
        subspace = solvers.krylov_subspace(
            curvature.at(given.curvature_at, given.key).restrict(given.gradient),
            given.gradient,
            num_vectors=static_count("krylov_subspace_descent", "num_vectors", num_vectors, 20),
            # Without a gradient there is nothing to do, not even along the last direction.
            extra=trees.where(norm > 0, given.memory, trees.zeros_like(given.memory)),
        )
        minimum = solvers.minimize_in_subspace(
            lambda delta: judged.loss_along(delta).astype(given.dtype),
            subspace,
            max_iterations=max_subspace_iterations,
            tolerance=given.number(tolerance),
        )
        loss = judged.loss
        figures = {
            "loss": loss,
            "new_loss": minimum.objective,
            "inner_iterations": minimum.iterations,
            "gradient_norm": norm,
            "dimension": jnp.sum(subspace.active),
        }
        finite = trees.all_finite(loss, subspace.matrix)
        return Step(minimum.value, figures, memory=minimum.value, finite=finite)

    return stepper(
        "krylov_subspace_descent",
        step,
        start=trees.zeros_like,
        seed=seed,
        extra={"dimension": jnp.int32},
        points=("at", "curvature_at", "held_out_at"),
    )
