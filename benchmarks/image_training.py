"""One image network trained by CurveBall, L-SR1 or a rival: loss, test error, skipped pairs, after every epoch or less.

``benchmarks.image_tables`` makes the tables of the papers from such runs; its command line also takes single runs.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks import data
from benchmarks import image_networks as networks
from benchmarks.progress import Progress
from curvax.damping import DampingRule, RadiusRule

TEST_EXAMPLES = 2000
STEPS_BETWEEN_RECORDS = 50


class Task(NamedTuple):
    """A network, its data set and its penalty."""

    make: Any
    dataset: str
    l2: float = 0.0


TASKS = {
    "lenet": Task(networks.lenet, "mnist", 1e-4),
    "lenet_plain": Task(functools.partial(networks.lenet, batch_norm=False), "mnist", 1e-4),
    "cifar_net": Task(networks.cifar_net, "cifar10", 1e-3),
    "cifar_net_plain": Task(functools.partial(networks.cifar_net, batch_norm=False), "cifar10", 1e-3),
    "basic_cnn": Task(networks.basic_cnn, "cifar10"),
    "basic_cnn_bn": Task(functools.partial(networks.basic_cnn, batch_norm=True), "cifar10"),
    "resnet20": Task(networks.resnet20, "cifar10", 1e-4),
    "mlp": Task(functools.partial(networks.mlp, (784, 128, 64, 32, 10)), "mnist"),
    **{f"random_{seed}": Task(functools.partial(networks.random_network, seed), "cifar10") for seed in range(50)},
}


def forgetful_lbfgs(period: int = 5, backtracking: bool = False) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with a line search whose memory of five is emptied every ``period`` steps, the rival of L-SR1's paper.

    optax's own search asks for the curvature condition too, about 19 gradients a step on these networks; backtracking
    asks for the decrease alone, a forward pass for each try. The paper does not say which search it used.
    """
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20, store_grad=True)
    inner = optax.lbfgs(memory_size=5, linesearch=search) if backtracking else optax.lbfgs(memory_size=5)

    def update(updates, state, params=None, **extra):
        count, inner_state, fresh = state
        forgets = (count % period == 0) & (count > 0)
        inner_state = jax.tree.map(lambda new, old: jnp.where(forgets, new, old), fresh, inner_state)
        updates, inner_state = inner.update(updates, inner_state, params, **extra)
        return updates, (count + 1, inner_state, fresh)

    def init(params):
        return jnp.zeros((), jnp.int32), inner.init(params), inner.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


METHODS = {
    "curveball": lambda damping=1.0: curvax.curveball(initial_damping=damping, judged_by="same_batch"),
    "curveball, lambda fixed": lambda damping=1.0: curvax.curveball(
        initial_damping=damping, rule=DampingRule(decrease=1, increase=1)
    ),
    "lsr1": lambda memory=5, decrease=0.5, increase=2.0: curvax.lsr1(
        memory_size=memory, rule=RadiusRule(shrink=decrease, grow=increase), judged_by="same_batch"
    ),
    "lsr1_linesearch": functools.partial(curvax.lsr1_linesearch, judged_by="same_batch"),
    "lbfgs": forgetful_lbfgs,
    "lbfgs, backtracking": functools.partial(forgetful_lbfgs, backtracking=True),
    "adam": lambda rate=1e-3: optax.adam(rate),
    "nag": lambda rate=0.01: optax.sgd(rate, momentum=0.9, nesterov=True),
    "sgd": lambda rate=0.1: optax.sgd(rate, momentum=0.9),
}


class Run(NamedTuple):
    """What is to be run.

    Attributes:
        network: A key of ``TASKS``.
        method: A key of ``METHODS``.
        settings: What its function takes.
        batch_size: Examples in a step; all there are where there are fewer.
        seconds: The run ends with the step in which its own time, without compiling and testing, reaches this,
        epochs: or with the step that completes so many passes over the training set.
    """

    network: str
    method: str
    settings: dict[str, float]
    batch_size: int
    seconds: float
    epochs: float | None = None

    @property
    def label(self) -> str:
        """The method and its settings in words."""
        settings = ", ".join(f"{key} {value:g}" for key, value in self.settings.items())
        return f"{self.method} ({settings})" if settings else self.method


