r"""How good Kronecker factors are, on networks small enough for dense matrices: what K-FAC takes the Fisher matrix for.

On a chain of blocks with inputs a_i and output cotangents g_i, K-FAC goes from the exact matrix F in three steps: to
F~ with E[(a_i (x) g_i)(a_j (x) g_j)^T] ~ A_ij (x) G_ij for every two blocks, and from there to the matrices that agree
with F~ on its diagonal blocks, or on its three diagonals of blocks, and have an inverse with no others. All are formed
here, of one order of the parameters: block by block in the order of the chain, and the matrix (inputs, outputs) of each
row by row, the homogeneous coordinate last among the inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag, cho_factor, cho_solve, solve_triangular

from curvax.layers.blocks import BiasBlock
from curvax.layers.factor_damping import damped_factors
from curvax.layers.factors import kronecker_factors
from curvax.layers.taps import TappedPoint
from curvax.layers.tridiagonal import chains
from curvax.layers.use import with_ones
from curvax.matrices.curvature import Fisher, OutputCurvature
from curvax.objectives.term import scale_cases
from curvax.types import Array, Scalar

Grid = tuple[tuple[Array, ...], ...]


class JointFactors(NamedTuple):
    """The factors of every two blocks of a chain.

    Attributes:
        inputs: A_ij = E[a_i a_j^T], of shape (inputs of i, inputs of j).
        outputs: G_ij = E[g_i g_j^T] likewise.
    """

    inputs: Grid
    outputs: Grid


def joint_factors(
    tapped: TappedPoint,
    chain: Sequence[int] | None = None,
    key: Array | None = None,
    *,
    curvature: OutputCurvature | None = None,
) -> JointFactors:
    r"""The Kronecker factors of every two blocks of a chain, by ``kronecker_factors``.

    Args:
        chain: The places of the blocks in ``layers.treatment.kronecker``, from the inputs of the network to its
            outputs; None for all, in the order in which the program uses them.
        key: For a curvature that draws.
        curvature: ``curvax.Fisher()``, the exact one, if None.

    Example:
        >>> objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w[0]) @ w[1], curvax.losses.squared_error())
        >>> w, batch = [jnp.ones((2, 3)), jnp.ones((3, 1))], (jnp.eye(2), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> joint = curvax.layers.quality.joint_factors(tapped)
        >>> joint.inputs[0][1].shape, joint.outputs[0][1].shape
        ((2, 3), (3, 1))

    Raises:
        ValueError: A block has several uses or matrices, or blocks have different numbers of positions.

    Source: Martens 2016, section 6.3.
    """
    chain = _chain(tapped, chain)
    positions = {block.name: block.weights.shared for block in (_blocks(tapped)[place] for place in chain)}
    if len(set(positions.values())) > 1:
        counts = ", ".join(f"{name!r} {count}" for name, count in positions.items())
        raise ValueError(f"joint_factors: the positions that share the weights of blocks are not as many: {counts}")
    pairs = tuple(itertools.combinations(chain, 2))
    curvature = Fisher() if curvature is None else curvature
    factors = kronecker_factors(tapped, key, curvature=curvature, pairs=pairs)

    def grid(own, cross):
        between = dict(zip(pairs, cross, strict=True))

        def entry(i, j):
            return own[i][0] if i == j else between[i, j] if (i, j) in between else between[j, i].T

        return tuple(tuple(entry(i, j) for j in chain) for i in chain)

    return JointFactors(grid(factors.inputs, factors.cross_inputs), grid(factors.outputs, factors.cross_outputs))


def damped(joint: JointFactors, gamma: Scalar) -> JointFactors:
    """The same with factored damping gamma on A_ii and G_ii, see ``damped_factors``; those of two blocks stay."""
    count = range(len(joint.inputs))
    own = [damped_factors(joint.inputs[i][i][None], joint.outputs[i][i][None], gamma) for i in count]

    def grid(old, side):
        return tuple(tuple(own[i][side][0] if i == j else old[i][j] for j in count) for i in count)

    return JointFactors(grid(joint.inputs, 0), grid(joint.outputs, 1))


def khatri_rao(joint: JointFactors) -> Array:
    """F~, the matrix with blocks A_ij (x) G_ij (Martens 2016, eq. 6.1).

    Example:
        >>> joint = curvax.layers.quality.JointFactors(((2 * jnp.eye(2),),), ((jnp.full((1, 1), 3.0),),))
        >>> curvax.layers.quality.khatri_rao(joint)
        Array([[6., 0.],
               [0., 6.]], dtype=float...)
    """
    rows = zip(joint.inputs, joint.outputs, strict=True)
    return jnp.block([[jnp.kron(a, g) for a, g in zip(*row, strict=True)] for row in rows])


def block_diagonal(joint: JointFactors) -> Array:
    """F with the diagonal blocks of F~ alone (Martens 2016, section 6.4.2)."""
    return block_diag(*(jnp.kron(a, g) for a, g in _own(joint)))


def block_diagonal_inverse(joint: JointFactors) -> Array:
    """Its inverse, with blocks A_ii^{-1} (x) G_ii^{-1}."""
    return block_diag(*(jnp.kron(_inverse(a), _inverse(g)) for a, g in _own(joint)))


def block_tridiagonal(joint: JointFactors) -> Array:
    r"""F^, which is F~ on the three diagonals of blocks and whose inverse has none but those.

    It is Xi^{-1} diag(Sigma) Xi^{-T}, the covariance of a chain in which every block is a linear function of the block
    above it and noise: Xi has -Psi_i = -A_{i,i+1} A_{i+1,i+1}^{-1} (x) G_{i,i+1} G_{i+1,i+1}^{-1} right of its unit
    diagonal, and Sigma_i = A_ii (x) G_ii - Psi_i (A_{i+1,i+1} (x) G_{i+1,i+1}) Psi_i^T is what it does not explain.

    Source: Martens 2016, section 6.4.3.
    """
    xi, noise = _directed(joint)
    half = solve_triangular(xi, block_diag(*noise), unit_diagonal=True)
    return solve_triangular(xi, half.T, unit_diagonal=True).T


def block_tridiagonal_inverse(joint: JointFactors) -> Array:
    """Its inverse, Xi^T diag(Sigma^{-1}) Xi."""
    xi, noise = _directed(joint)
    return xi.T @ block_diag(*(_inverse(sigma) for sigma in noise)) @ xi


def exact_matrix(
    tapped: TappedPoint,
    chain: Sequence[int] | None = None,
    key: Array | None = None,
    *,
    curvature: OutputCurvature | None = None,
) -> Array:
    r"""F itself on a chain of blocks, without the penalty; arguments are those of ``joint_factors``.

    The gradients of all examples and columns of the curvature are in memory at once.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> curvax.layers.quality.exact_matrix(tapped)
        Array([[ 5.,  7.],
               [ 7., 10.]], dtype=float...)
    """
    gradients = _gradients(_rows(tapped, _chain(tapped, chain), key, curvature))
    return gradients.T @ gradients


def cumulant_bound(
    tapped: TappedPoint,
    chain: Sequence[int] | None = None,
    key: Array | None = None,
    *,
    curvature: OutputCurvature | None = None,
) -> Array:
    r"""An upper bound on \|F - F~\|, entry by entry, from cumulants of higher order.

    For weights with inputs a, a' and cotangents g, g' the entry of F - F~ is

        kappa(a, a', g, g') + E[a] kappa(a', g, g') + E[a'] kappa(a, g, g'),

    and the bound is the sum of the three magnitudes. It is small where the four are nearly jointly Gaussian. That E[g]
    = 0 and E[a g^T] = 0, which the curvature of a model's own distribution has, is taken for granted, so it is none for
    the empirical Fisher matrix. Arguments are those of ``joint_factors``.

    Raises:
        ValueError: Several positions share the weights of a block, so that gradients are no products; or cases are
            finer than examples.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.sigmoid_binary_cross_entropy())
        >>> w, batch = jnp.ones((1, 1)), (jnp.array([[1.0], [3.0]]), jnp.ones((2, 1)))
        >>> tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
        >>> F = curvax.layers.quality.exact_matrix(tapped)
        >>> error = F - curvax.layers.quality.khatri_rao(curvax.layers.quality.joint_factors(tapped))
        >>> error, curvax.layers.quality.cumulant_bound(tapped)
        (Array([[-0.3028...]], dtype=float...), Array([[0.3028...]], dtype=float...))

    Source: Martens 2016, eqs. 6.3 and 6.4; Lemma 15 (appendix B.1).
    """
    chain = _chain(tapped, chain)
    rows = _rows(tapped, chain, key, curvature)
    scales = tapped.definite().example_scales("cumulant_bound")
    for place, (inputs, _, _) in zip(chain, rows, strict=True):
        if inputs.shape[1] > 1:
            name = _blocks(tapped)[place].name
            raise ValueError(f"cumulant_bound: {inputs.shape[1]} positions share the weights of block {name!r}")
    gradients = _gradients(rows)
    cotangents = [g.reshape(-1, g.shape[-1]) for _, g, _ in rows]
    means = [(scales[term] / jnp.sum(scales[term])).astype(a.dtype) @ a[:, 0] for a, _, term in rows]
    seconds = [[g.T @ h for h in cotangents] for g in cotangents]
    sizes = [(a.shape[-1], g.shape[-1]) for a, g, _ in rows]
    parts = jnp.split(gradients, _ends([m * n for m, n in sizes]), axis=1)
    joint = joint_factors(tapped, chain, key, curvature=curvature)

    def third(i, j):
        """kappa(a_i, g_i, g_j), of shape (inputs of i, outputs of i, outputs of j)."""
        moment = (parts[i].T @ cotangents[j]).reshape(*sizes[i], sizes[j][1])
        return moment - means[i][:, None, None] * seconds[i][j][None]

    thirds = [[third(i, j) for j in range(len(chain))] for i in range(len(chain))]

    def bound(i, j):
        # Axes: inputs of i, outputs of i, inputs of j, outputs of j.
        of_j = means[i][:, None, None, None] * thirds[j][i].transpose(2, 0, 1)[None]
        of_i = means[j][None, None, :, None] * thirds[i][j][:, :, None]
        product = jnp.einsum("ik,jl->ijkl", joint.inputs[i][j], joint.outputs[i][j])
        fourth = (parts[i].T @ parts[j]).reshape(product.shape) - product - of_i - of_j
        return (jnp.abs(fourth) + jnp.abs(of_i) + jnp.abs(of_j)).reshape(sizes[i][0] * sizes[i][1], -1)

    return jnp.block([[bound(i, j) for j in range(len(chain))] for i in range(len(chain))])


def block_means(matrix: Array, joint: JointFactors) -> Array:
    """The mean magnitude of the entries of every block of a matrix on the chain that ``joint`` is of.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> joint = curvax.layers.quality.JointFactors(((one, one), (one, one)), ((one, one), (one, one)))
        >>> curvax.layers.quality.block_means(jnp.array([[1.0, -2.0], [-2.0, 5.0]]), joint)
        Array([[1., 2.],
               [2., 5.]], dtype=float...)
    """
    ends = _ends([a.shape[0] * g.shape[0] for a, g in _own(joint)])
    rows = jnp.split(jnp.abs(matrix), ends)
    return jnp.stack([jnp.stack([jnp.mean(block) for block in jnp.split(row, ends, axis=1)]) for row in rows])


# --- the chain ------------------------------------------------------------------------------------------------------


def _blocks(tapped):
    return tapped.layers.treatment.kronecker


def _chain(tapped, chain):
    blocks = _blocks(tapped)
    if chain is None:
        places = itertools.chain(*chains(tapped.layers))
        chain = (place for place in places if not isinstance(blocks[place], BiasBlock))
    chain = tuple(chain)
    uses = {layer.name: len(layer.members) for layer in tapped.layers}
    for place in chain:
        block = blocks[place]
        if block.shape[0] > 1 or uses[block.name] > 1 or any(block.diagonal_factors):
            raise ValueError(
                f"block {block.name!r} is no link of a chain: it has {block.shape[0]} matrices in {uses[block.name]}"
                " uses, or its factors are diagonals; name the blocks that are by chain="
            )
    if len({member.term for place in chain for member in blocks[place].weights.members}) > 1:
        raise ValueError("blocks of different terms are no chain; name those of one term by chain=")
    return chain


def _rows(tapped, chain, key, curvature):
    """For each block a, (examples, positions, inputs), g of all columns, (columns, examples, positions, outputs), term.

    g counts by the root of its case's factor.
    """
    curvature = Fisher() if curvature is None else curvature
    pieces = tapped.definite().point.pieces(curvature.keys(tapped.point, key))
    columns = [curvature.columns(piece) for piece in pieces]
    places = jnp.arange(max(number for number, _ in columns))
    seeds = tuple(
        jax.vmap(lambda i, piece=piece, column=column: scale_cases(jnp.sqrt(piece.scale), column(i)))(places)
        for piece, (_, column) in zip(pieces, columns, strict=True)
    )
    groups = tapped.by_layer(tapped.pull_back_columns(seeds))
    rows = []
    for block in (_blocks(tapped)[place] for place in chain):
        use = block.arranged(*groups[block.name])
        inputs = use.inputs[0] if block.bias is None else with_ones(use.inputs[0])
        rows.append((inputs, use.cotangents[:, 0], use.term))
    return rows


def _gradients(rows):
    """vec(sum_r a_r g_r^T) of every column and example, (columns * examples, parameters)."""
    gradients = [jnp.einsum("nri,cnro->cnio", a, g) for a, g, _ in rows]
    return jnp.concatenate([x.reshape(x.shape[0] * x.shape[1], -1) for x in gradients], axis=1)


def _directed(joint):
    """Xi, and the covariances Sigma of its noise."""
    count = len(joint.inputs)
    own = [jnp.kron(a, g) for a, g in _own(joint)]
    noise, rows = [], []
    for i, covariance in enumerate(own):
        row = [jnp.zeros((covariance.shape[0], other.shape[0]), other.dtype) for other in own]
        row[i] = jnp.eye(covariance.shape[0], dtype=covariance.dtype)
        if i + 1 < count:
            sides = [_times_inverse(grid[i][i + 1], grid[i + 1][i + 1]) for grid in joint]
            row[i + 1] = -jnp.kron(*sides)
            # Psi times the covariance above is the covariance of the two.
            covariance = covariance - jnp.kron(*(s @ grid[i][i + 1].T for s, grid in zip(sides, joint, strict=True)))
        noise.append(covariance)
        rows.append(row)
    return jnp.block(rows), noise


def _own(joint):
    return [(joint.inputs[i][i], joint.outputs[i][i]) for i in range(len(joint.inputs))]


def _times_inverse(left, right):
    """M A^{-1} of a symmetric positive definite A."""
    return cho_solve(cho_factor(right), left.T).T


def _inverse(matrix):
    return _times_inverse(jnp.eye(matrix.shape[0], dtype=matrix.dtype), matrix)


def _ends(sizes):
    return list(itertools.accumulate(sizes))[:-1]
