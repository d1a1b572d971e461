"""Gradients of single examples by layer taps: the gradients themselves, their norms and their inner products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.layers.find import Layer, Layers
from curvax.layers.taps import TappedPoint
from curvax.layers.use import LayerUse, rows_of_columns
from curvax.types import Array, PyTree


def per_example_gradients(tapped: TappedPoint) -> PyTree:
    r"""The gradient of every example's own loss, by one backward sweep for all of them.

    Weights of examples, the weight of the term and 1/N are left out: the gradient of the objective is the mean of these
    where there are none. Examples of several terms follow one another.

    Returns:
        A pytree like the parameters with a leading axis of examples. Parameters without structure have zeros: their
        gradients come from ``jax.vmap(jax.grad(...))`` only.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.layers.per_example_gradients(tapped)[:, :, 0]
        Array([[-1., -2.],
               [-3., -4.]], dtype=float...)
    """
    tapped.check_separate("per_example_gradients")
    return rows_of(tapped, tapped.pull_back(tapped.loss_cotangents()))


def gradient_norms(tapped: TappedPoint) -> Array:
    r"""The Euclidean norm of every example's gradient, without forming the gradients where a layer is used once.

    For a layer with one position per example ||a ds^T||^2 = ||a||^2 ||ds||^2 (Goodfellow 2015); with shared positions
    the inner products of positions or the gradients of that layer are formed, whichever takes fewer operations.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.layers.gradient_norms(tapped)
        Array([5., 1.], dtype=float...)
    """
    tapped.check_separate("gradient_norms")
    captured = tapped.pull_back(tapped.loss_cotangents())
    apart, together = split_uses(tapped, captured)
    counts = [tapped.point.num_examples(i) for i in range(len(tapped.taps))]
    total = []
    for term, count in enumerate(counts):
        parts = [use.squared_norms() for use in apart if use.term == term]
        uses = [use for use in together if use.term == term]
        if uses:
            rows = tapped.to_params([(use, use.per_example()) for use in uses], wide=True)
            parts += [jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(rows)]
        total.append(sum(parts) if parts else jnp.zeros(count, _dtype(tapped)))
    return jnp.sqrt(jnp.concatenate(total))


def gradient_inner_products(tapped: TappedPoint) -> Array:
    r"""The inner products of all examples' gradients, <g_n, g_m>.

    For a layer with one position per example they are (a_n^T a_m)(ds_n^T ds_m), and no gradient is formed.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.layers.gradient_inner_products(tapped)
        Array([[25.,  4.],
               [ 4.,  1.]], dtype=float...)
    """
    tapped.check_separate("gradient_inner_products")
    columns = jax.tree.map(lambda leaf: leaf[None], tapped.loss_cotangents())
    return inner_products(tapped, tapped.pull_back_columns(columns), [1] * len(tapped.taps))


def inner_products(tapped: TappedPoint, captured: list[LayerUse], columns: Sequence[int]) -> Array:
    """The inner products of the rows of a Jacobian, one row for each (example, column), columns fastest.

    ``captured`` is from ``pull_back_columns``, with so many ``columns`` for each term. Rows of several terms follow one
    another; those of a term in which no parameter has structure are zeros.
    """
    apart, together = split_uses(tapped, captured)
    terms = range(len(tapped.taps))
    sizes = [columns[term] * tapped.point.num_examples(term) for term in terms]
    blocks: list[list[Any]] = [[0] * len(sizes) for _ in sizes]
    for use in apart:
        blocks[use.term][use.term] += use.inner_products()
    if together:
        rows = []
        for term in terms:
            uses = [use for use in together if use.term == term]
            own = {leaf for use in uses for leaf in use.layer.leaves}
            tree = _each_column(tapped, uses) if uses else ()
            rows.append({i: rows_of_columns(leaf) for i, leaf in enumerate(jax.tree.leaves(tree)) if i in own})
        for a in terms:
            for b in terms:
                for i in rows[a].keys() & rows[b].keys():
                    blocks[a][b] += rows[a][i] @ rows[b][i].T
    dtype = _dtype(tapped)
    filled = [
        [jnp.zeros((sizes[a], sizes[b]), dtype) if isinstance(blocks[a][b], int) else blocks[a][b] for b in terms]
        for a in terms
    ]
    return jnp.block(filled) if len(sizes) > 1 else filled[0][0]


def rows_of(tapped: TappedPoint, captured: list[LayerUse]) -> PyTree:
    """The gradients of all examples of all terms, one after another on axis 0."""
    parts = []
    for term in range(len(tapped.taps)):
        matrices = [(use, use.per_example()) for use in captured if use.term == term]
        parts.append(tapped.to_params(matrices, lead=(tapped.point.num_examples(term),)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def split_uses(tapped: TappedPoint, captured: list[LayerUse]) -> tuple[list[LayerUse], list[LayerUse]]:
    """(uses that have all their parameters to themselves, the others).

    For the first kind, squares and inner products of the layer's matrices are those of the parameters' gradients.
    """
    single = {layer.name for layer in used_once(tapped.layers) if layer.only_moves}
    apart = [use for use in captured if use.layer.name in single]
    return apart, [use for use in captured if use.layer.name not in single]


def used_once(layers: Layers) -> list[Layer]:
    """The layers with a single use that share none of their parameters."""
    layers_of = Counter(leaf for layer in layers for leaf in layer.leaves)
    return [x for x in layers if len(x.members) == 1 and all(layers_of[leaf] == 1 for leaf in x.leaves)]


def _dtype(tapped):
    return trees.wide_dtype(*jax.tree.leaves(tapped.point.params))


def _each_column(tapped, uses):
    """The gradients of all examples, (columns, examples, ...), as a pytree like the parameters."""

    def one(*cotangents):
        pairs = zip(uses, cotangents, strict=True)
        return tapped.to_params([(use, use._replace(cotangents=ds).per_example()) for use, ds in pairs], wide=True)

    return jax.vmap(one)(*(use.cotangents for use in uses))
