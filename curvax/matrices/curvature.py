r"""The curvature matrices of an objective as linear maps: Hessian, generalised Gauss-Newton, Fisher, empirical Fisher.

All are means over the cases of the batch plus the Hessian of the l2 penalty. A product with the Gauss-Newton or a
Fisher matrix is one push forward (J v) and one pull back (J^T u) through a linearisation made once; quadratic and
bilinear forms need only the push forward.

``ggn(at)`` and its siblings make the map at a point. Where a method has a choice of matrix it takes the same as a value
that knows what it is: ``GaussNewton()``, ``Fisher(num_samples=1)``, ``EmpiricalFisher()`` or ``Hessian()``.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_dataclass

from curvax import trees
from curvax.checks import check_at_least, check_drawn
from curvax.matrices.linear_map import LeafScalars, LinearMap, Noise, Sum
from curvax.objectives.objective import Objective, compiled_if_eager
from curvax.objectives.output_matrix import OutputMatrix, RankOneOutputs, num_columns, unit_vector
from curvax.objectives.point import CurvaturePoint, Piece
from curvax.objectives.term import scale_cases
from curvax.programs.linearize import linearize
from curvax.types import PyTree


def hessian(at: CurvaturePoint) -> LinearMap:
    r"""The Hessian H of the objective; H v is the derivative of the gradient along v.

    The gradient is linearised once, so repeated products share its forward and backward pass (Martens 2016, section
    4.3). ``quadratic`` and ``bilinear`` differentiate the loss twice forwards, without a backward pass.

    Raises:
        ValueError: The objective has curvature only.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros((2, 1)))
        >>> curvax.hessian(objective.linearize(jnp.zeros((2, 1)), batch)).to_dense()
        Array([[0.5, 0. ],
               [0. , 2. ]], dtype=float...)
    """
    return Hessian().at(at)


def ggn(at: CurvaturePoint) -> LinearMap:
    r"""The generalised Gauss-Newton matrix G = (1/N) sum_i J_i^T C_i J_i, with C the loss's matrix on the outputs.

    C is the Hessian H_L of the loss in the outputs for convex losses, else what the loss documents as its
    ``curvature``; G is positive semi-definite whenever C is. ``sample`` draws from N(0, G) by one pull back, unbiased
    squares of which estimate the diagonal. Schraudolph 2002; Martens 2016, eq. 3.3.


    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.sigmoid_binary_cross_entropy())
        >>> curvax.ggn(objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))))).to_dense()
        Array([[0.125, 0.   ],
               [0.   , 0.125]], dtype=float...)
    """
    return GaussNewton().at(at)


def fisher(at: CurvaturePoint, *, key: jax.Array | None = None, num_samples: int | None = None) -> LinearMap:
    r"""The Fisher matrix F = (1/N) sum_i J_i^T F_R J_i of the predictive distribution, whatever the targets are.

    With ``key`` and ``num_samples`` it is the Monte-Carlo estimate (1/(N S)) sum_is g_is g_is^T with gradients g at
    targets drawn from the model's own distribution; every example has a key of its own, so the draw does not depend on
    the chunk size. It is ``ggn`` for losses with ``natural`` set; cases without a target, such as labels of padding,
    count in neither. Martens 2016, eq. 5.4.

    Args:
        num_samples: S, targets drawn for each example.


    Raises:
        ValueError: Only one of ``key`` and ``num_samples`` is given, or the loss has no exact Fisher matrix.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> at = objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1))))
        >>> F = curvax.fisher(at, key=jax.random.key(0), num_samples=1000)
        >>> bool(abs(F.trace() - curvax.fisher(at).trace()) < 0.1)
        True
    """
    check_drawn("fisher", key, num_samples)
    return Fisher(num_samples).at(at, key)


def empirical_fisher(at: CurvaturePoint) -> LinearMap:
    r"""The empirical Fisher matrix (1/N) sum_i g_i g_i^T, with g_i the gradient of case i at its training target.

    Products come from J and J^T without a gradient for each example. It is not the Fisher matrix: it vanishes where the
    fit is perfect and has another scale elsewhere (Martens 2016, section 5.6.1). A weighted case counts w_i g_i g_i^T.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batch = (jnp.eye(2), jnp.array([[1.0], [2.0]]))
        >>> curvax.empirical_fisher(objective.linearize(jnp.zeros((2, 1)), batch)).diagonal()
        Array([[0.5],
               [2. ]], dtype=float...)
    """
    return EmpiricalFisher().at(at)


def over_batches(
    make: Callable[[CurvaturePoint], LinearMap], objective: Objective, params: PyTree, batches: Iterable[PyTree]
) -> LinearMap:
    r"""A curvature matrix over a data loader: the matrix of all batches taken together, accumulated one at a time.

    Every term's mean is over its cases in all batches, whatever the sizes of the batches. Each product reads all
    batches anew; the work on one batch is compiled once for each batch shape. The map holds Python objects: call it
    outside ``jit``.

    Args:
        make: (at) -> map, such as ``curvax.ggn`` or ``curvax.hessian``.
        batches: Batches that can be iterated over again and again: a list or a loader, not a generator.


    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> batches = [(jnp.ones((2, 1)), jnp.zeros((2, 1))), (jnp.zeros((1, 1)), jnp.zeros((1, 1)))]
        >>> curvax.over_batches(curvax.ggn, objective, jnp.zeros((1, 1)), batches)(jnp.ones((1, 1)))
        Array([[0.6666...]], dtype=float...)
    """
    return OverBatches(make, objective, params, batches)


class Curvature(abc.ABC):
    """Which curvature matrix a method uses: a value, so that it can be compared, printed and passed on."""

    definite: bool = True  # whether the matrix is positive semi-definite whatever the point

    @abc.abstractmethod
    def at(self, point: CurvaturePoint, key: jax.Array | None = None) -> LinearMap:
        """The matrix at a point; ``key`` is for those that draw targets."""


class OutputCurvature(Curvature):
    """A matrix (1/N) sum_i J_i^T C_i J_i that comes from a matrix C on the outputs."""

    @abc.abstractmethod
    def output_matrix(self, piece: Piece) -> OutputMatrix:
        """C on the outputs of a piece, without weights; ``piece.extra`` holds the keys where targets are drawn."""

    def at(self, point: CurvaturePoint, key: jax.Array | None = None) -> LinearMap:
        return with_penalty(self.pullback(point, key), point)

    def pullback(self, point: CurvaturePoint, key: jax.Array | None = None) -> Pullback:
        """The same without the penalty."""
        keys = self.keys(point, key)
        extras = keys if point.chunk_size is not None else compiled_if_eager(_matrices, point, keys, curvature=self)
        return Pullback(point, extras, self)

    def columns(self, piece: Piece) -> tuple[int, Callable[[jax.Array], PyTree]]:
        """(count, i -> u_i) with sum_i u_i u_i^T = C for every case; in expectation where targets or noise are drawn.

        Pulled back one by one they give sum_i (J^T u_i)(J^T u_i)^T, the matrix of each example.
        """
        matrix = self.output_matrix(piece)
        return num_columns(matrix), lambda i: matrix.sqrt_transpose_product(unit_vector(matrix.root_structure, i))

    def keys(self, point: CurvaturePoint, key: jax.Array | None) -> tuple[Any, ...] | None:
        """For each term what ``piece.extra`` is to hold: a key for each example, or nothing."""
        del point, key


class SampledCurvature(OutputCurvature):
    """A matrix on the outputs that is exact, or with ``num_samples`` the mean of so many u u^T drawn for each case."""

    num_samples: int | None

    @abc.abstractmethod
    def exact(self, piece: Piece) -> OutputMatrix:
        """C itself."""

    @abc.abstractmethod
    def draw(self, piece: Piece, keys: jax.Array) -> PyTree:
        """A draw u with E[u u^T] = C for every case, by a key for each example."""

    def __post_init__(self):
        if self.num_samples is not None:
            check_at_least("num_samples", self.num_samples, 1)

    def output_matrix(self, piece: Piece) -> OutputMatrix:
        if self.num_samples is None:
            return self.exact(piece)
        axes = _case_axes(piece)
        return RankOneOutputs(jax.vmap(self._draws(piece), out_axes=axes)(jnp.arange(self.num_samples)), axes)

    def columns(self, piece: Piece) -> tuple[int, Callable[[jax.Array], PyTree]]:
        if self.num_samples is None:
            return super().columns(piece)
        draws, root = self._draws(piece), self.num_samples**-0.5
        return self.num_samples, lambda i: trees.scale(root, draws(i))

    def keys(self, point: CurvaturePoint, key: jax.Array | None) -> tuple[Any, ...] | None:
        if self.num_samples is None:
            return None
        if key is None:
            name = type(self).__name__
            raise ValueError(
                f"{name}(num_samples={self.num_samples}) draws and takes a key=; the exact matrix does not"
            )
        return example_keys(point, key)

    def _draws(self, piece):
        if self.num_samples == 1:
            return lambda index: self.draw(piece, piece.extra)
        return lambda index: self.draw(piece, jax.vmap(lambda key: jax.random.fold_in(key, index))(piece.extra))


@dataclasses.dataclass(frozen=True)
class GaussNewton(SampledCurvature):
    """The generalised Gauss-Newton matrix, see ``ggn``: exact, or with ``num_samples`` from noise of signs.

    The noise v enters at the outputs as S^T v with S^T S = C, and is then propagated backwards as gradients are: the
    curvature propagation of Martens, Sutskever and Swersky 2012 for this matrix.
    """

    num_samples: int | None = None

    def exact(self, piece: Piece) -> OutputMatrix:
        return piece.loss.curvature(piece.outputs, piece.targets)

    def draw(self, piece: Piece, keys: jax.Array) -> PyTree:
        matrix = self.exact(piece)
        example = trees.example_structure(matrix.root_structure)
        return matrix.sqrt_transpose_product(jax.vmap(lambda key: trees.random_rademacher(key, example))(keys))


@dataclasses.dataclass(frozen=True)
class Fisher(SampledCurvature):
    """The Fisher matrix, see ``fisher``: exact, or with ``num_samples`` from targets drawn anew at every step."""

    num_samples: int | None = None

    def exact(self, piece: Piece) -> OutputMatrix:
        return piece.loss.fisher(piece.outputs, piece.targets)

    def draw(self, piece: Piece, keys: jax.Array) -> PyTree:
        return piece.loss.gradient(piece.outputs, piece.loss.draw(keys, piece.outputs, piece.targets))


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher(OutputCurvature):
    """The empirical Fisher matrix, see ``empirical_fisher``."""

    def output_matrix(self, piece: Piece) -> OutputMatrix:
        axes = _case_axes(piece)
        gradient = piece.loss.gradient(piece.outputs, piece.targets)
        return RankOneOutputs(jax.tree.map(lambda g: jnp.expand_dims(g, axes), gradient), axes)


@dataclasses.dataclass(frozen=True)
class Hessian(Curvature):
    """The Hessian, see ``hessian``."""

    definite = False

    def at(self, point: CurvaturePoint, key: jax.Array | None = None) -> LinearMap:
        del key
        if not all(term.loss.has_value for term in point.terms):
            raise ValueError(
                "the Hessian needs the loss, and this objective has curvature only; use curvax.ggn or curvax.fisher"
            )
        linear = None if point.chunk_size is not None else compiled_if_eager(_hessian_product, point)
        return with_penalty(HessianMap(point, linear), point)


def check_curvature(name: str, curvature: Any, kind: type = Curvature) -> None:
    """Raises a TypeError unless the argument is a ``Curvature``, which its usual mistake is not: a function."""
    if not isinstance(curvature, kind):
        raise TypeError(
            f"{name}: curvature= takes a value such as curvax.GaussNewton(), curvax.Fisher() or curvax.Hessian(), got"
            f" {getattr(curvature, '__name__', repr(curvature))}"
        )


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pullback(LinearMap):
    """(1/N) sum_i J_i^T C_i J_i for a matrix C on the outputs; without the penalty."""

    point: CurvaturePoint
    extras: tuple[Any, ...] | None  # for each term C itself, or in chunks what C is made from
    curvature: OutputCurvature = dataclasses.field(metadata={"static": True})

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self.point.params)

    def __call__(self, vector: PyTree) -> PyTree:
        trees.check_like(vector, self.point.params, "vector")

        def one(piece):
            curved = self._matrix(piece).product(piece.jvp(vector))
            return piece.transpose(scale_cases(piece.scale, curved))

        return self.point.accumulate(one, self.extras)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        trees.check_like(left, self.point.params, "vector")
        trees.check_like(right, self.point.params, "vector")

        def one(piece):
            tangent = piece.jvp(right)
            curved = scale_cases(piece.scale, self._matrix(piece).product(tangent))
            return trees.vdot(tangent if left is right else piece.jvp(left), curved)

        return self.point.accumulate(one, self.extras)

    def sample(self, key: jax.Array, distribution: Noise = trees.random_normal) -> PyTree:
        """A draw u = (1/sqrt N) sum_i J_i^T S_i^T v_i, where S^T S = C and v_i is independent noise.

        Every example has a key of its own, so the draw does not depend on the chunk size. Negative weights, whose
        matrix has no root, count by their absolute values.
        """
        keys = example_keys(self.point, key)
        extras = keys if self.extras is None else tuple(zip(keys, self.extras, strict=True))

        def one(piece):
            noise_keys, extra = (piece.extra, None) if self.extras is None else piece.extra
            matrix = self._matrix(piece._replace(extra=extra))
            example = trees.example_structure(matrix.root_structure)
            noise = jax.vmap(lambda k: distribution(k, example))(noise_keys)
            return piece.transpose(scale_cases(jnp.sqrt(piece.scale), matrix.sqrt_transpose_product(noise)))

        return self.point.definite().accumulate(one, extras)

    def output_matrix(self, index: int) -> OutputMatrix:
        """C of the term of that index; for points that hold the whole batch."""
        return self._matrix(self.point.pieces(self.extras)[index])

    def _matrix(self, piece):
        return piece.extra if isinstance(piece.extra, OutputMatrix) else self.curvature.output_matrix(piece)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HessianMap(LinearMap):
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
            return _product_of(piece.gradient_at, self.point.params)(vector)

        return self.point.accumulate(one)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        params = self.point.params
        trees.check_like(left, params, "left")
        trees.check_like(right, params, "right")

        def one(piece):
            if not piece.forward:
                return trees.vdot(left, _product_of(piece.gradient_at, params)(right))
            return jax.jvp(lambda p: jax.jvp(piece.value_at, (p,), (right,))[1], (params,), (left,))[1]

        return self.point.accumulate(one)


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

        def part(method, objective, params, batch, *vectors):
            return getattr(make(objective.linearize(params, batch)), method)(*vectors)

        self._part = jax.jit(part, static_argnums=0)

    @property
    def structure(self) -> PyTree:
        return trees.structure_of(self._params)

    def __call__(self, vector: PyTree) -> PyTree:
        return self._accumulate("__call__", vector)

    def bilinear(self, left: PyTree, right: PyTree) -> jax.Array:
        return self._accumulate("bilinear", left, right)

    def quadratic(self, vector: PyTree) -> jax.Array:
        return self._accumulate("quadratic", vector)

    def _accumulate(self, method, *vectors):
        batches = zip(self._batches, self._counts, strict=True)
        parts = (self._part(method, self._share(counts), self._params, batch, *vectors) for batch, counts in batches)
        return functools.reduce(trees.add, parts)

    def _share(self, counts):
        """The objective with its terms weighted by the batch's share of all cases, and its part of the penalty."""
        terms = tuple(
            dataclasses.replace(term, weight=term.weight * (count / jnp.maximum(total, 1)))
            for term, count, total in zip(self._objective.terms, counts, self._totals, strict=True)
        )
        l2 = self._objective.penalty.l2
        return self._objective.replace(terms=terms, l2=None if l2 is None else l2 / len(self._counts))


