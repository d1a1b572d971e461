"""How a transformation gets at the curvature of the step it is asked for."""

from __future__ import annotations

from typing import Any

import jax
import optax

from curvax import trees
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint

PyTree = Any


def point_for_update(
    name: str, objective: Objective, updates: PyTree, params: PyTree, at: CurvaturePoint | None, batch: PyTree
) -> CurvaturePoint:
    """The curvature point from ``at`` or from (params, batch), checked against the incoming updates."""
    if (at is None) == (batch is None):
        raise ValueError(
            f"{name}: update takes one of at= and batch=. Write\n"
            "    loss, grads, at = objective.value_and_grad(params, batch)\n"
            "    updates, state = tx.update(grads, state, params, at=at)\n"
            "or, with gradients of your own, tx.update(grads, state, params, batch=batch)"
        )
    if at is None:
        if params is None:
            raise ValueError(f"{name}: with batch=, update needs the parameters as its third argument as well")
        if any(isinstance(node, optax.MaskedNode) for node in jax.tree.leaves(params, is_leaf=_is_masked)):
            raise ValueError(
                f"{name}: the parameters are masked here, so the model cannot be called; pass at= from"
                " objective.value_and_grad(params, batch) in place of batch="
            )
        at = objective.linearize(params, batch)
    elif not isinstance(at, CurvaturePoint):
        raise TypeError(f"{name}: at= takes the third result of objective.value_and_grad, got {type(at).__name__}")
    trees.check_floating(updates, "updates")
    whole = trees.embed(updates, at.params)
    trees.check_like(whole, at.params, "updates")
    return at


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)
