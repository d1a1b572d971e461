"""Krylov subspace descent: exact on quadratics, never worse than the start, and its three batches (CG-9)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from tests.oracles import dense_ggn
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, loss, moved, one_step, run

GOAL, PARAMS, DATA = problem("mlp")[1:]
krylov = functools.partial(curvax.krylov_subspace_descent, judged_by="same_batch")


def test_on_a_quadratic_it_is_the_minimum_over_the_krylov_space():
    design = np.random.default_rng(0).standard_normal((12, 6)) * np.geomspace(1, 10, 6)
    goal = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    data = (jnp.asarray(design), jnp.asarray(design @ np.ones((6, 1)) + 0.1))
    tx = krylov(num_vectors=3, max_subspace_iterations=60, tolerance=1e-10)
    updates, state = one_step(tx, goal, jnp.zeros((6, 1)), data)
    matrix, g = design.T @ design / 12, -design.T @ np.asarray(data[1])[:, 0] / 12
    basis, _ = np.linalg.qr(np.stack([g, matrix @ g, matrix @ matrix @ g], axis=1))
    expected = -basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ g)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-5, atol=1e-7)
    assert state.info.extra["dimension"] == 3


def test_the_loss_never_rises_and_the_last_direction_joins_the_space():
    tx = krylov(num_vectors=4, max_subspace_iterations=8)
    history, last = run(tx, GOAL, PARAMS, DATA, 6), np.zeros(curvax.trees.size(PARAMS))
    for index, taken in enumerate(history):
        info, step = taken.state.info, flat(taken.updates)
        np.testing.assert_allclose(info.new_loss, loss(GOAL, taken.after, DATA), rtol=1e-10)
        assert info.new_loss <= info.loss
        assert info.extra["dimension"] == (4 if index == 0 else 5)
        # In the span of g, G g, G^2 g, G^3 g and the last step, and not in that of the first four.
        matrix, vectors = np.asarray(dense_ggn(GOAL, taken.before, DATA)), [gradient(GOAL, taken.before, DATA)]
        for _ in range(3):
            vectors.append(matrix @ vectors[-1])
        outside = [_outside(vectors, step), _outside([*vectors, last], step)]
        assert outside[1] < 1e-6
        assert index == 0 or outside[0] > 1e-3
        last = step
    assert history[-1].state.info.new_loss < 0.2 * loss(GOAL, PARAMS, DATA)


def _outside(vectors, step):
    """The part of the step outside the span, relative to its length."""
    basis, _ = np.linalg.qr(np.stack([v / (np.linalg.norm(v) or 1) for v in vectors], axis=1))
    return np.linalg.norm(step - basis @ (basis.T @ step)) / np.linalg.norm(step)


def test_gradient_curvature_and_subspace_may_have_a_batch_each():
    first, second, third = (jax.tree.map(lambda leaf, i=i: leaf[2 * i : 2 * i + 2], DATA) for i in range(3))
    tx = krylov(num_vectors=2, max_subspace_iterations=30, tolerance=1e-8)
    updates, state = one_step(tx, GOAL, PARAMS, first, curvature_at=second, held_out_at=third)
    step, g = flat(updates), gradient(GOAL, PARAMS, first)
    space = np.stack([g, np.asarray(dense_ggn(GOAL, PARAMS, second)) @ g], axis=1)
    coefficients, *_ = np.linalg.lstsq(space, step, rcond=None)
    np.testing.assert_allclose(space @ coefficients, step, atol=1e-9 * np.abs(step).max())
    np.testing.assert_allclose(state.info.loss, loss(GOAL, PARAMS, third), rtol=1e-12)
    slope = space.T @ gradient(GOAL, moved(PARAMS, step), third)
    before = space.T @ gradient(GOAL, PARAMS, third)
    assert np.linalg.norm(slope) < 1e-3 * np.linalg.norm(before), "the loss of the third batch is minimised"


def test_lambda_bounds_the_step_by_how_it_fares_on_the_next_batch_and_leaves_on_one_batch():
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[3 * i : 3 * i + 3], DATA) for i in range(2))
    tx = curvax.krylov_subspace_descent(num_vectors=3, max_subspace_iterations=40, tolerance=1e-10)
    updates, state = one_step(tx, GOAL, PARAMS, first)
    step, g, matrix = flat(updates), gradient(GOAL, PARAMS, first), np.asarray(dense_ggn(GOAL, PARAMS, first))
    damping = g @ matrix @ g / (g @ g)
    np.testing.assert_allclose(state.info.damping, damping, rtol=1e-9)
    behind = moved(PARAMS, step)
    np.testing.assert_allclose(state.info.new_loss, loss(GOAL, behind, first), rtol=1e-9)
    # The gradient of the loss with the penalty has no part in the space.
    basis, _ = np.linalg.qr(np.stack([g, matrix @ g, matrix @ matrix @ g], axis=1))
    assert np.linalg.norm(basis.T @ (gradient(GOAL, behind, first) + damping * step)) < 1e-6 * np.linalg.norm(g)
    promised = loss(GOAL, behind, first) - loss(GOAL, PARAMS, first)
    ratio = (loss(GOAL, behind, second) - loss(GOAL, PARAMS, second)) / promised
    _, state = one_step(tx, GOAL, behind, second, state=state)
    factor = 1 / 0.9 if ratio < -0.5 else 1.0 if ratio <= 0.5 else 0.9**4 if 1.5 < ratio < 2.5 else 0.9
    np.testing.assert_allclose(state.info.damping, factor * damping, rtol=1e-9)
    history = run(tx, GOAL, PARAMS, DATA, 12)
    assert history[-1].state.info.damping < 0.02 * history[0].state.info.damping
