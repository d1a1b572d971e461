r"""Kronecker-factored curvature as a linear map on the parameters, matrix-free at any size.

With U the orthonormal map from the matrices of all blocks to the parameters, the curvature is U diag(A (x) G) U^T, a
diagonal on leaves without Kronecker factors, and zero elsewhere. From eigenvectors Q of the factors every function of
it is products: f(A (x) G) of a matrix V is Q_A (f(s) * Q_A^T V Q_G) Q_G^T, where s holds the products of the
eigenvalues, or what EKFAC puts in their place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.layers.factors import KroneckerFactors, diagonals_of
from curvax.layers.find import Layers
from curvax.layers.inverses import two_sided
from curvax.layers.taps import check_leaves
from curvax.matrices.inverses import sequenced
from curvax.matrices.linear_map import LinearMap
from curvax.types import Array, PyTree

Bases = tuple[tuple[Array, Array], ...]


def kronecker_map(layers: Layers, factors: KroneckerFactors, params: PyTree) -> KroneckerMap:
    r"""The curvature that Kronecker factors stand for: A (x) G on blocks, diagonals on other leaves, zero on bare ones.

    It answers the whole protocol of linear maps without forming a matrix larger than a factor. ``solve``, ``sqrt``,
    ``inverse_sqrt``, ``logdet`` and ``sample`` decompose the factors each time they are called; to do so once, take
    ``decomposed()``, which is the same matrix. The damping of ``solve`` is exact, (A (x) G + damping I)^{-1}, and not
    factored as in K-FAC. The penalty of the objective has no part in it; where it has one strength, add that to the
    damping.

    Args:
        params: The parameters, or their ShapeDtypeStructs.

    Returns:
        The ``KroneckerMap``.

    Raises:
        ValueError: The parameters or the factors are not those of the layers; or a block's entries are scaled by
            constants that are no product of one for its input and one for its output.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tapped = curvax.tap(layers, objective.linearize(w, batch))
        >>> factors = curvax.layers.kronecker_factors(tapped, curvature=curvax.GaussNewton())
        >>> K = curvax.kronecker_map(layers, factors, w)
        >>> print(K.to_dense())
        [[ 5.  7.]
         [ 7. 10.]]
        >>> print(K.solve(jnp.array([[6.0], [7.0]]), damping=1.0).round(5))
        [[ 1.]
         [-0.]]

    Source: Martens 2016, eq. 6.1; exact damping by eigenvectors, appendix B.2.
    """
    check_leaves(params, layers)
    like = trees.Static(trees.structure_of(params))
    treatment = layers.treatment
    for block in treatment.kronecker:
        _ = block.roots  # raises where there are none
    counts = len(factors.inputs), len(factors.outputs), len(factors.diagonals)
    expected = len(treatment.kronecker), len(treatment.kronecker), len(treatment.diagonal)
    if counts != expected:
        raise ValueError(f"the factors are not those of these layers: {counts} in number, expected {expected}")
    return KroneckerMap(factors, layers, like)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KroneckerMap(LinearMap):
    """The map of ``kronecker_map``."""

    factors: KroneckerFactors
    layers: Layers = dataclasses.field(metadata={"static": True})
    like: trees.Static = dataclasses.field(metadata={"static": True})
    _has_own_form = True

    @property
    def structure(self) -> PyTree:
        return self.like.tree

    def __call__(self, vector: PyTree) -> PyTree:
        sides = scaled_factors(self.layers, self.factors)

        def on_blocks(matrices):
            return [two_sided(a, v, g) for (a, g), v in zip(sides, matrices, strict=True)]

        return self._apply(vector, on_blocks, lambda values: values)

    def decomposed(self) -> EigenKroneckerMap:
        """The same matrix by the eigenvectors of its factors."""
        bases, values = decompose(self.layers, self.factors)
        products = tuple(itertools.starmap(products_of, values))
        return EigenKroneckerMap(bases, products, self.factors.diagonals, self.layers, self.like)

    def _solve(self, vector, damping):
        return self.decomposed().solve(vector, damping=damping)

    def _spectral(self, vector, function):
        return self.decomposed()._spectral(vector, function)

    def _logdet(self, damping):
        return self.decomposed().logdet(damping=damping)

    def trace(self) -> Array:
        blocks = [
            jnp.sum(diagonals_of(a).sum(1) * diagonals_of(g).sum(1))
            for a, g in scaled_factors(self.layers, self.factors)
        ]
        return _total(self.layers, blocks, self.factors.diagonals, lambda d: d)

    def diagonal(self) -> PyTree:
        diagonals = [
            diagonals_of(a)[:, :, None] * diagonals_of(g)[:, None] for a, g in scaled_factors(self.layers, self.factors)
        ]
        return _diagonal_on_leaves(self.layers, diagonals, self.factors.diagonals, self.structure)

    def _apply(self, vector, on_blocks, function):
        trees.check_like(vector, self.structure, "vector", "the map's vectors")
        return apply_on_blocks(self.layers, self.factors.diagonals, vector, on_blocks, function)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EigenKroneckerMap(LinearMap):
    """U diag(Q_A (x) Q_G diag(s) Q_A^T (x) Q_G^T) U^T: a Kronecker map by its eigenvectors, or with other eigenvalues.

    Attributes:
        bases: For each block (Q_A, Q_G), of shapes (blocks, n, n); ones (blocks, n) where a factor is diagonal.
        values: For each block s, of shape (blocks, inputs, outputs).
        diagonals: As in ``KroneckerFactors``.
    """

    bases: Bases
    values: tuple[Array, ...]
    diagonals: tuple[Array, ...]
    layers: Layers = dataclasses.field(metadata={"static": True})
    like: trees.Static = dataclasses.field(metadata={"static": True})
    _has_own_form = True

    @property
    def structure(self) -> PyTree:
        return self.like.tree

    def with_values(self, values: Sequence[Array]) -> EigenKroneckerMap:
        """The map with other eigenvalues for the same eigenvectors, such as ``eigenvalue_corrections``: EKFAC."""
        return dataclasses.replace(self, values=tuple(values))

    def __call__(self, vector: PyTree) -> PyTree:
        return self._spectral(vector, lambda values: values)

    def _solve(self, vector, damping):
        return self._spectral(vector, lambda values: 1 / (values + jnp.asarray(damping).astype(values.dtype)))

    def _logdet(self, damping):
        def logarithms(values):
            return jnp.log(jnp.abs(values + jnp.asarray(damping).astype(values.dtype)))

        result = _total(self.layers, [jnp.sum(logarithms(s)) for s in self.values], self.diagonals, logarithms)
        # Dimensions that no block and no diagonal has.
        rest = trees.size(self.structure) - self.layers.treatment.dimensions
        return result + rest * logarithms(jnp.zeros((), result.dtype)) if rest else result

    def trace(self) -> Array:
        return _total(self.layers, [jnp.sum(s) for s in self.values], self.diagonals, lambda d: d)

    def diagonal(self) -> PyTree:
        diagonals = [
            two_sided(jnp.square(q_a), s, _transpose(jnp.square(q_g)))
            for (q_a, q_g), s in zip(self.bases, self.values, strict=True)
        ]
        return _diagonal_on_leaves(self.layers, diagonals, self.diagonals, self.structure)

    def _spectral(self, vector, function):
        trees.check_like(vector, self.structure, "vector", "the map's vectors")

        def on_blocks(matrices):
            parts = zip(self.bases, self.values, matrices, strict=True)
            return [from_basis(basis, function(s) * to_basis(basis, v)) for basis, s, v in parts]

        return apply_on_blocks(self.layers, self.diagonals, vector, on_blocks, function)


# --- eigenvectors ---------------------------------------------------------------------------------------------------


def decompose(layers: Layers, factors: KroneckerFactors) -> tuple[Bases, tuple[tuple[Array, Array], ...]]:
    """The eigenvectors of the two factors of all blocks, and their eigenvalues, of shape (blocks, n)."""
    flat, treedef = jax.tree.flatten(scaled_factors(layers, factors))
    matrices = [factor for factor in flat if factor.ndim == 3]
    found = iter(sequenced([jnp.linalg.eigh] * len(matrices), matrices))
    # Second moments are positive semi-definite: what is below zero is rounding.
    pairs = [next(found) if factor.ndim == 3 else (factor, jnp.ones_like(factor)) for factor in flat]
    values = treedef.unflatten([jnp.maximum(values, 0) for values, _ in pairs])
    return treedef.unflatten([vectors for _, vectors in pairs]), values


def products_of(inputs: Array, outputs: Array) -> Array:
    """All products of the eigenvalues of two factors, of shape (blocks, inputs, outputs)."""
    return inputs[:, :, None] * outputs[:, None]


def scaled_factors(layers: Layers, factors: KroneckerFactors) -> Bases:
    """(A, G) of all blocks in the orthonormal coordinates of the parameters, see ``Block.roots``."""

    def scaled(factor, block, side):
        if block.roots is None:
            return factor
        root = jnp.asarray(block.roots[side], factor.dtype)
        return factor * jnp.square(root) if factor.ndim == 2 else factor * root[:, :, None] * root[:, None]

    sides = zip(layers.treatment.kronecker, factors.inputs, factors.outputs, strict=True)
    return tuple((scaled(a, block, 0), scaled(g, block, 1)) for block, a, g in sides)


def to_basis(basis: tuple[Array, Array], matrix: Array) -> Array:
    """Q_A^T V Q_G."""
    q_a, q_g = basis
    return two_sided(_transpose(q_a), matrix, q_g)


def from_basis(basis: tuple[Array, Array], matrix: Array) -> Array:
    """Q_A V Q_G^T."""
    q_a, q_g = basis
    return two_sided(q_a, matrix, _transpose(q_g))


def root_of(block: Any, dtype: Any) -> Array | None:
    """d^{1/2}, of the shape of the block's matrices; None where it is one."""
    if block.roots is None:
        return None
    inputs, outputs = block.roots
    return jnp.asarray(inputs[:, :, None] * outputs[:, None], dtype)


