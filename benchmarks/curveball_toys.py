"""The degenerate problems of CurveBall's table 1: iterations of six solvers until the solution, theirs and ours.

Run: ``python -m benchmarks.curveball_toys`` (about ten minutes on two cores). The paper leaves open from where it
starts, what "reaching the solution" means, and the sizes of the linear network. Here: starts are drawn around (-1, 1)
with deviation 0.25; a run has reached the solution at the first iterate w of which the loss without noise (the mean
over the data) is below 1e-4; the linear network is 6-6-10 on 1,000 normal inputs, its weights normal. ``--starts`` and
``--criterion`` try other readings. The first damping lambda_0 is not stated either and decides more than the method
does: solvers that have one get a row for each of its values.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import curvax
from benchmarks.plots import COLOURS
from benchmarks.progress import markdown, table

RESULTS = pathlib.Path(__file__).parent / "results"
TOLERANCE = 1e-4
RATES = (0.1, 0.05, 0.01, 0.005, 0.001, 0.0005, 0.0001)
PAPER = {
    "sgd with momentum": ("370 +- 40", "846 +- 217", "4069 +- 565", "95 +- 2"),
    "adam": ("799 +- 160.5", "1290 +- 476", "2750 +- 257", "95 +- 5"),
    "levenberg-marquardt": ("16 +- 4", "14 +- 3", "17 +- 4", "9 +- 4"),
    "bfgs": ("19 +- 4", "44 +- 21", "63 +- 29", "43 +- 21"),
    "exact hessian": ("14 +- 1", "10 +- 3", "17 +- 4", "9 +- 0.5"),
    "curveball": ("13 +- 0.5", "12 +- 1", "13 +- 1", "35 +- 11"),
}


class Problem(NamedTuple):
    """A problem of the table.

    Attributes:
        name: Its column.
        objective: The objective, of (params, batch).
        start: key -> the parameters that a run starts from.
        draw: key -> the batch of one iteration.
        clean: The batch without noise, which the solution is judged on.
        distance: params -> the distance to the solution, where there is one point.
        limit: The most iterations.
    """

    name: str
    objective: curvax.Objective
    start: Callable[[jax.Array], Any]
    draw: Callable[[jax.Array], Any]
    clean: Any
    distance: Callable[[Any], jax.Array] | None
    limit: int


def rosenbrock(low: float, high: float, spread: float) -> Problem:
    """R(u, v) = (1 - u)^2 + 100 eps (v - u^2)^2 as squared residuals, eps from U[low, high] at each iteration."""

    def residuals(w, noise):
        u, v = w
        return jnp.sqrt(2.0) * jnp.stack([1 - u + 0 * noise, 10 * jnp.sqrt(noise) * (v - u**2)], axis=-1)

    def batch(noise):
        return jnp.reshape(noise, (1,)), jnp.zeros((1, 2))

    return Problem(
        "deterministic" if low == high else f"U[{low:g}, {high:g}]",
        curvax.Objective(residuals, curvax.losses.squared_error()),
        lambda key: jnp.array([-1.0, 1.0]) + spread * jax.random.normal(key, (2,)),
        lambda key: batch(jax.random.uniform(key, minval=low, maxval=high) if high > low else jnp.ones(())),
        batch(jnp.ones(())),
        lambda w: jnp.linalg.norm(w - 1),
        20_000,
    )


def linear_network(examples: int = 1000, condition: float = 1e5) -> Problem:
    """y = A x with an ill-conditioned A, fitted by two linear layers (after Rahimi and Recht 2017)."""
    inputs, outputs = 6, 10
    keys = jax.random.split(jax.random.key(0), 3)
    left = jnp.linalg.qr(jax.random.normal(keys[0], (outputs, inputs)))[0]
    right = jnp.linalg.qr(jax.random.normal(keys[1], (inputs, inputs)))[0]
    matrix = (left * jnp.logspace(0, -jnp.log10(condition), inputs)) @ right.T
    x = jax.random.normal(keys[2], (examples, inputs))
    batch = (x, x @ matrix.T)

    def start(key):
        first, second = jax.random.split(key)
        return {
            "w1": jax.random.normal(first, (inputs, inputs)) / inputs**0.5,
            "w2": jax.random.normal(second, (inputs, outputs)) / inputs**0.5,
        }

    objective = curvax.Objective(lambda p, x: x @ p["w1"] @ p["w2"], curvax.losses.squared_error())
    return Problem("Rahimi and Recht", objective, start, lambda key: batch, batch, None, 5_000)


class Solver(NamedTuple):
    """A solver of the table.

    Attributes:
        make: (numbers) -> transformation.
        names: What the numbers are.
        grid: Their values that are tried.
    """

    make: Callable[[Any], Any]
    names: tuple[str, ...] = ()
    grid: tuple[tuple[float, ...], ...] = ((),)

    def text(self, point: tuple[float, ...]) -> str:
        """One point of the grid in words."""
        pairs = zip(self.names, point, strict=True)
        return ", ".join(f"{name} {value:g}" for name, value in pairs) or "defaults"


def damped(name: str, make: Callable[..., Any]) -> dict[str, Solver]:
    """The solver with each of the first dampings."""
    return {
        f"{name}, lambda_0 = {damping:g}": Solver(lambda _, d=damping: make(initial_damping=d))
        for damping in (1.0, 0.2, 0.1, 0.01)
    }


_EXACT = functools.partial(
    curvax.levenberg_marquardt, curvature=curvax.Hessian(), absolute=True, judged_by="same_batch"
)

SOLVERS = {
    "sgd with momentum": Solver(
        lambda h: optax.sgd(h[0], h[1]),
        ("rate", "momentum"),
        tuple(itertools.product(RATES, (0.9, 0.95, 0.99))),
    ),
    "adam": Solver(
        lambda h: optax.adam(h[0], h[1], h[2]),
        ("rate", "beta1", "beta2"),
        tuple(itertools.product(RATES, (0.9, 0.99), (0.99, 0.999))),
    ),
    "bfgs": Solver(lambda _: optax.lbfgs(memory_size=20)),
    **damped("levenberg-marquardt", functools.partial(curvax.levenberg_marquardt, judged_by="same_batch")),
    **damped("exact hessian", _EXACT),
    **damped("curveball", functools.partial(curvax.curveball, judged_by="same_batch")),
}


def iterate(problem: Problem, tx: Any):
    """(params, state, key) -> the next params and state."""
    objective, tx = problem.objective, optax.with_extra_args_support(tx)

    def step(params, state, key):
        batch = problem.draw(key)
        loss, gradient, at = objective.value_and_grad(params, batch)
        # What a line search of optax wants; it hands ``at`` on to the function of the loss.
        line = {"value": loss, "grad": gradient, "value_fn": lambda p, at: at.loss_at(p)}
        updates, state = tx.update(gradient, state, params, at=at, **line)
        return optax.apply_updates(params, updates), state

    return step


def counter(problem: Problem, solver: Solver, criterion: str):
    """(numbers, keys) -> for each key the iterations until the solution, or the limit where it is not reached."""

    def error(params):
        clean = problem.objective(params, problem.clean)
        return problem.distance(params) if criterion == "distance" and problem.distance is not None else clean

    @jax.jit
    def count(numbers, keys):
        tx = solver.make(numbers)
        step = iterate(problem, tx)

        def one(key):
            params = problem.start(jax.random.fold_in(key, 0))

            def running(carry):
                params, _, count = carry
                at_work = error(params) > TOLERANCE
                return at_work & (count < problem.limit)

            def body(carry):
                params, state, count = carry
                params, state = step(params, state, jax.random.fold_in(key, count + 1))
                return params, state, count + 1

            start = (params, tx.init(params), jnp.zeros((), jnp.int32))
            params, _, count = jax.lax.while_loop(running, body, start)
            return jnp.where(error(params) <= TOLERANCE, count, problem.limit)

        return jax.lax.map(one, keys)

    return count


def best(problem: Problem, solver: Solver, keys: jax.Array, criterion: str):
    """The grid's best point, by mean iterations on a tenth of the runs, and the iterations of all its runs."""
    count = counter(problem, solver, criterion)
    few = keys[: max(len(keys) // 10, 3)]
    chosen = solver.grid[0]
    if len(solver.grid) > 1:
        means = [float(np.mean(count(jnp.array(point), few))) for point in solver.grid]
        chosen = solver.grid[int(np.argmin(means))]
    return chosen, np.asarray(count(jnp.array(chosen), keys))


def trajectory(problem: Problem, tx: Any, key: jax.Array, steps: int = 200):
    """The iterates and their losses without noise."""
    step = jax.jit(iterate(problem, tx))
    params = problem.start(jax.random.fold_in(key, 0))
    state, points = tx.init(params), [params]
    for count in range(steps):
        params, state = step(params, state, jax.random.fold_in(key, count + 1))
        points.append(params)
    losses = [float(problem.objective(p, problem.clean)) for p in points]
    return np.asarray(points), np.asarray(losses)


def draw_trajectories(problem: Problem, chosen: dict[str, Any], path: pathlib.Path) -> None:
    """The paths on Rosenbrock's function, and the losses along them."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    plane, losses = figure.subplots(1, 2)
    u, v = np.meshgrid(np.linspace(-1.6, 1.6, 200), np.linspace(-0.6, 1.8, 200))
    plane.contourf(u, v, np.log10((1 - u) ** 2 + 100 * (v - u**2) ** 2 + 1e-3), levels=30, cmap="Greys", alpha=0.7)
    for colour, (name, tx) in zip(COLOURS, chosen.items(), strict=False):
        points, values = trajectory(problem, tx, jax.random.key(1))
        plane.plot(points[:, 0], points[:, 1], ".-", color=colour, linewidth=1, markersize=3, label=name)
        losses.plot(values, color=colour, label=name)
    plane.set(xlabel="u", ylabel="v", xlim=(-1.6, 1.6), ylim=(-0.6, 1.8), title=f"Rosenbrock, {problem.name}")
    losses.set(xlabel="iterations", ylabel="loss without noise", yscale="log", ylim=(1e-12, None))
    losses.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes it with the picture to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="runs of each solver on each problem (default 100)")
    parser.add_argument("--starts", type=float, default=0.25, help="deviation of the starts around (-1, 1)")
    parser.add_argument("--criterion", choices=("loss", "distance"), default="loss", help="what must be below 1e-4")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    problems = [rosenbrock(*noise, arguments.starts) for noise in ((1, 1), (0, 1), (0, 3))] + [linear_network()]
    keys = jax.random.split(jax.random.key(0), arguments.runs)

    columns = ["solver", *(f"{problem.name}{who}" for problem in problems for who in ("", ", paper"))]
    rows, notes = [], []
    chosen: dict[str, Any] = {}
    for name, solver in SOLVERS.items():
        row, base = [name], name.split(",")[0]
        for problem, paper in zip(problems, PAPER[base], strict=True):
            point, counts = best(problem, solver, keys, arguments.criterion)
            if problem is problems[1]:
                chosen.setdefault(base, solver.make(point))
            reached = counts[counts < problem.limit]
            text = f"{reached.mean():.0f} +- {reached.std():.1f}" if reached.size else "-"
            if reached.size < counts.size:
                text += f" ({reached.size} of {counts.size})"
            row += [text, paper]
            notes.append(f"{name}, {problem.name}: {solver.text(point)}")
            print(f"{name}, {problem.name}: {text} iterations; the paper {paper}", flush=True)
        rows.append(row)

    title = (
        f"CurveBall's table 1: iterations to {arguments.criterion} below {TOLERANCE:g}, {arguments.runs} runs,"
        f" starts (-1, 1) +- {arguments.starts:g}"
    )
    table([dict(zip(columns, row, strict=True)) for row in rows], columns, title)
    draw_trajectories(problems[1], chosen, arguments.output / "curveball_toys.png")
    lines = [
        f"# {title}",
        "",
        "Mean and deviation over the runs that reached the solution, and how many did if not all.",
        "",
    ]
    lines += markdown(columns, rows)
    grid = f"rates {RATES}; momentum 0.9, 0.95, 0.99; beta1 0.9, 0.99; beta2 0.99, 0.999"
    lines += ["", f"Grid of the methods of first order: {grid}. Settings used:", "", *(f"- {note}" for note in notes)]
    lines += ["", "![trajectories](curveball_toys.png)"]
    (arguments.output / "curveball_toys.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
