"""Symmetric linear maps on parameter pytrees: the one operator protocol that every curvature matrix answers."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.checks import check_choice
from curvax.krylov.conjugate_gradient import cg
from curvax.krylov.functions import lanczos_function, slq_trace
from curvax.krylov.stop_reasons import StopReason
from curvax.types import PyTree, Scalar

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Noise = Callable[[jax.Array, PyTree], PyTree]

_DENSE_LIMIT = 20_000


class LinearMap(abc.ABC):
    r"""A symmetric linear map A on pytrees of one structure; every curvature matrix of this library is one.

    A subclass gives ``structure`` and ``__call__``. Everything else has a default. ``solve``, ``sqrt``,
    ``inverse_sqrt``, ``logdet`` and ``sample`` are exact up to 20,000 parameters, by a factorisation of the matrix, and
    for maps of a form that can do better (diagonal, compact, Kronecker) at any size. Above, or where ``method=`` says
    so, they take products alone: solves and roots reach a tolerance, or are not a number, and log-determinants are
    estimates. What would take a product for each parameter is refused there, and ``curvax.estimators`` has estimates.

    Maps are pytrees: they pass through ``jit``, ``vmap``, ``cond`` and ``scan``. They add, subtract and scale (``A -
    2.0 * B``), and multiply vectors (``A @ v``, the same as ``A(v)``).

    Example:
        >>> A = curvax.from_matvec(lambda v: {"w": 2.0 * v["w"]}, {"w": jnp.zeros(3)})
        >>> A.quadratic({"w": jnp.ones(3)}).item()
        6.0
        >>> A.solve({"w": jnp.ones(3)}, damping=2.0)["w"]
        Array([0.25, 0.25, 0.25], dtype=float...)
        >>> A.shape, A
        ((3, 3), MatvecMap(3 x 3, 1 leaf, float...))
    """

    # Whether ``_solve``, ``_spectral`` and ``_logdet`` do without the dense matrix.
    _has_own_form = False
    # NumPy's numbers and arrays are not to take the map apart.
    __array_ufunc__ = None

    @property
    @abc.abstractmethod
    def structure(self) -> PyTree:
        """The pytree of ``jax.ShapeDtypeStruct`` of the vectors this map acts on."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) for n parameters."""
        size = trees.size(self.structure)
        return size, size

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

    def solve(
        self,
        vector: PyTree,
        *,
        damping: Scalar = 0.0,
        method: Literal["exact", "cg", "lanczos"] | None = None,
        tolerance: Scalar | None = None,
        max_iterations: int = 1000,
    ) -> PyTree:
        r"""(A + damping I)^{-1} v; very large, or not finite, where the damped matrix is singular to rounding.

        Args:
            method: "exact" is a factorisation or the map's own form. "cg" takes conjugate gradients (Hestenes and
                Stiefel 1952), for a positive definite A + damping I: about sqrt(condition number) / 2 *
                log(2 / tolerance) products and the memory of five vectors. "lanczos" keeps a basis of
                ``max_iterations`` vectors that stays orthogonal, which takes fewer products where the matrix is
                ill-conditioned, and definite it need not be. None: "exact" up to 20,000 parameters, then "cg".
            tolerance: Of "cg" on the residual, |A x + damping x - v| <= tolerance |v|, up to rounding of |A| |x|;
                eps^(2/3) if None, 2e-5 in float32. Of "lanczos" on what the last quarter of the steps changes of the
                result; 1e-2 if None. Where it is not met the result is not a number (``curvax.solvers.cg`` says why
                and returns what it has).
            max_iterations: The most products.
        """
        trees.check_like(vector, self.structure, "vector", "the map's vectors")
        match self._method(method, "cg"):
            case "exact":
                return self._solve(vector, damping)
            case "lanczos":
                return self._by_lanczos(vector, _inverse(damping), tolerance, max_iterations)
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(self.structure))
        found = cg(
            self
            if isinstance(damping, (int, float)) and damping == 0
            else lambda v: trees.add_scaled(self(v), damping, v),
            vector,
            max_iterations=max_iterations,
            tolerance=eps ** (2 / 3) if tolerance is None else tolerance,
        )
        return trees.scale(jnp.where(found.reason == StopReason.CONVERGED, 1.0, jnp.nan), found.value)

    def sqrt(
        self,
        vector: PyTree,
        *,
        method: Literal["exact", "lanczos"] | None = None,
        tolerance: Scalar | None = None,
        num_steps: int = 100,
    ) -> PyTree:
        """A^{1/2} v with the symmetric square root; negative eigenvalues become zero. Arguments as for inverse_sqrt."""
        if self._method(method, "lanczos") == "exact":
            return self._spectral(vector, _root)
        return self._by_lanczos(vector, _root, tolerance, num_steps)

    def inverse_sqrt(
        self,
        vector: PyTree,
        *,
        damping: Scalar = 0.0,
        method: Literal["exact", "lanczos"] | None = None,
        tolerance: Scalar | None = None,
        num_steps: int = 100,
    ) -> PyTree:
        r"""(A + damping I)^{-1/2} v with the symmetric square root.

        With normal v it is a draw from N(0, (A + damping I)^{-1}).

        Args:
            method: "exact" is an eigendecomposition or the map's own form, "lanczos" takes ``num_steps`` products and
                holds as many vectors; about sqrt(condition number) / 2 * log(2 / tolerance) are needed, and for
                ``sqrt`` of a singular matrix about 1 / tolerance. None: "exact" up to 20,000 parameters.
            tolerance: Of "lanczos": what the last quarter of the steps may change the result by, relative to it; 1e-2
                if None, and the error is then below that as a rule. Where it is not met the result is not a number.
        """

        def function(values):
            return jax.lax.rsqrt(values + jnp.asarray(damping).astype(values.dtype))

        if self._method(method, "lanczos") == "exact":
            return self._spectral(vector, function)
        return self._by_lanczos(vector, function, tolerance, num_steps)

    def logdet(
        self,
        *,
        damping: Scalar = 0.0,
        method: Literal["exact", "lanczos"] | None = None,
        key: jax.Array | None = None,
        num_steps: int = 100,
        num_samples: int = 10,
    ) -> jax.Array:
        """log |det(A + damping I)|.

        Args:
            method: "exact" is a factorisation or the map's own form, "lanczos" the stochastic Lanczos quadrature of
                ``curvax.estimators.slq_logdet``, which says the standard error too; not a number where the Lanczos
                process meets an eigenvalue that is not positive. None: "exact" up to 20,000 parameters.
            key: Of the ``num_samples`` random vectors of "lanczos", each for ``num_steps`` products; the samples' part
                of the error falls as 1 / sqrt(num_samples), and about sqrt(condition number) steps are needed.
        """
        if self._method(method, "lanczos") == "exact":
            return self._logdet(damping)
        if key is None:
            raise ValueError(
                f"{type(self).__name__}.logdet() of {self.shape[0]:,} parameters is an estimate from random vectors:"
                " pass key=jax.random.key(...)"
            )

        def function(values):
            return jnp.log(values + jnp.asarray(damping).astype(values.dtype))

        return slq_trace(function, self, key, num_steps=num_steps, num_samples=num_samples).value

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
        """A draw u with E[u u^T] = A, for positive semi-definite A; here by ``sqrt``.

        ``distribution`` is (key, like) -> noise of covariance I: ``curvax.trees.random_normal``, which makes u normal,
        or ``curvax.trees.random_rademacher``, whose squares vary less.
        """
        return self.sqrt(distribution(key, self.structure))

    @property
    def has_definite_parts(self) -> bool:
        """False where a part that a draw would be made of is known to be negative: the whole may be definite still.

        A scalar that is traced is taken for one that is not negative.
        """
        return True

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

    def as_scipy_operator(self) -> LinearOperator:
        """The map as a ``scipy.sparse.linalg.LinearOperator`` on NumPy vectors in the order of ``to_dense``.

        >>> import scipy.sparse.linalg
        >>> A = curvax.Diagonal({"w": jnp.arange(1.0, 9.0)})
        >>> scipy.sparse.linalg.eigsh(A.as_scipy_operator(), k=2, return_eigenvectors=False).round(4).tolist()
        [7.0, 8.0]
        """
        from scipy.sparse.linalg import LinearOperator

        def product(linear_map, flat):
            return trees.ravel(linear_map(trees.unravel(flat, self.structure)))

        # A map that is no pytree holds what cannot be traced.
        is_pytree = not any(isinstance(leaf, LinearMap) for leaf in jax.tree.leaves(self))
        product = jax.jit(product) if is_pytree else product
        dtype = trees.wide_dtype(*jax.tree.leaves(self.structure))

        def matvec(vector):
            return np.asarray(product(self, jnp.asarray(vector.reshape(-1), dtype)))

        return LinearOperator(shape=self.shape, matvec=matvec, rmatvec=matvec, dtype=dtype)  # pyright: ignore

    def __add__(self, other: LinearMap) -> LinearMap:
        return Sum((self, other))

    def __sub__(self, other: LinearMap) -> LinearMap:
        return Sum((self, -other))

    def __neg__(self) -> LinearMap:
        return Scaled(-1.0, self)

    def __matmul__(self, vector: PyTree) -> PyTree:
        return self(vector)

    def __mul__(self, scalar: Scalar) -> LinearMap:
        return Scaled(scalar, self)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.structure)
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        counted = f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}"
        return f"{type(self).__name__}({self.shape[0]:,} x {self.shape[1]:,}, {counted}, {dtypes})"

    def _solve(self, vector, damping):
        matrix = _damped(self.to_dense(), damping)
        return trees.unravel(jnp.linalg.solve(matrix, trees.ravel(vector).astype(matrix.dtype)), vector)

    def _spectral(self, vector, function):
        values, vectors = jnp.linalg.eigh(self.to_dense())
        flat = trees.ravel(vector).astype(values.dtype)
        return trees.unravel(vectors @ (function(values) * (vectors.T @ flat)), vector)

    def _logdet(self, damping):
        return jnp.linalg.slogdet(_damped(self.to_dense(), damping))[1]

    def _by_lanczos(self, vector, function, tolerance, num_steps):
        tolerance = 1e-2 if tolerance is None else tolerance
        # One step more than there are dimensions, so that the process sees that there is no other.
        most = min(num_steps, self.shape[0] + 1)
        return lanczos_function(function, self, vector, num_steps=most, tolerance=tolerance)

    def _method(self, method, iterative):
        """The method asked for, or else the exact one where it can be afforded."""
        if method is None:
            return "exact" if self._has_own_form or self.shape[0] <= _DENSE_LIMIT else iterative
        check_choice("method", method, {"exact", "lanczos", iterative})
        return method

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
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MatvecMap(Shaped):
    """The map of ``from_matvec``."""

    matvec: Callable[[PyTree], PyTree]
    like: trees.Static = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> PyTree:
        return self.matvec(vector)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagonal(LinearMap):
    """The diagonal matrix whose diagonal is the pytree ``entries``; everything is elementwise."""

    entries: PyTree
    _has_own_form = True

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.entries)

    def __call__(self, vector: PyTree) -> PyTree:
        return trees.multiply(vector, self.entries)

    def _solve(self, vector, damping):
        return self._spectral(vector, _inverse(damping))

    def _spectral(self, vector, function):
        def scaled(v, d):  # narrow entries may be out of the range of what the function makes of them
            dtype = trees.wide_dtype(v, d)
            return (v.astype(dtype) * function(d.astype(dtype))).astype(v.dtype)

        return jax.tree.map(scaled, vector, self.entries)

    def _logdet(self, damping):
        flat = trees.ravel(self.diagonal())
        return jnp.sum(jnp.log(jnp.abs(flat + jnp.asarray(damping).astype(flat.dtype))))

    def trace(self) -> jax.Array:
        return jnp.sum(trees.ravel(self.entries))

    def diagonal(self) -> PyTree:
        return trees.widened(self.entries)

    def to_dense(self) -> jax.Array:
        return jnp.diag(trees.ravel(self.diagonal()))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DenseMap(Shaped):
    """A matrix that has been formed, in leaf order with every leaf row-major."""

    matrix: jax.Array
    like: trees.Static = dataclasses.field(metadata={"static": True})
    _has_own_form = True

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
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sum(Combined):
    """The sum of maps of one structure."""

    maps: tuple[LinearMap, ...]

    @property
    def structure(self) -> PyTree:
        return self.maps[0].structure

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        if not self.has_definite_parts:
            return super().sample(key, distribution)
        keys = iter(trees.split_key(key, len(self.maps)))
        return self._of(lambda a: a.sample(next(keys), distribution))

    @property
    def has_definite_parts(self) -> bool:
        return all(a.has_definite_parts for a in self.maps)

    def _of(self, function):
        return functools.reduce(trees.add, [function(a) for a in self.maps])


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scaled(Combined):
    """A scalar times a map."""

    scalar: Scalar
    map: LinearMap

    @property
    def structure(self) -> PyTree:
        return self.map.structure

    @property
    def has_definite_parts(self) -> bool:
        negative = not isinstance(self.scalar, Tracer) and float(np.asarray(self.scalar)) < 0
        return not negative and self.map.has_definite_parts

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        if not self.has_definite_parts:
            return super().sample(key, distribution)
        return trees.scale(jnp.sqrt(jnp.asarray(self.scalar)), self.map.sample(key, distribution))

    def _of(self, function):
        return trees.scale(self.scalar, function(self.map))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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

    @property
    def has_definite_parts(self) -> bool:
        return self.map.has_definite_parts

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        return trees.extract(self.map.sample(key, distribution), self.structure)

    def _embed(self, vector):
        return trees.embed(vector, trees.zeros_like(self.map.structure))


def _inverse(damping):
    return lambda values: 1 / (values + jnp.asarray(damping).astype(values.dtype))


def _root(values):
    return jnp.sqrt(jnp.maximum(values, 0))


def _damped(matrix, damping):
    return matrix + jnp.asarray(damping).astype(matrix.dtype) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
