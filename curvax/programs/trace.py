"""Traces the model of a term: at the shapes of a batch, or at two numbers of examples side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from curvax import trees
from curvax.types import PyTree

if TYPE_CHECKING:
    from curvax.objectives.term import Term


def trace_term(term: Term, params: PyTree, inputs: PyTree) -> tuple[ClosedJaxpr, Any, int]:
    """(program, structure of (outputs, aux), how many of its results are outputs) of a term's model.

    The program takes what ``program_arguments`` gives: flags and strings among the inputs are read while it is traced.
    """
    treedef = jax.tree.structure(params)
    arrays, rebuild = trees.split_arrays(inputs)

    def flat(leaves, arrays):
        return term.apply(treedef.unflatten(leaves), rebuild(arrays))

    program, shapes = jax.make_jaxpr(flat, return_shape=True)(jax.tree.leaves(params), arrays)
    return program, jax.tree.structure(shapes), len(jax.tree.leaves(shapes[0]))


def program_arguments(params: PyTree, inputs: PyTree) -> list[Any]:
    """What the program of ``trace_term`` is to be run on: leaves of the parameters, then the arrays of the inputs."""
    return [*jax.tree.leaves(params), *trees.split_arrays(inputs)[0]]


class Twins(NamedTuple):
    """The same model traced at two numbers of examples: the axis in which shapes differ is that of the examples."""

    programs: tuple[ClosedJaxpr, ClosedJaxpr]
    sizes: tuple[int, int]
    num_outputs: int  # of the results; the rest are auxiliary


def trace_twins(term: Term, params: PyTree, inputs: PyTree) -> Twins:
    """Traces a term at two numbers of examples; ``inputs`` give the other shapes.

    The numbers are prime, so that no other axis is a multiple of them by chance. A model that wants a multiple of
    something, such as pairs or shards, gets primes times its own number.
    """
    axes = term.example_axes
    axes = axes[0] if isinstance(axes, (tuple, list)) else axes
    leaves, treedef = jax.tree.flatten(inputs)
    axes = jax.tree.map(lambda axis: "shared" if axis is None else axis, axes, is_leaf=lambda node: node is None)
    each = jax.tree.leaves(jax.tree.broadcast(axes, inputs))
    axes = [
        None if axis == "shared" or not trees.is_array(leaf) or leaf.ndim <= axis else axis
        for leaf, axis in zip(leaves, each, strict=True)
    ]
    sizes = {leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None}
    if len(sizes) != 1:
        raise ValueError(
            f"the leaves of the inputs have {sorted(sizes)} examples; say in example_axes where the examples are, and"
            " None for what they share"
        )

    def with_examples(number):
        return treedef.unflatten(
            leaf
            if axis is None
            else jax.ShapeDtypeStruct((*leaf.shape[:axis], number, *leaf.shape[axis + 1 :]), leaf.dtype)
            for leaf, axis in zip(leaves, axes, strict=True)
        )

    (own,) = sizes
    structs = jax.eval_shape(lambda tree: tree, params)
    failure = None
    for numbers in (_PRIMES, tuple(own * prime for prime in _PRIMES)):
        try:
            first, second = (trace_term(term, structs, with_examples(number)) for number in numbers)
        except Exception as error:
            failure = failure or error
        else:
            return Twins((first[0], second[0]), numbers, first[2])
    raise ValueError(
        f"the model cannot be traced with {_PRIMES[0]} examples, nor with {_PRIMES[0]} times its {own}, which shows"
        " where the examples are; does it hold an array or a number that only fits one size of the batch? Move it into"
        " the inputs. Rows of a parameter that belong to examples are looked up by numbers among the inputs"
    ) from failure


_PRIMES = (7, 11)
