"""The autoencoder benchmark on tiny problems: runs end, resume where they were, and leave what they promise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks import autoencoder, autoencoder_bench, demo, training
from benchmarks.optimizers import OPTIMIZERS, settings_of
from benchmarks.training import Batches, loss_at, train


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Benchmarks run in single precision and with jax's ordinary promotion, which optax's optimisers need."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


TINY = {"sizes": (64, 12, 3), "num_train": 60, "num_test": 20}


def tiny(name="digits", **options):
    return autoencoder.make_problem(name, **{**TINY, **options})


def test_batches_are_a_function_of_the_step_and_cover_every_epoch():
    inputs = np.arange(10)[:, None]
    batches = Batches(inputs, 2 * inputs, 3, seed=1)
    epoch = np.concatenate([batches.at(step)[0][:, 0] for step in range(3)])
    assert len(set(epoch)) == 9
    assert epoch.tolist() != np.concatenate([batches.at(step)[0][:, 0] for step in range(3, 6)]).tolist()
    for step in (4, 0, 4):
        first, second = batches.at(step), Batches(inputs, 2 * inputs, 3, seed=1).at(step)
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], 2 * first[0])
    whole = Batches(inputs, inputs, 50).at(7)
    np.testing.assert_array_equal(np.sort(whole[0], axis=0), inputs)


@pytest.mark.many_compilations("the benchmark initialises networks and writes figures eagerly")
@pytest.mark.parametrize("name", [pytest.param("hessian_free", marks=pytest.mark.slow), "adam"])
def test_an_interrupted_run_goes_on_to_the_same_end(name, tmp_path):
    problem = tiny()
    settings = settings_of(name, batch_size=20, decay="none")  # which knows no end
    settings = {**settings, **({"max_iterations": 3, "curvature_size": 10} if name == "hessian_free" else {})}
    straight = autoencoder.fit(problem, name, settings, steps=6)
    autoencoder.fit(problem, name, settings, steps=2, folder=tmp_path)
    resumed = autoencoder.fit(problem, name, settings, steps=6, folder=tmp_path)
    for a, b in zip(jax.tree.leaves(resumed[:2]), jax.tree.leaves(straight[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.records[-1]["step"] == 6
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [record["step"] for record in resumed.records]
    assert resumed.records[-1]["loss"] < resumed.records[0]["loss"]


@pytest.mark.many_compilations("the benchmark initialises networks and writes figures eagerly")
def test_losses_are_above_the_floor_and_errors_are_squared_errors():
    problem = tiny()
    figures = problem.evaluate()(problem.params)
    images = problem.dataset.train_inputs.astype(np.float64)
    shown = np.asarray(jax.nn.sigmoid(autoencoder.network(problem.params, jnp.asarray(problem.dataset.train_inputs))))
    np.testing.assert_allclose(figures["squared_error"], ((shown - images) ** 2).sum(1).mean(), rtol=1e-5)
    cross_entropy = -(images * np.log(shown) + (1 - images) * np.log1p(-shown)).sum(1).mean()
    np.testing.assert_allclose(figures["loss"], cross_entropy - problem.floor, rtol=1e-4)
    batch = (problem.dataset.train_inputs, problem.dataset.train_inputs)
    np.testing.assert_allclose(problem.objective(problem.params, batch), cross_entropy, rtol=1e-5)


@pytest.mark.many_compilations("the benchmark initialises networks and writes figures eagerly")
def test_layers_scale_and_must_fit_the_data():
    problem = autoencoder.make_problem("digits", scale=0.5, num_train=5, num_test=5)
    assert problem.sizes == (64, 30, 15, 5)
    shapes = [layer["kernel"].shape for layer in problem.params]
    assert shapes == [(64, 30), (30, 15), (15, 5), (5, 15), (15, 30), (30, 64)]
    with pytest.raises(ValueError, match="64 units"):
        autoencoder.make_problem("digits", (784, 5), num_train=5, num_test=5)


# The others are those of the conformance matrix, and meet the registry under `make test-all`.
@pytest.mark.many_compilations("the benchmark initialises networks and writes figures eagerly")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("hessian_free", "nag") else pytest.mark.slow) for name in OPTIMIZERS],
)
def test_every_optimiser_of_the_registry_reduces_the_loss(name):
    problem = tiny()
    small = {"max_iterations": 3, "num_vectors": 3, "max_subspace_iterations": 3, "batch_size": 60}
    settings = settings_of(name, **{key: small[key] for key in small if key in OPTIMIZERS[name].defaults})
    settings.pop("curvature_size", None)
    run = autoencoder.fit(problem, name, settings, steps=4)
    assert run.records[-1]["loss"] < run.records[0]["loss"]
    for changes in OPTIMIZERS[name].grid:
        assert settings_of(name, **changes)


def test_nesterov_is_sutskevers_with_its_growing_momentum():
    """v <- mu v - epsilon grad h(theta + mu v), theta <- theta + v; optax keeps theta + mu v as its parameters."""
    rate, top = 0.1, 0.9
    tx = OPTIMIZERS["nag"].make(learning_rate=rate, momentum=top)
    curvature = jnp.array([1.0, 3.0], jnp.float32)
    shown = jnp.array([1.0, -1.0], jnp.float32)
    update = jax.jit(tx.update)
    state, v = jax.jit(tx.init)(shown), jnp.zeros(2)
    mus = []
    for step in range(600):
        mu = min(1 - 2 ** (-1 - np.log2(step // 250 + 1)), top)
        mus.append(mu)
        gradient = curvature * shown
        updates, state = update(gradient, state, shown)
        v = mu * v - rate * gradient
        expected = shown + mu * v - rate * gradient
        shown = optax.apply_updates(shown, updates)
        if step in (0, 1, 249, 250):
            np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-7)
    assert mus[0] == 0.5
    assert mus[250] == 0.75
    assert max(mus) <= top


def test_unknown_settings_and_names_are_refused():
    with pytest.raises(ValueError, match="choose among"):
        settings_of("adamant")
    with pytest.raises(ValueError, match="no setting 'damping'"):
        settings_of("adam", damping=1.0)
    with pytest.raises(ValueError, match="budget"):
        train("", optax.sgd(0.1), None, None, None, evaluate=None)


@pytest.mark.many_compilations("the benchmark initialises networks and writes figures eagerly")
def test_the_command_line_leaves_log_plots_and_reconstructions(tmp_path, capsys):
    options = "--data digits --sizes 64-8-2 --num-train 40 --optimizer adam --optimizer sgd --steps 3"
    autoencoder.main([*options.split(), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "adam" in printed
    assert "sgd" in printed
    assert (tmp_path / "digits.png").stat().st_size > 1000
    assert (tmp_path / "digits_reconstructions.png").stat().st_size > 1000
    assert len(list(tmp_path.glob("*/log.jsonl"))) == 2


@pytest.mark.many_compilations("the benchmark initialises networks and writes figures eagerly")
def test_the_bench_tunes_reports_and_does_not_repeat_what_is_on_file(tmp_path, monkeypatch):
    case = autoencoder_bench.Case({"name": "digits", **TINY}, (0.01, 0.02), "a test", ("adam", "sgd"))
    monkeypatch.setitem(autoencoder_bench.CASES, "tiny", case)
    for name, count in {"adam": 2, "sgd": 1}.items():
        short = OPTIMIZERS[name]._replace(grid=OPTIMIZERS[name].grid[:count])
        monkeypatch.setitem(OPTIMIZERS, name, short)

    def bench(deadline):
        return autoencoder_bench.Bench("tiny", tmp_path, None, 1.0, deadline)

    allowed = ("adam", "sgd")
    assert not bench(-np.inf).run(allowed)
    some = bench(np.inf)
    assert some.run(("adam",))
    assert list(some.runs) == ["adam"]
    first = bench(np.inf)
    assert first.run(allowed)
    report = first.report()
    again = bench(-np.inf)  # no time for any run, and none is needed
    assert again.run(allowed)
    assert again.report() == report
    for name, tried in first.grids.items():
        losses = [loss for _, loss in tried]
        assert first.best[name] == tried[int(np.argmin(losses))][0]
        assert f"- {name}: (" in report
    winner = min(first.runs, key=lambda name: first.runs[name][-1]["loss"])
    assert f"Lowest at the end: {winner}" in report


def test_the_demo_reads_tuned_settings_and_falls_back_on_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RESULTS", tmp_path)
    settings, source = demo.settings_in_use()
    assert settings["adam"] == settings_of("adam")
    assert "defaults" in source
    tuned = {name: {"learning_rate": 7.0} for name in demo.NAMES}
    (tmp_path / "tuned.json").write_text(json.dumps({"demo": tuned}))
    settings, source = demo.settings_in_use()
    assert settings == tuned
    assert "tuned by" in source


class _Clock:
    """Seconds that pass when a step is taken, one for each."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.5
        return self.now


