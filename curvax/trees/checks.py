"""Checks of pytrees that come from a user: of their leaves, and of two against each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from curvax.trees.leaves import is_array, leaf_paths, listed
from curvax.types import PyTree


def floating_arrays(tree: PyTree, name: str) -> PyTree:
    """``tree`` with the plain numbers and numpy arrays among its leaves as arrays of jax, in the dtypes it gives them.

    Raises:
        TypeError: A leaf is no array of real floating-point numbers; the error names it.

    >>> floating_arrays({"w": jnp.ones(2), "gain": 1.5}, "params")["gain"]
    Array(1.5, dtype=float...)
    """
    check_floating(tree, name)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)) if isinstance(x, _OF_PYTHON) else x, tree)


def check_floating(tree: PyTree, name: str) -> None:
    """Raises a TypeError that names the first leaf that is not an array of real floating-point numbers."""
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if not is_array(leaf) and not isinstance(leaf, _OF_PYTHON):
            raise TypeError(
                f"{name}[{path!r}] is {leaf!r}, not an array; parameters are arrays alone: keep the rest of a model"
                " where model_fn finds it, as by params, static = equinox.partition(model, equinox.is_inexact_array)"
                " and equinox.combine(params, static) inside model_fn"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            advice = (
                "split it into a real and an imaginary leaf"
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "curvature needs real numbers: move the leaf into the inputs of the model"
            )
            raise TypeError(f"{name}[{path!r}] has dtype {dtype}; {advice}")


def check_like(tree: PyTree, like: PyTree, name: str, like_name: str = "the parameters") -> None:
    """Raises a ValueError that names the first leaf in which ``tree`` differs from ``like`` in structure or shape."""
    check_same_leaves(tree, like, name, like_name)
    for path, leaf, other in zip(leaf_paths(like), jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name}[{path!r}] has shape {jnp.shape(leaf)}, but {like_name} have {jnp.shape(other)} there"
            )
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"{name} is a {jax.tree.structure(tree)}, but {like_name} are a {jax.tree.structure(like)}: same leaves,"
            " other containers; rebuild it with jax.tree.map over the parameters"
        )


def check_same_leaves(tree: PyTree, like: PyTree, name: str, like_name: str = "the parameters") -> None:
    """Raises a ValueError that names the leaves that only one of ``tree`` and ``like`` has."""
    paths, like_paths = leaf_paths(tree), leaf_paths(like)
    if paths != like_paths:
        missing = [path for path in like_paths if path not in paths]
        surplus = [path for path in paths if path not in like_paths]
        raise ValueError(
            f"{name} does not have the leaves of {like_name}: "
            + "; ".join(
                f"{what} {listed(which)}" for what, which in (("missing", missing), ("surplus", surplus)) if which
            )
        )


_OF_PYTHON = (bool, int, float, complex, np.ndarray, np.generic)
