"""Cubic-regularised learning rates: how far to go along the direction of any other optimiser, in closed form."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from curvax import trees
from curvax.damping.rules import DampingRule
from curvax.estimators.curvature_propagation import sampled_hessian_diagonal
from curvax.layers.find import Layers, find_layers_at
from curvax.layers.taps import tap
from curvax.matrices.curvature import hessian
from curvax.matrices.quadratic_model import reduction_ratio
from curvax.objectives.objective import Objective
from curvax.transforms._arguments import check_arguments
from curvax.transforms._step import Given, Step, stepper
from curvax.types import Array, PyTree, Scalar

Scope = Literal["whole", "layer", "leaf", "variable"]


def cubic_step_size(slope: Scalar, curvature: Scalar, norm: Scalar, sigma: Scalar) -> Array:
    r"""The alpha >= 0 that minimises a alpha + c alpha^2 / 2 + sigma ||d||^3 alpha^3 / 6, for a <= 0.

    With a = d^T grad and c = d^T H d it is the step along d to the minimum of the cubic model of Nesterov and Polyak:
    -a/c where the curvature dominates, sqrt(-2a / (sigma ||d||^3)) on flat ground, and 2|c| / (sigma ||d||^3) where
    negative curvature does. alpha d does not depend on the length of d. The form that does not cancel is used on either
    side of c = 0, and lengths are taken out first, so that ||d||^3 neither over- nor underflows.

    Args:
        slope: a; a positive one counts as zero, so use -d then.
        curvature: c, of either sign.
        norm: ||d||.
        sigma: The weight of the cubic term, not negative.

    Returns:
        alpha; zero where d is zero, or where the model falls without end (a < 0, c <= 0, sigma = 0).

    Example:
        >>> curvax.transforms.cubic_step_size(-3.0, 1.0, 1.0, 0.0).item()                # Newton's step
        3.0
        >>> curvax.transforms.cubic_step_size(-2.0, 0.0, 1.0, 1.0).item()                # flat ground
        2.0

    Source: the closed form of "Understanding and exploiting the low-rank structure of deep networks" (2018), eq. 9;
        Nesterov and Polyak 2006.
    """
    slope, curvature, norm, sigma = (jnp.asarray(x) for x in (slope, curvature, norm, sigma))
    some = norm > 0
    length = jnp.where(some, norm, 1)
    # In the unit direction: a t + c t^2 / 2 + sigma t^3 / 6.
    a, c = jnp.minimum(slope / length, 0), curvature / length / length
    root = jnp.hypot(c, jnp.sqrt(-2 * a * sigma))
    upwards, downwards = c + root, root - c
    curved = c > 0
    stable = -2 * a / jnp.where(curved & (upwards > 0), upwards, 1)
    other = downwards / jnp.where(~curved & (sigma > 0), sigma, 1)
    distance = jnp.where(curved, stable, jnp.where(sigma > 0, other, 0))
    return jnp.where(some, distance / length, 0)


def scale_by_cubic_step(
    inner: optax.GradientTransformation,
    *,
    sigma: optax.ScalarOrSchedule = 100.0,
    scope: Scope = "whole",
    rule: DampingRule | None = None,
    acceptance: optax.ScalarOrSchedule | None = None,
    ascent: Literal["turn", "keep"] = "turn",
    layers: Layers | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Goes along the updates d of any optax transformation to the minimum of the cubic model: alpha d.

    alpha minimises d^T g alpha + d^T H d alpha^2 / 2 + sigma ||d||^3 alpha^3 / 6 with the exact Hessian, so it is large
    on a plateau, where slope and curvature are small, and falls where the ground curves. d^T H d is two forward passes.
    alpha d does not depend on the length of d: the inner learning rate is of no account. ``update`` takes ``at=``,
    which is handed on to the inner transformation; a step that is skipped leaves the inner state as it was.

    Args:
        inner: Any transformation: ``optax.sgd(1.0)``, ``optax.adagrad(0.1)``, ``optax.adam(1e-3)``.
        sigma: The weight of the cubic term, a number or a schedule, or with a rule the number that it begins with. Its
            order of magnitude matters (the paper takes 100 to 1000).
        scope: "whole": one alpha. "layer": one for each layer, the weights and the bias that rides on them, with its
            block of the Hessian; parameters without a layer leaf by leaf. "leaf": one for each leaf. "variable": one
            for each parameter, with the diagonal.
        rule: How sigma adapts, such as ``curvax.damping.cubic_rule()``, at the price of a forward pass; None keeps it.
        acceptance: With a rule, the least ratio of a step that is taken (0.1 in Cartis, Gould and Toint 2011); None
            takes every step, as the paper does.
        ascent: What to do with a d that points upwards, which momentum and noise bring about: "turn" it round, or
            "keep" the inner update as it is.
        layers: From ``curvax.find_layers``: for "variable" the diagonal is then estimated by curvature propagation
            (``curvax.estimators.sampled_hessian_diagonal``); without, it is exact, for small problems. For "layer" they
            are looked for at trace time where they are not given.
        seed: Seed of that estimate.

    Returns:
        The transformation. ``step_size`` is alpha, ||update|| / ||d||, negative where d was turned round; in ``extra``
        ``sigma``, ``slope`` d^T g, and ``curvature`` d^T H d, by leaves and variables of the diagonal blocks.

    Raises:
        ValueError: An unknown scope.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
        >>> tx = curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=1e-6)
        >>> w, batch = jnp.array(3.0), (jnp.full((1,), 2.0), jnp.zeros(1))
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> updates, state = tx.update(grads, tx.init(w), w, at=at)
        >>> print(f"{optax.apply_updates(w, updates):.4f} {state.info.step_size:.4f}")   # Newton's step: alpha = 1 / 4
        0.0000 0.2500

    Source: "Understanding and exploiting the low-rank structure of deep networks" (2018), section 3.
    """
    check_arguments(scale_by_cubic_step, locals())
    if scope not in ("whole", "layer", "leaf", "variable"):
        raise ValueError(f"scope must be 'whole', 'layer', 'leaf' or 'variable', got {scope!r}")
    if ascent not in ("turn", "keep"):
        raise ValueError(f"ascent must be 'turn' or 'keep', got {ascent!r}")
    if acceptance is not None and rule is None:
        raise ValueError("acceptance needs a rule, such as curvax.damping.cubic_rule(), to try another sigma by")
    if rule is not None and callable(sigma):
        raise ValueError("with a rule sigma adapts: give the number that it begins with, not a schedule")
    inner = optax.with_extra_args_support(inner)

    def step(given: Given) -> Step:
        at, dtype = given.at, given.dtype
        weight = given.number(sigma) if rule is None else given.strength
        direction, inner_state = inner.update(given.gradient, given.memory, given.params, at=at, **given.extra)

        leaves, treedef = jax.tree.flatten(direction)
        moves, slope, curvature, change = list(leaves), 0.0, 0.0, 0.0
        for places, a, c, norm in _groups(scope, given, direction, layers):
            sign = jnp.where(a > 0, -1, 1).astype(dtype)
            alpha = sign * cubic_step_size(-jnp.abs(a), c, norm, weight)
            if ascent == "keep":
                alpha = jnp.where(a > 0, jnp.ones_like(alpha), alpha)
            for place in places:
                moves[place] = (alpha * leaves[place].astype(dtype)).astype(leaves[place].dtype)
            reach = jnp.abs(alpha) * norm
            change += jnp.sum(a * alpha + c * alpha * alpha / 2 + weight * reach**3 / 6)
            slope, curvature = slope + jnp.sum(a), curvature + jnp.sum(c)
        delta = treedef.unflatten(moves)

        norm, length = trees.norm(direction).astype(dtype), trees.norm(delta).astype(dtype)
        turned = jnp.where(trees.vdot(direction, delta) < 0, -1, 1).astype(dtype)
        figures = {
            "loss": at.loss,
            "predicted_change": change,
            "step_size": turned * length / jnp.where(norm > 0, norm, 1),
            "update_norm": length,
            "sigma": weight,
            "slope": slope,
            "curvature": curvature,
        }
        strength, accepted = weight, None
        if rule is not None:
            figures["new_loss"] = at.loss_along(delta)
            figures["step_ratio"] = reduction_ratio(at.loss, figures["new_loss"], change).astype(dtype)
            strength = rule.adapt(weight, figures["step_ratio"], count=given.steps + 1)
            accepted = None if acceptance is None else figures["step_ratio"] > given.number(acceptance)
        return Step(delta, figures, inner_state, strength, accepted, trees.all_finite(figures["loss"], delta))

    return stepper(
        "scale_by_cubic_step",
        step,
        start=inner.init,
        strength=0.0 if callable(sigma) else sigma,
        seed=seed,
        extra=dict.fromkeys(("sigma", "slope", "curvature")),
    )


