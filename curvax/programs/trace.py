"""Traces the model of a term: at the shapes of a batch, or at two numbers of examples side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from curvax.objectives.term import Term
from curvax.types import PyTree


def trace_term(term: Term, params: PyTree, inputs: PyTree) -> tuple[ClosedJaxpr, Any, int]:
    """(program, structure of (outputs, aux), how many of its results are outputs) of a term's model."""
    treedef = jax.tree.structure(params)

    def flat(leaves, inputs):
        return term.apply(treedef.unflatten(leaves), inputs)

    program, shapes = jax.make_jaxpr(flat, return_shape=True)(jax.tree.leaves(params), inputs)
    return program, jax.tree.structure(shapes), len(jax.tree.leaves(shapes[0]))


class Twins(NamedTuple):
    """The same model traced at two numbers of examples: the axis in which shapes differ is that of the examples.

    Attributes:
        programs: The two programs.
        sizes: The two numbers of examples.
        num_outputs: How many results are outputs of the model; the rest are auxiliary.
    """

    programs: tuple[ClosedJaxpr, ClosedJaxpr]
    sizes: tuple[int, int]
    num_outputs: int


def trace_twins(term: Term, params: PyTree, inputs: PyTree) -> Twins:
    """Traces a term at two numbers of examples; ``inputs`` give the other shapes.

    The numbers are prime, so that no other axis is a multiple of them by chance. A model that wants a multiple of
    something, such as pairs or shards, gets primes times its own number.
    """
    axes = term.example_axes
    axes = axes[0] if isinstance(axes, (tuple, list)) else axes
    located = jax.tree.map(
        lambda axis, part: jax.tree.map(lambda leaf: _Located((leaf, axis)), part), axes, inputs, is_leaf=_is_none
    )
    sizes = {leaf.shape[axis] for leaf, axis in jax.tree.leaves(located) if axis is not None and leaf.ndim > axis}
    if len(sizes) != 1:
        raise ValueError(
            f"the leaves of the inputs have {sorted(sizes)} examples; say in example_axes where the examples are, and"
            " None for what they share"
        )
    (own,) = sizes
    structs = jax.eval_shape(lambda tree: tree, params)
    failure = None
    for numbers in (_PRIMES, tuple(own * prime for prime in _PRIMES)):
        try:
            first, second = (trace_term(term, structs, _with_examples(located, number)) for number in numbers)
        except Exception as error:
            failure = failure or error
        else:
            return Twins((first[0], second[0]), numbers, first[2])
    raise ValueError(
        f"the model cannot be traced with {_PRIMES[0]} examples, nor with {_PRIMES[0]} times its {own}, which shows"
        " where the examples are; does it hold an array or a number that only fits one size of the batch? Move it into"
        " the inputs"
    ) from failure


_PRIMES = (7, 11)


def _with_examples(located, number):
    def resized(pair):
        leaf, axis = pair
        if axis is None or leaf.ndim <= axis:
            return leaf
        return jax.ShapeDtypeStruct((*leaf.shape[:axis], number, *leaf.shape[axis + 1 :]), leaf.dtype)

    return jax.tree.map(resized, located, is_leaf=lambda node: isinstance(node, _Located))


class _Located(tuple):
    """A leaf and its example axis."""


def _is_none(node):
    return node is None
