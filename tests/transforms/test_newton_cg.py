"""Trust-region Newton against the exact solution of its subproblem; saddles, rejection, speed of convergence."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.oracles import dense_hessian
from tests.problems import problem
from tests.transforms.stepping import flat, gradient, loss, moved, run


def steihaug(matrix, b, radius):
    """Step and model value of Steihaug's method until convergence, written out; and how it ended."""
    x, r, p = np.zeros_like(b), -b, b

    def value(x):
        return x @ matrix @ x / 2 - b @ x

    def edge(x, p):
        roots = np.roots([p @ p, 2 * x @ p, x @ x - radius**2])
        return x + max(roots.real) * p

    for _ in range(10 * len(b)):
        slope = p @ matrix @ p
        if slope <= 0:
            return edge(x, p), value(edge(x, p)), "negative"
        step = r @ r / slope
        if np.linalg.norm(x + step * p) >= radius:
            return edge(x, p), value(edge(x, p)), "boundary"
        x, new = x + step * p, r + step * matrix @ p
        if np.linalg.norm(new) <= 1e-10 * np.linalg.norm(b):
            break
        p, r = -new + new @ new / (r @ r) * p, new
    return x, value(x), "interior"


@dataclasses.dataclass(frozen=True)
class Shifted(curvax.Curvature):
    """H + shift I."""

    shift: float

    def at(self, point, key=None):
        return curvax.damping.tikhonov().matrix(point, curvax.Hessian(), self.shift, key)


@dataclasses.dataclass(frozen=True)
class Flat(curvax.Curvature):
    """A thousandth of the identity."""

    def at(self, point, key=None):
        return curvax.from_matvec(lambda v: 1e-3 * v, point.params)


@pytest.mark.parametrize(
    ("shifted", "radius", "ending"),
    [(True, 1e-2, "boundary"), (True, 0.3, "boundary"), (True, 1e3, "interior"), (False, 1e3, "negative")],
)
def test_a_step_is_steihaugs(shifted, radius, ending):
    goal, params, data = problem("regularised")[1:]
    g, matrix = gradient(goal, params, data), np.asarray(dense_hessian(goal, params, data))
    least = np.linalg.eigvalsh(matrix)[0]
    assert least < 0, "the case is to be indefinite"
    shift = float(0.5 - least) if shifted else 0.0
    matrix = matrix + shift * np.eye(len(matrix))
    exact = {"tolerance": 1e-10, "max_iterations": 200, "judged_by": "same_batch"}
    tx = curvax.newton_cg(initial_radius=radius, curvature=Shifted(shift), **exact)
    (taken,) = run(tx, goal, params, data)
    step, model_value, end = steihaug(matrix, -g, radius)
    assert end == ending
    info = taken.state.info
    ratio = (loss(goal, moved(params, step), data) - loss(goal, params, data)) / model_value
    np.testing.assert_allclose(info.predicted_change, model_value, rtol=1e-7)
    np.testing.assert_allclose(info.update_norm, np.linalg.norm(step), rtol=1e-7)
    np.testing.assert_allclose(info.step_ratio, ratio, rtol=1e-6)
    assert bool(info.accepted) == bool(ratio > 1e-4)
    np.testing.assert_allclose(flat(taken.updates), step if ratio > 1e-4 else 0 * step, rtol=1e-6, atol=1e-9)
    factor = 2 if ratio > 0.75 and end != "interior" else 0.5 if ratio < 0.1 else 1
    np.testing.assert_allclose(taken.state.strength, factor * radius, rtol=1e-12)
    assert bool(info.extra["negative_curvature"]) == (ending == "negative")
    reasons = {"boundary": "BOUNDARY", "interior": "CONVERGED", "negative": "NEGATIVE_CURVATURE"}
    assert info.reason == curvax.solvers.StopReason[reasons[ending]]


def test_solves_are_as_exact_as_the_gradient_is_small():
    """The residual relative to the gradient stays below sqrt(||g|| / ||g_0||), the first gradient's norm kept."""
    goal, params, data = problem("regularised")[1:]
    history = run(curvax.newton_cg(tolerance=0.9), goal, params, data, 20)
    norms = [np.linalg.norm(gradient(goal, taken.before, data)) for taken in history]
    looked = 0
    for norm, taken in zip(norms, history, strict=True):
        np.testing.assert_allclose(taken.state.memory, norms[0], rtol=1e-12)
        if taken.state.info.reason == curvax.solvers.StopReason.CONVERGED and taken.state.info.accepted:
            matrix = np.asarray(dense_hessian(goal, taken.before, data))
            residual = matrix @ flat(taken.updates) + gradient(goal, taken.before, data)
            assert np.linalg.norm(residual) <= (1 + 1e-6) * norm * np.sqrt(norm / norms[0])
            looked += norm < 0.1 * norms[0]
    assert looked


def run_on_the_saddle(start, steps=12):
    """h = x^2/2 + y^4/4 - y^2/2 has a saddle at 0 and minima at (0, -1), (0, 1)."""
    loss = curvax.losses.from_function(lambda z, t: z[0] ** 2 / 2 + z[1] ** 4 / 4 - z[1] ** 2 / 2, convex=False)
    goal = curvax.Objective(lambda w, x: x * w, loss)
    history = run(curvax.newton_cg(), goal, jnp.array(start), (jnp.ones((1, 2)), jnp.zeros((1, 2))), steps)
    return history[-1].after, [taken.state.info for taken in history]


def test_it_leaves_a_saddle_along_negative_curvature():
    params, infos = run_on_the_saddle([0.5, 1e-6])
    np.testing.assert_allclose(params, [0, 1], atol=1e-9)
    assert any(info.extra["negative_curvature"] for info in infos), "negative curvature was never met"


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
    tx = curvax.newton_cg(initial_radius=4.0, curvature=Flat())
    (taken,) = run(tx, goal, jnp.array(0.0), (jnp.ones(1), jnp.zeros(1)))
    assert taken.after == 0
    assert not taken.state.info.accepted
    assert taken.state.info.step_ratio < 0
    assert taken.state.strength == 2.0


def test_the_hessian_may_come_from_another_batch():
    goal, params, data = problem("mlp")[1:]
    other = jax.tree.map(lambda leaf: leaf[:3], data)
    (taken,) = run(curvax.newton_cg(initial_radius=1e-3), goal, params, data, curvature_at=other)
    step, matrix = flat(taken.updates), np.asarray(dense_hessian(goal, params, other))
    assert step.any()
    expected = gradient(goal, params, data) @ step + step @ matrix @ step / 2
    np.testing.assert_allclose(taken.state.info.predicted_change, expected, rtol=1e-9)
    np.testing.assert_allclose(taken.state.info.loss, loss(goal, params, other), rtol=1e-12)
    np.testing.assert_allclose(taken.state.info.new_loss, loss(goal, taken.after, other), rtol=1e-12)
