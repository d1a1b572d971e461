r"""EKFAC: the eigenvectors of Kronecker factors with the best eigenvalues for them, kept by every step.

In the basis of the eigenvectors Q_A (x) Q_G of a block K-FAC takes the curvature to be diagonal with the products of
the factors' eigenvalues. The diagonal that is nearest in the Frobenius norm is that of the curvature itself,

    s = sum_n w_n sq(Q_A^T (sum_r a_nr g_nr^T) Q_G)

(George et al. 2018), which costs two products with each layer's inputs and cotangents and no decomposition, so
that it follows the curvature at every step while the eigenvectors wait.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.layers.factor_damping import damping_ratio
from curvax.layers.factors import (
    KroneckerFactors,
    running_average,
    sum_over_sweeps,
    uses_by_block,
    without_cotangents,
)
from curvax.layers.find import Layers
from curvax.layers.inverses import Inverse, Matrices, two_sided
from curvax.layers.kronecker import Bases, decompose, from_basis, products_of, root_of, to_basis
from curvax.layers.taps import TappedPoint, tap
from curvax.layers.use import replicated, sum_over_examples, with_ones
from curvax.matrices.curvature import Fisher, OutputCurvature, check_curvature
from curvax.objectives.objective import compiled_if_eager
from curvax.types import Array, Scalar

_MOST_ENTRIES = 2**22
"""Of the gradients of single examples that are in memory at once, where positions share weights."""


def eigenvalue_corrections(
    tapped: TappedPoint, bases: Bases, key: Array | None = None, *, curvature: OutputCurvature | None = None
) -> tuple[Array, ...]:
    r"""s = sum_n w_n sq(Q_A^T (sum_r a_nr g_nr^T) Q_G) for all blocks: the curvature's diagonal in given bases.

    By the sweeps that ``kronecker_factors`` takes, on the same draws for the same key. Where an example has one
    position, s = sq(a Q_A)^T sq(g Q_G), and its gradient is not formed; where positions share weights they are added up
    before squaring, exactly, by the gradients of some examples at a time.

    Args:
        bases: For each block (Q_A, Q_G), such as ``kronecker_map(...).decomposed().bases``.
        key: For a curvature that draws.
        curvature: ``curvax.Fisher(num_samples=1)`` if None.

    Returns:
        For each block s, of shape (blocks, inputs, outputs); for ``EigenKroneckerMap.with_values``.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.softmax_cross_entropy())
        >>> w, batch = jnp.zeros((1, 2)), (jnp.array([[1.0], [3.0]]), jnp.array([0, 1]))
        >>> layers = curvax.find_layers(objective, w, batch)
        >>> tapped = curvax.tap(layers, objective.linearize(w, batch))
        >>> factors = curvax.layers.kronecker_factors(tapped, curvature=curvax.Fisher())
        >>> K = curvax.kronecker_map(layers, factors, w).decomposed()
        >>> s = curvax.layers.eigenvalue_corrections(tapped, K.bases, curvature=curvax.Fisher())
        >>> print(s[0].round(4))
        [[[0.  2.5]]]

    Source: George et al. 2018.
    """
    curvature = Fisher(num_samples=1) if curvature is None else curvature
    check_curvature("eigenvalue_corrections", curvature, OutputCurvature)
    return compiled_if_eager(_corrections, tapped.point, bases, key, layers=tapped.layers, curvature=curvature)


def _corrections(point, bases, key, *, layers, curvature):
    return corrections_of(tap(layers, point), bases, key, curvature)


def corrections_of(tapped: TappedPoint, bases: Bases, key: Any, curvature: OutputCurvature) -> tuple[Array, ...]:
    """``eigenvalue_corrections`` without checks, inside of a program."""
    blocks = zip(uses_by_block(tapped, without_cotangents(tapped)), bases, strict=True)
    data = [[_data_rows(use, block, own, basis) for use in own] for (block, own), basis in blocks]

    def of_sweep(uses):
        parts = zip(uses_by_block(tapped, uses), data, bases, strict=True)
        return tuple(_squares(block, own, rows, basis) for (block, own), rows, basis in parts)

    return sum_over_sweeps(tapped, key, curvature, of_sweep)


class EigenBasis(NamedTuple):
    """What ``EigenCorrected`` prepares.

    Attributes:
        bases: For each block the eigenvectors (Q_A, Q_G).
        values: For each block s, of shape (blocks, inputs, outputs).
        cross: For each block (u, v), of shapes (blocks, inputs) and (blocks, outputs).
        gamma: gamma (u_i + v_j) + gamma^2 is added to s_ij.
    """

    bases: Bases
    values: tuple[Array, ...]
    cross: tuple[tuple[Array, Array], ...]
    gamma: Array


@dataclasses.dataclass(frozen=True)
class EigenCorrected(Inverse):
    r"""The inverse of Q (s + D) Q^T, with Q the eigenvectors of the factors, s observed at every step and D damping.

    ``prepare`` decomposes the factors, on a period. Between, ``observe`` keeps a running average of s in the basis that
    there is. When the basis changes, s is projected to the new one: it becomes the diagonal there of the matrix that it
    was, (Q'^T Q)^2 s, in each of the two sides. Restarted from the products of the factors' eigenvalues, which is what
    the first preparation does, it would be K-FAC's again after every period, and lose what it is there for.

    Damping is K-FAC's by default, that of (A + pi gamma I) (x) (G + gamma / pi I) with s in place of the eigenvalues
    a_i g_j of A (x) G, in orthonormal coordinates of the parameters where a model scales them,

        s_ij + gamma (a_i / pi + pi g_j) + gamma^2

    Its cross terms hold back the first steps in directions of which few draws have told anything. George et al. 2018
    have s + gamma^2 and tune it; where gamma^2 adapts from a first guess, that was seen to throw a deep autoencoder to
    where all outputs are the same.

    Attributes:
        damping: "factored", as above, or "exact", gamma^2 alone.

    Source: George et al. 2018, with its running average of the eigenvalues.
    """

    damping: Literal["factored", "exact"] = "factored"
    observes_gradients: ClassVar[bool] = True

    def __post_init__(self):
        check_choice("damping", self.damping, ("factored", "exact"))

    def prepare(
        self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: EigenBasis | None
    ) -> EigenBasis:
        bases, eigenvalues = decompose(layers, factors)
        values = tuple(itertools.starmap(products_of, eigenvalues))
        if previous is not None:
            values = tuple(map(_projected, previous.bases, previous.values, bases, values))
        cross = tuple(itertools.starmap(self._cross_terms, eigenvalues))
        return EigenBasis(bases, values, cross, jnp.asarray(gamma).astype(trees.wide_dtype(*layers.structs)))

    def _cross_terms(self, a, g):
        """a / pi and pi g."""
        pi = damping_ratio(a, g)[:, None]
        return (a / pi, pi * g) if self.damping == "factored" else (jnp.zeros_like(a), jnp.zeros_like(g))

    def redamp(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, prepared: EigenBasis) -> EigenBasis:
        return prepared._replace(gamma=jnp.asarray(gamma).astype(prepared.gamma.dtype))

    def observe(
        self,
        layers: Layers,
        prepared: EigenBasis,
        tapped: TappedPoint,
        key: Any,
        *,
        curvature: OutputCurvature,
        count: Scalar,
        decay: Scalar = 0.95,
    ) -> EigenBasis:
        """Takes the curvature at a point into the running average of s; to be called whenever factors are averaged.

        With the key of the factors the sweeps are the same, and one program takes them once.

        Args:
            count: k of ``average_factors``, from 1.
        """
        del layers
        new = corrections_of(tapped, prepared.bases, key, curvature)
        values = running_average(prepared.values, new, count, decay, trees.all_finite(new))
        return prepared._replace(values=values)

    def apply(self, layers: Layers, prepared: EigenBasis, matrices: Matrices) -> Matrices:
        parts = zip(layers.treatment.kronecker, prepared.bases, prepared.values, prepared.cross, matrices, strict=True)
        return tuple(_solve(*part, prepared.gamma) for part in parts)


def _solve(block, basis, values, cross, matrix, gamma):
    (of_inputs, of_outputs), gamma = cross, gamma.astype(values.dtype)
    damped = values + (gamma * of_inputs + gamma**2)[:, :, None] + (gamma * of_outputs)[:, None]
    root = root_of(block, values.dtype)
    matrix = matrix.astype(values.dtype) if root is None else root * matrix.astype(values.dtype)
    solved = from_basis(basis, to_basis(basis, matrix) / damped)
    return solved if root is None else root * solved


def _projected(old, values, new, products):
    """The diagonal in a new basis of the matrix that is diagonal in an old one; at first the products."""
    left, right = (jnp.square(_overlap(q, p)) for q, p in zip(old, new, strict=True))
    right = right if right.ndim == 2 else right.swapaxes(1, 2)
    known = jnp.sum(values, axis=(1, 2), keepdims=True) > 0
    return jnp.where(known, two_sided(left, values, right), products)


def _overlap(old, new):
    """Q'^T Q; of diagonal factors ones."""
    return new if new.ndim == 2 else new.swapaxes(1, 2) @ old


# --- squares in a basis ---------------------------------------------------------------------------------------------


def _by_lookup(own, basis):
    """Whether rows of one-hot inputs stay as they are, so that indices serve."""
    return basis[0].ndim == 2 and all(use.kind == "embedding" and not use.swapped for use in own)


def _data_rows(use, block, own, basis):
    """The inputs of a use in the basis of their side, or the indices of an embedding; scaled to orthonormality."""
    if _by_lookup(own, basis):
        return use.inputs
    side = int(use.swapped)
    rows = use.inputs
    if use.kind == "embedding":  # a row outside of the table is zero
        rows = jax.nn.one_hot(use.inputs, block.shape[1 + side], dtype=use.cotangents.dtype)
    if block.bias is not None:
        rows = with_ones(rows)
    return _rotated(rows, block, side, basis)


def _rotated(rows, block, side, basis):
    if block.roots is not None:
        rows = rows * jnp.asarray(block.roots[side], rows.dtype)[:, None, None]
    vectors = basis[side].astype(rows.dtype)
    if vectors.ndim == 2:
        return rows
    if rows.shape[0] == 1:  # without a batch axis, which is slow on CPUs
        return (rows[0] @ vectors[0])[None]
    return jnp.einsum("bnri,bij->bnrj", rows, vectors)


def _squares(block, own, data, basis):
    """s of one sweep. Uses of the same weights are further positions."""
    terms: dict[int, list[tuple[Array, Array]]] = {}
    for use, rows in zip(own, data, strict=True):
        cotangents = _rotated(use.cotangents, block, 1 - int(use.swapped), basis)
        terms.setdefault(use.term, []).append((cotangents, rows) if use.swapped else (rows, cotangents))
    total = jnp.zeros(block.shape, basis[1].dtype)
    for pairs in terms.values():
        inputs, outputs = (jnp.concatenate(side, axis=2) for side in zip(*pairs, strict=True))
        if _by_lookup(own, basis):
            squares = _squares_of_rows_read(inputs[0], outputs[0], block)
        else:
            squares = _squares_of_sums(inputs, outputs)
        total = total + squares.astype(total.dtype)
    return total


def _squares_of_sums(inputs, outputs):
    """sum_n sq(sum_r x_nr y_nr^T)."""
    blocks, examples, positions, _ = inputs.shape
    if positions == 1:
        return sum_over_examples("bni,bno->bio", jnp.square(inputs[:, :, 0]), jnp.square(outputs[:, :, 0]))
    inputs, outputs = replicated(inputs), replicated(outputs)
    size = blocks * inputs.shape[-1] * outputs.shape[-1]
    fitting = [n for n in range(1, examples + 1) if examples % n == 0 and n * size <= _MOST_ENTRIES]
    together = max(fitting, default=1)

    def some(total, rows):
        x, y = rows
        return total + jnp.sum(jnp.square(jnp.einsum("nbri,nbro->nbio", x, y)), axis=0), None

    def grouped(rows):
        return rows.swapaxes(0, 1).reshape(examples // together, together, blocks, positions, -1)

    zeros = jnp.zeros((blocks, inputs.shape[-1], outputs.shape[-1]), outputs.dtype)
    return jax.lax.scan(some, zeros, (grouped(inputs), grouped(outputs)))[0]


def _squares_of_rows_read(indices, outputs, block):
    """The same for one-hot x: positions that read the same row are added up, without a row that is not read."""
    indices, outputs = replicated(indices), replicated(outputs)
    same = (indices[:, :, None] == indices[:, None]).astype(outputs.dtype)
    products = outputs * (same @ outputs)
    if block.roots is not None:
        roots = jnp.asarray(block.roots[0], outputs.dtype)[0]
        products = products * jnp.square(roots)[jnp.clip(indices, 0, roots.size - 1)][..., None]
    rows = jnp.where(indices < 0, block.shape[1], indices).reshape(-1)  # a negative index would count from the end
    zeros = jnp.zeros((block.shape[1], outputs.shape[-1]), outputs.dtype)
    return zeros.at[rows].add(products.reshape(-1, outputs.shape[-1]), mode="drop")[None]
