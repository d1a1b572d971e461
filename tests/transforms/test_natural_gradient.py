"""Natural gradient against dense solves; its bound on the divergence; its invariance (NG-3, NG-4, NG-5, NG-7)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.damping import DampingRule
from tests.oracles import dense_fisher
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, loss, moved, run

GOAL, PARAMS, DATA = problem("mlp")[1:]


def damped_fisher(params, damping=0.1):
    matrix = np.asarray(dense_fisher(GOAL, params, DATA))
    return matrix + damping * np.eye(len(matrix))


def test_a_step_is_the_dense_damped_one_and_the_schedule_counts_steps():
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    tx = curvax.natural_gradient(schedule, damping=0.1, max_iterations=200, tolerance=1e-12)
    for rate, taken in zip((0.5, 0.25), run(tx, GOAL, PARAMS, DATA, 2), strict=True):
        solution = np.linalg.solve(damped_fisher(taken.before), gradient(GOAL, taken.before, DATA))
        np.testing.assert_allclose(flat(taken.updates), -rate * solution, rtol=1e-7)


def test_scale_by_takes_any_vector_and_says_how_well_it_solved():
    tx = curvax.scale_by_natural_gradient(damping=0.1, max_iterations=200, tolerance=1e-12)
    vector = jax.tree.map(jnp.ones_like, PARAMS)
    at = GOAL.linearize(PARAMS, DATA)
    scaled, state = jax.jit(lambda v, at: tx.update(v, tx.init(PARAMS), PARAMS, at=at))(vector, at)
    np.testing.assert_allclose(damped_fisher(PARAMS) @ flat(scaled), flat(vector), rtol=1e-9)
    assert state.info.extra["residual"] < 1e-12
    assert state.info.damping == 0.1


def test_the_bound_on_the_divergence_holds_and_is_the_divergence_for_small_steps():
    bound = 1e-6
    free = np.linalg.solve(damped_fisher(PARAMS), gradient(GOAL, PARAMS, DATA))
    matrix = damped_fisher(PARAMS, 0)

    @jax.jit
    def bounded(bound):
        tx = curvax.natural_gradient(damping=0.1, max_divergence=bound, max_iterations=100, tolerance=1e-10)
        _, grads, at = GOAL.value_and_grad(PARAMS, DATA)
        return tx.update(grads, tx.init(PARAMS), at=at)

    updates, state = bounded(bound)
    expected = -np.sqrt(2 * bound / (free @ matrix @ free)) * free
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-8)
    np.testing.assert_allclose(state.info.extra["divergence"], bound, rtol=1e-9)

    model = jax.jit(lambda p: jax.nn.log_softmax(GOAL.terms[0].model_fn(p, DATA[0])))
    old, new = np.asarray(model(PARAMS)), np.asarray(model(moved(PARAMS, expected)))
    divergence = np.mean(np.sum(np.exp(new) * (new - old), axis=-1))
    np.testing.assert_allclose(divergence, bound, rtol=0.02)

    updates, state = bounded(1e3)
    np.testing.assert_allclose(flat(updates), -free, rtol=1e-8)
    np.testing.assert_allclose(state.info.extra["divergence"], free @ matrix @ free / 2, rtol=1e-8)


def test_a_warm_start_begins_at_its_share_of_the_last_solution():
    """With one iteration at each step, against the same iteration in numpy."""
    tx = curvax.scale_by_natural_gradient(damping=0.1, max_iterations=1, tolerance=0.0, warm_start=0.5)
    x = np.zeros(curvax.trees.size(PARAMS))
    for taken in run(tx, GOAL, PARAMS, DATA, 3):
        matrix, x = damped_fisher(taken.before), 0.5 * x
        residual = gradient(GOAL, taken.before, DATA) - matrix @ x
        x = x + residual @ residual / (residual @ matrix @ residual) * residual
        np.testing.assert_allclose(flat(taken.updates), x, rtol=1e-8)


def test_invariance_under_linear_reparameterisation():
    """Undamped and with as many cases as parameters: the step of theta = C phi is C times that of phi (NG-7)."""
    C = jax.random.normal(jax.random.key(5), (3, 3)) + 2 * jnp.eye(3)
    data = (jax.random.normal(jax.random.key(6), (10, 3)), jax.random.randint(jax.random.key(7), (10,), 0, 2))
    loss = curvax.losses.sigmoid_binary_cross_entropy()
    original = curvax.Objective(lambda w, x: jnp.tanh(x @ w), loss)
    changed = curvax.Objective(lambda w, x: jnp.tanh(x @ (C @ w)), loss)
    theta = jnp.array([0.4, -0.3, 0.2])
    exact = {"damping": 1e-12, "max_iterations": 50, "tolerance": 1e-13}
    step = run(curvax.natural_gradient(**exact), original, theta, data)[0].updates
    other = run(curvax.natural_gradient(**exact), changed, jnp.linalg.solve(C, theta), data)[0].updates
    np.testing.assert_allclose(C @ other, step, rtol=1e-7)


def test_the_empirical_fisher_does_not_do_instead():
    """n = 1, f = theta, one case (0, 0): the exact matrix converges linearly, the empirical one not at all (NG-5)."""
    goal = curvax.Objective(lambda w, x: w * x, curvax.losses.squared_error())
    data = (jnp.ones(1), jnp.zeros(1))
    exact = run(curvax.natural_gradient(0.5, damping=1e-12), goal, jnp.array(1.0), data, 20)[-1].after
    np.testing.assert_allclose(exact, 0.5**20, rtol=1e-6)
    empirical = curvax.natural_gradient(0.5, damping=1e-12, curvature=curvax.EmpiricalFisher())
    iterates = [abs(float(taken.after)) for taken in run(empirical, goal, jnp.array(1.0), data, 22)]
    assert max(iterates[-3:]) > 0.1


def test_a_line_search_of_optax_behind_it():
    """The preconditioner composes: optax's backtracking line search decides on the length of the step."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20, slope_rtol=1e-2)
    tx = optax.chain(curvax.scale_by_natural_gradient(damping=1e-3), optax.scale(-1.0), search)

    @jax.jit
    def step(params, state):
        value, grads, at = GOAL.value_and_grad(params, DATA)
        updates, state = tx.update(
            grads, state, params, at=at, value=value, grad=grads, value_fn=lambda p, at: GOAL(p, DATA)
        )
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax's line search mixes dtypes where x64 is enabled
        params, state = PARAMS, jax.jit(tx.init)(PARAMS)
        losses = [loss(GOAL, params, DATA)]
        for _ in range(5):
            params, state = step(params, state)
            losses.append(loss(GOAL, params, DATA))
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_without_a_loss_value_the_damping_is_to_be_given():
    model, loss = GOAL.terms[0].model_fn, curvax.losses.curvature_only(GOAL.terms[0].loss)
    at = curvax.Objective(model, loss).linearize(PARAMS, (DATA[0], None))
    vector = jax.tree.map(jnp.ones_like, PARAMS)
    tx = curvax.natural_gradient(damping=0.1, max_iterations=200, tolerance=1e-12)
    updates, _ = jax.jit(lambda at: tx.update(vector, tx.init(PARAMS), PARAMS, at=at))(at)
    np.testing.assert_allclose(flat(updates), -np.linalg.solve(damped_fisher(PARAMS), flat(vector)), rtol=1e-8)
    adaptive = curvax.natural_gradient()
    with pytest.raises(ValueError, match="a lambda that stays, damping="):
        adaptive.update(vector, adaptive.init(PARAMS), PARAMS, at=at)


