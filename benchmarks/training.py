"""The training loop that all benchmarks share: any optax transformation on any objective, for seconds or steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import curvax
from benchmarks.machine import in_pieces, load
from benchmarks.progress import Progress

PyTree = Any
Record = dict[str, float]

SECONDS_BETWEEN_CHECKPOINTS = 20.0


class Batches(NamedTuple):
    """Random mini-batches as a function of the step alone, so that a resumed run sees those it would have seen.

    Every epoch is a new shuffle, its incomplete last batch left out; a batch of everything is shuffled too, so that
    its first examples, which the curvature may be taken from, are others every time. Where the size changes, every
    batch is drawn from all examples, without repetition. The examples are cut on the host: indexing device arrays costs
    more than a small step.

    Attributes:
        inputs: The training inputs.
        targets: The training targets.
        size: Examples in a batch, at most all there are; or a function of the step, counted from 1, such as
            ``curvax.schedules.exponential_batch_size``.
        seed: Seed of the shuffles.
    """

    inputs: np.ndarray
    targets: np.ndarray
    size: int | Callable[[int], int]
    seed: int = 0

    def at(self, step: int) -> PyTree:
        """The batch of that step, counted from 0."""
        total = len(self.inputs)
        if callable(self.size):
            chosen = np.random.default_rng([self.seed, step]).permutation(total)[: self.size(step + 1)]
        else:
            size = min(self.size, total)
            epoch, place = divmod(step, total // size)
            chosen = _shuffle(total, self.seed, epoch)[place * size : (place + 1) * size]
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
    marks: Sequence[float] = (),
    curvature_size: int | None = None,
    cosine_decay: bool = False,
    averaged: bool = False,
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
        evaluate: params -> figures; compiled before the clock starts.
        evaluations: How many records to take, most of them early: at equal ratios of the budget used.
        marks: Seconds at which to take further ones. What is recorded for a time is where the run was before the step
            that passed it.
        curvature_size: The first so many examples of a batch are for the curvature, where the optimiser takes
            ``curvature_at=``; None for all.
        cosine_decay: Whether updates are multiplied by (1 + cos(pi t)) / 2 at the share t of the budget that is used,
            which decays a learning rate to 0 at the end of the run, however fast the machine is.
        averaged: Whether the figures are those of the average of the iterates where its loss is lower.
        checkpoints: A folder to save to every 20 seconds and at the end, and to go on from if it holds a checkpoint.

    Returns:
        A ``Run``. Its records have step, seconds, the machine's load, and the figures of ``evaluate`` and of the
        optimiser.
    """
    if seconds is None and steps is None:
        raise ValueError("train needs a budget: seconds=, steps= or both")
    step = _step_function(optax.with_extra_args_support(tx), objective, curvature_size, cosine_decay)
    state = tx.init(params)

    def record(params, state, count, spent):
        measured = evaluate(params)
        if averaged:
            average = evaluate(curvax.averaged_params(state, like=params))
            measured = min(measured, average, key=lambda figures: figures["loss"])
        own = {name: float(value) for name, value in figures(state).items()} if count else {}
        return {"step": count, "seconds": spent, "load": load()} | measured | own

    def state_of_record(state):
        """What a record reads of a state, which the step overwrites."""
        if averaged:
            return jax.tree.map(jnp.copy, state)
        return [{"info": jax.device_get(info)} for _, info in optax.tree.get_all_with_path(state, "info")]

    def done(spent, count):
        return max(spent / (seconds or np.inf), count / (steps or np.inf))

    spent, count, records = 0.0, 0, [record(params, state, 0, 0.0)]
    store = None if checkpoints is None else _Store(checkpoints)
    if store is not None and store.exists:
        params, state, spent, count, records = store.load(params, state)
    shares = np.geomspace(1 / 30, 1, evaluations)
    compiled: set[int] = set()

    def compile_for(batch):
        if len(batch[0]) not in compiled:
            jax.block_until_ready(step(params, jax.tree.map(jnp.copy, state), batch, np.float32(0)))
            compiled.add(len(batch[0]))

    compile_for(batches.at(count))
    saved = time.perf_counter()
    with Progress(steps, seconds, title) as progress:
        while done(spent, count) < 1:
            batch, before = batches.at(count), (params, state_of_record(state), count, spent)
            share = np.float32(done(spent, count))
            compile_for(batch)
            start = time.perf_counter()
            params, state, loss = jax.block_until_ready(step(params, state, batch, share))
            spent += time.perf_counter() - start
            count += 1
            progress.update(count, {"batch_loss": loss} | figures(state))
            passed = np.any((share < shares) & (shares <= done(spent, count)))
            passed |= any(before[-1] < mark <= spent for mark in marks)
            if passed and before[2] > records[-1]["step"]:
                records.append(record(*before))
            if store is not None and time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                store.save(params, state, spent, count, records)
                saved = time.perf_counter()
    if count > records[-1]["step"]:
        records.append(record(params, state, count, spent))
    if store is not None:
        store.save(params, state, spent, count, records)
        store.close()
    return Run(params, state, records)


def loss_at(records: Sequence[Record], seconds: float, key: str = "loss") -> float | None:
    """The last loss that was measured by that time; None where the run ended before."""
    if records[-1]["seconds"] < seconds:
        return None
    return [record[key] for record in records if record["seconds"] <= seconds][-1]


def figures(state: PyTree) -> dict[str, Any]:
    """The figures worth showing in the ``info`` of whatever transformations made the state."""
    infos = [value for _, value in optax.tree.get_all_with_path(state, "info")]
    names = ("damping", "radius", "step_ratio", "inner_iterations", "step_size")
    shown = {name: getattr(infos[-1], name) for name in names} if infos else {}
    return {name: value for name, value in shown.items() if not (jnp.isnan(value) or value == -1)}


def _step_function(tx, objective, curvature_size, cosine_decay):
    # The state is given up to the step, as in any training loop: it may be several times as large as the parameters.
    @functools.partial(jax.jit, donate_argnums=1, compiler_options=in_pieces())
    def step(params, state, batch, done):
        loss, gradient, at = objective.value_and_grad(params, batch)
        extra = {}
        if curvature_size is not None:
            extra["curvature_at"] = objective.linearize(params, jax.tree.map(lambda leaf: leaf[:curvature_size], batch))
        updates, state = tx.update(gradient, state, params, at=at, **extra)
        if cosine_decay:
            updates = curvax.trees.scale((1 + jnp.cos(jnp.pi * done)) / 2, updates)
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
