"""What a method and its ``update`` are called with: checks whose errors say what to write instead."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from curvax.damping import BestOfThree, Damping, DampingRule, RadiusRule
from curvax.layers import Layers
from curvax.objectives.objective import Objective
from curvax.objectives.point import CurvaturePoint


def points_of(name, points, arguments):
    """Takes the points out of the arguments of ``update``."""
    own = {point: arguments.pop(point, None) for point in points}
    _check_arguments(name, points, arguments)
    if own["at"] is None:
        raise ValueError(
            f"{name}: update takes at=. Write\n"
            "    loss, grads, at = objective.value_and_grad(params, batch)\n"
            "    updates, state = tx.update(grads, state, params, at=at)\n"
            "or, with gradients of your own, at=objective.linearize(params, batch)"
        )
    for point, value in own.items():
        _check_point(name, point, value)
    _check_whole_batch(name)
    return own


def _check_point(name, argument, value):
    if value is not None and not isinstance(value, CurvaturePoint):
        raise TypeError(
            f"{name}: {argument}= takes a curvature point, the third result of objective.value_and_grad or"
            f" objective.linearize(params, batch), got {type(value).__name__}"
        )


def _check_whole_batch(name):
    """Raises a ValueError where a device sees its own part of the data alone, as inside ``shard_map`` and ``pmap``."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = sorted(repr(axis) for axis in mesh.manual_axes if mesh.shape[axis] > 1)
    if axes:
        raise ValueError(
            f"{name}: inside shard_map or pmap a device sees its part of the axis {', '.join(axes)} alone, and losses"
            " and curvature would be those of that part. Take the step under plain jax.jit, with the batch sharded by"
            " jax.device_put(batch, NamedSharding(mesh, PartitionSpec(axis))): it then equals that of one device. For a"
            " model of its own on each device vmap the step over parameters that are sharded"
        )


def _check_arguments(name, points, arguments):
    """Arguments of other names may be for another transformation of the chain, but not those that look like ours."""
    for argument, value in arguments.items():
        if argument in ("at", "curvature_at", "held_out_at"):  # of another method that takes it
            _check_point(name, argument, value)
            continue
        near = difflib.get_close_matches(argument, points, n=1, cutoff=0.75)
        # A line search in the chain takes ``batch=`` and the like, for its ``value_fn``.
        stale = argument in ("objective", "batch", "held_out") and "value_fn" not in arguments
        if isinstance(value, CurvaturePoint) or stale or near:
            advice = f"; did you mean {near[0]}=?" if near else ""
            raise TypeError(
                f"{name}: update takes {', '.join(f'{point}=' for point in points)}, not {argument}={advice}"
            )


def check_arguments(method: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises a TypeError or ValueError for an argument that is not of the kind that the method's signature says.

    To be called first thing, with ``locals()``. Choices among names are left to the methods.
    """
    for argument, kinds in _kinds_of(method).items():
        what = f"{method.__name__}: {argument}="
        value: Any = arguments[argument]
        objects = [kind for kind in kinds if kind in _KINDS]
        if value is None and type(None) in kinds:
            continue
        if objects and not isinstance(value, tuple(objects)):
            raise TypeError(f"{what} takes {_KINDS[objects[0]]}, got {value!r}")
        if float in kinds and not (_is_number(value, jnp.number) or (callable(value) and not _is_ours(value))):
            schedule = " or a schedule" if any(get_origin(kind) is Callable for kind in kinds) else ""
            advice = "; the objective reaches a method by update's at=" if _is_ours(value) else ""
            raise TypeError(f"{what} takes a number{schedule}, got {value!r}{advice}")
        if int in kinds and argument != "seed" and not callable(value):
            whole = _is_number(value, jnp.integer)
            if not whole or (not isinstance(value, jax.Array) and cast(Any, value) < 1):
                error = ValueError if _is_number(value, jnp.number) else TypeError
                raise error(f"{what} must be a positive integer, got {value!r}")


_KINDS: dict[Any, str] = {
    Damping: "a damping matrix such as curvax.damping.tikhonov(), whose strength is another argument of the method",
    DampingRule: "a rule such as curvax.damping.DampingRule(); the number that it begins with is another argument",
    RadiusRule: "a rule such as curvax.damping.RadiusRule(); the radius that it begins with is initial_radius=",
    BestOfThree: "a rule such as curvax.damping.BestOfThree()",
    Layers: "what curvax.find_layers(objective, params, batch) returns",
    optax.GradientTransformation: "an optax transformation such as optax.sgd(0.1)",
}


@functools.cache
def _kinds_of(method):
    hints = get_type_hints(method)
    return {name: get_args(hint) or (hint,) for name, hint in hints.items() if name != "return"}


def _is_number(value, kind):
    """Whether it is one number of that kind, perhaps traced."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        return False
    return jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), kind)


