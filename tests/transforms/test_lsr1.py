"""L-SR1 as transformations: against their algorithms step by step, and their cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks.operations import flops
from curvax import trees


def problem():
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "v": jnp.asarray(generator.normal(size=(4, 2)))}
    batch = (jnp.asarray(generator.normal(size=(6, 3))), jnp.asarray(generator.integers(0, 2, 6)))
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], curvax.losses.softmax_cross_entropy(), l2=0.01
    )
    return objective, params, batch


def run(make, steps, **options):
    objective, params, batch = problem()
    tx = make(objective, **options)

    @jax.jit
    def step(params, state):
        _, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, updates

    state, history = tx.init(params), []
    for _ in range(steps):
        before = params
        params, state, updates = step(params, state)
        history.append((before, params, state, updates))
    return objective, batch, history


def recursive(scale, pairs):
    matrix = scale * np.eye(20)
    for a, b in pairs:
        r = b - matrix @ a
        if abs(r @ a) >= 1e-8 * np.linalg.norm(r) * np.linalg.norm(a):
            matrix = matrix + np.outer(r, r) / (r @ a)
    return matrix


def gradient_at(objective, batch, params):
    return np.asarray(trees.ravel(jax.grad(objective)(params, batch)))


def test_the_trust_region_method_is_algorithm_1_with_a_dense_matrix():
    objective, batch, history = run(curvax.lsr1, 8, memory_size=20, scale=2.0)
    gradient = jax.jit(lambda p: trees.ravel(jax.grad(objective)(p, batch)))
    solve = jax.jit(curvax.solvers.dense_trust_region)
    pairs, radius = [], None
    for before, after, state, updates in history:
        g = np.asarray(gradient(before))
        radius = np.linalg.norm(g) if radius is None else radius
        matrix = recursive(2.0, pairs)
        solution = solve(jnp.asarray(matrix), jnp.asarray(g), radius)
        s = np.asarray(solution.step)
        trial = trees.add(before, trees.unravel(solution.step, before))
        ratio = (objective(trial, batch) - objective(before, batch)) / solution.model_value
        np.testing.assert_allclose(state.info.step_ratio, ratio, rtol=1e-5)
        np.testing.assert_allclose(state.info.radius, radius, rtol=1e-6)
        assert bool(state.info.accepted) == bool(ratio > 1e-4)
        expected = s if ratio > 1e-4 else np.zeros(20)
        np.testing.assert_allclose(trees.ravel(updates), expected, rtol=1e-5, atol=1e-8)
        pairs.append((s, np.asarray(gradient(trial)) - g))
        radius *= 2 if ratio > 0.75 and np.linalg.norm(s) > 0.8 * radius else 0.5 if ratio < 0.1 else 1
        assert state.info.pairs == len(pairs)
        assert objective(after, batch) <= objective(before, batch)


def test_the_line_search_method_goes_along_the_inverse_matrix():
    objective, batch, history = run(curvax.lsr1_linesearch, 8, memory_size=20)
    gradient = jax.jit(lambda p: trees.ravel(jax.grad(objective)(p, batch)))
    pairs, last = [], 0.5
    for before, after, state, updates in history:
        g, s = np.asarray(gradient(before)), np.asarray(trees.ravel(updates))
        direction = -recursive(1.0, pairs) @ g
        upwards = direction @ g > 0
        direction = -direction if upwards else direction
        assert bool(state.info.hard_case) == upwards
        halvings = np.log2(min(1, 2 * last) / float(state.info.radius))
        np.testing.assert_allclose(halvings, round(halvings), atol=1e-9)
        np.testing.assert_allclose(s, float(state.info.radius) * direction, rtol=1e-5, atol=1e-9)
        fall = objective(before, batch) - objective(after, batch)
        assert fall >= -1e-4 * float(state.info.radius) * (g @ direction)
        pairs.append((np.asarray(gradient(after)) - g, s))
        last = float(state.info.radius)


@pytest.mark.parametrize("make", [curvax.lsr1, curvax.lsr1_linesearch])
def test_long_runs_converge_with_a_memory_of_five(make):
    objective, batch, history = run(make, 300)
    first, last = history[0][0], history[-1][1]
    assert np.linalg.norm(gradient_at(objective, batch, last)) < 1e-3 * np.linalg.norm(
        gradient_at(objective, batch, first)
    )
    assert history[-1][2].info.pairs <= 5


def test_a_step_costs_little_more_than_its_two_gradients():
    """On a million parameters, m = 5, batch 512."""

    def network(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in itertools.pairwise([784, 600, 600, 320, 10])]
    assert trees.size(params) > 1_000_000
    batch = (jax.ShapeDtypeStruct((512, 784), jnp.float32), jax.ShapeDtypeStruct((512,), jnp.int32))
    tx = curvax.lsr1(memory_size=5)

    def step(params, state, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    # Two loops: of the secular equation and of the memory's repair, both on numbers as few as the pairs.
    ours = flops(step, params, jax.eval_shape(tx.init, params), batch, while_trip_count=10)
    gradient = flops(jax.value_and_grad(objective), params, batch)
    assert ours <= 1.25 * 2 * gradient


def test_a_stationary_start_is_no_error():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    w, batch = jnp.ones((2, 1)), (jnp.ones((3, 2)), 2 * jnp.ones((3, 1)))
    for make in (curvax.lsr1, curvax.lsr1_linesearch):
        tx = make(objective)
        _, gradient, at = objective.value_and_grad(w, batch)
        updates, state = tx.update(gradient, tx.init(w), w, at=at)
        assert state.info.skipped_steps == 0
        np.testing.assert_array_equal(updates, 0)


def test_a_first_step_that_overflows_does_not_freeze_the_memory():
    def residuals(w, x):
        del x
        return jnp.stack([jnp.sqrt(2 * jnp.cosh(w[0] - 1)), w[0] - 1, w[1] - 1])[None]

    objective = curvax.Objective(residuals, curvax.losses.squared_error())
    batch = (jnp.zeros((1, 1), jnp.float32), jnp.zeros((1, 3), jnp.float32))
    tx = curvax.lsr1()

    @jax.jit
    def step(w, state):
        _, gradient, at = objective.value_and_grad(w, batch)
        updates, state = tx.update(gradient, state, w, at=at)
        return optax.apply_updates(w, updates), state

    w = jnp.array([20.0, 3.0], jnp.float32)
    state = tx.init(w)
    for _ in range(100):
        w, state = step(w, state)
    np.testing.assert_allclose(w, 1.0, atol=1e-3)
