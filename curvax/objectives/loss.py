"""The interface of a loss on a model's outputs: value, curvature, Fisher matrix and draws of targets."""

from __future__ import annotations

import abc
import dataclasses
import re

import jax
import jax.numpy as jnp

from curvax import trees
from curvax.objectives.output_matrix import AutodiffOutputs, OutputMatrix
from curvax.types import PyTree


class OutputLoss(abc.ABC):
    """The interface of every loss. ``outputs`` and ``targets`` carry the examples on axis 0.

    Attributes:
        convex: Whether the loss is convex in the outputs.
        natural: Whether the outputs are natural parameters of the predictive distribution, so that Hessian and Fisher
            matrix on the outputs agree (Martens 2016, eq. 5.5).
        has_value: Whether the value exists; see ``curvature_only``.
        nonnegative: Whether it is known not to be below zero, so that no step can lower it by more than it is.
        takes_complex: Whether outputs may be complex. A loss gets the real and the imaginary part of each such output,
            as a ``curvax.trees.RealPair``, and the targets as they are.
    """

    convex: bool = True
    natural: bool = False
    has_value: bool = True
    nonnegative: bool = False
    takes_complex: bool = False

    @abc.abstractmethod
    def value(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        """The loss, not summed: an array whose axes are leading axes of the outputs."""

    def gradient(self, outputs: PyTree, targets: PyTree) -> PyTree:
        """The gradient of the summed loss in the outputs."""
        return jax.grad(lambda z: jnp.sum(self.value(z, targets)))(outputs)

    def hessian(self, outputs: PyTree, targets: PyTree) -> OutputMatrix:
        """H_L, the exact Hessian in the outputs; for a non-convex loss it is indefinite."""
        return AutodiffOutputs(_OneExample(self), outputs, targets, convex=self.convex)

    def curvature(self, outputs: PyTree, targets: PyTree) -> OutputMatrix:
        """The matrix of the Gauss-Newton products: H_L for convex losses, else as the loss documents."""
        return self.hessian(outputs, targets)

    def fisher(self, outputs: PyTree, targets: PyTree = None) -> OutputMatrix:
        """F_R, the Fisher matrix of the predictive distribution in the outputs (Martens 2016, eq. 5.4).

        It does not depend on what the targets are: they say which cases have one, and a loss ``from_function`` needs
        some to evaluate its function with.

        Raises:
            ValueError: It has no closed form.
        """
        raise ValueError(
            f"{self} has no Fisher matrix in closed form; pass key= and num_samples= for the Monte-Carlo one, or make"
            " the loss with natural=True if its outputs are natural parameters"
        )

    def sample(self, key: jax.Array, output: PyTree) -> PyTree:
        """A target drawn from the predictive distribution of ONE example (no batch axis).

        Raises:
            ValueError: The loss has no predictive distribution that it could draw from.
        """
        raise ValueError(f"{self} cannot be sampled; make it with sample=(key, output) -> target")

    def draw(self, keys: jax.Array, outputs: PyTree, targets: PyTree) -> PyTree:
        """A target drawn for every example, by a key for each; cases without a target get none (labels of padding)."""
        del targets
        return jax.vmap(self.sample)(keys, outputs)

    def negative_log_density(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        """-log r(y | z) of the predictive distribution, normalised, shaped like ``value``.

        Raises:
            ValueError: The loss is not known to have a normalised density.
        """
        raise ValueError(f"{self} has no normalised density")

    def divergence(self, outputs: PyTree, others: PyTree, targets: PyTree = None) -> jax.Array:
        """KL(R_z || R_z') of the predictive distributions at z = ``outputs``, z' = ``others``; shaped like ``value``.

        As of the Fisher matrix, targets only say which cases have one.

        Raises:
            ValueError: It has no closed form.
        """
        raise ValueError(f"{self} has no divergence in closed form; pass key= and num_samples= for an estimate")

    def draw_divergence(self, keys: jax.Array, outputs: PyTree, others: PyTree, targets: PyTree) -> jax.Array:
        """An unbiased estimate of ``divergence``, L(y, z') - L(y, z) - grad_z L(y, z)^T (z' - z) at a drawn target y.

        The last term has no expectation. With it the estimate is of second order in z' - z, like what it estimates, and
        where z are natural parameters it does not depend on y. L is to be -log r up to what depends on y alone.
        """
        drawn = self.draw(keys, outputs, targets)
        value, slope = jax.jvp(lambda z: self.value(z, drawn), (outputs,), (trees.sub(others, outputs),))
        return self.value(others, drawn) - value - slope

    def squared_newton_decrement(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        """g^T C^+ g with g the gradient and C the ``curvature``; twice the most the quadratic model can fall by.

        Shaped like ``value`` where the matrix is separable, else one number for each example. Infinite where the model
        is certain and wrong, and wherever else the quadratic model falls without end: along a slope without curvature,
        or where C is indefinite.
        """
        return self.curvature(outputs, targets).pinv_quadratic(self.gradient(outputs, targets))

    def ignored(self, targets: PyTree) -> jax.Array | None:
        """Which cases are padding, neither part of the loss nor counted; None for none."""
        del targets

    def impossible(self, outputs: PyTree, targets: PyTree) -> jax.Array | None:
        """Which cases have targets that do not exist, such as a class too many; None where all do."""
        del outputs, targets

    def check(self, outputs: PyTree, targets: PyTree) -> None:
        """Raises a ValueError or TypeError, at trace time, if the targets do not fit the outputs."""
        self.check_outputs(outputs)

    def check_outputs(self, outputs: PyTree) -> None:
        """Raises a ValueError or TypeError, at trace time, if the loss does not take such outputs."""
        trees.check_floating(outputs, "outputs")


@dataclasses.dataclass(frozen=True)
class _OneExample:
    """The loss of one example, a function that equals those of equal losses, so that jit does not trace it anew."""

    loss: OutputLoss

    def __call__(self, output, target):
        return jnp.sum(self.loss.value(*jax.tree.map(lambda x: x[None], (output, target))))


def check_loss(loss):
    """Raises a TypeError, which says what to write, unless it is an ``OutputLoss``."""
    if isinstance(loss, OutputLoss):
        return
    name = getattr(loss, "__name__", "")
    if (isinstance(loss, type) and issubclass(loss, OutputLoss)) or name in ("gaussian", "from_function"):
        maker = re.sub("(?<!^)(?=[A-Z])", "_", name).lower()
        raise TypeError(f"loss= takes a loss, not what makes one; call it: curvax.losses.{maker}(...)")
    advice = _OF_OPTAX.get(name, "from_function(function, convex=...), for a function (output, target) of one example")
    raise TypeError(f"loss= takes a loss of curvax, got {name or repr(loss)}; write curvax.losses.{advice}")


_OF_OPTAX = {
    "softmax_cross_entropy_with_integer_labels": "softmax_cross_entropy(), which takes integer labels",
    "softmax_cross_entropy": "softmax_cross_entropy(), which takes probabilities",
    "safe_softmax_cross_entropy": "softmax_cross_entropy(), which takes probabilities",
    "sigmoid_binary_cross_entropy": "sigmoid_binary_cross_entropy()",
    "l2_loss": "squared_error(), which has the half",
    "squared_error": "squared_error(), which is half of it",
}
"""What the losses of optax are called here."""


def check_array(loss, outputs):
    """Raises a TypeError unless the outputs are one array."""
    if not hasattr(outputs, "shape"):
        raise TypeError(f"{loss}: the model must return one array, got {described(outputs)}")


def check_targets(loss, targets, shape, what="targets", floating=False):
    """Raises a TypeError or ValueError unless the targets are one array of that shape."""
    if not hasattr(targets, "shape"):
        raise TypeError(f"{loss}: {what} must be one array of shape {shape}, got {described(targets)}")
    if targets.shape != shape:
        raise ValueError(f"{loss}: {what} must have shape {shape}, to match the outputs, got {targets.shape}")
    if floating and not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(f"{loss}: {what} must be floating-point, got {targets.dtype}; cast them")


def described(tree):
    """The tree with each leaf replaced by its dtype and shape as text."""
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{jnp.shape(x)}", tree)


def times_exp(factor, exponent):
    """factor * exp(exponent), zero where the factor is zero even if the exponential overflows."""
    return factor * jnp.exp(jnp.where(factor == 0, 0, exponent))


def relative_entropy(log_p, log_q):
    """q - p - p log(q / p), which is not negative and sums up to the divergence of p from q; accurate where they meet.

    For a Poisson distribution it is that of the rates, which need not sum to one.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    change = jnp.where(p > 0, log_q - log_p, 0)
    near = (p > 0) & (change < 1)
    return jnp.where(near, p * (jnp.expm1(jnp.where(near, change, 0)) - change), q - p - p * change)
