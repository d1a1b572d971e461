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
from typing import Literal

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.checks import check_choice
from curvax.objectives.function_loss import FunctionLoss as FunctionLoss
from curvax.objectives.function_loss import from_function as from_function
from curvax.objectives.loss import OutputLoss, check_array, check_targets, described, relative_entropy, times_exp
from curvax.objectives.output_matrix import DiagonalOutputs
from curvax.objectives.robust import geman_mcclure as geman_mcclure
from curvax.objectives.robust import tukey_biweight as tukey_biweight
from curvax.objectives.robust import welsch as welsch
from curvax.objectives.softmax import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from curvax.objectives.softmax import bounded_softmax as bounded_softmax
from curvax.objectives.softmax import softmax_cross_entropy as softmax_cross_entropy


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
        return relative_entropy(log(outputs), log(others)) + relative_entropy(log(-outputs), log(-others))

    def squared_newton_decrement(self, outputs, targets):
        # (p - y)^2 / (p (1 - p)) with the odds exp(z) of p, so that a saturated unit does not divide zero by zero.
        y = targets.astype(outputs.dtype)
        return (times_exp(1 - y, outputs / 2) - times_exp(y, -outputs / 2)) ** 2


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
        return relative_entropy(outputs, others)

    def negative_log_density(self, outputs, targets):
        return self.value(outputs, targets) + jax.scipy.special.gammaln(targets.astype(outputs.dtype) + 1)

    def squared_newton_decrement(self, outputs, targets):
        # (exp(z) - y)^2 / exp(z)
        y = targets.astype(outputs.dtype)
        return (jnp.exp(outputs / 2) - times_exp(y, -outputs / 2)) ** 2


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
        return (relative_entropy(jnp.zeros_like(mean), log_variance - other_log_variance) + squares) / 2

    def squared_newton_decrement(self, outputs, targets):
        mean, log_variance = outputs
        if self.exact:  # indefinite for r != 0; for r = 0 a slope along s without curvature
            return jnp.full_like(mean, jnp.inf)
        squares = times_exp(targets.astype(mean.dtype) - mean, -log_variance / 2) ** 2
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
poisson = Poisson
curvature_only = CurvatureOnly
