"""Evaluates the program of a model with every use tapped: its input goes out, a perturbation of its output comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from curvax.programs.analysis import body_of
from curvax.programs.uses import Use
from curvax.programs.views import apply_equation

Array = jax.Array


def evaluate(
    program: ClosedJaxpr,
    arguments: Sequence[Any],
    uses: Sequence[Use],
    perturbations: Sequence[Any],
    through_custom_rules: bool = False,
    given: Sequence[tuple[int, ...]] = (),
    every_order: bool = False,
) -> tuple[list[Any], list[Any], dict[tuple[int, ...], Any]]:
    """The results of a program, the input of each use, and further operands.

    Only programs that hold uses are entered; every other equation is evaluated as it is, with its custom rules, remat,
    sharding and calls.

    Args:
        program: The program, as it was analysed.
        arguments: Its arguments, flattened.
        uses: The uses to tap.
        perturbations: For each use an array of the shape of its output (behind the axes of the scans around it), or
            None. It counts as zero: only derivatives with respect to it have a meaning.
        through_custom_rules: As in ``analyse``.
        given: The places of further operands to return, see ``Given``.
        every_order: Whether the perturbations are added in earnest, which stores them, so that derivatives of all
            orders exist; else those of first order alone.

    Returns:
        ``(results, inputs, operands)``; the input of a use is the other operand, stacked over the scans around it, and
        None where the use has none.
    """
    results, found = _run(program, arguments, uses, perturbations, through_custom_rules, given, every_order)
    operands = {place: found[len(uses) + index] for index, place in enumerate(given)}
    return results, [found.get(index) for index in range(len(uses))], operands


def evaluate_outputs(
    program: ClosedJaxpr, arguments: Sequence[Any], uses: Sequence[Use], through_custom_rules: bool = False
) -> tuple[list[Any], list[Any]]:
    """The results of a program, and the output of each use, stacked over the scans around it."""
    results, found = _run(program, arguments, uses, [None] * len(uses), through_custom_rules, ())
    return results, [found[~index] for index in range(len(uses))]


def _run(program, arguments, uses, perturbations, through_custom_rules, given, every_order=False):
    tap = _Tapper(through_custom_rules, jnp.add if every_order else perturbed)
    entries = [(index, use, use.address, perturbations[index]) for index, use in enumerate(uses)]
    entries += [(len(uses) + index, None, place, None) for index, place in enumerate(given)]
    return tap.run(program.jaxpr, program.consts, list(arguments), entries)


@jax.custom_jvp
def perturbed(value: Array, perturbation: Array) -> Array:
    """``value + perturbation`` for a perturbation that is zero, which is therefore never read or stored."""
    del perturbation
    return value


@perturbed.defjvp
def _perturbed_jvp(primals, tangents):
    value, _ = primals
    return value, tangents[0] + tangents[1]


class _Tapper:
    def __init__(self, through_custom_rules, perturb):
        self.through, self.perturb = through_custom_rules, perturb

    def run(self, program: Jaxpr, consts, arguments, entries):
        """(results, what was found); ``entries`` are (index, use, rest of its address, perturbation).

        Found are under the index of a use its input, under the complement of the index its output.
        """
        environment: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
        environment.update(zip(program.invars, arguments, strict=True))
        found: dict[int, Any] = {}

        def read(atom):
            return atom.val if isinstance(atom, Literal) else environment[atom]

        for number, eqn in enumerate(program.eqns):
            here = [(i, use, rest[1:], eps) for i, use, rest, eps in entries if rest[0] == number]
            values = [read(atom) for atom in eqn.invars]
            at_operands = [
                entry for entry in here if (entry[1] is None or entry[1].side is None) and len(entry[2]) == 1
            ]
            for index, use, (operand,), eps in at_operands:
                if use is None:
                    found[index] = values[operand]
                    continue
                found[~index] = values[operand]
                if eps is not None:
                    values[operand] = self.perturb(values[operand], eps)
            rest_of_them = [entry for entry in here if entry not in at_operands]
            at_it = [entry for entry in rest_of_them if not entry[2]]
            inside = [entry for entry in rest_of_them if entry[2]]
            if inside:
                results, inputs = self.enter(eqn, values, inside)
                found.update(inputs)
            else:
                results = apply_equation(program, eqn, *values)
            for index, use, _, eps in at_it:
                if use.kind != "shift":
                    found[index] = values[1 - use.side]
                found[~index] = results[0]
                if eps is not None:
                    results = [self.perturb(results[0], eps)]
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars], found

    def enter(self, eqn, values, entries):
        if eqn.primitive.name == "scan":
            return self.scan(eqn, values, entries)
        body = body_of(eqn, self.through)
        assert body is not None
        eps = [entry[3] for entry in entries]

        def call(values, eps):
            inner = [(i, use, rest, e) for (i, use, rest, _), e in zip(entries, eps, strict=True)]
            return self.run(body.jaxpr, body.consts, values, inner)

        if eqn.primitive.name in ("remat2", "checkpoint", "remat"):
            call = jax.checkpoint(call, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return call(values, eps)

    def scan(self, eqn, values, entries):
        params = eqn.params
        body: ClosedJaxpr = params["jaxpr"]
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
        xs = values[num_consts + num_carry :]

        def step(carry, scanned):
            elements, eps = scanned
            inner = [(i, use, rest, e) for (i, use, rest, _), e in zip(entries, eps, strict=True)]
            results, inputs = self.run(body.jaxpr, body.consts, [*consts, *carry, *elements], inner)
            return results[:num_carry], (results[num_carry:], inputs)

        eps = [entry[3] for entry in entries]
        out, (ys, inputs) = jax.lax.scan(
            step,
            list(carry),
            (list(xs), eps),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*out, *ys], inputs
