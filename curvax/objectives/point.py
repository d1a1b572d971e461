"""The curvature point: one linearisation of an objective, from which gradient and curvature matrices are read off."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass, register_pytree_node_class

from curvax import trees
from curvax.objectives.loss import OutputLoss
from curvax.objectives.penalty import Penalty
from curvax.objectives.term import Term, located_examples, scale_cases, weighted_sum, weighting
from curvax.programs.linearize import linearize
from curvax.types import PyTree


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CurvaturePoint:
    """An objective linearised at (params, batch); made by ``Objective.linearize`` and ``Objective.value_and_grad``.

    It carries model and data, so it is all that curvature matrices, taps and transformations take. A pytree: it passes
    through ``jit``, ``cond`` and optax's extra arguments, also inside wrappers that hide leaves of the parameters or
    take the containers of pytrees apart. Crossing a ``jit`` boundary again and again does not retrace.

    Attributes:
        cases: For each term its inputs, targets and weighting.
        linearizations: For each term its outputs, J and J^T; None where the point works in chunks.
        chunk_size: Examples in a chunk, or None.
    """

    terms: tuple[Term, ...]
    penalty: Penalty
    packed_params: Packed
    cases: tuple[Cases, ...]
    linearizations: tuple[Linearization, ...] | None
    packed_aux: tuple[Packed, ...]
    chunk_size: int | None = dataclasses.field(metadata={"static": True})

    @property
    def params(self) -> PyTree:
        """theta."""
        return self.packed_params.tree

    @property
    def aux(self) -> PyTree:
        """The model's auxiliary outputs, a tuple over terms if there are several; None for a point in chunks."""
        return _only([packed.tree for packed in self.packed_aux]) if self.packed_aux else None

    @property
    def outputs(self) -> PyTree:
        """The model's outputs z, a tuple over terms if there are several."""
        return _only([trees.join_complex(linearization.outputs) for linearization in self.stored("outputs")])

    @property
    def loss(self) -> jax.Array:
        """The scalar loss h(theta)."""
        data = self.accumulate(lambda p: weighted_sum(p.scale, p.loss.value(p.outputs, p.targets)))
        return trees.add(data, self.penalty.value(self.params))

    @property
    def loss_is_nonnegative(self) -> bool | jax.Array:
        """Whether the loss is known not to be below zero: no term's loss is, and no case has a negative factor."""
        if not all(term.loss.nonnegative and term.loss.has_value for term in self.terms):
            return False
        return functools.reduce(jnp.logical_and, [jnp.all(cases.scale >= 0) for cases in self.cases])

    def loss_at(self, params: PyTree) -> jax.Array:
        """The loss at other parameters on the same batch, by one forward pass."""
        return trees.add(self.accumulate(lambda piece: piece.value_at(params)), self.penalty.value(params))

    def gradient_at(self, params: PyTree) -> PyTree:
        """The gradient at other parameters on the same batch, by one forward and one backward pass."""
        data = self.accumulate(lambda piece: piece.gradient_at(params))
        return trees.add(data, self.penalty.gradient(params)) if self.penalty else data

    def loss_along(self, step: PyTree) -> jax.Array:
        """h(theta + delta) for a delta that has all or some of the leaves of the parameters."""
        return self.loss_at(trees.add(self.params, trees.embed(step, self.params)))

    def value_and_gradient(self) -> tuple[jax.Array, PyTree]:
        """The loss and its gradient, from the linearisation that is there."""

        def one(piece):
            value = weighted_sum(piece.scale, piece.loss.value(piece.outputs, piece.targets))
            cotangent = scale_cases(piece.scale, piece.loss.gradient(piece.outputs, piece.targets))
            return value, piece.transpose(cotangent)

        value, gradient = self.accumulate(one)
        if self.penalty:
            value = trees.add(value, self.penalty.value(self.params))
            gradient = trees.add(gradient, self.penalty.gradient(self.params))
        return value, gradient

    def with_gradient(self, gradient: PyTree) -> CurvaturePoint:
        """This point, which knows its gradient when it meets it again (``is_gradient``)."""
        # Not a field: it is not to be carried through programs, only to be known within one.
        at = dataclasses.replace(self)
        object.__setattr__(at, "_gradient", tuple(jax.tree.leaves(gradient)))
        return at

    def is_gradient(self, updates: PyTree) -> bool:
        """Whether updates are the gradient that came with this point, nothing having been done to it in between.

        They are compared as objects, so False is no statement; it is what is said wherever point or gradient have
        crossed the border of a program.
        """
        own, leaves = getattr(self, "_gradient", ()), jax.tree.leaves(updates)
        return len(own) == len(leaves) > 0 and all(x is y for x, y in zip(own, leaves, strict=True))

    def jacobian_product(self, vector: PyTree) -> PyTree:
        """J v: the change of the outputs along v, a pytree like ``params``. A tuple over terms if there are several."""
        trees.check_like(vector, self.params, "vector")
        leaves = tuple(jax.tree.leaves(vector))
        return _only([trees.join_complex(linear.jvp(leaves)) for linear in self.stored("jacobian_product")])

    def jacobian_transpose_product(self, vector: PyTree) -> PyTree:
        """J^T u, summed over the examples; u is shaped like ``outputs``. Where these are complex, Re J^H u.

        Raises:
            TypeError: u is complex where the outputs are real.
        """
        stored = self.stored("jacobian_transpose_product")
        parts = (vector,) if len(stored) == 1 else vector
        cotangents = trees.split_complex(trees.complex_like(parts, tuple(linear.outputs for linear in stored)))
        results = [linear.transpose(part)[0] for linear, part in zip(stored, cotangents, strict=True)]
        return self.packed_params.unpack(functools.reduce(trees.add, results))

    def accumulate(self, function: Callable[[Piece], PyTree], extras: tuple[PyTree, ...] | None = None) -> PyTree:
        """The sum of ``function(piece)`` over all terms and, where the point works in chunks, over their chunks.

        Everything additive over examples goes through here, and is therefore independent of the chunk size. ``extras``
        are for each term a pytree with the examples on axis 0, handed on as ``piece.extra``.
        """
        if self.chunk_size is None:
            parts = [function(piece) for piece in self.pieces(extras)]
        else:
            given = (None,) * len(self.terms) if extras is None else extras
            parts = [self._chunked(index, function, extra) for index, extra in enumerate(given)]
        return functools.reduce(trees.add, parts)

    def pieces(self, extras: tuple[PyTree, ...] | None = None) -> list[Piece]:
        """One piece for each term; for points that hold the whole batch."""
        stored = self.stored("pieces")
        given = (None,) * len(self.terms) if extras is None else extras
        return [
            _piece(term, self.packed_params, cases.inputs, cases.targets, cases.scale, linearization, extra)
            for term, cases, linearization, extra in zip(self.terms, self.cases, stored, given, strict=True)
        ]

    def num_examples(self, index: int) -> int:
        """How many examples the term of that index has."""
        if self.linearizations is not None:
            return jax.tree.leaves(self.linearizations[index].outputs)[0].shape[0]
        located = located_examples(self.terms[index], (self.cases[index].inputs, self.cases[index].targets))
        shapes = [(leaf.shape, axis) for leaf, axis in jax.tree.leaves(located) if axis is not None]
        lengths = {shape[axis] if axis < len(shape) else -1 for shape, axis in shapes}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                "cannot cut the batch into chunks: its leaves and their example axes are"
                f" {', '.join(f'{shape} axis {axis}' for shape, axis in shapes)}, which do not agree on a number of"
                " examples; say in example_axes where the examples are (None for what they share)"
            )
        return int(lengths.pop())

    @property
    def has_parts(self) -> bool:
        """Whether every leaf of the data has the examples of the loss where ``example_axes`` says, for ``subset``."""
        if self.chunk_size is not None:
            return True

        def fits(leaf, axis, count):
            return axis is None or (axis < jnp.ndim(leaf) and jnp.shape(leaf)[axis] == count)

        parts = enumerate(zip(self.terms, self.cases, strict=True))
        return all(
            fits(leaf, axis, self.num_examples(index))
            for index, (term, whole) in parts
            for leaf, axis in jax.tree.leaves(located_examples(term, (whole.inputs, whole.targets)))
        )

    def subset(self, stride: int, offset: Any = 0) -> CurvaturePoint:
        """The point on every ``stride``-th example, from number ``offset`` (mod ``stride``, may be traced) on.

        Examples a stride apart, so that a sharded batch gives some of every shard; of a number that the stride does not
        divide the rest is left out. Factors of cases grow so that they add up as before; where all that would be taken
        are masked, the offset with the most weight takes the place of the one that is given. The model is linearised
        anew, in one piece.
        """
        if stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        if stride == 1 and self.chunk_size is None:
            return self
        cases, linearizations, aux = [], [], []
        for index, (term, whole) in enumerate(zip(self.terms, self.cases, strict=True)):
            count = self.num_examples(index)
            located = located_examples(term, (whole.inputs, whole.targets))
            step = _stride_of_shards(min(stride, count), jax.tree.leaves(located))
            start = jnp.asarray(offset) % step
            if whole.scale.ndim:
                rows = jnp.abs(whole.scale[: count // step * step])
                held = jnp.sum(rows.reshape(count // step, step, -1), axis=(0, 2))
                start = jnp.where(held[start] > 0, start, jnp.argmax(held).astype(start.dtype))

            def cut(leaf, axis, count=count, step=step, start=start):
                if axis is None:
                    return leaf
                if axis >= jnp.ndim(leaf) or jnp.shape(leaf)[axis] != count:
                    raise ValueError(
                        f"cannot take some of the {count} examples of a leaf of shape {jnp.shape(leaf)} along axis"
                        f" {axis}; say in example_axes where the examples are (None for what they share), or take all"
                        " of them, by a stride of 1"
                    )
                kept = jax.lax.slice_in_dim(leaf, 0, count // step * step, axis=axis)
                kept = kept.reshape(*kept.shape[:axis], count // step, step, *kept.shape[axis + 1 :])
                return jax.lax.dynamic_index_in_dim(kept, start, axis + 1, keepdims=False)

            inputs, targets = jax.tree.map(lambda pair: cut(*pair), located)
            scale, num_cases = whole.scale, whole.num_cases
            if scale.ndim:
                own = cut(scale, 0)
                total, part = jnp.sum(scale), jnp.sum(own)
                ratio = jnp.where(part == 0, 0, total / jnp.where(part == 0, 1, part))
            else:
                own, ratio = scale, jnp.asarray(count / (count // step), scale.dtype)
            linearization, term_aux = linearize_term(term, self.packed_params, inputs)
            share = count // step / count
            cases.append(Cases(Packed.of((inputs, targets)), own * ratio, num_cases * share))
            linearizations.append(linearization)
            aux.append(Packed.of(term_aux))
        return dataclasses.replace(
            self,
            cases=tuple(cases),
            linearizations=tuple(linearizations),
            packed_aux=tuple(aux),
            chunk_size=None,
        )

    def definite(self) -> CurvaturePoint:
        """This point with the absolute values of the cases' factors, for what a matrix with a root is needed for."""
        return dataclasses.replace(
            self, cases=tuple(dataclasses.replace(cases, scale=jnp.abs(cases.scale)) for cases in self.cases)
        )

    def stored(self, what: str) -> tuple[Linearization, ...]:
        """The linearisations, for ``what`` cannot do without."""
        if self.linearizations is None:
            raise ValueError(f"{what} needs the whole batch in memory: linearize without chunk_size")
        return self.linearizations

    def _chunked(self, index, function, extra):
        term, cases, size = self.terms[index], self.cases[index], self.chunk_size
        assert size is not None
        count = self.num_examples(index)
        located = located_examples(term, (cases.inputs, cases.targets))

        def chunk(start, length):
            def cut(leaf, axis):
                return leaf if axis is None else jax.lax.dynamic_slice_in_dim(leaf, start, length, axis)

            inputs, targets = jax.tree.map(lambda pair: cut(*pair), located)
            scale = cut(cases.scale, 0 if cases.scale.ndim else None)
            linearization, _ = linearize_term(term, self.packed_params, inputs)
            extra_cut = jax.tree.map(lambda leaf: cut(leaf, 0), extra)
            return function(_piece(term, self.packed_params, inputs, targets, scale, linearization, extra_cut))

        whole, rest = divmod(count, size)
        parts = []
        if whole:
            zeros = trees.zeros_like(jax.eval_shape(lambda: chunk(0, size)))
            starts = jnp.arange(whole) * size
            parts.append(jax.lax.scan(lambda total, s: (trees.add(total, chunk(s, size)), None), zeros, starts)[0])
        if rest:
            parts.append(chunk(whole * size, rest))
        return parts[0] if len(parts) == 1 else trees.add(*parts)


@register_pytree_node_class
class Packed:
    """A pytree as the flat tuple of its leaves, its containers hidden in the structure.

    Some frameworks take containers of the pytrees handed to them apart: ``nnx.Optimizer.update`` takes flax's
    ``Param`` off every leaf. Packed, there is nothing for them to find.
    """

    def __init__(self, leaves: tuple[Any, ...], treedef: Any):
        self.leaves, self.treedef = leaves, treedef

    @classmethod
    def of(cls, tree: PyTree) -> Packed:
        """The tree, packed."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(tuple(leaves), treedef)

    @property
    def tree(self) -> PyTree:
        """The tree."""
        return self.treedef.unflatten(self.leaves)

    def unpack(self, leaves: Any) -> PyTree:
        """Other leaves in the containers of this tree."""
        return self.treedef.unflatten(leaves)

    def tree_flatten(self):
        return self.leaves, self.treedef

    @classmethod
    def tree_unflatten(cls, treedef, leaves):
        return cls(tuple(leaves), treedef)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cases:
    """A term's part of the batch: inputs and targets, the factor of each case's loss, and how many cases."""

    packed: Packed
    scale: jax.Array
    num_cases: jax.Array

    @property
    def inputs(self) -> PyTree:
        """What the model is given."""
        return self.packed.tree[0]

    @property
    def targets(self) -> PyTree:
        """What the loss is given."""
        return self.packed.tree[1]


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Linearization:
    """A term's outputs and the maps J and J^T at one point, as pytrees of their residuals.

    They act on the tuple of the leaves of the parameters, so that no container is part of them.

    Attributes:
        forward: Whether the model has rules for forward-mode differentiation.
    """

    outputs: PyTree
    jvp: Callable[[tuple[jax.Array, ...]], PyTree]
    transpose: Callable[[PyTree], tuple[tuple[jax.Array, ...]]]
    forward: bool = dataclasses.field(metadata={"static": True})


class Piece(NamedTuple):
    """What an accumulated quantity sees of one term, or of one chunk of it."""

    loss: OutputLoss
    outputs: PyTree
    targets: PyTree
    scale: jax.Array
    jvp: Callable[[PyTree], PyTree]
    transpose: Callable[[PyTree], PyTree]
    outputs_at: Callable[[PyTree], PyTree]
    value_at: Callable[[PyTree], jax.Array]
    gradient_at: Callable[[PyTree], PyTree]
    forward: bool
    extra: PyTree


def curvature_point(
    terms: tuple[Term, ...], penalty: Penalty, params: PyTree, batch: PyTree, chunk_size: int | None
) -> CurvaturePoint:
    """The point at (params, batch); see ``Objective.linearize``."""
    packed = Packed.of(params)
    cases, linearizations, aux = [], [], []
    for term in terms:
        inputs, targets = term.split(batch)
        if chunk_size is None:
            linearization, term_aux = linearize_term(term, packed, inputs)
            outputs = linearization.outputs
            linearizations.append(linearization)
            aux.append(Packed.of(term_aux))
        else:
            arrays, rebuild = trees.split_arrays(inputs)
            outputs = jax.eval_shape(lambda p, x, t=term, rebuild=rebuild: t.apply(p, rebuild(x))[0], params, arrays)
        scale, count = weighting(term, batch, outputs, targets)
        cases.append(Cases(Packed.of((inputs, targets)), scale, count))
    stored = tuple(linearizations) if chunk_size is None else None
    return CurvaturePoint(terms, penalty, packed, tuple(cases), stored, tuple(aux), chunk_size)


def linearize_term(term: Term, params: Packed, inputs: PyTree) -> tuple[Linearization, PyTree]:
    """The linearisation of one term, and the model's auxiliary outputs."""

    def outputs_of(leaves):
        return term.apply(params.unpack(leaves), inputs)

    outputs, jvp, transpose, forward, aux = linearize(outputs_of, params.leaves, has_aux=True)
    return Linearization(outputs, jvp, transpose, forward), aux


def _piece(term, packed, inputs, targets, scale, linearization, extra):
    def outputs_at(params):
        return term.apply(params, inputs)[0]

    def value_at(params):
        return weighted_sum(scale, term.loss.value(outputs_at(params), targets))

    def gradient_at(params):
        # Not by differentiating ``value_at``: the loss of a case that is left out may be infinite.
        outputs, transpose = jax.vjp(outputs_at, params)
        return transpose(scale_cases(scale, term.loss.gradient(outputs, targets)))[0]

    def along(vector):
        return linearization.jvp(tuple(jax.tree.leaves(vector)))

    def back(cotangent):
        return packed.unpack(linearization.transpose(cotangent)[0])

    outputs, forward = linearization.outputs, linearization.forward
    return Piece(term.loss, outputs, targets, scale, along, back, outputs_at, value_at, gradient_at, forward, extra)


def _stride_of_shards(stride, located):
    """The largest stride up to ``stride`` that takes as many examples of every shard where axes are sharded explicitly.

    An axis that is sharded can be split in two only where every shard can.
    """
    for leaf, axis in located:
        sharding = jax.typeof(leaf).sharding
        if axis is None or axis >= len(sharding.spec):
            continue
        names = sharding.spec[axis]
        for name in (names,) if isinstance(names, str) else names or ():
            while jnp.shape(leaf)[axis] % (sharding.mesh.shape[name] * stride):
                stride -= 1
    return stride


def _only(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)
