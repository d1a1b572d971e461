"""What the tests of the methods share: steps under ``jit``, and losses and gradients as numpy has them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Taken(NamedTuple):
    """A step: parameters before and after it, its updates, and the state behind it."""

    before: Any
    after: Any
    updates: Any
    state: Any


def run(tx, objective, params, batch, steps=1, state=None, **points):
    """Steps on one batch, each a ``Taken``; ``points`` are batches for further points of ``update``."""

    @jax.jit
    def step(params, state):
        _, gradient, at = objective.value_and_grad(params, batch)
        further = {name: objective.linearize(params, data) for name, data in points.items()}
        updates, state = tx.update(gradient, state, params, at=at, **further)
        return Taken(params, optax.apply_updates(params, updates), updates, state)

    history = []
    state = jax.jit(tx.init)(params) if state is None else state
    for _ in range(steps):
        history.append(step(params, state))
        params, state = history[-1].after, history[-1].state
    return history


def one_step(*args, **kwargs):
    """Updates and state of one step."""
    taken = run(*args, **kwargs)[0]
    return taken.updates, taken.state


def flat(tree):
    """All leaves as one vector of numpy."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def tree_of(vector, like):
    """The inverse of ``flat``."""
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(np.asarray(vector), np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten([jnp.asarray(p.reshape(leaf.shape)) for p, leaf in zip(parts, leaves, strict=True)])


@jax.jit
def _loss_and_gradient(objective, params, batch):
    return jax.value_and_grad(objective)(params, batch)


def loss(objective, params, batch):
    """h, a number."""
    return float(_loss_and_gradient(objective, params, batch)[0])


def gradient(objective, params, batch):
    """The gradient of h, a vector."""
    return flat(_loss_and_gradient(objective, params, batch)[1])


def moved(params, vector):
    """The parameters plus a vector."""
    return tree_of(flat(params) + vector, params)
