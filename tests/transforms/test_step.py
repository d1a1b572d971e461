"""The stepper: what it refuses, what it keeps of a step that fails, the figures it fills in, and the judge's seat."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import trees
from curvax.transforms._arguments import static_count
from curvax.transforms._step import Step, Verdict, stepper
from tests.transforms.stepping import flat

GOAL = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], curvax.losses.squared_error())
PARAMS = {"w": jnp.array([[1.0], [-2.0]]), "b": jnp.array([0.5])}


def batch(seed=0, size=6):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=(size, 2))), jnp.asarray(generator.normal(size=(size, 1)))


def method(guarded=False, accepts=None, figures=None, **options):
    """Gradient descent with a tenth, whose memory is the sum of all gradients."""

    def step(given):
        finite = jnp.isfinite(given.at.loss)
        memory = trees.add(given.memory, given.gradient)
        if guarded:
            memory = trees.where(finite & trees.all_finite(given.gradient), memory, given.memory)
        return Step(
            trees.scale(-0.1, given.gradient),
            {} if figures is None else figures(given),
            memory,
            2 * given.strength,
            None if accepts is None else accepts(given),
            finite,
            guarded=guarded,
        )

    return stepper("method", step, start=trees.zeros_like, **({"strength": 1.0} | options))


def jitted(tx):
    """(params, state, batch, factor of the gradient) -> updates, state."""

    @jax.jit
    def step(params, state, data, factor=1.0):
        _, gradient, at = GOAL.value_and_grad(params, data)
        return tx.update(trees.scale(factor, gradient), state, params, at=at)

    return step


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


POINT = GOAL.linearize(PARAMS, batch())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"curvature_att": POINT}, TypeError, "not curvature_att=; did you mean curvature_at="),
        ({"curvature_att": batch()}, TypeError, "did you mean curvature_at="),
        ({"a": 1, "att": None}, TypeError, "not att=; did you mean at="),
        ({"point": POINT}, TypeError, "takes at=, curvature_at=, not point="),
        ({"held_out": batch()}, TypeError, "takes at=, curvature_at=, not held_out="),
        ({"objective": GOAL}, TypeError, "takes at=, curvature_at=, not objective="),
        ({"held_out_at": batch()}, TypeError, "held_out_at= takes a curvature point, .* got tuple"),
        ({"batch": batch()}, TypeError, "takes at=, curvature_at=, not batch="),
        ({"at": batch()}, TypeError, "at= takes a curvature point, .* got tuple"),
        ({"curvature_at": GOAL}, TypeError, "curvature_at= takes a curvature point, .* got Objective"),
        ({"at": None}, ValueError, "objective.value_and_grad"),
    ],
)
def test_arguments_that_are_not_the_methods_are_refused(arguments, error, message):
    tx = method(points=("at", "curvature_at"))
    with pytest.raises(error, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **({"at": POINT} | arguments))


def test_what_adapts_begins_with_a_number():
    with pytest.raises(TypeError, match="hessian_free: what adapts begins with a number"):
        curvax.hessian_free(initial_damping=optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match="give the number that it begins with"):
        curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=lambda step: 5.0, rule=curvax.damping.cubic_rule())


def test_points_that_another_method_of_the_chain_takes_are_for_that_one():
    tx = method(points=("at",))
    jax.jit(lambda at: tx.update(PARAMS, tx.init(PARAMS), PARAMS, at=at, held_out_at=at, value=1.0))(POINT)


def test_a_missing_point_and_parameters_in_the_place_of_the_state_are_explained():
    tx = method()
    with pytest.raises(ValueError, match="method: update takes at="):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="in this order; the second argument is a dict"):
        tx.update(PARAMS, PARAMS, tx.init(PARAMS), at=POINT)


def test_arguments_for_others_of_a_chain_reach_the_method():
    seen = []
    tx = stepper("method", lambda given: seen.append(given.extra) or Step(given.gradient, {}))
    jax.eval_shape(lambda at: tx.update(PARAMS, tx.init(PARAMS), PARAMS, at=at, value=3.0), POINT)
    assert seen == [{"value": 3.0}]


@pytest.mark.parametrize("guarded", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(guarded):
    """A gradient that is not finite, and a loss that is not; afterwards it goes on as if nothing had been."""
    step = jitted(method(guarded, figures=lambda given: {"loss": given.at.loss}))
    tx = method(guarded)
    inputs, targets = batch()
    _, state = step(PARAMS, tx.init(PARAMS), batch())
    assert flat(state.memory).any()
    bad = [(batch(), jnp.nan), (batch(), jnp.inf), ((inputs, targets.at[0].set(jnp.nan)), 1.0)]
    skipped = state
    for count, (data, factor) in enumerate(bad, start=1):
        updates, skipped = step(PARAMS, skipped, data, factor)
        assert not flat(updates).any()
        assert skipped.info.skipped_steps == count
        assert_same_bits(skipped._replace(info=skipped.info._replace(skipped_steps=state.info.skipped_steps)), state)
    updates, after = step(PARAMS, skipped, batch())
    straight, expected = step(PARAMS, state, batch())
    assert_same_bits(updates, straight)
    assert after.info.skipped_steps == len(bad)
    assert_same_bits(after._replace(info=expected.info), expected)


@pytest.mark.parametrize("inputs", [60, 200])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_one_entry_of_a_large_leaf_that_is_not_finite_is_seen(inputs, bad):
    """XLA's maximum on CPU loses what is not a number among several thousand entries."""
    params = jnp.zeros((inputs, 100))
    goal = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
    data = jnp.ones((3, inputs)), jnp.ones((3, 100))
    tx = method()

    @jax.jit
    def step(state, entry):
        _, gradient, at = goal.value_and_grad(params, data)
        return tx.update(gradient.at[inputs // 2, 50].add(entry), state, params, at=at)

    state = tx.init(params)
    updates, skipped = step(state, bad)
    assert skipped.info.skipped_steps == 1
    np.testing.assert_array_equal(updates, 0)
    assert_same_bits(skipped.memory, state.memory)
    assert step(state, 0.0)[1].info.skipped_steps == 0


def test_a_method_without_a_point_takes_gradients_from_any_loop():
    """Without parameters, with whatever else a chain is given, and of a device's own part of the data."""
    tx = stepper("method", lambda given: Step(trees.scale(-0.1, given.gradient), {}), points=())

    @jax.jit
    def compute(params, at, x):
        others = {"batch": batch(), "value": 1.0, "at": at}
        given = [((), {}), ((params,), others), ((None,), {})]
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        own = jax.shard_map(
            lambda x: tx.update(x, tx.init(x))[0], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        return [tx.update(params, tx.init(params), *args, **further)[0] for args, further in given], own(x)

    seen, parts = compute(PARAMS, POINT, jnp.arange(4.0))
    for updates in seen:
        np.testing.assert_allclose(flat(updates), -0.1 * flat(PARAMS))
    np.testing.assert_allclose(parts, -0.1 * np.arange(4.0))
    with pytest.raises(ValueError, match="'surplus'"):
        tx.update({**PARAMS, "surplus": jnp.ones(2)}, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="the second argument is a dict"):
        tx.update(PARAMS, PARAMS)


def test_a_step_that_is_not_accepted_is_not_taken_but_remembered():
    step = jitted(method(accepts=lambda given: given.steps == 1))
    updates, state = step(PARAMS, method().init(PARAMS), batch())
    gradient = jax.jit(jax.grad(GOAL))(PARAMS, batch())
    assert not flat(updates).any()
    assert not state.info.accepted
    assert state.info.skipped_steps == 0
    assert (state.steps, state.strength) == (1, 2)
    np.testing.assert_allclose(flat(state.memory), flat(gradient))
    np.testing.assert_allclose(state.info.update_norm, 0.1 * np.linalg.norm(flat(gradient)))
    updates, state = step(PARAMS, state, batch())
    np.testing.assert_allclose(flat(updates), -0.1 * flat(gradient))
    assert state.info.accepted


def test_figures_that_are_not_worked_out_are_nan_or_minus_one():
    tx = method(figures=lambda given: {"loss": 3, "turns": 7, "angle": 0.5}, extra={"turns": jnp.int32, "angle": None})
    empty = tx.init(PARAMS).info
    _, state = jitted(tx)(PARAMS, tx.init(PARAMS), batch())
    for info, known in ((empty, ()), (state.info, ("loss", "gradient_norm", "update_norm"))):
        for field, value in info._asdict().items():
            if field in ("inner_iterations", "reason"):
                assert (value, value.dtype) == (-1, jnp.int32)
            elif field not in ("accepted", "skipped_steps", "undone_steps", "extra", *known):
                assert np.isnan(value), field
    assert not empty.accepted
    assert state.info.accepted
    assert state.info.loss == 3
    assert state.info.loss.dtype == jnp.float64
    assert {name: (value.item(), value.dtype) for name, value in state.info.extra.items()} == {
        "turns": (7, jnp.int32),
        "angle": (0.5, jnp.float64),
    }
    gradient = np.linalg.norm(flat(jax.jit(jax.grad(GOAL))(PARAMS, batch())))
    np.testing.assert_allclose([state.info.gradient_norm, state.info.update_norm], [gradient, 0.1 * gradient])


def test_every_leaf_of_a_state_has_a_buffer_of_its_own():
    """So that it can be donated, and the number it was made with is not."""
    strength = jnp.ones(())
    for tx in (
        method(strength=strength, judge=lambda last, given: Verdict(given.strength, jnp.array(False))),
        curvax.hessian_free(initial_damping=strength),
        curvax.lsr1(),
        curvax.scale_by_cubic_step(optax.adam(0.1), sigma=strength),
    ):
        leaves = [strength, *jax.tree.leaves(PARAMS), *jax.tree.leaves(tx.init(PARAMS))]
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_keys_differ_from_step_to_step_and_follow_the_seed():
    def keys(seed):
        tx = method(figures=lambda given: {"loss": jax.random.uniform(given.key)}, seed=seed)
        step, state, drawn = jitted(tx), tx.init(PARAMS), []
        for _ in range(3):
            _, state = step(PARAMS, state, batch())
            drawn.append(float(state.info.loss))
        return drawn

    assert keys(0) == keys(0)
    assert len({*keys(0), *keys(1)}) == 6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_numbers_and_schedules_of_the_step_come_in_the_dtype_of_the_losses(dtype):
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def figures(given):
        number, scheduled = given.number(0.25), given.number(lambda count: 1.0 / (1 + count.astype(jnp.float64)))
        assert number.dtype == scheduled.dtype == given.number(jnp.array(3)).dtype == given.dtype == wide
        return {"damping": scheduled, "radius": number}

    params, data = jax.tree.map(lambda leaf: leaf.astype(dtype), (PARAMS, batch()))
    tx = method(figures=figures)
    step, state = jitted(tx), tx.init(params)
    for expected in (1, 1 / 2, 1 / 3):
        _, state = step(params, state, data, jnp.array(1.0, dtype))
        np.testing.assert_allclose(state.info.damping, expected, rtol=1e-6)
        assert state.info.radius == 0.25


def test_counts_that_decide_shapes_are_positive_integers_of_python():
    assert [static_count("m", "size", value, 7) for value in (None, 3, 3.0, np.int32(3))] == [7, 3, 3, 3]
    for bad in (5.5, True, 0, -1):
        with pytest.raises(ValueError, match="m: size must be a positive integer"):
            static_count("m", "size", bad, 7)
    with pytest.raises(TypeError, match="cannot be traced or scheduled"):
        static_count("m", "size", lambda step: 3, 7)
    tx = optax.inject_hyperparams(curvax.krylov_subspace_descent)(num_vectors=3)
    with pytest.raises(TypeError, match=r"num_vectors decides shapes .* name it in static_args"):
        jax.eval_shape(lambda at: tx.update(PARAMS, tx.init(PARAMS), PARAMS, at=at), POINT)
    tx = optax.inject_hyperparams(curvax.krylov_subspace_descent, static_args="num_vectors")(num_vectors=3)
    jax.eval_shape(lambda at: tx.update(PARAMS, tx.init(PARAMS), PARAMS, at=at), POINT)


ABSURD = 4.0


def next_batch_judge(last, given):
    """The ratio of the last step on the batch at hand; a step that multiplied the loss there is undone."""
    now, before = given.at.loss, given.at.loss_at(last.params)
    ratio = curvax.reduction_ratio(before, now, last.predicted_change)
    undo = jnp.isfinite(before) & ~(now <= ABSURD * before)
    factor = jnp.where(ratio > 0.75, 0.5, jnp.where(ratio < 0.25, 2.0, 1.0))
    factor = jnp.where(undo, 16.0, jnp.where(last.predicted_change == 0, 1.0, factor))
    return Verdict(given.strength * factor, undo)


def judged_descent(strength):
    """-g / strength in multiples of 2^-20, which sums of parameters and steps hold without rounding."""

    def step(given):
        delta = jax.tree.map(lambda g: jnp.round(-g / given.strength * 2.0**20) / 2.0**20, given.gradient)
        change = trees.vdot(given.gradient, delta) / 2
        return Step(delta, {"predicted_change": change, "damping": given.strength})

    return stepper("judged", step, strength=strength, judge=next_batch_judge)


def test_a_judge_adapts_the_strength_by_the_next_batch_and_takes_absurd_steps_back():
    """The whole run over changing batches, once more in numpy."""
    tx = judged_descent(0.05)
    step, params, state = jitted(tx), PARAMS, tx.init(PARAMS)
    theta, last, predicted, strength, undone, strengths = flat(PARAMS), np.zeros(3), 0.0, 0.05, 0, []
    visited = [PARAMS]
    for seed in range(40):
        inputs, targets = map(np.asarray, batch(seed))
        design = np.concatenate([np.ones((6, 1)), inputs], axis=1)  # leaves are sorted: b before w

        def loss(theta, design=design, targets=targets):
            return np.sum((design @ theta - targets[:, 0]) ** 2) / 12

        updates, state = step(params, state, batch(seed))
        params = optax.apply_updates(params, updates)
        visited.append(params)
        now, before = loss(theta), loss(theta - last)
        if seed and now > ABSURD * before:
            undone, strength = undone + 1, 16 * strength
            theta, last, predicted = theta - last, np.zeros(3), 0.0
            assert_same_bits(params, visited[-3])
        else:
            if predicted:
                ratio = (now - before) / predicted
                strength *= 0.5 if ratio > 0.75 else 2.0 if ratio < 0.25 else 1.0
            slopes = design.T @ (design @ theta - targets[:, 0]) / 6
            last = np.round(-slopes / strength * 2.0**20) / 2.0**20
            theta, predicted = theta + last, slopes @ last / 2
            np.testing.assert_allclose(state.info.damping, strength, rtol=1e-12)
        np.testing.assert_allclose(state.strength, strength, rtol=1e-12)
        np.testing.assert_array_equal(flat(params), theta)
        np.testing.assert_array_equal(flat(state.last.params), theta - last)
        np.testing.assert_allclose(state.last.predicted_change, predicted, rtol=1e-9)
        assert state.steps == seed + 1 - undone
        strengths.append(strength)
    assert undone >= 1, "the first step is to be absurd"
    assert len(set(strengths)) > 4
    assert any(after < before for before, after in itertools.pairwise(strengths))
    assert (state.info.skipped_steps, state.info.undone_steps) == (0, undone)


def test_a_step_after_which_nothing_is_finite_is_taken_back_and_a_bad_batch_is_not_its_fault():
    tx = judged_descent(1e-200)
    step, state = jitted(tx), tx.init(PARAMS)
    updates, after = step(PARAMS, state, batch())
    far = optax.apply_updates(PARAMS, updates)
    assert np.isfinite(flat(far)).all()
    assert np.isinf(jax.jit(GOAL)(far, batch(1)))
    back, state = step(far, after, batch(1))
    np.testing.assert_array_equal(flat(back), -flat(updates))
    assert state.strength == 16e-200
    assert (state.steps, state.info.skipped_steps) == (1, 0)

    _, good = step(PARAMS, judged_descent(10.0).init(PARAMS), batch())
    inputs, targets = batch(1)
    updates, skipped = step(PARAMS, good, (inputs.at[0].set(jnp.nan), targets))
    assert not flat(updates).any()
    assert skipped.info.skipped_steps == 1
    assert_same_bits(skipped._replace(info=good.info), good)
