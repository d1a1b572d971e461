"""LiSSA: the inverse as a series, each term from a sample of the matrix (Agarwal, Bullins and Hazan 2017)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_at_least
from curvax.types import Array, PyTree, Scalar


def lissa(
    matvec: Callable[[PyTree, Array], PyTree], b: PyTree, *, num_iterations: Scalar, scale: Scalar = 1.0
) -> PyTree:
    r"""x_R = sum_{r < R} (I - c A)^r c b, which goes to A^{-1} b, by x <- x - c (A_r x - b) from x = 0.

    Every A_r may be an estimate of A from other data: where they are unbiased and independent, so is x_R of the series.
    That is what makes it of use beside ``cg``, which takes one matrix, and far fewer products with it. It converges if
    0 < c lambda < 2 for all eigenvalues lambda of A (of each A_r, to be safe) and diverges otherwise; an error along an
    eigenvector shrinks by 1 - c lambda in an iteration. The longest useful c is 1 over the largest eigenvalue, as from
    ``curvax.estimators.top_eigenpairs``.

    Args:
        matvec: (v, r) -> A_r v, with r the number of the iteration from 0; a batch may be drawn or sliced by it.
        b: The right-hand side, a pytree of floating-point arrays: minus the gradient for a step.
        num_iterations: R.
        scale: c.

    Returns:
        x_R, in the dtypes of b.

    Raises:
        TypeError: A leaf of b is not real floating-point.
        ValueError: ``num_iterations`` is below 1, or a product differs from b in structure or shape.

    Example:
        >>> A = jnp.array([[1.0, 0.2], [0.2, 0.5]])
        >>> x = curvax.solvers.lissa(lambda v, r: A @ v, jnp.array([1.2, 0.7]), num_iterations=50)
        >>> x.round(3)
        Array([1., 1.], dtype=float...)

    Source: Agarwal, Bullins and Hazan 2017; Henriques et al. 2019, section 5, with c = 1, begun anew for every batch.
    """
    count = check_at_least("num_iterations", num_iterations, 1)
    trees.check_floating(b, "b")
    b = jax.tree.map(jnp.asarray, b)

    def iterate(index, x):
        product = matvec(trees.cast_like(x, b), index)
        trees.check_like(product, b, "the result of matvec", "the entries of b")
        return trees.add_scaled(x, -jnp.asarray(scale), trees.sub(trees.widened(product), b))

    return trees.cast_like(jax.lax.fori_loop(0, count, iterate, trees.zeros_like(trees.widened(b))), b)
