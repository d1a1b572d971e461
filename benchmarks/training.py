"""The training loop that all benchmarks share: any optax transformation on any objective, for seconds or steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import curvax
from benchmarks.progress import Progress

PyTree = Any
Record = dict[str, float]

SECONDS_BETWEEN_CHECKPOINTS = 20.0


class Batches(NamedTuple):
    """Random mini-batches as a function of the step alone, so that a resumed run sees those it would have seen.

    Every epoch is a new shuffle, its incomplete last batch left out; a batch of everything is shuffled too, so that
    its first examples, which the curvature may be taken from, are others every time. The examples are cut on the host:
    indexing device arrays costs more than a small step.

    Attributes:
        inputs: The training inputs.
        targets: The training targets.
        size: Examples in a batch, at most all there are.
        seed: Seed of the shuffles.
    """

    inputs: np.ndarray
    targets: np.ndarray
    size: int
    seed: int = 0

    def at(self, step: int) -> PyTree:
        """The batch of that step, counted from 0."""
        size = min(self.size, len(self.inputs))
        epoch, place = divmod(step, len(self.inputs) // size)
        chosen = _shuffle(len(self.inputs), self.seed, epoch)[place * size : (place + 1) * size]
        return self.inputs[chosen], self.targets[chosen]


class Run(NamedTuple):
    """What ``train`` returns: the parameters, the optimiser's state, and a record of each evaluation."""

    params: PyTree
    state: PyTree
    records: list[Record]


def train(
    title: str,
    tx: optax.GradientTransformation,
    objective: curvax.Objective,
    params: PyTree,
    batches: Batches,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    evaluate: Callable[[PyTree], Record],
    evaluations: int = 12,
    curvature_size: int | None = None,
    checkpoints: Path | None = None,
) -> Run:
    """Trains until the seconds or the steps are used up, and says what happened.

    Compilation and evaluation do not count as training time.

    Args:
        title: What the progress display is headed with.
        tx: The optimiser; it is given ``at=`` and may ignore it.
        objective: The objective.
        params: Where to start.
        batches: The mini-batches.
        seconds: The budget of training time.
        steps: The budget of steps; one of the two must be given.
        evaluate: params -> figures, run ``evaluations`` times; compiled before the clock starts.
        evaluations: How many records to take, at equal distances.
        curvature_size: The first so many examples of a batch are for the curvature, where the optimiser takes
            ``curvature_at=``; None for all.
        checkpoints: A folder to save to every 20 seconds and at the end, and to go on from if it holds a checkpoint.

    Returns:
        A ``Run``. Its records have step, seconds and the figures of ``evaluate`` and of the optimiser.
    """
    if seconds is None and steps is None:
        raise ValueError("train needs a budget: seconds=, steps= or both")
    step = _step_function(optax.with_extra_args_support(tx), objective, curvature_size)
    state = tx.init(params)
    spent, count, records = 0.0, 0, [{"step": 0, "seconds": 0.0} | evaluate(params)]
    store = None if checkpoints is None else _Store(checkpoints)
    if store is not None and store.exists:
        params, state, spent, count, records = store.load(params, state)
    jax.block_until_ready(step(params, state, batches.at(count)))  # compiles

    saved = time.perf_counter()
    with Progress(steps, seconds, title) as progress:
        while not _used_up(spent, seconds) and not _used_up(count, steps):
            batch = batches.at(count)
            start = time.perf_counter()
            params, state, loss = jax.block_until_ready(step(params, state, batch))
            spent += time.perf_counter() - start
            count += 1
            shown = figures(state)
            progress.update(count, {"batch_loss": loss} | shown)
            done = max(spent / (seconds or np.inf), count / (steps or np.inf))
            if done >= len(records) / evaluations or done >= 1:
                last = {name: float(value) for name, value in shown.items()}
                records.append({"step": count, "seconds": spent} | evaluate(params) | last)
            if store is not None and time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                store.save(params, state, spent, count, records)
                saved = time.perf_counter()
    if store is not None:
        store.save(params, state, spent, count, records)
        store.close()
    return Run(params, state, records)


def figures(state: PyTree) -> dict[str, Any]:
    """The figures worth showing in the ``info`` of whatever transformations made the state."""
    infos = [value for _, value in optax.tree.get_all_with_path(state, "info")]
    names = ("damping", "radius", "step_ratio", "inner_iterations", "step_size")
    shown = {name: getattr(infos[-1], name) for name in names} if infos else {}
    return {name: value for name, value in shown.items() if not (jnp.isnan(value) or value == -1)}


def _used_up(used, budget):
    return budget is not None and used >= budget


def _step_function(tx, objective, curvature_size):
    @jax.jit
    def step(params, state, batch):
        loss, gradient, at = objective.value_and_grad(params, batch)
        extra = {}
        if curvature_size is not None:
            extra["curvature_at"] = objective.linearize(params, jax.tree.map(lambda leaf: leaf[:curvature_size], batch))
        updates, state = tx.update(gradient, state, params, at=at, **extra)
        return optax.apply_updates(params, updates), state, loss

    return step


def _shuffle(count, seed, epoch, cache={}):  # noqa: B006 - the shuffle of the current epoch, kept between steps
    if cache.get("key") != (count, seed, epoch):
        cache.update(key=(count, seed, epoch), order=np.random.default_rng([seed, epoch]).permutation(count))
    return cache["order"]


class _Store:
    """The last checkpoint of a run in a folder, by orbax."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def exists(self) -> bool:
        return self._manager.latest_step() is not None

    def save(self, params, state, spent, count, records):
        if self._manager.latest_step() == count:
            return
        arrays = {"params": params, "state": state}
        notes = {"seconds": spent, "records": [{name: _number(value) for name, value in r.items()} for r in records]}
        self._manager.save(
            count, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes))
        )

    def load(self, params, state):
        count = self._manager.latest_step()
        assert count is not None
        shapes = jax.tree.map(jnp.zeros_like, {"params": params, "state": state})
        restored = self._manager.restore(
            count, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes), notes=ocp.args.JsonRestore())
        )
        arrays, notes = restored["arrays"], restored["notes"]
        return arrays["params"], arrays["state"], notes["seconds"], count, notes["records"]

    def close(self):
        self._manager.close()


def _number(value):
    return value if np.isfinite(value) else None