def cubic_step_of_examples(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    sigma: float = 100.0,
    average: Literal["steps", "step_sizes", "batch"] = "batch",
) -> PyTree:
    r"""The cubic step along the negative gradient, averaged over the examples in one of three ways, for study.

    "steps" is E[alpha_j g_j], the mean of every example's own step; "step_sizes" is E[alpha_j] E[g_j]; "batch" fixes
    the batch's direction and solves once for the mean slope and curvature, as ``scale_by_cubic_step`` does. The paper
    finds the first two too noisy to be of use.

    Args:
        batch: The batch, its examples on axis 0 of every leaf.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
        >>> batch = (jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> mean_of_steps = {"sigma": 1e-6, "average": "steps"}
        >>> step = curvax.transforms.cubic_step_of_examples(objective, jnp.array(1.0), batch, **mean_of_steps)
        >>> print(f"{step:.3f}")
        -1.000
    """

    def of(batch):
        gradient = jax.grad(objective)(params, batch)
        along = trees.scale(-1.0, gradient)
        curvature = hessian(objective.linearize(params, batch)).quadratic(along)
        norm = trees.norm(along)
        alpha = cubic_step_size(trees.vdot(gradient, along), curvature, norm, jnp.asarray(sigma, norm.dtype))
        return along, alpha, trees.scale(alpha, along)

    if average == "batch":
        return of(batch)[2]
    if average not in ("steps", "step_sizes"):
        raise ValueError(f"average must be 'steps', 'step_sizes' or 'batch', got {average!r}")
    directions, sizes, steps = jax.vmap(lambda one: of(jax.tree.map(lambda leaf: leaf[None], one)))(batch)
    if average == "steps":
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), steps)
    return trees.scale(jnp.mean(sizes), jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), directions))


