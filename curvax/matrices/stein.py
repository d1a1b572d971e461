r"""Inverses of sums and differences of two Kronecker products: generalised Stein equations.

With matrices U of shape (inputs, outputs) and A, C acting on the inputs, G, D on the outputs, (A (x) G +- C (x) D) U is
A U G +- C U D. Such matrices come up as a Kronecker product with damping, and as the conditional covariances of a
block-tridiagonal matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.matrices.inverses import inverse_root
from curvax.types import Array, Scalar


class Stein(NamedTuple):
    """What solves A U G +- C U D = V for any V, from ``prepare_stein``.

    Attributes:
        inputs: K_1 with K_1^T A K_1 = I and K_1^T C K_1 = diag(s_1).
        outputs: K_2 with K_2^T G K_2 = I and K_2^T D K_2 = diag(s_2).
        input_values: s_1.
        output_values: s_2.
    """

    inputs: Array
    outputs: Array
    input_values: Array
    output_values: Array


def prepare_stein(a: Array, g: Array, c: Array, d: Array) -> Stein:
    """Works out the ``Stein`` of A, G (symmetric positive definite) and C, D (positive semi-definite).

    It takes a Cholesky factor and an eigendecomposition for each side; whatever uses it takes products alone.

    Example:
        >>> stein = prepare_stein(*(jnp.full((1, 1), x) for x in (4.0, 1.0, 1.0, 2.0)))
        >>> solve_stein(stein, jnp.ones((1, 1)), sign=-1).item()                       # 1 / (4 * 1 - 1 * 2)
        0.5

    Source: Martens 2016, appendix B.2; K = A^{-1/2} E there, L^{-T} E here, which saves an eigendecomposition.
    """
    (left, s1), (right, s2) = generalised_eigen(a, c), generalised_eigen(g, d)
    return Stein(left, right, s1, s2)


def solve_stein(stein: Stein, v: Array, *, sign: int, identity: Scalar = 1.0) -> Array:
    r"""U with A U G +- C U D = V:  U = K_1 [(K_1^T V K_2) / (1 +- s_1 s_2^T)] K_2^T.

    With the minus sign the matrix is positive definite if all s_1 s_2 < 1. Where rounding says otherwise the
    denominator is kept at n eps, the rounding of sums of the length n of the larger side.

    Args:
        v: (inputs, outputs).
        sign: +1 or -1.
        identity: xi, in place of the 1 in the denominator: with orthogonal K_1 and K_2, the eigenvectors of C and D,
            U solves xi U +- C U D = V.
    """
    values = sign * stein.input_values[:, None] * stein.output_values[None]
    eps = max(v.shape) * jnp.finfo(values.dtype).eps
    denominators = jnp.asarray(identity).astype(values.dtype) + values
    if sign < 0:
        denominators = jnp.maximum(denominators, eps)
    return stein.inputs @ ((stein.inputs.T @ v @ stein.outputs) / denominators) @ stein.outputs.T


class Powers(NamedTuple):
    """What ``solve_by_powers`` sums the series of Smith by, with products alone.

    Attributes:
        inputs: K_1 with K_1^T A K_1 = I.
        outputs: K_2 with K_2^T G K_2 = I.
        input_powers: S_1 = K_1^T C K_1 and its powers S_1^2, S_1^4 ...
        output_powers: S_2 = K_2^T D K_2 and its powers.
    """

    inputs: Array
    outputs: Array
    input_powers: tuple[Array, ...]
    output_powers: tuple[Array, ...]


def squarings(matrix: Array, doublings: int) -> tuple[Array, ...]:
    """S, S^2, S^4 ..., ``doublings`` of them."""
    found = [matrix]
    while len(found) < doublings:
        found.append(jnp.matmul(found[-1], found[-1], precision="highest"))
    return tuple(found)


def solve_by_powers(powers: Powers, v: Array, *, sign: int) -> Array:
    r"""``solve_stein`` by the first 2^k terms of U = K_1 [sum_j (-+1)^j S_1^j (K_1^T V K_2) S_2^j] K_2^T.

    k is the number of the powers. With the minus sign the sum is below the solution, by a part of (s_1 s_2)^(2^k) along
    each pair of eigenvectors: such steps are too short and never too long.

    Source: Smith 1968, squared; Martens 2016, appendix B.2 names it.
    """
    u = powers.inputs.T @ v @ powers.outputs
    for step, (left, right) in enumerate(zip(powers.input_powers, powers.output_powers, strict=True)):
        u = u + (-sign if step == 0 else 1) * (left @ u @ right)
    return powers.inputs @ u @ powers.outputs.T


def generalised_eigen(a: Array, c: Array) -> tuple[Array, Array]:
    """(K, s) with K^T A K = I and K^T C K = diag(s), s >= 0 and ascending."""
    with jax.default_matmul_precision("highest"):
        root = inverse_root(a)
        return whitened_eigen(root, root.T @ c @ root)


def whitened_eigen(root: Array, whitened: Array) -> tuple[Array, Array]:
    """``generalised_eigen`` from L^{-T} and L^{-1} C L^{-T}."""
    values, vectors = jnp.linalg.eigh(whitened)
    return jnp.matmul(root, vectors, precision="highest"), jnp.maximum(values, 0)


def smith(
    inverse_a: Array,
    inverse_g: Array,
    c: Array,
    d: Array,
    v: Array,
    *,
    sign: int,
    terms: int,
    start: Array | None = None,
) -> Array:
    r"""The first terms of U = sum_j (-+1)^j M^j U_0 N^j, with U_0 = A^{-1} V G^{-1}, M = A^{-1} C, N = D G^{-1}.

    Smith's iteration U <- U_0 -+ M U N. It solves A U G +- C U D = V without eigendecompositions and converges if the
    spectral radii of M and N have a product below one, like the powers of it.

    Args:
        terms: How many terms; without a ``start`` the first is U_0.
        start: A solution of an equation near this one, in place of U_0.

    Source: Smith 1968; Martens 2016, appendix B.2 names it.
    """
    first = inverse_a @ v @ inverse_g
    left, right = inverse_a @ c, d @ inverse_g
    return jax.lax.fori_loop(
        1, terms, lambda _, u: first - sign * (left @ u @ right), first if start is None else start
    )


def squared_smith(
    inverse_a: Array, inverse_g: Array, c: Array, d: Array, v: Array, *, sign: int, doublings: int
) -> Array:
    r"""``smith`` with 2^k terms in k steps: U <- U -+ M U N, M <- M^2, N <- N^2, with plus signs behind the first step.

    Args:
        doublings: k.
    """
    u = inverse_a @ v @ inverse_g
    left, right = -sign * (inverse_a @ c), d @ inverse_g
    for step in range(doublings):
        u = u + left @ u @ right
        if step + 1 < doublings:
            left, right = left @ left, right @ right
    return u
