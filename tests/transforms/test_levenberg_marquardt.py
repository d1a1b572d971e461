"""Damped Newton steps with a dense matrix against numpy: Levenberg, Marquardt, saddle-free, and steps that fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.oracles import dense_ggn, dense_hessian
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, loss, moved, one_step, run

GOAL, PARAMS, DATA = problem("regularised")[1:]
GOAL = GOAL.replace(l2=0.05, l2_mask=None)  # on all leaves, so that no diagonal vanishes where units saturate


def matrices(params, marquardt, absolute):
    """B and D."""
    matrix = np.asarray((dense_hessian if absolute else dense_ggn)(GOAL, params, DATA))
    if absolute:
        values, vectors = np.linalg.eigh(matrix)
        matrix = (vectors * np.abs(values)) @ vectors.T
    return matrix, np.diag(np.diag(matrix)) if marquardt else np.eye(len(matrix))


def choices(marquardt, absolute):
    damping_matrix = curvax.damping.scale_sensitive() if marquardt else None
    return {
        "damping_matrix": damping_matrix,
        "curvature": curvax.Hessian() if absolute else None,
        "absolute": absolute,
    }


@pytest.mark.parametrize("absolute", [False, True], ids=["gauss_newton", "saddle_free"])
@pytest.mark.parametrize("marquardt", [False, True], ids=["levenberg", "marquardt"])
def test_steps_damping_and_figures_are_those_of_dense_algebra(marquardt, absolute):
    assert np.linalg.eigvalsh(dense_hessian(GOAL, PARAMS, DATA))[0] < -1e-2, "the case is to be indefinite"
    strength, accepted = 0.5, []
    tx = curvax.levenberg_marquardt(initial_damping=strength, **choices(marquardt, absolute))
    for taken in run(tx, GOAL, PARAMS, DATA, 6):
        matrix, added = matrices(taken.before, marquardt, absolute)
        slopes = gradient(GOAL, taken.before, DATA)
        delta = -np.linalg.solve(matrix + strength * added, slopes)
        predicted = slopes @ delta + delta @ matrix @ delta / 2
        before, after = loss(GOAL, taken.before, DATA), loss(GOAL, moved(taken.before, delta), DATA)
        ratio = (after - before) / predicted
        info = taken.state.info
        np.testing.assert_allclose(info.damping, strength, rtol=1e-12)
        np.testing.assert_allclose(info.update_norm, np.linalg.norm(delta), rtol=1e-6)
        np.testing.assert_allclose(info.predicted_change, predicted, rtol=1e-6)
        np.testing.assert_allclose(info.new_loss, after, rtol=1e-6)
        np.testing.assert_allclose(info.step_ratio, ratio, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(flat(taken.updates), delta if ratio > 0 else 0 * delta, rtol=1e-5, atol=1e-9)
        strength *= 2 / 3 if ratio > 0.75 else 1.5 if ratio < 0.25 else 1.0
        accepted.append(bool(info.accepted))
        assert accepted[-1] == (ratio > 0)
    assert any(accepted)


def test_a_rejected_step_leaves_the_parameters_and_raises_the_damping():
    """h is steep where the matrix at the start is flat."""
    goal = curvax.Objective(
        lambda w, x: x * w, curvax.losses.from_function(lambda z, t: jnp.cosh(4 * z) - 1 - 2 * z, convex=True)
    )
    tx = curvax.levenberg_marquardt(initial_damping=1.0, curvature=Multiple(1e-3))
    first, second = run(tx, goal, jnp.array(0.0), (jnp.ones(1), jnp.zeros(1)), 2)
    assert first.after == 0
    assert not first.state.info.accepted
    assert -np.inf < first.state.info.step_ratio < 0
    assert first.state.info.skipped_steps == 0
    np.testing.assert_allclose(first.state.info.update_norm, 2 / 1.001, rtol=1e-9)
    np.testing.assert_allclose(second.state.info.damping, 1.5, rtol=1e-12)


@dataclasses.dataclass(frozen=True)
class Multiple(curvax.Curvature):
    """A multiple of the identity, of whatever sign."""

    factor: float

    def at(self, point, key=None):
        return curvax.from_matvec(lambda v: curvax.trees.scale(self.factor, v), point.params)


def test_a_matrix_that_cannot_be_factorised_raises_the_damping_until_it_can():
    """B = -1: indefinite with lambda = 0.5 and 0.75, definite with 1.125."""
    goal = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
    tx = curvax.levenberg_marquardt(initial_damping=0.5, curvature=Multiple(-1.0))
    history = run(tx, goal, jnp.array(0.01), (jnp.full(1, 0.1), jnp.ones(1)), 3)
    assert [bool(taken.state.info.accepted) for taken in history] == [False, False, True]
    np.testing.assert_allclose([taken.state.info.damping for taken in history], [0.5, 0.75, 1.125], rtol=1e-12)
    assert [float(taken.updates) for taken in history[:2]] == [0, 0]
    assert history[-1].state.info.skipped_steps == 0
    np.testing.assert_allclose(history[-1].updates, 0.1 * (1 - 0.001) / 0.125, rtol=1e-9)


@pytest.mark.parametrize("marquardt", [False, True], ids=["levenberg", "marquardt"])
def test_the_preconditioner_with_a_schedule_on_some_of_the_leaves(marquardt):
    """Inside ``optax.masked`` the matrix is the block of the leaves that are shown, and any vector is taken."""
    shown = [{"kernel": True, "bias": False}, {"kernel": True, "bias": True}]
    tx = curvax.scale_by_dense_curvature(
        damping=optax.exponential_decay(0.4, 1, 0.5), **choices(marquardt, absolute=True)
    )
    chain = optax.chain(optax.scale(-0.5), optax.masked(tx, shown))
    rows = flat(jax.tree.map(lambda leaf, on: np.full(leaf.shape, on), PARAMS, shown)).astype(bool)
    for taken, strength in zip(run(chain, GOAL, PARAMS, DATA, 3), (0.4, 0.2, 0.1), strict=True):
        block = np.asarray(dense_hessian(GOAL, taken.before, DATA))[np.ix_(rows, rows)]
        values, vectors = np.linalg.eigh(block)
        block = (vectors * np.abs(values)) @ vectors.T
        added = np.diag(np.diag(block)) if marquardt else np.eye(len(block))
        expected = -0.5 * gradient(GOAL, taken.before, DATA)
        expected[rows] = np.linalg.solve(block + strength * added, expected[rows])
        # optax's schedule counts in single precision, so lambda is right to some 1e-8 of itself.
        np.testing.assert_allclose(flat(taken.updates), expected, rtol=1e-6, atol=1e-8 * np.linalg.norm(expected))


def test_parameters_that_do_nothing_are_left_where_they_are():
    """Their entry in Marquardt's diagonal is zero; the others' steps are those without them."""
    goal = curvax.Objective(lambda p, x: x @ p["used"], curvax.losses.squared_error())
    design = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    params = {"none": jnp.ones(2), "used": jnp.zeros((2, 1))}
    data = (jnp.asarray(design), jnp.ones((3, 1)))
    tx = curvax.levenberg_marquardt(initial_damping=0.5, damping_matrix=curvax.damping.scale_sensitive())
    updates, state = one_step(tx, goal, params, data)
    matrix = design.T @ design / 3
    expected = np.linalg.solve(matrix + 0.5 * np.diag(np.diag(matrix)), design.T @ np.ones(3) / 3)
    np.testing.assert_allclose(flat(updates), [0, 0, *expected], rtol=1e-9, atol=1e-12)
    assert state.info.accepted


def test_the_preconditioner_skips_what_it_cannot_factorise():
    goal = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
    tx = curvax.scale_by_dense_curvature(damping=0.5, curvature=Multiple(-1.0))
    updates, state = one_step(tx, goal, jnp.array(0.01), (jnp.full(1, 0.1), jnp.ones(1)))
    assert updates == 0
    assert state.info.skipped_steps == 1
    assert state.steps == 0


@pytest.mark.parametrize("make", [curvax.levenberg_marquardt, curvax.scale_by_dense_curvature])
def test_an_indefinite_matrix_needs_the_absolute_values(make):
    with pytest.raises(ValueError, match="absolute=True"):
        make(curvature=curvax.Hessian())
