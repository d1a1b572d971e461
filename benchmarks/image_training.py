"""Image networks trained by CurveBall, L-SR1 and methods of first order: epochs to a test error, skipped pairs, time.

Run, for instance::

    python -m benchmarks.image_training --network lenet --optimizer lsr1 adam nag --batch-size 500 --seconds 60
    python -m benchmarks.image_training --network basic_cnn --optimizer curveball adam sgd --batch-size 128
    python -m benchmarks.image_training --network cifar_net --optimizer lsr1 --sweep memory

``--sweep`` tries one setting of L-SR1 on its grid (memory 2, 5, 10; decrease and increase of the radius). Learning
rates of methods of first order are tuned on the grid that is printed, every setting for the full time.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from benchmarks import data
from benchmarks import image_networks as networks
from benchmarks.plots import plot_runs
from benchmarks.progress import table
from curvax.damping import RadiusRule

RESULTS = pathlib.Path(__file__).parent / "results"


class Task(NamedTuple):
    """A network, its data set, its penalty, and the test error in per cent that counts as reached."""

    make: Any
    dataset: str
    l2: float
    target: float


TASKS = {
    "lenet": Task(networks.lenet, "mnist", 1e-4, 3.0),
    "lenet_plain": Task(lambda: networks.lenet(batch_norm=False), "mnist", 1e-4, 3.0),
    "cifar_net": Task(networks.cifar_net, "cifar10", 1e-3, 50.0),
    "cifar_net_plain": Task(lambda: networks.cifar_net(batch_norm=False), "cifar10", 1e-3, 50.0),
    "basic_cnn": Task(networks.basic_cnn, "cifar10", 0.0, 50.0),
    "basic_cnn_bn": Task(lambda: networks.basic_cnn(batch_norm=True), "cifar10", 0.0, 50.0),
    "resnet20": Task(networks.resnet20, "cifar10", 1e-4, 50.0),
    "mlp": Task(lambda: networks.mlp((784, 128, 64, 32, 10)), "mnist", 0.0, 5.0),
}


def forgetful_lbfgs(period: int = 5) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with a line search whose memory of five is emptied every ``period`` steps, the rival of L-SR1's paper."""
    inner = optax.lbfgs(memory_size=5)

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
    "curveball": lambda o, damping: curvax.curveball(o, initial_damping=damping),
    "curveball_fixed": lambda o, damping: curvax.curveball(
        o, initial_damping=damping, rule=curvax.damping.DampingRule(decrease=1, increase=1)
    ),
    "lsr1": lambda o, memory=5, decrease=0.5, increase=2.0: curvax.lsr1(
        o, memory_size=memory, rule=RadiusRule(shrink=decrease, grow=increase)
    ),
    "lsr1_linesearch": lambda o: curvax.lsr1_linesearch(o),
    "lbfgs": lambda o: forgetful_lbfgs(),
    "adam": lambda o, rate: optax.adam(rate),
    "nag": lambda o, rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "sgd": lambda o, rate: optax.sgd(rate, momentum=0.9),
}


GRIDS: dict[str, list[dict[str, float]]] = {
    "curveball": [{"damping": 1.0}, {"damping": 10.0}],
    "curveball_fixed": [{"damping": 1.0}, {"damping": 10.0}],
    "lsr1": [{}],
    "lsr1_linesearch": [{}],
    "lbfgs": [{}],
    "adam": [{"rate": 1e-3}, {"rate": 3e-3}],
    "nag": [{"rate": 3e-3}, {"rate": 1e-2}, {"rate": 3e-2}],
    "sgd": [{"rate": 1e-2}, {"rate": 1e-1}],
}
SWEEPS = {
    "memory": [{"memory": m} for m in (2, 5, 10)],
    "radius": [{"decrease": d, "increase": i} for d, i in itertools.product((0.2, 0.5, 0.8), (1.2, 2.0))],
}