# --- parameters and matrices ----------------------------------------------------------------------------------------


def apply_on_blocks(
    layers: Layers,
    diagonals: Sequence[Array],
    vector: PyTree,
    on_blocks: Callable[[list[Array]], list[Array]],
    function: Callable[[Array], Array],
) -> PyTree:
    """f(C) v with ``on_blocks`` the f of the blocks, and ``function`` f on the diagonals and on the zeros elsewhere."""
    treatment = layers.treatment
    leaves, treedef = jax.tree.flatten(vector)
    matrices = [to_block(block, vector) for block in treatment.kronecker]
    solved = _sum_on_leaves(treatment.kronecker, on_blocks(matrices), len(leaves))

    def elsewhere(leaf):
        return function(jnp.zeros((), trees.wide_dtype(leaf))).astype(leaf.dtype) * leaf

    for place, rest in treatment.left_over(vector).items():
        solved[place] = solved[place] + elsewhere(rest).astype(solved[place].dtype)
    for place, d, covered in zip(treatment.diagonal, diagonals, treatment.covered, strict=True):
        entries = function(d) * leaves[place].astype(d.dtype)
        solved[place] = entries if covered is None else jnp.where(covered, solved[place].astype(d.dtype), entries)
    for place in treatment.bare:
        solved[place] = elsewhere(leaves[place])
    return treedef.unflatten([s.astype(leaf.dtype) for s, leaf in zip(solved, leaves, strict=True)])


