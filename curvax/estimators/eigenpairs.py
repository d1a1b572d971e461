"""Eigenpairs at one end of the spectrum from products alone, by thick-restart Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.checks import check_at_least, check_choice
from curvax.krylov import _wide as wide
from curvax.matrices.linear_map import LinearMap
from curvax.types import Array, PyTree, Scalar


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors, the outermost first, and how good they are; the best found where not converged."""

    values: Array  # lambda, shape (num_pairs,)
    vectors: PyTree  # orthonormal, along the leading axis of every leaf; in float32 or wider
    residuals: Array  # |A x - lambda x| / |A|, shape (num_pairs,); |A| is the largest Ritz value in magnitude
    converged: Array  # which residuals are within the tolerance, booleans of shape (num_pairs,)
    restarts: Array  # how often the basis was filled up again


def top_eigenpairs(
    linear_map: LinearMap,
    key: Array,
    *,
    num_pairs: int,
    num_steps: int | None = None,
    max_restarts: int = 100,
    tolerance: Scalar | None = None,
    which: str = "largest",
) -> Eigenpairs:
    r"""Eigenpairs at one end of the spectrum of a symmetric map, by thick-restart Lanczos.

    A basis of ``num_steps`` vectors is filled by products, the best half of its Ritz vectors (the wanted ones among
    them) is kept, and the next Lanczos vector continues from there. The basis is orthogonalised twice in full.

    A Krylov space from one vector holds one vector of each eigenspace, whatever its dimension. Where it becomes
    invariant a random orthogonal direction continues it. Once the wanted pairs have converged the search goes on from a
    random direction orthogonal to them, until it has converged on the same values again with the next Ritz value known
    well enough to stay behind. So eigenvalues are found with their multiplicity, for at least ``num_steps - num_pairs``
    products more; no method that sees only products can exclude that a further copy was missed. Source: Wu and Simon
    2000.

    Args:
        num_pairs: How many pairs; at most the number of parameters.
        num_steps: The size of the basis, in vectors held in memory; at least ``num_pairs + 2``. By default
            ``max(2 * num_pairs + 10, 20)``; never more than the number of parameters.
        max_restarts: How often the basis may be filled up again.
        tolerance: The bound on the relative residuals. By default eps^(2/3) of the map's narrowest dtype: 0.04 in
            bfloat16, 2e-5 in float32, 4e-11 in float64. The error of an eigenvalue is about the square of its residual
            over the relative gap.
        which: ``"largest"``, ``"smallest"`` (the most negative end) or ``"magnitude"`` (largest absolute value first).


    Raises:
        ValueError: If a count is out of range or ``which`` is unknown.

    Example:
        >>> A = curvax.Diagonal({"w": jnp.array([5.0, -7.0, 1.0]), "b": jnp.array([5.0, 2.0])})
        >>> curvax.estimators.top_eigenpairs(A, jax.random.key(0), num_pairs=3).values.round(6)
        Array([5., 5., 2.], dtype=float...)
    """
    dimension = trees.size(linear_map.structure)
    size = _basis_size(dimension, num_pairs, num_steps)
    most = check_at_least("max_restarts", max_restarts, 0)
    order = _order(which)
    dtype = wide.dtype_of(linear_map)
    bound = jnp.asarray(_default_tolerance(linear_map) if tolerance is None else tolerance, dtype)
    kept = num_pairs + (size - num_pairs) // 2

    def cycle(state):
        basis, matrix, drawn, coupling, norm = _fill(linear_map, state)
        values, rotation = _ritz(matrix, order)
        norm = jnp.maximum(norm, jnp.max(jnp.abs(values)))
        residuals = jnp.abs(coupling * rotation[-1])
        # Half the tolerance, which leaves room for the part of a residual that a probe does not follow up.
        settled = jnp.all(residuals[:num_pairs] <= bound / 2 * norm)
        repeated = jnp.all(jnp.abs(values[:num_pairs] - state.settled_values) <= bound * norm)
        behind = _runner_up_is_behind(values, residuals, num_pairs, bound * norm)
        probe = settled & ~repeated
        held = jnp.where(probe, num_pairs, kept).astype(jnp.int32)
        return _State(
            key=jax.random.fold_in(key, state.cycles + 1),
            basis=_restarted(rotation, basis, kept, held, probe),
            drawn=drawn & ~probe,
            values=values,
            held=held,
            norm=norm,
            settled_values=jnp.where(settled, values[:num_pairs], state.settled_values),
            done=(settled & repeated & behind) | (size == dimension) | ~jnp.isfinite(norm),
            cycles=state.cycles + 1,
        )

    initial = _State(
        key=jax.random.fold_in(key, 0),
        basis=blocks.zeros(linear_map.structure, size + 1, dtype),
        drawn=jnp.array(False),
        values=jnp.zeros((size,), dtype),
        held=jnp.zeros((), jnp.int32),
        norm=jnp.zeros((), dtype),
        settled_values=jnp.full((num_pairs,), jnp.inf, dtype),
        done=jnp.array(False),
        cycles=jnp.zeros((), jnp.int32),
    )
    state = jax.lax.while_loop(lambda state: ~state.done & (state.cycles <= most), cycle, initial)
    return _result(linear_map, state, num_pairs, bound)


