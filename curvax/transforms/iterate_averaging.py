"""Averages of the iterates, kept beside any optimiser."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from curvax import trees
from curvax.types import PyTree


class IterateAveragingState(NamedTuple):
    """State of ``average_iterates``.

    Attributes:
        average: The average of theta_0 ... theta_k, in float32 or wider.
    """

    steps: jax.Array
    average: PyTree


def average_iterates(
    scheme: Literal["uniform", "forgetful", "exponential"] = "forgetful", *, decay: float = 0.99
) -> optax.GradientTransformation:
    r"""Keeps an average of the parameters and leaves the updates as they are; put it last in an ``optax.chain``.

    - "uniform": the mean of theta_0 ... theta_k; optimal where the noise is stationary, but it never forgets the start.
    - "forgetful": beta_k times the old average plus 1 - beta_k times theta_k, beta_k = min(1 - 1/k, decay): the mean of
      theta_1 ... theta_k while that is short, then an exponential average. It begins with theta_1.
    - "exponential": ``decay`` times the old average plus 1 - decay times theta_k, from theta_0 on.

    The average is in the state: ``averaged_params(state, like=params)``. Averaging removes noise that a constant
    learning rate leaves, without slowing the iterates; evaluate both, as it can also lag behind (Martens 2016, section
    6.13, reports the better of the two).

    Args:
        decay: beta_max, or xi in the third.

    Raises:
        ValueError: ``scheme`` is none of the three, ``decay`` is not in [0, 1), or ``update`` got no parameters.

    Example:
        >>> tx = optax.chain(optax.sgd(0.5), curvax.average_iterates("uniform"))
        >>> theta = jnp.array(8.0)
        >>> state = tx.init(theta)
        >>> for _ in range(3):                                                # 8, 4, 2, 1
        ...     updates, state = tx.update(theta, state, theta)
        ...     theta = optax.apply_updates(theta, updates)
        >>> curvax.averaged_params(state, like=theta).item()
        3.75

    Source: Polyak and Juditsky 1992; Martens 2016, sections 5.7.6 (with its indices put right) and 6.13.
    """
    if scheme not in ("uniform", "forgetful", "exponential"):
        raise ValueError(f"scheme must be 'uniform', 'forgetful' or 'exponential', got {scheme!r}")
    if not isinstance(decay, Tracer) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def init(params: PyTree) -> IterateAveragingState:
        average = jax.tree.map(lambda leaf: jnp.array(leaf, trees.wide_dtype(leaf)), params)
        return IterateAveragingState(jnp.zeros((), jnp.int32), average)

    def update(
        updates: PyTree, state: IterateAveragingState, params: PyTree = None
    ) -> tuple[PyTree, IterateAveragingState]:
        if params is None:
            raise ValueError("average_iterates needs the parameters: tx.update(grads, state, params)")
        steps = jnp.asarray(optax.safe_increment(state.steps))

        def share(dtype):  # of the new iterate
            k = steps.astype(dtype)
            share = {"uniform": 1 / (k + 1), "forgetful": jnp.maximum(1 / k, 1 - decay), "exponential": 1 - decay}
            return jnp.asarray(share[scheme], dtype)

        def blend(average, leaf, step):
            # The update in the precision of the average: in bfloat16 a small step would be lost before it counts.
            new = jnp.asarray(leaf, average.dtype) + step.astype(average.dtype)
            return average + share(average.dtype) * (new - average)

        new_average = jax.tree.map(blend, state.average, params, updates)
        average = trees.where(trees.all_finite(updates), new_average, state.average)
        return updates, IterateAveragingState(steps, average)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def averaged_params(state: PyTree, *, like: PyTree) -> PyTree:
    """The average that ``average_iterates`` keeps, wherever in the state it is, in the dtypes of the parameters.

    Args:
        state: The state of the whole chain.

    Raises:
        ValueError: The state has no average in it, or several.
    """
    found = [
        node.average
        for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, IterateAveragingState))
        if isinstance(node, IterateAveragingState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} averages, not one: put curvax.average_iterates() last in the chain"
        )
    return trees.cast_like(found[0], like)
