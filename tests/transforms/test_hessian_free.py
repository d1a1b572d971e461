"""Hessian-free step by step against dense algebra: its batches, its recipes, and what it does with bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import solvers
from curvax.transforms import RECIPE_A, RECIPE_B, RECIPE_C
from tests.oracles import dense_ggn
from tests.transforms.stepping import flat, gradient, loss, moved, one_step, run, tree_of


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy(), l2=1e-3)


def weights(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"first": jax.random.normal(keys[0], (3, 4)) / 2, "second": jax.random.normal(keys[1], (4, 3)) / 2}


def batch(seed, size=12):
    keys = jax.random.split(jax.random.key(100 + seed), 2)
    return jax.random.normal(keys[0], (size, 3)), jax.random.randint(keys[1], (size,), 0, 3)


def armijo(loss_at, slope, sufficient_decrease=1e-2):
    """The first of 1, 0.8, 0.64 ... at which the loss falls by enough of what the slope promises; 0 if none of 61."""
    for tries in range(61):
        if loss_at(0.8**tries) <= loss_at(0.0) + sufficient_decrease * 0.8**tries * slope:
            return 0.8**tries
    return 0.0


EXACT = {"max_iterations": 60, "progress_tolerance": 0.0, "choice": "last", "initial_damping": 0.1}


def test_gradient_and_curvature_from_different_batches():
    """Full convergence: delta = -(G'' + lambda I)^{-1} g'; the ratio takes everything of its own batch."""
    large, small = batch(0, 30), batch(1, 7)
    updates, state = one_step(curvax.hessian_free(**EXACT), objective, weights(), large, curvature_at=small)
    matrix, slopes = np.asarray(dense_ggn(objective, weights(), small)), gradient(objective, weights(), large)
    delta = -np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), slopes)

    def after(size):
        return loss(objective, moved(weights(), size * delta), small)

    np.testing.assert_allclose(flat(updates), armijo(after, slopes @ delta) * delta, rtol=1e-7, atol=1e-9)
    predicted = gradient(objective, weights(), small) @ delta + delta @ matrix @ delta / 2
    np.testing.assert_allclose(state.info.loss, after(0.0), rtol=1e-12)
    np.testing.assert_allclose(state.info.new_loss, after(1.0), rtol=1e-8)
    np.testing.assert_allclose(state.info.predicted_change, predicted, rtol=1e-7)
    np.testing.assert_allclose(state.info.step_ratio, (after(1.0) - after(0.0)) / predicted, rtol=1e-7)


@dataclasses.dataclass(frozen=True)
class Flat(curvax.Curvature):
    """A tenth of the identity: far below the curvature, so that steps are far too long."""

    def at(self, point, key=None):
        return curvax.from_matvec(lambda v: curvax.trees.scale(0.1, v), point.params)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_line_search_takes_the_first_factor_that_falls_enough(held_out):
    """Of many demands on the fall, each against a plain loop; on the held-out batch where there is one."""
    data = batch(0)
    judged = jax.tree.map(lambda leaf: leaf[:8], data) if held_out else data
    demands = np.array([1e-4, 0.1, 0.3, 0.5, 0.7, 0.9])

    @jax.jit
    @jax.vmap
    def steps(demand):
        tx = curvax.hessian_free(
            curvature=Flat(), preconditioner_exponent=None, choice="last", sufficient_decrease=demand,
            initial_damping=0.1,
        )  # fmt: skip
        params = weights()
        _, grads, at = objective.value_and_grad(params, data)
        further = {"held_out_at": objective.linearize(params, judged)} if held_out else {}
        updates, state = tx.update(grads, tx.init(params), params, at=at, **further)
        return updates, state.info.step_size

    updates, sizes = steps(jnp.asarray(demands))
    slopes = gradient(objective, weights(), data)
    delta = -slopes / 0.2

    def after(size):
        return loss(objective, moved(weights(), size * delta), judged)

    expected = [armijo(after, slopes @ delta, demand) for demand in demands]
    assert len(set(expected)) >= 4, "the case is to shorten steps by several factors"
    assert any(0 < size < 1 for size in expected)
    np.testing.assert_allclose(sizes, expected, rtol=1e-12)
    for index, size in enumerate(expected):
        step = jax.tree.map(lambda leaf, i=index: leaf[i], updates)
        np.testing.assert_allclose(flat(step), size * delta, rtol=1e-8)