class _State(NamedTuple):
    key: Array
    basis: PyTree  # num_steps + 1 vectors: `held` Ritz vectors, the next direction, and zeros
    drawn: Array  # whether that direction is there; if not it is zero, and a random one is to be taken
    values: Array  # all Ritz values of the last cycle, best first
    held: Array
    norm: Array  # the largest Ritz value in magnitude or length of a product so far
    settled_values: Array  # the wanted values when they last converged
    done: Array
    cycles: Array


def _fill(linear_map, state):
    """Lanczos steps from ``held`` to the full basis Q.

    Returns Q with the direction q that follows, T = Q^T A Q, whether q is there, the factor c of A Q = Q T + c q e^T,
    and the norm. The coefficients of both orthogonalisations are the column of T, which holds for kept Ritz vectors
    and after a random direction alike.
    """
    size = state.values.shape[0]

    def step(index, carry):
        basis, matrix, drawn, _, norm = carry
        direction = jax.lax.cond(
            drawn,
            lambda: blocks.row(basis, index),
            lambda: _random_direction(linear_map, jax.random.fold_in(state.key, index), basis),
        )
        basis = blocks.with_row(basis, index, direction)
        product = wide.product(linear_map, direction)
        norm = jnp.maximum(norm, trees.norm(product))
        coefficients, rest, length = blocks.expanded(basis, product)
        following, drawn = blocks.unit(rest, length, norm)
        matrix = matrix.at[:, index].set(coefficients[:size]).at[index, :].set(coefficients[:size])
        return blocks.with_row(basis, index + 1, following), matrix, drawn, jnp.where(drawn, length, 0), norm

    matrix = jnp.diag(jnp.where(jnp.arange(size, dtype=jnp.int32) < state.held, state.values, 0))
    carry = state.basis, matrix, state.drawn, jnp.zeros_like(state.norm), state.norm
    return jax.lax.fori_loop(state.held, size, step, carry)


def _ritz(matrix, order):
    """Eigenvalues, best first, and eigenvectors as columns, computed at unit scale."""
    largest = jnp.max(jnp.abs(matrix))
    unit = jnp.where(largest > 0, largest, 1)
    values, vectors = jnp.linalg.eigh(matrix / unit)
    rank = order(values)
    return values[rank] * unit, vectors[:, rank]


def _restarted(rotation, basis, kept, held, probe):
    """The first ``held`` Ritz vectors (of ``kept`` that are computed), the next direction unless probing, and zeros."""
    following = jax.tree.map(lambda leaf: jnp.where(probe, 0, leaf[-1]), basis)
    coefficients = jnp.where(jnp.arange(kept, dtype=jnp.int32)[:, None] < held, rotation[:, :kept].T, 0)
    front = blocks.combine(coefficients, jax.tree.map(lambda leaf: leaf[:-1], basis))
    basis = jax.tree.map(lambda leaf, new: jnp.zeros_like(leaf).at[:kept].set(new), basis, front)
    return blocks.with_row(basis, held, following)


def _random_direction(linear_map, key, basis):
    """A random unit vector orthogonal to the basis, which may be padded with zeros."""
    vector = wide.cast(trees.random_normal(key, linear_map.structure), wide.dtype_of(linear_map))
    _, rest, length = blocks.expanded(basis, vector)
    return blocks.unit(rest, length, trees.norm(vector))[0]


def _runner_up_is_behind(values, residuals, num_pairs, resolution):
    """Whether the best unwanted Ritz value is known well enough not to be on its way past the wanted ones.

    A tenth of the gap: a Ritz value on its way to a further copy can rest for a while at a value that is behind.
    """
    if num_pairs == values.shape[0]:
        return True
    gap = jnp.abs(values[num_pairs - 1] - values[num_pairs])
    return residuals[num_pairs] <= jnp.maximum(gap / 10, resolution)


def _result(linear_map, state, num_pairs, bound):
    vectors = jax.tree.map(lambda leaf: leaf[:num_pairs], state.basis)
    values = state.values[:num_pairs]
    errors = trees.sub(wide.block_product(linear_map, vectors), jax.vmap(trees.scale)(values, vectors))
    residuals = jax.vmap(trees.norm)(errors) / jnp.where(state.norm == 0, 1, state.norm)
    return Eigenpairs(values, vectors, residuals, residuals <= bound, state.cycles - 1)


def _basis_size(dimension, num_pairs, num_steps):
    check_at_least("num_pairs", num_pairs, 1)
    if num_pairs > dimension:
        raise ValueError(f"num_pairs is {num_pairs}, but the map has only {dimension} parameters, so many eigenpairs")
    size = min(max(2 * num_pairs + 10, 20) if num_steps is None else num_steps, dimension)
    if size < min(num_pairs + 2, dimension):
        raise ValueError(f"num_steps is {num_steps}; for {num_pairs} pairs it must be at least {num_pairs + 2}")
    return size


def _default_tolerance(linear_map):
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(linear_map.structure)) ** (2 / 3)


def _order(which) -> Callable[[Array], Array]:
    """The permutation that puts the wanted values first."""
    keys = {"largest": jnp.negative, "smallest": jnp.positive, "magnitude": lambda values: -jnp.abs(values)}
    check_choice("which", which, keys)
    return lambda values: jnp.argsort(keys[which](values))
