"""The objective: what is minimised, as a sum of terms, each a model function, a loss and a part of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from curvax import trees
from curvax.objectives.loss import OutputLoss
from curvax.objectives.penalty import Penalty
from curvax.objectives.point import CurvaturePoint, curvature_point
from curvax.objectives.term import Term, weighted_sum, weighting
from curvax.types import PyTree, Scalar


@jax.tree_util.register_pytree_node_class
class Objective:
    r"""The function that is minimised, h(theta) = mean_i L(y_i, f(theta, x_i)) + (l2 / 2) ||theta||^2.

    An objective brings together a model function and a loss on its outputs; nothing of the model is registered or
    renamed. It is a pytree: ``l2`` and the weights of its terms may be traced numbers, so a schedule on them compiles
    once. Several terms, such as the interior and the boundary of a physics-informed network, are summed by
    ``Objective.from_terms``.

    The objective is the mean over examples, which stand on axis 0 of the outputs; the loss of a sequence is the sum
    over its steps. Weights and masks change that as ``curvax.Term`` says.

    Example:
        >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
        >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
        >>> objective(w, batch)
        Array(0.5, dtype=float...)
        >>> loss, grads, at = objective.value_and_grad(w, batch)
        >>> grads
        Array([[-0.5],
               [-0.5]], dtype=float...)
        >>> curvax.ggn(at)(jnp.ones((2, 1)))
        Array([[0.5],
               [0.5]], dtype=float...)
    """

    terms: tuple[Term, ...]
    penalty: Penalty

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], PyTree],
        loss: OutputLoss,
        *,
        l2: Scalar | None = None,
        l2_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
        select: Callable[[PyTree], tuple[PyTree, PyTree]] | None = None,
        example_weights: Callable[[PyTree], jax.Array] | None = None,
        mask: Callable[[PyTree], jax.Array] | None = None,
        example_axes: Any = 0,
        has_aux: bool = False,
    ):
        """An objective of one term.

        Args:
            model_fn: (params, inputs) -> outputs z, before the output non-linearity (that belongs to the loss); with
                ``has_aux`` -> (outputs, aux). Random keys and batch statistics travel in the inputs.
            l2: The strength eta of the penalty eta/2 ||theta||^2 (Martens 2016, section 6.8), part of value, gradient
                and every curvature matrix; None for none. May be traced.
            l2_mask: Which leaves are penalised: a pytree of bools shaped like the parameters, or a function from the
                parameters to one, as in ``optax.add_decayed_weights``; None for all.
            select: batch -> (inputs, targets); the batch itself if None.
            example_weights: batch -> weights; see ``curvax.Term``.
            mask: batch -> mask; see ``curvax.Term``.
            example_axes: Where the examples are in (inputs, targets): a pytree prefix of ints and None as in
                ``jax.vmap``'s ``in_axes``; None marks what all examples share, such as a key.
            has_aux: Whether the model returns auxiliary outputs, such as new batch statistics.
        """
        term = Term(model_fn, loss, select, 1.0, example_weights, mask, example_axes, has_aux)
        self.terms, self.penalty = (term,), Penalty.of(l2, l2_mask)

    @classmethod
    def from_terms(
        cls, *terms: Term, l2: Scalar | None = None, l2_mask: PyTree | Callable[[PyTree], PyTree] | None = None
    ) -> Objective:
        """The sum of several terms, h = sum_t weight_t mean_i L_t + l2/2 ||theta||^2.

        Each selects its own part of the batch and takes the mean over its own examples.

        Example:
            >>> def network(w, x):
            ...     return jnp.tanh(x @ w)
            >>> loss = curvax.losses.squared_error()
            >>> interior = curvax.Term(network, loss, select=lambda batch: batch["interior"])
            >>> boundary = curvax.Term(network, loss, select=lambda batch: batch["boundary"], weight=10.0)
            >>> objective = curvax.Objective.from_terms(interior, boundary)
            >>> part = (jnp.ones((3, 2)), jnp.ones((3, 1)))
            >>> objective(jnp.zeros((2, 1)), {"interior": part, "boundary": part})
            Array(5.5, dtype=float...)
        """
        if not terms or not all(isinstance(term, Term) for term in terms):
            raise TypeError("Objective.from_terms takes one or more curvax.Term")
        return cls.tree_unflatten(None, (tuple(terms), Penalty.of(l2, l2_mask)))

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The scalar loss h(theta) on a batch, in float32 or wider; ``jax.value_and_grad(objective)`` works.

        Args:
            batch: (inputs, targets), or what ``select`` makes them from.

        Raises:
            TypeError: A leaf of the parameters is not floating-point, or targets have the wrong dtype.
            ValueError: The batch is empty, or shapes do not fit.
        """
        params = trees.floating_arrays(params, "params")
        total = self.penalty.value(params)
        for term in self.terms:
            inputs, targets = term.split(batch)
            outputs, _ = term.apply(params, inputs)
            scale, _ = weighting(term, batch, outputs, targets)
            total = trees.add(weighted_sum(scale, term.loss.value(outputs, targets)), total)
        return total

    def value_and_grad(
        self, params: PyTree, batch: PyTree, *, has_aux: bool = False, chunk_size: int | None = None
    ) -> tuple[Any, PyTree, CurvaturePoint]:
        """Loss, gradient, and the curvature point they came from, by one linearisation.

        Args:
            has_aux: Return ``(loss, aux)`` in place of the loss; aux is a tuple over terms if there are several.
            chunk_size: How many examples to take through the model at a time; None for all at once.

        Outside of ``jit`` the work is compiled, once for each shape: what ``model_fn`` reads besides its arguments,
        such as an attribute, is read then.

        Returns:
            ``(loss, gradient, at)``; ``at`` is a pytree to give to transformations (``tx.update(..., at=at)``), to
            ``curvax.ggn(at)`` and its siblings, and to ``curvax.tap(layers, at)``.
        """
        if has_aux and chunk_size is not None:
            raise ValueError("auxiliary outputs of chunks cannot be put together: leave out chunk_size or has_aux")
        if has_aux and not any(term.has_aux for term in self.terms):
            raise ValueError("has_aux=True, but no term's model returns aux: make the objective with has_aux=True")
        params = trees.floating_arrays(params, "params")
        loss, gradient, at = compiled_if_eager(_value_and_grad, self, params, batch, chunk_size=chunk_size)
        return ((loss, at.aux) if has_aux else loss), gradient, at

    def linearize(self, params: PyTree, batch: PyTree, *, chunk_size: int | None = None) -> CurvaturePoint:
        """The curvature point at (params, batch): outputs and the linear maps J and J^T of every term.

        Args:
            chunk_size: None stores the linearisation of the whole batch. A number of examples makes every later
                product go through the batch in chunks of that size, each linearised anew, so that memory is bounded;
                results do not depend on it.
        """
        params = trees.floating_arrays(params, "params")
        return compiled_if_eager(_linearize, self, params, batch, chunk_size=chunk_size)

    def replace(self, **changes: Any) -> Objective:
        """A copy with ``l2``, ``l2_mask`` or ``terms`` replaced, for instance by a traced number.

        So a schedule of the penalty, such as weight decay at first and none near the end (Martens 2016, section 4.11),
        is ``objective.replace(l2=schedule(count))`` inside the compiled step: loss, gradient and curvature all have it.

        Example:
            >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error(), l2=0.1)
            >>> w, batch = jnp.ones((1, 1)), (jnp.ones((1, 1)), jnp.ones((1, 1)))
            >>> jax.jit(lambda l2: objective.replace(l2=l2)(w, batch))(2.0)
            Array(1., dtype=float...)
        """
        unknown = set(changes) - {"l2", "l2_mask", "terms"}
        if unknown:
            raise TypeError(f"Objective.replace takes l2, l2_mask and terms, not {', '.join(sorted(unknown))}")
        fields = {"terms": self.terms, "l2": self.penalty.l2, "l2_mask": self.penalty.mask} | changes
        return Objective.from_terms(*fields["terms"], l2=fields["l2"], l2_mask=fields["l2_mask"])

    def tree_flatten(self):
        return (self.terms, self.penalty), None

    @classmethod
    def tree_unflatten(cls, _, children):
        objective = cls.__new__(cls)
        objective.terms, objective.penalty = children
        return objective

    def __repr__(self):
        terms = ", ".join(f"{getattr(t.model_fn, '__name__', t.model_fn)} -> {t.loss}" for t in self.terms)
        return f"Objective({terms}, l2={self.penalty.l2})"


