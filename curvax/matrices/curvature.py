r"""The curvature matrices of an objective as linear maps: Hessian, generalised Gauss-Newton, Fisher, empirical Fisher.

All are means over the cases of the batch plus the Hessian of the l2 penalty. A product with the Gauss-Newton or a
Fisher matrix is one push forward (J v) and one pull back (J^T u) through a linearisation made once; quadratic and
bilinear forms need only the push forward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.matrices.linear_map import LinearMap, Noise, Sum
from curvax.objectives.objective import Objective, point_at
from curvax.objectives.output_matrix import OutputMatrix, RankOneOutputs
from curvax.objectives.point import CurvaturePoint, Piece
from curvax.objectives.term import scale_cases

PyTree = Any


def hessian(
    objective: Objective,
    params: PyTree = None,
    batch: PyTree = None,
    *,
    at: CurvaturePoint | None = None,
    chunk_size: int | None = None,
) -> LinearMap:
    r"""The Hessian H of the objective; H v is the derivative of the gradient along v.

    The gradient is linearised once, so repeated products share its forward and backward pass (Martens 2016, section
    4.3). ``quadratic`` and ``bilinear`` differentiate the loss twice forwards, without a backward pass.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.
        at: A curvature point in place of params and batch.
        chunk_size: Examples to take through the model at a time; None for all.

    Returns:
        The map; indefinite in general.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros((2, 1)))
        >>> curvax.hessian(objective, jnp.zeros((2, 1)), batch).to_dense()
        Array([[0.5, 0. ],
               [0. , 2. ]], dtype=float...)
    """
    point = point_at(objective, params, batch, at, chunk_size)
    if not all(term.loss.has_value for term in point.objective.terms):
        raise ValueError(
            "the Hessian needs the loss, and this objective has curvature only; use curvax.ggn or curvax.fisher"
        )
    matrix = Hessian(point, None)
    if point.chunk_size is None:
        matrix = Hessian(point, jax.linearize(matrix.data_gradient, point.params)[1])
    return with_penalty(matrix, point)


def ggn(
    objective: Objective,
    params: PyTree = None,
    batch: PyTree = None,
    *,
    at: CurvaturePoint | None = None,
    chunk_size: int | None = None,
) -> LinearMap:
    r"""The generalised Gauss-Newton matrix G = (1/N) sum_i J_i^T C_i J_i, with C the loss's matrix on the outputs.

    C is the Hessian H_L of the loss in the outputs for convex losses, else what the loss documents as its
    ``curvature``; G is positive semi-definite whenever C is. Schraudolph 2002; Martens 2016, eq. 3.3.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.
        at: A curvature point in place of params and batch: no pass through the model is repeated.
        chunk_size: Examples to take through the model at a time; None for all.

    Returns:
        The map. ``sample`` draws from N(0, G) by one pull back, unbiased squares of which estimate the diagonal.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.sigmoid_binary_cross_entropy())
        >>> G = curvax.ggn(objective, jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))))
        >>> G.to_dense()
        Array([[0.125, 0.   ],
               [0.   , 0.125]], dtype=float...)
    """
    return _pullback(point_at(objective, params, batch, at, chunk_size), _ggn_matrix)


def fisher(
    objective: Objective,
    params: PyTree = None,
    batch: PyTree = None,
    *,
    at: CurvaturePoint | None = None,
    key: jax.Array | None = None,
    num_samples: int | None = None,
    chunk_size: int | None = None,
) -> LinearMap:
    r"""The Fisher matrix F = (1/N) sum_i J_i^T F_R J_i of the predictive distribution; it ignores the targets.

    With ``key`` and ``num_samples`` it is the Monte-Carlo estimate (1/(N S)) sum_is g_is g_is^T with gradients g at
    targets drawn from the model's own distribution; every example has a key of its own, so the draw does not depend on
    the chunk size. Martens 2016, eq. 5.4.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch; its targets are not read by the exact matrix.
        at: A curvature point in place of params and batch.
        key: A PRNG key, for the Monte-Carlo matrix.
        num_samples: S, targets drawn for each example.
        chunk_size: Examples to take through the model at a time; None for all.

    Returns:
        The map; equal to ``ggn`` for losses with ``natural`` set.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> F = curvax.fisher(objective, params, batch, key=jax.random.key(0), num_samples=1000)
        >>> bool(abs(F.trace() - curvax.fisher(objective, params, batch).trace()) < 0.1)
        True
    """
    point = point_at(objective, params, batch, at, chunk_size)
    if (key is None) != (num_samples is None):
        raise ValueError("the Monte-Carlo Fisher matrix takes both key= and num_samples=, the exact one neither")
    if key is None or num_samples is None:
        return _pullback(point, _fisher_matrix)
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    return _pullback(point, _MonteCarloFisher(num_samples), _example_keys(point, key))


def empirical_fisher(
    objective: Objective,
    params: PyTree = None,
    batch: PyTree = None,
    *,
    at: CurvaturePoint | None = None,
    chunk_size: int | None = None,
) -> LinearMap:
    r"""The empirical Fisher matrix (1/N) sum_i g_i g_i^T, with g_i the gradient of case i at its training target.

    Products come from J and J^T without a gradient for each example. It is not the Fisher matrix: it vanishes where the
    fit is perfect and has another scale elsewhere (Martens 2016, section 5.6.1). A weighted case counts w_i g_i g_i^T.

    Args:
        objective: The objective.
        params: theta.
        batch: The batch.
        at: A curvature point in place of params and batch.
        chunk_size: Examples to take through the model at a time; None for all.

    Returns:
        The map, of rank N at most.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batch = (jnp.eye(2), jnp.array([[1.0], [2.0]]))
        >>> curvax.empirical_fisher(objective, jnp.zeros((2, 1)), batch).diagonal()
        Array([[0.5],
               [2. ]], dtype=float...)
    """
    return _pullback(point_at(objective, params, batch, at, chunk_size), _empirical_matrix)


def over_batches(
    make: Callable[[Objective, PyTree, PyTree], LinearMap],
    objective: Objective,
    params: PyTree,
    batches: Iterable[PyTree],
) -> LinearMap:
    r"""A curvature matrix over a data loader: the matrix of all batches taken together, accumulated one at a time.

    Every term's mean is over its cases in all batches, whatever the sizes of the batches. Each product reads all
    batches anew; the work on one batch is compiled once for each batch shape.

    Args:
        make: (objective, params, batch) -> map, such as ``curvax.ggn`` or ``curvax.hessian``.
        objective: The objective.
        params: theta.
        batches: Batches that can be iterated over again and again: a list or a loader, not a generator.

    Returns:
        The map. It holds Python objects: call it outside ``jit``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batches = [(jnp.ones((2, 1)), jnp.zeros((2, 1))), (jnp.zeros((1, 1)), jnp.zeros((1, 1)))]
        >>> curvax.over_batches(curvax.ggn, objective, jnp.zeros((1, 1)), batches)(jnp.ones((1, 1)))
        Array([[0.6666...]], dtype=float...)
    """
    return OverBatches(make, objective, params, batches)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pullback(LinearMap):
    """(1/N) sum_i J_i^T C_i J_i for a matrix C on the outputs; without the penalty.

    Attributes:
        point: The linearisation.
        extras: For each term C itself, or in chunks what C is made from.
        make: (piece) -> C.
    """

    point: CurvaturePoint
    extras: tuple[Any, ...] | None
    make: Callable[[Piece], OutputMatrix] = dataclasses.field(metadata={"static": True})

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.point.params)

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.point.params, "vector")

        def one(piece):
            curved = self._matrix(piece).product(piece.jvp(vector))
            return piece.transpose(scale_cases(piece.scale, curved))

        return self.point.accumulate(one, self.extras)

    def quadratic(self, vector: PyTree) -> jax.Array:
        trees.check_like(vector, self.point.params, "vector")

        def one(piece):
            tangent = piece.jvp(vector)
            return trees.vdot(tangent, scale_cases(piece.scale, self._matrix(piece).product(tangent)))

        return self.point.accumulate(one, self.extras)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        trees.check_like(left, self.point.params, "left")
        trees.check_like(right, self.point.params, "right")

        def one(piece):
            curved = self._matrix(piece).product(piece.jvp(right))
            return trees.vdot(piece.jvp(left), scale_cases(piece.scale, curved))

        return self.point.accumulate(one, self.extras)

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        """A draw u = (1/sqrt N) sum_i J_i^T S_i^T v_i, where S^T S = C and v_i is independent noise.

        Every example has a key of its own, so the draw does not depend on the chunk size.
        """
        keys = _example_keys(self.point, key)
        extras = keys if self.extras is None else tuple(zip(keys, self.extras, strict=True))

        def one(piece):
            noise_keys, extra = (piece.extra, None) if self.extras is None else piece.extra
            matrix = self._matrix(piece._replace(extra=extra))
            example = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), matrix.root_structure)
            noise = jax.vmap(lambda k: distribution(k, example))(noise_keys)
            return piece.transpose(scale_cases(jnp.sqrt(piece.scale), matrix.sqrt_transpose_product(noise)))

        return self.point.accumulate(one, extras)

    def output_matrix(self, index: int) -> OutputMatrix:
        """C of the term of that index; for points that hold the whole batch."""
        return self._matrix(self.point.pieces(self.extras)[index])

    def _matrix(self, piece):
        return piece.extra if isinstance(piece.extra, OutputMatrix) else self.make(piece)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Hessian(LinearMap):
    """The Hessian of the objective without its penalty."""

    point: CurvaturePoint
    linear_gradient: Callable[[PyTree], PyTree] | None

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.point.params)

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.point.params, "vector")
        if self.linear_gradient is not None:
            return self.linear_gradient(vector)

        def one(piece):
            return jax.jvp(piece.gradient_at, (self.point.params,), (vector,))[1]

        return self.point.accumulate(one)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        trees.check_like(left, self.point.params, "left")
        trees.check_like(right, self.point.params, "right")
        params = self.point.params

        def one(piece):
            return jax.jvp(lambda p: jax.jvp(piece.value_at, (p,), (right,))[1], (params,), (left,))[1]

        return self.point.accumulate(one)

    def data_gradient(self, params: PyTree) -> PyTree:
        """The gradient of the objective without its penalty."""
        return self.point.accumulate(lambda piece: piece.gradient_at(params))


class OverBatches(LinearMap):
    """The map of ``over_batches``."""

    def __init__(self, make, objective, params, batches):
        if iter(batches) is batches:
            raise TypeError("over_batches reads the batches many times: pass a list or a loader, not an iterator")
        self._make, self._objective, self._params, self._batches = make, objective, params, batches
        counts = jax.jit(lambda params, batch: [cases.num_cases for cases in objective.linearize(params, batch).cases])
        self._counts = [counts(params, batch) for batch in batches]
        if not self._counts:
            raise ValueError("over_batches got no batches")
        self._totals = [sum(term) for term in zip(*self._counts, strict=True)]
        self._product = jax.jit(lambda objective, params, batch, v: make(objective, params, batch)(v))
        self._bilinear = jax.jit(lambda objective, params, batch, u, v: make(objective, params, batch).bilinear(u, v))
        self._quadratic = jax.jit(lambda objective, params, batch, v: make(objective, params, batch).quadratic(v))

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self._params)

    def __call__(self, vector: PyTree) -> PyTree:
        return self._accumulate(self._product, vector)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        return self._accumulate(self._bilinear, left, right)

    def quadratic(self, vector: PyTree) -> jax.Array:
        return self._accumulate(self._quadratic, vector)

    def _accumulate(self, function, *vectors):
        batches = zip(self._batches, self._counts, strict=True)
        parts = (function(self._share(counts), self._params, batch, *vectors) for batch, counts in batches)
        return functools.reduce(trees.add, parts)

    def _share(self, counts):
        """The objective with its terms weighted by the batch's share of all cases, and its part of the penalty."""
        terms = tuple(
            dataclasses.replace(term, weight=term.weight * (count / jnp.maximum(total, 1)))
            for term, count, total in zip(self._objective.terms, counts, self._totals, strict=True)
        )
        l2 = self._objective.l2
        return self._objective.replace(terms=terms, l2=None if l2 is None else l2 / len(self._counts))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LeafScalars(LinearMap):
    """The diagonal matrix that is constant on each leaf: the Hessian of the penalty."""

    scalars: PyTree
    like: PyTree

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.like)

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.like, "vector")
        return trees.multiply(vector, self.scalars)

    def trace(self) -> jax.Array:
        return trees.vdot(self.scalars, jax.tree.map(lambda x: jnp.asarray(x.size, x.dtype), self.like))

    def diagonal(self) -> PyTree:
        return jax.tree.map(jnp.full_like, self.like, self.scalars)

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        return trees.multiply(distribution(key, self.like), jax.tree.map(jnp.sqrt, self.scalars))


