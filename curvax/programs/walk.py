"""The one walk through a program that all who read it share, and what equations hold that call other programs.

What a new JAX renames, which is primitives, their parameters, and how a loop lists its operands, is read in
this package alone; and by the shapes of what an equation takes and gives wherever they tell enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from curvax import trees

Address = tuple[int, ...]
"""The numbers of the equations that lead to one through the programs around it."""


class Site(NamedTuple):
    """An equation where it stands."""

    program: Jaxpr  # that holds it
    eqn: JaxprEqn
    address: Address
    where: str  # the calls around it, for people

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

    @property
    def path(self) -> str:
        """The calls around the equation and its own name."""
        name = self.eqn.params.get("name")
        title = str(name) if name and name not in ("<lambda>", "fn") else self.name
        return f"{self.where}/{title}" if self.where else title


DESCEND = object()
"""What a handler answers to have the program that an equation calls walked in its place."""

Handler = Callable[[Site, list[Any]], Any]
"""(equation, values of its operands) -> values of its results, or ``DESCEND``."""


def walk(
    program: ClosedJaxpr,
    arguments: Sequence[Any],
    handle: Handler,
    constant: Callable[[Any], Any] = lambda array: array,
    address: Address = (),
    where: str = "",
) -> list[Any]:
    """The values of a program's results.

    Args:
        handle: What each equation makes of values.
        constant: The value of an array that the program holds.
        address: The address of the equation whose body the program is.
    """
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, map(constant, program.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        site = Site(jaxpr, eqn, (*address, number), where)
        inputs = [read(atom) for atom in eqn.invars]
        results = handle(site, inputs)
        if results is DESCEND:
            results = walk(inner_program(eqn), inputs, handle, constant, site.address, site.path)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def equations(program: ClosedJaxpr | Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program and of those that it calls."""
    for eqn in (program.jaxpr if isinstance(program, ClosedJaxpr) else program).eqns:
        yield eqn
        for entry in eqn.params.values():
            for part in entry if isinstance(entry, (tuple, list)) else (entry,):
                if isinstance(part, (Jaxpr, ClosedJaxpr)):
                    yield from equations(part)


def called_program(eqn: JaxprEqn, through_custom_rules: bool = False) -> ClosedJaxpr | None:
    """The program that an equation runs once on its operands, as ``jit`` and ``remat`` do, if it may be looked into.

    It is known by its shape: the only program among the parameters, with the operands and results of the equation.
    Functions with rules of their own (``custom_jvp`` and its like) count where ``through_custom_rules`` says so.
    """
    bodies = [entry for entry in eqn.params.values() if isinstance(entry, (Jaxpr, ClosedJaxpr))]
    name = eqn.primitive.name
    if len(bodies) != 1 or name in _RUNS_OTHERWISE or (name.startswith("custom_") and not through_custom_rules):
        return None
    body = bodies[0] if isinstance(bodies[0], ClosedJaxpr) else ClosedJaxpr(bodies[0], ())
    same = _shapes(body.jaxpr.invars) == _shapes(eqn.invars) and _shapes(body.jaxpr.outvars) == _shapes(eqn.outvars)
    return body if same else None


# A loop whose body is shaped like it, a part of the devices, and a reduction of scalars by a function.
_RUNS_OTHERWISE = frozenset({"scan", "while", "cond", "shard_map", "reduce", "reduce_window"})


def is_scan(eqn: JaxprEqn) -> bool:
    """Whether the equation is a ``scan``."""
    return eqn.primitive.name == "scan"


class ScanParts(NamedTuple):
    """A ``scan``: its operands are constants, the carry and what is scanned, its results the carry and stacks."""

    body: ClosedJaxpr
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any

    def operands(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """(constants, carry, scanned) of the equation's operands, or of the body's."""
        start, stop = self.num_consts, self.num_consts + self.num_carry
        return list(values[:start]), list(values[start:stop]), list(values[stop:])

    def results(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(carry, stacked) of the equation's results, or of the body's."""
        return list(values[: self.num_carry]), list(values[self.num_carry :])

    def run(self, step: Callable, carry: Any, scanned: Any) -> Any:
        """``jax.lax.scan`` of another step in the same way."""
        return jax.lax.scan(step, carry, scanned, self.length, self.reverse, self.unroll)


def scan_parts(eqn: JaxprEqn) -> ScanParts:
    """Takes a ``scan`` apart.

    Versions of JAX write down in different ways which operands are which; the shapes say it in all of them: what is
    scanned or stacked has one axis more outside than in the body.
    """
    (body,) = (entry for entry in eqn.params.values() if isinstance(entry, ClosedJaxpr))
    num_stacked = _count_longer(eqn.outvars, body.jaxpr.outvars)
    num_scanned = _count_longer(eqn.invars, body.jaxpr.invars)
    num_carry = len(eqn.outvars) - num_stacked
    num_consts = len(eqn.invars) - num_carry - num_scanned
    params = eqn.params
    return ScanParts(body, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


def inner_program(eqn: JaxprEqn) -> ClosedJaxpr:
    """The program of a call, whatever its rules, or the step of a ``scan``."""
    body = scan_parts(eqn).body if is_scan(eqn) else called_program(eqn, through_custom_rules=True)
    assert body is not None, f"{eqn.primitive.name} calls no program"
    return body


def program_at(program: ClosedJaxpr, address: Address) -> Jaxpr:
    """The program around the equation at an address."""
    for number in address[:-1]:
        program = inner_program(program.jaxpr.eqns[number])
    return program.jaxpr


def rematerialised(eqn: JaxprEqn, function: Callable) -> Callable:
    """The function under ``jax.checkpoint`` as the equation's body is; as it is for other calls."""
    params = eqn.params
    if not {"prevent_cse", "policy"} <= params.keys():
        return function
    return jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])


def apply_equation(program: Jaxpr, eqn: JaxprEqn, *inputs: Any) -> list[Any]:
    """The outputs of one equation, evaluated as a program of its own, so that custom rules and the like stay intact."""
    pairs = zip(eqn.invars, inputs, strict=True)
    given = {atom: value for atom, value in pairs if not isinstance(atom, Literal)}
    atoms = list(given)
    single = program.replace(constvars=[], invars=atoms, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(single, ()))(*(given[atom] for atom in atoms))


def apply_widely(program: Jaxpr, eqn: JaxprEqn, *inputs: Any) -> list[Any]:
    """The outputs of a linear equation, with float32 in the place of every narrower floating dtype."""
    dtypes = [atom.aval.dtype for atom in (*eqn.outvars, *eqn.invars)]  # pyright: ignore[reportAttributeAccessIssue]
    if eqn.primitive.name == "convert_element_type":
        return [inputs[0].astype(trees.wider(dtypes[0], jnp.float32))]
    if eqn.primitive.name == "reduce_precision":
        return [inputs[0]]
    if not any(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 for dtype in dtypes):
        return apply_equation(program, eqn, *inputs)
    params = eqn.params | {name: None for name in ("preferred_element_type",) if name in eqn.params}
    outputs = eqn.primitive.bind(*inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _shapes(atoms):
    return [getattr(atom.aval, "shape", None) for atom in atoms]


def _count_longer(outside, inside):
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True))
