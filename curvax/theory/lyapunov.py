"""Continuous Lyapunov equations, whose solutions are stationary covariances, and the traces of these."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.theory.iteration import Bounds
from curvax.theory.modes import as_matrices, where_valid
from curvax.types import Array, Scalar

# (1 - eps)^(2^k) is below eps by then, in float64 too.
_MOST_DOUBLINGS = 60


class TraceBounds(NamedTuple):
    r"""Bounds on tr P for A^T P + P A + Q = 0, in terms of the eigenvalues of A + A^T and Q.

    Attributes:
        lower: tr Q / -lambda_n(A + A^T) (Wang et al. 1986).
        upper: tr Q / -lambda_1(A + A^T) (Wang et al. 1986).
        sharp_upper: sum_i lambda_i(Q) / -lambda_i(A + A^T), at most ``upper`` (Komaroff 1992).
        root_lower: (sum_i lambda_i(Q)^{1/2})^2 / -tr(A + A^T), above or below ``lower`` (Komaroff 1988).
    """

    lower: Array
    upper: Array
    sharp_upper: Array
    root_lower: Array


def solve_lyapunov(matrix: Array, right: Array) -> Array:
    r"""P of the continuous algebraic Lyapunov equation A^T P + P A + Q = 0.

    Valid where all eigenvalues of A have negative real parts. It is a Stein equation, with M = (s I + A) (s I - A)^{-1}

        P = M^T P M + 2 s (s I - A)^{-T} Q (s I - A)^{-1}

    whose series is summed by doublings, P <- P + M^T P M and M <- M^2.

    To first order in alpha the covariance that a constant rate ends with solves K V + V K^T = alpha B^{-1} Sigma B^{-1}
    (equation 5.23 of Martens 2016), so that A is -K^T; equation 5.24 prints -K. With B - (alpha / 2) H in the place of
    B it does so exactly.

    Args:
        matrix: A, of any symmetry.
        right: Q, symmetric.

    Example:
        >>> A = jnp.array([[-1.0, 1.0], [0.0, -2.0]])
        >>> P = curvax.theory.solve_lyapunov(A, jnp.eye(2))
        >>> bool(jnp.max(jnp.abs(A.T @ P + P @ A + jnp.eye(2))) < 1e-6)
        True

    Source: Smith 1968; Martens 2016, section 5.7.2, solves it by Bartels and Stewart 1972.
    """
    matrix, right = as_matrices(matrix=matrix, right=right)
    eye, eps = jnp.eye(len(matrix), dtype=matrix.dtype), jnp.finfo(matrix.dtype).eps
    with jax.default_matmul_precision("highest"):
        # The geometric mean of the largest and the smallest singular value: for symmetric A the fastest shift.
        shift = jnp.sqrt(jnp.linalg.norm(matrix) / jnp.linalg.norm(jnp.linalg.inv(matrix)))
        resolvent = jnp.linalg.inv(shift * eye - matrix)
        first = 2 * shift * resolvent.T @ right @ resolvent, (shift * eye + matrix) @ resolvent, 0

        def goes_on(carry):
            _, power, count = carry
            size = jnp.linalg.norm(power)
            # Where A is not stable the powers grow, become nan, or stay as they are; all others have vanished by then.
            return (size > eps) & (size < 1 / eps) & (count < _MOST_DOUBLINGS)

        def double(carry):
            solution, power, count = carry
            return solution + power.T @ solution @ power, power @ power, count + 1

        solution, power, _ = jax.lax.while_loop(goes_on, double, first)
        return where_valid(jnp.linalg.norm(power) <= eps, (solution + solution.T) / 2)


def stationary_lyapunov(hessian: Array, curvature: Array, noise: Array, rate: Scalar) -> tuple[Array, Array]:
    r"""A and Q of the equation A^T P + P A + Q = 0 that P = H^{1/2} V_inf H^{1/2} solves: equation 5.28, corrected.

        A = -H^{1/2} B'^{-1} H^{1/2}      Q = alpha H^{1/2} B'^{-1} Sigma B'^{-1} H^{1/2}      B' = B - (alpha / 2) H

    tr P is tr(H V_inf). Martens 2016 has B for B', which is the first order in alpha. A is symmetric, so that bounds on
    tr P apply as soon as V_inf exists: valid for 0 < alpha lambda_1(K) < 2, beyond which A is not stable.

    Example:
        >>> A, Q = curvax.theory.stationary_lyapunov(jnp.eye(1), jnp.eye(1), jnp.eye(1), 0.5)
        >>> curvax.theory.solve_lyapunov(A, Q)                                 # 0.5 / (2 - 0.5)
        Array([[0.3333...]], dtype=float...)

    Source: Martens 2016, equation 5.28, corrected.
    """
    hessian, curvature, noise = as_matrices(hessian=hessian, curvature=curvature, noise=noise)
    rate = jnp.asarray(rate, hessian.dtype)
    with jax.default_matmul_precision("highest"):
        values, vectors = jnp.linalg.eigh(hessian)
        root = (vectors * jnp.sqrt(values)[None]) @ vectors.T
        inverse = jnp.linalg.solve(curvature - rate / 2 * hessian, root)  # B'^{-1} H^{1/2}
        return -root @ inverse, rate * inverse.T @ noise @ inverse


def lyapunov_trace_bounds(matrix: Array, right: Array) -> TraceBounds:
    r"""Bounds on tr P for A^T P + P A + Q = 0, without solving it: equations 5.25 to 5.27.

    Valid where A + A^T is negative definite and Q positive semi-definite.

    Args:
        matrix: A.
        right: Q.

    Example:
        >>> bounds = curvax.theory.lyapunov_trace_bounds(-jnp.diag(jnp.array([1.0, 2.0])), jnp.eye(2))   # tr P = 3/4
        >>> print(" ".join(f"{bound:.3f}" for bound in bounds))
        0.500 1.000 0.750 0.667

    Source: Wang, Kuo and Hsu 1986; Komaroff 1988, 1992; Martens 2016, equations 5.25, 5.26 and 5.27.
    """
    matrix, right = as_matrices(matrix=matrix, right=right)
    # -lambda_i descends and lambda_i(Q) ascends, so that the largest eigenvalue of Q meets the slowest decay.
    values, q = jnp.linalg.eigvalsh(jnp.stack([matrix + matrix.T, right]))
    decay = -values
    trace = jnp.sum(q)
    bounds = TraceBounds(
        lower=trace / decay[0],
        upper=trace / decay[-1],
        sharp_upper=jnp.sum(q / decay),
        root_lower=jnp.sum(jnp.sqrt(jnp.maximum(q, 0))) ** 2 / jnp.sum(decay),
    )
    return TraceBounds(*(where_valid(decay[-1] > 0, bound) for bound in bounds))


def pseudo_lyapunov_trace(matrix: Array, right: Array) -> Array:
    r"""tr P = -1/2 tr(A^{-1} Q) for any P with A P + P^T A + Q = 0 and A invertible: Lemma 5.

    It gives traces of stationary covariances without these:

        tr(H V_inf) = (alpha / 2) tr(B^{-1} Sigma)        from A = -B^{-1}, Q = alpha B^{-1} Sigma B^{-1}
        tr(B V_inf) = (alpha / 2) tr(H^{-1} Sigma)        from A = -H^{-1}, Q = alpha H^{-1} Sigma H^{-1}

    to first order in alpha, and exactly with B - (alpha / 2) H in the place of B. Equation A.11 of Martens 2016 has
    lost the half of the second.

    Args:
        matrix: A.
        right: Q.

    Example:
        >>> curvax.theory.pseudo_lyapunov_trace(-2 * jnp.eye(2), jnp.eye(2))                  # P = I / 4
        Array(0.5, dtype=float...)

    Source: Martens 2016, Lemma 5, equations 5.29 to 5.31.
    """
    matrix, right = as_matrices(matrix=matrix, right=right)
    return -jnp.trace(jnp.linalg.solve(matrix, right)) / 2


def trace_product_bounds(symmetric: Array, semidefinite: Array) -> Bounds:
    r"""lambda_n(S) tr X <= tr(S X) <= lambda_1(S) tr X for symmetric S and positive semi-definite X: Lemma 4.

    Example:
        >>> curvax.theory.trace_product_bounds(jnp.diag(jnp.array([2.0, -1.0])), jnp.eye(2))
        Bounds(lower=Array(-2., dtype=float...), upper=Array(4., dtype=float...))

    Source: Wang, Kuo and Hsu 1986, Lemma 1; Martens 2016, Lemma 4.
    """
    symmetric, semidefinite = as_matrices(symmetric=symmetric, semidefinite=semidefinite)
    values, trace = jnp.linalg.eigvalsh(symmetric), jnp.trace(semidefinite)
    return Bounds(values[0] * trace, values[-1] * trace)
