"""Newton's method with a trust region: truncated conjugate gradients on the exact Hessian, negative curvature used."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from curvax import solvers, trees
from curvax.damping.rules import RadiusRule, next_batch_radius_rule
from curvax.matrices.curvature import Curvature, Hessian, check_curvature
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.transforms._arguments import check_arguments
from curvax.transforms._judge import JudgedBy, judging
from curvax.transforms._step import Given, Step, stepper


def newton_cg(
    *,
    initial_radius: float = 1.0,
    rule: RadiusRule | None = None,
    max_iterations: int = 50,
    tolerance: optax.ScalarOrSchedule = 0.5,
    acceptance: optax.ScalarOrSchedule = 1e-4,
    judged_by: JudgedBy = "next_batch",
    curvature: Curvature | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trust-region Newton: delta minimises g^T delta + 1/2 delta^T H delta in ||delta|| <= r, by Steihaug's method.

    Conjugate gradients run until the residual is below min(tolerance, sqrt(||g|| / ||g_0||)) of the gradient, which
    makes the last steps converge faster than linearly, or until they reach the edge of the region or a direction of
    negative curvature, which they follow to the edge: a saddle point is left along the direction that shows it. A step
    whose reduction ratio rho is not above ``acceptance`` is not taken and shrinks r. ``update`` takes ``at=`` and
    optionally ``curvature_at=``, a point on another batch for the products and the reduction ratio.

    What the step does to the loss of the next batch says how r goes on, and a step that raises that far beyond what
    noise explains is undone. Where the batch stays the same, or with ``judged_by="same_batch"``, rho says it.

    Args:
        rule: How r adapts; if None ``curvax.damping.next_batch_radius_rule()`` where batches change, and where they do
            not doubled above rho = 3/4 for steps to the edge and halved below 1/10. One that is given acts on both.
        tolerance: The loosest relative residual to stop at.
        acceptance: The least rho of a step that is taken.
        judged_by: "next_batch" or "same_batch".
        curvature: ``curvax.Hessian()`` by default.
        seed: Seed of what ``curvature`` draws.

    Returns:
        The transformation, with ``negative_curvature``, whether the step follows it, in ``state.info.extra``.

    Example:
        >>> loss = curvax.losses.from_function(lambda z, y: z**4 / 4 - z**2 / 2, convex=False)     # minima at -1, 1
        >>> objective = curvax.Objective(lambda w, x: x * w, loss)
        >>> tx = curvax.newton_cg()
        >>> w, batch = jnp.array(1e-3), (jnp.ones(1), jnp.zeros(1))                                # next to a maximum
        >>> @jax.jit
        ... def step(w, state):
        ...     loss, grads, at = objective.value_and_grad(w, batch)
        ...     updates, state = tx.update(grads, state, w, at=at)
        ...     return optax.apply_updates(w, updates), state
        >>> state = tx.init(w)
        >>> for _ in range(8):
        ...     w, state = step(w, state)
        >>> print(f"{w:.4f}")
        1.0000

    Source: Steihaug 1983; Nocedal and Wright 2006, algorithm 7.2.
    """
    check_arguments(newton_cg, locals())
    following = next_batch_radius_rule()
    rule, judge = judging(judged_by, rule, RadiusRule(), following, measured=True)
    curvature = Hessian() if curvature is None else curvature
    check_curvature("newton_cg", curvature)

    def step(given: Given) -> Step:
        local = given.curvature_at
        norm = trees.norm(given.gradient).astype(given.dtype)
        first_norm = jnp.where(given.steps == 0, norm, given.memory)
        result = solvers.steihaug(
            curvature.at(local, given.key).restrict(given.gradient),
            trees.scale(-1.0, given.gradient),
            radius=given.strength,
            max_iterations=max_iterations,
            tolerance=jnp.minimum(given.number(tolerance), jnp.sqrt(norm / jnp.where(first_norm > 0, first_norm, 1))),
        )
        loss, new_loss = local.loss, local.loss_along(result.value)
        ratio = reduction_ratio(loss, new_loss, result.model_value).astype(given.dtype)
        accepted = ratio > given.number(acceptance)
        radius = rule.adapt(
            given.strength, jnp.where(accepted, ratio, -jnp.inf), step_norm=result.norm.astype(given.dtype)
        )
        figures = {
            "loss": loss,
            "new_loss": new_loss,
            "predicted_change": result.model_value,
            "step_ratio": ratio,
            "radius": given.strength,
            "inner_iterations": result.iterations,
            "reason": result.reason,
            "gradient_norm": norm,
            "update_norm": result.norm,
            "negative_curvature": result.negative_curvature,
        }
        return Step(
            result.value,
            figures,
            memory=first_norm,
            # Of a step that is taken the next batch says what it was worth.
            strength=radius if judge is None else jnp.where(accepted, given.strength, radius),
            accepted=accepted,
            finite=trees.all_finite(loss, result.model_value) & (result.reason != solvers.StopReason.NON_FINITE),
        )

    return stepper(
        "newton_cg",
        step,
        # The norm of the first gradient, which the accuracy of the solves is measured against.
        start=trees.wide_zero,
        strength=initial_radius,
        seed=seed,
        extra={"negative_curvature": jnp.bool_},
        points=("at", "curvature_at"),
        judge=judge,
    )
