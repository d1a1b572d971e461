"""The judge of the next batch: its ratio, the rules that it asks, the steps that it undoes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import trees
from curvax.damping import DampingRule, RadiusRule, next_batch_radius_rule, next_batch_rule
from curvax.transforms._judge import NextBatch, judging
from curvax.transforms._step import Step, stepper
from tests.transforms.stepping import loss, run

OBJECTIVE = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), curvax.losses.squared_error())
PARAMS = {"w": jnp.array([[0.4], [-0.3]]), "b": jnp.array([0.1])}


def batch(seed, size=6):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=(size, 2))), jnp.asarray(0.5 * generator.normal(size=(size, 1)))


def descent(rate, judge, strength=1.0, promised=None, measured=False, damping=None, **options):
    """-rate g, which promises -rate |g|^2 unless told otherwise and carries the number of its steps."""

    def step(given):
        delta = trees.scale(-rate, given.gradient)
        change = trees.vdot(given.gradient, delta) if promised is None else jnp.asarray(promised)
        figures = {"loss": given.at.loss, "predicted_change": change, "step_ratio": given.info.step_ratio}
        if damping is not None:
            figures["damping"] = damping
        if measured:
            figures["new_loss"] = given.at.loss_along(delta)
            figures["step_ratio"] = curvax.reduction_ratio(given.at.loss, figures["new_loss"], change)
        return Step(delta, figures, memory=given.memory + 1)

    start = lambda params: jnp.zeros((), jnp.int32)  # noqa: E731
    return stepper("descent", step, start=start, strength=strength, judge=judge, **options)


def follow(tx, batches, params=PARAMS):
    """The parameters and states along a run, each with those before."""

    @jax.jit
    def step(params, state, batch):
        _, gradient, at = OBJECTIVE.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    history = [(params, jax.jit(tx.init)(params))]
    for data in batches:
        history.append(step(*history[-1], data))
    return history


class Recorded:
    """A rule that remembers nothing and returns the ratio, so that a test sees what it was asked."""

    period = 1

    def adapt(self, strength, step_ratio, *, count, step_norm):
        return step_ratio

    def retreat(self, strength):
        return strength - 1000


def test_the_ratio_is_that_of_the_last_step_on_the_batch_that_has_come_since():
    batches = [batch(seed) for seed in range(5)]
    history = follow(descent(0.3, NextBatch(Recorded(), Recorded())), batches)
    assert history[1][1].strength == 1.0, "there is no step before the first"
    for k in range(2, 6):
        began, ended = history[k - 2][0], history[k - 1][0]
        actual = loss(OBJECTIVE, ended, batches[k - 1]) - loss(OBJECTIVE, began, batches[k - 1])
        promised = float(history[k - 1][1].info.predicted_change)
        np.testing.assert_allclose(history[k][1].strength, actual / promised, rtol=1e-9)
        np.testing.assert_allclose(history[k][1].info.step_ratio, actual / promised, rtol=1e-9)


def test_between_its_periods_the_strength_stays():
    rule = DampingRule(good_ratio=-100.0, bad_ratio=-200.0, decrease=0.5, increase=2.0, period=3)
    history = follow(descent(0.1, NextBatch(rule, rule)), [batch(seed) for seed in range(8)])
    assert [float(state.strength) for _, state in history[1:]] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_where_the_batch_is_the_same_the_rule_of_the_paper_acts_on_the_measured_ratio():
    class Paper(Recorded):
        def adapt(self, strength, step_ratio, *, count, step_norm):
            return 100 + step_ratio

    history = follow(descent(0.3, NextBatch(Recorded(), Paper(), measured=True), measured=True), [batch(0)] * 4)
    for (_, before), (_, after) in itertools.pairwise(history[1:]):
        np.testing.assert_allclose(after.strength, 100 + before.info.step_ratio, rtol=1e-12)
    # and without such a measurement the pass over the last parameters says the same
    looked = follow(descent(0.3, NextBatch(Recorded(), Paper())), [batch(0)] * 4)
    np.testing.assert_allclose(looked[-1][1].strength, history[-1][1].strength - 100, rtol=1e-9)


@pytest.mark.parametrize("promised", [-1e-6, -1e-3])
def test_a_rise_far_beyond_what_was_promised_is_undone_and_what_led_there_forgotten(promised):
    tx = descent(
        -60.0, NextBatch(next_batch_rule(), next_batch_rule()), promised=promised, forget=lambda memory: memory - 10
    )
    history = follow(tx, [batch(0), batch(1), batch(2)])
    (first, _), (_, far), (back, undone), (_, again) = history
    assert loss(OBJECTIVE, history[1][0], batch(1)) > loss(OBJECTIVE, first, batch(1)) + 10 * abs(promised)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), back, first)
    assert (undone.info.undone_steps, undone.strength, undone.memory) == (1, 4.0, far.memory - 10)
    # A step that is gone is not judged again: the next one is taken and nothing adapts.
    assert (again.info.undone_steps, again.strength, again.memory) == (1, 4.0, far.memory - 9)


def test_a_rise_that_is_small_beside_the_floor_of_the_loss_is_undone():
    """Of 100 by 2, where batches differ by some hundredths; the first steps, and noise, alarm nobody."""
    objective = curvax.Objective(
        lambda p, x: x @ p, curvax.losses.from_function(lambda z, y: 100 + (z[0] - y[0]) ** 2 / 2, convex=True)
    )

    def step(given):
        kick = jnp.where(given.steps == 12, 2.0, 0.0) * jnp.ones_like(given.gradient)
        delta = kick - 0.1 * given.gradient
        change = -0.1 * trees.vdot(given.gradient, given.gradient)
        return Step(delta, {"loss": given.at.loss, "predicted_change": change, "step_ratio": given.info.step_ratio})

    rule = next_batch_rule(period=1000)
    tx = stepper("kicked", step, strength=1.0, judge=NextBatch(rule, rule))

    @jax.jit
    def train(params, batches):
        def body(carry, data):
            params, state = carry
            _, gradient, at = objective.value_and_grad(params, data)
            updates, state = tx.update(gradient, state, params, at=at)
            seen = state.info.undone_steps, objective(params, data), state.info.step_ratio
            return (optax.apply_updates(params, updates), state), seen

        return jax.lax.scan(body, (params, tx.init(params)), batches)[1]

    draw = np.random.default_rng(0)
    x = draw.normal(size=(20, 64, 3))
    batches = jnp.asarray(x), jnp.asarray(0.3 * draw.normal(size=(20, 64, 1)))
    undone, losses, ratios = train(jnp.zeros((3, 1)), batches)
    assert np.all(np.isnan(ratios[:13])), "nobody looks back"
    assert 1 < losses[13] - losses[12] < 20
    assert undone.tolist() == [0] * 13 + [1] * 7
    assert losses[14] < 100.2


def test_a_step_into_what_is_not_finite_is_undone_but_a_bad_batch_is_not_its_fault():
    objective = curvax.Objective(lambda p, x: jnp.sqrt(p - x), curvax.losses.from_function(lambda z, y: z, convex=True))

    @jax.jit
    def step(params, state, data):
        _, gradient, at = objective.value_and_grad(params, data)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    tx = descent(4.0, NextBatch(next_batch_rule(), next_batch_rule()))
    good, bad = ((jnp.array([x]), jnp.zeros(1)) for x in (0.0, 5.0))
    params, state = jnp.array(1.0), tx.init(jnp.array(1.0))
    params, state = step(params, state, good)
    assert params == -1.0, "the square root has no value here"
    params, state = step(params, state, good)
    assert (params, state.info.undone_steps, state.info.skipped_steps) == (1.0, 1, 0)
    params, state = step(jnp.array(1.0), tx.init(params), bad)
    assert (params, state.info.undone_steps, state.info.skipped_steps) == (1.0, 0, 1)


METHODS = {
    "hessian_free": lambda by: curvax.hessian_free(judged_by=by, max_iterations=3),
    "levenberg_marquardt": lambda by: curvax.levenberg_marquardt(judged_by=by),
}


@pytest.mark.parametrize("name", METHODS)
def test_on_one_batch_a_method_judged_by_the_next_takes_the_steps_of_its_paper(name):
    """Also where steps are shortened or not taken: the strength goes through the same values."""
    steps = {}
    for by in ("same_batch", "next_batch"):
        history = run(METHODS[name](by), OBJECTIVE, jax.tree.map(lambda leaf: 4 * leaf, PARAMS), batch(3), steps=12)
        steps[by] = [(taken.after["w"], taken.state.info.damping) for taken in history]
    strengths = [float(damping) for _, damping in steps["same_batch"]]
    assert len({round(x, 9) for x in strengths}) > 3
    for (w, damping), (own, expected) in zip(steps["next_batch"], steps["same_batch"], strict=True):
        np.testing.assert_allclose(damping, expected, rtol=1e-12)
        np.testing.assert_allclose(w, own, rtol=1e-9, atol=1e-12)


def test_rules_retreat_and_choices_are_checked():
    assert DampingRule(maximum=3.0).retreat(jnp.array(1.0)) == 3.0
    assert DampingRule().retreat(jnp.array(1.0)) == 4.0
    assert RadiusRule().retreat(jnp.array(1.0)) == 0.25
    with pytest.raises(ValueError, match="judged_by must be one of"):
        judging("this_batch", None, DampingRule(), DampingRule())
    own, judge = judging("next_batch", None, DampingRule(), next_batch_rule())
    assert (own, judge) == (DampingRule(), NextBatch(next_batch_rule(), DampingRule()))
    assert judging("next_batch", None, DampingRule(), next_batch_rule(), damped=True)[1].damped
    assert not judging("next_batch", DampingRule(), DampingRule(), next_batch_rule(), damped=True)[1].damped
    assert judging("same_batch", None, DampingRule(), next_batch_rule()) == (DampingRule(), None)
    given = DampingRule(decrease=0.9)
    assert judging("next_batch", given, DampingRule(), next_batch_rule()) == (given, NextBatch(given, given))


@pytest.mark.parametrize("method", [curvax.newton_cg, curvax.lsr1])
@pytest.mark.parametrize("following", [0, 1, 2, 3])
def test_radii_follow_the_next_batch_and_where_it_is_the_same_the_rule_of_the_paper(method, following):
    radius = 0.4
    (_, (params, first), (_, second)) = follow(method(initial_radius=radius), [batch(0), batch(following)])
    assert first.info.accepted
    assert first.strength == radius
    before, after = (loss(OBJECTIVE, p, batch(following)) for p in (PARAMS, params))
    ratio = (after - before) / float(first.info.predicted_change)
    rule = RadiusRule() if following == 0 else next_batch_radius_rule()
    expected = rule.adapt(jnp.asarray(radius), jnp.asarray(ratio), step_norm=first.info.update_norm)
    np.testing.assert_allclose(second.info.radius, expected, rtol=1e-12)


@pytest.mark.parametrize("method", [curvax.newton_cg, curvax.lsr1, curvax.lsr1_linesearch])
def test_steps_within_a_region_that_do_harm_on_the_next_batch_are_undone(method):
    """The second batch has the targets of the first with the opposite sign, and they are large."""
    inputs, targets = batch(0, 40)
    targets = 20 * jnp.sin(inputs[:, :1])
    goal = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], curvax.losses.squared_error())
    reached = {}
    for judged_by in ("next_batch", "same_batch"):
        tx = method(judged_by=judged_by, **({} if method is curvax.lsr1_linesearch else {"initial_radius": 20.0}))

        @jax.jit
        def step(params, state, data, tx=tx):
            _, gradient, at = goal.value_and_grad(params, data)
            updates, state = tx.update(gradient, state, params, at=at)
            return optax.apply_updates(params, updates), state

        params, state = step(PARAMS, jax.jit(tx.init)(PARAMS), (inputs, targets))
        assert not np.array_equal(params["w"], PARAMS["w"])
        params, state = step(params, state, (inputs, -20 * targets))
        reached[judged_by] = params, int(state.info.undone_steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), reached["next_batch"][0], PARAMS)
    assert (reached["next_batch"][1], reached["same_batch"][1]) == (1, 0)


@pytest.mark.parametrize("hidden", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("damped", [True, False])
def test_gains_that_damping_cannot_have_hidden_are_noise(hidden, damped):
    """Twice what was promised: lambda |delta|^2 / 2 has to be half of the promise, where that has lambda in it."""
    batches, rate = [batch(0), batch(1)], 0.3
    (_, (params, _), _) = follow(descent(rate, NextBatch(Recorded(), Recorded())), batches)
    gained = loss(OBJECTIVE, params, batches[1]) - loss(OBJECTIVE, PARAMS, batches[1])
    assert gained < 0
    length = sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True))
    damping = 2 * hidden * (-gained / 2) / length
    judge = NextBatch(Recorded(), Recorded(), damped=damped)
    state = follow(descent(rate, judge, promised=gained / 2, damping=damping), batches)[-1][1]
    np.testing.assert_allclose(state.info.step_ratio, 2, rtol=1e-9)
    np.testing.assert_allclose(state.strength, 2 if hidden > 0.5 or not damped else 1, rtol=1e-9)


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_loss_that_weights_make_negative_may_fall(weight):
    """Advantages weigh a loss that is not negative by numbers of either sign; zero is then not the least there is."""
    objective = curvax.Objective(
        OBJECTIVE.terms[0].model_fn,
        OBJECTIVE.terms[0].loss,
        select=lambda batch: batch[:2],
        example_weights=lambda batch: batch[2],
    )
    tx = descent(0.5, NextBatch(Recorded(), Recorded()))

    @jax.jit
    def step(params, state, data):
        before, gradient, at = objective.value_and_grad(params, data)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, before

    params, state, losses = PARAMS, jax.jit(tx.init)(PARAMS), []
    for seed in range(6):
        inputs, targets = batch(0)
        weights = weight * jnp.asarray(np.random.default_rng(seed).uniform(0.9, 1.1, size=6))
        params, state, before = step(params, state, (inputs, targets, weights))
        losses.append(float(before))
    assert losses[-1] < losses[0]
    assert np.all(np.sign(losses) == weight)
    assert state.info.undone_steps == 0


@pytest.mark.parametrize("offset", [0.0, 3.0, 3.05])
def test_a_constant_in_the_loss_changes_nothing(offset):
    """Also where the loss, which nothing says is not negative, hovers around zero."""

    def shifted(outputs, targets):
        return jnp.sum((outputs - targets) ** 2) / 2 - offset

    objective = curvax.Objective(OBJECTIVE.terms[0].model_fn, curvax.losses.from_function(shifted, convex=True))
    tx = descent(0.5, NextBatch(Recorded(), Recorded()), promised=-0.3)
    params, state = PARAMS, jax.jit(tx.init)(PARAMS)

    @jax.jit
    def step(params, state, data):
        _, gradient, at = objective.value_and_grad(params, data)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state

    for seed in range(6):
        inputs, targets = batch(seed)
        params, state = step(params, state, (inputs, 4 * targets))
    assert state.info.undone_steps == 0
    plain = follow(tx, [(inputs, 4 * targets) for inputs, targets in map(batch, range(6))])[-1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), params, plain)
