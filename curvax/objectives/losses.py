r"""Losses on the outputs of a model: value, curvature on the outputs, predictive distribution.

A loss is convex in the outputs z as far as possible, so the output non-linearity belongs to the loss and the model
returns natural parameters (logits, log rates, means): then the generalised Gauss-Newton matrix is the Fisher matrix
(Martens 2016, sections 4.4.2 and 5.4).

Outputs carry the examples on axis 0. ``value`` returns the loss without summing: its axes are leading axes of the
outputs, and ``curvax.Objective`` sums over all but the examples and takes the mean over those. Complex outputs, as of
wave functions, are taken by ``squared_error``, ``from_function``, and ``curvature_only`` of these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.objectives.loss import OutputLoss, check_array, check_targets, described
from curvax.objectives.output_matrix import AutodiffOutputs, DiagonalOutputs, RankOneOutputs, SoftmaxOutputs
from curvax.types import PyTree


class Elementwise(OutputLoss):
    """A loss on each entry of one array, with targets of that shape that its Hessian does not depend on."""

    natural = True
    floating_targets: bool = False

    def hessian(self, outputs, targets):
        return self.fisher(outputs)

    def check(self, outputs, targets):
        self.check_outputs(outputs)
        floating = self.floating_targets and not isinstance(outputs, trees.RealPair)
        check_targets(self, targets, outputs.shape, floating=floating)

    def check_outputs(self, outputs):
        check_array(self, outputs)

    def negative_log_density(self, outputs, targets):
        return self.value(outputs, targets)


@dataclasses.dataclass(frozen=True)
class SquaredError(Elementwise):
    r"""Half the squared error, L = 1/2 ||z - y||^2; y given z is N(z, I).

    The gradient is z - y and the Hessian I (the half is ours: some papers leave it out, which doubles both).
    Outputs and targets are floating-point arrays of one shape. Martens 2016, table 4.1. Complex outputs count by their
    real and imaginary parts, L = 1/2 |z - y|^2, whatever the targets are; then G is the real part of J^H J.

    Example:
        >>> loss = curvax.losses.squared_error()
        >>> loss.value(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]]))
        Array([[0.5, 2. ]], dtype=float...)
    """

    floating_targets = True
    takes_complex = True
    nonnegative = True

    def value(self, outputs, targets):
        if isinstance(outputs, trees.RealPair):
            real, imag = self.value(outputs.real, jnp.real(targets)), self.value(outputs.imag, jnp.imag(targets))
            return real + imag
        return (outputs - targets.astype(outputs.dtype)) ** 2 / 2

    def fisher(self, outputs, targets=None):
        return DiagonalOutputs(jax.tree.map(jnp.ones_like, outputs))

    def sample(self, key, output):
        if isinstance(output, trees.RealPair):
            return trees.join_complex(trees.add(output, trees.random_normal(key, output)))
        return output + jax.random.normal(key, output.shape, output.dtype)

    def negative_log_density(self, outputs, targets):
        return self.value(outputs, targets) + len(jax.tree.leaves(outputs)) * math.log(2 * math.pi) / 2

    def divergence(self, outputs, others, targets=None):
        return self.value(outputs, trees.join_complex(others))

    def squared_newton_decrement(self, outputs, targets):
        return 2 * self.value(outputs, targets)


@dataclasses.dataclass(frozen=True)
class SigmoidBinaryCrossEntropy(Elementwise):
    r"""Binary cross-entropy of logits z, L = log(1 + exp(z)) - y z; y given z is Bernoulli(sigmoid(z)).

    Targets have the shape of the outputs; bool, integer or probabilities. Hessian diag(p (1 - p)), p = sigmoid(z).
    Martens 2016, table 4.1.

    Example:
        >>> loss = curvax.losses.sigmoid_binary_cross_entropy()
        >>> loss.value(jnp.array([0.0]), jnp.array([1.0]))
        Array([0.6931...], dtype=float...)
    """

    nonnegative = True

    def value(self, outputs, targets):
        # Not softplus(z) - y z, in which a small loss cancels away.
        y = targets.astype(outputs.dtype)
        return y * jax.nn.softplus(-outputs) + (1 - y) * jax.nn.softplus(outputs)

    def fisher(self, outputs, targets=None):
        return DiagonalOutputs(jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs))

    def sample(self, key, output):
        return jax.random.bernoulli(key, jax.nn.sigmoid(output)).astype(output.dtype)

    def divergence(self, outputs, others, targets=None):
        log = jax.nn.log_sigmoid
        return _relative_entropy(log(outputs), log(others)) + _relative_entropy(log(-outputs), log(-others))

    def squared_newton_decrement(self, outputs, targets):
        # (p - y)^2 / (p (1 - p)) with the odds exp(z) of p, so that a saturated unit does not divide zero by zero.
        y = targets.astype(outputs.dtype)
        return (_times_exp(1 - y, outputs / 2) - _times_exp(y, -outputs / 2)) ** 2


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(OutputLoss):
    r"""Cross-entropy of logits z over the last axis, L = -sum_i y_i log p_i with p = softmax(z).

    Targets are integers with the shape of the outputs less the last axis, or floating-point probabilities with the
    shape of the outputs. Hessian a (diag(p) - p p^T), where a = sum_i y_i is 1 for probabilities. Martens 2016, table
    4.1.

    A case without a target, an integer outside 0 ... K-1 or probabilities that are all zero, contributes no loss, no
    Hessian and no Fisher matrix here. An objective makes the whole loss NaN of such an integer, so that steps are
    skipped and counted (outside of ``jit`` calling the objective raises), unless its ``mask`` leaves the case out or
    the integer is ``ignore_label``.

    Attributes:
        ignore_label: The integer that marks padding, such as -100: an objective leaves these cases out and N is the
            number of the others, as if its ``mask`` said so. None for none.

    Example:
        >>> loss = curvax.losses.softmax_cross_entropy()
        >>> loss.value(jnp.zeros((1, 4)), jnp.array([2]))
        Array([1.3862...], dtype=float...)
    """

    ignore_label: int | None = None
    natural = True
    nonnegative = True

    def ignored(self, targets):
        labelled = self.ignore_label is not None and _are_labels(targets)
        return _labels(targets) == self.ignore_label if labelled else None

    def impossible(self, outputs, targets):
        if not _are_labels(targets):
            return None
        labels = _labels(targets)
        return (labels < 0) | (labels >= outputs.shape[-1])

    def value(self, outputs, targets):
        y, log_p = self._distribution(outputs, targets), _log_softmax(outputs)
        excluded = (y == 0) & jnp.isneginf(log_p)
        return -jnp.sum(y * jnp.where(excluded, 0, log_p), axis=-1)

    def hessian(self, outputs, targets):
        if targets is None:
            return self.fisher(outputs)
        return SoftmaxOutputs(_log_softmax(outputs), jnp.sum(self._distribution(outputs, targets), axis=-1))

    def fisher(self, outputs, targets=None):
        has_target = jnp.ones_like(outputs[..., 0])
        if targets is not None:
            has_target = jnp.any(self._distribution(outputs, targets) > 0, axis=-1).astype(outputs.dtype)
        return SoftmaxOutputs(_log_softmax(outputs), has_target)

    def sample(self, key, output):
        return jax.random.categorical(key, output)

    def draw(self, keys, outputs, targets):
        drawn = super().draw(keys, outputs, targets)
        return drawn if targets is None else jnp.where(self.fisher(outputs, targets).mass > 0, drawn, -1)

    def negative_log_density(self, outputs, targets):
        return self.value(outputs, targets)

    def divergence(self, outputs, others, targets=None):
        entropies = jnp.sum(_relative_entropy(_log_softmax(outputs), _log_softmax(others)), axis=-1)
        return jnp.where(self.fisher(outputs, targets).mass > 0, entropies, 0)

    def squared_newton_decrement(self, outputs, targets):
        # sum_i (a p_i - y_i)^2 / (a p_i) with a the mass, in a form that neither cancels nor divides zero by zero.
        y, log_p = self._distribution(outputs, targets), _log_softmax(outputs)
        mass = jnp.sum(y, axis=-1)
        differences = mass[..., None] * jnp.exp(log_p / 2) - _times_exp(y, -log_p / 2)
        return jnp.sum(differences**2, axis=-1) / jnp.where(mass > 0, mass, 1)

    def check(self, outputs, targets):
        self.check_outputs(outputs)
        if _are_labels(targets):
            if targets.shape == outputs.shape:
                raise TypeError(
                    f"{self}: integer targets of the outputs' shape {outputs.shape} look one-hot; cast them to"
                    " floating point to use them as probabilities"
                )
            check_targets(self, targets, outputs.shape[:-1], "integer targets")
        else:
            if getattr(targets, "shape", None) == outputs.shape[:-1]:
                raise TypeError(
                    f"{self}: targets of shape {targets.shape}, one for each output of {outputs.shape[-1]} classes, are"
                    f" class labels and must be integers, got {targets.dtype}; write targets.astype(int)"
                )
            what = f"targets (integers of shape {outputs.shape[:-1]}, or else probabilities)"
            check_targets(self, targets, outputs.shape, what, floating=True)

    def check_outputs(self, outputs):
        check_array(self, outputs)
        if outputs.ndim < 2:
            raise ValueError(f"{self}: outputs need a last axis of classes, got shape {outputs.shape}")

    def _distribution(self, outputs, targets):
        if not _are_labels(targets):
            return targets.astype(outputs.dtype)
        labels = _labels(targets)
        # A comparison rather than a gather: it shards like the outputs do.
        return (labels[..., None] == _classes(outputs, labels.dtype)).astype(outputs.dtype)


@dataclasses.dataclass(frozen=True)
class Poisson(Elementwise):
    r"""Poisson negative log-likelihood of log rates z, L = exp(z) - y z; y given z is Poisson(exp(z)).

    Targets have the shape of the outputs; integer or floating-point counts. Hessian diag(exp(z)).

    Example:
        >>> curvax.losses.poisson().value(jnp.array([0.0]), jnp.array([3]))
        Array([1.], dtype=float...)
    """

    def value(self, outputs, targets):
        return jnp.exp(outputs) - targets.astype(outputs.dtype) * outputs

    def fisher(self, outputs, targets=None):
        return DiagonalOutputs(jnp.exp(outputs))

    def sample(self, key, output):
        return jax.random.poisson(key, jnp.exp(output)).astype(output.dtype)

    def divergence(self, outputs, others, targets=None):
        return _relative_entropy(outputs, others)

    def negative_log_density(self, outputs, targets):
        return self.value(outputs, targets) + jax.scipy.special.gammaln(targets.astype(outputs.dtype) + 1)

    def squared_newton_decrement(self, outputs, targets):
        # (exp(z) - y)^2 / exp(z)
        y = targets.astype(outputs.dtype)
        return (jnp.exp(outputs / 2) - _times_exp(y, -outputs / 2)) ** 2


def gaussian(curvature: Literal["fisher", "exact"] = "fisher") -> Gaussian:
    r"""Gaussian negative log-likelihood with learnt variance, L = 1/2 ((y - m)^2 exp(-s) + s) for outputs (m, s).

    The model returns the pair (mean, log variance), each of the shape of the targets. L is not convex in (m, s): its
    Hessian [[e^-s, r e^-s], [r e^-s, r^2 e^-s / 2]], r = y - m, has a negative eigenvalue wherever r is not 0. The
    Gauss-Newton matrix therefore uses the Fisher matrix diag(e^-s, 1/2), which is the expectation of that Hessian
    (Martens 2016, section 4.4.3, third option), unless told otherwise.

    Args:
        curvature: "fisher", or "exact" for the indefinite Hessian (products only: it has no square root).

    Raises:
        ValueError: ``curvature`` is neither.

    Example:
        >>> loss = curvax.losses.gaussian()
        >>> loss.value((jnp.array([0.0]), jnp.array([0.0])), jnp.array([2.0]))
        Array([2.], dtype=float...)
        >>> loss.curvature((jnp.array([0.0]), jnp.array([0.0])), jnp.array([2.0])).entries[1]
        Array([0.5], dtype=float...)
    """
    check_choice("curvature", curvature, ("fisher", "exact"))
    return Gaussian(exact=curvature == "exact")


@dataclasses.dataclass(frozen=True)
class Gaussian(OutputLoss):
    """What ``gaussian`` makes."""

    exact: bool = False
    convex = False

    def value(self, outputs, targets):
        mean, log_variance = outputs
        return (((targets.astype(mean.dtype) - mean) * jnp.exp(-log_variance / 2)) ** 2 + log_variance) / 2

    def hessian(self, outputs, targets):
        if targets is None:
            raise ValueError(f"{self}: the exact Hessian depends on the targets, and they are None")
        return super().hessian(outputs, targets)

    def curvature(self, outputs, targets):
        return self.hessian(outputs, targets) if self.exact else self.fisher(outputs)

    def fisher(self, outputs, targets=None):
        mean, log_variance = outputs
        entries = jnp.exp(-log_variance), jnp.full_like(mean, 0.5)
        return DiagonalOutputs(jax.tree.structure(outputs).unflatten(entries))

    def sample(self, key, output):
        mean, log_variance = output
        return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)

    def negative_log_density(self, outputs, targets):
        return self.value(outputs, targets) + math.log(2 * math.pi) / 2

    def divergence(self, outputs, others, targets=None):
        (mean, log_variance), (other_mean, other_log_variance) = outputs, others
        squares = ((mean - other_mean) * jnp.exp(-other_log_variance / 2)) ** 2
        return (_relative_entropy(jnp.zeros_like(mean), log_variance - other_log_variance) + squares) / 2

    def squared_newton_decrement(self, outputs, targets):
        mean, log_variance = outputs
        if self.exact:  # indefinite for r != 0; for r = 0 a slope along s without curvature
            return jnp.full_like(mean, jnp.inf)
        squares = _times_exp(targets.astype(mean.dtype) - mean, -log_variance / 2) ** 2
        return squares + (1 - squares) ** 2 / 2

    def check(self, outputs, targets):
        self.check_outputs(outputs)
        check_targets(self, targets, outputs[0].shape, floating=True)

    def check_outputs(self, outputs):
        pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
        if not (pair and all(hasattr(z, "shape") for z in outputs)):
            raise TypeError(f"{self}: the model must return the pair (mean, log variance), got {described(outputs)}")
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(f"{self}: mean {outputs[0].shape} and log variance {outputs[1].shape} differ in shape")


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
            return jnp.sum(_relative_entropy(*(jax.nn.log_softmax(log_measures(z)) for z in (output, other))))

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


@dataclasses.dataclass(frozen=True)
class CurvatureOnly(OutputLoss):
    r"""``loss`` without its value: for methods whose gradient comes from elsewhere (policy gradients, energies).

    The Gauss-Newton and Fisher products work as ever, and asking for the loss or its gradient is an error. Targets may
    be None where the curvature does not depend on them: the losses with ``natural`` set, ``gaussian()``, and every
    Fisher matrix; a loss ``from_function`` is then given None.

    Example:
        >>> loss = curvax.losses.curvature_only(curvax.losses.squared_error())
        >>> objective = curvax.Objective(lambda w, x: x @ w, loss)
        >>> F = curvax.fisher(objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), None)))
        >>> F.to_dense()
        Array([[0.5, 0. ],
               [0. , 0.5]], dtype=float...)
    """

    loss: OutputLoss
    has_value = False

    @property
    def convex(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.loss.convex

    @property
    def natural(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.loss.natural

    @property
    def takes_complex(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.loss.takes_complex

    def value(self, outputs, targets):
        raise ValueError(
            "this objective has curvature but no loss value (curvax.losses.curvature_only): take its gradient elsewhere"
            " and use objective.linearize(params, batch) as at="
        )

    squared_newton_decrement = value

    def hessian(self, outputs, targets):
        return self.loss.hessian(outputs, targets)

    def curvature(self, outputs, targets):
        return self.loss.curvature(outputs, targets)

    def fisher(self, outputs, targets=None):
        return self.loss.fisher(outputs, targets)

    def ignored(self, targets):
        return None if targets is None else self.loss.ignored(targets)

    def impossible(self, outputs, targets):
        return None if targets is None else self.loss.impossible(outputs, targets)

    def sample(self, key, output):
        return self.loss.sample(key, output)

    def draw(self, keys, outputs, targets):
        return self.loss.draw(keys, outputs, targets)

    def divergence(self, outputs, others, targets=None):
        return self.loss.divergence(outputs, others, targets)

    def draw_divergence(self, keys, outputs, others, targets):
        return self.loss.draw_divergence(keys, outputs, others, targets)

    def gradient(self, outputs, targets):
        # Monte-Carlo Fisher vectors are gradients at sampled targets, not of the missing value.
        return self.loss.gradient(outputs, targets)

    def check(self, outputs, targets):
        if targets is None:
            self.loss.check_outputs(outputs)
        else:
            self.loss.check(outputs, targets)


squared_error = SquaredError
sigmoid_binary_cross_entropy = SigmoidBinaryCrossEntropy
softmax_cross_entropy = SoftmaxCrossEntropy
poisson = Poisson
curvature_only = CurvatureOnly


def _are_labels(targets):
    return hasattr(targets, "dtype") and jnp.issubdtype(targets.dtype, jnp.integer)


def _labels(targets):
    """Class labels in a type that counts all classes, which small integers may not."""
    return jnp.asarray(targets if targets.dtype.itemsize >= 4 else targets.astype(jnp.int32))


def _log_softmax(logits):
    """The logarithm of softmax over the last axis.

    It and its derivatives have small relative errors even where a probability is close to 1, because the largest logit
    stays out of the sum.
    """
    index = jnp.argmax(logits, axis=-1, keepdims=True)
    is_largest = index == _classes(logits, index.dtype)
    largest = jnp.sum(jnp.where(is_largest, logits, 0), axis=-1, keepdims=True)
    shifted = jnp.where(is_largest, 0, logits - largest)
    others = jnp.sum(jnp.where(is_largest, 0, jnp.exp(shifted)), axis=-1, keepdims=True)
    return shifted - jnp.log1p(others)


def _relative_entropy(log_p, log_q):
    """q - p - p log(q / p), which is not negative and sums up to the divergence of p from q; accurate where they meet.

    For a Poisson distribution it is that of the rates, which need not sum to one.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    change = jnp.where(p > 0, log_q - log_p, 0)
    near = (p > 0) & (change < 1)
    return jnp.where(near, p * (jnp.expm1(jnp.where(near, change, 0)) - change), q - p - p * change)


def _classes(logits, dtype):
    """The number of each class on the last axis, with as many axes as the logits, so that no rank is promoted."""
    return jnp.arange(logits.shape[-1], dtype=dtype).reshape((1,) * (logits.ndim - 1) + (-1,))


def _times_exp(factor, exponent):
    """factor * exp(exponent), zero where the factor is zero even if the exponential overflows."""
    return factor * jnp.exp(jnp.where(factor == 0, 0, exponent))
