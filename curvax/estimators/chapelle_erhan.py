"""The diagonal of a Gauss-Newton or Fisher matrix from pull backs of noise on the outputs."""

from __future__ import annotations

import functools

import jax

from curvax import trees
from curvax.layers.diagonals import sampled_squares
from curvax.layers.find import Layers, find_layers_at
from curvax.layers.taps import tap
from curvax.matrices.curvature import Pullback
from curvax.matrices.linear_map import Diagonal, LinearMap, Noise, Scaled, Sum
from curvax.types import PyTree


def chapelle_erhan_diagonal(
    linear_map: LinearMap,
    key: jax.Array,
    *,
    num_samples: int = 1,
    distribution: Noise = trees.random_rademacher,
    layers: Layers | None = None,
) -> PyTree:
    r"""An unbiased estimate of diag(G), the mean of sq(u) over draws u with E[u u^T] = G.

    For a Gauss-Newton matrix a draw is of each example alone, u_i = J_i^T (H_L^{1/2})^T v_i with signs v_i, and the
    estimate is the mean of sq(u_i): squares before the mean, so that its variance falls with the number of examples, by
    one backward pass (Chapelle and Erhan 2011; Martens 2016, algorithm 6, with the transpose that its proof has). The
    penalty's part is exact. Entries are never negative; one that is small may be estimated as nearly zero.

    Examples are told apart by the layers of the model, which are looked for at trace time. Where there are none a draw
    is of the sum of all u_i and varies as much as with a single example: for parameters without structure, for models
    that couple examples or compute differently for another number of them, and for maps of other kinds. Of a point in
    chunks the estimate is of as many examples as a chunk has, taken at even distances from a random one on.

    Args:
        linear_map: A positive semi-definite map with ``sample``: ``curvax.ggn``, ``curvax.fisher``.
        distribution: The noise; ``curvax.trees.random_rademacher`` varies less than ``random_normal``.
        layers: From ``curvax.find_layers``, where they are at hand: looking for them traces the model thrice.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
        >>> G = curvax.ggn(objective.linearize(jnp.zeros(2), (jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2)))))
        >>> curvax.estimators.chapelle_erhan_diagonal(G, jax.random.key(0))
        Array([1., 9.], dtype=float...)
    """
    if isinstance(linear_map, Sum):
        known = [part.diagonal() for part in linear_map.maps if isinstance(part, Diagonal)]
        rest = [part for part in linear_map.maps if not isinstance(part, Diagonal)]
        estimates = [
            chapelle_erhan_diagonal(part, k, num_samples=num_samples, distribution=distribution, layers=layers)
            for part, k in zip(rest, trees.split_key(key, len(rest)), strict=True)
        ]
        return functools.reduce(trees.add, [*estimates, *known])
    if isinstance(linear_map, Diagonal):
        return linear_map.diagonal()

    if isinstance(linear_map, Scaled):
        part = chapelle_erhan_diagonal(
            linear_map.map, key, num_samples=num_samples, distribution=distribution, layers=layers
        )
        return trees.scale(linear_map.scalar, part)
    if isinstance(linear_map, Pullback):
        linear_map = _of_one_chunk(linear_map, key)
        tapped = _tapped(linear_map.point) if layers is None else tap(layers, linear_map.point)
        if tapped is not None:
            return _by_examples(linear_map, tapped, key, num_samples, distribution)
    return _by_sums(linear_map, key, num_samples, distribution)


def _of_one_chunk(linear_map, key):
    """The map on the examples of one chunk, for the taps to hold."""
    point = linear_map.point
    if point.chunk_size is None:
        return linear_map
    stride = -(-point.num_examples(0) // point.chunk_size)
    which, own = jax.random.split(trees.key_aside(key))
    return linear_map.curvature.pullback(point.subset(stride, jax.random.randint(which, (), 0, stride)), own)


def _tapped(point):
    """The point with taps that tell examples apart, or None where its model has none."""
    try:
        layers = find_layers_at(point, fallback="gradient")
        return None if layers.couples_examples else tap(layers, point)
    except ValueError:  # of another number of examples than the model can take; at its own it has been traced
        return None


def _by_examples(linear_map, tapped, key, num_samples, distribution):
    matrices = [linear_map.output_matrix(i) for i in range(len(tapped.taps))]
    estimate = sampled_squares(tapped, matrices, key, num_samples, distribution)
    if not tapped.layers.unstructured:
        return estimate
    plain = _by_sums(linear_map, key, num_samples, distribution)
    return trees.replace_leaves(estimate, tapped.layers.unstructured, plain)


def _by_sums(linear_map, key, num_samples, distribution):
    def add_square(total, k):
        draw = trees.widened(linear_map.sample(k, distribution))
        return trees.add(total, trees.multiply(draw, draw)), None

    zeros = trees.widened(trees.zeros_like(linear_map.structure))
    total, _ = jax.lax.scan(add_square, zeros, trees.split_key(key, num_samples))
    return trees.scale(1 / num_samples, total)
