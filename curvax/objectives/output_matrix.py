r"""Symmetric matrices on the outputs of a model, one for each case of a batch, never formed where avoidable.

Every matrix C answers four products, each taken for all cases at once: C u, S u and S^T v with S^T S = C, and the
pseudo-inverse C^+ u. Vectors are pytrees shaped like the model's outputs; v has ``root_structure``. All matrices are
positive semi-definite but the exact Hessian of a non-convex loss, which has no S.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_dataclass

from curvax import trees
from curvax.types import Array, PyTree


class OutputMatrix(abc.ABC):
    """The interface: a block-diagonal matrix over the cases of a batch."""

    @property
    @abc.abstractmethod
    def root_structure(self) -> PyTree:
        """The ShapeDtypeStructs of S u, batch axis first."""

    @abc.abstractmethod
    def product(self, vector: PyTree) -> PyTree:
        """C u."""

    @abc.abstractmethod
    def sqrt_product(self, vector: PyTree) -> PyTree:
        """S u, where S^T S = C."""

    @abc.abstractmethod
    def sqrt_transpose_product(self, vector: PyTree) -> PyTree:
        """S^T v; if v has covariance I, the result has covariance C."""

    @abc.abstractmethod
    def pinv_product(self, vector: PyTree) -> PyTree:
        """C^+ u with the Moore-Penrose pseudo-inverse."""

    def pinv_quadratic(self, vector: PyTree) -> jax.Array:
        """u^T C^+ u for each example; infinite where u leaves the range of C and where C has a negative eigenvalue.

        That is twice the most by which u^T x - 1/2 x^T C x rises. A part outside the range below sqrt(eps) ||u|| is
        taken for rounding. Forms the matrix of each example.
        """
        return _dense_of(self, vector, 1).pinv_quadratic(vector)


def num_columns(matrix: OutputMatrix) -> int:
    """How many columns the root S^T of an output matrix has for each example."""
    return trees.size(trees.example_structure(matrix.root_structure))


def unit_vector(structure: PyTree, column: Array) -> PyTree:
    """The unit vector e_column for every example, in the arrays of ``structure``; zero behind the last one."""
    example = trees.example_structure(structure)
    unit = trees.unravel(jnp.arange(trees.size(example)) == column, example)
    return jax.tree.map(lambda x, leaf: jnp.broadcast_to(x, leaf.shape), unit, structure)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalOutputs(OutputMatrix):
    """A diagonal matrix with non-negative ``entries``, shaped like the outputs."""

    entries: PyTree

    @property
    def root_structure(self) -> PyTree:
        return trees.structure_of(self.entries)

    def product(self, vector: PyTree) -> PyTree:
        return trees.multiply(vector, self.entries)

    def sqrt_product(self, vector: PyTree) -> PyTree:
        return trees.multiply(vector, jax.tree.map(jnp.sqrt, self.entries))

    sqrt_transpose_product = sqrt_product

    def pinv_product(self, vector: PyTree) -> PyTree:
        def divide(u, d):
            return jnp.where(d > 0, u / jnp.where(d > 0, d, 1).astype(u.dtype), 0)

        return jax.tree.map(divide, vector, self.entries)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SoftmaxOutputs(OutputMatrix):
    r"""The matrix a (diag(p) - p p^T) over the last axis: ``mass`` a, and p the softmax given by its logarithm.

    With q = sqrt(p), S = sqrt(a) (I - q q^T) diag(q), where I - q q^T is a projection because ||q|| = 1. The
    pseudo-inverse is P diag(p)^{-1} P / a with P the projection on vectors of zero sum, both among the classes whose
    probability is not zero.
    """

    log_probabilities: jax.Array
    mass: jax.Array

    @property
    def root_structure(self) -> PyTree:
        return trees.structure_of(self.log_probabilities)

    def product(self, vector: PyTree) -> PyTree:
        p = jnp.exp(self.log_probabilities)
        return self.mass[..., None] * p * _project(vector, p, 1)

    def sqrt_product(self, vector: PyTree) -> PyTree:
        p, q = jnp.exp(self.log_probabilities), jnp.exp(self.log_probabilities / 2)
        return jnp.sqrt(self.mass)[..., None] * q * _project(vector, p, 1)

    def sqrt_transpose_product(self, vector: PyTree) -> PyTree:
        q = jnp.exp(self.log_probabilities / 2)
        return jnp.sqrt(self.mass)[..., None] * q * _project(vector, q, q)

    def pinv_product(self, vector: PyTree) -> PyTree:
        diagonal = self.mass[..., None] * jnp.exp(self.log_probabilities)
        support = diagonal > 0

        def centred(u):
            return jnp.where(support, u - jnp.mean(u, axis=-1, keepdims=True, where=support), 0)

        return centred(centred(vector) / jnp.where(support, diagonal, 1))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RankOneOutputs(OutputMatrix):
    r"""The matrix (1/S) sum_s g_s g_s^T for each case, from S vectors: the Monte-Carlo and the empirical Fisher.

    ``vectors`` are g, shaped like the outputs with one more axis of length S behind the axes of the cases; of those
    there are ``case_axes``: 1 for examples, 2 for the steps of sequences.
    """

    vectors: PyTree
    case_axes: int = dataclasses.field(metadata={"static": True}, default=1)

    @property
    def root_structure(self) -> PyTree:
        leaves = jax.tree.leaves(self.vectors)
        return jax.ShapeDtypeStruct(leaves[0].shape[: self.case_axes + 1], trees.wide_dtype(*leaves))

    def product(self, vector: PyTree) -> PyTree:
        return self.sqrt_transpose_product(self.sqrt_product(vector))

    def sqrt_product(self, vector: PyTree) -> PyTree:
        dtype = self.root_structure.dtype

        def inner(g, u):
            products = g.astype(dtype) * jnp.expand_dims(u, self.case_axes).astype(dtype)
            return jnp.sum(products, axis=tuple(range(self.case_axes + 1, g.ndim)))

        return self._root_weight() * sum(jax.tree.leaves(jax.tree.map(inner, self.vectors, vector)))

    def sqrt_transpose_product(self, vector: PyTree) -> PyTree:
        def combine(g):
            products = g.astype(vector.dtype) * trees.expand_right(vector, g.ndim)
            return (self._root_weight() * jnp.sum(products, axis=self.case_axes)).astype(g.dtype)

        return jax.tree.map(combine, self.vectors)

    def pinv_product(self, vector: PyTree) -> PyTree:
        return _dense_of(self, vector, self.case_axes).pinv_product(vector)

    def _root_weight(self):
        return 1 / math.sqrt(self.root_structure.shape[self.case_axes])


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AutodiffOutputs(OutputMatrix):
    r"""The Hessian of a per-example loss by automatic differentiation, its eigenvalues treated as ``treatment`` says.

    "exact" takes the Hessian as it is, "absolute" the absolute values of its eigenvalues, "clipped" drops the negative
    ones (Martens 2016, section 4.4.3; the last two form the Hessian of each example); a ``convex`` one is known to be
    positive semi-definite.
    """

    function: Callable[[PyTree, PyTree], jax.Array] = dataclasses.field(metadata={"static": True})
    outputs: PyTree
    targets: PyTree
    treatment: str = dataclasses.field(metadata={"static": True}, default="exact")
    convex: bool = dataclasses.field(metadata={"static": True}, default=True)

    @property
    def root_structure(self) -> PyTree:
        return trees.structure_of(self.outputs)

    def product(self, vector: PyTree) -> PyTree:
        if self.treatment != "exact":
            return self._dense().product(vector)

        def one(z, y, u):
            return jax.jvp(lambda z: jax.grad(self.function)(z, y), (z,), (u,))[1]

        return jax.vmap(one)(self.outputs, self.targets, trees.cast_like(vector, self.outputs))

    def sqrt_product(self, vector: PyTree) -> PyTree:
        return self._root().sqrt_product(vector)

    def sqrt_transpose_product(self, vector: PyTree) -> PyTree:
        return self._root().sqrt_transpose_product(vector)

    def pinv_product(self, vector: PyTree) -> PyTree:
        return self._dense().pinv_product(vector)

    def pinv_quadratic(self, vector: PyTree) -> jax.Array:
        return self._dense().pinv_quadratic(vector)

    def _root(self):
        if self.treatment == "exact" and not self.convex:
            raise ValueError(
                "the Hessian of a non-convex loss, taken as it is (curvature='exact'), has no square root; make the"
                " loss with another curvature"
            )
        return self._dense()

    def _dense(self):
        matrix = _dense_of(dataclasses.replace(self, treatment="exact"), self.outputs, 1)
        if self.treatment == "absolute":
            return dataclasses.replace(matrix, values=jnp.abs(matrix.values))
        if self.treatment == "clipped" or self.convex:
            return dataclasses.replace(matrix, values=jnp.maximum(matrix.values, 0))
        return matrix


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EigenOutputs:
    """A dense matrix for each case by its eigenvalues (cases..., m) and eigenvectors (cases..., m, m).

    No ``OutputMatrix``: it has no ``root_structure``, as it takes vectors of any structure with m entries for each
    case. The root is symmetric, so that S u is shaped like u.
    """

    values: jax.Array
    vectors: jax.Array

    def product(self, vector: PyTree) -> PyTree:
        return self._apply(vector, lambda values: values)

    def sqrt_product(self, vector: PyTree) -> PyTree:
        return self._apply(vector, jnp.sqrt)

    sqrt_transpose_product = sqrt_product

    def pinv_product(self, vector: PyTree) -> PyTree:
        def invert(values):
            kept = jnp.abs(values) > _rounding(values)
            return jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

        return self._apply(vector, invert)

    def pinv_quadratic(self, vector: PyTree) -> jax.Array:
        def one(values, vectors, u):
            squares = (vectors.T @ trees.ravel(u).astype(values.dtype)) ** 2
            rounding = _rounding(values)
            flat = values <= rounding
            # Rounding makes a vector of the range seem to leave it a little. That little is charged at the least
            # curvature that can be told from zero, so that the result errs upwards.
            leaves_range = flat & (squares > jnp.finfo(squares.dtype).eps * jnp.sum(squares))
            bounded = ~jnp.any(leaves_range | (values < -rounding))
            return jnp.where(bounded, jnp.sum(squares / jnp.maximum(values, rounding)), jnp.inf)

        return self._vmapped(one)(self.values, self.vectors, vector)

    def _apply(self, vector, function):
        def one(values, vectors, u):
            flat = trees.ravel(u).astype(values.dtype)
            return trees.unravel(vectors @ (function(values) * (vectors.T @ flat)), u)

        return self._vmapped(one)(self.values, self.vectors, vector)

    def _vmapped(self, one):
        for _ in range(self.values.ndim - 1):
            one = jax.vmap(one)
        return one


def _dense_of(matrix: OutputMatrix, like: PyTree, case_axes: int) -> EigenOutputs:
    """The eigendecomposition of every case's block, from products with basis vectors."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[case_axes:], leaf.dtype), like)
    cases = jax.tree.leaves(like)[0].shape[:case_axes]
    flatten, expand = trees.ravel, Partial(trees.unravel, like=shapes)
    for _ in range(case_axes):
        flatten, expand = jax.vmap(flatten), jax.vmap(expand)

    def column(basis):
        return flatten(matrix.product(expand(jnp.broadcast_to(basis, cases + basis.shape))))

    identity = jnp.eye(trees.size(shapes), dtype=trees.wide_dtype(*jax.tree.leaves(like)))
    blocks = jax.vmap(column, out_axes=-1)(identity)
    values, vectors = jnp.linalg.eigh((blocks + jnp.swapaxes(blocks, -1, -2)) / 2)
    return EigenOutputs(values, vectors)


def _rounding(values):
    """The size below which an eigenvalue cannot be told from zero."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.where(largest > 0, largest, 1) * (values.shape[-1] * jnp.finfo(values.dtype).eps)


def _project(vector, left, right):
    """vector - right (left^T vector) over the last axis, a projection, applied twice.

    Where one probability is close to 1 the first application cancels; the second removes the rounding it leaves.
    """
    for _ in range(2):
        vector = vector - right * jnp.sum(left * vector, axis=-1, keepdims=True)
    return vector
