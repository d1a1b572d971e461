r"""Inverses of Kronecker-factored curvature: prepared on a period, applied to every gradient.

An ``Inverse`` says which approximation of the curvature is inverted, and how. What it prepares from the factors is a
pytree of arrays, which the state of an optimiser holds, and applying it to the gradient takes products of matrices
alone. Gradients are tuples of matrices, one for each block of ``layers.treatment.kronecker``, and (A (x) G)^{-1} of one
is A^{-1} V G^{-1}.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, get_args

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.layers.factor_damping import damped_factors, mean_curvature
from curvax.layers.factors import KroneckerFactors, Pairs, uses_by_block, zero_factors
from curvax.layers.find import Layers
from curvax.layers.taps import TappedPoint, tap
from curvax.layers.use import sum_over_examples, with_ones
from curvax.matrices.curvature import OutputCurvature
from curvax.matrices.inverses import InverseMethod, inverses_of_stacks, over_blocks, sequenced
from curvax.objectives.point import CurvaturePoint
from curvax.objectives.term import scale_cases
from curvax.types import Array, PyTree, Scalar

Matrices = tuple[Array, ...]
Sides = tuple[tuple[Array, Array], ...]


class Inverse(abc.ABC):
    """An approximation of the curvature on the blocks, with its inverse: a value, as it holds choices alone.

    Attributes:
        has_two_sides: Whether it prepares (A^{-1}, G^{-1}) for each block and applies them one by one, so that whoever
            knows a block's result may pass None for its matrix.
        observes_gradients: Whether ``observe`` learns from the gradients of single examples.
        curvature_cases: So many cases at least are for the exact curvature along its steps.
    """

    has_two_sides: ClassVar[bool] = False
    observes_gradients: ClassVar[bool] = False
    curvature_cases: ClassVar[int] = 250

    def pairs(self, layers: Layers) -> Pairs:
        """The blocks, by their places, whose cross factors it needs."""
        del layers
        return ()

    def start(self, layers: Layers) -> Any:
        """Zeros in the shapes of what ``prepare`` returns, to begin a state with; from shapes alone."""
        factors = zero_factors(layers, self.pairs(layers))
        return trees.zeros_like(jax.eval_shape(lambda: self.prepare(layers, factors, 1.0, None)))

    @abc.abstractmethod
    def prepare(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: Any) -> Any:
        """What is worked out from the factors with damping gamma^2, from time to time.

        Args:
            previous: What it returned the last time, for methods that start from there; None if there is nothing.
        """

    def redamp(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, prepared: Any) -> Any:
        """``prepare`` with another gamma for the factors that ``prepared`` comes from, cheaper where that can be."""
        return self.prepare(layers, factors, gamma, prepared)

    def observe(
        self,
        layers: Layers,
        prepared: Any,
        tapped: TappedPoint,
        key: Any,
        *,
        curvature: OutputCurvature,
        count: Scalar,
        decay: Scalar = 0.95,
    ) -> Any:
        """``prepared`` with what it learns from a batch, at every step, besides the factors; nothing by default.

        Args:
            tapped: The point that the factors of this step are from.
            key: What they were drawn by.
            count: k of ``average_factors``.
        """
        del layers, tapped, key, curvature, count, decay
        return prepared

    @abc.abstractmethod
    def apply(self, layers: Layers, prepared: Any, matrices: Matrices) -> Matrices:
        """The inverse times the blocks of a vector."""


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Inverse):
    r"""The inverse of diag(A_1 (x) G_1, A_2 (x) G_2, ...), with factored damping (Martens 2016, section 6.4.2).

    Heskes 2000 is ``curvax.scale_by_kfac(layers, damping=gamma**2, inverse=curvax.layers.BlockDiagonal(balanced=False),
    statistics=curvax.Fisher())`` with a learning rate behind it: gamma is added to both factors alike, stays, and no
    step is rescaled by the exact curvature, which Martens (section 6.11) finds crucial.

    Attributes:
        method: How the damped factors are inverted, see ``curvax.matrices.inverses``.
        balanced: Whether each factor has its share of the damping, pi gamma and gamma / pi; else both have gamma.
    """

    method: InverseMethod = "cholesky"
    balanced: bool = True
    has_two_sides: ClassVar[bool] = True

    def __post_init__(self):
        check_choice("method", self.method, get_args(InverseMethod))

    def prepare(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: Any) -> Any:
        sides = zip(factors.inputs, factors.outputs, strict=True)
        damped = tuple(damped_factors(a, g, gamma, balanced=self.balanced) for a, g in sides)
        return inverses_of(damped, self.method, previous)

    def apply(self, layers: Layers, prepared: Any, matrices: Matrices) -> Matrices:
        return tuple(v if v is None else two_sided(a, v, g) for (a, g), v in zip(prepared, matrices, strict=True))


class Eigenvectors(NamedTuple):
    """What ``ExactTikhonov`` prepares: for each block those of A and of G, and gamma^2.

    Attributes:
        inputs: For each block (eigenvalues, eigenvectors) of A; a diagonal factor has no eigenvectors.
        outputs: For each block those of G.
        damping: gamma^2.
    """

    inputs: tuple[tuple[Array, Array | None], ...]
    outputs: tuple[tuple[Array, Array | None], ...]
    damping: Array


@dataclasses.dataclass(frozen=True)
class ExactTikhonov(Inverse):
    r"""The inverse of diag(A_1 (x) G_1 + gamma^2 I, ...): damping that is added to the curvature itself.

    By eigendecompositions of all factors, many times the price of ``BlockDiagonal``'s inverses. Eigenvectors do not
    depend on gamma, so that another one costs nothing (``redamp``). Factored damping was found to serve better as often
    as not (Martens 2016, section 6.6.3).
    """

    def prepare(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: Any) -> Any:
        sides = [*factors.inputs, *factors.outputs]
        found = sequenced([_eigen] * len(sides), sides)
        count = len(factors.inputs)
        return Eigenvectors(tuple(found[:count]), tuple(found[count:]), _squared(gamma))

    def redamp(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, prepared: Any) -> Any:
        return prepared._replace(damping=_squared(gamma))

    def apply(self, layers: Layers, prepared: Any, matrices: Matrices) -> Matrices:
        def solved(a, g, v):
            (inputs, left), (outputs, right) = a, g
            if left is not None:
                v = over_blocks(lambda e, x: e.T @ x, left, v)
            if right is not None:
                v = over_blocks(lambda e, x: x @ e, right, v)
            v = v / (inputs[:, :, None] * outputs[:, None, :] + prepared.damping.astype(inputs.dtype))
            if left is not None:
                v = over_blocks(lambda e, x: e @ x, left, v)
            return v if right is None else over_blocks(lambda e, x: x @ e.T, right, v)

        parts = zip(prepared.inputs, prepared.outputs, matrices, strict=True)
        return tuple(solved(a, g, v) for a, g, v in parts)


def precondition_gradient(
    layers: Layers,
    inverse: Inverse,
    prepared: Any,
    factors: KroneckerFactors,
    gamma: Scalar,
    gradient: PyTree,
    at: CurvaturePoint,
) -> PyTree:
    r"""``precondition`` for the gradient of the objective at a point, whose rank the number of examples bounds.

    The gradient of a layer is V = sum_n a_n g_n^T, so that A^{-1} V G^{-1} = sum_n (A^{-1} a_n) (G^{-1} g_n)^T, which
    takes fewer operations where there are fewer rows than features. Layers for which it does not, and all of an inverse
    without products of two sides, go by their matrices. Inputs and cotangents are those of the forward and backward
    pass that gave the gradient; inside one ``jit`` XLA takes both once.

    Source: Martens 2016, section 6.8.
    """
    blocks = layers.treatment.kronecker
    few = [place for place, block in enumerate(blocks) if inverse.has_two_sides and _rank_is_low(layers, block, at)]
    if not few or at.penalty:
        return precondition(layers, inverse, prepared, factors, gamma, gradient)
    tapped = tap(layers, at)
    pieces = at.pieces()
    uses = uses_by_block(tapped, tapped.pull_back(tuple(_loss_cotangent(piece) for piece in pieces)))
    products = {}
    for place in few:
        (_, (use,)), (left, right) = uses[place], prepared[place]
        assert use.inputs is not None
        inputs = with_ones(use.inputs) if blocks[place].bias is not None else use.inputs
        rows = [x.reshape(x.shape[0], -1, x.shape[-1]).astype(left.dtype) for x in (inputs, use.cotangents)]
        a, g = (over_blocks(jnp.matmul, x, side) for x, side in zip(rows, (left, right), strict=True))
        products[place] = sum_over_examples("bni,bno->bio", a, g)
    return precondition(layers, inverse, prepared, factors, gamma, gradient, products)


def _loss_cotangent(piece):
    return scale_cases(piece.scale, piece.loss.gradient(piece.outputs, piece.targets))


def _rank_is_low(layers, block, at):
    """Whether the two sides of the rows of a batch take fewer operations than those of the matrix."""
    if len(block.weights.members) != 1 or any(block.diagonal_factors) or block.weights.kind == "embedding":
        return False
    if set(block.leaves) & set(layers.treatment.diagonal):  # a further use has its part in the gradient
        return False
    (member,) = block.weights.members
    _, inputs, outputs = block.shape
    rows = at.num_examples(member.term) * block.weights.shared
    both = rows * (inputs**2 + outputs**2 + inputs * outputs)
    return not member.swapped and block.weights.only_moves and both < inputs * outputs * (inputs + outputs)


def kronecker_preconditioner(
    layers: Layers, factors: KroneckerFactors, *, damping: Scalar, inverse: Inverse | None = None
) -> Callable[[PyTree], PyTree]:
    r"""v -> F^{-1} v with the damped inverse of Kronecker factors: a preconditioner for ``curvax.solvers.cg``.

    The inverses are worked out here, once for all products. Vectors are pytrees like the parameters. It pays where the
    curvature has directions far above lambda; factored damping is more than lambda on all others, and where lambda is
    large plain conjugate gradients may be faster. ``ExactTikhonov`` was seen to take fewest iterations; it takes
    longest to prepare.

    Args:
        damping: lambda, above 0.
        inverse: ``BlockDiagonal()`` if None. ``BlockTridiagonal`` wants factors that were taken with
            ``pairs=inverse.pairs(layers)``.

    Raises:
        ValueError: The factors lack those of the inverse's pairs; or it is an ``EigenCorrected``, whose eigenvalues are
            not in the factors: take the map of ``kronecker_map`` with them, and its ``solve``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> at = objective.linearize(w, batch)
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> factors = curvax.layers.kronecker_factors(curvax.tap(layers, at), curvature=curvax.GaussNewton())
        >>> @jax.jit
        ... def solve(at, factors, v):
        ...     P = curvax.layers.kronecker_preconditioner(layers, factors, damping=1e-10)
        ...     return curvax.solvers.cg(curvax.ggn(at), v, preconditioner=P, max_iterations=9, tolerance=1e-3)
        >>> solve(at, factors, jnp.ones((2, 1))).iterations.item()
        1

    Source: Martens 2016, section 6.7, the end.
    """
    inverse = BlockDiagonal() if inverse is None else inverse
    if inverse.observes_gradients:
        raise ValueError(
            f"kronecker_preconditioner: {inverse} learns from gradients, which factors do not hold. Write\n"
            "    K = curvax.kronecker_map(layers, factors, params).decomposed()\n"
            "    s = curvax.layers.eigenvalue_corrections(tapped, K.bases, key)\n"
            "    preconditioner = lambda v: K.with_values(s).solve(v, damping=damping)"
        )
    pairs = inverse.pairs(layers)
    if pairs and len(factors.cross_inputs) != len(pairs):
        raise ValueError(
            f"kronecker_preconditioner: {inverse} needs the cross factors of {len(pairs)} pairs of blocks, the factors"
            f" have those of {len(factors.cross_inputs)}; take kronecker_factors(..., pairs=inverse.pairs(layers))"
        )
    gamma = jnp.sqrt(jnp.asarray(damping))
    prepared = inverse.prepare(layers, factors, gamma, inverse.start(layers))
    return functools.partial(precondition, layers, inverse, prepared, factors, gamma)


def precondition(
    layers: Layers,
    inverse: Inverse,
    prepared: Any,
    factors: KroneckerFactors,
    gamma: Scalar,
    gradient: PyTree,
    known: Mapping[int, Array] = MappingProxyType({}),
) -> PyTree:
    r"""The inverse times a gradient: blocks by ``inverse``, the other leaves by their diagonals.

    Diagonals d are damped like the blocks, by gamma^2. What has no curvature, a leaf or what of a leaf no operation
    uses, is given the mean of the others', as its gradient alone says nothing about the length of a step.

    Args:
        gradient: A pytree like the parameters.
        known: For the places of some blocks their results, for an inverse that ``has_two_sides``.
    """
    treatment = layers.treatment
    leaves, treedef = jax.tree.flatten(gradient)
    # Gradients may be narrower than factors, which are sums over examples.
    matrices = tuple(
        None if place in known else block.to_matrices(gradient).astype(a.dtype)
        for place, (block, a) in enumerate(zip(treatment.kronecker, factors.inputs, strict=True))
    )
    applied = inverse.apply(layers, prepared, matrices)  # pyright: ignore[reportArgumentType] - None passes through
    results = [known.get(place, matrix) for place, matrix in enumerate(applied)]
    solved: list[Any] = [None] * len(leaves)
    for block, matrix in zip(treatment.kronecker, results, strict=True):
        for place, leaf in block.to_params(matrix).items():
            solved[place] = leaf if solved[place] is None else solved[place] + leaf

    def without_curvature(leaf):
        mean = mean_curvature(layers, factors).astype(leaf.dtype)
        return leaf / (mean + jnp.square(jnp.asarray(gamma).astype(leaf.dtype)))

    for place, rest in treatment.left_over(gradient).items():
        solved[place] = solved[place] + without_curvature(rest).astype(solved[place].dtype)
    for place, diagonal, covered in zip(treatment.diagonal, factors.diagonals, treatment.covered, strict=True):
        damped = diagonal + jnp.square(jnp.asarray(gamma).astype(diagonal.dtype))
        own = leaves[place].astype(damped.dtype) / damped
        solved[place] = own if covered is None else jnp.where(covered, solved[place], own)
    for place in treatment.bare:
        solved[place] = without_curvature(leaves[place])
    return treedef.unflatten([s.astype(v.dtype) for s, v in zip(solved, leaves, strict=True)])


def inverses_of(damped: Sides, method: InverseMethod, previous: Sides | None, after: Any = None) -> Sides:
    """(A^{-1}, G^{-1}) for each block, see ``inverse_of``; one after another, and after what else is given."""
    flat, treedef = jax.tree.flatten(damped)
    starts = None if previous is None else treedef.flatten_up_to(previous)
    return treedef.unflatten(inverses_of_stacks(flat, method, starts, after))


def two_sided(left: Array, matrix: Array, right: Array) -> Array:
    """A V G for each of the matrices of a block, A and G symmetric or diagonals."""
    first = left[:, :, None] * matrix if left.ndim == 2 else over_blocks(jnp.matmul, left, matrix)
    return first * right[:, None, :] if right.ndim == 2 else over_blocks(jnp.matmul, first, right)


def _eigen(factor):
    """(eigenvalues, eigenvectors) of each matrix; of a diagonal itself alone."""
    if factor.ndim == 2:
        return factor, None
    values, vectors = jnp.linalg.eigh(factor)
    return jnp.maximum(values, 0), vectors  # rounding may make them negative


def _squared(gamma):
    return jnp.square(jnp.asarray(gamma, dtype=jnp.result_type(float)))
