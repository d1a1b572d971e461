r"""The ravine across the axes: iterations of every method of the library until a millionth of the first loss.

Run: ``python -m benchmarks.ravine`` (two minutes on two cores).

The loss is 1/2 w^T B w, B = u u^T + a v v^T, u = (-1, 1), v = (1, 1) (Martens 2016, figure 3.1), whose diagonal is a +
1 for both parameters and whose condition number is a. Seven starts have the first loss 1/2, shared between the
eigenvectors at seven angles, and what counts is the last one to arrive: from a single start the step sizes that adapt
have lucky rates. A run that raises the loss a millionfold is out, as rounding could take away in one leap what lies
across. Methods with rates to choose have the best of a grid; the others are at their defaults, judged on the same batch
where there is a choice.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks.progress import markdown, table

RESULTS = pathlib.Path(__file__).parent / "results"
STEEPNESS = (15.0, 1e4)
TOLERANCE = 1e-6
MOST = 1e6
LIMIT = 100_000
ANGLES = tuple(0.2 + np.pi * np.arange(7) / 7)
RATES = tuple(10 ** np.linspace(-6, 2, 65))
MOMENTA = (0.5, 0.9, 0.97, 0.99)
OBJECTIVE = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())


class Solver(NamedTuple):
    """A row of the table.

    Attributes:
        make: (numbers, layers) -> transformation.
        names: What the numbers are.
        grid: Their values that are tried, for a given steepness.
    """

    make: Callable[[Any, curvax.Layers], Any]
    names: tuple[str, ...] = ()
    grid: Callable[[float], Sequence[tuple[float, ...]]] = lambda a: ((),)


def by_rate(scale: Callable[[], Any]) -> Solver:
    """A method behind which a learning rate stands, from the grid."""
    return Solver(
        lambda n, _: optax.chain(scale(), optax.scale_by_learning_rate(n[0])),
        ("rate",),
        lambda a: [(r,) for r in RATES],
    )


def by_two(make: Callable[[Any], Any], names: tuple[str, str], second: Sequence[float]) -> Solver:
    """A method of a rate and another number."""
    return Solver(lambda n, _: make(n), names, lambda a: list(itertools.product(RATES[::2], second)))


def plain(make: Callable[..., Any], **options: Any) -> Solver:
    """A method as it is."""
    return Solver(lambda n, _: make(**options))


def scaled(make: Callable[..., Any], **options: Any) -> Solver:
    """A preconditioner, with a learning rate of one."""
    return Solver(lambda n, _: optax.chain(make(**options), optax.scale(-1.0)))


def polyak(a: float) -> list[tuple[float, float]]:
    """The rate and momentum of the heavy ball that are best for curvatures from 2 to 2 a."""
    root = a**0.5
    return [(4 / (2**0.5 * (root + 1)) ** 2, ((root - 1) / (root + 1)) ** 2)]


FIRST_ORDER = {
    "gradient descent, optax.sgd": Solver(lambda n, _: optax.sgd(n[0]), ("rate",), lambda a: [(1 / (1 + a),)]),
    "the same with momentum": Solver(lambda n, _: optax.sgd(n[0], n[1]), ("rate", "momentum"), polyak),
}
DIAGONAL = {
    "optax.adam": Solver(lambda n, _: optax.adam(n[0]), ("rate",), lambda a: [(r,) for r in RATES]),
    "optax.rprop": Solver(lambda n, _: optax.rprop(n[0]), ("rate",), lambda a: [(r,) for r in RATES]),
    "scale_by_silva_almeida": by_rate(curvax.scale_by_silva_almeida),
    "scale_by_almeida": by_rate(curvax.scale_by_almeida),
    "scale_by_almeida, momentum": by_two(
        lambda n: optax.chain(curvax.scale_by_almeida(), optax.trace(n[1]), optax.scale_by_learning_rate(n[0])),
        ("rate", "momentum"),
        MOMENTA,
    ),
    "scale_by_stochastic_meta_descent": by_two(
        lambda n: optax.chain(curvax.scale_by_stochastic_meta_descent(n[0], meta_rate=n[1]), optax.scale(-1.0)),
        ("initial_scale", "meta_rate"),
        (0.01, 0.1, 1.0),
    ),
    "scale_by_sgd_qn, average": by_rate(lambda: curvax.scale_by_sgd_qn(rule="average", max_curvature=1e6)),
    "scale_by_sgd_qn, sum": by_two(
        lambda n: optax.chain(
            curvax.scale_by_sgd_qn(rule="sum", initial_curvature=n[1], max_curvature=1e6),
            optax.scale_by_learning_rate(n[0]),
        ),
        ("rate", "initial_curvature"),
        (1.0, 1e2, 1e4, 1e6),
    ),
    "scale_by_empirical_fisher_diagonal, xi = 1/2": by_rate(curvax.scale_by_empirical_fisher_diagonal),
    "the same, xi = 1": by_rate(lambda: curvax.scale_by_empirical_fisher_diagonal(exponent=1.0)),
    "scale_by_diagonal_curvature": by_rate(curvax.scale_by_diagonal_curvature),
    "diagonal_newton": plain(curvax.diagonal_newton),
}
MATRIX = {
    "scale_by_matrix_momentum": by_two(
        lambda n: optax.chain(curvax.scale_by_matrix_momentum(damping=n[1]), optax.scale_by_learning_rate(n[0])),
        ("rate", "damping"),
        (0.0, 0.1, 1.0, 10.0),
    ),
    "scale_by_cubic_step, gradient descent": plain(curvax.scale_by_cubic_step, inner=optax.sgd(1.0)),
    "curveball": plain(curvax.curveball, judged_by="same_batch"),
    "hessian_free": plain(curvax.hessian_free, judged_by="same_batch"),
    "newton_cg": plain(curvax.newton_cg, judged_by="same_batch"),
    "natural_gradient": plain(curvax.natural_gradient),
    "krylov_subspace_descent": plain(curvax.krylov_subspace_descent),
    "lsr1": plain(curvax.lsr1, judged_by="same_batch"),
    "lsr1_linesearch": plain(curvax.lsr1_linesearch, judged_by="same_batch"),
    "levenberg_marquardt": plain(curvax.levenberg_marquardt, judged_by="same_batch"),
    "kfac": Solver(lambda n, layers: curvax.kfac(layers)),
    "scale_by_kfac, damping 1e-6": Solver(
        lambda n, layers: optax.chain(curvax.scale_by_kfac(layers, damping=1e-6), optax.scale(-1.0))
    ),
    "ea_cg": Solver(lambda n, layers: curvax.ea_cg(layers)),
    "ea_cg, solver kronecker_cg": Solver(lambda n, layers: curvax.ea_cg(layers, solver="kronecker_cg")),
    "scale_by_natural_gradient, damping 1e-6": scaled(curvax.scale_by_natural_gradient, damping=1e-6),
    "scale_by_sample_space, damping 1e-6": scaled(curvax.scale_by_sample_space, damping=1e-6),
    "scale_by_dense_curvature, damping 1e-6": scaled(curvax.scale_by_dense_curvature, damping=1e-6),
}
GROUPS = {"first order": FIRST_ORDER, "a number for each parameter": DIAGONAL, "the matrix": MATRIX}


def ravine(a: Any) -> tuple[jax.Array, Any]:
    """The starts, and the batch of which the mean loss is 1/2 w^T B w."""
    u, v = jnp.array([-1.0, 1.0]), jnp.array([1.0, 1.0])
    inputs = 2**0.5 * jnp.stack([u, a**0.5 * v])
    angles = jnp.array(ANGLES)[:, None]
    return ((jnp.cos(angles) * u + jnp.sin(angles) * v / a**0.5) / 2)[..., None], (inputs, jnp.zeros((2, 1)))


def counter(solver: Solver, limit: int = LIMIT) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """(steepness, grid of numbers) -> the fewest iterations after which all starts are there, and by which numbers."""
    starts, batch = ravine(2.0)
    layers = curvax.find_layers(OBJECTIVE, starts[0], batch)

    @jax.jit
    def count(a, grid):
        starts, batch = ravine(a)

        def every(function):  # over the grid, and over the starts
            return jax.vmap(jax.vmap(function, (None, 0)), (0, None))

        def init(numbers, w):
            return w, solver.make(numbers, layers).init(w), jnp.array(False), jnp.array(False)

        def step(numbers, carry):
            w, state, there, out = carry
            tx = optax.with_extra_args_support(solver.make(numbers, layers))
            _, gradient, at = OBJECTIVE.value_and_grad(w, batch)
            updates, state = tx.update(gradient, state, w, at=at)
            w = optax.apply_updates(w, updates)
            loss = OBJECTIVE(w, batch)
            out = out | ~(loss <= MOST / 2)
            return w, state, there | ((loss <= TOLERANCE / 2) & ~out), out

        def running(carry):
            (_, _, there, _), count = carry
            return ~jnp.any(jnp.all(there, axis=1)) & (count < limit)

        def body(carry):
            return jax.vmap(jax.vmap(step, (None, 0)))(grid, carry[0]), carry[1] + 1

        (_, _, there, _), count = jax.lax.while_loop(
            running, body, (every(init)(grid, starts), jnp.zeros((), jnp.int32))
        )
        return count, jnp.argmax(jnp.all(there, axis=1))

    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes it to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_x64", True)

    columns = ["method", *(f"a = {a:g}" for a in STEEPNESS), "settings"]
    rows = []
    for group, solvers in GROUPS.items():
        rows.append([f"*{group}*", *("" for _ in STEEPNESS), ""])
        for name, solver in solvers.items():
            count, counts, settings = counter(solver), [], []
            for a in STEEPNESS:
                grid = solver.grid(a)
                iterations, best = count(a, jnp.array(grid).reshape(len(grid), len(solver.names)))
                reached = int(iterations) < LIMIT
                counts.append(f"{int(iterations):,}" if reached else f"above {LIMIT:,}")
                point = zip(solver.names, grid[int(best)], strict=True)
                settings.append(", ".join(f"{key} {value:.2g}" for key, value in point) if reached else "-")
            rows.append([name, *counts, "; ".join(settings) if solver.names else ""])
            print(*rows[-1], sep=" | ", flush=True)

    title = f"The ravine: iterations to {TOLERANCE:g} of the first loss"
    table([dict(zip(columns, row, strict=True)) for row in rows], columns, title)
    lines = [f"# {title}", "", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    lines += markdown(columns, rows)
    (arguments.output / "ravine.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
