"""Hessian-free step by step against dense algebra: its batches, its recipes, and what it does with bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import solvers
from curvax.transforms import RECIPE_A, RECIPE_B, RECIPE_C
from tests.oracles import dense_ggn


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy(), l2=1e-3)


def weights(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"first": jax.random.normal(keys[0], (3, 4)) / 2, "second": jax.random.normal(keys[1], (4, 3)) / 2}


def batch(seed, size=12):
    keys = jax.random.split(jax.random.key(100 + seed), 2)
    return jax.random.normal(keys[0], (size, 3)), jax.random.randint(keys[1], (size,), 0, 3)


def flat(tree):
    return np.asarray(curvax.trees.ravel(tree))


def one_step(tx, *, gradient_on, state=None, **batches):
    """One jitted step: updates and state, with ``curvature_at`` given as the batch to linearise on."""
    params = weights()
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, gradient_on, batches):
        batches = dict(batches)
        if "curvature_at" in batches:
            batches["curvature_at"] = objective.linearize(params, batches["curvature_at"])
        _, gradient, at = objective.value_and_grad(params, gradient_on)
        return tx.update(gradient, state, params, at=at, **batches)

    return step(params, state, gradient_on, batches)


EXACT = {"max_iterations": 60, "progress_tolerance": 0.0, "choice": "last", "initial_damping": 0.1}


def test_gradient_and_curvature_from_different_batches():
    """Full convergence: delta = -(G'' + lambda I)^{-1} g'; the ratio takes everything of its own batch."""
    large, small = batch(0, 30), batch(1, 7)
    updates, state = one_step(curvax.hessian_free(**EXACT), gradient_on=large, curvature_at=small)
    gradient = flat(jax.grad(objective)(weights(), large))
    matrix = np.asarray(dense_ggn(objective, weights(), small))
    delta = -np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), gradient)
    np.testing.assert_allclose(flat(updates), float(state.info.step_size) * delta, rtol=1e-7, atol=1e-9)
    assert state.info.step_size > 0

    moved = jax.tree.map(jnp.add, weights(), curvax.trees.unravel(jnp.asarray(delta), weights()))
    predicted = flat(jax.grad(objective)(weights(), small)) @ delta + delta @ matrix @ delta / 2
    ratio = (objective(moved, small) - objective(weights(), small)) / predicted
    np.testing.assert_allclose(state.info.loss, objective(weights(), small), rtol=1e-12)
    np.testing.assert_allclose(state.info.new_loss, objective(moved, small), rtol=1e-8)
    np.testing.assert_allclose(state.info.predicted_change, predicted, rtol=1e-7)
    np.testing.assert_allclose(state.info.step_ratio, ratio, rtol=1e-7)


@functools.cache
def iterates(cap):
    """All iterates of the first run on batch 0, from zero, without preconditioner."""
    _, gradient, at = objective.value_and_grad(weights(), batch(0))
    G = curvax.ggn(at)
    result = solvers.cg(
        lambda v: curvax.trees.add_scaled(G(v), 0.1, v),
        curvax.trees.scale(-1.0, gradient),
        max_iterations=cap,
        tolerance=0.0,
        store_at=solvers.geometric_iterations(cap),
    )
    return [
        (int(number), jax.tree.map(lambda leaf, slot=slot: leaf[slot], result.stored.values))
        for slot, number in enumerate(result.stored.iterations)
    ]


def loss_after(delta, data):
    return float(objective(jax.tree.map(jnp.add, weights(), delta), data))


def test_choice_is_judged_on_the_held_out_batch():
    plain = {"preconditioner_exponent": None, "max_iterations": 8, "progress_tolerance": 0.0, "initial_damping": 0.1}
    other = batch(3, 5)
    losses = {number: loss_after(delta, other) for number, delta in iterates(8)}
    best = min(losses, key=losses.__getitem__)
    assert best not in (0, 8), "the case is to tell the best iterate from the last one"

    tx = curvax.hessian_free(choice="best", **plain)
    updates, state = one_step(tx, gradient_on=batch(0), held_out=other)
    assert state.info.chosen_iteration == best
    chosen = dict(iterates(8))[best]
    np.testing.assert_allclose(flat(updates), float(state.info.step_size) * flat(chosen), rtol=1e-8)
    # The ratio stays that of the curvature batch.
    np.testing.assert_allclose(state.info.new_loss, loss_after(chosen, batch(0)), rtol=1e-10)

    _, last = one_step(curvax.hessian_free(choice="last", **plain), gradient_on=batch(0), held_out=other)
    assert last.info.chosen_iteration == 8


@pytest.mark.parametrize("warm_start_from", ["last", "best"])
def test_warm_start_from_the_last_iterate_or_from_the_best(warm_start_from):
    plain = {"preconditioner_exponent": None, "max_iterations": 8, "progress_tolerance": 0.0, "initial_damping": 0.1}
    tx = curvax.hessian_free(warm_start_from=warm_start_from, **plain)
    _, state = one_step(tx, gradient_on=batch(0))
    losses = {number: loss_after(delta, batch(0)) for number, delta in iterates(8)}
    expected = 8 if warm_start_from == "last" else min(losses, key=losses.__getitem__)
    np.testing.assert_allclose(flat(state.direction), flat(dict(iterates(8))[expected]), rtol=1e-8)


