"""Whether the uses of a program's parameters form a chain: each takes an elementwise function of the one before.

The program is walked with an abstract value for each variable: what it depends on no use, an elementwise function of
the result of one use, with the places where its entries have gone, or anything else. That an equation is elementwise is
not known by its name but by what it is: it names no axis, and makes scalars of scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from curvax.programs.uses import Use
from curvax.programs.views import MOVES
from curvax.programs.walk import DESCEND, Site, apply_equation, called_program, walk


class Link(NamedTuple):
    """A use in a chain.

    Attributes:
        use: Its place among the uses that were given.
        codes: For each entry of its input the number of the entry of the last use's result, row-major, that it is a
            function of; None for the first use, which reads data.
    """

    use: int
    codes: np.ndarray | None


def chain_of(program: ClosedJaxpr, uses: Sequence[Use], names: Sequence[str], num_outputs: int) -> list[Link]:
    """The uses as a chain, first to last: h_t = phi_t(s_t) entry by entry between s_t = h_{t-1} W_t and the next one.

    Biases, and whatever else does not depend on the uses, may have a part in phi. The outputs may be any function of
    the last use alone.

    Args:
        names: The names of the uses, for errors.
        num_outputs: How many of the program's results are the model's outputs.

    Raises:
        ValueError: They are no chain, with the name of the operation that stands in the way.
    """
    if not uses:
        raise ValueError("the model has no matrices")
    found = _Walk(uses, names)
    results = walk(program, [None] * len(program.jaxpr.invars), found.equation, lambda array: None)
    order = found.ordered()
    last = order[-1].use
    for result in results[:num_outputs]:
        if result is None or result.uses != {last}:
            others = [names[i] for i in sorted(set() if result is None else result.uses - {last})]
            what = f"of {', '.join(map(repr, others))} past it" if others else "of no layer"
            raise ValueError(f"the outputs are not a function of the last layer {names[last]!r} alone, but {what}")
    return order


class _Along(NamedTuple):
    """An elementwise function of the result of a use; ``codes`` as in ``Link``, in the shape of the variable."""

    uses: frozenset[int]
    codes: np.ndarray


class _Mixed(NamedTuple):
    """Any other function of results of uses, and the operation that has made it one."""

    uses: frozenset[int]
    why: str


class _Walk:
    def __init__(self, uses, names):
        self.names = names
        self.tapped = {use.address: (index, use) for index, use in enumerate(uses)}
        self.entered = {address[:depth] for address in self.tapped for depth in range(1, len(address))}
        self.links: dict[int, Link] = {}
        self.before: dict[int, int | None] = {}

    def ordered(self) -> list[Link]:
        """The links from the first to the last, each use being that before one other at most."""
        after: dict[int | None, list[int]] = {}
        for index, before in self.before.items():
            after.setdefault(before, []).append(index)
        for before, several in after.items():
            if len(several) > 1:
                what = "the data" if before is None else repr(self.names[before])
                raise ValueError(f"{' and '.join(repr(self.names[i]) for i in several)} both read {what}")
        order, place = [], None
        while place in after:
            (place,) = after[place]
            order.append(self.links[place])
        return order

    def equation(self, site: Site, inputs: list[Any]) -> Any:
        if site.address in self.tapped:
            return self.use(*self.tapped[site.address], site, inputs)
        dependent = [x for x in inputs if x is not None]
        if site.address in self.entered or (dependent and called_program(site.eqn, through_custom_rules=True)):
            return DESCEND
        count = len(site.eqn.outvars)
        if not dependent:
            return [None] * count
        if all(isinstance(x, _Along) for x in dependent):
            first = dependent[0]
            same = all(x.uses == first.uses and np.array_equal(x.codes, first.codes) for x in dependent)
            if same and _is_elementwise(site, first.codes.shape):
                return [first] * count
            if len(inputs) == 1 and site.name in MOVES:
                with jax.ensure_compile_time_eval():
                    moved = apply_equation(site.program, site.eqn, first.codes)
                return [_Along(first.uses, np.asarray(codes)) for codes in moved]
        uses = frozenset().union(*(x.uses for x in dependent))
        return [_Mixed(uses, next((x.why for x in dependent if isinstance(x, _Mixed)), site.path))] * count

    def use(self, index, use, site, inputs):
        data, parameter = inputs[1 - use.side], inputs[use.side]
        name = self.names[index]
        if parameter is not None:
            raise ValueError(f"the matrix {name!r} is made from the outputs of another layer")
        if isinstance(data, _Mixed):
            whose = ", ".join(repr(self.names[i]) for i in sorted(data.uses))
            raise ValueError(
                f"between {whose} and {name!r} stands {data.why!r}, which is no elementwise function of one layer"
            )
        (self.before[index],) = (None,) if data is None else data.uses
        self.links[index] = Link(index, None if data is None else data.codes)
        (outvar,) = site.eqn.outvars
        shape = outvar.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        return [_Along(frozenset({index}), np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape))]


def _is_elementwise(site: Site, shape: tuple[int, ...]) -> bool:
    """Whether the equation acts on each entry by itself: it then keeps the shape, and makes scalars of scalars.

    What works along an axis names it among its parameters, and scalars have none; what calls back has a shape there.
    """
    eqn = site.eqn
    entries = [part for x in eqn.params.values() for part in (x if isinstance(x, (tuple, list)) else (x,))]
    calls = any(isinstance(part, (Jaxpr, ClosedJaxpr)) for part in entries)
    moved = any(getattr(atom.aval, "shape", None) != shape for atom in eqn.outvars)
    if calls or moved or _ALONG_AXES & eqn.params.keys():
        return False
    scalars = [jax.ShapeDtypeStruct((), atom.aval.dtype) for atom in eqn.invars]  # pyright: ignore
    try:
        results = jax.eval_shape(lambda *xs: eqn.primitive.bind(*xs, **eqn.params), *scalars)
    except Exception:  # each primitive refuses in its own way
        return False
    return all(result.shape == () for result in jax.tree.leaves(results))


_ALONG_AXES = frozenset({"dimension", "dimensions", "axis", "axes", "axis_name", "callback", "target_name"})
"""Parameters of equations that act along an axis, whether or not they look if it exists, or outside of JAX."""
