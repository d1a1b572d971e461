"""Mean, covariance and expected loss of a stochastic second-order iteration: exact, and closed for constant rates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.theory.modes import as_matrices, modes_of, where_valid
from curvax.types import Array, Scalar


class ExpectedLoss(NamedTuple):
    r"""E h - h(theta*), whose two parts know nothing of each other (Martens 2016, equation 5.13).

    Attributes:
        noise: 1/2 tr(H V), which does not depend on the start.
        start: 1/2 m^T H m, which does not depend on the noise.
    """

    noise: Array
    start: Array

    @property
    def total(self) -> Array:
        return self.noise + self.start


class Moments(NamedTuple):
    r"""What is expected of theta_k.

    Attributes:
        mean: m_k = E theta_k - theta*.
        covariance: V_k = E (theta_k - E theta_k) (theta_k - E theta_k)^T.
        loss: E h(theta_k) - h(theta*) in its two parts.
    """

    mean: Array
    covariance: Array
    loss: ExpectedLoss


class Bounds(NamedTuple):
    """lower <= what is bounded <= upper."""

    lower: Array
    upper: Array


def moments(
    hessian: Array, curvature: Array, noise: Array, rates: Array, start: Array, *, covariance: Array | None = None
) -> Moments:
    r"""The exact moments of theta_0 ... theta_K under any rates alpha_0 ... alpha_{K-1}.

        m_{k+1} = (I - alpha_k K) m_k
        V_{k+1} = (I - alpha_k K) V_k (I - alpha_k K)^T + alpha_k^2 B^{-1} Sigma B^{-1}

    Valid for any rates. Annealed ones are ``1 / jnp.arange(1, K + 1)``, constant ones ``jnp.full(K, rate)``.

    Equation A.1 of Martens 2016 lacks alpha_k^2 K V_k K^T, which the constant covariance that it assumes implies, and
    its Theorem 1 begins V with (theta_0 - theta*) (theta_0 - theta*)^T, which belongs to the mean and is counted there.

    Args:
        rates: (K,).
        covariance: V_0; zero where theta_0 is not random.

    Returns:
        The moments for k = 0 ... K along axis 0.

    Example:
        >>> H, B, Sigma = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2), jnp.eye(2)
        >>> curvax.theory.moments(H, B, Sigma, jnp.array([0.25, 0.25]), jnp.ones(2)).loss.start
        Array([2.5      , 0.28125  , 0.1582...], dtype=float...)

    Source: Martens 2016, equations 5.12, 5.13 and A.1, corrected; Murata 1998.
    """
    hessian, curvature, noise = as_matrices(hessian=hessian, curvature=curvature, noise=noise)
    eye = jnp.eye(len(hessian), dtype=hessian.dtype)
    first = (
        jnp.asarray(start, eye.dtype),
        jnp.zeros_like(eye) if covariance is None else jnp.asarray(covariance, eye.dtype),
    )
    with jax.default_matmul_precision("highest"):
        contraction, injected = drift_and_diffusion(hessian, curvature, noise)

        def step(carry, rate):
            mean, covariance = carry
            kept = eye - rate * contraction
            new = kept @ mean, kept @ covariance @ kept.T + rate**2 * injected
            return new, new

        _, rest = jax.lax.scan(step, first, jnp.asarray(rates, hessian.dtype))
        return moments_from(hessian, *with_first(first, rest))


def constant_rate_moments(
    hessian: Array,
    curvature: Array,
    noise: Array,
    rate: Scalar,
    start: Array,
    step: Scalar,
    *,
    covariance: Array | None = None,
) -> Moments:
    r"""The moments of theta_k under a constant rate, without the steps before: Theorem 1, corrected.

        m_k = (I - alpha K)^k (theta_0 - theta*)        V_k = V_inf + (I - alpha K)^k (V_0 - V_inf) ((I - alpha K)^k)^T

    with V_inf of ``stationary_covariance``. Valid unless (1 - alpha lambda_i) (1 - alpha lambda_j) is 1.

    With Xi_A(X) = A X + X A^T and Omega_A(X) = A X A^T, Martens 2016 prints the powers of I - Xi_{alpha K} for those of
    I - Xi_{alpha K} + Omega_{alpha K}, and (theta_0 - theta*) (theta_0 - theta*)^T for V_0. Both are wrong: see
    ``moments``.

    Args:
        step: k, one number; ``jax.vmap`` takes several.
        covariance: V_0; zero where theta_0 is not random.

    Example:
        >>> H, B, Sigma = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2), jnp.eye(2)
        >>> curvax.theory.constant_rate_moments(H, B, Sigma, 0.25, jnp.ones(2), 2).loss.start
        Array(0.1582..., dtype=float...)

    Source: Martens 2016, Theorem 1, corrected; Murata 1998, Theorem 1.
    """
    modes = modes_of(hessian, curvature, noise)
    rate = jnp.asarray(rate, modes.values.dtype)
    factor = (1 - rate * modes.values) ** jnp.asarray(step, rate.dtype)
    limit = modes.stationary_entries(rate)
    if covariance is None:
        first = jnp.zeros_like(limit)
    else:
        with jax.default_matmul_precision("highest"):
            first = modes.inverse @ jnp.asarray(covariance, limit.dtype) @ modes.inverse.T
    entries = limit + factor[:, None] * (first - limit) * factor[None]
    with jax.default_matmul_precision("highest"):
        mean = modes.vectors @ (factor * modes.coordinates(start))
        return moments_from(jnp.asarray(hessian, mean.dtype), mean, modes.matrix(entries))


def stationary_covariance(hessian: Array, curvature: Array, noise: Array, rate: Scalar) -> Array:
    r"""V_inf, the covariance that a constant rate ends with.

        V_inf = (I - alpha K) V_inf (I - alpha K)^T + alpha^2 B^{-1} Sigma B^{-1}

    Valid for 0 < alpha lambda_1(K) < 2, beyond which there is none. With Xi_A(X) = A X + X A^T, Omega_A(X) = A X A^T it
    is alpha (Xi_K - alpha Omega_K)^{-1} (B^{-1} Sigma B^{-1}). Martens 2016 prints it without Omega (Theorem 1), its
    first order in alpha. But it solves the printed equation 5.23 with B' = B - (alpha / 2) H in the place of B, so

        tr(H V_inf) = (alpha / 2) tr(B'^{-1} Sigma)        tr(B' V_inf) = (alpha / 2) tr(H^{-1} Sigma)

    Example:
        >>> curvax.theory.stationary_covariance(jnp.eye(1), jnp.eye(1), jnp.eye(1), 0.5)
        Array([[0.3333...]], dtype=float...)

    Source: Martens 2016, Theorem 1 and equation 5.23, corrected.
    """
    modes = modes_of(hessian, curvature, noise)
    rate = jnp.asarray(rate, modes.values.dtype)
    return where_valid(modes.is_stable(rate), modes.matrix(modes.stationary_entries(rate)))


def stationary_loss(hessian: Array, curvature: Array, noise: Array, rate: Scalar) -> Array:
    r"""The noise floor of a constant rate: E h - h(theta*) tends to T = (alpha / 4) tr((B - (alpha / 2) H)^{-1} Sigma).

    Valid for 0 < alpha lambda_1(K) < 2. Martens 2016 has (alpha / 4) tr(B^{-1} Sigma) (equation 5.31), which is its
    first order in alpha and too low: by up to a quarter where alpha lambda_1(K) < 1/2, and without bound towards 2.

    Example:
        >>> curvax.theory.stationary_loss(jnp.eye(1), jnp.eye(1), jnp.eye(1), 0.5)
        Array(0.1666..., dtype=float...)

    Source: Martens 2016, equation 5.31 and section 5.7.3, corrected.
    """
    modes = modes_of(hessian, curvature, noise)
    rate = jnp.asarray(rate, modes.values.dtype)
    return where_valid(modes.is_stable(rate), modes.noise_floor(rate))


def constant_rate_bounds(
    hessian: Array, curvature: Array, noise: Array, rate: Scalar, start: Array, step: Scalar
) -> Bounds:
    r"""L(k) <= E h(theta_k) - h(theta*) <= U(k) under a constant rate: Theorem 6, corrected.

        L(k) = (1 - r_max^{2k}) T + r_min^{2k} h_0        U(k) = (1 - r_min^{2k}) T + r_max^{2k} h_0

    with T of ``stationary_loss`` and r_min, r_max the least and the largest |1 - alpha lambda_i(K)|; up to
    alpha lambda_1(K) = 1 they are those of lambda_1 and lambda_n. Valid for 0 < alpha lambda_1(K) < 2.

    Both bounds that Martens 2016 prints for 2 alpha lambda_1(K) < 1 are false. They begin at 2 h_0, as they count the
    start in the covariance too, so L fails for small k; and they end at (alpha / 4) tr(B^{-1} Sigma) < T, so U fails
    for large k.

    Args:
        step: k, a number or an array of them.

    Example:
        >>> H, B, Sigma = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2), jnp.eye(2)
        >>> bounds = curvax.theory.constant_rate_bounds(H, B, Sigma, 0.1, jnp.ones(2), jnp.arange(4))
        >>> exact = curvax.theory.moments(H, B, Sigma, jnp.full(3, 0.1), jnp.ones(2)).loss.total
        >>> bool(jnp.all((bounds.lower <= exact) & (exact <= bounds.upper)))
        True

    Source: Martens 2016, Theorem 6 and equation 5.22, corrected.
    """
    modes = modes_of(hessian, curvature, noise)
    rate = jnp.asarray(rate, modes.values.dtype)
    factors = jnp.abs(1 - rate * modes.values)
    least, most = (extreme(factors) ** (2 * jnp.asarray(step, rate.dtype)) for extreme in (jnp.min, jnp.max))
    floor, first = modes.noise_floor(rate), modes.start_loss(start)
    bounds = Bounds((1 - most) * floor + least * first, (1 - least) * floor + most * first)
    return Bounds(*(where_valid(modes.is_stable(rate), bound) for bound in bounds))


def drift_and_diffusion(hessian: Array, curvature: Array, noise: Array) -> tuple[Array, Array]:
    """K = B^{-1} H and B^{-1} Sigma B^{-1}."""
    # Not two solves side by side: under vmap LAPACK is batched, and jaxlib 0.10 can deadlock on batches at once.
    contraction, half = jnp.split(jnp.linalg.solve(curvature, jnp.hstack([hessian, noise])), 2, axis=1)
    return contraction, jnp.linalg.solve(curvature, half.T)


def moments_from(hessian: Array, mean: Array, covariance: Array) -> Moments:
    """The moments with the loss worked out, for means and covariances of any leading axes."""
    noise = jnp.einsum("ij,...ij->...", hessian, covariance) / 2
    start = jnp.einsum("ij,...i,...j->...", hessian, mean, mean) / 2
    return Moments(mean, covariance, ExpectedLoss(noise, start))


def with_first(first, rest):
    """What a scan returns, with what it began with in front."""
    return jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), first, rest)