def test_the_damping_begins_with_the_curvature_along_the_gradient_and_the_damped_model_is_what_is_promised():
    """Two steps on two batches against dense algebra: lambda falls where the second batch bears the first step out."""
    tx, g = curvax.natural_gradient(0.5, max_iterations=200, tolerance=1e-12), gradient(GOAL, PARAMS, DATA)
    matrix = damped_fisher(PARAMS, 0)
    damping = g @ matrix @ g / (g @ g)
    first, second = run(tx, GOAL, PARAMS, DATA, 2)
    np.testing.assert_allclose(first.state.info.damping, damping, rtol=1e-9)
    delta = -0.5 * np.linalg.solve(matrix + damping * np.eye(len(g)), g)
    np.testing.assert_allclose(flat(first.updates), delta, rtol=1e-8)
    promised = g @ delta + delta @ (matrix + damping * np.eye(len(g))) @ delta / 2
    np.testing.assert_allclose(first.state.info.predicted_change, promised, rtol=1e-8)
    ratio = (loss(GOAL, first.after, DATA) - loss(GOAL, PARAMS, DATA)) / promised
    assert ratio > 0.5
    factor = 0.9**4 if 1.5 < ratio < 2.5 else 0.9
    np.testing.assert_allclose(second.state.info.step_ratio, ratio, rtol=1e-6)
    np.testing.assert_allclose(second.state.info.damping, factor * damping, rtol=1e-9)


def test_judged_by_the_same_batch_lambda_follows_the_ratio_there():
    rule = DampingRule(decrease=0.5, increase=2.0)
    tx = curvax.natural_gradient(
        0.5, initial_damping=0.3, rule=rule, judged_by="same_batch", max_iterations=200, tolerance=1e-12
    )
    strength = 0.3
    for taken in run(tx, GOAL, PARAMS, DATA, 3):
        np.testing.assert_allclose(taken.state.info.damping, strength, rtol=1e-12)
        change = loss(GOAL, taken.after, DATA) - loss(GOAL, taken.before, DATA)
        ratio = change / float(taken.state.info.predicted_change)
        np.testing.assert_allclose(taken.state.info.step_ratio, ratio, rtol=1e-6)
        strength *= 0.5 if ratio > 0.75 else 2.0 if ratio < 0.25 else 1.0
    assert strength != 0.3


LINE = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())


def test_a_batch_with_an_infinite_loss_is_skipped():
    """Gradient, matrix and step are finite there, and the way back from the step would not be exact."""
    w, x = jnp.array([[0.5], [-0.25]], jnp.float32), jnp.eye(2, dtype=jnp.float32)
    bad = run(curvax.natural_gradient(), LINE, w, (x, jnp.array([[1e20], [0.0]], jnp.float32)))[0]
    assert bad.state.info.skipped_steps == 1
    np.testing.assert_array_equal(bad.after, w)


@pytest.mark.parametrize(
    "method",
    [
        curvax.natural_gradient,
        functools.partial(curvax.natural_gradient, judged_by="same_batch"),
        curvax.krylov_subspace_descent,
    ],
)
def test_a_batch_without_curvature_does_not_begin_the_damping(method):
    w, x, y = jnp.zeros((2, 1)), jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.array([[1e-3], [2e-3]])
    tx, nothing, data = method(), (jnp.zeros((2, 2)), y), (x, y)
    blank = run(tx, LINE, w, nothing)[0]
    np.testing.assert_array_equal(blank.after, w)
    assert blank.state.strength == 0
    matrix, g = np.asarray(x.T @ x) / 2, gradient(LINE, w, data)
    first = run(tx, LINE, w, data, state=blank.state)[0]
    np.testing.assert_allclose(first.state.info.damping, g @ matrix @ g / (g @ g), rtol=1e-9)
