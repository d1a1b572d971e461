r"""Losses on the outputs of a model: value, curvature on the outputs, predictive distribution.

A loss is convex in the outputs z as far as possible, so the output non-linearity belongs to the loss and the model
returns natural parameters (logits, log rates, means): then the generalised Gauss-Newton matrix is the Fisher matrix
(Martens 2016, sections 4.4.2 and 5.4).

Outputs carry the examples on axis 0. ``value`` returns the loss without summing: its axes are leading axes of the
outputs, and ``curvax.Objective`` sums over all but the examples and takes the mean over those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from curvax.objectives.loss import OutputLoss
from curvax.objectives.standard_losses import (
    CurvatureOnly,
    FunctionLoss,
    Gaussian,
    Poisson,
    SigmoidBinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)

PyTree = Any


def squared_error() -> OutputLoss:
    r"""Half the squared error, L = 1/2 ||z - y||^2; y given z is N(z, I).

    The gradient is z - y and the Hessian I (the half is ours: some papers leave it out, which doubles both).
    Outputs and targets are floating-point arrays of one shape. Martens 2016, table 4.1.

    Returns:
        The loss.

    Example:
        >>> loss = curvax.losses.squared_error()
        >>> loss.value(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]]))
        Array([[0.5, 2. ]], dtype=float...)
    """
    return SquaredError()


def sigmoid_binary_cross_entropy() -> OutputLoss:
    r"""Binary cross-entropy of logits z, L = log(1 + exp(z)) - y z; y given z is Bernoulli(sigmoid(z)).

    Targets have the shape of the outputs; bool, integer or probabilities. Hessian diag(p (1 - p)), p = sigmoid(z).
    Martens 2016, table 4.1.

    Returns:
        The loss.

    Example:
        >>> loss = curvax.losses.sigmoid_binary_cross_entropy()
        >>> loss.value(jnp.array([0.0]), jnp.array([1.0]))
        Array([0.6931...], dtype=float...)
    """
    return SigmoidBinaryCrossEntropy()


def softmax_cross_entropy() -> OutputLoss:
    r"""Cross-entropy of logits z over the last axis, L = -sum_i y_i log p_i with p = softmax(z).

    Targets are integers with the shape of the outputs less the last axis, or floating-point probabilities with the
    shape of the outputs. An integer outside 0 ... K-1 contributes no loss and no Hessian; to leave it out of the mean
    use the objective's ``mask``. Hessian a (diag(p) - p p^T), where a = sum_i y_i is 1 for probabilities.
    Martens 2016, table 4.1.

    Returns:
        The loss.

    Example:
        >>> loss = curvax.losses.softmax_cross_entropy()
        >>> loss.value(jnp.zeros((1, 4)), jnp.array([2]))
        Array([1.3862...], dtype=float...)
    """
    return SoftmaxCrossEntropy()


def poisson() -> OutputLoss:
    r"""Poisson negative log-likelihood of log rates z, L = exp(z) - y z; y given z is Poisson(exp(z)).

    Targets have the shape of the outputs; integer or floating-point counts. Hessian diag(exp(z)).

    Returns:
        The loss.

    Example:
        >>> curvax.losses.poisson().value(jnp.array([0.0]), jnp.array([3]))
        Array([1.], dtype=float...)
    """
    return Poisson()


def gaussian(curvature: Literal["fisher", "exact"] = "fisher") -> OutputLoss:
    r"""Gaussian negative log-likelihood with learnt variance, L = 1/2 ((y - m)^2 exp(-s) + s) for outputs (m, s).

    The model returns the pair (mean, log variance), each of the shape of the targets. L is not convex in (m, s): its
    Hessian [[e^-s, r e^-s], [r e^-s, r^2 e^-s / 2]], r = y - m, has a negative eigenvalue wherever r is not 0. The
    Gauss-Newton matrix therefore uses the Fisher matrix diag(e^-s, 1/2), which is the expectation of that Hessian
    (Martens 2016, section 4.4.3, third option), unless told otherwise.

    Args:
        curvature: "fisher", or "exact" for the indefinite Hessian (products only: it has no square root).

    Returns:
        The loss.

    Raises:
        ValueError: ``curvature`` is neither.

    Example:
        >>> loss = curvax.losses.gaussian()
        >>> loss.value((jnp.array([0.0]), jnp.array([0.0])), jnp.array([2.0]))
        Array([2.], dtype=float...)
        >>> loss.curvature((jnp.array([0.0]), jnp.array([0.0])), jnp.array([2.0])).entries[1]
        Array([0.5], dtype=float...)
    """
    _check_choice("curvature", curvature, ("fisher", "exact"))
    return Gaussian(exact=curvature == "exact")


def from_function(
    function: Callable[[PyTree, PyTree], jax.Array],
    *,
    convex: bool,
    curvature: Literal["exact", "absolute", "clipped"] = "exact",
    natural: bool = False,
    sample: Callable[[jax.Array, PyTree], PyTree] | None = None,
) -> OutputLoss:
    r"""A loss from a plain function of one example's output and target; its curvature comes from differentiation.

    Products with the Hessian cost one differentiation; square root and pseudo-inverse form the m x m Hessian of each
    example.

    Args:
        function: (output, target) -> L, the scalar loss of one example, twice differentiable in the output.
        convex: Whether L is convex in the output.
        curvature: The matrix that the Gauss-Newton products use for a non-convex loss: the Hessian as it is ("exact",
            indefinite), with its eigenvalues' absolute values, or with the negative ones dropped ("clipped").
        natural: Whether L is, up to a constant, the negative log-density of an exponential family with natural
            parameters z: then the Fisher matrix is the Hessian.
        sample: (key, output) -> target, a draw from the predictive distribution of one example; for the Monte-Carlo
            Fisher matrix.

    Returns:
        The loss.

    Raises:
        ValueError: ``curvature`` is none of the three, or ``natural`` is set for a non-convex loss.

    Example:
        >>> def pseudo_huber(z, y):
        ...     return jnp.sum(jnp.sqrt(1 + (z - y) ** 2) - 1)
        >>> loss = curvax.losses.from_function(pseudo_huber, convex=True)
        >>> loss.value(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
        Array([0., 0.], dtype=float...)
    """
    _check_choice("curvature", curvature, ("exact", "absolute", "clipped"))
    if natural and not convex:
        raise ValueError("natural=True needs convex=True: a negative log-density is convex in natural parameters")
    return FunctionLoss(function, convex, curvature, natural, sample)


def curvature_only(loss: OutputLoss) -> OutputLoss:
    r"""``loss`` without its value: for methods whose gradient comes from elsewhere (policy gradients, energies).

    The Gauss-Newton and Fisher products work as ever, and asking for the loss or its gradient is an error. Targets may
    be None where the curvature does not depend on them: the losses with ``natural`` set, ``gaussian()``, and every
    Fisher matrix; a loss ``from_function`` is then given None.

    Args:
        loss: The loss that defines the curvature.

    Returns:
        The loss without value.

    Example:
        >>> loss = curvax.losses.curvature_only(curvax.losses.squared_error())
        >>> objective = curvax.Objective(lambda w, x: x @ w, loss)
        >>> F = curvax.fisher(objective.linearize(jnp.zeros((2, 1)), (jnp.eye(2), None)))
        >>> F.to_dense()
        Array([[0.5, 0. ],
               [0. , 0.5]], dtype=float...)
    """
    return CurvatureOnly(loss)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