def train(run: Run, folder: str | None = None) -> tuple[str, list[dict[str, float]]]:
    """Trains from seed 0.

    Returns:
        What the data set is and where it came from, and the records: step, seconds, epoch, loss (the mean since the
        last record), test_error in per cent, and for L-SR1 skipped_fraction, of the pairs.
    """
    task = TASKS[run.network]
    network, dataset = task.make(), data.load(task.dataset, folder)
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy(), l2=task.l2 or None)
    tx = optax.with_extra_args_support(METHODS[run.method](**run.settings))
    images = jnp.asarray(dataset.train_inputs).reshape(-1, *network.image_shape)
    labels = jnp.asarray(dataset.train_targets)
    count, batch_size = len(labels), min(run.batch_size, len(labels))
    tests = jnp.asarray(dataset.test_inputs).reshape(-1, *network.image_shape), jnp.asarray(dataset.test_targets)
    tests = jax.tree.map(lambda leaf: leaf[:TEST_EXAMPLES], tests)

    def step(params, state, chosen):
        loss, gradient, at = objective.value_and_grad(params, (images[chosen], labels[chosen]))
        # What a line search of optax wants; it hands ``at`` on to the function of the loss.
        line = {"value": loss, "grad": gradient, "value_fn": lambda p, at: at.loss_at(p)}
        updates, state = tx.update(gradient, state, params, at=at, **line)
        return optax.apply_updates(params, updates), state, loss

    def test_error(params):
        # Batch normalisation takes the statistics of what it is given: parts of the size of a training batch.
        size = min(batch_size, 500, len(tests[1]))
        parts = len(tests[1]) // size
        batches = jax.tree.map(lambda leaf: leaf[: parts * size].reshape(parts, size, *leaf.shape[1:]), tests)
        wrong = jax.lax.map(lambda b: jnp.mean(jnp.argmax(network.apply(params, b[0]), axis=-1) != b[1]), batches)
        return 100 * jnp.mean(wrong)

    params = jax.jit(network.init)(jax.random.key(0))
    state = tx.init(params)
    # Compiled beforehand and not run: a line search on a whole data set takes minutes.
    compiled_step = jax.jit(step).lower(params, state, jnp.arange(batch_size)).compile()
    compiled_test_error = jax.jit(test_error).lower(params).compile()

    records, losses, seconds, steps = [], [], 0.0, 0
    every = min(count // batch_size, STEPS_BETWEEN_RECORDS)
    batches = _batches(count, batch_size)
    with Progress(None, run.seconds, f"{run.network}, batch {batch_size}, {run.label}", interval=20) as progress:
        while not _over(run, seconds, steps * batch_size / count):
            chosen = jnp.asarray(next(batches))
            begin = time.perf_counter()
            params, state, loss = compiled_step(params, state, chosen)
            losses.append(float(loss))
            seconds, steps = seconds + time.perf_counter() - begin, steps + 1
            epoch = steps * batch_size / count
            if steps % every and not _over(run, seconds, epoch):
                continue
            record = {"step": steps, "seconds": seconds, "epoch": epoch, "loss": float(np.mean(losses))}
            record["test_error"] = float(compiled_test_error(params))
            extra = state.info.extra if isinstance(state, curvax.transforms.StepState) else {}
            if "skipped_pairs" in extra:
                record["skipped_fraction"] = int(extra["skipped_pairs"]) / steps
            records.append(record)
            losses = []
            progress.update(steps, {name: value for name, value in record.items() if name != "step"})
    return str(dataset), records


def _over(run: Run, seconds: float, epoch: float) -> bool:
    return seconds >= run.seconds or (run.epochs is not None and epoch >= run.epochs)


def _batches(count: int, size: int):
    """Random batches without end, each example once in a pass, what is left over at its end dropped."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