def to_block(block, vector):
    """U^T v: the matrices of a block in the orthonormal coordinates of the parameters."""
    matrix = block.to_matrices(vector)
    matrix = matrix.astype(trees.wide_dtype(matrix))
    root = root_of(block, matrix.dtype)
    return matrix if root is None else root * matrix


def _sum_on_leaves(blocks, matrices, count, wide=False):
    """The sum of U V over the blocks, for each leaf; None where there are none."""
    leaves: list[Any] = [None] * count
    for block, matrix in zip(blocks, matrices, strict=True):
        root = root_of(block, matrix.dtype)
        for place, leaf in block.to_params(matrix if root is None else root * matrix, wide=wide).items():
            leaves[place] = leaf if leaves[place] is None else leaves[place] + leaf
    return leaves


def _diagonal_on_leaves(layers, of_blocks, diagonals, structure):
    """The diagonal of U K U^T from that of K, and those of the other leaves."""
    treatment = layers.treatment
    like, treedef = jax.tree.flatten(structure)
    # Not in the dtype of the parameters: a diagonal of half precision would be 0 or infinite where curvature is not.
    leaves = _sum_on_leaves(treatment.kronecker, of_blocks, len(like), wide=True)
    if any(block.roots is not None for block in treatment.kronecker):
        # Each entry of a leaf is in one entry of the matrices alone, so its squared coefficient is found so.
        ones = _sum_on_leaves(treatment.kronecker, [jnp.ones_like(x) for x in of_blocks], len(like), wide=True)
        leaves = [None if leaf is None else leaf * one for leaf, one in zip(leaves, ones, strict=True)]
    for place, d, covered in zip(treatment.diagonal, diagonals, treatment.covered, strict=True):
        leaves[place] = d if covered is None else jnp.where(covered, leaves[place].astype(d.dtype), d)
    filled = [jnp.zeros(s.shape) if leaf is None else leaf for leaf, s in zip(leaves, like, strict=True)]
    dtypes = [trees.wide_dtype(s) for s in like]
    return treedef.unflatten([leaf.astype(dtype) for leaf, dtype in zip(filled, dtypes, strict=True)])


def _total(layers, of_blocks, diagonals, function):
    """The sum over blocks, and of ``function`` of the entries of the diagonals that no block holds."""
    dtype = trees.wide_dtype(*layers.structs)
    total = sum((x.astype(dtype) for x in of_blocks), jnp.zeros((), dtype))
    for d, covered in zip(diagonals, layers.treatment.covered, strict=True):
        entries = function(d) if covered is None else jnp.where(covered, 0, function(d))
        total = total + jnp.sum(entries).astype(dtype)
    return total


def _transpose(basis):
    return basis if basis.ndim == 2 else basis.swapaxes(1, 2)
