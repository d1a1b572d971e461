"""CurveBall against its formulas with dense matrices, its theorems, and its cost."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks.operations import flops
from curvax import trees
from curvax.damping import DampingRule, curveball_rule
from tests.oracles import dense_ggn
from tests.transforms.stepping import flat, loss, run
from tests.transforms.stepping import gradient as gradient_of

FIXED = DampingRule(decrease=1, increase=1)


def problem(l2=None, loss="softmax_cross_entropy"):
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "v": jnp.asarray(generator.normal(size=(4, 2)))}
    targets = jnp.asarray(
        generator.integers(0, 2, 6) if loss == "softmax_cross_entropy" else generator.normal(size=(6, 2))
    )
    batch = (jnp.asarray(generator.normal(size=(6, 3))), targets)
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], getattr(curvax.losses, loss)(), l2=l2)
    return objective, params, batch


def history_of(objective, params, batch, steps, **options):
    """(parameters, state, parameters, state) before and behind every step."""
    tx = curvax.curveball(**options)
    state, history = jax.jit(tx.init)(params), []
    for before, after, _, new_state in run(tx, objective, params, batch, steps):
        history.append((before, state, after, new_state))
        state = new_state
    return history


@pytest.mark.parametrize("gradient", ["recomputed", "incoming"])
@pytest.mark.parametrize("damped_model", [True, False])
def test_steps_are_those_of_the_dense_formulas(gradient, damped_model):
    """Algorithm 1 and eq. 18, with l2 in the objective."""
    objective, params, batch = problem(l2=0.2)
    options = {"initial_damping": 0.5, "rule": FIXED, "gradient": gradient, "damped_model": damped_model}
    history = history_of(objective, params, batch, 4, **options)
    z = np.zeros(20)
    for before, _, _, state in history:
        matrix = np.asarray(dense_ggn(objective, before, batch))
        g = gradient_of(objective, before, batch)
        bracket = matrix @ z + 0.5 * z + g
        model = matrix + 0.5 * np.eye(20) if damped_model else matrix
        basis = np.stack([bracket, z], axis=1)
        beta, minus_rho = np.linalg.pinv(basis.T @ model @ basis) @ basis.T @ g
        z = -minus_rho * z - beta * bracket
        np.testing.assert_allclose(flat(state.memory), z, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(state.info.extra["momentum"], -minus_rho, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(state.info.predicted_change, g @ z + z @ model @ z / 2, rtol=1e-7)


@pytest.mark.parametrize(("momentum", "learning_rate"), [(1.0, None), (0.9, 0.1), (None, 0.1)])
def test_fixed_momentum_and_fixed_learning_rate(momentum, learning_rate):
    objective, params, batch = problem()
    options = {"momentum": momentum, "learning_rate": learning_rate, "rule": FIXED, "initial_damping": 0.3}
    history = history_of(objective, params, batch, 3, **options)
    z = np.zeros(20)
    for before, _, _, state in history:
        matrix = np.asarray(dense_ggn(objective, before, batch))
        g = gradient_of(objective, before, batch)
        model = matrix + 0.3 * np.eye(20)
        bracket = model @ z + g
        rho, beta = momentum, learning_rate
        if beta is None:  # the minimum along the bracket (methods CB-11)
            beta = bracket @ (g + rho * model @ z) / (bracket @ model @ bracket)
        elif rho is None:
            rho = (beta * z @ model @ bracket - g @ z) / (z @ model @ z) if z.any() else 0.0
        z = rho * z - beta * bracket
        np.testing.assert_allclose(flat(state.memory), z, rtol=1e-8, atol=1e-10)


def test_the_step_is_at_the_minimum_of_the_model_and_goes_downhill():
    """Theorem A.2 and its sharper form, g^T z + z^T (G + lambda I) z = 0 (methods CB-6)."""
    objective, params, batch = problem()
    for before, _, _, state in history_of(objective, params, batch, 10):
        z, matrix = flat(state.memory), np.asarray(dense_ggn(objective, before, batch))
        slope = gradient_of(objective, before, batch) @ z
        assert slope < 0
        np.testing.assert_allclose(slope, -z @ matrix @ z - float(state.info.damping) * z @ z, rtol=1e-8)
        np.testing.assert_allclose(state.info.predicted_change, slope / 2, rtol=1e-8)


def quadratic(eigenvalues):
    """1/2 sum_i h_i w_i^2 as a model, and its batch."""
    objective = curvax.Objective(lambda w, x: x * w, curvax.losses.squared_error())
    return objective, (jnp.sqrt(jnp.asarray(eigenvalues))[None], jnp.zeros((1, len(eigenvalues))))


def test_fixed_coefficients_converge_where_the_theorem_says_and_at_its_rate():
    """Theorem A.1: linearly iff 3/2 beta h - 1 < rho < 1 + beta h for all h; complex roots at sqrt(rho - beta h)."""
    generator = np.random.default_rng(0)
    values = np.array([0.1, 0.7, 2.0])
    beta, rho = generator.uniform(0.05, 1.2, 200), generator.uniform(-1, 1.3, 200)
    margin = np.minimum((rho - np.max(1.5 * beta[:, None] * values - 1, axis=1)), 1 + beta * values.min() - rho)
    clear = np.abs(margin) > 0.05
    beta, rho, margin = beta[clear], rho[clear], margin[clear]
    objective, batch = quadratic(values)

    @jax.jit
    @jax.vmap
    def norms(beta, rho):
        tx = curvax.curveball(momentum=rho, learning_rate=beta, initial_damping=0.0, rule=FIXED)

        def body(carry, _):
            w, state = carry
            updates, state = tx.update(values * w, state, w, at=objective.linearize(w, batch))
            return (optax.apply_updates(w, updates), state), jnp.linalg.norm(w)

        return jax.lax.scan(body, (jnp.ones(3), tx.init(jnp.ones(3))), length=400)[1]

    lengths = np.asarray(norms(jnp.asarray(beta), jnp.asarray(rho)))
    np.testing.assert_array_equal(lengths[:, -1] < lengths[:, 0], margin > 0)
    assert 30 < np.sum(margin > 0) < len(margin) - 30
    for b, r, length in zip(beta[margin > 0], rho[margin > 0], lengths[margin > 0], strict=True):
        if length[-1] > 1e-250:
            roots = [np.abs(np.linalg.eigvals([[r - b * h, -b * h], [r - b * h, 1 - b * h]])).max() for h in values]
            np.testing.assert_allclose((length[-1] / length[-101]) ** 0.01, max(roots), rtol=0.05)


def test_first_zero_and_collinear_directions():
    objective, batch = quadratic([1.0, 4.0])
    tx = curvax.curveball(initial_damping=0.0, rule=FIXED)
    step = jax.jit(
        lambda w, state: tx.update(objective.value_and_grad(w, batch)[1], state, at=objective.linearize(w, batch))
    )
    on_axis = [jnp.array([x, 0.0]) for x in (1.0, 0.0, 2.0, 3.0)]  # where bracket and z are collinear
    updates, state = step(on_axis[0], jax.jit(tx.init)(on_axis[0]))
    np.testing.assert_allclose(updates, [-1.0, 0.0], atol=1e-12)
    assert state.info.extra["momentum"] == 0
    updates, state = step(on_axis[1], state)  # at the minimum: no gradient, no step
    np.testing.assert_allclose(updates, 0.0, atol=1e-12)
    updates, state = step(on_axis[2], state)  # z is zero: a gradient step
    np.testing.assert_allclose(updates, [-2.0, 0.0], atol=1e-12)
    updates, state = step(on_axis[3], state)  # collinear
    np.testing.assert_allclose(updates, [-3.0, 0.0], atol=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.memory, state.strength)))


def test_damping_adapts_every_fifth_step_by_the_measured_ratio():
    objective, params, batch = problem(loss="squared_error")
    rule = curveball_rule(factor=0.5)
    history = history_of(objective, params, batch, 15, initial_damping=1e-3, rule=rule, judged_by="same_batch")
    for index, (before, old, after, state) in enumerate(history, start=1):
        if index % 5:
            assert state.strength == old.strength
            np.testing.assert_equal(float(state.info.step_ratio), float(old.info.step_ratio))
            continue
        actual = loss(objective, after, batch) - loss(objective, before, batch)
        np.testing.assert_allclose(state.info.step_ratio, actual / state.info.predicted_change, rtol=1e-6)
        factor = 0.5 if state.info.step_ratio > 1.5 else 2.0 if state.info.step_ratio < 0.5 else 1.0
        np.testing.assert_allclose(state.strength, factor * old.strength, rtol=1e-12)


def test_chunks_give_the_same_step():
    """The second and third step as well, in which z is not zero."""
    objective, params, batch = problem(l2=0.1)
    tx = curvax.curveball()

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, state, chunk_size):
        _, grads, at = objective.value_and_grad(params, batch, chunk_size=chunk_size)
        updates, state = tx.update(grads, state, params, at=at)
        return optax.apply_updates(params, updates), state

    (whole, state), (parts, other) = (step(params, tx.init(params), size) for size in (None, 4))
    for _ in range(2):
        (whole, state), (parts, other) = step(whole, state, None), step(parts, other, 4)
    np.testing.assert_allclose(flat(whole), flat(parts), rtol=1e-10)


def test_by_default_the_incoming_gradient_is_read_and_recomputed_by_request_alone():
    objective, params, batch = problem()

    @functools.partial(jax.jit, static_argnums=1)
    def update(factor, gradient):
        tx = curvax.curveball(**({} if gradient is None else {"gradient": gradient}))
        _, grads, at = objective.value_and_grad(params, batch)
        return tx.update(trees.scale(factor, grads), tx.init(params), params, at=at)

    # In the first step, z = 0, the step is beta times the gradient with beta of degree zero in it.
    default, default_state = update(0.25, None)
    np.testing.assert_allclose(flat(default), flat(update(1.0, "incoming")[0]) / 4, rtol=1e-12)
    assert np.isfinite(default_state.info.gradient_norm)
    unread, state = update(jnp.nan, "recomputed")
    np.testing.assert_array_equal(flat(unread), flat(update(1.0, "recomputed")[0]))
    assert state.info.skipped_steps == 0
    assert np.isnan(state.info.gradient_norm)
    np.testing.assert_allclose(flat(unread), flat(update(1.0, None)[0]), rtol=1e-10)
    skipped, state = update(jnp.nan, None)
    assert not flat(skipped).any()
    assert state.info.skipped_steps == 1
    with pytest.raises(ValueError, match="'incoming' or 'recomputed'"):
        curvax.curveball(gradient="read")


@pytest.mark.parametrize(("gradient", "limit"), [("recomputed", 2.4), ("incoming", 3.0)])
def test_a_step_costs_little_more_than_two_of_momentum_sgd(gradient, limit):
    def network(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    objective = curvax.Objective(network, curvax.losses.softmax_cross_entropy())
    sizes = [784, 1024, 1024, 10]
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in itertools.pairwise(sizes)]
    batch = (jax.ShapeDtypeStruct((512, 784), jnp.float32), jax.ShapeDtypeStruct((512,), jnp.int32))

    def counted(tx, uses_point):
        def step(params, state, batch):
            _, gradient, at = objective.value_and_grad(params, batch)
            extra = {"at": at} if uses_point else {}
            updates, state = tx.update(gradient, state, params, **extra)
            return optax.apply_updates(params, updates), state

        return flops(step, params, jax.eval_shape(tx.init, params), batch)

    sgd = counted(optax.sgd(0.1, momentum=0.9), False)
    # Every fifth step measures the loss behind it.
    every, fifth = (counted(curvax.curveball(gradient=gradient, rule=r), True) for r in (FIXED, None))
    assert fifth > every
    assert every + (fifth - every) / 5 <= limit * sgd
