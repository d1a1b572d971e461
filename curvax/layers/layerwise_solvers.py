r"""Solves with layer-wise curvature: for each layer ((1 - alpha) E[h h^T] (x) H_t + damping I) x = g, and for its bias.

EA-CG puts the rank-one matrix m m^T, m = E[h], in the place of E[h h^T]. Then the gradient V of a layer's weights falls
into a part along m and the rest, on which the matrix is ``damping`` alone. In the orthonormal coordinates (c, w) of
V = c V_rest / |V_rest| + m w^T / |m| it is

    (c, w)  ->  (damping c,  ((1 - alpha) |m|^2 H_t + damping I) w),

so that conjugate gradients on n_t + 1 numbers give, iterate by iterate, what they give on the n_{t-1} n_t of V.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from curvax.checks import check_choice
from curvax.krylov.conjugate_gradient import cg
from curvax.layers.factor_damping import damped_factors
from curvax.matrices.inverses import inverse_of
from curvax.types import Array, PyTree, Scalar


class LayerSystem(NamedTuple):
    """One layer: its curvature and its gradient, in orthonormal coordinates of the parameters.

    Attributes:
        curvature: H_t, (n_t, n_t).
        mean: m = E[h_{t-1}], (n_{t-1},).
        rows: R with E[h_{t-1} h_{t-1}^T] = R^T R, (examples, n_{t-1}).
        weights: The gradient V of the weights, (n_{t-1}, n_t).
        bias: That of the bias, (n_t,), or None.
        bias_size: What the input of the bias, a one, is squared in these coordinates.
    """

    curvature: Array
    mean: Array
    rows: Array
    weights: Array
    bias: Array | None
    bias_size: Array

    @property
    def bias_curvature(self) -> Array:
        """The block of the bias."""
        return self.bias_size * self.curvature


class Damped(NamedTuple):
    """The matrix (1 - alpha) C + damping I.

    Attributes:
        share: 1 - alpha.
    """

    share: Array
    damping: Array


class Limits(NamedTuple):
    """When conjugate gradients stop: after so many iterations, or where |r| <= tolerance |g| on each block."""

    max_iterations: Scalar
    tolerance: Scalar


class Solution(NamedTuple):
    """What a solver returns.

    Attributes:
        layers: For each layer x of its weights and of its bias, None where it has none.
        iterations: The most that any block took; 0 for direct solvers.
    """

    layers: list[tuple[Array, Array | None]]
    iterations: Array


class LayerwiseSolver(abc.ABC):
    """How the systems of all layers are solved: a value, as it holds choices alone."""

    @abc.abstractmethod
    def solve(self, systems: Sequence[LayerSystem], damped: Damped, limits: Limits) -> Solution:
        """The solutions for the gradients of all weights and biases."""


@dataclasses.dataclass(frozen=True)
class EACG(LayerwiseSolver):
    """EA-CG: conjugate gradients with E[h] E[h]^T in the place of E[h h^T] (Chen et al. 2018, eqs. 10 and 11b).

    Along directions that are orthogonal to E[h] the weights have no curvature: there the step is g / damping.
    """

    def solve(self, systems: Sequence[LayerSystem], damped: Damped, limits: Limits) -> Solution:
        def solve(h, c, w, size):
            """The sides of a layer at once, weights and bias."""

            def side(size, *g):
                def matvec(v):
                    c, w = v
                    return damped.damping * c, damped.share * size * (h @ w) + damped.damping * w

                return cg(matvec, g, **limits._asdict())

            return jax.vmap(side)(size, c, w)

        directions, rests, small = [], [], []
        for system in systems:
            length = jnp.linalg.norm(system.mean)
            direction = system.mean / jnp.where(length > 0, length, 1)
            along = direction @ system.weights
            rest = system.weights - direction[:, None] * along[None]
            sides = [(jnp.linalg.norm(rest), along, jnp.square(length))]
            if system.bias is not None:
                sides.append((jnp.zeros_like(length), system.bias, system.bias_size))
            small.append((system.curvature, *(jnp.stack(part) for part in zip(*sides, strict=True))))
            directions.append(direction)
            rests.append(rest)
        found = _by_shape(solve, small)
        layers = []
        for result, direction, rest, (_, lengths, *_) in zip(found, directions, rests, small, strict=True):
            c, w = result.value
            norm = lengths[0]
            weights = c[0] / jnp.where(norm > 0, norm, 1) * rest + direction[:, None] * w[0][None]
            layers.append((weights, w[1] if len(w) > 1 else None))
        return Solution(layers, _most([result.iterations for result in found]))


@dataclasses.dataclass(frozen=True)
class KroneckerCG(LayerwiseSolver):
    """Conjugate gradients with E[h h^T] (x) H_t as it is (Chen et al. 2018, eqs. 10 and 11a).

    Products with E[h h^T] go by the examples where these are few.
    """

    def solve(self, systems: Sequence[LayerSystem], damped: Damped, limits: Limits) -> Solution:
        def on_weights(h, rows, v):
            few = 2 * len(rows) < rows.shape[1]
            second = None if few else rows.T @ rows

            def matvec(x):
                left = rows.T @ (rows @ x) if second is None else second @ x
                return damped.share * (left @ h) + damped.damping * x

            return cg(matvec, v, **limits._asdict())

        def on_bias(h, b):
            return cg(lambda x: damped.share * (h @ x) + damped.damping * x, b, **limits._asdict())

        found = _by_shape(on_weights, [(s.curvature, s.rows, s.weights) for s in systems])
        shifted = [s for s in systems if s.bias is not None]
        shifts = _by_shape(on_bias, [(s.bias_curvature, s.bias) for s in shifted])
        iterations = _most([result.iterations for result in (*found, *shifts)])
        rest = iter(shifts)
        layers = [
            (result.value, None if system.bias is None else next(rest).value)
            for result, system in zip(found, systems, strict=True)
        ]
        return Solution(layers, iterations)


@dataclasses.dataclass(frozen=True)
class KFI(LayerwiseSolver):
    r"""Kronecker-factored inverses, x = (A + pi gamma I)^{-1} V (H_t + gamma / pi I)^{-1} / (1 - alpha).

    As K-FAC and KFRA have them (Chen et al. 2018, eq. 12); pi as in ``damped_factors``, and gamma^2 = alpha / (1 -
    alpha), so that the system is that of the other solvers for large alpha too, where the paper has gamma^2 = alpha and
    no factor in front. Biases are solved for exactly.

    Attributes:
        inputs: A: "second" for E[h h^T], or "rank_one" for E[h] E[h]^T, by the formula of Sherman and Morrison (eq.
            13), for inputs so many that E[h h^T] does not fit. The paper finds it unstable in general.
    """

    inputs: Literal["second", "rank_one"] = "second"

    def __post_init__(self):
        check_choice("inputs", self.inputs, ("second", "rank_one"))

    def solve(self, systems: Sequence[LayerSystem], damped: Damped, limits: Limits) -> Solution:
        del limits
        gamma = jnp.sqrt(damped.damping / damped.share)

        def weights(system):
            rows, v = system.mean[None] if self.inputs == "rank_one" else system.rows, system.weights
            # Of a factor pi takes the mean eigenvalue alone, which of R^T R is |R|^2 / n.
            mean = jnp.full((1, 1), jnp.sum(jnp.square(rows)) / rows.shape[1], rows.dtype)
            shifted, right = damped_factors(mean, system.curvature[None], gamma)
            left = _solve_with_rows(rows, (shifted - mean)[0, 0], v)
            return left @ inverse_of(right)[0] / damped.share

        layers = [
            (weights(s), None if s.bias is None else _solve_dense(s.bias_curvature, s.bias, damped)) for s in systems
        ]
        return Solution(layers, jnp.zeros((), jnp.int32))


def _solve_with_rows(rows, shift, v):
    """(R^T R + c I)^{-1} V, by the smaller of R^T R and R R^T (Woodbury 1950)."""
    count, size = rows.shape
    if count < size:
        small = rows @ rows.T + shift * jnp.eye(count, dtype=rows.dtype)
        return (v - rows.T @ (inverse_of(small[None])[0] @ (rows @ v))) / shift
    return inverse_of((rows.T @ rows + shift * jnp.eye(size, dtype=rows.dtype))[None])[0] @ v


def _solve_dense(h, b, damped):
    matrix = damped.share * h + damped.damping * jnp.eye(len(h), dtype=h.dtype)
    return inverse_of(matrix[None])[0] @ b


def _by_shape(function: Callable[..., PyTree], systems: Sequence[tuple[Any, ...]]) -> list[Any]:
    """``function`` of each system, those of equal shapes in one batch."""
    groups: dict[Any, list[int]] = {}
    for place, system in enumerate(systems):
        groups.setdefault(tuple(part.shape for part in system), []).append(place)
    results: list[Any] = [None] * len(systems)
    for places in groups.values():
        if len(places) == 1:  # without a batch axis, which makes products slow on CPUs
            results[places[0]] = function(*systems[places[0]])
            continue
        stacked = [jnp.stack(parts) for parts in zip(*(systems[place] for place in places), strict=True)]
        found = jax.vmap(function)(*stacked)
        for index, place in enumerate(places):
            results[place] = jax.tree.map(lambda leaf, i=index: leaf[i], found)
    return results


def _most(iterations):
    return jnp.max(jnp.concatenate([jnp.ravel(count) for count in iterations])).astype(jnp.int32)
