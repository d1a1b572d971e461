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
from tests.transforms.stepping import flat, gradient, loss, moved, one_step, run


def problem():
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "v": jnp.asarray(generator.normal(size=(4, 2)))}
    batch = (jnp.asarray(generator.normal(size=(6, 3))), jnp.asarray(generator.integers(0, 2, 6)))
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], curvax.losses.softmax_cross_entropy(), l2=0.01
    )
    return objective, params, batch


def recursive(scale, pairs):
    matrix = scale * np.eye(20)
    for a, b in pairs:
        r = b - matrix @ a
        if abs(r @ a) >= 1e-8 * np.linalg.norm(r) * np.linalg.norm(a):
            matrix = matrix + np.outer(r, r) / (r @ a)
    return matrix


def test_the_trust_region_method_is_algorithm_1_with_a_dense_matrix():
    objective, params, batch = problem()
    solve = jax.jit(curvax.solvers.dense_trust_region)
    pairs, radius = [], None
    tx = curvax.lsr1(memory_size=20, scale=2.0, judged_by="same_batch")
    for before, after, updates, state in run(tx, objective, params, batch, 8):
        g = gradient(objective, before, batch)
        radius = np.linalg.norm(g) if radius is None else radius
        solution = solve(jnp.asarray(recursive(2.0, pairs)), jnp.asarray(g), radius)
        s = np.asarray(solution.step)
        trial = moved(before, s)
        ratio = (loss(objective, trial, batch) - loss(objective, before, batch)) / float(solution.model_value)
        np.testing.assert_allclose(state.info.step_ratio, ratio, rtol=1e-5)
        np.testing.assert_allclose(state.info.radius, radius, rtol=1e-6)
        assert bool(state.info.accepted) == bool(ratio > 1e-4)
        np.testing.assert_allclose(flat(updates), s if ratio > 1e-4 else 0 * s, rtol=1e-5, atol=1e-8)
        pairs.append((s, gradient(objective, trial, batch) - g))
        radius *= 2 if ratio > 0.75 and np.linalg.norm(s) > 0.8 * radius else 0.5 if ratio < 0.1 else 1
        np.testing.assert_allclose(state.strength, radius, rtol=1e-6)
        assert state.info.extra["pairs"] == len(pairs)
        assert loss(objective, after, batch) <= loss(objective, before, batch)


def test_the_line_search_method_goes_along_the_inverse_matrix():
    objective, params, batch = problem()
    pairs, last, shortened = [], 0.5, 0
    for before, after, updates, state in run(curvax.lsr1_linesearch(memory_size=20), objective, params, batch, 8):
        g, s = gradient(objective, before, batch), flat(updates)
        direction = -recursive(1.0, pairs) @ g
        upwards = direction @ g > 0
        direction = -direction if upwards else direction
        assert bool(state.info.extra["turned"]) == upwards
        # The first of min(1, twice the last), halved again and again, at which the loss falls enough.
        size = min(1, 2 * last)
        start, slope = loss(objective, before, batch), g @ direction
        while loss(objective, moved(before, size * direction), batch) > start + 1e-4 * size * slope:
            size, shortened = size / 2, shortened + 1
        np.testing.assert_allclose(state.info.step_size, size, rtol=1e-12)
        np.testing.assert_allclose(s, size * direction, rtol=1e-5, atol=1e-9)
        pairs.append((gradient(objective, after, batch) - g, s))
        last = size
    assert shortened, "the case is to shorten a step"


def test_skipped_pairs_are_counted_up():
    """With a tolerance above one every pair is left out, whatever it is."""
    objective, params, batch = problem()
    for make in (curvax.lsr1, curvax.lsr1_linesearch):
        extras = [taken.state.info.extra for taken in run(make(skip_tolerance=2.0), objective, params, batch, 4)]
        assert [int(extra["skipped_pairs"]) for extra in extras] == [1, 2, 3, 4]
        assert [int(extra["pairs"]) for extra in extras] == [0, 0, 0, 0]


def test_pairs_dropped_by_repair_are_counted():
    """Two parameters have room for two independent pairs: of a memory of five the others are dropped again (SR-6)."""
    objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w), curvax.losses.squared_error())
    batch = jax.random.normal(jax.random.key(0), (6, 2)), jnp.ones((6, 1))
    for make in (curvax.lsr1, curvax.lsr1_linesearch):
        for count, taken in enumerate(run(make(), objective, jnp.full((2, 1), 0.3), batch, 5), 1):
            pairs, skipped, dropped = (
                int(taken.state.info.extra[name]) for name in ("pairs", "skipped_pairs", "dropped_pairs")
            )
            assert pairs == count - skipped - dropped <= 2
        assert dropped > 0


@pytest.mark.parametrize("make", [curvax.lsr1, curvax.lsr1_linesearch])
def test_long_runs_converge_with_a_memory_of_five(make):
    objective, params, batch = problem()
    last = run(make(), objective, params, batch, 300)[-1]
    norms = [np.linalg.norm(gradient(objective, p, batch)) for p in (params, last.after)]
    assert norms[1] < 1e-3 * norms[0]
    assert last.state.info.extra["pairs"] <= 5


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
    one = flops(jax.value_and_grad(objective), params, batch)
    assert ours <= 1.25 * 2 * one


@pytest.mark.parametrize("make", [curvax.lsr1, curvax.lsr1_linesearch])
def test_a_stationary_start_is_no_error(make):
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    updates, state = one_step(make(), objective, jnp.ones((2, 1)), (jnp.ones((3, 2)), 2 * jnp.ones((3, 1))))
    assert state.info.skipped_steps == 0
    np.testing.assert_array_equal(updates, 0)


def test_a_first_step_that_overflows_does_not_freeze_the_memory():
    def residuals(w, x):
        del x
        return jnp.stack([jnp.sqrt(2 * jnp.cosh(w[0] - 1)), w[0] - 1, w[1] - 1])[None]

    objective = curvax.Objective(residuals, curvax.losses.squared_error())
    batch = (jnp.zeros((1, 1), jnp.float32), jnp.zeros((1, 3), jnp.float32))
    w = jnp.array([20.0, 3.0], jnp.float32)
    np.testing.assert_allclose(run(curvax.lsr1(), objective, w, batch, 100)[-1].after, 1.0, atol=1e-3)
