"""Sequences against naive definitions, the network against a loop, the criterion, the table, and small lags solved."""

import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import rnn_tasks
from benchmarks.rnn_data import TASKS
from benchmarks.rnn_tasks import Settings

ROOT = pathlib.Path(rnn_tasks.__file__).parents[1]
SMALL = {"hidden": 20, "gradient_batch": 40, "curvature_batch": 20, "test_batch": 30, "max_iterations": 10}
lags = st.integers(10, 130)
seeds = st.integers(0, 10**6)
quick = settings(max_examples=20, deadline=None)


def draw(name, lag, seed=0, count=64):
    count = TASKS[name].population or count
    return TASKS[name].draw(np.random.default_rng(seed), lag, count)


@pytest.mark.parametrize(
    ("name", "operation"),
    [("addition", lambda a, b: a + b), ("multiplication", lambda a, b: a * b), ("xor", lambda a, b: (a + b) % 2)],
)
@quick
@given(lag=lags, seed=seeds)
def test_the_target_is_made_of_the_two_marked_values(name, operation, lag, seed):
    inputs, targets = draw(name, lag, seed)
    assert inputs.shape == (64, lag, 2)
    assert targets.shape == (64, 1, 1)
    assert inputs.dtype == targets.dtype == np.float32
    for sequence, target in zip(inputs, targets, strict=True):
        marked = [t for t in range(lag) if sequence[t, 1] == 1]
        assert np.count_nonzero(sequence[:, 1]) == len(marked) == 2
        assert 0 <= marked[0] < lag // 10 <= marked[1] < lag // 2
        assert target.item() == operation(*sequence[marked, 0])
    values = inputs[..., 0]
    assert np.all((values == 0) | (values == 1)) if name == "xor" else np.all((values >= 0) & (values < 1))


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("temporal_order", [(10, 20), (50, 60)]),
        ("temporal_order_3bit", [(10, 20), (33, 43), (66, 76)]),
    ],
)
@quick
@given(lag=lags, seed=seeds)
def test_the_target_numbers_the_special_symbols_in_their_order(name, windows, lag, seed):
    inputs, targets = draw(name, lag, seed)
    assert inputs.shape == (64, lag)
    assert targets.shape == (64, 1)
    assert inputs.dtype == targets.dtype == np.int32
    classes = list(itertools.product((0, 1), repeat=len(windows)))
    assert len(classes) == TASKS[name].num_outputs
    for sequence, target in zip(inputs, targets, strict=True):
        special = [t for t in range(lag) if sequence[t] in (0, 1)]
        assert len(special) == len(windows)
        assert all(low * lag // 100 <= t < high * lag // 100 for t, (low, high) in zip(special, windows, strict=True))
        assert classes[target.item()] == tuple(sequence[special])
        assert set(sequence) <= set(range(6))


@quick
@given(lag=lags, seed=seeds)
def test_a_permutation_ends_as_it_began_and_its_targets_are_one_step_ahead(lag, seed):
    inputs, targets = draw("random_permutation", lag, seed)
    assert inputs.shape == targets.shape == (64, lag)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(inputs[:, 0], targets[:, -1])
    assert set(inputs[:, 0]) == {0, 1}
    assert inputs[:, 1:].min() >= 2
    assert inputs[:, 1:].max() <= 99


@pytest.mark.parametrize("lag", [1, 10, 37])
def test_memorization_is_all_words_of_five_bits(lag):
    inputs, targets = draw("memorization", lag)
    words = list(itertools.product((0, 1), repeat=5))
    for word, sequence, target in zip(words, inputs, targets, strict=True):
        assert sequence.tolist() == [*word, *[2] * lag, 3, 2, 2, 2, 2]
        assert target[:, 0].tolist() == list(word)
    with pytest.raises(ValueError, match="has 32 sequences, all of which are taken; asked for 31"):
        TASKS["memorization"].draw(np.random.default_rng(0), lag, 31)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "memorization"])
def test_draws_follow_the_seed_are_fresh_and_cover_every_target_and_position(name):
    task, generator = TASKS[name], np.random.default_rng(1)
    first, second = (task.draw(generator, 100, 2000) for _ in range(2))
    np.testing.assert_array_equal(draw(name, 100, 1, 2000)[0], first[0])
    assert not np.array_equal(first[0], second[0])
    inputs, targets = first
    if task.target == "number":
        assert len(np.unique(targets)) > 1900
    else:
        counts = np.unique(targets[:, -1], return_counts=True)[1]
        assert counts.min() > 0.8 * counts.mean()
    if inputs.ndim == 3:
        assert set(np.nonzero(inputs[..., 1])[1]) == set(range(50))
    else:
        specials = np.nonzero(inputs < 2)[1]
        windows = {"temporal_order": (10, 50), "temporal_order_3bit": (10, 33, 66)}.get(name)
        assert set(specials) == ({0} if windows is None else {t + k for t in windows for k in range(10)})