@dataclasses.dataclass(frozen=True)
class _MonteCarloFisher:
    """Makes the Monte-Carlo Fisher matrix on the outputs from one key for each example."""

    num_samples: int

    def __call__(self, piece: Piece) -> OutputMatrix:
        def one_sample(index):
            keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(piece.extra)
            return piece.loss.gradient(piece.outputs, jax.vmap(piece.loss.sample)(keys, piece.outputs))

        axes = _case_axes(piece)
        return RankOneOutputs(jax.vmap(one_sample, out_axes=axes)(jnp.arange(self.num_samples)), axes)


def _ggn_matrix(piece: Piece) -> OutputMatrix:
    return piece.loss.curvature(piece.outputs, piece.targets)


def _fisher_matrix(piece: Piece) -> OutputMatrix:
    return piece.loss.fisher(piece.outputs, piece.targets)


def _empirical_matrix(piece: Piece) -> OutputMatrix:
    axes = _case_axes(piece)
    gradient = piece.loss.gradient(piece.outputs, piece.targets)
    return RankOneOutputs(jax.tree.map(lambda g: jnp.expand_dims(g, axes), gradient), axes)


def _case_axes(piece):
    return max(piece.scale.ndim, 1)


def _example_keys(point: CurvaturePoint, key: jax.Array) -> tuple[jax.Array, ...]:
    terms = range(len(point.objective.terms))
    return tuple(jax.random.split(jax.random.fold_in(key, i), point.num_examples(i)) for i in terms)


def _pullback(point, make, keys=None):
    extras = keys if point.chunk_size is not None else tuple(make(piece) for piece in point.pieces(keys))
    return with_penalty(Pullback(point, extras, make), point)


def with_penalty(matrix: LinearMap, point: CurvaturePoint) -> LinearMap:
    """A matrix of the data, and the Hessian of the point's penalty."""
    if point.objective.l2 is None:
        return matrix
    return Sum((matrix, LeafScalars(point.objective.penalty_curvature(point.params), point.params)))
