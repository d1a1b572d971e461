r"""The block-tridiagonal inverse of K-FAC: layers that follow one another in the program know of each other.

Along a chain of blocks 1, 2, ..., l the matrix F with blocks A_ij (x) G_ij is replaced by the one that agrees with it
on the block tridiagonal and whose inverse is block-tridiagonal: the covariance of gradients of which each, given the
next block's, depends on no other. Its inverse is Xi^T Lambda Xi, with j = i + 1 and

    (Xi V)_i = V_i - PsiA_i V_j PsiG_i^T,     PsiA_i = A_ij A_jj^{-1},     PsiG_i = G_ij G_jj^{-1}
    Lambda_i^{-1} = A_ii (x) G_ii - (PsiA_i A_jj PsiA_i^T) (x) (PsiG_i G_jj PsiG_i^T)

and for the last one Lambda_l^{-1} = A_ll (x) G_ll. Factors A_ii, G_ii are damped wherever they stand, A_ij, G_ij not.

Source: Martens and Grosse 2015, section 4.3; Martens 2016, section 6.4.3.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, NamedTuple, get_args

import jax

from curvax.checks import check_at_least, check_choice
from curvax.layers.blocks import BiasBlock
from curvax.layers.factor_damping import damped_factors
from curvax.layers.factors import KroneckerFactors, Pairs
from curvax.layers.find import Layers
from curvax.layers.inverses import Inverse, Matrices, Sides, inverses_of, two_sided
from curvax.matrices.inverses import InverseMethod, by_size, inverse_root, sequenced
from curvax.matrices.stein import Powers, Stein, solve_by_powers, solve_stein, squarings, whitened_eigen
from curvax.types import Array, Scalar


def chains(layers: Layers) -> tuple[tuple[int, ...], ...]:
    """The chains of blocks, each by its place in ``layers.treatment.kronecker``, in the order of the program.

    A chain holds blocks whose uses follow one another in a term. Each of them has one use, one matrix, no factor that
    is kept as a diagonal, and as many shared positions as the others: then all their gradients are of the same cases,
    and the cross factors are moments of a pair. Every other block is a chain of its own, and so
    is a bias apart from its weights, behind all others.

    Example:
        >>> def network(params, x):
        ...     return jnp.tanh(x @ params["z"]) @ params["a"]
        >>> objective = curvax.Objective(network, curvax.losses.squared_error())
        >>> params, batch = {"a": jnp.ones((3, 2)), "z": jnp.ones((4, 3))}, (jnp.ones((5, 4)), jnp.ones((5, 2)))
        >>> layers = curvax.find_layers(objective, params, batch)
        >>> [block.name for block in layers.treatment.kronecker], chains(layers)
        (['a', 'z'], ((1, 0),))
    """
    blocks = layers.treatment.kronecker
    first = [min((member.term, member.use) for member in block.weights.members) for block in blocks]
    order = sorted(range(len(blocks)), key=lambda place: (isinstance(blocks[place], BiasBlock), first[place]))
    found: list[list[int]] = []
    for place in order:
        if found and _joins(blocks[found[-1][-1]], blocks[place]):
            found[-1].append(place)
        else:
            found.append([place])
    return tuple(map(tuple, found))


def _joins(block, following):
    if isinstance(following, BiasBlock):
        return False
    (a, *others), (b, *more) = block.weights.members, following.weights.members
    alike = a.term == b.term and block.weights.shared == following.weights.shared
    single = not others and not more and block.shape[0] == following.shape[0] == 1
    return alike and single and not any(block.diagonal_factors + following.diagonal_factors)


class Link(NamedTuple):
    """What ties a block to the next one of its chain.

    Attributes:
        inputs: PsiA.
        outputs: PsiG.
        conditional: What solves with Lambda^{-1}.
    """

    inputs: Array
    outputs: Array
    conditional: Stein | Powers


class Tridiagonal(NamedTuple):
    """What ``BlockTridiagonal`` prepares.

    Attributes:
        links: For each of its ``pairs`` what ties the first block to the second.
        ends: (A^{-1}, G^{-1}) for each block that is the last of its chain, in the order of ``chains``.
    """

    links: tuple[Link, ...]
    ends: Sides


@dataclasses.dataclass(frozen=True)
class BlockTridiagonal(Inverse):
    r"""The block-tridiagonal inverse of K-FAC along ``chains``, block-diagonal elsewhere; factored damping.

    Steps are better than those of ``BlockDiagonal`` and dearer: two eigendecompositions for each block but the last of
    a chain, and applying takes three to four times as many operations.

    Attributes:
        method: How the damped factors of blocks outside of chains are inverted, see ``curvax.matrices.inverses``.
        doublings: None for the eigendecompositions; else the sum of 2^doublings terms of the series of Smith in their
            place, which is made of products alone, as accelerators want it. Along each pair of eigenvectors a part of
            (s_1 s_2)^(2^doublings) is lacking, with s_1 and s_2 the squared canonical correlations of neighbours.
            Applying takes two products more for each doubling, where it has eight, and the state holds the powers.

    Source: Martens 2016, section 6.4.3 and appendix B.2.
    """

    method: InverseMethod = "cholesky"
    doublings: int | None = None
    # With a quarter or a half of a batch of 1,000 for the curvature along its steps the loss of a wide autoencoder was
    # thrown up again and again, with all of it never (``benchmarks/results/kfac.md``).
    curvature_cases: ClassVar[int] = 1000

    def __post_init__(self):
        check_choice("method", self.method, get_args(InverseMethod))
        if self.doublings is not None:
            check_at_least("doublings", self.doublings, 1)

    def pairs(self, layers: Layers) -> Pairs:
        return tuple(pair for chain in chains(layers) for pair in itertools.pairwise(chain))

    def prepare(self, layers: Layers, factors: KroneckerFactors, gamma: Scalar, previous: Any) -> Any:
        damped = [damped_factors(a, g, gamma) for a, g in zip(factors.inputs, factors.outputs, strict=True)]
        found, pairs = chains(layers), self.pairs(layers)
        chained = sorted({place for pair in pairs for place in pair})
        # For each factor of a chain L^{-T}, from which all else follows by products.
        roots = by_size(inverse_root, [(damped[place][side],) for place in chained for side in (0, 1)])
        whiten = {place: (a[0], g[0]) for place, a, g in zip(chained, roots[::2], roots[1::2], strict=True)}
        sides = []
        for (i, j), *cross in zip(pairs, factors.cross_inputs, factors.cross_outputs, strict=True):
            sides += [(whiten[i][side], cross[side], whiten[j][side]) for side in (0, 1)]
        halves = sequenced([lambda parts: self._half(*parts)] * len(sides), sides, after=list(whiten.values()))
        conditional = Stein if self.doublings is None else Powers
        links = tuple(
            Link(a.psi, g.psi, conditional(a.vectors, g.vectors, a.values, g.values))
            for a, g in zip(halves[::2], halves[1::2], strict=True)
        )
        alone = [chain[0] for chain in found if len(chain) == 1]
        starts = None
        if previous is not None:
            starts = tuple(own for own, chain in zip(previous.ends, found, strict=True) if len(chain) == 1)
        inverses = iter(inverses_of(tuple(damped[place] for place in alone), self.method, starts, after=halves))
        ends = (next(inverses) if len(chain) == 1 else _inverses(*whiten[chain[-1]]) for chain in found)
        return Tridiagonal(links, tuple(ends))

    def apply(self, layers: Layers, prepared: Any, matrices: Matrices) -> Matrices:
        found, pairs = chains(layers), self.pairs(layers)
        result = list(matrices)
        for (i, j), link in zip(pairs, prepared.links, strict=True):  # Xi, of what was given
            result[i] = matrices[i] - (link.inputs @ matrices[j][0] @ link.outputs.T)[None]
        for (i, _), link in zip(pairs, prepared.links, strict=True):  # Lambda
            solve = solve_stein if self.doublings is None else solve_by_powers
            result[i] = solve(link.conditional, result[i][0], sign=-1)[None]
        for chain, (a, g) in zip(found, prepared.ends, strict=True):
            result[chain[-1]] = two_sided(a, result[chain[-1]], g)
        scaled = list(result)
        for (i, j), link in zip(pairs, prepared.links, strict=True):  # Xi^T, of what the second step has left
            result[j] = scaled[j] - (link.inputs.T @ scaled[i][0] @ link.outputs)[None]
        return tuple(result)

    def _half(self, own, cross, following):
        """One side of a link, from L_i^{-T}, A_ij and L_j^{-T}.

        The s are squared canonical correlations, the squared singular values of R = L_i^{-1} A_ij L_j^{-T}: the
        whitened PsiA A_jj PsiA^T is S = R R^T, which rounding leaves positive semi-definite.
        """
        with jax.default_matmul_precision("highest"):
            half = cross @ following
            correlation = own.T @ half
            whitened, psi = correlation @ correlation.T, half @ following.T
        if self.doublings is None:
            return _Half(psi, *whitened_eigen(own, whitened))
        return _Half(psi, own, squarings(whitened, self.doublings))


class _Half(NamedTuple):
    """One side of a link: Psi, and K with s of the conditional covariance, or with the powers of S."""

    psi: Array
    vectors: Array
    values: Any


def _inverses(left, right):
    with jax.default_matmul_precision("highest"):
        return (left @ left.T)[None], (right @ right.T)[None]
