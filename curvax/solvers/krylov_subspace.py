"""An orthonormal basis of a Krylov space, the curvature projected on it, and the minimum of any function over it.

Krylov subspace descent, Vinyals and Povey 2012.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import blocks, trees
from curvax.checks import check_at_least
from curvax.krylov._scaled_system import narrow, scaled_system, wide
from curvax.types import Array, PyTree, Scalar


class KrylovSubspace(NamedTuple):
    """A subspace of dimension at most m, with A and b projected on it.

    Vectors that the space does not have (it may be exhausted early) are zero, as are their rows and columns.

    Attributes:
        basis: Orthonormal q_1 ... q_m, in the dtypes of b; every leaf has a leading axis of length m.
        matrix: Q^T A Q, shape (m, m).
        right: Q^T b, shape (m,).
        active: Which basis vectors are not zero, shape (m,).
    """

    basis: PyTree
    matrix: Array
    right: Array
    active: Array

    def combine(self, coefficients: Array) -> PyTree:
        """The vector sum_j c_j q_j, in the dtypes of b."""
        return narrow(blocks.combine(coefficients, self.basis), self.basis)


def krylov_subspace(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    *,
    num_vectors: int,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
    extra: PyTree | None = None,
) -> KrylovSubspace:
    r"""An orthonormal basis of span{P^{-1} b, (P^{-1} A) P^{-1} b, ...}, and A and b projected on it.

    The space contains the iterates of conjugate gradients from zero on (A + lambda I) x = b for every lambda, if P = I.
    Each new vector is orthogonalised twice against all others (Lanczos with full re-orthogonalisation), so that the
    basis is orthonormal to rounding. One product with A is used for each vector. The space counts as exhausted when the
    part of a new vector outside it is within some roundings of the whole; where a product is not finite, its vector and
    the later ones are left out. Source: Vinyals and Povey 2012, Algorithm 1.

    Args:
        matvec: v -> A v, linear and symmetric; a ``LinearMap`` or any function of a pytree shaped like b.
        b: The starting vector, a pytree of floating-point arrays.
        num_vectors: The dimension asked for, without ``extra``.
        preconditioner: r -> P^{-1} r with P symmetric positive definite, or None for P = I.
        extra: One vector more, shaped like b; Vinyals and Povey add the previous search direction.


    Raises:
        TypeError: A leaf of b is not real floating-point.
        ValueError: ``extra`` or a product differs from b in structure or shape, or ``num_vectors`` is below 1.

    Example:
        >>> A = jnp.diag(jnp.array([1.0, 1.0, 2.0, 2.0]))
        >>> subspace = curvax.solvers.krylov_subspace(lambda v: A @ v, jnp.ones(4), num_vectors=3)
        >>> subspace.active                                  # two distinct eigenvalues: the space has dimension two
        Array([ True,  True, False], dtype=bool)
    """
    check_at_least("num_vectors", num_vectors, 1)
    system, _ = scaled_system(matvec, b, preconditioner)
    like, count = system.like, num_vectors + (extra is not None)
    if extra is not None:
        trees.check_like(extra, b, "extra", "the entries of b")
        extra = system.packing.pack(jax.tree.map(jnp.asarray, extra))

    def add_vector(index, carry):
        basis, matrix, active, candidate = carry
        _, rest, length = blocks.expanded(basis, candidate)
        vector, independent = blocks.unit(rest, length, trees.norm(candidate))
        vector = narrow(vector, like)
        product = system.multiply(vector)
        independent &= trees.all_finite(product)
        vector, product = trees.where(independent, (vector, product), trees.zeros_like((vector, product)))
        basis = blocks.with_row(basis, index, vector)
        column = blocks.inner_products(basis, product)
        matrix = matrix.at[:, index].set(column).at[index, :].set(column)
        candidate = system.precondition(product)
        if extra is not None:
            candidate = trees.where(index == count - 2, wide(narrow(extra, like)), candidate)
        return basis, matrix, active.at[index].set(independent), candidate

    candidate = system.precondition(system.right)
    dtype = system.unit.dtype
    start = (blocks.zeros(like, count), jnp.zeros((count, count), dtype), jnp.zeros((count,), bool), candidate)
    basis, matrix, active, _ = jax.lax.fori_loop(0, count, add_vector, start)
    slopes = blocks.inner_products(basis, system.right) * system.unit
    return KrylovSubspace(system.packing.unpack(basis), matrix, slopes, active)


class SubspaceMinimum(NamedTuple):
    """The best x found, zero if nothing better was found, the objective there, and the number of L-BFGS steps."""

    value: PyTree
    objective: Array
    iterations: Array


def minimize_in_subspace(
    objective: Callable[[PyTree], Array],
    subspace: KrylovSubspace,
    *,
    max_iterations: Scalar,
    tolerance: Scalar = 1e-4,
    max_linesearch_steps: int = 10,
) -> SubspaceMinimum:
    r"""Minimises a function over a subspace by L-BFGS with a Wolfe line search, from zero.

    The coefficients are c = U |Lambda|^{-1/2} z with Q^T A Q = U Lambda U^T, so that a function with curvature A is
    round in z; eigenvalues below 10^{-4} of the largest count as that. The result is never above the objective at zero.
    Source: Vinyals and Povey 2012, section 3.

    Args:
        objective: x -> h, a differentiable scalar function of a pytree like the basis vectors, for instance the loss at
            the parameters plus x.
        subspace: The result of ``krylov_subspace``.
        max_iterations: The hard cap on L-BFGS steps.
        tolerance: Stop when the gradient in z has shrunk to this fraction of its first norm.
        max_linesearch_steps: The most evaluations of the function and its gradient in one step.


    Example:
        >>> A = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
        >>> subspace = curvax.solvers.krylov_subspace(lambda v: A @ v, jnp.ones(3), num_vectors=3)
        >>> objective = lambda x: 0.5 * x @ A @ x - jnp.sum(x)
        >>> best = curvax.solvers.minimize_in_subspace(objective, subspace, max_iterations=10, tolerance=1e-9)
        >>> jnp.allclose(best.value, jnp.array([1.0, 0.5, 0.25]))
        Array(True, dtype=bool)
    """
    cap = check_at_least("max_iterations", max_iterations, 0)
    values, vectors = jnp.linalg.eigh(subspace.matrix)
    largest = jnp.max(jnp.abs(values))
    scales = jnp.maximum(jnp.abs(values), jnp.where(largest > 0, 1e-4 * largest, 1))
    dtype = scales.dtype

    def of_coefficients(z):
        return objective(subspace.combine(vectors @ (z / jnp.sqrt(scales)))).astype(dtype)

    optimizer = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=max_linesearch_steps))
    value_and_grad = optax.value_and_grad_from_state(of_coefficients)
    zero = jnp.zeros_like(scales)
    first_value, first_gradient = jax.value_and_grad(of_coefficients)(zero)
    threshold = jnp.asarray(tolerance, dtype) * trees.norm(first_gradient)

    def running(carry):
        iteration, _, _, gradient_norm, _, _ = carry
        return (iteration < cap) & (gradient_norm > threshold)

    def step(carry):
        iteration, z, state, _, best, best_value = carry
        value, gradient = value_and_grad(z, state=state)
        with jax.numpy_dtype_promotion("standard"):  # optax's L-BFGS mixes integer widths where x64 is enabled
            updates, state = optimizer.update(gradient, state, z, value=value, grad=gradient, value_fn=of_coefficients)
        z = optax.apply_updates(z, updates)
        value, gradient = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        better = value < best_value
        best, best_value = trees.where(better, (z, value), (best, best_value))
        return iteration + 1, z, state, trees.norm(gradient), best, best_value

    start = jnp.zeros((), jnp.int32), zero, optimizer.init(zero), trees.norm(first_gradient), zero, first_value
    iterations, _, _, _, best, best_value = jax.lax.while_loop(running, step, start)
    return SubspaceMinimum(subspace.combine(vectors @ (best / jnp.sqrt(scales))), best_value, iterations)
