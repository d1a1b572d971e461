"""The matrix: every optimiser through every property that the library promises of all of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conformance_methods import METHODS
from conformance_networks import FRAMEWORKS, batch, objective, plain, weights
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax

# The tests of a method share its compiled step, so one worker runs them all.
every_method = pytest.mark.parametrize(
    "method", [pytest.param(m, id=m.id, marks=pytest.mark.xdist_group(m.id)) for m in METHODS]
)

# What depends on the building blocks (states, solvers, taps) more than on the method that is built of them: the methods
# that differ most and compile fast meet it in `make test`, all others in `make test-all`.
FIRST = ("levenberg_marquardt", "newton_cg", "scale_by_sample_space", "curveball")
first_methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            method,
            id=method.id,
            marks=[pytest.mark.xdist_group(method.id), *([] if method.id in FIRST else [pytest.mark.slow])],
        )
        for method in METHODS
    ],
)


def make_step(tx, goal, **jit_options):
    """A jitted training step, and the list that grows by one whenever it is traced."""
    traces = []

    def step(params, state, data):
        traces.append(1)
        loss, grads, at = goal.value_and_grad(params, data)
        updates, state = tx.update(grads, state, params, at=at)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, **jit_options), traces


def with_jitted_init(tx):
    """States of many shapes are as many programs where each leaf is made by itself."""
    return tx._replace(init=jax.jit(tx.init))


def plain_step(method):
    """(objective, transformation, step, traces) on plain parameters, compiled once for all tests of a method."""
    return _plain_step(method.id)


@functools.cache
def _plain_step(name):
    method = next(method for method in METHODS if method.id == name)
    goal = objective(plain())
    tx = with_jitted_init(method())
    return goal, tx, *make_step(tx, goal)


def reference(method):
    """Parameters and state after one plain step on ``batch()``."""
    return _reference(method.id)


@functools.cache
def _reference(name):
    _, tx, step, _ = _plain_step(name)
    return step(weights(), tx.init(weights()), batch())


def assert_close(actual, expected, tolerance=1e-9):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=tolerance, atol=tolerance)


def assert_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def assert_same_step(method, params, state):
    """Whether parameters and state are those behind the reference's step.

    Eigenvectors, which rounding turns within the space of a repeated eigenvalue, by the next step, which is taken with
    the inverses that there are.
    """
    reference_params, reference_state, _ = reference(method)
    if method.keeps_eigenvectors:
        _, _, step, _ = plain_step(method)

        def after(params, state):
            settled = state.memory._replace(batches=jnp.full_like(state.memory.batches, 5))
            return step(params, state._replace(memory=settled), batch())[0]

        assert_close(after(params, state), after(reference_params, reference_state))
        state, reference_state = (s._replace(memory=s.memory._replace(prepared=())) for s in (state, reference_state))
    assert_close((params, state), (reference_params, reference_state))


def skeleton(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def step_state(state):
    """The state of the method itself, without what a chain has around it."""
    return state if isinstance(state, curvax.transforms.StepState) else state[0]


@every_method
def test_twenty_scanned_steps_equal_twenty_calls_and_reduce_the_loss(method):
    _, tx, step, traces = plain_step(method)

    @jax.jit
    def scanned(params, state, data):
        def body(carry, _):
            params, state, loss = step(*carry, data)
            return (params, state), loss

        return jax.lax.scan(body, (params, state), length=20)

    (params, state), losses = scanned(weights(), tx.init(weights()), batch())
    assert losses[-1] < 0.9 * losses[0]

    called, called_state, _ = step(weights(), tx.init(weights()), batch())
    traced = len(traces)
    for _ in range(19):
        called, called_state, _ = step(called, called_state, batch())
    assert len(traces) == traced, "the step was traced again"
    assert_close(called, params)
    assert skeleton(called_state) == skeleton(state) == skeleton(tx.init(weights()))


@every_method
def test_state_is_arrays_that_shapes_alone_can_build(method):
    tx = method()
    state = tx.init(weights())
    assert all(isinstance(leaf, jax.Array) and leaf.size for leaf in jax.tree.leaves(state))
    assert skeleton(jax.eval_shape(tx.init, weights())) == skeleton(state)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights())
    assert skeleton(jax.eval_shape(lambda: tx.init(shapes))) == skeleton(state)


@every_method
def test_a_step_can_be_traced_where_ranks_are_not_promoted(method):
    def model(w, x):
        return jnp.tanh(x @ w["w1"] + w["b1"][None]) @ w["w2"] + w["b2"][None]

    goal = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), l2=0.1)
    with jax.numpy_rank_promotion("raise"):
        tx = method(goal, weights())
        step, _ = make_step(tx, goal)
        state = jax.eval_shape(tx.init, weights())
        params, _, _ = jax.eval_shape(step, weights(), state, batch())
    assert skeleton(params) == skeleton(weights())


def eager(method):
    """The method with its update jitted by itself, for points made outside; and its traces."""
    return _eager(method.id)


@functools.cache
def _eager(name):
    tx, traces = next(method for method in METHODS if method.id == name)(), []

    @jax.jit
    def update(grads, state, params, at):
        traces.append(1)
        return tx.update(grads, state, params, at=at)

    return optax.GradientTransformationExtraArgs(jax.jit(tx.init), update), traces


@functools.cache
def eager_point():
    """Gradient and point of the first step, made outside of ``jit``."""
    return objective(plain()).value_and_grad(weights(), batch())[1:]


@every_method
def test_points_made_outside_of_jit_give_the_same_steps_and_trace_nothing_anew(method):
    goal, (tx, traces) = objective(plain()), eager(method)
    params, state, before = weights(), tx.init(weights()), len(traces)
    for seed in (1, 2, 3):
        _, grads, at = goal.value_and_grad(params, batch(seed=seed))
        updates, state = tx.update(grads, state, params, at=at)
        params = optax.apply_updates(params, updates)
        if seed == 1:
            assert_close((params, state), reference(method)[:2])
    assert len(traces) <= max(before, 1)
    assert step_state(state).info.skipped_steps == 0


@every_method
def test_what_stands_in_front_of_a_method_has_its_effect(method):
    """The step is that of the clipped gradient, which is another one; without a gradient nothing moves."""
    (tx, _), (grads, at) = eager(method), eager_point()
    leaves, treedef = jax.tree.flatten(grads)
    norm = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in leaves))
    clip = optax.chain(optax.clip_by_global_norm(norm / 8), optax.clip(norm / 40))
    chain = optax.chain(optax.GradientTransformation(clip.init, jax.jit(clip.update)), tx)
    clipped, _ = chain.update(grads, chain.init(weights()), weights(), at=at)
    shortened = treedef.unflatten([jnp.asarray(np.clip(np.asarray(g) / 8, -norm / 40, norm / 40)) for g in leaves])
    assert_close(clipped, tx.update(shortened, tx.init(weights()), weights(), at=at)[0])
    new, old, step = (
        [np.asarray(leaf) for leaf in jax.tree.leaves(t)] for t in (reference(method)[0], weights(), clipped)
    )
    assert max(np.abs(n - o - s).max() for n, o, s in zip(new, old, step, strict=True)) > 1e-2
    nothing = optax.chain(optax.set_to_zero(), tx)
    still, _ = nothing.update(grads, nothing.init(weights()), weights(), at=at)
    assert_equal(still, treedef.unflatten([np.zeros(g.shape) for g in leaves]))


MAPS = {
    "ggn": curvax.ggn,
    "hessian": curvax.hessian,
    "fisher": curvax.fisher,
    # Its draws are many small programs outside of ``jit``.
    "monte_carlo_fisher": jax.jit(lambda at: curvax.fisher(at, key=jax.random.key(0), num_samples=2)),
    "empirical_fisher": curvax.empirical_fisher,
}


@pytest.mark.parametrize("name", [*MAPS, "tap"])
def test_maps_and_tapped_points_made_outside_of_jit_trace_nothing_anew(name):
    goal, traces, found = objective(plain()), [], []
    layers = curvax.find_layers(goal, weights(), batch())

    @jax.jit
    def use(thing):
        traces.append(1)
        return thing(weights()) if name in MAPS else curvax.gram(thing)

    for seed in (1, 2, 3):
        at = goal.linearize(weights(), batch(seed=seed))
        found.append(use(MAPS[name](at) if name in MAPS else curvax.tap(layers, at)))
    assert len(traces) == 1
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, found[:2]), strict=True))


@first_methods
def test_vmap_over_seeds_equals_one_at_a_time(method):
    _, tx, step, _ = plain_step(method)
    starts = [{name: jnp.asarray(f * np.asarray(leaf)) for name, leaf in weights().items()} for f in (1.0, 0.5, 1.2)]
    many = {name: jnp.asarray(np.stack([start[name] for start in starts])) for name in starts[0]}
    init = jax.jit(tx.init)
    states = jax.jit(jax.vmap(tx.init))(many)
    params, _, losses = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(many, states, batch())
    for index, start in enumerate(starts):
        alone, _, loss = step(start, init(start), batch())
        assert_close({name: np.asarray(leaf)[index] for name, leaf in params.items()}, alone)
        assert_close(np.asarray(losses)[index], loss)


@first_methods
def test_donated_buffers(method):
    goal = objective(plain())
    tx = with_jitted_init(method())
    step, _ = make_step(tx, goal, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, weights()), tx.init(weights())
    params, state, _ = step(params, state, batch())
    assert_same_step(method, params, state)


@first_methods
@pytest.mark.many_compilations("the layers of K-FAC are found anew, and the reference may be compiled here first")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_stable_for_narrow_parameters_under_x64(method, dtype):
    goal, params, data = objective(plain()), weights(dtype), batch(dtype=dtype)
    tx = method(goal, params)
    step, _ = make_step(tx, goal)
    state = tx.init(params)
    new_params, new_state, loss = step(params, state, data)
    assert skeleton(new_params) == skeleton(params)
    assert skeleton(new_state) == skeleton(state)
    assert jnp.float64 not in {leaf.dtype for leaf in jax.tree.leaves((new_params, new_state, loss))}
    precision = 1e-4 if dtype == jnp.float32 else 0.05
    assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), new_params), reference(method)[0], precision)


# A framework changes the containers only, which all methods treat by the same functions: the first method meets every
# framework, the others one of them, and the rest under `make test-all`.
FRAMEWORK_CASES = [
    pytest.param(
        method,
        framework,
        id=f"{framework}-{method.id}",
        marks=[
            pytest.mark.xdist_group(method.id),
            *([] if method is METHODS[0] or (framework == "flax_nnx" and method.id in FIRST) else [pytest.mark.slow]),
        ],
    )
    for method in METHODS
    for framework in FRAMEWORKS
]


@pytest.mark.parametrize(("method", "framework"), FRAMEWORK_CASES)
def test_every_framework_takes_the_same_step(method, framework):
    """The trained networks agree as functions, whatever the containers and the layout of their weights."""
    network = FRAMEWORKS[framework]()
    goal = objective(network)
    tx = method(goal, network.params)
    step, _ = make_step(tx, goal)
    params, state, loss = step(network.params, tx.init(network.params), batch())
    expected, _, expected_loss = reference(method)
    assert_close(loss, expected_loss)
    inputs = batch(seed=7)[0]
    assert_close(network.model_fn(params, inputs), plain().model_fn(expected, inputs))
    assert jax.tree.structure(params) == jax.tree.structure(network.params)
    _, second, _ = step(params, state, batch())
    assert skeleton(second) == skeleton(state)


@first_methods
def test_inside_chain_and_apply_if_finite(method):
    goal = objective(plain())
    tx = optax.apply_if_finite(optax.chain(method(), optax.scale(0.5)), max_consecutive_errors=3)
    step, _ = make_step(tx, goal)
    params, _, _ = step(weights(), tx.init(weights()), batch())
    halved = jax.tree.map(lambda old, new: old + 0.5 * (new - old), weights(), reference(method)[0])
    assert_close(params, halved)


def only(names):
    return {name: name in names for name in weights()}


def frozen_reference(method, names):
    """One step on the problem in which all parameters but these are constants of the model."""
    constants = {name: leaf for name, leaf in weights().items() if name not in names}
    network = plain()
    goal = curvax.Objective(
        lambda params, x: network.model_fn({**constants, **params}, x), objective(network).terms[0].loss
    )
    visible = {name: leaf for name, leaf in weights().items() if name in names}
    tx = method(goal, visible)
    step, _ = make_step(tx, goal)
    return step(visible, jax.jit(tx.init)(visible), batch())[0]


@first_methods
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_hidden_leaves_are_constants_to_the_method(method, wrapper):
    goal, shown = objective(plain()), {"w1", "w2"}
    if wrapper == "masked":
        tx = optax.chain(optax.masked(method(), only(shown)), optax.masked(optax.set_to_zero(), only({"b1", "b2"})))
    else:
        labels = {name: "matrix" if name in shown else "rest" for name in weights()}
        tx = optax.partition({"matrix": method(), "rest": optax.sgd(0.1)}, labels)
    step, _ = make_step(tx, goal)
    params, state, _ = step(weights(), jax.jit(tx.init)(weights()), batch())
    expected = frozen_reference(method, shown)
    assert_close({name: params[name] for name in shown}, expected)
    gradient = jax.jit(jax.grad(goal))(weights(), batch())
    rate = 0.0 if wrapper == "masked" else 0.1
    assert_close(params["b1"], weights()["b1"] - rate * gradient["b1"])
    assert skeleton(step(params, state, batch())[1]) == skeleton(state)


@every_method
def test_through_the_optimizer_of_nnx(method):
    """Which takes the containers of all that it hands on apart, the point's among them."""
    network = FRAMEWORKS["flax_nnx"]()
    goal = objective(network)
    model = network.build()
    optimizer = nnx.Optimizer(model, with_jitted_init(method(goal, network.params)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, data):
        loss, grads, at = goal.value_and_grad(nnx.state(model, nnx.Param), data)
        optimizer.update(model, grads, at=at)
        return loss

    for _ in range(2):
        loss = step(model, optimizer, batch())
    params, state, first_loss = reference(method)
    params, _, second_loss = plain_step(method)[2](params, state, batch())
    assert_close(loss, second_loss)
    inputs = batch(seed=7)[0]
    assert_close(network.model_fn(nnx.state(model, nnx.Param), inputs), plain().model_fn(params, inputs))
    assert first_loss != second_loss


@first_methods
def test_multi_steps_uses_the_mean_gradient_and_the_last_curvature(method):
    goal = objective(plain())
    inner = with_jitted_init(method())
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    step, _ = make_step(tx, goal)
    # optax accumulates in float32 whatever the parameters are, and divides floats by integers.
    start, (first, second) = weights(jnp.float32), (batch(seed=seed, dtype=jnp.float32) for seed in (1, 2))
    with jax.numpy_dtype_promotion("standard"):
        params, state, _ = step(start, tx.init(start), first)
        assert_equal(params, start)
        params, state, _ = step(params, state, second)

    @jax.jit
    def expected(start):
        gradients = [jax.grad(goal)(start, data) for data in (first, second)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
        at = goal.linearize(start, second)
        return optax.apply_updates(start, inner.update(mean, inner.init(start), start, at=at)[0])

    assert_close(params, expected(start), 1e-5)


# Of the scheduled arguments that are not among the numbers of a method.
FIRST_VALUES = {
    "momentum": 0.9,
    "acceptance": 1e-4,
    "sufficient_decrease": 0.2,
    "max_divergence": 0.1,
    "decay": 0.9,
    "meta_rate": 0.05,
    "max_curvature": 100.0,
    "up": 1.5,
    "exponent": 0.5,
}


@every_method
def test_inject_hyperparams_traces_numbers_and_schedules_without_static_args(method):
    """All arguments but those that decide shapes, as the method takes them itself."""
    goal, settings = objective(plain()), method.numbers
    if method.scheduled is not None:
        first = FIRST_VALUES.get(method.scheduled)
        first = settings.get(method.scheduled, first)
        settings = settings | {method.scheduled: lambda count: first * 0.5**count}
    made = method.make(), optax.inject_hyperparams(method.make())
    # What decides shapes keeps its default.
    choices = {"inner": optax.sgd(1.0)} if "inner" in method.choices else {}
    plainly, injected = (method.as_step(make(**choices, **settings)) for make in made)

    def run(tx):
        step, _ = make_step(tx, goal)
        params, state = weights(), jax.jit(tx.init)(weights())
        start = skeleton(state)
        for seed in (1, 2, 3):
            params, state, _ = step(params, state, batch(seed=seed))
        assert skeleton(state) == start
        return params

    with jax.numpy_dtype_promotion("standard"):
        assert_close(run(injected), run(plainly), 1e-6)


@first_methods
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_batch_sharded_over_eight_devices_takes_the_same_step(method, axis_type):
    goal = objective(plain())
    tx = with_jitted_init(method())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        replicated = jax.device_put((weights(), tx.init(weights())), NamedSharding(mesh, PartitionSpec()))
        data = jax.device_put(batch(), NamedSharding(mesh, PartitionSpec("data")))
        step, traces = make_step(tx, goal)
        params, state, _ = step(*replicated, data)
        assert_same_step(method, params, state)
        step(params, state, data)
    assert len(traces) == 1


@first_methods
def test_saved_and_restored_it_goes_on_bit_for_bit(method, tmp_path):
    _, tx, step, _ = plain_step(method)
    params, state, _ = step(weights(), tx.init(weights()), batch())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda p: {"params": p, "state": tx.init(p)}, weights())
        shardings = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=weights()["w1"].sharding), shapes
        )
        restored = checkpointer.restore(tmp_path / "checkpoint", shardings)
    assert_equal(step(restored["params"], restored["state"], batch()), step(params, state, batch()))


