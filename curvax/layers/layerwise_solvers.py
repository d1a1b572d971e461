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
from curvax.layers.factors import damped_factors
from curvax.matrices.inverses import inverse_of
from curvax.types import Array, PyTree, Scalar


class LayerSystem(NamedTuple):
    """One layer: its curvature and its gradient, in orthonormal coordinates of the parameters.

    Attributes:
        curvature: H_t, (n_t, n_t).
        mean: m = E[h_{t-1}], (n_{t-1},).
        second: E[h_{t-1} h_{t-1}^T]; None where the solver does not read it.
        weights: The gradient V of the weights, (n_{t-1}, n_t).
        bias: That of the bias, (n_t,), or None.
        bias_size: What the input of the bias, a one, is squared in these coordinates.
    """

    curvature: Array
    mean: Array
    second: Array | None
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

    @property
    def reads_seconds(self) -> bool:
        """Whether it reads E[h h^T], and not E[h] alone."""
        return False

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
            rest = system.weights - direction[:, None] * along
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
            weights = c[0] / jnp.where(norm > 0, norm, 1) * rest + direction[:, None] * w[0]
            layers.append((weights, w[1] if len(w) > 1 else None))
        return Solution(layers, _most([result.iterations for result in found]))


@dataclasses.dataclass(frozen=True)
class KroneckerCG(LayerwiseSolver):
    """Conjugate gradients with E[h h^T] (x) H_t as it is (Chen et al. 2018, eqs. 10 and 11a)."""

    @property
    def reads_seconds(self) -> bool:
        return True

    def solve(self, systems: Sequence[LayerSystem], damped: Damped, limits: Limits) -> Solution:
        def on_weights(h, a, v):
            return cg(lambda x: damped.share * (a @ x @ h) + damped.damping * x, v, **limits._asdict())

        def on_bias(h, b):
            return cg(lambda x: damped.share * (h @ x) + damped.damping * x, b, **limits._asdict())

        found = _by_shape(on_weights, [(s.curvature, s.second, s.weights) for s in systems])
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

    @property
    def reads_seconds(self) -> bool:
        return self.inputs == "second"

    def solve(self, systems: Sequence[LayerSystem], damped: Damped, limits: Limits) -> Solution:
        del limits
        gamma = jnp.sqrt(damped.damping / damped.share)

        def weights(system):
            h, v = system.curvature[None], system.weights
            if self.reads_seconds:
                assert system.second is not None
                left, right = (inverse_of(x)[0] for x in damped_factors(system.second[None], h, gamma))
                return left @ v @ right / damped.share
            # Of a factor pi takes the mean eigenvalue alone, which of m m^T is |m|^2 / n.
            m, size = system.mean, jnp.sum(jnp.square(system.mean))
            mean = jnp.full((1, 1), size / len(m), m.dtype)
            shifted, right = damped_factors(mean, h, gamma)
            shift = (shifted - mean)[0, 0]
            return (v - m[:, None] * (m @ v) / (shift + size)) / (shift * damped.share) @ inverse_of(right)[0]

        layers = [
            (weights(s), None if s.bias is None else _solve_dense(s.bias_curvature, s.bias, damped)) for s in systems
        ]
        return Solution(layers, jnp.zeros((), jnp.int32))


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
