"""Losses of class logits: cross-entropy, and the bounded criterion of the positive-curvature Hessian's experiments."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from curvax.checks import check_choice
from curvax.objectives.loss import OutputLoss, check_array, check_targets, relative_entropy, times_exp
from curvax.objectives.output_matrix import AutodiffOutputs, SoftmaxOutputs


@dataclasses.dataclass(frozen=True)
class Classes(OutputLoss):
    """A loss of logits over the last axis, with integer labels or probabilities as targets.

    Attributes:
        ignore_label: The integer that marks padding; None for none.
    """

    ignore_label: int | None = None

    def ignored(self, targets):
        labelled = self.ignore_label is not None and _are_labels(targets)
        return _labels(targets) == self.ignore_label if labelled else None

    def impossible(self, outputs, targets):
        if not _are_labels(targets):
            return None
        labels = _labels(targets)
        return (labels < 0) | (labels >= outputs.shape[-1])

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
class SoftmaxCrossEntropy(Classes):
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

    natural = True
    nonnegative = True

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
        entropies = jnp.sum(relative_entropy(_log_softmax(outputs), _log_softmax(others)), axis=-1)
        return jnp.where(self.fisher(outputs, targets).mass > 0, entropies, 0)

    def squared_newton_decrement(self, outputs, targets):
        # sum_i (a p_i - y_i)^2 / (a p_i) with a the mass, in a form that neither cancels nor divides zero by zero.
        y, log_p = self._distribution(outputs, targets), _log_softmax(outputs)
        mass = jnp.sum(y, axis=-1)
        differences = mass[..., None] * jnp.exp(log_p / 2) - times_exp(y, -log_p / 2)
        return jnp.sum(differences**2, axis=-1) / jnp.where(mass > 0, mass, 1)


softmax_cross_entropy = SoftmaxCrossEntropy


def bounded_softmax(
    delta: float = 5.0, epsilon: float = 0.2, *, curvature: Literal["clipped", "absolute", "exact"] = "clipped"
) -> BoundedSoftmax:
    r"""A bounded criterion of class logits, L = 1 / (1 + exp(delta (y^T p - epsilon))) with p = softmax(z).

    A label that is wrong for sure costs no more than 1, so that mislabelled examples are given up. It is not convex in
    the logits. The formula is a reconstruction: eq. 14 of Chen et al. 2018 is not legible in the copy at hand, but for
    its constants and that it is bounded above, smooth and not convex. Targets are those of ``softmax_cross_entropy``.

    It is no negative log-density, so it has no Fisher matrix; ``EmpiricalFisher()`` takes its gradients at the targets.

    Args:
        delta: How steep it is.
        epsilon: The probability of the right class at which the loss is 1/2.
        curvature: What the Gauss-Newton products take: the Hessian with its negative eigenvalues dropped ("clipped"),
            with their absolute values, or as it is (products only).

    Raises:
        ValueError: ``curvature`` is none of the three.

    Example:
        >>> loss = curvax.losses.bounded_softmax()
        >>> loss.value(jnp.log(jnp.array([[0.2, 0.8]])), jnp.array([0]))
        Array([0.5], dtype=float...)

    Source: Chen, Hsu, Gonzalez Pardo and Chou 2018, eq. 14.
    """
    check_choice("curvature", curvature, ("clipped", "absolute", "exact"))
    return BoundedSoftmax(delta=delta, epsilon=epsilon, treatment=curvature)


@dataclasses.dataclass(frozen=True)
class BoundedSoftmax(Classes):
    """What ``bounded_softmax`` makes."""

    delta: float = 5.0
    epsilon: float = 0.2
    treatment: str = "clipped"
    convex = False
    nonnegative = True

    def value(self, outputs, targets):
        y = self._distribution(outputs, targets)
        probability = jnp.sum(y * jnp.exp(_log_softmax(outputs)), axis=-1)
        # A case without a target has no loss.
        return jnp.sum(y, axis=-1) * jax.nn.sigmoid(self.delta * (self.epsilon - probability))

    def curvature(self, outputs, targets):
        matrix = self.hessian(outputs, targets)
        assert isinstance(matrix, AutodiffOutputs)
        return dataclasses.replace(matrix, treatment=self.treatment)

    def fisher(self, outputs, targets=None):
        raise ValueError(_NO_DENSITY.format(self))

    def sample(self, key, output):
        raise ValueError(_NO_DENSITY.format(self))


_NO_DENSITY = "{} is no negative log-density, so it has no Fisher matrix; take GaussNewton() or EmpiricalFisher()"


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


def _classes(logits, dtype):
    """The number of each class on the last axis, with as many axes as the logits, so that no rank is promoted."""
    return jnp.arange(logits.shape[-1], dtype=dtype).reshape((1,) * (logits.ndim - 1) + (-1,))
