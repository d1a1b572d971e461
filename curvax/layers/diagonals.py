"""Diagonals of Fisher and Gauss-Newton matrices by layer taps: squares are of each example, never of the sum.

They are in float32 at least, as squares of what float16 holds leave its range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.layers.per_example import split_uses
from curvax.layers.taps import TappedPoint
from curvax.layers.use import LayerUse, sum_in_chunks
from curvax.matrices.linear_map import Noise
from curvax.objectives.output_matrix import OutputMatrix, num_columns, unit_vector
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import scale_cases
from curvax.types import Array, PyTree


def empirical_fisher_diagonal(tapped: TappedPoint) -> PyTree:
    r"""The diagonal of the empirical Fisher matrix, (1/N) sum_i sq(g_i), without the gradients of single examples.

    For a layer with one position per example it is sq(A)^T sq(dS), as cheap as the gradient; where positions share
    parameters, the square is that of the sum over them (Martens 2016, section 4.9.3).

    Returns:
        The diagonal, a pytree like the parameters, with the penalty's; parameters without structure as their
        ``fallback`` says.

    Raises:
        ValueError: Weights or a mask over the steps of sequences make the cases finer than examples.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.layers.empirical_fisher_diagonal(tapped)
        Array([[ 5.],
               [10.]], dtype=float...)
    """
    scales = tapped.example_scales("empirical_fisher_diagonal")
    cotangents = tapped.loss_cotangents()
    captured = tapped.pull_back(cotangents)

    def squares(tangents):
        parts = zip(scales, cotangents, tangents, strict=True)
        return sum(jnp.sum(scale * jnp.square(example_vdot(u, t))) for scale, u, t in parts)

    total = products(tapped, captured, captured, scales)
    return with_penalty(tapped.point, trees.add(total, entrywise(tapped, squares)))


def sampled_ggn_diagonal(tapped: TappedPoint, key: Array, *, num_samples: int = 1) -> PyTree:
    r"""An unbiased estimate of the diagonal of the Gauss-Newton matrix, the mean of sq(J_i^T (H_L^{1/2})^T v_i).

    Every case has noise v_i of signs of its own, and squares are taken for each example before the mean, which leaves
    out the cross terms between examples that ``chapelle_erhan_diagonal`` of a linear map has to average away: the
    variance falls with the number of examples, for the same backward sweep (Chapelle and Erhan 2011; Martens 2016,
    algorithm 6).

    Returns:
        The estimate, a pytree like the parameters, with the penalty's part; parameters without structure as their
        ``fallback`` says.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.layers.sampled_ggn_diagonal(tapped, jax.random.key(0))   # exact, as there is one output
        Array([[ 5.],
               [10.]], dtype=float...)
    """
    matrices = _curvatures(tapped)
    estimate = sampled_squares(tapped, matrices, key, num_samples, trees.random_rademacher)
    scales = tapped.example_scales("sampled_ggn_diagonal")
    # Once and exactly, not by a pass for each entry at every draw.
    return with_penalty(tapped.point, trees.add(estimate, diagonal_without_structure(tapped, matrices, scales)))


def sampled_squares(
    tapped: TappedPoint, matrices: Sequence[OutputMatrix], key: Array, num_samples: int, distribution: Noise
) -> PyTree:
    """The estimate for any matrices on the outputs, without the penalty's part and parameters without structure.

    Where the steps of sequences are the cases the noise is that of each step, and the square that of their sum over an
    example: as the noise is independent, its mean has no cross terms between steps either.
    """
    tapped.check_separate("sampled diagonals by layers")
    scales = [cases.scale for cases in tapped.point.cases]
    ones = [jnp.ones(tapped.point.num_examples(term), scale.dtype) for term, scale in enumerate(scales)]

    def seed(matrix, scale, key):
        noise = distribution(key, matrix.root_structure)
        return scale_cases(jnp.sqrt(scale), matrix.sqrt_transpose_product(noise))

    def one(total, key):
        keys = trees.split_key(key, len(matrices))
        captured = tapped.pull_back(tuple(map(seed, matrices, scales, keys)))
        return trees.add(total, products(tapped, captured, captured, ones)), None

    zeros = trees.widened(trees.zeros_like(tapped.point.params))
    total, _ = jax.lax.scan(one, zeros, trees.split_key(key, num_samples))
    return trees.scale(1 / num_samples, total)


def exact_ggn_diagonal(tapped: TappedPoint) -> PyTree:
    r"""The diagonal of the Gauss-Newton matrix, (1/N) sum_i sum_j sq(J_i^T (H_L^{1/2})^T e_j), by a sweep for each j.

    The number of sweeps is that of the outputs of an example: for classification, not for autoencoders or long
    sequences. Sweeps follow one another in the memory of one (Bishop 1992; Martens 2016, section 4.9.2).

    Returns:
        The diagonal, a pytree like the parameters, with the penalty's; parameters without structure as their
        ``fallback`` says.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.softmax_cross_entropy())
        >>> w, batch = jnp.zeros((1, 2)), (jnp.array([[2.0]]), jnp.array([0]))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> print(curvax.layers.exact_ggn_diagonal(tapped).round(3))
        [[1. 1.]]
    """
    scales = tapped.example_scales("exact_ggn_diagonal")
    matrices = _curvatures(tapped)

    def one(total, column):
        seeds = tuple(matrix.sqrt_transpose_product(unit_vector(matrix.root_structure, column)) for matrix in matrices)
        captured = tapped.pull_back(seeds)
        return trees.add(total, products(tapped, captured, captured, scales)), None

    zeros = trees.widened(trees.zeros_like(tapped.point.params))
    total, _ = jax.lax.scan(one, zeros, jnp.arange(max(map(num_columns, matrices))))
    return with_penalty(tapped.point, trees.add(total, diagonal_without_structure(tapped, matrices, scales)))


def _curvatures(tapped):
    """The matrix of the Gauss-Newton products on the outputs of each term."""
    return [piece.loss.curvature(piece.outputs, piece.targets) for piece in tapped.point.pieces()]


def products(tapped: TappedPoint, left: list[LayerUse], right: list[LayerUse], scales: list[Array]) -> PyTree:
    """sum_i scale_i s_i * t_i over the examples of all terms, for the gradients s_i and t_i of two sweeps."""
    others = {id(use): other for use, other in zip(left, right, strict=True)}
    apart, together = split_uses(tapped, left)
    total = tapped.to_params(
        [
            (use, use.products(others[id(use)].cotangents, scales[use.term].astype(use.cotangents.dtype)))
            for use in apart
        ],
        wide=True,
    )
    for term, scale in enumerate(scales):
        uses = [use for use in together if use.term == term]
        if uses:
            both, count = uses if left is right else uses + [others[id(use)] for use in uses], len(uses)

            def product(both, weights, count=count):
                rows, other_rows = (
                    tapped.to_params([(use, use.per_example()) for use in part], wide=True)
                    for part in (both[:count], both[-count:])
                )
                return jax.tree.map(functools.partial(_weighted_products, weights), rows, other_rows)

            total = trees.add(total, sum_in_chunks(product, both, scale))
    return total


def diagonal_without_structure(tapped: TappedPoint, matrices: Sequence[OutputMatrix], scales: list[Array]) -> PyTree:
    """sum_i scale_i (J_i^T C_i J_i)_jj for parameters without structure, where ``fallback`` asks for it; else zeros."""

    def quadratic(tangents):
        parts = zip(scales, matrices, tangents, strict=True)
        return sum(jnp.sum(scale * example_vdot(t, matrix.product(t))) for scale, matrix, t in parts)

    return entrywise(tapped, quadratic)


def example_vdot(left: PyTree, right: PyTree) -> Array:
    """The inner product of every example's outputs, (examples,)."""
    return jax.vmap(trees.vdot)(left, right)