def _is_ours(value):
    return isinstance(value, (Objective, CurvaturePoint))


def static_count(name: str, argument: str, value: Any, default: int) -> int:
    """A count that decides shapes: ``default`` if None, else a positive Python integer."""
    if value is None:
        return default
    if isinstance(value, Tracer) or callable(value):
        raise TypeError(
            f"{name}: {argument} decides shapes and cannot be traced or scheduled; under optax.inject_hyperparams name"
            f" it in static_args"
        )
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name}: {argument} must be a positive integer, got {value!r}")
    return int(value)


def part_of(name, argument, value, at, offset, *, most, least, cases=1):
    """The part of a batch for products with its curvature, by ``stride_of``.

    Where a chunk has fewer than ``least`` examples it is the whole, chunk by chunk: what follows from the curvature of
    fewer examples than it has directions is too long a step.
    """
    if value is None and at.chunk_size is not None and at.chunk_size < least:
        return at
    return at.subset(stride_of(name, argument, value, at, most=most, least=least, cases=cases), offset)


def stride_of(name, argument, value, at, *, most, least, cases=1):
    """The stride of a part of a batch: the one given, or the largest up to ``most`` that leaves ``least`` cases.

    Of a point in chunks so large that the part is no more than one of them. Where inputs are not laid out by the
    examples of the loss, as with steps of sequences that are folded into them, the whole.

    Args:
        cases: How many cases each example is. Those of one example are alike, so ``FEWEST`` examples are left.
    """
    if value is None and not at.has_parts:
        return 1
    count = min(at.num_examples(index) for index in range(len(at.terms)))
    chunks = 1 if at.chunk_size is None else -(-count // at.chunk_size)
    stride = max(1, min(most, cases * count // least, count // FEWEST), chunks)
    return static_count(name, argument, value, stride)


FEWEST = 8
"""So many examples at least stand for a batch, however many cases each is."""


def cases_per_example(layers: Layers, at: CurvaturePoint) -> int:
    """How many cases each example is to every Kronecker factor and to the loss: steps of a sequence.

    More than one where every layer reads several positions and each has a loss of its own, as in a model of language.
    A head that reads one vector for each example, as of a classifier of images, makes it one. So does what hides how
    many there are: weights and masks over steps, a loss without a value, points in chunks.
    """
    shared = [block.weights.shared for block in layers.treatment.kronecker]
    hidden = any(cases.scale.ndim > 1 for cases in at.cases) or not all(term.loss.has_value for term in at.terms)
    if hidden or at.linearizations is None or not shared:
        return 1

    def of_loss(term, linearization, cases):
        value = jax.eval_shape(term.loss.value, linearization.outputs, cases.targets)
        # Of the axes that a loss may keep the last of the outputs has the features of one case.
        last = min(leaf.ndim for leaf in jax.tree.leaves(linearization.outputs)) - 1
        return math.prod(value.shape[1:last])

    return min([*map(of_loss, at.terms, at.linearizations, at.cases), *shared])