def _groups(scope, given, direction, layers):
    """For each group of leaves with an alpha of its own: their places, slope, curvature and norm.

    For "variable" these are arrays, with an alpha for each entry of a leaf.
    """
    gradient, dtype = given.gradient, given.dtype
    leaves, treedef = jax.tree.flatten(direction)
    gradients = [g.astype(dtype) for g in jax.tree.leaves(gradient)]
    wide = [leaf.astype(dtype) for leaf in leaves]
    if scope == "variable":
        if layers is None:
            entries = hessian(given.at).diagonal()
        else:
            entries = sampled_hessian_diagonal(tap(layers, given.at), given.key)
        diagonal = [h.astype(dtype) for h in jax.tree.leaves(trees.extract(entries, gradient))]
        return [
            ((i,), g * d, h * d * d, jnp.abs(d))
            for i, (g, d, h) in enumerate(zip(gradients, wide, diagonal, strict=True))
        ]
    groups = _partition(scope, given, layers)
    matrix = hessian(given.at).restrict(gradient)
    if len(groups) == 1:
        curvatures = matrix.quadratic(direction)[None]
    else:
        group_of = {place: number for number, places in enumerate(groups) for place in places}

        def own_block(number):
            own = [jnp.where(group_of[i] == number, leaf, 0) for i, leaf in enumerate(leaves)]
            return matrix.quadratic(treedef.unflatten(own))

        # One traced form for all groups, one after another.
        curvatures = jax.lax.map(own_block, jnp.arange(len(groups)))
    found = []
    for places, curvature in zip(groups, curvatures.astype(dtype), strict=True):
        own = [wide[i] for i in places]
        found.append((places, trees.vdot([gradients[i] for i in places], own), curvature, trees.norm(own)))
    return found


def _partition(scope, given, layers):
    """The places of the leaves, in groups."""
    paths = trees.leaf_paths(given.gradient)
    if scope == "whole":
        return [tuple(range(len(paths)))]
    groups = [{path} for path in paths]
    if scope == "layer":
        layers = find_layers_at(given.at, fallback="gradient") if layers is None else layers
        for block in dataclasses.replace(layers, biases="joint").blocks:
            own = {layers.paths[i] for i in block.leaves}
            merged = set().union(*(group for group in groups if group & own))  # a leaf may be in several
            groups = [group for group in groups if not group & own] + ([merged] if merged else [])
    return sorted(tuple(sorted(paths.index(path) for path in group)) for group in groups)
