"""One of several pytrees, by conditions that are arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvax.trees.leaves import is_small
from curvax.types import PyTree


def where(condition: Any, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Leaf by leaf ``jnp.where`` with one scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)


def first_true(*conditions: jax.Array) -> jax.Array:
    """The number of the first of the scalar conditions that holds, their count where none does.

    A reduction and no expression: XLA copies an expression of scalars, however long, into the kernel of every leaf that
    is chosen by it, which was a sixth of what there was to compile of a step of Hessian-free.

    >>> first_true(jnp.array(False), jnp.array(True)).item(), first_true(jnp.array(False)).item()
    (1, 1)
    """
    return jnp.argmax(jnp.stack([*conditions, jnp.array(True)])).astype(jnp.int32)


def all_true(*conditions: jax.Array) -> jax.Array:
    """Whether all of the scalar conditions hold, by a reduction likewise.

    >>> all_true(jnp.array(True), jnp.array(False)).item()
    False
    """
    return first_true(*[~condition for condition in conditions]) == len(conditions)


def choose(number: jax.Array, *cases: PyTree) -> PyTree:
    """The pytree of that number; the last for every greater number.

    Small leaves by a branch, whose copies need no kernels, large ones by selection. For what is there anyway, as a
    state is; what has just been computed is better chosen by ``select``.

    >>> choose(jnp.array(1), {"a": jnp.zeros(2)}, {"a": jnp.ones(2)})
    {'a': Array([1., 1.], dtype=float...)}
    """
    return _chosen(number, cases, is_small)


def select(number: jax.Array, *cases: PyTree) -> PyTree:
    """``choose`` by selection throughout, which is one kernel with those that make the cases."""
    return _chosen(number, cases, lambda leaf: False)


def _chosen(number, cases, by_branch):
    structure = jax.tree.structure(cases[-1])
    found, branched = [], []
    for leaves in zip(*map(structure.flatten_up_to, cases), strict=True):
        if any(leaf is not leaves[0] for leaf in leaves):
            leaves = [jnp.asarray(leaf).astype(jnp.result_type(*leaves)) for leaf in leaves]
            if all(map(by_branch, leaves)):
                branched.append((len(found), leaves))
            else:
                for index, leaf in reversed(list(enumerate(leaves[:-1]))):
                    leaves[-1] = jnp.where(number == index, leaf, leaves[-1])
        found.append(leaves[-1])
    if branched:
        places, leaves = zip(*branched, strict=True)
        for place, leaf in zip(places, _branch(number, list(zip(*leaves, strict=True))), strict=True):
            found[place] = leaf
    return structure.unflatten(found)


@functools.partial(jax.jit, inline=True)  # outside of jit it is then compiled once
def _branch(number, cases):
    return jax.lax.switch(number, [lambda case=case: case for case in cases])