def with_penalty(matrix: LinearMap, point: CurvaturePoint) -> LinearMap:
    """A matrix of the data, and the Hessian of the point's penalty."""
    if not point.penalty:
        return matrix
    return Sum((matrix, LeafScalars.of(point.penalty.curvature(point.params), point.params)))


def example_keys(point: CurvaturePoint, key: jax.Array) -> tuple[jax.Array, ...]:
    """For each term a key for each of its examples."""
    of_terms = trees.split_key(key, len(point.terms))
    keys = tuple(jax.random.split(own, point.num_examples(i)) for i, own in enumerate(of_terms))
    if point.linearizations is None:
        return keys
    return tuple(_beside(own, linear.outputs) for own, linear in zip(keys, point.linearizations, strict=True))


def _beside(keys, outputs):
    """Keys on the devices of their examples, where these are sharded explicitly."""
    axis = jax.typeof(jax.tree.leaves(outputs)[0]).sharding.spec[0]
    return keys if axis is None else jax.sharding.reshard(keys, jax.sharding.PartitionSpec(axis))


def _case_axes(piece):
    return max(piece.scale.ndim, 1)


def _matrices(point, keys, *, curvature):
    return tuple(curvature.output_matrix(piece) for piece in point.pieces(keys))


def _hessian_product(point):
    """v -> H v without the penalty, as a pytree of residuals."""

    def data_gradient(params):
        return point.accumulate(lambda piece: piece.gradient_at(params))

    return _product_of(data_gradient, point.params)


def _product_of(gradient, params):
    """v -> H v for the H that is the derivative of a gradient, and symmetric: its transpose has reverse rules alone."""
    linear = linearize(gradient, params)
    return linear.jvp if linear.forward else Partial(_only, linear.transpose)


def _only(transpose, vector):
    return transpose(vector)[0]
