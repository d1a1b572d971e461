"""Hessian-free step by step against dense algebra: its batches, its recipes, and what it does with bad input."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

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
    """Full convergence: delta = -(G'' + lambda I)^{-1} g'; all that judges it looks at the gradient's batch."""
    large, small = batch(0, 30), batch(1, 7)
    updates, state = one_step(curvax.hessian_free(**EXACT), objective, weights(), large, curvature_at=small)
    matrix, slopes = np.asarray(dense_ggn(objective, weights(), small)), gradient(objective, weights(), large)
    delta = -np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), slopes)

    def after(size):
        return loss(objective, moved(weights(), size * delta), large)

    np.testing.assert_allclose(flat(updates), armijo(after, slopes @ delta) * delta, rtol=1e-7, atol=1e-9)
    predicted = slopes @ delta + delta @ matrix @ delta / 2
    np.testing.assert_allclose(state.info.loss, after(0.0), rtol=1e-12)
    np.testing.assert_allclose(state.info.new_loss, after(1.0), rtol=1e-8)
    np.testing.assert_allclose(state.info.predicted_change, predicted, rtol=1e-7)
    np.testing.assert_allclose(state.info.step_ratio, (after(1.0) - after(0.0)) / predicted, rtol=1e-7)
    assert np.isnan(state.info.extra["held_out_loss"])


@pytest.mark.parametrize("choice", ["best", "walk"])
def test_iterates_are_chosen_on_the_gradients_batch(choice):
    """Where the smaller batch of the curvature would have taken another one."""
    large, small = batch(0, 30), batch(4, 5)
    options = {"progress_tolerance": 0.0, "initial_damping": 1e-3}
    iterates = []
    for count in range(1, 6):
        tx = curvax.hessian_free(max_iterations=count, choice="last", **options)
        updates, state = one_step(tx, objective, weights(), large, curvature_at=small)
        iterates.append(flat(updates) / float(state.info.step_size))
    on_large, on_small = (np.array([loss(objective, moved(weights(), d), b) for d in iterates]) for b in (large, small))
    if choice == "best":
        expected, other = np.argmin(on_large), np.argmin(on_small)
    else:  # from the end as long as it pays
        expected, other = (_walk(losses) for losses in (on_large, on_small))
    assert expected != other
    tx = curvax.hessian_free(max_iterations=5, choice=choice, **options)
    updates, state = one_step(tx, objective, weights(), large, curvature_at=small)
    assert int(state.info.extra["chosen_iteration"]) == expected + 1
    np.testing.assert_allclose(flat(updates), float(state.info.step_size) * iterates[expected], rtol=1e-7, atol=1e-9)


def _walk(losses):
    last = len(losses) - 1
    while last and losses[last - 1] < losses[last]:
        last -= 1
    return last


def test_two_steps_are_those_of_algorithm_3():
    """With one output noise of signs is squared away, so algorithm 6 is exact: mean_i sq(J_i), and all is known."""

    def tiny(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"]

    goal = curvax.Objective(tiny, curvax.losses.squared_error(), l2=0.02)
    params = {"first": weights()["first"], "second": weights()["second"][:, :1]}
    unravel = ravel_pytree(params)[1]
    inputs = batch(0)[0]
    data = inputs, jnp.sin(3 * inputs[:, :1])
    options = {"max_iterations": 3, "progress_tolerance": 0.0, "initial_damping": 0.03, "warm_start": 0.8}
    tx = curvax.hessian_free(preconditioner_exponent=0.6, preconditioner_offset=0.01, **options)
    history = run(tx, goal, params, data, 4)

    jacobian = jax.jit(jax.jacobian(lambda v: tiny(unravel(v), inputs)[:, 0]))
    strength, direction, stays = 0.03, np.zeros(16), 0
    for taken in history:
        here = taken.before
        rows = np.asarray(jacobian(flat(here)))
        ggn, slopes = rows.T @ rows / 12 + 0.02 * np.eye(16), gradient(goal, here, data)
        scale = (np.mean(rows**2, axis=0) + 0.02 + strength + 0.01) ** 0.6
        x = 0.8 * direction
        r = (ggn + strength * np.eye(16)) @ x + slopes
        y, kept = r / scale, []
        p = -y
        for _ in range(3):
            product = (ggn + strength * np.eye(16)) @ p
            alpha = r @ y / (p @ product)
            x, new = x + alpha * p, r + alpha * product
            p, r, y = -new / scale + (new @ (new / scale)) / (r @ y) * p, new, new / scale
            kept.append(x)

        def after(delta, here=here):
            return loss(goal, moved(here, delta), data)

        chosen, here_loss = 2, after(0.0 * x)
        losses = [after(delta) for delta in kept]
        while chosen >= 0 and (losses[chosen] > here_loss or (chosen and losses[chosen - 1] < losses[chosen])):
            chosen -= 1  # at last to delta = 0, where there is no iterate
        delta = kept[chosen] if chosen >= 0 else 0 * x
        direction = x if chosen >= 0 else 0 * x  # beyond the algorithm: a run of which nothing was taken is forgotten
        model = slopes @ delta + delta @ ggn @ delta / 2
        ratio = (after(delta) - here_loss) / model if chosen >= 0 else -np.inf
        size = armijo(lambda size, delta=delta, after=after: after(size * delta), slopes @ delta)
        info = taken.state.info
        np.testing.assert_allclose(info.damping, strength, rtol=1e-9)
        np.testing.assert_allclose(info.step_ratio, ratio, rtol=1e-6)
        assert info.extra["chosen_iteration"] == chosen + 1
        assert info.accepted == (chosen >= 0)
        np.testing.assert_allclose(flat(taken.updates), size * delta, rtol=1e-6, atol=1e-9)
        strength *= 2 / 3 if ratio > 3 / 4 else 3 / 2 if ratio < 1 / 4 else 1
        stays += chosen < 0
    assert 0 < stays < len(history), "the case is to show both"


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
    # The ratio stays that of the gradient's batch; the other losses are told too.
    np.testing.assert_allclose(state.info.new_loss, loss(objective, moved(weights(), chosen), batch(0)), rtol=1e-10)
    np.testing.assert_allclose(state.info.extra["held_out_loss"], loss(objective, weights(), other), rtol=1e-10)
    np.testing.assert_allclose(state.info.extra["new_held_out_loss"], losses[best], rtol=1e-10)
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


@pytest.mark.parametrize("start", ["gradient", "last"])
def test_few_iterations_from_the_gradient_or_from_the_last_step(start):
    """The simplified method of Henriques et al. 2019, algorithm 2, and what interleaves its iterations with steps."""
    count = 2 if start == "gradient" else 1
    tx = curvax.hessian_free(
        warm_start=1.0, warm_start_from=start, max_iterations=count, choice="last", preconditioner_exponent=None,
        initial_damping=0.1, progress_tolerance=0.0,
    )  # fmt: skip
    direction = np.zeros(24)
    for taken in run(tx, objective, weights(), batch(0), 3):
        matrix = np.asarray(dense_ggn(objective, taken.before, batch(0))) + float(taken.state.info.damping) * np.eye(24)
        slopes = gradient(objective, taken.before, batch(0))
        x = -slopes if start == "gradient" else direction
        r = -slopes - matrix @ x
        p = r
        for _ in range(count):
            step = r @ r / (p @ matrix @ p)
            x, new = x + step * p, r - step * matrix @ p
            p, r = new + new @ new / (r @ r) * p, new
        direction = x
        np.testing.assert_allclose(flat(taken.updates), taken.state.info.step_size * x, rtol=1e-7, atol=1e-10)
        assert taken.state.info.step_size > 0


@pytest.mark.parametrize("recipe", [RECIPE_A, RECIPE_B, RECIPE_C], ids=["A", "B", "C"])
def test_every_recipe_trains(recipe):
    settings = dict(recipe, max_iterations=min(recipe["max_iterations"], 30))
    data, other = batch(0, 40), batch(5, 40)
    points = {"held_out_at": other} if recipe is RECIPE_B else {}
    judged = other if points else data
    if points:
        with pytest.raises(ValueError, match="takes held_out_at="):
            run(curvax.hessian_free(**settings), objective, weights(), data)
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


@pytest.mark.parametrize("choice", ["last", "best", "walk"])
def test_an_ascent_direction_is_never_followed_and_never_started_from_again(choice):
    """A warm start far uphill, cut short after one iteration, points uphill still: no step, more damping, no memory."""
    tx = curvax.hessian_free(
        max_iterations=1, choice=choice, warm_start=1.0, preconditioner_exponent=None, initial_damping=0.1
    )
    slopes = gradient(objective, weights(), batch(0))
    uphill = jax.jit(tx.init)(weights())._replace(memory=tree_of(100 * slopes, weights()))
    updates, state = one_step(tx, objective, weights(), batch(0), state=uphill)
    if choice == "last":
        assert state.info.update_norm > 0, "the case is to be a direction"
    assert state.info.step_size == 0
    assert not flat(updates).any()
    assert not state.info.accepted
    np.testing.assert_allclose(state.strength, 0.1 * 3 / 2, rtol=1e-12)
    assert not flat(state.memory).any()
    updates, state = one_step(tx, objective, weights(), batch(0), state=state)
    assert state.info.accepted
    assert slopes @ flat(updates) < 0


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


def test_layers_are_found_where_none_are_given():
    """A short run depends on the preconditioner: it is the same bit for bit, of the same draws."""
    params, data = weights(), batch(0, size=40)
    layers, short = curvax.find_layers(objective, params, data), EXACT | {"max_iterations": 3}
    (found, _), (given, _) = (
        one_step(curvax.hessian_free(layers=each, **short), objective, params, data) for each in (None, layers)
    )
    np.testing.assert_array_equal(flat(found), flat(given))


def test_squares_of_single_examples_precondition_and_those_of_their_sum_do_harm():
    """A deep autoencoder at small damping: the damped model after ten iterations (Martens 2016, section 4.9.4)."""
    draw, widths, strength = np.random.default_rng(0), (16, 12, 8, 4, 8, 12, 16), 1e-3

    def deep(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    goal = curvax.Objective(deep, curvax.losses.sigmoid_binary_cross_entropy())
    params = [jnp.asarray(2 * draw.normal(size=shape) / shape[0] ** 0.5) for shape in itertools.pairwise(widths)]
    time, parts = np.linspace(0, 1, 16), draw.normal(size=(300, 3))
    curves = np.stack([np.sin(2 * np.pi * time), np.cos(3 * np.pi * time), np.ones(16)])
    images = jax.nn.sigmoid(jnp.asarray(3 * parts @ curves))

    @jax.jit
    def models(params, key):
        _, slopes, at = goal.value_and_grad(params, (images, images))

        def by_method(**options):
            tx = curvax.hessian_free(
                initial_damping=strength, max_iterations=10, progress_tolerance=0.0, choice="last", **options
            )
            info = tx.update(slopes, tx.init(params), params, at=at)[1].info
            return info.predicted_change + strength / 2 * info.update_norm**2

        matrix = curvax.ggn(at)

        def by_sum(key):
            square = jax.tree.map(lambda u: u**2 + strength, matrix.sample(key, curvax.trees.random_rademacher))
            return solvers.cg(
                lambda v: curvax.trees.add_scaled(matrix(v), strength, v), curvax.trees.scale(-1.0, slopes),
                preconditioner=solvers.diagonal_preconditioner(square), max_iterations=10, tolerance=0.0,
            ).model_value  # fmt: skip

        by_sums = jax.lax.map(by_sum, jax.random.split(key, 20))
        return by_method(), by_method(preconditioner_exponent=None), jnp.mean(by_sums)

    def descend(_, params):
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(goal)(params, (images, images)))

    params = jax.jit(lambda params: jax.lax.fori_loop(0, 100, descend, params))(params)
    by_examples, plain, by_sum = models(params, jax.random.key(0))
    assert by_examples < 1.05 * plain < 1.05 * by_sum < 0


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
    found, _ = one_step(curvax.hessian_free(preconditioner="kronecker", **options), objective, params, data)
    np.testing.assert_array_equal(flat(found), flat(kronecker[0]))
