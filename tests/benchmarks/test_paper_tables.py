"""The tables of CurveBall's, L-SR1's and the cubic step's papers: their problems are right and their commands run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cubic_plateau, curveball_toys, image_training, step_cost


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def test_rosenbrocks_residuals_and_noise():
    problem = curveball_toys.rosenbrock(0, 3, 0.25)
    w, noise = jnp.array([0.3, -0.7]), jnp.array(1.7)
    truth = (1 - 0.3) ** 2 + 100 * 1.7 * (-0.7 - 0.09) ** 2
    np.testing.assert_allclose(problem.objective(w, (noise[None], jnp.zeros((1, 2)))), truth, rtol=1e-5)
    drawn = [float(problem.draw(jax.random.key(i))[0][0]) for i in range(50)]
    assert 0 <= min(drawn) < 0.5 < 2.5 < max(drawn) <= 3


def test_curveball_solves_rosenbrocks_function_in_the_paper_s_number_of_iterations_or_two_more():
    problem, solver = curveball_toys.rosenbrock(1, 1, 0.25), curveball_toys.SOLVERS["curveball"]
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


def test_a_forgetful_memory_is_emptied_every_fifth_step():
    tx = image_training.forgetful_lbfgs(period=5)

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
        (step_cost, ["--repeats", "1"], ["step_cost.md"]),
        (
            image_training,
            ["--network", "mlp", "--seconds", "1", "--optimizer", "lsr1", "lbfgs", "adam"],
            ["images_mlp_500.md", "images_mlp_500.png"],
        ),
    ],
    ids=["toys", "plateau", "step_cost", "images"],
)
def test_the_command_writes_its_table(module, arguments, files, tmp_path):
    module.main([*arguments, "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert all(path.stat().st_size > 200 for path in tmp_path.iterdir())
