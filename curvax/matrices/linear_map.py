"""Symmetric linear maps on parameter pytrees: the one operator protocol that every curvature matrix answers."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.types import PyTree, Scalar

Noise = Callable[[jax.Array, PyTree], PyTree]

_DENSE_LIMIT = 20_000


class LinearMap(abc.ABC):
    r"""A symmetric linear map A on pytrees of one structure; every curvature matrix of this library is one.

    A subclass gives ``structure`` and ``__call__``. Everything else has a default that is exact and forms the matrix,
    fit for some thousands of parameters; maps with structure override what they can do better. For large maps use
    ``curvax.estimators`` (traces, diagonals, spectra) and ``curvax.solvers`` (solves), which need only products.

    Maps are pytrees: they pass through ``jit``, ``vmap``, ``cond`` and ``scan``. They add (``A + B``) and scale
    (``2.0 * A``).

    Example:
        >>> A = curvax.from_matvec(lambda v: {"w": 2.0 * v["w"]}, {"w": jnp.zeros(3)})
        >>> A.quadratic({"w": jnp.ones(3)}).item()
        6.0
        >>> A.solve({"w": jnp.ones(3)}, damping=2.0)["w"]
        Array([0.25, 0.25, 0.25], dtype=float...)
    """

    @property
    @abc.abstractmethod
    def structure(self) -> PyTree:
        """The pytree of ``jax.ShapeDtypeStruct`` of the vectors this map acts on."""

    @abc.abstractmethod
    def __call__(self, vector: PyTree) -> PyTree:
        """The product A v."""

    def block(self, vectors: PyTree) -> PyTree:
        """The products A v_1 ... A v_k; every leaf of ``vectors`` has a leading axis of length k."""
        return jax.vmap(self)(vectors)

    def quadratic(self, vector: PyTree) -> jax.Array:
        """The quadratic form v^T A v, a scalar."""
        return self.bilinear(vector, vector)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        """The bilinear form u^T A v, a scalar."""
        return trees.vdot(left, self(right))

    def solve(self, vector: PyTree, *, damping: Scalar = 0.0) -> PyTree:
        """(A + damping I)^{-1} v by a dense factorisation; not finite where the damped matrix is singular.

        For large maps use ``curvax.solvers``.
        """
        trees.check_like(vector, self.structure, "vector", "the map's vectors")
        matrix = _damped(self.to_dense(), damping)
        return trees.unravel(jnp.linalg.solve(matrix, trees.ravel(vector).astype(matrix.dtype)), vector)

    def sqrt(self, vector: PyTree) -> PyTree:
        """A^{1/2} v with the symmetric square root, by a dense eigendecomposition; negative eigenvalues become zero."""
        return self._spectral(vector, lambda values: jnp.sqrt(jnp.maximum(values, 0)))

    def inverse_sqrt(self, vector: PyTree, *, damping: Scalar = 0.0) -> PyTree:
        """(A + damping I)^{-1/2} v with the symmetric square root, by a dense eigendecomposition."""
        return self._spectral(vector, lambda values: 1 / jnp.sqrt(values + jnp.asarray(damping, values.dtype)))

    def logdet(self, *, damping: Scalar = 0.0) -> jax.Array:
        """log |det(A + damping I)|, by a dense factorisation."""
        return jnp.linalg.slogdet(_damped(self.to_dense(), damping))[1]

    def trace(self) -> jax.Array:
        """The trace of A, exactly, by one product for each parameter."""
        ones = jax.tree.map(jnp.ones_like, self.structure)
        return trees.vdot(ones, self.diagonal())

    def diagonal(self) -> PyTree:
        """The diagonal of A as a pytree in float32 at least, exactly, by one quadratic form for each parameter."""
        self._check_dense("diagonal", "curvax.estimators.hutchinson_diagonal")
        like = self.structure
        dtype = trees.wide_dtype(*jax.tree.leaves(like))

        def entry(index):
            basis = trees.unravel((jnp.arange(trees.size(like)) == index).astype(dtype), like)
            return self.quadratic(basis).astype(dtype)

        return trees.unravel(jax.lax.map(entry, jnp.arange(trees.size(like))), trees.wide_structure(like))

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        """A draw u with E[u u^T] = A, for positive semi-definite A; here by a dense square root.

        ``distribution`` is (key, like) -> noise of covariance I: ``curvax.trees.random_normal``, which makes u normal,
        or ``curvax.trees.random_rademacher``, whose squares vary less.
        """
        return self.sqrt(distribution(key, self.structure))

    def to_dense(self) -> jax.Array:
        """The matrix, n x n, in leaf order with every leaf row-major (``curvax.trees.ravel``)."""
        self._check_dense("to_dense", "curvax.solvers and curvax.estimators")
        like = self.structure
        identity = jnp.eye(trees.size(like), dtype=trees.wide_dtype(*jax.tree.leaves(like)))

        def column(row):
            return trees.ravel(self(trees.unravel(row, like)))

        # One product at a time: XLA's CPU backend runs batched matrix products in loops many times slower.
        return jax.lax.map(column, identity).T

    def restrict(self, template: PyTree) -> LinearMap:
        """The principal submatrix E^T A E, where E fills the leaves that ``template`` lacks with zeros.

        Args:
            template: A pytree with some of the leaves of ``structure``, by path; the others may be None, missing or
                ``optax.MaskedNode``. Shapes only are read.
        """
        template = trees.structure_of(template)
        if jax.tree.structure(template) == jax.tree.structure(self.structure):
            return self
        return Restricted.of(self, template)

    def __add__(self, other: LinearMap) -> LinearMap:
        return Sum((self, other))

    def __mul__(self, scalar: Scalar) -> LinearMap:
        return Scaled(scalar, self)

    __rmul__ = __mul__

    def _spectral(self, vector, function):
        values, vectors = jnp.linalg.eigh(self.to_dense())
        flat = trees.ravel(vector).astype(values.dtype)
        return trees.unravel(vectors @ (function(values) * (vectors.T @ flat)), vector)

    def _check_dense(self, method: str, instead: str) -> None:
        count = trees.size(self.structure)
        if count > _DENSE_LIMIT:
            raise ValueError(
                f"{type(self).__name__}.{method}() would take a product for each of {count:,} parameters (limit"
                f" {_DENSE_LIMIT:,}); use {instead}, which need only some products"
            )


def from_matvec(matvec: Callable[[PyTree], PyTree], like: PyTree) -> LinearMap:
    """A linear map from a function that multiplies a pytree by a symmetric matrix.

    Args:
        matvec: v -> A v; linear and symmetric, which is not checked. If it is a ``jax.tree_util.Partial``, the arrays
            in it pass through ``jit``.
        like: A pytree with the shapes and dtypes of v.

    Example:
        >>> A = curvax.from_matvec(lambda v: 3.0 * v, jnp.zeros(2))
        >>> A.to_dense()
        Array([[3., 0.],
               [0., 3.]], dtype=float...)
    """
    if not isinstance(matvec, jax.tree_util.Partial):
        matvec = jax.tree_util.Partial(matvec)
    return MatvecMap.of(matvec, like)


class Shaped(LinearMap):
    """A map that keeps the structure of its vectors, in its last field."""

    like: trees.Static

    @classmethod
    def of(cls, content: Any, like: PyTree) -> Self:
        """The map of that content on vectors like ``like``."""
        return cls(content, trees.Static(trees.structure_of(like)))  # pyright: ignore[reportCallIssue]

    @property
    def structure(self) -> PyTree:
        return self.like.tree


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MatvecMap(Shaped):
    """The map of ``from_matvec``."""

    matvec: Callable[[PyTree], PyTree]
    like: trees.Static = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> PyTree:
        return self.matvec(vector)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Diagonal(LinearMap):
    """The diagonal matrix whose diagonal is the pytree ``entries``; everything is elementwise."""

    entries: PyTree

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.entries)

    def __call__(self, vector: PyTree) -> PyTree:
        return trees.multiply(vector, self.entries)

    def solve(self, vector: PyTree, *, damping: Scalar = 0.0) -> PyTree:
        def divide(v, d):
            dtype = trees.wide_dtype(v, d)
            return (v.astype(dtype) / (d.astype(dtype) + jnp.asarray(damping, dtype))).astype(v.dtype)

        return jax.tree.map(divide, vector, self.entries)

    def sqrt(self, vector: PyTree) -> PyTree:
        return trees.multiply(vector, jax.tree.map(lambda d: jnp.sqrt(jnp.maximum(d, 0)), self.entries))

    def inverse_sqrt(self, vector: PyTree, *, damping: Scalar = 0.0) -> PyTree:
        roots = jax.tree.map(lambda d: 1 / jnp.sqrt(d + jnp.asarray(damping, d.dtype)), self.entries)
        return trees.multiply(vector, roots)

    def logdet(self, *, damping: Scalar = 0.0) -> jax.Array:
        flat = trees.ravel(self.diagonal())
        return jnp.sum(jnp.log(jnp.abs(flat + jnp.asarray(damping, flat.dtype))))

    def trace(self) -> jax.Array:
        return jnp.sum(trees.ravel(self.entries))

    def diagonal(self) -> PyTree:
        return self.entries

    def to_dense(self) -> jax.Array:
        return jnp.diag(trees.ravel(self.diagonal()))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LeafScalars(Shaped, Diagonal):
    """The diagonal matrix with one scalar for each leaf: a penalty's Hessian, or lambda I."""

    like: trees.Static = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.structure, "vector")
        return super().__call__(vector)

    def trace(self) -> jax.Array:
        return trees.vdot(self.entries, jax.tree.map(lambda x: jnp.asarray(x.size, x.dtype), self.structure))

    def diagonal(self) -> PyTree:
        return jax.tree.map(
            lambda x, s: jnp.full(x.shape, s, x.dtype), trees.wide_structure(self.structure), self.entries
        )


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseMap(Shaped):
    """A matrix that has been formed, in leaf order with every leaf row-major."""

    matrix: jax.Array
    like: trees.Static = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> PyTree:
        return trees.unravel(self.matrix @ trees.ravel(vector).astype(self.matrix.dtype), vector)

    def diagonal(self) -> PyTree:
        return trees.unravel(jnp.diag(self.matrix), trees.wide_structure(self.structure))

    def to_dense(self) -> jax.Array:
        return self.matrix


