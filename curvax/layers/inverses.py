r"""Inverses of Kronecker-factored curvature: prepared on a period, applied to every gradient.

An ``Inverse`` says which approximation of the curvature is inverted, and how. What it prepares from the factors is a
pytree of arrays, which the state of an optimiser holds, and applying it to the gradient takes products of matrices
alone. Gradients are tuples of matrices, one for each block of ``layers.treatment.kronecker``, and (A (x) G)^{-1} of one
is A^{-1} V G^{-1}.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax.checks import check_choice
from curvax.layers.factors import KroneckerFactors, Pairs, damped_factors, mean_eigenvalue
from curvax.layers.find import Layers
from curvax.matrices.inverses import inverse_of, sequenced
from curvax.types import Array, PyTree, Scalar

Matrices = tuple[Array, ...]


class Inverse(abc.ABC):
    """An approximation of the curvature on the blocks, with its inverse: a value, as it holds choices alone."""

    def pairs(self, layers: Layers) -> Pairs:
        """The blocks, by their places, whose cross factors it needs."""
        del layers
        return ()

    @abc.abstractmethod
    def start(self, layers: Layers) -> Any:
        """What ``prepare`` returns before the first call, from shapes alone."""

    @abc.abstractmethod
    def prepare(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: Any) -> Any:
        """What is worked out from the factors with factored damping gamma, from time to time.

        Args:
            previous: What it returned the last time, for methods that start from there.
        """

    @abc.abstractmethod
    def apply(self, layers: Layers, prepared: Any, matrices: Matrices) -> Matrices:
        """The inverse times the blocks of a vector."""


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Inverse):
    r"""The inverse of diag(A_1 (x) G_1, A_2 (x) G_2, ...), with factored damping (Martens 2016, section 6.4.2).

    Attributes:
        method: How the damped factors are inverted, see ``curvax.matrices.inverses``.
    """

    method: str = "cholesky"

    def __post_init__(self):
        check_choice("method", self.method, ("cholesky", "schur", "eigen", "newton_schulz"))

    def start(self, layers: Layers) -> Any:
        return tuple(_zero_sides(layers))

    def prepare(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: Any) -> Any:
        damped = [damped_factors(a, g, gamma) for a, g in zip(factors.inputs, factors.outputs, strict=True)]
        flat, treedef = jax.tree.flatten(tuple(damped))
        starts = treedef.flatten_up_to(previous)
        inverses = sequenced([lambda m, s=s: inverse_of(m, self.method, s) for s in starts], flat)
        return treedef.unflatten(inverses)

    def apply(self, layers: Layers, prepared: Any, matrices: Matrices) -> Matrices:
        return tuple(two_sided(a, v, g) for (a, g), v in zip(prepared, matrices, strict=True))


def precondition(
    layers: Layers,
    inverse: Inverse,
    prepared: Any,
    factors: KroneckerFactors,
    gamma: Scalar,
    gradient: PyTree,
) -> PyTree:
    r"""The inverse times a gradient: blocks by ``inverse``, the other leaves by their diagonals.

    Diagonals d are damped like the blocks, by gamma^2. A leaf without curvature is given the mean of the others', as
    its gradient alone says nothing about the length of a step.

    Args:
        gradient: A pytree like the parameters.
    """
    treatment = layers.treatment
    leaves, treedef = jax.tree.flatten(gradient)
    matrices = tuple(block.to_matrices(gradient) for block in treatment.kronecker)
    solved: list[Any] = [None] * len(leaves)
    for block, matrix in zip(treatment.kronecker, inverse.apply(layers, prepared, matrices), strict=True):
        for place, leaf in block.to_params(matrix).items():
            solved[place] = leaf if solved[place] is None else solved[place] + leaf
    for place, diagonal, covered in zip(treatment.diagonal, factors.diagonals, treatment.covered, strict=True):
        damped = diagonal + jnp.square(jnp.asarray(gamma).astype(diagonal.dtype))
        own = leaves[place].astype(damped.dtype) / damped
        solved[place] = own if covered is None else jnp.where(covered, solved[place], own)
    for place in treatment.bare:
        curvature = _mean_curvature(factors) + jnp.square(jnp.asarray(gamma))
        solved[place] = leaves[place] / curvature.astype(leaves[place].dtype)
    return treedef.unflatten([s.astype(v.dtype) for s, v in zip(solved, leaves, strict=True)])


def two_sided(left: Array, matrix: Array, right: Array) -> Array:
    """A V G for each of the matrices of a block, A and G symmetric or diagonals."""
    first = left[:, :, None] * matrix if left.ndim == 2 else _product(left, matrix)
    return first * right[:, None, :] if right.ndim == 2 else _product(first, right)


def _product(left, right):
    # One matrix alone goes without a batch axis: XLA's CPU backend runs batched products many times slower.
    return (left[0] @ right[0])[None] if left.shape[0] == 1 else left @ right


def _zero_sides(layers):
    from curvax.layers.factors import zero_factors

    factors = zero_factors(layers)
    return zip(factors.inputs, factors.outputs, strict=True)


def _mean_curvature(factors):
    """The mean of the eigenvalues of all blocks and diagonals."""
    total, count = jnp.zeros(()), 0
    for a, g in zip(factors.inputs, factors.outputs, strict=True):
        size = a.shape[-1] * g.shape[-1]
        total = total + size * jnp.sum(mean_eigenvalue(a) * mean_eigenvalue(g))
        count += size * a.shape[0]
    for d in factors.diagonals:
        total = total + jnp.sum(d).astype(total.dtype)
        count += d.size
    return total / max(count, 1)
