"""Damped Newton methods with a dense matrix, for small problems: Levenberg, Marquardt, saddle-free Newton."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.damping.matrices import Damping, tikhonov
from curvax.damping.rules import DampingRule, next_batch_rule
from curvax.matrices.curvature import Curvature, GaussNewton, check_curvature
from curvax.matrices.linear_map import DenseMap
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.transforms._arguments import check_arguments
from curvax.transforms._judge import JudgedBy, adapted_at_once, judging
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array


def levenberg_marquardt(
    *,
    initial_damping: float = 1.0,
    rule: DampingRule | None = None,
    judged_by: JudgedBy = "next_batch",
    damping_matrix: Damping | None = None,
    curvature: Curvature | None = None,
    absolute: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Levenberg-Marquardt: delta = -(B + lambda D)^{-1} g, with lambda adapted and bad steps rejected.

    The matrix is formed and factorised, so this is for some thousands of parameters at most. A step that does not
    reduce the loss on the batch is not taken and raises lambda; what the others do to lambda, the next batch decides
    where batches change (see ``curvax.hessian_free``). ``update`` takes ``at=``.

    Args:
        rule: How lambda adapts; if None ``next_batch_rule(period=1, base=0.9)`` where batches change, and times 2/3
            above rho = 3/4 and times 3/2 below 1/4 where they do not.
        judged_by: "next_batch", or "same_batch" for the rule on each step's own batch.
        damping_matrix: D: ``curvax.damping.tikhonov()`` by default (Levenberg 1944), or ``scale_sensitive()``, with
            the exact diagonal of B (Marquardt 1963).
        curvature: B, ``curvax.GaussNewton()`` by default.
        absolute: Replace the eigenvalues of B by their absolute values: saddle-free Newton with ``curvax.Hessian()``
            (Dauphin et al. 2014).
        seed: Seed of what ``curvature`` draws.

    Raises:
        ValueError: The curvature may be indefinite and ``absolute`` is not set.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.levenberg_marquardt(initial_damping=1e-6)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 0.0], [0.0, 100.0]]), jnp.array([[1.0], [100.0]]))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = jax.jit(tx.update)(grads, tx.init(w), w, at=at)
        >>> optax.apply_updates(w, updates).round(3)
        Array([[1.],
               [1.]], dtype=float...)
        >>> print(f"{state.info.step_ratio:.3f}")
        1.000
    """
    check_arguments(levenberg_marquardt, locals())
    rule, judge = judging(judged_by, rule, DampingRule(), next_batch_rule(period=1, base=0.9), measured=True)
    solve = _Solve("levenberg_marquardt", damping_matrix, curvature, absolute)

    def step(given: Given) -> Step:
        matrix = solve.matrix(given)
        gradient = trees.ravel(given.gradient)
        flat = -solve(matrix, gradient, given.strength, given)
        delta = trees.unravel(flat, given.gradient)
        predicted = jnp.vdot(gradient, flat) + jnp.vdot(flat, matrix @ flat) / 2
        loss, new_loss = given.at.loss, given.at.loss_along(delta)
        ratio = reduction_ratio(loss, new_loss, predicted).astype(given.dtype)
        figures = {
            "loss": loss,
            "new_loss": new_loss,
            "predicted_change": predicted,
            "step_ratio": ratio,
            "damping": given.strength,
        }
        return Step(
            delta,
            figures,
            strength=adapted_at_once(judge, rule, given, ratio, ratio > 0),
            accepted=ratio > 0,
            # The solution of a matrix that could not be factorised is not finite, and more damping mends that.
            finite=trees.all_finite(loss, matrix),
        )

    return stepper("levenberg_marquardt", step, strength=initial_damping, seed=seed, judge=judge)


def scale_by_dense_curvature(
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_matrix: Damping | None = None,
    curvature: Curvature | None = None,
    absolute: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (B + lambda D)^{-1}, with B formed and factorised; for small problems.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate behind it:
    ``optax.chain(curvax.scale_by_dense_curvature(), optax.scale_by_learning_rate(0.1))``. ``update`` takes ``at=``.

    Args:
        damping: lambda, a number or a schedule.
        damping_matrix: D, as for ``curvax.levenberg_marquardt``.
        curvature: B, ``curvax.GaussNewton()`` by default.
        absolute: Replace the eigenvalues of B by their absolute values.
        seed: Seed of what ``curvature`` draws.

    Raises:
        ValueError: The curvature may be indefinite and ``absolute`` is not set.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_dense_curvature(damping=0.5)
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> tx.update(jnp.ones((2, 1)), tx.init(w), w, at=objective.linearize(w, batch))[0]
        Array([[1.],
               [1.]], dtype=float...)
    """
    check_arguments(scale_by_dense_curvature, locals())
    solve = _Solve("scale_by_dense_curvature", damping_matrix, curvature, absolute)

    def step(given: Given) -> Step:
        strength = given.number(damping)
        scaled = solve(solve.matrix(given), trees.ravel(given.gradient), strength, given)
        return Step(trees.unravel(scaled, given.gradient), {"damping": strength})

    return stepper("scale_by_dense_curvature", step, seed=seed)


class _Solve:
    """(B + lambda D)^{-1} v by Cholesky."""

    def __init__(self, name, damping_matrix, curvature, absolute):
        self.curvature = GaussNewton() if curvature is None else curvature
        self.damping_matrix = tikhonov() if damping_matrix is None else damping_matrix
        self.absolute = absolute
        check_curvature(name, self.curvature)
        if not (self.curvature.definite or absolute):
            raise ValueError(
                f"{name}: {self.curvature} may be indefinite; pass absolute=True to take the absolute values of its"
                " eigenvalues (saddle-free Newton)"
            )

    def matrix(self, given: Given) -> Array:
        matrix = self.curvature.at(given.at, given.key).restrict(given.gradient).to_dense()
        matrix = (matrix + matrix.T) / 2
        if not self.absolute:
            return matrix
        values, vectors = jnp.linalg.eigh(matrix)
        return (vectors * jnp.abs(values)[None]) @ vectors.T

    def __call__(self, matrix: Array, vector: Array, strength: Array, given: Given) -> Array:
        one = jnp.ones((), given.dtype)
        entries = trees.ravel(self.damping_matrix.added(DenseMap.of(matrix, given.gradient), one, given.key).diagonal())
        # D has a floor, as some parameters do nothing.
        entries = jnp.maximum(entries, jnp.finfo(entries.dtype).eps * jnp.max(entries))
        entries = jnp.where(entries > 0, entries, 1)
        damped = matrix + jnp.diag((strength * entries).astype(matrix.dtype))
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), vector.astype(matrix.dtype))
