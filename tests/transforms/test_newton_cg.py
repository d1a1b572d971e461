"""Trust-region Newton against the exact solution of its subproblem; saddles, rejection, speed of convergence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.oracles import dense_hessian
from tests.problems import problem


def make_step(goal, tx, data):
    @jax.jit
    def step(params, state):
        _, gradient, at = goal.value_and_grad(params, data)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, updates

    return step


@pytest.mark.parametrize("radius", [1e-2, 1e3])
def test_a_step_against_the_dense_trust_region(radius):
    """On an indefinite Hessian: at least half the decrease of the exact step, and the exact step in the interior."""
    goal, params, data = problem("regularised")[1:]
    gradient = np.asarray(curvax.trees.ravel(jax.grad(goal)(params, data)))
    matrix = np.asarray(dense_hessian(goal, params, data))
    shift = max(0.0, -np.linalg.eigvalsh(matrix)[0]) + 0.1
    definite = matrix + shift * np.eye(len(matrix))

    def curvature(objective, *, at):
        return curvax.damping.tikhonov()(at, curvax.hessian, shift, jax.random.key(0))

    tx = curvax.newton_cg(initial_radius=radius, curvature=curvature, tolerance=1e-12, max_iterations=200)
    _, state, _ = make_step(goal, tx, data)(params, tx.init(params))
    exact = curvax.solvers.dense_trust_region(jnp.asarray(definite), jnp.asarray(gradient), radius).step
    best = gradient @ exact + exact @ definite @ exact / 2
    assert state.info.predicted_change <= 0.5 * best
    if radius > 1:
        np.testing.assert_allclose(state.info.predicted_change, best, rtol=1e-10)
        np.testing.assert_allclose(state.info.update_norm, np.linalg.norm(exact), rtol=1e-8)
    else:
        np.testing.assert_allclose(state.info.update_norm, radius, rtol=1e-12)


def run_on_the_saddle(start, steps=12):
    """h = x^2/2 + y^4/4 - y^2/2 has a saddle at 0 and minima at (0, -1), (0, 1)."""
    loss = curvax.losses.from_function(lambda z, t: z[0] ** 2 / 2 + z[1] ** 4 / 4 - z[1] ** 2 / 2, convex=False)
    goal = curvax.Objective(lambda w, x: x * w, loss)
    tx = curvax.newton_cg()
    step = make_step(goal, tx, (jnp.ones((1, 2)), jnp.zeros((1, 2))))
    params, infos = jnp.array(start), []
    state = tx.init(params)
    for _ in range(steps):
        params, state, _ = step(params, state)
        infos.append(state.info)
    return params, infos


def test_it_leaves_a_saddle_along_negative_curvature():
    params, infos = run_on_the_saddle([0.5, 1e-6])
    np.testing.assert_allclose(params, [0, 1], atol=1e-9)
    assert any(info.negative_curvature for info in infos), "negative curvature was never met"


def test_it_converges_faster_than_linearly():
    params, infos = run_on_the_saddle([0.5, 1.9])
    np.testing.assert_allclose(params, [0, 1], atol=1e-12)
    norms = [float(info.gradient_norm) for info in infos]
    small = [(before, after) for before, after in itertools.pairwise(norms) if 1e-8 < before < 0.1]
    assert len(small) >= 2
    assert all(after < 5 * before**1.5 for before, after in small)


def test_a_bad_step_is_not_taken_and_halves_the_radius():
    """A model that is far too optimistic: h is steep where the Hessian at the start is flat."""
    loss = curvax.losses.from_function(lambda z, t: jnp.cosh(4 * z) - 1 - 2 * z, convex=True)
    goal = curvax.Objective(lambda w, x: x * w, loss)
    data = (jnp.ones(1), jnp.zeros(1))

    def flat(objective, *, at):
        return curvax.from_matvec(lambda v: 1e-3 * v, at.params)

    tx = curvax.newton_cg(initial_radius=4.0, curvature=flat)
    params = jnp.array(0.0)
    new_params, state, _ = make_step(goal, tx, data)(params, tx.init(params))
    assert new_params == params
    assert not state.info.accepted
    assert state.info.step_ratio < 0
    assert state.radius == 2.0


def test_the_hessian_may_come_from_another_batch():
    goal, params, data = problem("mlp")[1:]
    other = jax.tree.map(lambda leaf: leaf[:3], data)
    gradient = jax.grad(goal)(params, data)
    tx = curvax.newton_cg(initial_radius=1e-3)

    @jax.jit
    def step(params, state):
        point = goal.linearize(params, other)
        return tx.update(gradient, state, params, at=goal.linearize(params, data), curvature_at=point)

    updates, state = step(params, tx.init(params))
    step, matrix = (np.asarray(x) for x in (curvax.trees.ravel(updates), dense_hessian(goal, params, other)))
    expected = np.asarray(curvax.trees.ravel(gradient)) @ step + step @ matrix @ step / 2
    np.testing.assert_allclose(state.info.predicted_change, expected, rtol=1e-9)
    np.testing.assert_allclose(state.info.loss, goal(params, other), rtol=1e-12)