class Combined(LinearMap):
    """A map made of others: ``_of`` makes what is linear in the matrix from that of the parts."""

    @abc.abstractmethod
    def _of(self, function: Callable[[LinearMap], Any]) -> Any: ...

    def __call__(self, vector: PyTree) -> PyTree:
        return self._of(lambda a: a(vector))

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        return self._of(lambda a: a.bilinear(left, right))

    def quadratic(self, vector: PyTree) -> jax.Array:
        return self._of(lambda a: a.quadratic(vector))

    def trace(self) -> jax.Array:
        return self._of(lambda a: a.trace())

    def diagonal(self) -> PyTree:
        return self._of(lambda a: a.diagonal())


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Combined):
    """The sum of maps of one structure."""

    maps: tuple[LinearMap, ...]

    @property
    def structure(self) -> PyTree:
        return self.maps[0].structure

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        keys = iter(jax.random.split(key, len(self.maps)))
        return self._of(lambda a: a.sample(next(keys), distribution))

    def _of(self, function):
        return functools.reduce(trees.add, [function(a) for a in self.maps])


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(Combined):
    """A scalar times a map."""

    scalar: Scalar
    map: LinearMap

    @property
    def structure(self) -> PyTree:
        return self.map.structure

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        return trees.scale(jnp.sqrt(jnp.asarray(self.scalar)), self.map.sample(key, distribution))

    def _of(self, function):
        return trees.scale(self.scalar, function(self.map))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Restricted(Shaped):
    """The principal submatrix on some of the leaves; see ``LinearMap.restrict``."""

    map: LinearMap
    like: trees.Static = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> PyTree:
        return trees.extract(self.map(self._embed(vector)), vector)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        return self.map.bilinear(self._embed(left), self._embed(right))

    def quadratic(self, vector: PyTree) -> jax.Array:
        return self.map.quadratic(self._embed(vector))

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        return trees.extract(self.map.sample(key, distribution), self.structure)

    def _embed(self, vector):
        return trees.embed(vector, trees.zeros_like(self.map.structure))


def _damped(matrix, damping):
    return matrix + jnp.asarray(damping, matrix.dtype) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
