"""Loop counters: what in the carry of a loop is known for each of its steps before the program runs.

``jax.lax.fori_loop`` keeps its counter in the carry, and ``params["w"][i]`` reads one layer of a stack by it: structure
like that of a scan over the layers, once the numbers are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.programs.walk import ScanParts, apply_equation, walk


def counted(parts: ScanParts, first: Sequence[Any]) -> list[np.ndarray | None]:
    """For each entry of a scan's carry its values, one for each element of what is scanned; None where not known.

    Known is an integer that starts from one in ``first`` (None for others) and is computed from such alone.
    """

    def step(carry):
        rest = len(parts.body.jaxpr.invars) - parts.num_consts - parts.num_carry
        arguments = [None] * parts.num_consts + list(carry) + [None] * rest
        return parts.results(walk(parts.body, arguments, _if_known))[0]

    values = list(first)
    with jax.ensure_compile_time_eval():
        while True:
            after = step(values)
            left = [x if y is not None else None for x, y in zip(values, after, strict=True)]
            if all((x is None) == (y is None) for x, y in zip(left, values, strict=True)):
                break
            values = left
        places = [i for i, x in enumerate(values) if x is not None]
        if not places:
            return values

        def body(known, _):
            carry = dict(zip(places, known, strict=True))
            after = step([carry.get(i) for i in range(len(values))])
            return [jnp.asarray(after[i], x.dtype) for i, x in carry.items()], known

        start = [jnp.array(values[i], jnp.result_type(values[i])) for i in places]
        steps = jax.lax.scan(body, start, length=parts.length)[1]
    for i, numbers in zip(places, steps, strict=True):
        values[i] = np.asarray(numbers)[::-1] if parts.reverse else np.asarray(numbers)
    return values


def _if_known(site, inputs):
    if site.eqn.effects or any(x is None for x in inputs):
        return [None] * len(site.eqn.outvars)
    return apply_equation(site.program, site.eqn, *inputs)
