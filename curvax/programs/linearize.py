"""Linear maps of functions, also of those that have rules for reverse-mode differentiation alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from curvax.programs.convolutions import fast_in_loops
from curvax.programs.walk import DESCEND, called_program, equations, walk
from curvax.types import PyTree


class Linear(NamedTuple):
    """A function's value and derivative at one point.

    Attributes:
        jvp: (tangents of the arguments) -> J v, a pytree of its residuals.
        transpose: cotangent u of the value -> J^T u, one part for each argument; a pytree too.
        forward: Whether the function has rules for forward-mode differentiation.
        aux: What the function returns besides its value; None without ``has_aux``.
    """

    value: PyTree
    jvp: Callable[..., PyTree]
    transpose: Callable[[PyTree], tuple[PyTree, ...]]
    forward: bool
    aux: PyTree


def linearize(function: Callable[..., Any], *arguments: PyTree, has_aux: bool = False) -> Linear:
    """``jax.linearize`` with the transpose, for functions of which ``custom_vjp`` may give J^T alone.

    J v is then the transpose of J^T, by a pull back of the pull back: u -> J^T u is linear, so its own pull back of v,
    taken anywhere, is J v. That needs a backward rule that can be differentiated in reverse; whether it can is asked
    where J v is.
    """
    value, jvp, *aux = jax.linearize(function, *arguments, has_aux=has_aux)
    transpose = jax.linear_transpose(jvp, *arguments)
    forward = not any(eqn.primitive.name in _REVERSE_ONLY for eqn in equations(jax.make_jaxpr(jvp)(*arguments)))
    jvp = fast_in_loops(jvp, *arguments) if forward else _transposed(transpose, value)
    transpose = fast_in_loops(transpose, value)
    return Linear(value, jvp, transpose, forward, aux[0] if has_aux else None)


def is_affine(function: Callable[[Any], PyTree], argument: PyTree) -> bool:
    """Whether a function is seen to be affine: its derivative does not read the place where it is taken."""

    def derivative(argument, tangent):
        return jax.jvp(function, (argument,), (tangent,))[1]

    program = jax.make_jaxpr(derivative)(argument, argument)
    count = len(program.jaxpr.invars) // 2

    def handle(site, reads):
        return DESCEND if any(reads) and called_program(site.eqn, True) else [any(reads)] * len(site.eqn.outvars)

    return not any(walk(program, [True] * count + [False] * count, handle, lambda _: False))


_REVERSE_ONLY = frozenset({"custom_lin", "call_hi_primitive_linearized"})
"""What linear maps hold where a function has a rule for their transposes alone."""


def _transposed(transpose, value):
    try:
        return Partial(_first_of, jax.vjp(transpose, jax.tree.map(jnp.zeros_like, value))[1])
    except _REFUSALS as error:  # the gradient does not need it: said when J v is asked for
        return Partial(_Refusal(str(error)))


def _first_of(pull_back, *tangents):
    try:
        return pull_back(tangents)[0]
    except _REFUSALS as error:
        return _Refusal(str(error))()


_REFUSALS = (TypeError, ValueError, NotImplementedError)
"""What jax raises where it cannot differentiate in reverse, as through a loop of unknown length or a kernel."""


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """Stands for J v where neither a forward rule nor the transpose of the backward rule gives it."""

    reason: str

    def __call__(self, *_: Any):
        raise TypeError(
            "J v is needed of a function with a custom_vjp, which has no forward-mode rule, and whose backward rule"
            f" cannot be differentiated in reverse either ({self.reason.splitlines()[0]}). Give the function a"
            " custom_jvp, or write its backward rule with operations that have a transpose, such as jax.lax.scan or"
            " jax.lax.custom_linear_solve in place of jax.lax.while_loop"
        )