@functools.cache
def iterates():
    """All iterates of the first run on batch 0, by plain conjugate gradients from zero: number -> delta."""
    matrix = np.asarray(dense_ggn(objective, weights(), batch(0)))
    matrix = matrix + 0.1 * np.eye(len(matrix))
    x, r = np.zeros(len(matrix)), -gradient(objective, weights(), batch(0))
    p, found = r, {}
    for number in range(1, 9):
        step = r @ r / (p @ matrix @ p)
        x, new = x + step * p, r - step * matrix @ p
        p, r = new + new @ new / (r @ r) * p, new
        found[number] = x
    return found


EIGHT = {"preconditioner_exponent": None, "max_iterations": 8, "progress_tolerance": 0.0, "initial_damping": 0.1}


def losses_on(data):
    return {k: loss(objective, moved(weights(), delta), data) for k, delta in iterates().items() if k in KEPT}


KEPT = curvax.solvers.geometric_iterations(8)


def test_choice_is_judged_on_the_held_out_batch():
    other = batch(3, 5)
    losses = losses_on(other)
    best = min(losses, key=losses.__getitem__)
    assert best not in (0, 8), "the case is to tell the best iterate from the last one"

    settings = {"held_out_at": other}
    updates, state = one_step(curvax.hessian_free(choice="best", **EIGHT), objective, weights(), batch(0), **settings)
    assert state.info.extra["chosen_iteration"] == best
    chosen = iterates()[best]
    slope = gradient(objective, weights(), batch(0)) @ chosen
    size = armijo(lambda size: loss(objective, moved(weights(), size * chosen), other), slope)
    np.testing.assert_allclose(flat(updates), size * chosen, rtol=1e-7, atol=1e-10)
    # The ratio stays that of the curvature batch.
    np.testing.assert_allclose(state.info.new_loss, loss(objective, moved(weights(), chosen), batch(0)), rtol=1e-10)
    _, last = one_step(curvax.hessian_free(choice="last", **EIGHT), objective, weights(), batch(0), **settings)
    assert last.info.extra["chosen_iteration"] == 8