def train(task: Task, name: str, settings: dict[str, Any], batch_size: int, seconds: float, folder: str | None):
    """Trains for some seconds, compilation not counted; the records, one after every epoch or part of one."""
    network, dataset = task.make(), data.load(task.dataset, folder)
    objective = curvax.Objective(network.apply, curvax.losses.softmax_cross_entropy(), l2=task.l2 or None)
    tx = optax.with_extra_args_support(METHODS[name](objective, **settings))
    shape = network.image_shape
    images = jnp.asarray(dataset.train_inputs).reshape(-1, *shape)
    labels = jnp.asarray(dataset.train_targets)
    test = (jnp.asarray(dataset.test_inputs).reshape(-1, *shape)[:2000], jnp.asarray(dataset.test_targets)[:2000])
    count = images.shape[0]
    batch_size = min(batch_size, count)

    @jax.jit
    def step(params, state, chosen):
        loss, gradient, at = objective.value_and_grad(params, (images[chosen], labels[chosen]))
        # What a line search of optax wants; it hands ``at`` on to the function of the loss.
        line = {"value": loss, "grad": gradient, "value_fn": lambda p, at: at.loss_at(p)}
        updates, state = tx.update(gradient, state, params, at=at, **line)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def test_error(params):
        # Batch normalisation takes the statistics of what it is given: parts of the size of a training batch.
        size = min(batch_size, 500, len(test[0]))
        parts = len(test[0]) // size
        batches = jax.tree.map(lambda leaf: leaf[: parts * size].reshape(parts, size, *leaf.shape[1:]), test)
        wrong = jax.lax.map(lambda b: jnp.mean(jnp.argmax(network.apply(params, b[0]), axis=-1) != b[1]), batches)
        return 100 * jnp.mean(wrong)

    params = jax.jit(network.init)(jax.random.key(0))
    state = tx.init(params)
    order = np.random.default_rng(0)
    jax.block_until_ready((step(params, state, jnp.arange(batch_size)), test_error(params)))
    records, used, steps, losses, permutation, start = [], 0.0, 0, [], order.permutation(count), 0
    every = max(1, min(count // batch_size, 50))
    while used < seconds:
        begin = time.perf_counter()
        if start + batch_size > count:
            permutation, start = order.permutation(count), 0
        params, state, loss = step(params, state, jnp.asarray(permutation[start : start + batch_size]))
        losses.append(float(jax.block_until_ready(loss)))
        used, start, steps = used + time.perf_counter() - begin, start + batch_size, steps + 1
        if steps % every == 0 or used >= seconds:
            record = {
                "step": steps,
                "seconds": used,
                "epoch": steps * batch_size / count,
                "loss": float(np.mean(losses)),
                "test_error": float(test_error(params)),
            }
            skipped_pairs = getattr(getattr(state, "info", None), "skipped_pairs", None)
            if skipped_pairs is not None:
                record["skipped_fraction"] = int(skipped_pairs) / steps
            records.append(record)
            losses = []
    return str(dataset), records


def row_of(label: str, records: list[dict[str, float]], target: float) -> dict[str, str]:
    """What the table says of a run."""
    reached = [record for record in records if record["test_error"] <= target]
    return {
        "method": label,
        "steps": str(records[-1]["step"]),
        "epochs": f"{records[-1]['epoch']:.1f}",
        "training loss": f"{records[-1]['loss']:.4f}",
        "lowest test error, %": f"{min(record['test_error'] for record in records):.2f}",
        f"epochs to {target:g} %": f"{reached[0]['epoch']:.1f}" if reached else "-",
        f"seconds to {target:g} %": f"{reached[0]['seconds']:.0f}" if reached else "-",
        "skipped pairs": f"{records[-1]['skipped_fraction']:.1%}" if "skipped_fraction" in records[-1] else "",
    }


def main(argv=None):
    """Trains, prints the table and adds it to ``benchmarks/results/images_<network>_<batch size>.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=TASKS, required=True)
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, default=["lsr1", "curveball", "adam", "nag"])
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of every setting (default 60)")
    parser.add_argument("--sweep", choices=SWEEPS, help="try this setting of lsr1 in place of the optimisers")
    parser.add_argument("--data-folder")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    task = TASKS[arguments.network]
    plan = [("lsr1", s) for s in SWEEPS[arguments.sweep]] if arguments.sweep else None
    plan = plan or [(name, settings) for name in arguments.optimizer for settings in GRIDS[name]]
    rows, runs, source = [], {}, ""
    for name, settings in plan:
        label = " ".join([name, *(f"{key} {value:g}" for key, value in settings.items())])
        source, records = train(task, name, settings, arguments.batch_size, arguments.seconds, arguments.data_folder)
        rows.append(row_of(label, records, task.target))
        runs[label] = records
        print(rows[-1], flush=True)
    title = f"{arguments.network}, batch {arguments.batch_size}, {arguments.seconds:g} s for every setting"
    columns = list(rows[0])
    table(rows, columns, title)
    name = f"images_{arguments.network}_{arguments.batch_size}" + (f"_{arguments.sweep}" if arguments.sweep else "")
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot_runs(runs, arguments.output / f"{name}.png", title=title, label="training loss")
    lines = [f"# {title}", "", f"{source} l2 {task.l2:g}. Test error on 2,000 examples at most.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row[c] for c in columns) + " |" for row in rows]
    lines += ["", f"![training loss]({name}.png)", ""]
    (arguments.output / f"{name}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
