r"""Limited-memory symmetric rank-one (SR1) matrices.

The SR1 matrix of pairs (a_i, b_i) is the symmetric B with B a_i = b_i that grows from gamma I by one rank for each
pair: B+ = B + r r^T / (r^T a), r = b - B a. In compact form B = gamma I + Psi C^{-1} Psi^T with psi_i = b_i - gamma a_i
and C_ij = a_i^T psi_j for a_i not older than a_j. The pairs (s, y) of steps and changes of the gradient give the
Hessian (direct form), the pairs (y, s) its inverse; the two are inverse to each other where gamma is. C is the matrix
D + L + L^T - S^T B_0 S of the literature, so the vectors psi alone need to be kept. They are kept at unit length, and C
scaled along with them, which leaves B as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import blocks, trees
from curvax.checks import check_at_least
from curvax.matrices.compact import CompactMap
from curvax.types import Array, PyTree, Scalar


class SR1Memory(NamedTuple):
    """The pairs of a limited-memory SR1 matrix, as a ring buffer of arrays with fixed shapes."""

    vectors: PyTree  # Psi at unit lengths, with a leading axis of slots
    core: Array  # C, scaled likewise, shape (slots, slots)
    gram: Array  # Psi^T Psi, shape (slots, slots)
    ages: Array  # when each slot was filled, counted from 1; 0 for an empty slot


class MemoryUpdate(NamedTuple):
    """What ``sr1_update`` returns."""

    memory: SR1Memory
    skipped: Array  # whether the pair was left out
    dropped: Array  # how many older pairs were dropped, as the matrix was no longer well defined


def sr1_memory(params: PyTree, size: int = 5) -> SR1Memory:
    """An empty memory for vectors like ``params``.

    Args:
        size: m, how many pairs it keeps.
    """
    check_at_least("size", size, 1)
    dtype = trees.wide_dtype(*jax.tree.leaves(params))
    core, gram = (jnp.zeros((size, size), dtype) for _ in range(2))  # a buffer each, so that states can be donated
    return SR1Memory(blocks.zeros(params, size), core, gram, jnp.zeros(size, jnp.int32))


def sr1_map(memory: SR1Memory, scale: Scalar) -> CompactMap:
    """The SR1 matrix of a memory, a linear map with ``solve``, ``to_dense``, ``spectrum`` and the rest.

    Args:
        scale: gamma, the number whose multiple of the identity the matrix grew from, as in ``sr1_update``.
    """
    return CompactMap(jnp.asarray(scale, memory.core.dtype), memory.vectors, memory.core, memory.gram, memory.ages > 0)


def sr1_update(
    memory: SR1Memory,
    operand: PyTree,
    image: PyTree,
    scale: Scalar,
    tolerance: Scalar = 1e-8,
    *,
    expected: PyTree | None = None,
    usable: Array | bool = True,
) -> MemoryUpdate:
    r"""Adds the pair (a, b) that the matrix shall take a to b by, in place of the oldest one.

    A pair is left out if |a^T r| < tolerance ||a|| ||r|| with r = b - B a, as it would make the update unbounded, or if
    it is not finite or already obeyed. Then, as long as C is singular or Psi has dependent columns (relative to
    rounding), the oldest pair is dropped. Costs two products with Psi, and two more unless B a is given. Source:
    Ramamurthy and Duffy 2017, section 3 and appendix; Nocedal and Wright 2006, section 6.2.

    Args:
        operand: a: the step s for the Hessian, the change y of the gradient for its inverse.
        image: b: y or s.
        scale: gamma, not zero.
        tolerance: The threshold r of the paper.
        expected: B a, if it is known.
        usable: False leaves the pair out whatever it is.

    Example:
        >>> H = jnp.diag(jnp.array([1.0, -2.0, 3.0]))
        >>> memory = curvax.quasi_newton.sr1_memory(jnp.zeros(3), size=3)
        >>> update = jax.jit(curvax.quasi_newton.sr1_update)
        >>> for a in jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]):
        ...     memory, _, _ = update(memory, a, H @ a, scale=0.5)
        >>> bool(jnp.allclose(curvax.quasi_newton.sr1_map(memory, 0.5).to_dense(), H, atol=1e-4))
        True
    """
    dtype = memory.core.dtype
    scale = jnp.asarray(scale, dtype)
    matrix = sr1_map(memory, scale)
    # Until here B = gamma I + Psi C^{-1} Psi^T. The new pair adds the column psi = b - gamma a to Psi and the row
    # a^T [Psi, psi] to C: with r = b - B a = psi - Psi C^{-1} Psi^T a, block elimination turns the Schur complement
    # a^T psi - (Psi^T a)^T C^{-1} Psi^T a = r^T a into the recursion's B + r r^T / (r^T a).
    psi = trees.sub(image, trees.scale(scale, operand))
    if expected is None:
        residual = trees.sub(psi, matrix.combine(matrix.solve_core(matrix.project(operand))))
    else:
        residual = trees.sub(image, expected)
    lengths, cosines = blocks.lengths_and_cosines(operand, image, residual, psi)
    reach, size, rest, length = lengths.astype(dtype)
    curved = jnp.abs(cosines[0, 2]).astype(dtype) >= jnp.asarray(tolerance, dtype)
    news = rest > 10 * jnp.finfo(dtype).eps * size
    # What is not finite in a vector is not in its norm.
    kept = curved & news & (reach > 0) & trees.all_finite(lengths, cosines, reach / length) & usable

    slot = jnp.argmin(memory.ages)
    here = jnp.arange(memory.ages.size) == slot
    # psi is kept at unit length, so that pairs of any size stand beside each other: Psi D^{-1} and D^{-1} C D^{-1} are
    # the same matrix for any diagonal D, here D_ii = ||psi_i||. The new row of C is a^T psi_i / (||psi_i|| ||psi||).
    unit = trees.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), psi)
    stored = blocks.with_row(memory.vectors, slot, trees.where(kept, unit, blocks.row(memory.vectors, slot)))
    used = (memory.ages > 0) | here
    ages = jnp.where(here, jnp.max(memory.ages) + 1, memory.ages)
    products, squares = (blocks.inner_products(stored, vector).astype(dtype) for vector in (operand, unit))
    products = products / jnp.where(length > 0, length, 1)
    core, gram = (
        _with_row(matrix, here, row, used) for matrix, row in ((memory.core, products), (memory.gram, squares))
    )
    small = trees.where(kept, (core, gram, ages), (memory.core, memory.gram, memory.ages))
    repaired = jax.lax.while_loop(_is_ill_defined, _without_oldest, small)
    dropped = jnp.sum(small[2] > 0) - jnp.sum(repaired[2] > 0)
    return MemoryUpdate(SR1Memory(stored, *repaired), ~kept, dropped.astype(jnp.int32))


def _with_row(matrix, here, row, used):
    """``matrix`` with ``row`` in the row and the column where ``here`` is, zero where nothing is stored."""
    replaced = jnp.where(here[:, None], row[None, :], jnp.where(here[None, :], row[:, None], matrix))
    return jnp.where(used[:, None] & used[None, :], replaced, 0)


def _is_ill_defined(small):
    """Whether C is singular or Psi has dependent columns, to rounding; C is first scaled."""
    core, gram, ages = small
    used = ages > 0
    both = used[:, None] & used[None, :]
    identity = jnp.eye(ages.size, dtype=core.dtype)
    rounding = 10 * ages.size * jnp.finfo(core.dtype).eps

    sizes = jnp.max(jnp.abs(core), axis=1)
    factors = jax.lax.rsqrt(jnp.where(used & (sizes > 0), sizes, 1))
    # Both at once: one call to compile. Two of them could wait for each other's threads on few cores.
    scaled = jnp.stack([core * factors[:, None] * factors[None, :], gram])
    of_core, of_gram = jnp.linalg.eigvalsh(jnp.where(both[None], scaled, identity[None]))
    of_core = jnp.abs(of_core)
    # Said so that what is not a number is not well defined either.
    return jnp.any(used) & ~((jnp.min(of_core) > rounding * jnp.max(of_core)) & (jnp.min(of_gram) > rounding))


def _without_oldest(small):
    core, gram, ages = small
    oldest = jnp.argmin(jnp.where(ages > 0, ages, jnp.iinfo(ages.dtype).max))
    ages = jnp.where(jnp.arange(ages.size) == oldest, 0, ages)
    used = ages > 0
    both = used[:, None] & used[None, :]
    return jnp.where(both, core, 0), jnp.where(both, gram, 0), ages