def test_records_at_marks_are_from_before_the_step_that_passed_them(monkeypatch):
    """On a clock by which every step takes half a second and takes 1 away, times the decay."""
    monkeypatch.setattr(training, "time", _Clock())
    objective = curvax.Objective(lambda theta, x: x * theta, curvax.losses.squared_error())
    inputs = np.ones((8, 1), np.float32)
    settings = {"evaluate": lambda theta: {"loss": float(theta)}, "evaluations": 2}
    start = jnp.zeros((), jnp.float32)
    minus_one = optax.stateless(lambda updates, _: -jnp.ones_like(updates))

    def run(**options):
        batches = Batches(inputs, inputs, options.pop("size", 4))
        return train("", minus_one, objective, start, batches, **settings, **options)

    records = run(seconds=5.0, marks=(2.2, 3.9)).records
    assert [record["step"] for record in records] == [0, 4, 7, 9, 10]
    assert [record["seconds"] for record in records] == [0, 2.0, 3.5, 4.5, 5.0]
    np.testing.assert_allclose([record["loss"] for record in records], [0, -4, -7, -9, -10])
    decayed = run(steps=4, cosine_decay=True).params
    np.testing.assert_allclose(decayed, -np.sum(1 + np.cos(np.pi * np.arange(4) / 4)) / 2, rtol=1e-6)
    growing = Batches(inputs, inputs, curvax.schedules.exponential_batch_size(2, 8, steps_to_whole=3))
    assert [len(growing.at(step)[0]) for step in range(4)] == [2, 4, 8, 8]


def test_losses_by_time_are_the_last_measured_before():
    records = [{"seconds": 0.0, "loss": 9.0}, {"seconds": 5.0, "loss": 4.0}, {"seconds": 10.1, "loss": 1.0}]
    assert loss_at(records, 7.0) == 4
    assert loss_at(records, 10.0) == 4
    assert loss_at(records, 10.1) == 1
    assert loss_at(records, 11.0) is None
