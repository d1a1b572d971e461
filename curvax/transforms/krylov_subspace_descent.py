"""Krylov subspace descent: the loss itself minimised over a Krylov space of the curvature (Vinyals and Povey 2012)."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.rules import DampingRule, next_batch_rule
from curvax.matrices.curvature import Curvature, GaussNewton, check_curvature
from curvax.transforms._arguments import check_arguments, static_count
from curvax.transforms._judge import JudgedBy, begun, judging
from curvax.transforms._step import Given, Step, stepper


def krylov_subspace_descent(
    *,
    num_vectors: int | None = None,
    max_subspace_iterations: int = 20,
    tolerance: optax.ScalarOrSchedule = 1e-3,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Krylov subspace descent: delta minimises h(theta + delta) over span{g, B g, B^2 g, ..., last step} by L-BFGS.

    The space contains the conjugate-gradient iterates of every Tikhonov-damped model, so the method as published has no
    damping; the price is the memory of its basis, and evaluations of loss and gradient in place of products. A step
    that minimises the loss of one mini-batch overfits it. By default lambda / 2 ||delta||^2 is therefore added to what
    is minimised; lambda begins with the curvature along the first gradient, falls where a step lowers the loss of the
    next batch by half of what it did on its own and grows where it raises it by as much, and on one batch goes to
    zero. ``update`` takes
    ``at=``, optionally ``curvature_at=``, a point on another batch for B, and ``held_out_at=``, a point on a batch
    whose loss is minimised over the subspace (that of the curvature otherwise; Vinyals and Povey take three different
    batches).

    Args:
        num_vectors: The dimension of the Krylov space, 20 if None; memory is one copy of the parameters for each.
        tolerance: They stop where the gradient in the subspace has shrunk to this fraction.
        rule: How lambda adapts, ``curvax.damping.next_batch_rule(period=1, base=0.9)`` if None.
        judged_by: "next_batch", or "same_batch" for the method as published, without lambda.
        curvature: B, ``curvax.GaussNewton()`` by default.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation, with the subspace's ``dimension``, the last direction counted, in ``state.info.extra``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.krylov_subspace_descent(num_vectors=2, tolerance=1e-6, judged_by="same_batch")
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
    if rule is not None and judged_by == "same_batch":
        raise ValueError(
            "krylov_subspace_descent: rule= adapts lambda, which judged_by='same_batch' does without; leave one of them"
        )

    following = next_batch_rule(period=1, base=0.9)
    _, judge = judging(judged_by, rule, DampingRule(), following, measured=True)

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
        kept = damping = jnp.zeros((), given.dtype)
        if judge is not None:
            kept, damping = begun(given.strength, lambda: subspace.matrix[0, 0])  # g^T B g / g^T g

        def objective(delta):
            loss = judged.loss_along(delta).astype(given.dtype)
            return loss if judge is None else loss + penalty(delta)

        def penalty(delta):
            return damping / 2 * trees.vdot(delta, delta).astype(given.dtype)

        minimum = solvers.minimize_in_subspace(
            objective,
            subspace,
            max_iterations=max_subspace_iterations,
            tolerance=given.number(tolerance),
        )
        loss = judged.loss.astype(given.dtype)
        new_loss = minimum.objective if judge is None else minimum.objective - penalty(minimum.value)
        figures = {
            "loss": loss,
            "new_loss": new_loss,
            "damping": damping,
            "inner_iterations": minimum.iterations,
            "gradient_norm": norm,
            "dimension": jnp.sum(subspace.active),
        }
        finite = trees.all_finite(loss, subspace.matrix)
        if judge is None:
            return Step(minimum.value, figures, memory=minimum.value, finite=finite)
        figures["step_ratio"] = jnp.ones((), given.dtype)  # on its own batch a step does what was found there
        return Step(
            minimum.value,
            figures,
            memory=minimum.value,
            strength=kept,
            finite=finite,
            change=new_loss - loss,
            loss_behind=new_loss if judged is given.at else jnp.full((), jnp.nan, given.dtype),
        )

    return stepper(
        "krylov_subspace_descent",
        step,
        start=trees.zeros_like,
        seed=seed,
        extra={"dimension": jnp.int32},
        points=("at", "curvature_at", "held_out_at"),
        judge=judge,
        forget=trees.zeros_like,
    )