@pytest.mark.parametrize("warm_start_from", ["last", "best"])
def test_warm_start_from_the_last_iterate_or_from_the_best(warm_start_from):
    tx = curvax.hessian_free(warm_start_from=warm_start_from, **EIGHT)
    _, state = one_step(tx, objective, weights(), batch(0))
    losses = losses_on(batch(0))
    expected = 8 if warm_start_from == "last" else min(losses, key=losses.__getitem__)
    assert warm_start_from == "last" or expected != 8
    np.testing.assert_allclose(flat(state.memory), iterates()[expected], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("recipe", [RECIPE_A, RECIPE_B, RECIPE_C], ids=["A", "B", "C"])
def test_every_recipe_trains(recipe):
    settings = dict(recipe, max_iterations=min(recipe["max_iterations"], 30))
    data, other = batch(0, 40), batch(5, 40)
    points = {"held_out_at": other} if settings["choice"] == "best" else {}
    judged = other if settings["choice"] == "best" else data
    last = run(curvax.hessian_free(**settings), objective, weights(), data, 8, **points)[-1]
    # Random labels: on those it trains on the loss falls by far, on others to what can be known of them.
    assert loss(objective, last.after, judged) < (0.97 if points else 0.9) * loss(objective, weights(), judged)
    assert last.state.info.skipped_steps == 0


def test_the_reduction_rule_ends_a_run_that_turns_bad():
    """Hardly any damping on few cases: the loss turns up along the run, and the rule stops it there."""
    tiny = {"initial_damping": 1e-8, "max_iterations": 40, "progress_tolerance": 0.0, "preconditioner_exponent": None}
    _, free = one_step(curvax.hessian_free(**tiny), objective, weights(), batch(0, 4))
    ending = curvax.hessian_free(stop="reduction", stop_period=1, **tiny)
    _, ended = one_step(ending, objective, weights(), batch(0, 4))
    assert ended.info.reason == solvers.StopReason.MONITOR
    assert ended.info.inner_iterations < free.info.inner_iterations


def test_an_ascent_direction_is_never_followed():
    """A warm start far uphill, cut short after one iteration, points uphill still: no step, and more damping."""
    tx = curvax.hessian_free(
        max_iterations=1, choice="last", warm_start=1.0, preconditioner_exponent=None, initial_damping=0.1
    )
    slopes = gradient(objective, weights(), batch(0))
    state = jax.jit(tx.init)(weights())._replace(memory=tree_of(100 * slopes, weights()))
    updates, state = one_step(tx, objective, weights(), batch(0), state=state)
    assert slopes @ flat(state.memory) > 0, "the case is to be an ascent direction"
    assert state.info.step_size == 0
    assert not flat(updates).any()
    assert not state.info.accepted
    np.testing.assert_allclose(state.strength, 0.1 * 3 / 2, rtol=1e-12)


def test_an_indefinite_matrix_ends_the_run_and_raises_the_damping_until_a_step_works():
    saddle = curvax.losses.from_function(lambda z, y: jnp.sum(z**4 / 4 - z**2 / 2), convex=False)
    goal = curvax.Objective(lambda w, x: x * w, saddle)
    tx = curvax.hessian_free(
        curvature=curvax.Hessian(), preconditioner_exponent=None, initial_damping=0.1, warm_start=0.0
    )
    params, data = jnp.array([0.1, 0.2]), (jnp.ones((1, 2)), jnp.zeros((1, 2)))
    history = run(tx, goal, params, data, 31)
    first = history[0]
    assert first.state.info.reason == solvers.StopReason.NEGATIVE_CURVATURE
    np.testing.assert_array_equal(first.after, params)
    assert first.state.info.step_ratio == -np.inf
    np.testing.assert_allclose(first.state.strength, 0.15, rtol=1e-12)
    np.testing.assert_allclose(history[-1].after, 1, atol=1e-6)


def test_structural_damping_inside_the_method():
    """Fully converged, the step is that of G + mu D_k + lambda I."""

    def model(params, x):
        hidden = jnp.tanh(x @ params["first"])
        return hidden @ params["second"], hidden

    goal = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True)
    penalty = curvax.Objective(lambda p, x: jnp.tanh(x @ p["first"]), curvax.losses.squared_error())
    tx = curvax.hessian_free(damping_matrix=curvax.damping.structural(lambda hidden: hidden, strength=20.0), **EXACT)
    data = batch(0)
    updates, _ = one_step(tx, goal, weights(), data)
    matrix = dense_ggn(goal, weights(), data) + 2 * dense_ggn(penalty, weights(), (data[0], jnp.zeros((12, 4))))
    slopes = gradient(goal, weights(), data)
    delta = -np.linalg.solve(np.asarray(matrix) + 0.1 * np.eye(len(matrix)), slopes)
    size = armijo(lambda size: loss(goal, moved(weights(), size * delta), data), slopes @ delta)
    np.testing.assert_allclose(flat(updates), size * delta, rtol=1e-7, atol=1e-9)

    wrong = curvax.hessian_free(damping_matrix=curvax.damping.structural(lambda hidden: hidden.T))
    with pytest.raises(ValueError, match=r"must begin with \(12,\)"):
        one_step(wrong, goal, weights(), data)


