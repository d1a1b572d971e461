"""What a newcomer writes by mistake: the message says what is wrong and what to write instead, as early as it can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import curvax
from curvax import losses, trees
from tests import oracles

PARAMS = {"w": jax.random.normal(jax.random.key(0), (3, 3))}
INPUTS = jax.random.normal(jax.random.key(1), (8, 3))
BATCH = INPUTS, jax.random.normal(jax.random.key(2), (8, 3))
LABELS = jnp.array([0, 1, 2, 0, 1, 2, 0, 1])


def model(p, x):
    return jnp.tanh(x @ p["w"])


SQUARES = curvax.Objective(model, losses.squared_error())
CLASSES = curvax.Objective(model, losses.softmax_cross_entropy())


@pytest.mark.parametrize(
    ("loss", "advice"),
    [
        (losses.softmax_cross_entropy, r"call it: curvax.losses.softmax_cross_entropy\("),
        (losses.squared_error, r"call it: curvax.losses.squared_error\("),
        (losses.gaussian, r"call it: curvax.losses.gaussian\("),
        (losses.from_function, r"call it: curvax.losses.from_function\("),
        (optax.softmax_cross_entropy_with_integer_labels, r"curvax.losses.softmax_cross_entropy\(\)"),
        (jax.jit(optax.l2_loss), r"curvax.losses.squared_error\(\), which has the half"),
        (lambda z, y: (z - y) ** 2, r"curvax.losses.from_function"),
        ("mse", r"curvax.losses.from_function"),
    ],
)
def test_a_loss_that_is_none_is_refused_where_the_objective_is_made(loss, advice):
    for make in (curvax.Objective, curvax.Term):
        with pytest.raises(TypeError, match=advice):
            make(model, loss)


@pytest.mark.parametrize(
    ("make", "error", "advice"),
    [
        (lambda: curvax.hessian_free(damping_matrix=0.1), TypeError, r"damping_matrix= takes .*tikhonov\(\)"),
        (lambda: curvax.levenberg_marquardt(damping_matrix=1), TypeError, r"damping_matrix= takes .*tikhonov\(\)"),
        (lambda: curvax.hessian_free(rule=2 / 3), TypeError, r"rule= takes .*DampingRule\(\)"),
        (lambda: curvax.newton_cg(rule=curvax.damping.DampingRule()), TypeError, r"rule= takes .*RadiusRule\(\)"),
        (lambda: curvax.hessian_free(layers=PARAMS), TypeError, r"layers= takes what curvax.find_layers\("),
        (lambda: curvax.kfac(SQUARES), TypeError, r"layers= takes what curvax.find_layers\("),
        (lambda: curvax.scale_by_cubic_step(0.1), TypeError, r"inner= takes .*optax.sgd"),
        (lambda: curvax.natural_gradient(SQUARES), TypeError, "the objective reaches a method by update's at="),
        (lambda: curvax.natural_gradient(damping="0.1"), TypeError, "damping= takes a number or a schedule"),
        (lambda: curvax.curveball(initial_damping=jnp.ones(2)), TypeError, "initial_damping= takes a number,"),
        (lambda: curvax.hessian_free(max_iterations=5.5), ValueError, "max_iterations= must be a positive integer"),
        (lambda: curvax.natural_gradient(max_iterations=5.5), ValueError, "max_iterations= must be a positive integer"),
        (lambda: curvax.newton_cg(max_iterations=0), ValueError, "max_iterations= must be a positive integer, got 0"),
        (
            lambda: curvax.krylov_subspace_descent(rule=curvax.damping.DampingRule(), judged_by="same_batch"),
            ValueError,
            "rule= adapts lambda, which judged_by='same_batch' does without",
        ),
        (lambda: curvax.lsr1(memory_size="5"), TypeError, "memory_size= must be a positive integer, got '5'"),
        (lambda: curvax.Objective(model, losses.squared_error(), l2=-1), ValueError, "l2= is -1"),
        (lambda: SQUARES.replace(l2=np.float32(-0.5)), ValueError, "l2= is -0.5"),
        (lambda: SQUARES.replace(l2=optax.constant_schedule(0.1)), TypeError, r"objective.replace\(l2=schedule\(step"),
        (lambda: curvax.Objective(PARAMS, losses.squared_error()), TypeError, "model_fn= takes a function"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_where_the_method_is_made(make, error, advice):
    with pytest.raises(error, match=advice):
        make()


def test_arguments_of_the_right_kind_may_be_schedules_traced_and_of_numpy():
    curvax.natural_gradient(optax.constant_schedule(0.1), damping=np.float32(0.1), max_iterations=np.int64(3))
    jax.jit(lambda n, x: curvax.natural_gradient(x, max_iterations=n, seed=n).init(PARAMS).steps)(3, 0.1)
    settings = {"max_iterations": 3, "damping": optax.constant_schedule(0.1)}
    optax.inject_hyperparams(curvax.natural_gradient)(**settings).init(PARAMS)


@pytest.mark.parametrize("method", [curvax.hessian_free, curvax.natural_gradient, curvax.curveball])
def test_swapped_and_mistyped_arguments_of_update(method):
    tx, at = method(), SQUARES.linearize(PARAMS, BATCH)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"update takes \(grads, state, params, at=at\) in this order"):
        tx.update(PARAMS, PARAMS, state, at=at)
    for name in ("att", "point", "curvatures_at"):
        with pytest.raises(TypeError, match=f"not {name}="):
            tx.update(PARAMS, state, PARAMS, at=at, **{name: at})


def test_class_labels_as_floats_are_refused():
    for labels in (LABELS.astype(float), LABELS.astype(jnp.float32)):
        with pytest.raises(TypeError, match=r"class labels and must be integers.*targets.astype\(int\)"):
            jax.eval_shape(CLASSES, PARAMS, (INPUTS, labels))


@pytest.mark.parametrize("label", [-1, 3, -100])
def test_an_impossible_label_shows_as_nan_and_the_step_is_skipped(label):
    tx = curvax.hessian_free(max_iterations=2)

    @jax.jit
    def step(labels):
        loss, grads, at = CLASSES.value_and_grad(PARAMS, (INPUTS, labels))
        updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, at=at)
        return loss, updates["w"], state.info.skipped_steps

    loss, update, skipped = step(LABELS.at[2].set(label))
    assert jnp.isnan(loss)
    assert not update.any()
    assert skipped == 1
    assert jnp.isfinite(step(LABELS)[0])


@pytest.mark.many_compilations("what is wrong with labels can be said outside of jit alone")
@pytest.mark.parametrize("label", [-1, 3, -100])
def test_an_impossible_label_is_named_outside_of_jit(label):
    with pytest.raises(ValueError, match=f"target {label} of example 2 is no class .*ignore_label="):
        CLASSES(PARAMS, (INPUTS, LABELS.at[2].set(label)))


def tokens(p, x):
    return jnp.tanh(x @ p["w"]).reshape(4, 2, 3)


@pytest.mark.parametrize("label", [-100, 1])
@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_ignored_labels_are_left_out_of_loss_count_and_curvature(shape, label):
    labels = LABELS.at[jnp.array([1, 2])].set(label).reshape(shape)
    network = model if len(shape) == 1 else tokens
    padded = curvax.Objective(network, losses.softmax_cross_entropy(ignore_label=label))
    kept = labels.ravel() != label
    alone = curvax.Objective(model, losses.softmax_cross_entropy())
    batch = INPUTS[kept], labels.ravel()[kept]

    @jax.jit
    def answers(params):
        loss, grads, at = padded.value_and_grad(params, (INPUTS, labels))
        plain = jax.value_and_grad(padded)(params, (INPUTS, labels))
        return loss, grads["w"], plain, curvax.ggn(at).to_dense(), curvax.fisher(at).to_dense()

    loss, grads, plain, ggn, fisher = answers(PARAMS)
    value = jax.value_and_grad(lambda w: oracles.value(alone, {"w": w}, batch))(PARAMS["w"])
    matrix = oracles.dense_ggn(alone, PARAMS, batch)
    pairs = [((loss, grads), value), ((plain[0], plain[1]["w"]), value), ((ggn, fisher), (matrix, matrix))]
    for actual, expected in pairs:
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("leave_out", ["mask", "example_weights"])
def test_a_label_that_the_objective_leaves_out_may_be_any(leave_out):
    keep = jnp.arange(8) != 2
    entries = keep if leave_out == "mask" else keep.astype(float)
    objective = curvax.Objective(model, losses.softmax_cross_entropy(), **{leave_out: lambda _: entries})

    @jax.jit
    def answers(labels):
        loss, grads, at = objective.value_and_grad(PARAMS, (INPUTS, labels))
        hessian = curvax.hessian(at)(PARAMS)["w"]
        return loss, grads["w"], jax.grad(objective)(PARAMS, (INPUTS, labels))["w"], hessian

    for a, e in zip(answers(LABELS.at[2].set(-100)), answers(LABELS), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12)


def test_masks_and_weights_may_be_lists():
    batch, kept = BATCH, [True] * 3 + [False] * 5
    masked = curvax.Objective(model, losses.squared_error(), mask=lambda _: kept)
    weighted = curvax.Objective(model, losses.squared_error(), example_weights=lambda _: [8.0 / 3 * k for k in kept])
    few = jax.tree.map(lambda leaf: leaf[:3], batch)
    for objective in (masked, weighted):
        np.testing.assert_allclose(jax.jit(objective)(PARAMS, batch), oracles.value(SQUARES, PARAMS, few), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.5, np.float64(1.5), np.array(1.5)])
def test_a_plain_number_is_a_parameter_like_others(scale):
    objective = curvax.Objective(lambda p, x: x @ p["w"] * p["scale"], losses.squared_error(), l2=0.1)
    given, arrays = PARAMS | {"scale": scale}, PARAMS | {"scale": jnp.asarray(1.5)}
    tx = curvax.curveball()

    def step(params):
        loss, grads, at = jax.jit(objective.value_and_grad)(params, BATCH)
        return loss, jax.jit(tx.update)(grads, tx.init(params), params, at=at)[0]

    jax.tree.map(np.testing.assert_array_equal, step(given), step(arrays))
    np.testing.assert_allclose(jax.jit(objective)(given, BATCH), oracles.value(objective, arrays, BATCH), rtol=1e-12)
    assert curvax.find_layers(objective, given, BATCH, fallback="gradient").paths == ("scale", "w")


@pytest.mark.parametrize("leaf", [jnp.tanh, "relu", object()])
def test_a_leaf_that_is_no_array_is_named(leaf):
    params = PARAMS | {"activation": leaf}
    calls = [
        lambda: SQUARES(params, BATCH),
        lambda: SQUARES.value_and_grad(params, BATCH),
        lambda: curvax.find_layers(SQUARES, params, BATCH),
        lambda: curvax.hessian_free().init(params),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"params\['activation'\] is .*equinox.partition"):
            call()


@pytest.mark.many_compilations("it is eager calls that warn")
def test_numpy_parameters_of_another_precision_do_not_warn():
    params = {"w": np.asarray(PARAMS["w"], np.float64)}
    with jax.enable_x64(False):
        assert SQUARES(params, jax.tree.map(np.asarray, BATCH)).dtype == jnp.float32
        assert jax.tree.leaves(curvax.curveball().init(params).memory)[0].dtype == jnp.float32
        batch = jax.tree.map(np.asarray, BATCH)
        assert curvax.find_layers(SQUARES, params, batch).structs[0].dtype == jnp.float32
        loss, grads, at = SQUARES.value_and_grad(params, batch)
        assert loss.dtype == grads["w"].dtype == jnp.float32
        tx = curvax.curveball()
        updates, _ = tx.update(grads, tx.init(params), params, at=at)
        assert optax.apply_updates(params, updates)["w"].dtype == jnp.float32


def test_a_key_called_value_keeps_its_name():
    def attend(p, x):
        return x @ p["attn"]["value"] + jnp.tanh(x @ p["attn"]["key"])

    params = {"attn": {"value": PARAMS["w"], "key": PARAMS["w"]}}
    layers = curvax.find_layers(curvax.Objective(attend, losses.squared_error()), params, BATCH)
    assert layers["attn/value"].name == "attn/value"
    assert trees.leaf_paths({"value": jnp.ones(1)}) == ["value"]


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_flags_and_strings_among_the_inputs(chunk_size):
    def switched(p, inputs):
        x, mode, skip = inputs
        return jnp.tanh(x @ p["w"]) if mode == "bounded" and not skip else x @ p["w"]

    objective = curvax.Objective(switched, losses.squared_error())
    batch = (INPUTS, "bounded", False), BATCH[1]
    tapped = curvax.tap(curvax.find_layers(objective, PARAMS, batch), objective.linearize(PARAMS, batch))
    assert tapped.layers["w"].kind == "dense"
    map_of_chunks = curvax.ggn(objective.linearize(PARAMS, batch, chunk_size=chunk_size))
    expected = jax.jit(lambda p: oracles.dense_ggn(SQUARES, p, BATCH) @ trees.ravel(p))(PARAMS)
    np.testing.assert_allclose(trees.ravel(map_of_chunks(PARAMS)), expected, rtol=1e-10, atol=1e-12)


def data_parallel(wrap, method):
    def step(params, batch):
        _, grads, at = SQUARES.value_and_grad(params, batch)
        updates, _ = method.update(grads, method.init(params), params, at=at)
        return jax.lax.pmean(updates, "data")

    return wrap(step)


def test_a_step_on_one_devices_part_of_the_batch_is_refused():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
    shards = jax.tree.map(lambda leaf: leaf.reshape(2, 4, 3), BATCH)
    wraps = {
        "checked": (functools.partial(jax.shard_map, **specs), BATCH),
        "unchecked": (functools.partial(jax.shard_map, check_vma=False, **specs), BATCH),
        "pmap": (lambda step: jax.pmap(step, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:2]), shards),
    }
    for wrap, batch in wraps.values():
        for method in (curvax.levenberg_marquardt(), curvax.scale_by_natural_gradient()):
            with pytest.raises(ValueError, match=r"part of the axis 'data' alone.*plain jax.jit.*NamedSharding"):
                jax.eval_shape(data_parallel(wrap, method), PARAMS, batch)


def test_optaxs_backtracking_line_search_stands_behind_a_method_in_a_chain():
    batch = jax.tree.map(lambda leaf: 3 * leaf, BATCH)
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=10)
    tx = optax.chain(curvax.scale_by_natural_gradient(damping=1e-3), optax.scale(-4.0), search)

    @functools.partial(jax.jit, static_argnums=0)
    def step(by_batch):
        loss, grads, at = SQUARES.value_and_grad(PARAMS, batch)
        extra = {"value_fn": lambda p, at: at.loss_at(p)}
        if by_batch:
            extra = {"value_fn": lambda p, at, batch: SQUARES(p, batch), "batch": batch}
        updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, at=at, value=loss, grad=grads, **extra)
        return updates["w"], state[-1].learning_rate, loss, at.loss_along(updates)

    update, rate, loss, after = step(False)
    np.testing.assert_array_equal(update, step(True)[0])
    assert after < loss
    assert 0 < rate <= 1