def entrywise(tapped: TappedPoint, measure: Callable[[list[PyTree]], Any]) -> PyTree:
    """With fallback "diagonal", ``measure(J e)`` for each entry e of a parameter without structure: a pass for each.

    Parameters with structure, and all with fallback "gradient", have zeros.
    """
    leaves, treedef = jax.tree.flatten(trees.zeros_like(tapped.point.params))
    results = trees.widened(leaves)
    places = tapped.layers.unstructured if tapped.layers.fallback == "diagonal" else ()
    pieces = tapped.point.pieces()
    for place in places:
        zeros = leaves[place]

        def entry(index, place=place, zeros=zeros):
            unit = (jnp.arange(zeros.size) == index).astype(zeros.dtype).reshape(zeros.shape)
            direction = treedef.unflatten([unit if i == place else jnp.zeros_like(x) for i, x in enumerate(leaves)])
            return measure([piece.jvp(direction) for piece in pieces])

        entries = jax.lax.map(entry, jnp.arange(zeros.size)).reshape(zeros.shape)
        results[place] = entries.astype(results[place].dtype)
    return treedef.unflatten(results)


def _weighted_products(weights, left, right):
    return jnp.tensordot(weights.astype(left.dtype), left * right, 1)


def with_penalty(point: CurvaturePoint, diagonal: PyTree) -> PyTree:
    """The diagonal and that of the penalty's Hessian."""
    if not point.penalty:
        return diagonal
    return jax.tree.map(
        lambda leaf, eta: leaf + eta.astype(leaf.dtype), diagonal, point.penalty.curvature(point.params)
    )
