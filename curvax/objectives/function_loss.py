"""A loss from a plain function of one example's output and target, differentiated, and integrated where asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.objectives.loss import OutputLoss, described, relative_entropy
from curvax.objectives.output_matrix import AutodiffOutputs, RankOneOutputs
from curvax.types import PyTree


def from_function(
    function: Callable[[PyTree, PyTree], jax.Array],
    *,
    convex: bool,
    curvature: Literal["exact", "absolute", "clipped", "fisher"] = "exact",
    natural: bool = False,
    sample: Callable[[jax.Array, PyTree], PyTree] | None = None,
    support: Callable[[PyTree], tuple[PyTree, jax.Array]] | None = None,
) -> FunctionLoss:
    r"""A loss from a plain function of one example's output and target; its curvature comes from differentiation.

    Products with the Hessian cost one differentiation; square root and pseudo-inverse form the m x m Hessian of each
    example.

    If Z(z), the integral of exp(-L(y, z)) over y, is finite and does not depend on z, L is up to a constant the
    negative log-density of r(y|z) = exp(-L(y, z)) / Z. Then r has a Fisher matrix on the outputs, which is positive
    semi-definite also where the Hessian of L is not, and may take its place (Martens 2016, sections 5.1 and 5.4).
    ``support`` says how to integrate; ``log_normaliser(outputs)`` of the loss is log Z(z) for each example, for you to
    see whether it depends on z.

    Args:
        function: (output, target) -> L, the scalar loss of one example, twice differentiable in the output: in its
            real and imaginary part if the output is complex.
        convex: Whether L is convex in the output.
        curvature: The matrix that the Gauss-Newton products use for a non-convex loss: the Hessian as it is ("exact",
            indefinite), with its eigenvalues' absolute values, with the negative ones dropped ("clipped"), or the
            Fisher matrix in its place, for which ``support`` is needed.
        natural: Whether L is, up to a constant, the negative log-density of an exponential family with natural
            parameters z: then the Fisher matrix is the Hessian.
        sample: (key, output) -> target, a draw from the predictive distribution of one example; for the Monte-Carlo
            Fisher matrix.
        support: output -> (targets y_k, weights w_k), stacked on axis 0, with sum_k w_k f(y_k) for the integral of f
            over the targets of that example: all targets and ones if they can be listed, otherwise a quadrature rule
            that covers the distributions at this output and, for divergences, the other. It gives exact Fisher
            matrices, divergences, densities, and draws unless ``sample`` does.

    Raises:
        ValueError: ``curvature`` is none of the four, or "fisher" without ``support``, or ``natural`` is set for a
            non-convex loss.

    Example:
        >>> def pseudo_huber(z, y):
        ...     return jnp.sum(jnp.sqrt(1 + (z - y) ** 2) - 1)
        >>> loss = curvax.losses.from_function(pseudo_huber, convex=True)
        >>> loss.value(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
        Array([0., 0.], dtype=float...)

        Of the non-convex L = log(1 + (y - z)^2), r(y|z) is Cauchy's distribution, with 1/2 for Fisher matrix:

        >>> def line(z):                                      # y = z + tan(t), with t on the midpoints of (-pi/2, pi/2)
        ...     t = (jnp.arange(64.0) + 0.5) * jnp.pi / 64 - jnp.pi / 2
        ...     return z + jnp.tan(t), jnp.pi / 64 / jnp.cos(t) ** 2
        >>> loss = curvax.losses.from_function(
        ...     lambda z, y: jnp.log1p((y - z) ** 2), convex=False, curvature="fisher", support=line
        ... )
        >>> z, y, one = jnp.array([0.0, 1.0]), jnp.array([3.0, 0.5]), jnp.ones(2)
        >>> loss.log_normaliser(z), loss.hessian(z, y).product(one), loss.curvature(z, y).product(one)
        (Array([1.1447..., 1.1447...], dtype=float...), Array([-0.16,  0.96], dtype=float...),
         Array([0.5, 0.5], dtype=float...))
    """
    check_choice("curvature", curvature, ("exact", "absolute", "clipped", "fisher"))
    if natural and not convex:
        raise ValueError("natural=True needs convex=True: a negative log-density is convex in natural parameters")
    if curvature == "fisher" and support is None:
        raise ValueError("curvature='fisher' needs support=: the targets, and weights to integrate over them with")
    return FunctionLoss(function, convex, curvature, natural, sample, support)


@dataclasses.dataclass(frozen=True)
class FunctionLoss(OutputLoss):
    """What ``from_function`` makes."""

    function: Callable[[PyTree, PyTree], jax.Array]
    convex: bool
    treatment: str = "exact"
    natural: bool = False
    sampler: Callable[[jax.Array, PyTree], PyTree] | None = None
    support: Callable[[PyTree], tuple[PyTree, jax.Array]] | None = None
    takes_complex = True

    def value(self, outputs, targets):
        return jax.vmap(_OnComplex(self.function))(outputs, targets)

    def hessian(self, outputs, targets):
        return AutodiffOutputs(_OnComplex(self.function), outputs, targets, convex=self.convex)

    def curvature(self, outputs, targets):
        treatment = "exact" if self.convex else self.treatment
        if treatment == "fisher":
            return self.fisher(outputs)
        return dataclasses.replace(self.hessian(outputs, targets), treatment=treatment)

    def fisher(self, outputs, targets=None):
        if self.natural:
            return self.hessian(outputs, targets)
        if self.support is None:
            return super().fisher(outputs)

        def vectors(output):
            log_measures = self._log_measures(output)
            root = jnp.exp(jax.nn.log_softmax(log_measures(output)) / 2)
            scores = jax.jacfwd(lambda z: jax.nn.log_softmax(log_measures(z)))(output)
            return trees.scale_rows(math.sqrt(root.size) * root, scores)

        return RankOneOutputs(jax.vmap(vectors)(outputs))

    def sample(self, key, output):
        if self.sampler is not None:
            return self.sampler(key, trees.join_complex(output))
        if self.support is None:
            return super().sample(key, output)
        index = jax.random.categorical(key, self._log_measures(output)(output))
        return jax.tree.map(lambda y: y[index], self.support(trees.join_complex(output))[0])

    def log_normaliser(self, outputs: PyTree) -> jax.Array:
        """log Z(z) of each example: the same for all z if exp(-L) is a density up to a constant, as it is to be."""
        return jax.vmap(lambda z: jax.nn.logsumexp(self._log_measures(z)(z)))(outputs)

    def negative_log_density(self, outputs, targets):
        if self.support is None:
            return super().negative_log_density(outputs, targets)
        return self.value(outputs, targets) + self.log_normaliser(outputs)

    def divergence(self, outputs, others, targets=None):
        if self.support is None:
            return super().divergence(outputs, others)

        def one(output, other):
            log_measures = self._log_measures(output)
            return jnp.sum(relative_entropy(*(jax.nn.log_softmax(log_measures(z)) for z in (output, other))))

        return jax.vmap(one)(outputs, others)

    def _log_measures(self, output):
        """The function z -> log w_k - L(y_k, z) on the support of one output."""
        if self.support is None:
            raise ValueError(f"{self} does not know what to integrate over; make it with support=")
        targets, weights = self.support(jax.lax.stop_gradient(trees.join_complex(output)))
        function = _OnComplex(self.function)
        return lambda z: jnp.log(weights) - jax.vmap(lambda y: function(z, y))(targets)

    def check(self, outputs, targets):
        loss = jax.eval_shape(_OnComplex(self.function), *trees.example_structure((outputs, targets)))
        if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape:
            raise ValueError(
                f"{self}: function(output, target) must return one scalar for one example, got {described(loss)}"
            )
        if not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                f"{self}: function(output, target) must return a real floating-point number, got {loss.dtype}; take the"
                " real part of a complex one"
            )


@dataclasses.dataclass(frozen=True)
class _OnComplex:
    """A function of complex outputs as one of their real and imaginary parts; equal to that of an equal function."""

    function: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, output, target):
        return self.function(trees.join_complex(output), target)
