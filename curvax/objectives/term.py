"""One term of an objective: a model function, a loss, the part of the batch they apply to, and its weighting."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.objectives.loss import OutputLoss, check_loss
from curvax.types import PyTree, Scalar

_STATIC = {"static": True}


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    r"""One summand of an objective, weight * (1/N) sum_i w_i L(y_i, f(theta, x_i)).

    The cases i are what the leading axes of ``mask`` and ``example_weights`` number: the examples unless one of them
    has more axes, the steps of the sequences if one has shape (examples, steps).

    Attributes:
        model_fn: (params, inputs) -> outputs, or (outputs, aux) with ``has_aux``.
        select: batch -> (inputs, targets); the batch itself if None.
        weight: A number, perhaps traced, that multiplies the term.
        example_weights: batch -> w, an array whose shape is a leading part of the loss's, such as (examples,) or
            (examples, steps). N stays the number of examples, so weights need not sum to anything. Negative ones make
            curvature indefinite: what needs a definite matrix (draws, Gram matrices and steps in the space of the
            samples, Kronecker factors) takes their absolute values.
        mask: batch -> booleans of such a shape, False for what is to be left out altogether. N is the number of True
            entries: with a mask over steps the term is a mean over steps. Where all are False the term is zero.
        example_axes: Where the examples are in (inputs, targets), a prefix as in ``jax.vmap``'s ``in_axes``. Read
            where the batch is cut up (chunks).
        has_aux: Whether the model returns auxiliary outputs.

    Example:
        >>> term = curvax.Term(lambda w, x: x @ w, curvax.losses.squared_error(), mask=lambda batch: batch[1][:, 0] > 0)
        >>> objective = curvax.Objective.from_terms(term)
        >>> objective(jnp.zeros((1, 1)), (jnp.ones((3, 1)), jnp.array([[2.0], [4.0], [-1.0]])))
        Array(5., dtype=float...)
    """

    model_fn: Callable[[PyTree, PyTree], PyTree] = dataclasses.field(metadata=_STATIC)
    loss: OutputLoss = dataclasses.field(metadata=_STATIC)
    select: Callable[[PyTree], tuple[PyTree, PyTree]] | None = dataclasses.field(default=None, metadata=_STATIC)
    weight: Scalar = 1.0
    example_weights: Callable[[PyTree], jax.Array] | None = dataclasses.field(default=None, metadata=_STATIC)
    mask: Callable[[PyTree], jax.Array] | None = dataclasses.field(default=None, metadata=_STATIC)
    example_axes: Any = dataclasses.field(default=0, metadata=_STATIC)
    has_aux: bool = dataclasses.field(default=False, metadata=_STATIC)

    def __post_init__(self):
        check_loss(self.loss)
        if not callable(self.model_fn):
            raise TypeError(f"model_fn= takes a function (params, inputs) -> outputs, got {self.model_fn!r}")

    def apply(self, params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """The model's outputs, in float32 or wider, and its auxiliary outputs (None if it has none).

        Complex outputs leave here as pairs of real ones: curvature is that of a real loss in real parameters, whose
        J^T is the real part of J^H.
        """
        result = self.model_fn(params, inputs)
        if self.has_aux:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError("has_aux=True, but the model did not return a pair (outputs, aux)")
            outputs, aux = result
        else:
            outputs, aux = result, None
        _check_dtypes(self.loss, outputs)
        outputs = trees.split_complex(outputs)
        return jax.tree.map(lambda z: z.astype(trees.wider(z.dtype, jnp.float32)), outputs), aux

    def split(self, batch: PyTree) -> tuple[PyTree, PyTree]:
        """(inputs, targets) of a batch."""
        selected = batch if self.select is None else self.select(batch)
        if not (isinstance(selected, (tuple, list)) and len(selected) == 2):
            raise TypeError(
                f"a batch must be a pair (inputs, targets), got {type(selected).__name__}; pass"
                " select=lambda batch: (inputs, targets) to the objective"
            )
        return tuple(selected)


def located_examples(term: Term, data: PyTree) -> PyTree:
    """(inputs, targets) with every leaf replaced by ``Located((leaf, axis))``, where its examples are or None."""
    axes = term.example_axes

    def located(axis, part):
        return jax.tree.map(lambda leaf: Located((leaf, axis if trees.is_array(leaf) else None)), part)

    try:
        return jax.tree.map(located, axes, data, is_leaf=lambda axis: axis is None)
    except ValueError as error:
        raise ValueError(f"example_axes {axes!r} is not a prefix of (inputs, targets): {error}") from None


class Located(tuple):
    """A leaf and its example axis or None, a leaf of its own to jax because it is no plain tuple."""


def weighting(term: Term, batch: PyTree, outputs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
    """The factor of each case's loss, weight * w / N, a scalar if all are alike; and N. Checks outputs and targets.

    Cases that the loss or the mask leave out have the factor 0. Where a case that is left in has an impossible target,
    all factors are NaN, so that loss, gradient and curvature are: a step is then skipped and counted. ``outputs`` may
    be ShapeDtypeStructs.

    Raises:
        ValueError: Outside of ``jit``, such a target.
    """
    num_examples = _num_examples(outputs, targets)
    term.loss.check(outputs, targets)
    dtype = trees.wide_dtype(*jax.tree.leaves(outputs))
    count, scale = jnp.asarray(num_examples, dtype), jnp.asarray(term.weight).astype(dtype)
    mask = _mask(term, batch, outputs, targets)
    if mask is not None:
        count = jnp.sum(mask, dtype=dtype)
        scale = scale * mask.astype(dtype)
    if term.example_weights is not None:
        weights = jnp.asarray(term.example_weights(batch))
        _check_weights("example_weights", weights, term, outputs, targets)
        ndim = max(scale.ndim, weights.ndim)
        scale = trees.expand_right(scale, ndim) * trees.expand_right(weights.astype(dtype), ndim)
    impossible = term.loss.impossible(outputs, targets)
    if impossible is not None:
        counted = impossible & trees.expand_right(scale != 0, impossible.ndim)
        scale = jnp.where(_any(term.loss, counted, targets), jnp.nan, scale)
    return scale / jnp.where(count > 0, count, 1), count


def _mask(term, batch, outputs, targets):
    """Which cases are left in; None for all."""
    masks = []
    if term.mask is not None:
        mask = jnp.asarray(term.mask(batch))
        _check_weights("mask", mask, term, outputs, targets)
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be boolean, got {mask.dtype}; pass numbers as example_weights")
        masks.append(mask)
    ignored = term.loss.ignored(targets)
    if ignored is not None:
        masks.append(~ignored)
    ndim = max((mask.ndim for mask in masks), default=0)
    return functools.reduce(jnp.logical_and, [trees.expand_right(mask, ndim) for mask in masks]) if masks else None


def _any(loss, impossible, targets):
    """Whether there is one; where the targets are known, a ValueError in its place."""
    found = jnp.any(impossible)
    if not isinstance(found, Tracer) and found:
        (*place,) = map(int, jnp.argwhere(impossible)[0])
        raise ValueError(
            f"{loss}: target {targets[tuple(place)]} of example {place[0]} is no class of the outputs; for padding make"
            " the loss with ignore_label=, or leave the case out by the objective's mask="
        )
    return found


def weighted_sum(scale: jax.Array, values: jax.Array) -> jax.Array:
    """sum_i scale_i values_i, where the axes of ``scale`` are leading axes of ``values``."""
    if scale.ndim == 0:
        return scale * jnp.sum(values)
    return jnp.sum(_times(trees.expand_right(scale, values.ndim), values))


def scale_cases(scale: jax.Array, outputs: PyTree) -> PyTree:
    """Every case of ``outputs`` times its factor."""
    return jax.tree.map(lambda z: _times(trees.expand_right(scale, z.ndim).astype(z.dtype), z), outputs)


def _times(scale, values):
    """``scale * values``, zero where the scale is zero even if a case that is left out has an infinite loss."""
    return scale * values if scale.ndim == 0 else jnp.where(scale == 0, 0, scale * values)


def _num_examples(outputs, targets):
    leaves = jax.tree.leaves(outputs)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError("the model's outputs must carry the examples on axis 0; got a scalar or nothing")
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(f"the model's outputs disagree on the number of examples on axis 0: {sorted(lengths)}")
    (num_examples,) = lengths
    if num_examples == 0:
        raise ValueError(
            "the batch is empty: a mean over no examples does not exist; skip the batch or pad and mask it"
        )
    for path, leaf in zip(trees.leaf_paths(targets), jax.tree.leaves(targets), strict=True):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_examples:
            raise ValueError(
                f"targets{f'[{path!r}]' if path else ''} of shape {jnp.shape(leaf)} do not have the"
                f" {num_examples} examples of the outputs on axis 0"
            )
    return num_examples


def _check_dtypes(loss, outputs):
    """Raises a TypeError that names the first output of a dtype that the loss does not take."""
    for path, leaf in zip(trees.leaf_paths(outputs), jax.tree.leaves(outputs), strict=True):
        name = f"outputs{f'[{path!r}]' if path else ''}"
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            if not loss.takes_complex:
                raise TypeError(
                    f"{name} have dtype {leaf.dtype}, which {loss} does not take: return real numbers, such as real"
                    " and imaginary part. Losses of complex outputs are squared_error, from_function, and"
                    " curvature_only of these"
                )
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name} have dtype {leaf.dtype}; curvature needs outputs that change with the parameters")


def _check_weights(name, array, term, outputs, targets):
    whole = outputs if not term.loss.has_value else jax.eval_shape(term.loss.value, outputs, targets)
    for leaf in jax.tree.leaves(whole):
        if array.ndim == 0 or array.shape != leaf.shape[: array.ndim]:
            raise ValueError(
                f"{name} of shape {array.shape} does not match the loss of shape {leaf.shape}: give it that shape or a"
                f" leading part of it, such as {leaf.shape[:1]}"
            )
