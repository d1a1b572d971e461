r"""Damped Gauss-Newton systems solved in the space of the samples, for fewer outputs in a batch than parameters.

With R the matrix whose rows are the model's scaled output gradients, G = R^T R, the matrix K = R R^T is of the size of
the batch, and (G + lambda I)^{-1} g = (g - R^T (K + lambda I)^{-1} R g) / lambda. K comes from the inputs and output
cotangents of the layers; the rows themselves, a gradient for every output of every example, are never formed where
layers are used once. Centred rows, of gradients less their mean over the batch, are P R with a projection P.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection
from typing import Literal

import jax
import jax.numpy as jnp

from curvax import solvers, trees
from curvax.layers.diagonals import entrywise
from curvax.layers.per_example import inner_products, split_uses
from curvax.layers.taps import TappedPoint
from curvax.layers.use import replicated
from curvax.matrices.curvature import GaussNewton, OutputCurvature, check_curvature
from curvax.matrices.linear_map import Diagonal
from curvax.objectives.output_matrix import num_columns, unit_vector
from curvax.types import Array, PyTree, Scalar


def gram(
    tapped: TappedPoint,
    *,
    centered: bool = False,
    curvature: OutputCurvature | None = None,
    key: Array | None = None,
) -> Array:
    r"""The matrix K = R R^T with G = R^T R, in the space of the samples, by layers.

    The row of R for column c of example i is sqrt(1/N) times the gradient of (S z_i)_c, where S^T S is the loss's
    matrix on the outputs; K has the eigenvalues of G but for zeros. For a layer with one position per example the block
    is (A A^T) times (dS dS^T), entry by entry. The penalty is left out.

    Args:
        centered: Take each column's mean over the examples off its gradients; see ``curvax.scale_by_sample_space``.
        curvature: ``curvax.GaussNewton()`` if None, ``curvax.Fisher()``, or ``curvax.EmpiricalFisher()``, whose K is
            N x N.
        key: A PRNG key, for a curvature that draws targets.

    Returns:
        K, of shape (rows, rows), the columns of an example next to one another.

    Raises:
        ValueError: The model couples examples, or weights are finer than examples.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[3.0, 4.0], [0.0, 2.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.gram(tapped)
        Array([[12.5,  4. ],
               [ 4. ,  2. ]], dtype=float...)
    """
    return SampleSpace(tapped, GaussNewton() if curvature is None else curvature, key=key, centered=centered).gram()


class SampleSpace:
    """R and its transpose at a tapped point.

    Args:
        leaves: The places of the parameters to take into account; None for all.
        key: For what the curvature draws.
        centered: Whether R is P R, with P for each term and column the projection off the roots of the cases' factors:
            where these are alike off the mean.
    """

    def __init__(
        self,
        tapped: TappedPoint,
        curvature: OutputCurvature,
        leaves: Collection[int] | None = None,
        key: Array | None = None,
        centered: bool = False,
    ):
        check_curvature("sample space", curvature, OutputCurvature)
        self.tapped = tapped = tapped.definite()
        self.centered = centered
        self.roots = [jnp.sqrt(scale) for scale in tapped.example_scales("sample space")]
        self.pieces = tapped.point.pieces(curvature.keys(tapped.point, key))
        self.matrices = [curvature.output_matrix(piece) for piece in self.pieces]
        self.columns = [num_columns(matrix) for matrix in self.matrices]
        every = range(len(tapped.layers.paths))
        self.without = set(tapped.layers.unstructured) | (set() if leaves is None else set(every) - set(leaves))

    @property
    def num_rows(self) -> int:
        """How many rows R has."""
        return sum(root.shape[0] * columns for root, columns in zip(self.roots, self.columns, strict=True))

    def project(self, vector: PyTree) -> Array:
        """R v, by one push forward."""
        vector = self._structured(vector)
        return self._rows([piece.jvp(vector) for piece in self.pieces])

    def lift(self, rows: Array) -> PyTree:
        """R^T y, by one pull back."""
        total, parts = trees.zeros_like(self.tapped.point.params), self._by_terms(self._projected(rows))
        for matrix, root, part, piece in zip(self.matrices, self.roots, parts, self.pieces, strict=True):
            part = part * root[:, None].astype(part.dtype)
            example = trees.example_structure(matrix.root_structure)
            roots = jax.vmap(functools.partial(trees.unravel, like=example))(part)
            total = trees.add(total, piece.transpose(matrix.sqrt_transpose_product(roots)))
        return self._structured(total)

    def gram(self) -> Array:
        """K."""
        matrix = inner_products(self.tapped, self._pull_back_rows(), self.columns)
        return self._projected(self._projected(matrix).T)

    def gram_product(self):
        """y -> K y, without K where every layer has its parameters to itself and one position per example."""
        captured = self._pull_back_rows()
        apart, together = split_uses(self.tapped, captured)
        factors = [pair for pair in map(_gram_factors, apart) if pair is not None]
        if together or len(self.columns) > 1 or len(factors) < len(apart):
            return lambda rows: self.project(self.lift(rows))

        def product(rows):
            rows = self._projected(rows).reshape(-1, self.columns[0])
            total = jnp.zeros_like(rows)
            for mix, cotangents in factors:
                total += jnp.einsum("no,cno->nc", mix(jnp.einsum("nc,cno->no", rows, cotangents)), cotangents)
            return self._projected(total.reshape(-1))

        return product

    def solve(
        self,
        vector: PyTree,
        damping: Array,
        *,
        method: Literal["auto", "cholesky", "cg"] = "auto",
        max_iterations: int = 40,
        tolerance: Scalar = 1e-6,
    ) -> tuple[PyTree, Array]:
        """((G + lambda I)^{-1} v, conjugate gradient steps); parameters without structure as ``fallback`` says.

        Args:
            method: "cholesky" of K, with one step of refinement; "cg" with K's products; "auto" takes the first up to
                1024 rows.
        """
        if method == "auto":
            method = "cholesky" if self.num_rows <= 1024 else "cg"
        if method == "cg":
            product = self.gram_product()

            def damped(rows):
                return product(rows) + damping.astype(rows.dtype) * rows

            result = solvers.cg(damped, self.project(vector), max_iterations=max_iterations, tolerance=tolerance)
            solution = self._woodbury(vector, result.value, damping)
            return self._completed(solution, vector, damping), result.iterations
        matrix = self.gram()
        factor = jax.scipy.linalg.cho_factor(
            matrix + damping.astype(matrix.dtype) * jnp.eye(len(matrix), dtype=matrix.dtype)
        )

        def once(vector):
            return self._woodbury(vector, jax.scipy.linalg.cho_solve(factor, self.project(vector)), damping)

        solution = once(vector)
        applied = trees.add(self.lift(self.project(solution)), trees.scale(damping, solution))
        correction = once(self._structured(trees.sub(vector, applied)))
        return self._completed(trees.add(solution, correction), vector, damping), jnp.zeros((), jnp.int32)

    def _woodbury(self, vector, rows, damping):
        return trees.scale(1 / damping, trees.sub(self._structured(vector), self.lift(rows)))

    def _completed(self, solution, vector, damping):
        """The solution; where a parameter has no structure v itself, or with fallback "diagonal" v / (d + lambda)."""
        if self.tapped.layers.fallback == "diagonal" and self.tapped.layers.unstructured:
            diagonal = entrywise(self.tapped, lambda tangents: jnp.sum(jnp.square(self._rows(tangents))))
            others = Diagonal(diagonal).solve(vector, damping=damping)
            vector = trees.replace_leaves(vector, self.tapped.layers.unstructured, others)
        return trees.replace_leaves(solution, self.without, vector)

    def _structured(self, tree):
        """The tree with zeros for parameters without structure."""
        if not self.without:
            return tree
        return trees.replace_leaves(tree, self.without, trees.zeros_like(tree))

    def _rows(self, tangents):
        """The rows that changes of the terms' outputs make, (rows,)."""
        parts = []
        for matrix, root, tangent in zip(self.matrices, self.roots, tangents, strict=True):
            rows = jax.vmap(trees.ravel)(matrix.sqrt_product(tangent))
            parts.append(replicated(rows * root[:, None].astype(rows.dtype)).reshape(-1))
        return self._projected(jnp.concatenate(parts))

    def _projected(self, rows):
        """P y, with y on axis 0; y itself unless rows are centred."""
        if not self.centered:
            return rows
        parts = []
        for root, part in zip(self.roots, self._by_terms(rows), strict=True):
            root = replicated(root).astype(rows.dtype)
            mean = jnp.tensordot(root, part, 1) / jnp.maximum(jnp.sum(jnp.square(root)), jnp.finfo(root.dtype).tiny)
            parts.append((part - root.reshape(-1, *(1,) * (part.ndim - 1)) * mean[None]).reshape(-1, *rows.shape[1:]))
        return jnp.concatenate(parts)

    def _by_terms(self, rows):
        """For each term its rows, (examples, columns, ...)."""
        shapes = [(root.shape[0], columns) for root, columns in zip(self.roots, self.columns, strict=True)]
        ends = itertools.accumulate(count * columns for count, columns in shapes[:-1])
        return [
            part.reshape(*shape, *rows.shape[1:])
            for part, shape in zip(jnp.split(rows, list(ends)), shapes, strict=True)
        ]

    def _pull_back_rows(self):
        """The rows of R, as captured uses with the columns of each example on the first axis."""

        def seeds(matrix, root, columns):
            def one(column):
                return trees.scale_rows(root, matrix.sqrt_transpose_product(unit_vector(matrix.root_structure, column)))

            return jax.vmap(one)(jnp.arange(columns))

        terms = zip(self.matrices, self.roots, self.columns, strict=True)
        captured = self.tapped.pull_back_columns(tuple(seeds(*term) for term in terms))
        return [use for use in captured if not self.without & set(use.layer.leaves)]


def _gram_factors(use):
    """(M, dS) with K y = sum_n (M sum_m y_m dS_m)_n dS_n for a use's part of K; None where it has no such form.

    For a layer M is A A^T; the gradients of an elementwise parameter are the cotangents themselves, M sums over all.
    """
    if use.kind in ("scale", "shift"):
        each = jax.vmap(lambda ds: use._replace(cotangents=ds).per_example())(use.cotangents)
        return lambda summed: jnp.broadcast_to(jnp.sum(summed, axis=0), summed.shape), each.reshape(*each.shape[:2], -1)
    if use.kind == "dense" and use.cotangents.shape[1:4:2] == (1, 1):
        inputs = use.inputs[0, :, 0]
        return functools.partial(jnp.matmul, inputs @ inputs.T), use.cotangents[:, 0, :, 0]
    return None
