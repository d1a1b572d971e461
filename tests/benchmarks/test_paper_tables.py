"""The tables of CurveBall's, L-SR1's and the cubic step's papers: their problems are right and their commands run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks import cubic_plateau, curveball_toys, data, image_tables, image_training, step_cost
from benchmarks import image_networks as networks


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def test_rosenbrocks_residuals_and_noise():
    problem = curveball_toys.rosenbrock(0, 3, 0.25)
    w, noise = jnp.array([0.3, -0.7]), jnp.array(1.7)
    truth = (1 - 0.3) ** 2 + 100 * 1.7 * (-0.7 - 0.09) ** 2
    value = jax.jit(problem.objective)(w, (noise[None], jnp.zeros((1, 2))))
    np.testing.assert_allclose(value, truth, rtol=1e-5)
    draw = jax.jit(lambda key: problem.draw(key)[0][0])
    drawn = [float(draw(jax.random.key(i))) for i in range(50)]
    assert 0 <= min(drawn) < 0.5 < 2.5 < max(drawn) <= 3


def test_curveball_solves_rosenbrocks_function_in_the_paper_s_number_of_iterations_or_two_more():
    problem, solver = curveball_toys.rosenbrock(1, 1, 0.25), curveball_toys.SOLVERS["curveball, lambda_0 = 1"]
    counts = np.asarray(
        curveball_toys.counter(problem, solver, "loss")(jnp.array(()), jax.random.split(jax.random.key(0), 20))
    )
    assert abs(counts.mean() - 13) <= 2
    assert counts.std() < 1


def test_the_linear_network_is_ill_conditioned():
    problem = curveball_toys.linear_network(examples=50)
    x, y = problem.clean
    matrix = np.linalg.lstsq(np.asarray(x, float), np.asarray(y, float), rcond=None)[0]
    np.testing.assert_allclose(np.linalg.cond(matrix), 1e5, rtol=0.2)


@pytest.mark.parametrize("backtracking", [False, True])
def test_a_forgetful_memory_is_emptied_every_fifth_step(backtracking):
    tx = image_training.forgetful_lbfgs(period=5, backtracking=backtracking)

    def function(x):
        return jnp.sum(jnp.arange(1.0, 4.0) * x**2)

    x = jnp.ones(3)
    state, filled = tx.init(x), []
    step = jax.jit(
        lambda x, s: tx.update(
            jax.grad(function)(x), s, x, value=function(x), grad=jax.grad(function)(x), value_fn=function
        )
    )
    for _ in range(7):
        updates, state = step(x, state)
        x = x + updates
        filled.append(int(state[1][0].count))
    assert filled == [1, 2, 3, 4, 5, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "files"),
    [
        (curveball_toys, ["--runs", "2"], ["curveball_toys.md", "curveball_toys.png"]),
        (cubic_plateau, ["--steps", "120", "--data", "mnist"], ["cubic_plateau.md", "cubic_plateau_mnist.png"]),
        (step_cost, ["--repeats", "1"], ["step_cost", "step_cost.md"]),
    ],
    ids=["toys", "plateau", "step_cost"],
)
def test_the_command_writes_its_table(module, arguments, files, tmp_path):
    module.main([*arguments, "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert all(path.stat().st_size > 200 for path in tmp_path.iterdir())


def test_a_random_network_is_that_of_its_seed_and_within_the_papers_bounds():
    depths = []
    for seed in range(12):
        network = networks.random_network(seed)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        depths.append(len(shapes))
        logits = jax.eval_shape(network.apply, shapes, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
        assert logits.shape == (2, 10)
        assert all("scale" in layer for layer in shapes[:-1])
        assert "scale" not in shapes[-1]
        again = jax.eval_shape(networks.random_network(seed).init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, again)
    assert 3 <= min(depths) < max(depths) <= 10


@pytest.mark.slow
def test_the_cubic_rate_is_a_hundred_times_higher_on_the_plateau_and_leaves_it_where_sgd_stays():
    dataset = data.load("digits")
    cubic = lambda o: curvax.scale_by_cubic_step(optax.sgd(0.02), sigma=100.0)  # noqa: E731
    losses, rates = cubic_plateau.train(dataset, cubic, 0.1, 1500)
    error, rate = cubic_plateau.smoothed(losses), cubic_plateau.smoothed(rates)
    assert rate.max() > 50 * rate[-1]
    assert error[-1] < 0.9 * error[0]
    stuck, _ = cubic_plateau.train(dataset, lambda _: optax.sgd(0.02), 0.1, 1500)
    assert cubic_plateau.smoothed(stuck)[-1] > 0.99 * stuck[0]


@pytest.mark.slow
def test_with_biases_the_noise_of_a_batch_holds_the_cubic_rate_on_the_plateau():
    cubic = lambda o: curvax.scale_by_cubic_step(optax.sgd(0.02), sigma=100.0)  # noqa: E731
    _, rates = cubic_plateau.train(data.load("digits"), cubic, 0.1, 200, biases=True)
    np.testing.assert_allclose(rates.mean(), cubic_plateau.noise_rate(100.0), rtol=0.15)


@pytest.fixture
def short_runs(monkeypatch):
    """What ``train`` is called with; nothing is trained."""
    called = []

    def train(run, folder):
        del folder
        called.append(run)
        ends = [{"step": 2, "seconds": 1.0, "epoch": 1.0, "loss": 2.0, "test_error": 60.0}]
        last = 2.0 if run.method == "nag" else 4.0
        ends.append({"step": 4, "seconds": 2.0, "epoch": last, "loss": 1.0, "test_error": 2.0})
        return "some data", [end | ({"skipped_fraction": 0.25} if run.method == "lsr1" else {}) for end in ends]

    monkeypatch.setattr(image_tables, "train", train)
    return called


def test_image_tables_go_on_with_what_is_missing(short_runs, tmp_path, capsys):
    command = ["--experiment", "lenet_500", "mlp", "sensitivity", "--output", str(tmp_path)]
    image_tables.main([*command, "--minutes", "0"])
    assert not short_runs
    image_tables.main(command)
    assert {run.network for run in short_runs} == {"lenet", "mlp", "cifar_net"}
    done = len(short_runs)
    image_tables.main(command)
    image_tables.main(["--minutes", "0", "--output", str(tmp_path)])
    assert len(short_runs) == done
    text = (tmp_path / "image_networks.md").read_text()
    assert "| lsr1 (memory 2) | 4 | 4.0 | 2 | 1.0000 | 2.00 | 60.00 | 4.0 | 2 | 25.0% |" in text
    assert "missing" not in text
    assert (tmp_path / "image_networks_mlp.png").stat().st_size > 1000
    # A table with a run of two epochs is no result.
    assert not (tmp_path / "image_networks_lenet_500.png").exists()
    assert "- L-SR1, table 1: lenet with batch normalisation, batches of 500: nag (rate 0.003) had 2.0 epochs" in text

    # Another time for a run is another run.
    next((tmp_path / "image_networks").glob("mlp_*adam*.json")).unlink()
    image_tables.main(["--minutes", "0", "--output", str(tmp_path)])
    assert "Runs missing: 1." in (tmp_path / "image_networks.md").read_text()
    image_tables.main([*command, "--seconds", "7"])
    assert [run.seconds for run in short_runs[done:]] == [7.0] * done
    capsys.readouterr()


def test_image_tables_over_networks_have_quartiles(short_runs, tmp_path):
    image_tables.main(["--experiment", "random_architectures", "--output", str(tmp_path)])
    assert len(short_runs) == 4 * image_tables.RANDOM_NETWORKS
    text = (tmp_path / "image_networks.md").read_text()
    assert f"| curveball | {image_tables.RANDOM_NETWORKS} | 1.0000 | 1.0000 | 1.0000 | 2.0 | 2 |" in text


def test_every_run_of_the_image_tables_can_be_built_and_has_a_file_of_its_own(tmp_path):
    for experiment in image_tables.experiments().values():
        for run in experiment.runs:
            assert run.network in image_training.TASKS
            image_training.METHODS[run.method](**run.settings).init(jnp.zeros((3, 2)))
    runs = [run for experiment in image_tables.experiments().values() for run in experiment.runs]
    assert len({image_tables.file_of(run, tmp_path) for run in runs}) == len({repr(run) for run in runs})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsr1", "lbfgs", "adam", "curveball"])
def test_a_single_run_of_an_image_network(method, tmp_path, capsys):
    command = ["--network", "mlp", "--method", method, "--seconds", "3", "--output", str(tmp_path)]
    image_tables.main(command)
    assert method in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    _, records = image_training.train(image_training.Run("mlp", method, {}, 64, 3.0))
    assert records[-1]["loss"] < records[0]["loss"]