def compiled_if_eager(
    function: Callable[..., Any], first: Objective | CurvaturePoint, *others: PyTree, **static: Any
) -> Any:
    """``function(first, *others, **static)``, through ``jit`` where nothing is being traced.

    ``first`` may hold numbers, such as the strength of a penalty; the others and the batch of a point arrays alone, as
    a number or a flag among the inputs of a model is for Python to read.

    What ``jax.linearize`` returns holds a program that is new at every call, so that whatever is compiled for one
    result is compiled anew for the next. ``jit`` traces once for each function and shapes, and what it returns is the
    same program again.
    """
    data = others, [cases.packed for cases in getattr(first, "cases", ())]
    arrays = all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(data))
    tracing = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((first, others)))
    try:
        # What cannot be hashed, such as a dataclass with arrays in it, has no plain answer to == either, which jit asks
        # for. The hash of a tree's structure does not tell.
        hash(tuple((t.model_fn, t.loss, t.select, t.example_weights, t.mask) for t in first.terms))
    except TypeError:
        arrays = False
    if tracing or not arrays:
        return function(first, *others, **static)
    return _compiled(function, tuple(static))(first, *others, **static)


@functools.cache
def _compiled(function, static_names):
    return jax.jit(function, static_argnames=static_names)


def _linearize(objective, params, batch, *, chunk_size):
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    return curvature_point(objective.terms, objective.penalty, params, batch, chunk_size)


def _value_and_grad(objective, params, batch, *, chunk_size):
    at = _linearize(objective, params, batch, chunk_size=chunk_size)
    loss, gradient = at.value_and_gradient()
    return loss, gradient, at.with_gradient(gradient)
