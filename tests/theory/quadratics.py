"""Random quadratics with gradient noise, and what happens on them worked out densely in numpy, step by step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problems(NamedTuple):
    """Stacks of H, B, Sigma and theta_0 - theta*, and of the extreme eigenvalues of K = B^{-1} H."""

    hessian: np.ndarray
    curvature: np.ndarray
    noise: np.ndarray
    start: np.ndarray
    largest: np.ndarray
    smallest: np.ndarray

    @property
    def matrices(self):
        return self.hessian, self.curvature, self.noise


def random_problems(count: int, n: int, seed: int, *, decades: float = 1.5) -> Problems:
    """Independent H and B over some decades, Sigma of any rank, h_0 from nothing to a hundred times the noise."""
    draw = np.random.default_rng(seed)
    hessian, curvature = (definite(draw, count, n, decades) for _ in range(2))
    root = draw.normal(size=(count, n, n)) * (np.arange(n) < draw.integers(1, n + 1, (count, 1, 1)))
    start = draw.normal(size=(count, n)) * 10 ** draw.uniform(-2, 1, (count, 1))
    start[draw.random(count) < 0.1] = 0
    return with_spectrum(hessian, curvature, root @ transposed(root), start)


def with_spectrum(hessian, curvature, noise, start) -> Problems:
    values = np.sort(np.linalg.eigvals(np.linalg.solve(curvature, hessian)).real, axis=-1)
    return Problems(hessian, curvature, noise, start, values[..., -1], values[..., 0])


def definite(draw, count, n, decades):
    vectors = np.linalg.qr(draw.normal(size=(count, n, n)))[0]
    return (vectors * 10 ** draw.uniform(-decades, decades, (count, 1, n)) / 10**decades) @ transposed(vectors)


def transposed(x):
    return np.swapaxes(x, -1, -2)


def trace(x):
    return np.trace(x, axis1=-2, axis2=-1)


def sqrtm(x):
    values, vectors = np.linalg.eigh(x)
    return (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ transposed(vectors)


def first_loss(problems):
    return quadratic(problems.hessian, problems.start)


def quadratic(hessian, vectors):
    """h of stacks of vectors."""
    return np.einsum("...ij,...i,...j->...", hessian, vectors, vectors) / 2


class Step(NamedTuple):
    """m_k, V_k and the two parts of the loss, each a stack over problems."""

    mean: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    start: np.ndarray

    @property
    def total(self):
        return self.noise + self.start


def recursion(problems: Problems, rates, covariance=None):
    """The steps k = 0 ... K; ``rates`` is (K,) or (K, problems)."""
    hessian, curvature, noise = problems.matrices
    contraction = np.linalg.solve(curvature, hessian)
    inverse = np.linalg.inv(curvature)
    injected = inverse @ noise @ inverse
    mean, covariance = problems.start, np.zeros_like(hessian) if covariance is None else covariance
    for rate in [None, *rates]:
        if rate is not None:
            rate = np.broadcast_to(rate, mean.shape[:-1])[..., None]
            kept = np.eye(hessian.shape[-1]) - rate[..., None] * contraction
            mean = np.einsum("...ij,...j->...i", kept, mean)
            covariance = kept @ covariance @ transposed(kept) + rate[..., None] ** 2 * injected
        yield Step(mean, covariance, trace(hessian @ covariance) / 2, quadratic(hessian, mean))


def averaged(problems: Problems, rate, steps: int):
    """tbar_0 ... tbar_k under a constant rate, by the sums over what each step's noise and the start become in it.

    theta_k - theta* = M^k d - alpha sum_i M^{k-1-i} B^{-1} noise_i, M = I - alpha K, and the noises are independent.
    """
    hessian, curvature, noise = problems.matrices
    n = hessian.shape[-1]
    rate = np.broadcast_to(rate, hessian.shape[:-2])[..., None, None]
    kept = np.eye(n) - rate * np.linalg.solve(curvature, hessian)
    injected = rate * np.linalg.inv(curvature)
    power, geometric, squares = np.broadcast_to(np.eye(n), kept.shape), np.zeros_like(kept), np.zeros_like(hessian)
    for k in range(steps + 1):
        # geometric is M^0 + ... + M^{k-1}: what the noise of step i gets in the sum of theta_0 ... theta_{i+k}.
        through = geometric @ injected
        squares = squares + through @ noise @ transposed(through)
        geometric, power = geometric + power, power @ kept
        mean = np.einsum("...ij,...j->...i", geometric, problems.start) / (k + 1)
        covariance = squares / (k + 1) ** 2
        yield Step(mean, covariance, trace(hessian @ covariance) / 2, quadratic(hessian, mean))


def runs(key, problem: Problems, rates, count: int):
    """theta_0 ... theta_K of many runs with noise that is not normal, (count, K + 1, n)."""
    contraction = np.linalg.solve(problem.curvature, problem.hessian)
    root = np.linalg.solve(problem.curvature, sqrtm(problem.noise))

    def run(key):
        noises = jnp.sqrt(12.0) * (jax.random.uniform(key, (len(rates), len(problem.start))) - 0.5)

        def step(theta, rate_and_noise):
            rate, noise = rate_and_noise
            new = theta - rate * (contraction @ theta + root @ noise)
            return new, new

        _, rest = jax.lax.scan(step, jnp.asarray(problem.start), (jnp.asarray(rates), noises))
        return jnp.concatenate([jnp.asarray(problem.start)[None], rest])

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(key, count)))


def check_moments(samples, hessian, moments, deviations: float = 5.0):
    """Mean, covariance and loss of samples (count, K + 1, n) are within so many standard errors of the exact ones."""
    count = len(samples)
    mean, covariance = np.mean(samples, axis=0), np.asarray(moments.covariance)
    variances = np.diagonal(covariance, axis1=-2, axis2=-1)
    rounding = 1e-12 * np.max(np.abs(samples))
    assert np.all(np.abs(mean - moments.mean) <= deviations * np.sqrt(variances / count) + rounding)
    centred = samples - np.asarray(moments.mean)
    products = np.einsum("ski,skj->kij", centred, centred) / count
    errors = np.sqrt((variances[:, :, None] * variances[:, None] + covariance**2) / count)
    assert np.all(np.abs(products - covariance) <= deviations * errors + rounding)
    losses = quadratic(hessian, samples)
    error = np.std(losses, axis=0) / np.sqrt(count)
    assert np.all(np.abs(np.mean(losses, axis=0) - moments.loss.total) <= deviations * error + rounding)
