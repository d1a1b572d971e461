r"""Rates that fall as alpha_k = 1 / (k + 1): what the loss tends to, and what B = H gains over B proportional to I."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from curvax.theory.iteration import Bounds
from curvax.theory.modes import as_matrices, modes_of, where_valid
from curvax.types import Array


class Expansion(NamedTuple):
    """first / k + second / k^2."""

    first: Array
    second: Array


class RealisableBounds(NamedTuple):
    """Bounds by the whole spectrum, and the wider ones by its ends alone."""

    by_spectrum: Bounds
    by_condition_number: Bounds


def annealed_loss(hessian: Array, curvature: Array, noise: Array) -> Expansion:
    r"""c_1 and c_2 of E h(theta_k) - h(theta*) = c_1 / k + c_2 / k^2 + ... at rates 1 / (k + 1): Theorem 6, corrected.

        c_1 = 1/4 tr((I - 1/2 B^{1/2} H^{-1} B^{1/2})^{-1} B^{-1/2} Sigma B^{-1/2})
            = 1/2 tr((2 K - I)^{-1} K B^{-1} Sigma)
        c_2 = 1/4 tr((2 K - I)^{-1} (K - I) K B^{-1} Sigma)

    Valid for lambda_n(K) > 1/2. What follows is O(1 / k^3), and terms of order 1 / k^{2 lambda_i(K)} from the start and
    the first noise, so c_2 is the next to count where lambda_n(K) >= 1. With B = H they are 1/2 tr(H^{-1} Sigma) and 0;
    with B = H = Sigma, as of the Fisher matrix of a model that can be true, c_1 is n / 2, which no unbiased estimator
    betters (Amari 1998); with Sigma / m for batches of m examples.

    The c_2 of Martens 2016, -1/8 tr((I - 1/4 B^{1/2} H^{-1} B^{1/2})^{-1} B^{-1/2} Sigma B^{-1/2}), is wrong, at B = H
    for one, where it is -1/6 tr(H^{-1} Sigma). Its recursion lacks a term (see ``annealed_covariance``), and equation
    5.38, which puts H / 2 for H, has 1/4 and 1/4 H^{-1} where that makes 1/2 and H^{-1}. The upper bound of section
    5.7.3, c_1 / k + O(h_0 / k^2), is false as well, as c_2 is not negative for lambda_n(K) >= 1.

    Example:
        >>> curvax.theory.annealed_loss(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2), jnp.eye(2))
        Expansion(first=Array(0.7857..., dtype=float...), second=Array(0.4285..., dtype=float...))

    Source: Martens 2016, Theorem 6 and equation 5.37; the second coefficient corrected.
    """
    modes = modes_of(hessian, curvature, noise)
    k = modes.values
    weights = k * jnp.diag(modes.noise) / (2 * k - 1)
    coefficients = jnp.sum(weights) / 2, jnp.sum(weights * (k - 1)) / 4
    return Expansion(*(where_valid(k[0] > 0.5, coefficient) for coefficient in coefficients))


def annealed_covariance(hessian: Array, curvature: Array, noise: Array) -> Expansion:
    r"""C_1 and C_2 of V_k = C_1 / k + C_2 / k^2 + ... at rates 1 / (k + 1): Theorem 1, corrected.

        (Xi_K - I)(C_1) = B^{-1} Sigma B^{-1}                               Xi_K(X) = K X + X K^T
        (Xi_K - 2 I)(C_2) = -B^{-1} Sigma B^{-1} + K C_1 K^T

    C_1 is valid for lambda_n(K) > 1/2, C_2 for lambda_n(K) >= 1 (up to rounding), below which terms in
    k^{-lambda_i(K) - lambda_j(K)} come before it. With B = H, V_k is H^{-1} Sigma H^{-1} / k for every k >= 1; with
    B = H = Sigma = F that is Fisher efficiency, V_k = F^{-1} / k.

    Martens 2016 has lost K C_1 K^T (Theorem 1 and appendix A.1), as in its equation A.1.

    Example:
        >>> H = jnp.diag(jnp.array([4.0, 1.0]))
        >>> curvax.theory.annealed_covariance(H, H, H).first
        Array([[0.25, 0.  ],
               [0.  , 1.  ]], dtype=float...)

    Source: Martens 2016, Theorem 1, corrected; Murata 1998, Theorem 4; Amari 1998.
    """
    modes = modes_of(hessian, curvature, noise)
    smallest = modes.values[0]
    one, other = modes.values[:, None], modes.values[None]
    first = modes.noise / (one + other - 1)
    # (mu_i - 1)(mu_j - 1) / (mu_i + mu_j - 2) is at most the smaller factor, so 0 where both are; below it is rounding.
    one, other = jnp.maximum(one - 1, 0), jnp.maximum(other - 1, 0)
    second = first * one * other / jnp.where(one + other > 0, one + other, 1)
    tolerance = jnp.sqrt(jnp.finfo(smallest.dtype).eps)
    return Expansion(
        where_valid(smallest > 0.5, modes.matrix(first)), where_valid(smallest > 1 - tolerance, modes.matrix(second))
    )


def bordes_bounds(hessian: Array, curvature: Array, noise: Array) -> Bounds:
    r"""Bounds on c_1 = lim k (E h(theta_k) - h(theta*)) for rates 1 / (k + k_0); ``annealed_loss`` has its value.

        tau / (4 (lambda_1(K) - 1/2)) <= c_1 <= tau / (4 (lambda_n(K) - 1/2))        tau = tr(H B^{-1} Sigma B^{-1})

    Valid for lambda_n(K) > 1/2.

    Example:
        >>> curvax.theory.bordes_bounds(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2), jnp.eye(2))
        Bounds(lower=Array(0.3571..., dtype=float...), upper=Array(2.5, dtype=float...))

    Source: Bordes, Bottou and Gallinari 2009, Theorem 1; Martens 2016, section 5.7.4.
    """
    modes = modes_of(hessian, curvature, noise)
    trace, k = jnp.sum(modes.values * jnp.diag(modes.noise)), modes.values
    return Bounds(*(where_valid(k[0] > 0.5, trace / (4 * (value - 0.5))) for value in (k[-1], k[0])))


def newton_noise_bounds(hessian: Array, noise: Array) -> Bounds:
    r"""tr(Sigma) / (2 lambda_1(H)) <= c_1 <= tr(Sigma) / (2 lambda_n(H)) for B = H, where c_1 = 1/2 tr(H^{-1} Sigma).

    Example:
        >>> curvax.theory.newton_noise_bounds(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2))
        Bounds(lower=Array(0.25, dtype=float...), upper=Array(1., dtype=float...))

    Source: Martens 2016, section 5.7.3 and appendix A.2.
    """
    hessian, noise = as_matrices(hessian=hessian, noise=noise)
    values = jnp.linalg.eigvalsh(hessian)
    return Bounds(*(jnp.trace(noise) / (2 * value) for value in (values[-1], values[0])))


def gradient_noise_bounds(hessian: Array, noise: Array) -> Bounds:
    r"""tr(Sigma) / (4 lambda_n(H)) <= c_1 <= tr(Sigma) / (2 lambda_n(H)) for B = lambda_n(H) I.

    Of all B = beta I whose start-dependent term falls at least as 1 / k^2, as it does for B = H, this one has the
    smallest c_1. They are those with beta <= lambda_n(H), which Martens 2016 calls the lowest of them; it is the
    highest. The lower bound is kappa / 2 times that of ``newton_noise_bounds``, the upper the same: an ill-conditioned
    H is necessary for B = H to gain much, but not sufficient.

    Example:
        >>> curvax.theory.gradient_noise_bounds(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2))
        Bounds(lower=Array(0.5, dtype=float...), upper=Array(1., dtype=float...))

    Source: Martens 2016, section 5.7.3 and appendix A.2.
    """
    hessian, noise = as_matrices(hessian=hessian, noise=noise)
    least, trace = jnp.linalg.eigvalsh(hessian)[0], jnp.trace(noise)
    return Bounds(trace / (4 * least), trace / (2 * least))


def realisable_noise_bounds(hessian: Array) -> RealisableBounds:
    r"""Bounds on c_1 for B = lambda_n(H) I where Sigma = H, as of a model that can be true; B = H has n / 2 there.

        kappa / 4 <= 1/4 sum_i r_i <= c_1 = 1/4 sum_i r_i / (1 - 1 / (2 r_i)) <= 1/2 sum_i r_i <= n kappa / 2

    with r_i = lambda_i(H) / lambda_n(H) and kappa = r_1. Martens 2016 prints kappa / 2 at the end, which is false for
    any n >= 2: already at H = I the sum is n and kappa is 1.

    Example:
        >>> curvax.theory.realisable_noise_bounds(jnp.diag(jnp.array([4.0, 1.0]))).by_spectrum
        Bounds(lower=Array(1.25, dtype=float...), upper=Array(2.5, dtype=float...))

    Source: Martens 2016, section 5.7.3, the last bound corrected.
    """
    (hessian,) = as_matrices(hessian=hessian)
    values = jnp.linalg.eigvalsh(hessian)
    ratios, condition_number = jnp.sum(values) / values[0], values[-1] / values[0]
    return RealisableBounds(
        Bounds(ratios / 4, ratios / 2), Bounds(condition_number / 4, len(values) * condition_number / 2)
    )
