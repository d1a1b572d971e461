"""Gauss-Newton steps solved in the space of the samples: natural gradient for fewer outputs than parameters."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.layers.find import Layers, find_layers_at
from curvax.layers.sample_space import Curvature, SampleSpace
from curvax.layers.taps import tap_at
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint
from curvax.transforms._point import point_for_update
from curvax.transforms._step import empty_info, finish, next_count

PyTree = Any


class SampleSpaceInfo(NamedTuple):
    """Figures of the last step, all scalars.

    Attributes:
        damping: lambda.
        cg_iterations: Steps of conjugate gradients; 0 where the system was factorised.
        gradient_norm: The norm of the incoming updates.
        update_norm: The norm of what came out.
        skipped_steps: How many steps so far were skipped because something was not finite.
    """

    damping: jax.Array
    cg_iterations: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array
    skipped_steps: jax.Array


class SampleSpaceState(NamedTuple):
    """State of ``scale_by_sample_space``.

    Attributes:
        steps: Steps so far.
        direction: The last result, which ``momentum`` carries over.
        info: Figures of the last step.
    """

    steps: jax.Array
    direction: PyTree
    info: SampleSpaceInfo


def scale_by_sample_space(
    objective: Objective,
    layers: Layers | None = None,
    *,
    damping: float = 1e-3,
    momentum: float = 0.0,
    curvature: Curvature = "ggn",
    method: Literal["auto", "cholesky", "cg"] = "auto",
    max_iterations: int = 40,
    tolerance: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by (G + lambda I)^{-1}, solved in the space of the samples.

    With R the rows of scaled output gradients, G = R^T R and (G + lambda I)^{-1} g = (g - R^T (R R^T + lambda I)^{-1}
    R g) / lambda: a system of the size of the batch times the outputs, whatever the number of parameters. R R^T comes
    from the inputs and output cotangents of the layers. This is the solve of minSR (Chen and Heyl 2024) and of
    Gauss-Newton for physics-informed networks; with ``momentum`` mu it is SPRING's (Goldshlager, Abrahamsen and Lin
    2024), delta_k = mu delta_{k-1} + (G + lambda I)^{-1} (g - mu G delta_{k-1}), the damped solution nearest to mu
    times the last one.

    It preconditions whatever updates arrive and reads no loss value; chain a learning rate behind it. ``update`` takes
    ``at=``, the third result of ``objective.value_and_grad``, or ``batch=``. Inside ``optax.masked`` and
    ``optax.partition`` (with ``at=``) G is that of the leaves it is given. Parameters without structure keep their
    updates. Under ``optax.MultiSteps`` the updates are the mean over the mini-batches and G is that of the last. A step
    in which anything is not finite is skipped and counted.

    Args:
        objective: The objective.
        layers: From ``curvax.find_layers``, with the fallback of your choice; None to find them at the first update,
            where a parameter without structure is an error.
        damping: lambda, above 0.
        momentum: mu, in [0, 1).
        curvature: "ggn", "fisher" or "empirical_fisher".
        method: "cholesky" forms R R^T and factorises it; "cg" solves by conjugate gradients on it; "auto" takes the
            first for up to 1024 rows.
        max_iterations: The cap on conjugate gradient steps.
        tolerance: The relative residual at which they stop.

    Returns:
        The transformation.

    Raises:
        ValueError: The model couples examples; ``update`` got neither or both of ``at=`` and ``batch=``, or updates
            that are not the parameters'.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((3, 1)), (jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), jnp.array([[1.0], [4.0]]))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tx = optax.chain(curvax.scale_by_sample_space(objective, layers, damping=1e-6), optax.scale(-1.0))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> print((w + updates)[:, 0].round(3))
        [1. 2. 0.]
    """

    def init(params: PyTree) -> SampleSpaceState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        return SampleSpaceState(
            steps=jnp.zeros((), jnp.int32),
            direction=trees.zeros_like(params),
            info=empty_info(SampleSpaceInfo, dtype, cg_iterations=jnp.int32, skipped_steps=jnp.int32),
        )

    def update(
        updates: PyTree,
        state: SampleSpaceState,
        params: PyTree = None,
        *,
        at: CurvaturePoint | None = None,
        batch: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, SampleSpaceState]:
        del extra
        at = point_for_update("scale_by_sample_space", objective, updates, params, at, batch)
        found = find_layers_at(at) if layers is None else layers
        paths = trees.leaf_paths(updates)
        given = [i for i, path in enumerate(found.paths) if path in paths]
        space = SampleSpace(tap_at(found, at), curvature, given)
        dtype = state.info.damping.dtype
        strength = jnp.asarray(damping, dtype)
        start = trees.embed(trees.scale(momentum, state.direction), at.params)
        right = trees.embed(updates, at.params)
        if not (isinstance(momentum, (int, float)) and momentum == 0):
            right = trees.sub(right, space.lift(space.project(start)))
        solution, iterations = space.solve(
            right, strength, method=method, max_iterations=max_iterations, tolerance=tolerance
        )
        result = trees.cast_like(trees.extract(trees.add(start, solution), updates), updates)
        info = SampleSpaceInfo(
            damping=strength,
            cg_iterations=iterations.astype(jnp.int32),
            gradient_norm=trees.norm(updates).astype(dtype),
            update_norm=trees.norm(result).astype(dtype),
            skipped_steps=state.info.skipped_steps,
        )
        taken = SampleSpaceState(next_count(state.steps), result, info)
        return finish(trees.all_finite(updates, result), result, taken, state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