@pytest.mark.parametrize(("name", "lag", "least"), [("addition", 9, 10), ("temporal_order", 3, 10)])
def test_a_lag_too_short_for_the_windows_is_an_error(name, lag, least):
    with pytest.raises(ValueError, match=f"needs a lag of at least {least} steps, got {lag}"):
        draw(name, lag)


@pytest.mark.parametrize("name", TASKS)
def test_the_network_is_the_recursion_and_has_outputs_where_there_are_targets(name):
    task, lag = TASKS[name], 11
    inputs, targets = draw(name, lag, count=3)
    params = jax.jit(lambda key: rnn_tasks.initial(task, 30, key))(jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    outputs, aux = jax.jit(rnn_tasks.network(task))(
        params, jnp.asarray(inputs, jnp.float64 if inputs.ndim == 3 else None)
    )

    w = jax.tree.map(np.asarray, params)
    expected, states = [], []
    for sequence in inputs:
        hidden, each = np.zeros(30), []
        for step in sequence:
            x = step if inputs.ndim == 3 else np.eye(task.num_inputs)[step]
            hidden = np.tanh(x @ w["input"] + w["hidden_bias"] + hidden @ w["recurrent"])
            each.append(hidden)
        states.append(each)
        expected.append([h @ w["output"] + w["output_bias"] for h in each][-targets.shape[1] :])
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(aux["hidden"], states, rtol=1e-12, atol=1e-12)
    assert outputs.shape == (len(inputs), targets.shape[1], task.num_outputs)


def test_the_initial_network_has_fifteen_connections_into_a_unit_and_a_little_over_ten_thousand_parameters():
    params = jax.jit(lambda key: rnn_tasks.initial(TASKS["temporal_order"], 100, key))(jax.random.key(0))
    assert {name: leaf.dtype for name, leaf in params.items()} == dict.fromkeys(params, jnp.float32)
    assert 10_000 < sum(leaf.size for leaf in params.values()) < 12_000
    for name, connections, variance in [("input", 6, 1.0), ("recurrent", 15, 1 / 15), ("output", 15, 1 / 15)]:
        leaf = np.asarray(params[name])
        assert set((leaf != 0).sum(axis=0)) == {connections}, name
        values = leaf[leaf != 0]
        assert abs(values.var() / variance - 1) < 5 * np.sqrt(2 / values.size), name
    assert abs(np.asarray(params["hidden_bias"]).var() * 15 - 1) < 5 * np.sqrt(2 / 100)


def test_misclassified_is_one_wrong_bit_the_last_class_or_an_error_above_four_hundredths():
    def wrong(name, outputs, targets):
        return rnn_tasks.wrong(TASKS[name], jnp.array(outputs), jnp.array(targets)).tolist()

    assert wrong("addition", [[[1.03]], [[0.97]], [[1.05]], [[0.95]]], [[[1.0]]] * 4) == [False, False, True, True]
    bits = [[[0.0], [1.0], [1.0], [0.0], [1.0]]] * 3
    right = [[-1.0], [2.0], [0.1], [-0.1], [1.0]]
    assert wrong("memorization", [right, [[1.0], *right[1:]], [*right[:4], [-1.0]]], bits) == [False, True, True]
    likely = {0: [1.0, 0.0, 0.0], 2: [0.0, 0.0, 1.0]}
    assert wrong("random_permutation", [[likely[2], likely[0]], [likely[0], likely[2]]], [[0, 0]] * 2) == [False, True]
    assert wrong("temporal_order", [[likely[2]], [likely[0]]], [[2], [2]]) == [False, True]


def test_error_rate_counts_every_sequence_once():
    sequences = (np.arange(2500), np.arange(2500) % 4)
    rate = rnn_tasks.error_rate(lambda params, batch: np.asarray(batch[1] == params), 0, sequences)
    assert rate == 625 / 2500


def test_the_defaults_are_those_of_the_paper():
    default = Settings("addition", 50)
    assert (default.hidden, default.gradient_batch, default.curvature_batch, default.test_batch) == (
        (100, 10_000, 1000, 10_000)
    )
    assert (default.max_iterations, default.max_sequences) == (300, 50_000_000)
    starts = [Settings("addition", 50, damping).initial_damping for damping in ("structural", "tikhonov")]
    assert starts == [0.1, 0.3]
    assert Settings("random_permutation", 50).initial_damping == 5.0
    whole = Settings("memorization", 50)
    assert (whole.gradient_batch, whole.curvature_batch, whole.test_batch) == (32, 32, 32)
    with pytest.raises(ValueError, match="part of the gradient batch of 10 sequences and cannot have 20"):
        Settings("addition", 50, gradient_batch=10, curvature_batch=20)


@pytest.mark.many_compilations("the benchmark draws and initialises eagerly")
def test_sequences_are_those_of_products_and_gradients_and_too_many_are_a_failure(monkeypatch):
    limit = 25 * SMALL["curvature_batch"]
    small = Settings("addition", 10, max_sequences=limit, **SMALL)
    trainer, iterations = rnn_tasks.make_trainer(small), []

    def step(params, state, batch):
        params, state = trainer.step(params, state, batch)
        iterations.append(int(state.info.inner_iterations))
        return params, state

    monkeypatch.setattr(rnn_tasks, "make_trainer", lambda settings: trainer._replace(step=step))
    record = rnn_tasks.run(small, seed=0)
    assert record is not None
    assert record["outcome"] == "failed"
    assert record["steps"] == len(iterations)
    counts = [small.gradient_batch + small.curvature_batch * count for count in iterations]
    assert record["sequences"] == sum(counts) > limit
    assert record["sequences"] - counts[-1] <= limit
    assert rnn_tasks.run(small, seed=0, deadline=0.0) is None


def test_the_table_is_taken_up_again_and_says_what_it_holds(monkeypatch, tmp_path, capsys):
    ran = []

    def run(chosen, seed, deadline):
        del deadline
        ran.append((chosen.task, chosen.lag, chosen.damping, seed))
        if len(ran) == 4:
            return None
        solved = chosen.lag == 10
        return {
            "outcome": "solved" if solved else "failed",
            "sequences": 100_000 + 50_000 * seed,
            "steps": 3,
            "seconds": 2.0,
            "test_error": 0.0 if solved else 0.5,
            "seed": seed,
            "settings": {**vars(chosen)},
        }

    monkeypatch.setattr(rnn_tasks, "run", run)
    command = ["--table", "--task", "xor", "--damping", "tikhonov", "--seeds", "0", "2", "--output", str(tmp_path)]
    rnn_tasks.main(command)
    lags_and_seeds = [(lag, seed) for seed in (0, 2) for lag in rnn_tasks.TABLE_LAGS]
    assert [(lag, seed) for _, lag, _, seed in ran] == lags_and_seeds
    assert "9 runs are in" in capsys.readouterr().out
    rnn_tasks.main(command)
    assert ran[10:] == [ran[3]]
    assert "missing" not in capsys.readouterr().out

    text = (tmp_path / "rnn_tasks.md").read_text()
    assert "10 of 10 runs" in text
    assert "| xor | 10 | tikhonov | 2 | 150 (100, 200) | 0 % | 2 |" in text
    assert "| xor | 30 | tikhonov | 2 | - | 100 % | 2 |" in text
    for figure in ("2000 for the gradient", "first 500 of them", "more than 3,000,000 sequences (the paper: 50,000"):
        assert figure in text
    rnn_tasks.main([*command, "--hidden", "50"])
    assert len(ran) == 11 + 10


def test_a_single_run_needs_a_task_and_a_lag():
    with pytest.raises(SystemExit, match="--task and --lag"):
        rnn_tasks.main(["--task", "xor"])


@pytest.mark.slow
@pytest.mark.parametrize("damping", ["structural", "tikhonov"])
@pytest.mark.parametrize("name", TASKS)
def test_a_lag_of_ten_is_solved(name, damping, tmp_path):
    """In a process of its own, in float32 and with the compiler's optimisations, as a user would run it."""
    sizes = {name.replace("_", "-"): str(value) for name, value in rnn_tasks.TABLE_SIZES.items()}
    options = [f"--{option}={value}" for option, value in sizes.items()]
    file = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.rnn_tasks", f"--task={name}", "--lag=10", f"--damping={damping}"]
    subprocess.run([*command, *options, f"--json={file}"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    record = json.loads(file.read_text())
    assert record["outcome"] == "solved"
    assert record["test_error"] < 0.01
    assert record["sequences"] <= rnn_tasks.TABLE_SIZES["max_sequences"]
