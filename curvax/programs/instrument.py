"""Evaluates the program of a model with every use tapped: its input goes out, a perturbation of its output comes in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from curvax.programs.uses import Use
from curvax.programs.views import value
from curvax.programs.walk import Address, apply_equation, inner_program, is_scan, rematerialised, scan_parts, walk
from curvax.types import Array


def evaluate(
    program: ClosedJaxpr,
    arguments: Sequence[Any],
    uses: Sequence[Use],
    perturbations: Sequence[Any],
    given: Sequence[Address] = (),
    perturb: Callable[[Array, Array], Array] | None = None,
) -> tuple[list[Any], list[Any], list[Any], dict[Address, Any]]:
    """The results of a program, the input and output of each use, and further operands.

    Only programs that hold uses are entered; every other equation is evaluated as it is, with its custom rules, remat,
    sharding and calls.

    Args:
        perturbations: For each use an array of the shape of its output (behind the axes of the scans around it), or
            None. It counts as zero: only derivatives with respect to it have a meaning.
        given: The places of further operands to return, see ``Given``.
        perturb: How the result of a use and its perturbation go together: ``perturbed`` if None, of which derivatives
            of first order alone exist; ``jnp.add``, which stores them, for all orders; or ``detached``.

    Returns:
        ``(results, inputs, outputs, operands)``, stacked over the scans around the uses; the input of a use is the
        other operand, and None where the use has none.
    """
    tapper = _Tapper(arguments, uses, given, perturbed if perturb is None else perturb)
    results, found = tapper.run(program, arguments, dict(enumerate(perturbations)))
    inputs, outputs = [found.get(index) for index in range(len(uses))], [found[~index] for index in range(len(uses))]
    return results, inputs, outputs, {place: found[i] for i, place in enumerate(given, len(uses))}


@jax.custom_jvp
def perturbed(value: Array, perturbation: Array) -> Array:
    """``value + perturbation`` for a perturbation that is zero, which is therefore never read or stored."""
    del perturbation
    return value


@perturbed.defjvp
def _perturbed_jvp(primals, tangents):
    value, _ = primals
    return value, tangents[0] + tangents[1]


def detached(value: Array, perturbation: Array) -> Array:
    """``value + perturbation`` as a function of the perturbation alone: what comes before the use counts as constant.

    Then derivatives in the perturbations of all uses at once are those of the pieces between one use and the next.
    """
    return jax.lax.stop_gradient(value) + perturbation


class _Tapper:
    """Runs programs; what it finds is under the index of a use its input, under the index's complement its output.

    The indices behind those of the uses are of the further operands.
    """

    def __init__(self, leaves: Sequence[Any], uses: Sequence[Use], given: Sequence[Address], perturb: Callable):
        self.leaves, self.uses, self.perturb = leaves, uses, perturb
        self.at_results: dict[Address, list[int]] = defaultdict(list)
        self.at_operands: dict[Address, list[tuple[int, int]]] = defaultdict(list)
        self.places = [use.address if use.side is not None else use.address[:-1] for use in uses]
        for index, (use, place) in enumerate(zip(uses, self.places, strict=True)):
            if use.side is not None:
                self.at_results[place].append(index)
            else:
                self.at_operands[place].append((~index, use.address[-1]))
        for index, place in enumerate(given, len(uses)):
            self.at_operands[place[:-1]].append((index, place[-1]))
        tapped = (*self.at_results, *self.at_operands)
        self.entered = {address[:depth] for address in tapped for depth in range(1, len(address))}

    def run(self, program, arguments, eps, address=()):
        """(results, what was found) with the perturbations of the uses inside, by index."""
        found: dict[int, Any] = {}

        def handle(site, values):
            for key, operand in self.at_operands.get(site.address, ()):
                found[key] = values[operand]
                if eps.get(~key) is not None:
                    values[operand] = self.perturb(values[operand], eps[~key])
            if site.address in self.entered:
                results, inner = self.enter(site, values, eps)
                found.update(inner)
            else:
                results = apply_equation(site.program, site.eqn, *values)
            for index in self.at_results.get(site.address, ()):
                if self.uses[index].kind != "shift":
                    found[index] = self.input_of(self.uses[index], values)
                found[~index] = results[0]
                if eps.get(index) is not None:
                    results = [self.perturb(results[0], eps[index])]
            return results

        return walk(program, arguments, handle, address=address), found

    def input_of(self, use, values):
        """What the parameter is multiplied with: data, and other parameters that came with it."""
        result = values[1 - use.side]
        for factor in use.cofactors:
            result = result * value(factor, self.leaves)
        return result

    def enter(self, site, values, eps):
        depth = len(site.address)
        own = {i: e for i, e in eps.items() if len(self.places[i]) > depth and self.places[i][:depth] == site.address}
        if is_scan(site.eqn):
            return self.scan(site, values, own)

        def call(values, own):
            return self.run(inner_program(site.eqn), values, own, site.address)

        return rematerialised(site.eqn, call)(values, own)

    def scan(self, site, values, eps):
        parts = scan_parts(site.eqn)
        consts, carry, xs = parts.operands(values)

        def step(carry, scanned):
            elements, eps = scanned
            results, found = self.run(parts.body, [*consts, *carry, *elements], eps, site.address)
            carry, ys = parts.results(results)
            return carry, (ys, found)

        out, (ys, found) = parts.run(step, carry, (xs, eps))
        return [*out, *ys], found
