"""Matrices in compact form, scale * I + Psi C^{-1} Psi^T with a few vectors Psi: products, solves, functions."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import blocks, trees
from curvax.matrices.linear_map import LinearMap
from curvax.types import Array, PyTree, Scalar


def compact_map(scale: Scalar, vectors: PyTree, core: Array, used: Array | None = None) -> CompactMap:
    r"""The symmetric map scale * I + Psi C^{-1} Psi^T of k vectors Psi.

    Quasi-Newton matrices of limited memory have this form (Byrd, Nocedal and Schnabel 1994), and so has any identity
    with a correction of low rank. Everything costs a few products with Psi and work on k x k matrices.

    Args:
        vectors: Psi, a pytree whose leaves have a leading axis of length k.
        core: C, symmetric and not singular, shape (k, k).
        used: Which of the vectors count, shape (k,), for buffers that are not full; None for all.

    Example:
        >>> B = curvax.compact_map(2.0, jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[-1.0]]))
        >>> B.to_dense()
        Array([[1., 0., 0.],
               [0., 2., 0.],
               [0., 0., 2.]], dtype=float...)
    """
    dtype = trees.wide_dtype(*jax.tree.leaves(vectors))
    used = jnp.ones(core.shape[0], bool) if used is None else used
    gram = blocks.inner_products(vectors, vectors).astype(dtype)
    return CompactMap(jnp.asarray(scale, dtype), vectors, core.astype(dtype), gram, used)


class Spectrum(NamedTuple):
    """The eigenvalues of a compact map."""

    # Those along the columns of P = Psi T, an orthonormal basis of the range of Psi, shape (k,); and T, shape (k, k). A
    # column is zero where Psi has less than k dimensions, its value then is large.
    values: Array
    basis: Array
    # On everything orthogonal to Psi, gamma; where Psi spans everything gamma is none, and it is one of the others.
    rest: Array
    rank: Array  # the dimension of the range of Psi


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CompactMap(LinearMap):
    """scale * I + Psi C^{-1} Psi^T; the fields are the arguments of ``compact_map``, and ``gram`` is Psi^T Psi."""

    scale: Array
    vectors: PyTree
    core: Array
    gram: Array
    used: Array
    _has_own_form = True

    @property
    def structure(self) -> PyTree:
        return trees.example_structure(self.vectors)

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.structure, "vector", "the map's vectors")
        change = self.combine(self.solve_core(self.project(vector)))
        return trees.add(trees.scale(self.scale, vector), change)

    def _solve(self, vector, damping):
        """By the formula of Sherman, Morrison and Woodbury."""
        damping = jnp.asarray(damping, self.scale.dtype)
        total = self.scale + damping

        def by_woodbury():
            inner = self._own(self.core) + self._own(self.gram, 0) / total
            coefficients = jnp.linalg.solve(inner, self.project(vector) / total) / total
            return trees.sub(trees.scale(1 / total, vector), self.combine(coefficients))

        # The matrix may be regular all the same, where Psi spans everything.
        def by_spectrum():
            return self._spectral(vector, lambda values: 1 / (values + damping))

        return jax.lax.cond(total == 0, by_spectrum, by_woodbury)

    def bilinear(self, left: PyTree, right: PyTree) -> Array:
        change = self.project(left) @ self.solve_core(self.project(right))
        return self.scale * trees.vdot(left, right).astype(self.scale.dtype) + change

    def trace(self) -> Array:
        count = jnp.asarray(trees.size(self.structure), self.scale.dtype)
        return self.scale * count + jnp.trace(self.solve_core(self._own(self.gram, 0)))

    def diagonal(self) -> PyTree:
        inverse = jnp.where(self._both, jnp.linalg.inv(self._own(self.core)), 0)

        def one(leaf):
            correction = jnp.einsum("i...,ij,j...->...", leaf, inverse.astype(leaf.dtype), leaf)
            return self.scale.astype(leaf.dtype) + correction

        return jax.tree.map(one, trees.widened(self.vectors))

    def _logdet(self, damping):
        spectrum, damping = self.spectrum(), jnp.asarray(damping, self.scale.dtype)
        rest = jnp.asarray(trees.size(self.structure), self.scale.dtype) - spectrum.rank.astype(self.scale.dtype)
        kept = jnp.any(spectrum.basis != 0, axis=0)
        inside = jnp.where(kept, jnp.log(jnp.abs(jnp.where(kept, spectrum.values + damping, 1))), 0)
        return jnp.sum(inside) + jax.scipy.special.xlogy(rest, jnp.abs(spectrum.rest + damping))

    def project(self, vector: PyTree) -> Array:
        """Psi^T v, zero for vectors that do not count; shape (k,)."""
        return jnp.where(self.used, blocks.inner_products(self.vectors, vector).astype(self.scale.dtype), 0)

    def solve_core(self, right: Array) -> Array:
        """C^{-1} right, for what belongs to the vectors that count; shape (k,) or (k, any)."""
        # By eigenvalues, as LU with its exchanges has ten times as much to compile, of C at unit scale: vectors that
        # belong to curvatures of very different size would lose the digits of the smallest.
        core = self._own(self.core)
        sizes = jnp.max(jnp.abs(core), axis=1)
        scales = jax.lax.rsqrt(jnp.where(sizes > 0, sizes, 1))
        values, axes = jnp.linalg.eigh(core * scales[:, None] * scales[None, :])
        scales, values = (trees.expand_right(numbers, right.ndim) for numbers in (scales, values))
        with jax.default_matmul_precision("highest"):
            return scales * (axes @ (axes.T @ (scales * right) / values))

    def combine(self, coefficients: Array) -> PyTree:
        """Psi c, a pytree like the map's vectors."""
        return trees.cast_like(blocks.combine(jnp.where(self.used, coefficients, 0), self.vectors), self.vectors)

    def spectrum(self) -> Spectrum:
        """The eigenvalues, and the eigenvectors that are not orthogonal to Psi, by matrices of k x k alone."""
        # Psi^T Psi = V L^2 V^T makes Q = Psi V L^{-1} orthonormal, and in it Psi C^{-1} Psi^T is the small matrix
        # R = L V^T C^{-1} V L. With R = U M U^T, eigenvectors are Q U = Psi T, T = V L^{-1} U, and values gamma + M.
        gram = self._own(self.gram, 0)
        squares, axes = jnp.linalg.eigh(gram)
        # L^2 is known to eps of its largest only: what is below is no direction of Psi.
        kept = squares > 10 * squares.size * jnp.finfo(squares.dtype).eps * jnp.max(squares)
        lengths = jnp.sqrt(jnp.where(kept, squares, 0))
        core = self.solve_core(axes * lengths[None, :])
        reduced = lengths[:, None] * jnp.matmul(axes.T, core, precision="highest")
        reduced = (reduced + reduced.T) / 2
        # Directions that Psi does not have are zero rows of R. Moved away from all eigenvalues they do not mix with
        # those near zero, and their columns of T are zero.
        far = 2 * jnp.max(jnp.abs(reduced)) + jnp.abs(self.scale)
        values, vectors = jnp.linalg.eigh(reduced + jnp.diag(jnp.where(kept, 0, far)))
        orthonormal = axes * jnp.where(kept, 1 / jnp.where(kept, lengths, 1), 0)[None, :]
        basis = jnp.matmul(orthonormal, vectors, precision="highest")
        values, rank = values + self.scale, jnp.sum(kept)
        rest = jnp.where(rank < trees.size(self.structure), self.scale, jnp.max(values))
        return Spectrum(values, basis, rest, rank)

    @property
    def _both(self):
        return self.used[:, None] & self.used[None, :]

    def _own(self, matrix, fill=1):
        """A k x k matrix with ``fill`` times the identity in place of what belongs to vectors that do not count."""
        return jnp.where(self._both, matrix, fill * jnp.eye(self.used.size, dtype=matrix.dtype))

    def _spectral(self, vector, function):
        spectrum = self.spectrum()
        rest = function(spectrum.rest)
        with jax.default_matmul_precision("highest"):
            components = spectrum.basis.T @ self.project(vector)
            change = self.combine(spectrum.basis @ ((function(spectrum.values) - rest) * components))
        return trees.add(trees.scale(rest, vector), change)
