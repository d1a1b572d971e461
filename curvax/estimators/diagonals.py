"""Diagonals from products alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_at_least
from curvax.krylov import _wide as wide
from curvax.matrices.linear_map import LinearMap, Noise
from curvax.types import Array, PyTree


def hutchinson_diagonal(
    linear_map: LinearMap, key: Array, *, num_samples: int, distribution: Noise = trees.random_rademacher
) -> PyTree:
    r"""An unbiased estimate of diag A: sum_s v_s * (A v_s) / sum_s v_s * v_s, elementwise, over random v_s.

    Exact for diagonal maps. Otherwise the variance of entry i is sum_{j != i} A_ij^2 / num_samples for Rademacher
    vectors, and with ``num_samples - 2`` in place of ``num_samples`` for normal ones: it is infinite below three.
    Samples are taken one after another in the memory of one; ``jax.vmap`` over keys takes several together. Source:
    Bekas, Kokiopoulou and Saad 2007.

    Args:
        num_samples: How many v to draw, each for one product.
        distribution: The noise; ``curvax.trees.random_rademacher`` or ``random_normal``.

    Example:
        >>> A = curvax.Diagonal({"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])})
        >>> curvax.estimators.hutchinson_diagonal(A, jax.random.key(0), num_samples=1)
        {'b': Array([3.], dtype=float...), 'w': Array([1., 2.], dtype=float...)}
    """
    dtype = wide.dtype_of(linear_map)
    check_at_least("num_samples", num_samples, 1)

    def add_sample(sums, sample_key):
        drawn = distribution(sample_key, linear_map.structure)
        vector = wide.cast(drawn, dtype)
        terms = trees.multiply(vector, wide.product(linear_map, drawn)), trees.multiply(vector, vector)
        return trees.add(sums, terms), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), linear_map.structure)
    keys = trees.split_key(key, num_samples)
    (products, squares), _ = jax.lax.scan(add_sample, (zeros, zeros), keys)
    # A normal number in a narrow dtype may be zero; then every one was, and the estimate is zero.
    quotient = jax.tree.map(lambda x, y: x / jnp.where(y > 0, y, 1), products, squares)
    return trees.cast_like(quotient, trees.wide_structure(linear_map.structure))


def secant_ratios(linear_map: LinearMap, direction: PyTree, *, entry: Array | None = None) -> PyTree:
    r"""The ratios [A d]_j / [d]_j of a direction d, which SGD-QN's of changes of gradient to steps tend to.

    As the step d = theta' - theta shrinks, [grad h(theta') - grad h(theta)]_j / [d]_j tends to this with A the Hessian
    (Martens 2016, eq. 3.12). The mean over independent symmetric d_j of mean zero is the diagonal of A; with one d_m in
    all denominators it is column m. Over signs it is ``hutchinson_diagonal``; over normal numbers the variance is
    infinite; and steps of an optimiser are neither.

    Args:
        direction: d, a pytree without zeros shaped like the vectors of the map.
        entry: d_m, one entry of it, as the denominator of all ratios.

    Example:
        >>> A = curvax.from_matvec(lambda v: jnp.array([[2.0, 1.0], [1.0, 3.0]]) @ v, jnp.zeros(2))
        >>> curvax.estimators.secant_ratios(A, jnp.array([1.0, -1.0]))
        Array([1., 2.], dtype=float...)
        >>> signs = jnp.array([[1.0, 1.0], [1.0, -1.0]])
        >>> jnp.mean(jax.vmap(lambda d: curvax.estimators.secant_ratios(A, d, entry=d[0]))(signs), axis=0)
        Array([2., 1.], dtype=float...)
    """
    product = linear_map(direction)
    if entry is None:
        return jax.tree.map(jnp.divide, product, direction)
    return jax.tree.map(lambda x: x / entry.astype(x.dtype), product)
