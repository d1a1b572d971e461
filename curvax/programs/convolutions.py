"""Convolutions in the one form that XLA runs fast in loops on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from curvax.programs.walk import apply_equation, called_program, equations, is_scan, rematerialised, scan_parts, walk


def fast_in_loops(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """The same function, with its convolutions written as XLA's fast kernel takes them, between transpositions.

    On a CPU, XLA hands a convolution to its fast kernel only where examples come first and channels last, and puts
    others into that form everywhere but in the bodies of loops. There a product with J^T of a convolutional network,
    whose convolutions have images and channels exchanged, takes twenty to eighty times as long as it does outside, and
    solvers are loops. Elsewhere, and for functions without convolutions, the function stays as it is.

    Args:
        function: A pytree, as of ``jax.linearize``.
        arguments: What it takes, or shapes.
    """
    if jax.default_backend() != "cpu" or not any(map(_is_convolution, equations(jax.make_jaxpr(function)(*arguments)))):
        return function
    return _Canonical(function)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Canonical:
    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(self.function, return_shape=True)(*arguments)
        results = walk(program, jax.tree.leaves(arguments), _handle)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _handle(site, inputs):
    eqn = site.eqn
    if _is_convolution(eqn):
        return [_convolve(eqn, *inputs)]
    body = scan_parts(eqn).body if is_scan(eqn) else called_program(eqn)
    if body is None or not any(map(_is_convolution, equations(body))):
        return apply_equation(site.program, eqn, *inputs)
    if is_scan(eqn):
        return _scan(eqn, inputs)
    return list(rematerialised(eqn, lambda *values: walk(body, values, _handle))(*inputs))


def _scan(eqn, inputs: Sequence[Any]) -> list[Any]:
    parts = scan_parts(eqn)
    consts, carry, scanned = parts.operands(inputs)

    def step(carry, scanned):
        return parts.results(walk(parts.body, [*consts, *carry, *scanned], _handle))

    carry, stacked = parts.run(step, carry, scanned)
    return [*carry, *stacked]


def _convolve(eqn, images: jax.Array, kernels: jax.Array) -> jax.Array:
    params = eqn.params
    sides = params["dimension_numbers"]
    batch, channels, *across = sides.lhs_spec
    outputs, inputs, *kernel = sides.rhs_spec
    first, last, *result = sides.out_spec
    rank = len(across)
    last_channels, kernel_first = (0, rank + 1, *range(1, rank + 1)), (rank + 1, rank, *range(rank))
    canonical = jax.lax.ConvDimensionNumbers(last_channels, kernel_first, last_channels)
    images = jnp.transpose(images, (batch, *across, channels))
    kernels = jnp.transpose(kernels, (*kernel, inputs, outputs))
    convolved = eqn.primitive.bind(images, kernels, **params | {"dimension_numbers": canonical})
    return jnp.transpose(convolved, np.argsort((first, *result, last)).tolist())


def _is_convolution(eqn) -> bool:
    return eqn.primitive.name == "conv_general_dilated"
