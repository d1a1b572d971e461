"""Averages of the iterates: their exact moments, what these tend to, and bounds for constant rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.theory.iteration import (
    ExpectedLoss,
    Moments,
    drift_and_diffusion,
    moments_from,
    with_first,
)
from curvax.theory.modes import Modes, as_matrices, modes_of, where_valid
from curvax.types import Array, Scalar


def averaged_moments(
    hessian: Array, curvature: Array, noise: Array, rates: Array, start: Array, *, shares: Array | None = None
) -> Moments:
    r"""The exact moments of averages of the iterates, under any rates and of any kind of average.

    The average is tbar_0 = theta_0, tbar_{k+1} = w_k theta_{k+1} + (1 - w_k) tbar_k. Along with V_k the covariances
    C_k = cov(theta_k, tbar_k) and D_k = cov(tbar_k) are carried on, with M = I - alpha_k K:

        C_{k+1} = (1 - w_k) M C_k + w_k V_{k+1}
        D_{k+1} = (1 - w_k)^2 D_k + w_k (1 - w_k) (M C_k + (M C_k)^T) + w_k^2 V_{k+1}

    For the uniform average, tbar_k = sum_i theta_i / (k + 1), it is the sum over i, j <= k of cov(theta_i, theta_j),
    which is V_i ((I - alpha K)^{j-i})^T for j >= i, over (k + 1)^2. Two displays of the proof in Martens 2016, appendix
    A.3, have lost this division, and the second a transpose.

    ``curvax.average_iterates`` has the same averages. The forgetful one has w_{k-1} = 1 - beta_k, with
    beta_k = min(1 - 1/k, beta_max); section 5.7.6 of Martens 2016 prints (1 - beta_k) theta_k + beta_{k-1} tbar_k, by
    which an average of equal iterates is another number.

    Args:
        rates: (K,).
        shares: w_0 ... w_{K-1}, (K,), the share of the new iterate: 1 / (k + 2), the uniform average, by default; for
            the forgetful one ``jnp.maximum(1 / jnp.arange(1, K + 1), 1 - beta_max)``, for the exponential one 1 - xi.

    Returns:
        The moments of tbar_0 ... tbar_K along axis 0.

    Example:
        >>> H = B = Sigma = jnp.eye(2)
        >>> average = curvax.theory.averaged_moments(H, B, Sigma, jnp.full(400, 0.5), jnp.ones(2)).loss
        >>> print(f"{401 * average.noise[-1]:.2f}")                               # 1/2 tr(H^{-1} Sigma)
        0.99

    Source: Martens 2016, section 5.7.6 and appendix A.3, corrected.
    """
    hessian, curvature, noise = as_matrices(hessian=hessian, curvature=curvature, noise=noise)
    dtype = hessian.dtype
    rates = jnp.asarray(rates, dtype)
    shares = 1 / jnp.arange(2, len(rates) + 2, dtype=dtype) if shares is None else jnp.asarray(shares, dtype)
    start, eye = jnp.asarray(start, dtype), jnp.eye(len(hessian), dtype=dtype)
    zero = jnp.zeros_like(eye)
    with jax.default_matmul_precision("highest"):
        contraction, injected = drift_and_diffusion(hessian, curvature, noise)

        def step(carry, rate_and_share):
            (mean, covariance, across), (average, spread) = carry
            rate, share = rate_and_share
            kept = eye - rate * contraction
            mean, covariance = kept @ mean, kept @ covariance @ kept.T + rate**2 * injected
            across = kept @ across
            average = share * mean + (1 - share) * average
            spread = (1 - share) ** 2 * spread + share * (1 - share) * (across + across.T) + share**2 * covariance
            across = (1 - share) * across + share * covariance
            return ((mean, covariance, across), (average, spread)), (average, spread)

        _, rest = jax.lax.scan(step, ((start, zero, zero), (start, zero)), (rates, shares))
        return moments_from(hessian, *with_first((start, zero), rest))


def averaged_covariance_limit(hessian: Array, noise: Array, step: Scalar) -> Array:
    r"""H^{-1} Sigma H^{-1} / (k + 1), the covariance of the uniform average for large k, whatever B and the rate are.

    Valid to o(1 / k) for constant rates with 0 < alpha lambda_1(K) < 2, and for rates that fall slower than 1 / k.

    Martens 2016, section 5.7.8, prints H^{-1/2} Sigma H^{-1/2}, and theta_k for its average.

    Args:
        step: k.

    Example:
        >>> curvax.theory.averaged_covariance_limit(2 * jnp.eye(1), jnp.eye(1), 4)
        Array([[0.05]], dtype=float...)

    Source: Polyak and Juditsky 1992.
    """
    hessian, noise = as_matrices(hessian=hessian, noise=noise)
    half = jnp.linalg.solve(hessian, noise)
    return jnp.linalg.solve(hessian, half.T) / (jnp.asarray(step, hessian.dtype) + 1)


def averaged_loss_limit(
    hessian: Array, curvature: Array, noise: Array, rate: Scalar, start: Array, step: Scalar
) -> ExpectedLoss:
    r"""What E h - h(theta*) of the uniform average tends to under a constant rate.

        tr(H^{-1} Sigma) / (2 (k + 1)) + ||H^{-1/2} B (theta_0 - theta*)||^2 / (2 (k + 1)^2 alpha^2)

    Valid for 0 < alpha lambda_1(K) < 2 and k -> infinity, where each part is what it tends to. B is in the second
    alone: with averaging, second order helps the term of the start and not the noise.

    Martens 2016, section 5.7.8, prints both parts without the half, for B = I after Defossez and Bach, and the first
    after Polyak and Juditsky: twice the value of h = 1/2 (theta - theta*)^T H (theta - theta*).

    Args:
        step: k, a number or an array of them.

    Example:
        >>> H = jnp.diag(jnp.array([4.0, 1.0]))
        >>> curvax.theory.averaged_loss_limit(H, H, H, 0.5, jnp.ones(2), 99)
        ExpectedLoss(noise=Array(0.01, dtype=float...), start=Array(0.001, dtype=float...))

    Source: Polyak and Juditsky 1992; Defossez and Bach 2014; with the halves of Martens 2016, equation 5.13.
    """
    modes, rate, count = _averaging(hessian, curvature, noise, rate, step)
    x = modes.coordinates(start)
    noise_part = jnp.sum(jnp.diag(modes.noise) / modes.values) / (2 * count)
    start_part = jnp.sum(x**2 / modes.values) / (2 * (count * rate) ** 2)
    valid = modes.is_stable(rate)
    return ExpectedLoss(where_valid(valid, noise_part), where_valid(valid, start_part))


def averaged_loss_bound(
    hessian: Array, curvature: Array, noise: Array, rate: Scalar, start: Array, step: Scalar
) -> ExpectedLoss:
    r"""Theorem 8: an upper bound on E h - h(theta*) of the uniform average under a constant rate.

        min{tr(H^{-1} Sigma) / (k + 1), (alpha / 2) tr(B^{-1} Sigma)}
        + min{||H^{-1/2} B d||^2 / ((k + 1)^2 alpha^2), ||B^{1/2} d||^2 / ((k + 1) alpha), 3 h_0}

    with d = theta_0 - theta*. Valid for 0 < alpha lambda_1(K) <= 1; Martens 2016 proves it up to 1/2.

    It is true as printed, and loose: see ``sharp_averaged_loss_bound``. What section 5.7.7 makes of it for B = I at the
    largest rate, lambda_1(H)^2 ||H^{-1/2} d||^2 / (k + 1)^2 for the start, has lost a factor of 4, as that rate is
    1 / (2 lambda_1(H)), and is false: for large k the loss is twice that.

    Args:
        step: k, a number or an array of them.

    Returns:
        Bounds on the two parts of the loss; their sum is in ``total``.

    Example:
        >>> H = B = Sigma = jnp.eye(2)
        >>> bound = curvax.theory.averaged_loss_bound(H, B, Sigma, 0.25, jnp.ones(2), 400).total
        >>> exact = curvax.theory.averaged_moments(H, B, Sigma, jnp.full(400, 0.25), jnp.ones(2)).loss.total[-1]
        >>> bool(2 * exact < bound)
        True

    Source: Martens 2016, Theorem 8.
    """
    modes, rate, count = _averaging(hessian, curvature, noise, rate, step)
    trace = rate / 2 * jnp.sum(jnp.diag(modes.noise))
    return _bound(modes, rate, count, trace, start, factor=2, at_start=3)


def sharp_averaged_loss_bound(
    hessian: Array, curvature: Array, noise: Array, rate: Scalar, start: Array, step: Scalar
) -> ExpectedLoss:
    r"""Theorem 8 without what its proof counts twice: an upper bound that large k attain.

        min{tr(H^{-1} Sigma) / (2 (k + 1)), T}
        + min{||H^{-1/2} B d||^2 / (2 (k + 1)^2 alpha^2), ||B^{1/2} d||^2 / (2 (k + 1) alpha), h_0}

    with d = theta_0 - theta* and T of ``stationary_loss``. Valid for 0 < alpha lambda_1(K) <= 1.

    The noise of one step reaches the average as a multiple of sum_j alpha (I - alpha K)^j, at most K^{-1}, over k + 1,
    and there are k such steps. So the first of each are ``averaged_loss_limit``, which is approached from below.

    Args:
        step: k, a number or an array of them.

    Returns:
        Bounds on the two parts of the loss; their sum is in ``total``.

    Example:
        >>> H = B = Sigma = jnp.eye(2)
        >>> bound = curvax.theory.sharp_averaged_loss_bound(H, B, Sigma, 0.25, jnp.ones(2), 400).total
        >>> exact = curvax.theory.averaged_moments(H, B, Sigma, jnp.full(400, 0.25), jnp.ones(2)).loss.total[-1]
        >>> bool(exact < bound < 1.03 * exact)
        True

    Source: Martens 2016, appendix A.3, with equations A.4, A.9 and A.11 corrected.
    """
    modes, rate, count = _averaging(hessian, curvature, noise, rate, step)
    return _bound(modes, rate, count, modes.noise_floor(rate), start, factor=1, at_start=1)


def flammarion_bach_bound(hessian: Array, noise: Array, rate: Scalar, start: Array, step: Scalar) -> ExpectedLoss:
    r"""4 alpha tr(Sigma) + ||theta_0 - theta*||^2 / ((k + 1) alpha), an upper bound for the uniform average with B = I.

    Valid for 0 < alpha lambda_1(H) <= 1. Its first part does not fall with k; ``averaged_loss_bound`` does.

    Args:
        step: k, a number or an array of them.

    Example:
        >>> curvax.theory.flammarion_bach_bound(jnp.eye(2), jnp.eye(2), 0.25, jnp.ones(2), 99)
        ExpectedLoss(noise=Array(2., dtype=float...), start=Array(0.08, dtype=float...))

    Source: Flammarion and Bach 2015, Theorem 3; Martens 2016, section 5.7.8.
    """
    hessian, noise = as_matrices(hessian=hessian, noise=noise)
    rate, count = jnp.asarray(rate, hessian.dtype), jnp.asarray(step, hessian.dtype) + 1
    start = jnp.asarray(start, hessian.dtype)
    valid = _never_overshoots(rate, jnp.linalg.eigvalsh(hessian)[-1])
    noise_part, start_part = 4 * rate * jnp.trace(noise), jnp.sum(start**2) / (count * rate)
    return ExpectedLoss(where_valid(valid, noise_part), where_valid(valid, start_part))


def _averaging(hessian, curvature, noise, rate, step) -> tuple[Modes, Array, Array]:
    """The modes, alpha and k + 1, in one dtype."""
    modes = modes_of(hessian, curvature, noise)
    dtype = modes.values.dtype
    return modes, jnp.asarray(rate, dtype), jnp.asarray(step, dtype) + 1


def _bound(modes: Modes, rate: Array, count: Array, stationary: Array, start: Array, *, factor: int, at_start: int):
    x = modes.coordinates(start)
    noise = jnp.minimum(factor * jnp.sum(jnp.diag(modes.noise) / modes.values) / (2 * count), stationary)
    parts = (
        factor * jnp.sum(x**2 / modes.values) / (2 * (count * rate) ** 2),
        factor * jnp.sum(x**2) / (2 * count * rate),
        at_start * modes.start_loss(start),
    )
    smallest = jnp.minimum(jnp.minimum(parts[0], parts[1]), parts[2])
    valid = _never_overshoots(rate, modes.values[-1])
    return ExpectedLoss(where_valid(valid, noise), where_valid(valid, smallest))


def _never_overshoots(rate: Array, largest: Array) -> Array:
    """0 < alpha lambda_1 <= 1, up to rounding, which else decides where alpha was chosen as 1 / lambda_1."""
    return (rate > 0) & (rate * largest <= 1 + jnp.sqrt(jnp.finfo(rate.dtype).eps))
