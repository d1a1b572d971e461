"""Krylov subspace descent: exact on quadratics, never worse than the start, and its three batches (CG-9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from tests.oracles import dense_ggn
from tests.problems import problem

GOAL, PARAMS, DATA = problem("mlp")[1:]


def test_on_a_quadratic_it_is_the_minimum_over_the_krylov_space():
    design = np.random.default_rng(0).standard_normal((12, 6)) * np.geomspace(1, 10, 6)
    goal = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    data = (jnp.asarray(design), jnp.asarray(design @ np.ones((6, 1)) + 0.1))
    tx = curvax.krylov_subspace_descent(num_vectors=3, max_subspace_iterations=60, tolerance=1e-10)
    params = jnp.zeros((6, 1))
    _, gradient, at = goal.value_and_grad(params, data)
    updates, state = jax.jit(lambda g, s, at: tx.update(g, s, params, at=at))(gradient, tx.init(params), at)
    G = curvax.ggn(at)
    expected = curvax.solvers.cg(G, -gradient, max_iterations=3, tolerance=0.0).value
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-7)
    assert state.info.dimension == 3


def test_the_loss_never_rises_and_the_last_direction_joins_the_space():
    tx = curvax.krylov_subspace_descent(num_vectors=4, max_subspace_iterations=8)

    @jax.jit
    def step(params, state):
        _, gradient, at = GOAL.value_and_grad(params, DATA)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    params, state, losses, dimensions = PARAMS, tx.init(PARAMS), [], []
    for _ in range(6):
        params, state = step(params, state)
        np.testing.assert_allclose(state.info.new_loss, GOAL(params, DATA), rtol=1e-10)
        losses.append(float(state.info.new_loss))
        dimensions.append(int(state.info.dimension))
        assert state.info.new_loss <= state.info.loss
    assert losses[-1] < 0.2 * float(GOAL(PARAMS, DATA))
    assert dimensions[0] == 4
    assert set(dimensions[1:]) == {5}


def test_gradient_curvature_and_subspace_may_have_a_batch_each():
    first, second, third = (jax.tree.map(lambda leaf, i=i: leaf[2 * i : 2 * i + 2], DATA) for i in range(3))
    tx = curvax.krylov_subspace_descent(num_vectors=2, max_subspace_iterations=30, tolerance=1e-8)

    @jax.jit
    def step(state):
        _, gradient, at = GOAL.value_and_grad(PARAMS, first)
        point = GOAL.linearize(PARAMS, second)
        return tx.update(
            gradient, state, PARAMS, at=at, curvature_at=point, held_out_at=objective.linearize(PARAMS, third)
        )

    updates, state = step(tx.init(PARAMS))
    step = np.asarray(curvax.trees.ravel(updates))
    gradient = np.asarray(curvax.trees.ravel(jax.grad(GOAL)(PARAMS, first)))
    space = np.stack([gradient, np.asarray(dense_ggn(GOAL, PARAMS, second)) @ gradient], axis=1)
    coefficients, *_ = np.linalg.lstsq(space, step, rcond=None)
    np.testing.assert_allclose(space @ coefficients, step, atol=1e-9 * np.abs(step).max())
    np.testing.assert_allclose(state.info.loss, GOAL(PARAMS, third), rtol=1e-12)
    moved = jax.tree.map(jnp.add, PARAMS, updates)
    slope = space.T @ np.asarray(curvax.trees.ravel(jax.grad(GOAL)(moved, third)))
    before = space.T @ np.asarray(curvax.trees.ravel(jax.grad(GOAL)(PARAMS, third)))
    assert np.linalg.norm(slope) < 1e-3 * np.linalg.norm(before), "the loss of the third batch is minimised"