@pytest.mark.parametrize("recipe", [RECIPE_A, RECIPE_B, RECIPE_C], ids=["A", "B", "C"])
def test_every_recipe_trains(recipe):
    settings = dict(recipe, max_iterations=min(recipe["max_iterations"], 30))
    tx = curvax.hessian_free(**settings)
    params, data, other = weights(), batch(0, 40), batch(5, 40)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, gradient, at = objective.value_and_grad(params, data)
        held_out = {"held_out": other} if settings["choice"] == "best" else {}
        updates, state = tx.update(gradient, state, params, at=at, **held_out)
        return optax.apply_updates(params, updates), state

    judged = other if settings["choice"] == "best" else data
    before = objective(params, judged)
    for _ in range(8):
        params, state = step(params, state)
    assert objective(params, judged) < 0.97 * before
    assert state.info.skipped_steps == 0


def test_the_reduction_rule_ends_a_run_that_turns_bad():
    """Hardly any damping on few cases: the loss turns up along the run, and the rule stops it there."""
    tiny = {"initial_damping": 1e-8, "max_iterations": 40, "progress_tolerance": 0.0, "preconditioner_exponent": None}
    _, free = one_step(curvax.hessian_free(**tiny), gradient_on=batch(0, 4))
    _, ended = one_step(curvax.hessian_free(stop="reduction", stop_period=1, **tiny), gradient_on=batch(0, 4))
    assert ended.info.cg_reason == solvers.StopReason.MONITOR
    assert ended.info.cg_iterations < free.info.cg_iterations


def test_an_ascent_direction_is_never_followed():
    """A warm start far uphill, cut short after one iteration, points uphill still: no step, and more damping."""
    tx = curvax.hessian_free(
        max_iterations=1, choice="last", warm_start=1.0, preconditioner_exponent=None, initial_damping=0.1
    )
    gradient = jax.grad(objective)(weights(), batch(0))
    uphill = jax.tree.map(lambda g: 100 * g, gradient)
    state = tx.init(weights())._replace(direction=uphill)
    updates, state = one_step(tx, gradient_on=batch(0), state=state)
    slope = flat(gradient) @ flat(state.direction)
    assert slope > 0, "the case is to be an ascent direction"
    assert state.info.step_size == 0
    assert not flat(updates).any()
    assert state.damping == 0.1 * 3 / 2


def test_an_indefinite_matrix_ends_the_run_and_raises_the_damping_until_a_step_works():
    saddle = curvax.losses.from_function(lambda z, y: jnp.sum(z**4 / 4 - z**2 / 2), convex=False)
    goal = curvax.Objective(lambda w, x: x * w, saddle)
    tx = curvax.hessian_free(
        curvature=curvax.Hessian(), preconditioner_exponent=None, initial_damping=0.1, warm_start=0.0
    )
    params, data = jnp.array([0.1, 0.2]), (jnp.ones((1, 2)), jnp.zeros((1, 2)))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, gradient, at = goal.value_and_grad(params, data)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    first, state = step(params, state)
    assert state.info.cg_reason == solvers.StopReason.NEGATIVE_CURVATURE
    np.testing.assert_array_equal(first, params)
    assert state.info.step_ratio == -np.inf
    params = first
    for _ in range(30):
        params, state = step(params, state)
    np.testing.assert_allclose(params, 1, atol=1e-6)


def test_structural_damping_inside_the_method():
    """Fully converged, the step is that of G + mu D_k + lambda I."""

    def model(params, x):
        hidden = jnp.tanh(x @ params["first"])
        return hidden @ params["second"], hidden

    goal = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True)
    penalty = curvax.Objective(lambda p, x: jnp.tanh(x @ p["first"]), curvax.losses.squared_error())
    tx = curvax.hessian_free(damping_matrix=curvax.damping.structural(lambda hidden: hidden, strength=20.0), **EXACT)
    data = batch(0)
    (_, _), gradient, at = goal.value_and_grad(weights(), data, has_aux=True)
    updates, state = jax.jit(lambda g, s, at: tx.update(g, s, weights(), at=at))(gradient, tx.init(weights()), at)
    matrix = dense_ggn(goal, weights(), data) + 2 * dense_ggn(penalty, weights(), (data[0], jnp.zeros((12, 4))))
    delta = -np.linalg.solve(np.asarray(matrix) + 0.1 * np.eye(len(matrix)), flat(gradient))
    np.testing.assert_allclose(flat(updates), float(state.info.step_size) * delta, rtol=1e-7, atol=1e-9)

    wrong = curvax.hessian_free(damping_matrix=curvax.damping.structural(lambda hidden: hidden.T))
    with pytest.raises(ValueError, match=r"must begin with \(12,\)"):
        wrong.update(gradient, wrong.init(weights()), weights(), at=at)


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

    @jax.jit
    def step(params, state):
        _, gradient, at = goal.value_and_grad(params, data)
        return params + tx.update(gradient, state, params, at=at)[0]

    assert goal(step(params, tx.init(params)), data) < 1e-9 * goal(params, data)

    matrix = design.T @ design / 2
    diagonal = np.zeros((2, 1))
    for _ in range(500):  # Newton's method with the exact diagonal, at the largest rate that cannot diverge
        diagonal -= matrix @ (diagonal - solution) / np.diag(matrix)[:, None]
    assert goal(jnp.asarray(diagonal), data) > 0.9 * goal(params, data)


def test_with_layers_the_preconditioner_varies_less():
    """The squares of single examples in place of those of sums: the same mean, and closer to the exact diagonal."""
    params, data = weights(), batch(0, size=40)
    layers = curvax.find_layers(objective, params, data)
    G = curvax.ggn(objective.linearize(params, data))
    exact = flat(G.diagonal())

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
    tx = curvax.hessian_free(layers=layers)
    updates, state, *_ = one_step(tx, gradient_on=data)
    assert float(objective(optax.apply_updates(params, updates), data)) < float(objective(params, data))
    assert int(state.info.skipped_steps) == 0