@every_method
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_count_of_skipped_steps(method, bad):
    _, _, step, _ = plain_step(method)
    params, state, _ = reference(method)
    inputs, targets = batch()
    new_params, new_state, _ = step(params, state, (inputs.at[0, 0].set(bad), targets))
    assert_equal(new_params, params)
    changed = [
        jax.tree_util.keystr(path)
        for (path, new), old in zip(
            jax.tree_util.tree_flatten_with_path(new_state)[0], jax.tree.leaves(state), strict=True
        )
        if not np.array_equal(new, old, equal_nan=True)
    ]
    assert all(re.search("skipped|accepted", name) for name in changed), changed
    if any("skipped" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]):
        assert any("skipped" in name for name in changed)


@every_method
def test_zero_gradient_and_a_batch_of_one_example(method):
    goal, tx, step, _ = plain_step(method)
    params, state, _ = reference(method)
    alone = batch(size=1)
    new_params, new_state, loss = step(params, state, alone)
    assert skeleton(new_state) == skeleton(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new_params))
    assert jax.jit(goal)(new_params, alone) <= loss * (1 + 1e-9)

    @jax.jit
    def still(params, state, data):
        at = goal.linearize(params, data)
        return tx.update(jax.tree.map(jnp.zeros_like, params), state, params, at=at)

    updates, after = still(params, state, batch())
    if not method.coasts:
        assert_equal(updates, jax.tree.map(np.zeros_like, updates))
    after = step_state(after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.memory, after.strength)))


@every_method
def test_misuse_is_an_error_that_says_what_to_do(method):
    tx, goal, (grads, at) = method(), objective(plain()), eager_point()
    state, params = tx.init(weights()), weights()
    with pytest.raises(ValueError, match="empty"):
        goal.value_and_grad(params, (jnp.zeros((0, 3)), jnp.zeros((0,), jnp.int32)))
    if method.takes_point:
        with pytest.raises(ValueError, match="update takes at="):
            tx.update(grads, state, params)
        with pytest.raises(TypeError, match="not batch="):
            tx.update(grads, state, params, at=at, batch=batch())
        with pytest.raises(TypeError, match="value_and_grad"):
            tx.update(grads, state, params, at=batch())
    with pytest.raises(ValueError, match="'surplus'"):
        tx.update({**grads, "surplus": jnp.ones(3)}, state, params, at=at)
    with pytest.raises(ValueError, match=r"updates\['w1'\] has shape \(4, 3\)"):
        tx.update({**grads, "w1": grads["w1"].T}, state, params, at=at)
    with pytest.raises(TypeError, match="updates\\['b1'\\] has dtype int32"):
        tx.update({**grads, "b1": jnp.ones(4, jnp.int32)}, state, params, at=at)