def test_unknown_names_are_refused():
    for option in ({"choice": "first"}, {"stop": "never"}, {"warm_start_from": "zero"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be one of"):
            curvax.hessian_free(**option)


def test_it_solves_a_ravine_where_diagonal_scaling_cannot():
    """Curvature 1 along (-1, 1) and 1e6 along (1, 1): one step of the full matrix, hundreds of any diagonal (T10)."""
    design = np.array([[-1.0, 1.0], [1e3, 1e3]])
    solution = np.array([[-1.0], [1.0]])
    goal = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    data = (jnp.asarray(design), jnp.asarray(design @ solution))
    params = jnp.zeros((2, 1))
    tx = curvax.hessian_free(initial_damping=1e-6, progress_tolerance=0.0, preconditioner_exponent=None)

    (taken,) = run(tx, goal, params, data)
    assert loss(goal, taken.after, data) < 1e-9 * loss(goal, params, data)

    matrix = design.T @ design / 2
    diagonal = np.zeros((2, 1))
    for _ in range(500):  # Newton's method with the exact diagonal, at the largest rate that cannot diverge
        diagonal -= matrix @ (diagonal - solution) / np.diag(matrix)[:, None]
    assert loss(goal, jnp.asarray(diagonal), data) > 0.9 * loss(goal, params, data)


def test_with_layers_the_preconditioner_varies_less():
    """The squares of single examples in place of those of sums: the same mean, and closer to the exact diagonal."""
    params, data = weights(), batch(0, size=40)
    layers = curvax.find_layers(objective, params, data)
    exact = np.diag(dense_ggn(objective, params, data))

    @functools.partial(jax.jit, static_argnums=1)
    def error(keys, by_layers):
        def one(key):
            estimate = curvax.estimators.chapelle_erhan_diagonal(
                curvax.ggn(objective.linearize(params, data)), key, layers=layers if by_layers else None
            )
            return curvax.trees.ravel(estimate)

        draws = jax.vmap(one)(keys)
        return jnp.mean(draws, axis=0), jnp.mean(jnp.sum((draws - exact) ** 2, axis=1))

    keys = jax.random.split(jax.random.key(0), 500)
    (mean, by_layers), (_, by_sum) = error(keys, True), error(keys, False)
    np.testing.assert_allclose(mean, exact, rtol=0.1)
    assert by_layers < 0.5 * by_sum
    # Neither the run to convergence nor its step depends on the preconditioner, but a short run does.
    iterations = {}
    for cap in (60, 3):
        settings = EXACT | {"max_iterations": cap}
        (one, _), (two, state) = (
            one_step(curvax.hessian_free(layers=given, **settings), objective, params, data) for given in (None, layers)
        )
        iterations[cap] = np.linalg.norm(flat(one) - flat(two)) / np.linalg.norm(flat(one))
        assert state.info.skipped_steps == 0
    assert iterations[60] < 1e-6 < 1e-3 < iterations[3]


def test_the_kronecker_preconditioner_needs_fewer_iterations_for_the_same_step():
    """Inputs that are mixed after they were scaled: no diagonal sees the scales, the factor of the inputs does."""
    draw = np.random.default_rng(2)
    inputs = draw.normal(size=(200, 20)) * np.geomspace(10, 0.01, 20) @ np.linalg.qr(draw.normal(size=(20, 20)))[0]
    data = jnp.asarray(inputs), jnp.asarray(draw.integers(0, 3, 200))
    params = {"first": jnp.asarray(draw.normal(size=(20, 6)) / 20), "second": jnp.asarray(draw.normal(size=(6, 3)))}
    options = {"max_iterations": 200, "progress_tolerance": 1e-6, "choice": "last", "initial_damping": 1e-3}
    layers = curvax.find_layers(objective, params, data)
    kronecker, diagonal = (
        one_step(curvax.hessian_free(**options, **more), objective, params, data)
        for more in ({"preconditioner": "kronecker", "layers": layers}, {})
    )
    matrix, slopes = np.asarray(dense_ggn(objective, params, data)), gradient(objective, params, data)
    delta = -np.linalg.solve(matrix + 1e-3 * np.eye(len(matrix)), slopes)
    model = slopes @ delta + delta @ matrix @ delta / 2
    np.testing.assert_allclose(kronecker[1].info.predicted_change, model, rtol=1e-2)
    assert int(kronecker[1].info.inner_iterations) < 0.6 * int(diagonal[1].info.inner_iterations)
    with pytest.raises(ValueError, match="needs layers="):
        curvax.hessian_free(preconditioner="kronecker")
