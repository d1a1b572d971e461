"""The training loop that all benchmarks share: any optax transformation on any objective, for a number of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import curvax
from benchmarks.progress import Progress

PyTree = Any
Record = dict[str, float]


def train(
    title: str,
    tx: optax.GradientTransformation,
    objective: curvax.Objective,
    params: PyTree,
    batches: Iterator[PyTree],
    *,
    seconds: float,
    evaluate: Callable[[PyTree], Record],
    evaluations: int = 25,
) -> tuple[PyTree, list[Record]]:
    """Trains for a number of seconds and says what happened.

    Compilation and evaluation do not count as training time.

    Args:
        title: What the progress display is headed with.
        tx: The optimiser; it is given ``at=`` and may ignore it.
        objective: The objective.
        params: Where to start.
        batches: An endless iterator of batches of one shape.
        seconds: The budget.
        evaluate: params -> figures, run ``evaluations`` times; compiled before the clock starts.
        evaluations: How many records to take, at equal distances in time.

    Returns:
        The parameters and the records: step, seconds and the figures of ``evaluate``.
    """
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, batch):
        loss, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    jax.block_until_ready(step(params, state, next(batches)))
    records = [{"step": 0, "seconds": 0.0} | evaluate(params)]
    spent, count = 0.0, 0
    with Progress(total_seconds=seconds, title=title) as progress:
        while spent < seconds:
            batch = next(batches)
            start = time.perf_counter()
            params, state, loss = jax.block_until_ready(step(params, state, batch))
            spent += time.perf_counter() - start
            count += 1
            progress.update(count, {"loss": loss} | figures(state))
            if spent >= seconds * len(records) / evaluations or spent >= seconds:
                records.append({"step": count, "seconds": spent} | evaluate(params))
    return params, records


def figures(state: PyTree) -> dict[str, Any]:
    """The figures worth showing in the ``info`` of whatever transformations made the state."""
    shown = {}
    for name in ("damping", "step_ratio", "cg_iterations", "step_size"):
        found = optax.tree.get_all_with_path(state, name)
        if found:
            shown[name] = found[-1][1]
    return shown


def minibatches(inputs: np.ndarray, targets: np.ndarray, size: int, seed: int = 0) -> Iterator[PyTree]:
    """Random batches of one size without end: every epoch a new shuffle, its incomplete last batch left out."""
    generator = np.random.default_rng(seed)
    data = np.asarray(inputs), np.asarray(targets)  # cut on the host: indexing device arrays costs more than the step
    while True:
        order = generator.permutation(len(inputs))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(leaf[chosen] for leaf in data)
