"""The curvature point: one linearisation of an objective, from which gradient and curvature matrices are read off."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from curvax import trees
from curvax.objectives.loss import OutputLoss
from curvax.objectives.term import Term, scale_cases, weighted_sum, weighting

if TYPE_CHECKING:
    from curvax.objectives.objective import Objective

PyTree = Any


class Linearization(NamedTuple):
    """A term's outputs and the maps J and J^T at one point, as pytrees of their residuals."""

    outputs: PyTree
    jvp: Callable[[PyTree], PyTree]
    transpose: Callable[[PyTree], tuple[PyTree]]


class Cases(NamedTuple):
    """A term's part of the batch: targets, the factor of each case's loss, how many cases, and the inputs."""

    inputs: PyTree
    targets: PyTree
    scale: jax.Array
    num_cases: jax.Array


class Piece(NamedTuple):
    """What an accumulated quantity sees of one term, or of one chunk of it."""

    loss: OutputLoss
    outputs: PyTree
    targets: PyTree
    scale: jax.Array
    jvp: Callable[[PyTree], PyTree]
    transpose: Callable[[PyTree], PyTree]
    value_at: Callable[[PyTree], jax.Array]
    gradient_at: Callable[[PyTree], PyTree]
    extra: PyTree


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CurvaturePoint:
    """An objective linearised at (params, batch); made by ``Objective.linearize`` and ``Objective.value_and_grad``.

    A pytree: it passes through ``jit``, ``cond`` and optax's extra arguments, also inside wrappers that hide leaves of
    the parameters.

    Attributes:
        objective: The objective, with its ``l2`` and weights as they were.
        params: theta.
        cases: For each term its inputs, targets and weighting.
        linearizations: For each term its outputs, J and J^T; None where the point works in chunks.
        aux: The model's auxiliary outputs, a tuple over terms if there are several.
        chunk_size: Examples in a chunk, or None.
    """

    objective: Objective
    params: PyTree
    cases: tuple[Cases, ...]
    linearizations: tuple[Linearization, ...] | None
    aux: PyTree
    chunk_size: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def at(cls, objective: Objective, params: PyTree, batch: PyTree, chunk_size: int | None) -> CurvaturePoint:
        """The point at (params, batch)."""
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}")
        cases, linearizations, aux = [], [], []
        for term in objective.terms:
            inputs, targets = term.split(batch)
            if chunk_size is None:
                linearization, term_aux = linearize_term(term, params, inputs)
                outputs = linearization.outputs
                linearizations.append(linearization)
                aux.append(term_aux)
            else:
                outputs = jax.eval_shape(lambda p, x, term=term: term.apply(p, x)[0], params, inputs)
            scale, count = weighting(term, batch, outputs, targets)
            cases.append(Cases(inputs, targets, scale, count))
        return cls(
            objective,
            params,
            tuple(cases),
            tuple(linearizations) if chunk_size is None else None,
            (aux[0] if len(aux) == 1 else tuple(aux)) if aux else None,
            chunk_size,
        )

    @property
    def loss(self) -> jax.Array:
        """The scalar loss h(theta)."""
        data = self.accumulate(lambda p: weighted_sum(p.scale, p.loss.value(p.outputs, p.targets)))
        return trees.add(data, self.objective.penalty(self.params))

    @property
    def outputs(self) -> PyTree:
        """The model's outputs z, a tuple over terms if there are several."""
        return _only([linearization.outputs for linearization in self._stored("outputs")])

    def loss_at(self, params: PyTree) -> jax.Array:
        """The loss at other parameters on the same batch, by one forward pass."""
        data = self.accumulate(lambda piece: piece.value_at(params))
        return trees.add(data, self.objective.penalty(params))

    def value_and_gradient(self) -> tuple[jax.Array, PyTree]:
        """The loss and its gradient, from the linearisation that is there."""

        def one(piece):
            value = weighted_sum(piece.scale, piece.loss.value(piece.outputs, piece.targets))
            cotangent = scale_cases(piece.scale, piece.loss.gradient(piece.outputs, piece.targets))
            return value, piece.transpose(cotangent)

        value, gradient = self.accumulate(one)
        if self.objective.l2 is not None:
            value = trees.add(value, self.objective.penalty(self.params))
            gradient = trees.add(gradient, trees.multiply(self.params, self.objective.penalty_curvature(self.params)))
        return value, gradient

    def jacobian_product(self, vector: PyTree) -> PyTree:
        """J v: the change of the outputs along v, a pytree like ``params``. A tuple over terms if there are several."""
        trees.check_like(vector, self.params, "vector")
        return _only([linearization.jvp(vector) for linearization in self._stored("jacobian_product")])

    def jacobian_transpose_product(self, vector: PyTree) -> PyTree:
        """J^T u, summed over the examples; u is shaped like ``outputs``."""
        stored = self._stored("jacobian_transpose_product")
        parts = (vector,) if len(stored) == 1 else vector
        results = [lin.transpose(part)[0] for lin, part in zip(stored, parts, strict=True)]
        return functools.reduce(trees.add, results)

    def accumulate(self, function: Callable[[Piece], PyTree], extras: tuple[PyTree, ...] | None = None) -> PyTree:
        """The sum of ``function(piece)`` over all terms and, where the point works in chunks, over their chunks.

        Everything additive over examples goes through here, and is therefore independent of the chunk size.

        Args:
            function: From a ``Piece`` to a pytree of arrays.
            extras: For each term a pytree whose leaves have the examples on axis 0, handed on as ``piece.extra``.
        """
        if self.chunk_size is None:
            parts = [function(piece) for piece in self.pieces(extras)]
        else:
            parts = [self._chunked(index, function, extra) for index, extra in enumerate(self._extras(extras))]
        return functools.reduce(trees.add, parts)

    def pieces(self, extras: tuple[PyTree, ...] | None = None) -> list[Piece]:
        """One piece for each term; for points that hold the whole batch."""
        data = zip(self.objective.terms, self.cases, self._stored("pieces"), self._extras(extras), strict=True)
        return [
            _piece(term, cases.inputs, cases.targets, cases.scale, stored, extra) for term, cases, stored, extra in data
        ]

    def num_examples(self, index: int) -> int:
        """How many examples the term of that index has."""
        if self.linearizations is not None:
            return jax.tree.leaves(self.linearizations[index].outputs)[0].shape[0]
        located = jax.tree.leaves(self._axes(index, (self.cases[index].inputs, self.cases[index].targets)))
        shapes = [(leaf.shape, axis) for leaf, axis in located if axis is not None]
        lengths = {shape[axis] if axis < len(shape) else -1 for shape, axis in shapes}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                "cannot cut the batch into chunks: its leaves and their example axes are"
                f" {', '.join(f'{shape} axis {axis}' for shape, axis in shapes)}, which do not agree on a number of"
                " examples; say in example_axes where the examples are (None for what they share)"
            )
        return int(lengths.pop())

    def _chunked(self, index, function, extra):
        term, cases, size = self.objective.terms[index], self.cases[index], self.chunk_size
        assert size is not None
        count = self.num_examples(index)

        def chunk(start, length):
            def cut(leaf, axis):
                return leaf if axis is None else jax.lax.dynamic_slice_in_dim(leaf, start, length, axis)

            located = self._axes(index, (cases.inputs, cases.targets))
            inputs, targets = jax.tree.map(lambda pair: cut(*pair), located, is_leaf=_is_located)
            scale = cut(cases.scale, 0 if cases.scale.ndim else None)
            linearization, _ = linearize_term(term, self.params, inputs)
            extra_cut = jax.tree.map(lambda leaf: cut(leaf, 0), extra)
            return function(_piece(term, inputs, targets, scale, linearization, extra_cut))

        whole, rest = divmod(count, size)
        parts = []
        if whole:
            zeros = trees.zeros_like(jax.eval_shape(lambda: chunk(0, size)))
            starts = jnp.arange(whole) * size
            parts.append(jax.lax.scan(lambda total, s: (trees.add(total, chunk(s, size)), None), zeros, starts)[0])
        if rest:
            parts.append(chunk(whole * size, rest))
        return parts[0] if len(parts) == 1 else trees.add(*parts)

    def _axes(self, index, data):
        """``data`` with every leaf made a pair (leaf, example axis or None)."""
        axes = self.objective.terms[index].example_axes
        try:
            return jax.tree.map(
                lambda axis, part: jax.tree.map(lambda leaf: _Located((leaf, axis)), part),
                axes,
                data,
                is_leaf=lambda axis: axis is None,
            )
        except ValueError as error:
            raise ValueError(f"example_axes {axes!r} is not a prefix of (inputs, targets): {error}") from None

    def _extras(self, extras):
        return (None,) * len(self.objective.terms) if extras is None else extras

    def _stored(self, what):
        if self.linearizations is None:
            raise ValueError(f"{what} needs the whole batch in memory: linearize without chunk_size")
        return self.linearizations


class _Located(tuple):
    """A leaf and its example axis, a leaf of its own to jax because it is no plain tuple."""


def _is_located(node):
    return isinstance(node, _Located)


def linearize_term(term: Term, params: PyTree, inputs: PyTree) -> tuple[Linearization, PyTree]:
    """The linearisation of one term, and the model's auxiliary outputs."""
    outputs, jvp, aux = jax.linearize(lambda p: term.apply(p, inputs), params, has_aux=True)
    return Linearization(outputs, jvp, jax.linear_transpose(jvp, params)), aux


def _piece(term, inputs, targets, scale, linearization, extra):
    def value_at(params):
        outputs, _ = term.apply(params, inputs)
        return weighted_sum(scale, term.loss.value(outputs, targets))

    def gradient_at(params):
        # Not by differentiating ``value_at``: the loss of a case that is left out may be infinite.
        outputs, transpose = jax.vjp(lambda p: term.apply(p, inputs)[0], params)
        return transpose(scale_cases(scale, term.loss.gradient(outputs, targets)))[0]

    outputs, jvp, transpose = linearization
    return Piece(term.loss, outputs, targets, scale, jvp, lambda u: transpose(u)[0], value_at, gradient_at, extra)


def _only(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)
