"""Cubic-regularised learning rates against brute force and dense Hessians (methods CR-5 to CR-9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.damping import cubic_rule
from curvax.transforms import cubic_step_of_examples, cubic_step_size
from tests.oracles import dense_hessian
from tests.transforms.stepping import flat, gradient, loss, one_step, run


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adam raises floats to integer powers
        yield


def problem(seed=0, biases=False):
    generator = np.random.default_rng(seed)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "v": jnp.asarray(generator.normal(size=(4, 2)))}
    batch = (jnp.asarray(generator.normal(size=(6, 3))), jnp.asarray(generator.integers(0, 2, 6)))
    if biases:
        params |= {"b": jnp.asarray(generator.normal(size=4)), "c": jnp.asarray(generator.normal(size=2))}

    def network(p, x):
        if biases:
            return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]
        return jnp.tanh(x @ p["w"]) @ p["v"]

    return curvax.Objective(network, curvax.losses.softmax_cross_entropy(), l2=0.1), params, batch


def test_the_root_is_the_minimum_by_brute_force():
    generator = np.random.default_rng(0)
    slopes, curvatures = (
        -(10 ** generator.uniform(-3, 3, 300)),
        generator.normal(size=300) * 10 ** generator.uniform(-3, 3, 300),
    )
    norms, sigmas = 10 ** generator.uniform(-2, 2, 300), 10 ** generator.uniform(-2, 4, 300)
    alphas = np.asarray(jax.jit(cubic_step_size)(*map(jnp.asarray, (slopes, curvatures, norms, sigmas))))
    assert np.all(alphas > 0)
    factors = np.array([0.0, 0.5, 0.9, 0.999, 1.001, 1.1, 2.0])[:, None]

    def model(alpha):
        return slopes * alpha + curvatures * alpha**2 / 2 + sigmas * (norms * alpha) ** 3 / 6

    assert np.all(model(alphas) <= np.min(model(factors * alphas), axis=0))
    derivative = slopes + curvatures * alphas + sigmas * norms**3 * alphas**2 / 2
    scale = np.abs(slopes) + np.abs(curvatures * alphas)
    np.testing.assert_allclose(derivative / scale, 0, atol=1e-12)


@pytest.mark.many_compilations("a scalar formula at many limits, eagerly")
def test_limits_scale_invariance_and_extreme_lengths():
    a, c, n, sigma = -3.0, 2.0, 0.7, 5.0
    size = lambda *args, dtype=jnp.float64: float(cubic_step_size(*(jnp.asarray(x, dtype) for x in args)))  # noqa: E731
    np.testing.assert_allclose(size(a, c, n, 1e-12), -a / c, rtol=1e-6)  # the curvature dominates
    np.testing.assert_allclose(size(a, 1e-9, n, sigma), np.sqrt(-2 * a / (sigma * n**3)), rtol=1e-6)  # flat
    np.testing.assert_allclose(size(-1e-12, -c, n, sigma), 2 * c / (sigma * n**3), rtol=1e-6)  # negative curvature
    np.testing.assert_allclose(size(10 * a, 100 * c, 10 * n, sigma), size(a, c, n, sigma) / 10, rtol=1e-12)
    assert size(0.0, 0.0, 0.0, sigma) == 0
    assert size(a, -c, n, 0.0) == 0
    tiny = size(a * 1e-16, c * 1e-32, n * 1e-16, sigma, dtype=jnp.float32)  # ||d||^3 underflows
    np.testing.assert_allclose(tiny * 1e-16, size(a, c, n, sigma), rtol=1e-5)


GROUPS = {
    "whole": [range(20)],
    "leaf": [range(8), range(8, 20)],
    "variable": [[i] for i in range(20)],
    "layer": [[*range(4), *range(14, 26)], range(4, 14)],  # w with b, v with c
}


@pytest.mark.parametrize("scope", GROUPS)
def test_steps_are_those_of_the_dense_hessian(scope):
    """CR-8: per layer the diagonal block, per variable a signed unit step with the diagonal."""
    objective, params, batch = problem(biases=scope == "layer")
    sigma, size = 20.0, sum(map(len, GROUPS[scope]))
    tx = curvax.scale_by_cubic_step(optax.scale_by_sign(), sigma=sigma, scope=scope, ascent="turn")
    step, state = one_step(tx, objective, params, batch)
    g, hessian = gradient(objective, params, batch), np.asarray(dense_hessian(objective, params, batch))
    expected, predicted, slope, curvature = np.zeros(size), 0.0, 0.0, 0.0
    for group in map(list, GROUPS[scope]):
        d = np.zeros(size)
        d[group] = np.sign(g)[group]  # uphill: every group is turned round
        a, c, n3 = g @ d, d @ hessian @ d, np.linalg.norm(d) ** 3
        alpha = (-c + np.sqrt(c**2 + 2 * a * sigma * n3)) / (sigma * n3)
        expected -= alpha * d
        predicted += -a * alpha + c * alpha**2 / 2 + sigma * n3 * alpha**3 / 6
        slope, curvature = slope + a, curvature + c
    info = state.info
    np.testing.assert_allclose(flat(step), expected, rtol=1e-9)
    np.testing.assert_allclose(info.predicted_change, predicted, rtol=1e-9)
    np.testing.assert_allclose(info.extra["slope"], slope, rtol=1e-9)
    np.testing.assert_allclose(info.extra["curvature"], curvature, rtol=1e-9)
    np.testing.assert_allclose(info.step_size, -np.linalg.norm(expected) / np.sqrt(size), rtol=1e-9)
    np.testing.assert_allclose(info.loss, loss(objective, params, batch), rtol=1e-12)


def test_the_length_of_the_inner_update_is_of_no_account():
    objective, params, batch = problem()
    steps = [one_step(curvax.scale_by_cubic_step(optax.sgd(rate)), objective, params, batch)[0] for rate in (1e-4, 3.0)]
    np.testing.assert_allclose(*map(flat, steps), rtol=1e-10)


def test_an_ascent_direction_is_turned_or_kept():
    objective, params, batch = problem()
    down, state = one_step(curvax.scale_by_cubic_step(optax.sgd(1.0)), objective, params, batch)
    assert state.info.step_size > 0
    uphill = optax.scale(1.0)
    turned, state = one_step(curvax.scale_by_cubic_step(uphill), objective, params, batch)
    np.testing.assert_allclose(flat(turned), flat(down), rtol=1e-10)
    assert state.info.step_size < 0
    kept, _ = one_step(curvax.scale_by_cubic_step(uphill, ascent="keep"), objective, params, batch)
    np.testing.assert_allclose(flat(kept), gradient(objective, params, batch), rtol=1e-12)


def test_sigma_adapts_by_the_predicted_change_and_bad_steps_may_be_rejected():
    """Every step of forty against scalar formulas."""
    objective = curvax.Objective(lambda w, x: x * w, curvax.losses.from_function(well, convex=True))
    w, batch = jnp.array(3.0), (jnp.ones((1,)), jnp.zeros((1,)))
    tx = curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=1e-3, rule=cubic_rule(), acceptance=0.1)
    sigma, ratios = 1e-3, []
    for taken in run(tx, objective, w, batch, 40):
        x = float(taken.before)
        if abs(np.tanh(20 * x)) < 1e-3:  # beyond, changes of the loss are rounding
            break
        a, c = -(np.tanh(20 * x) ** 2), 20 * (1 - np.tanh(20 * x) ** 2) * np.tanh(20 * x) ** 2
        n3 = abs(np.tanh(20 * x)) ** 3
        alpha = -2 * a / (c + np.sqrt(c**2 - 2 * a * sigma * n3))
        step, predicted = -alpha * np.tanh(20 * x), a * alpha + c * alpha**2 / 2 + sigma * n3 * alpha**3 / 6
        ratio = (float(well(x + step, 0.0)) - float(well(x, 0.0))) / predicted
        np.testing.assert_allclose(taken.state.info.extra["sigma"], sigma, rtol=1e-12)
        np.testing.assert_allclose(taken.state.info.predicted_change, predicted, rtol=1e-6)
        np.testing.assert_allclose(taken.state.info.step_ratio, ratio, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(taken.updates, step if ratio > 0.1 else 0.0, rtol=1e-6)
        assert bool(taken.state.info.accepted) == (ratio > 0.1)
        sigma *= 0.5 if ratio > 0.9 else 2.0 if ratio < 0.1 else 1.0
        ratios.append(ratio)
    assert min(ratios) < 0.1, "no step was too long"
    assert max(ratios) > 0.9
    assert float(well(float(taken.after), 0.0)) < 1e-3 * float(well(3.0, 0.0))


def well(output, target):
    z = 20 * (output - target)
    return jnp.sum(jnp.logaddexp(z, -z) - np.log(2)) / 20


def test_the_three_ways_of_averaging():
    """CR-6: E[alpha_j g_j], E[alpha_j] E[g_j], and one alpha for the batch's direction."""
    objective, params, batch = problem()
    sigma, steps, sizes = 7.0, [], []

    def cubic(g, matrix):
        c, n3 = g @ matrix @ g, np.linalg.norm(g) ** 3
        return (-c + np.sqrt(c**2 + 2 * g @ g * sigma * n3)) / (sigma * n3)

    for i in range(6):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        g = gradient(objective, params, one)
        sizes.append(cubic(g, np.asarray(dense_hessian(objective, params, one))))
        steps.append(-sizes[-1] * g)
    g = gradient(objective, params, batch)
    whole = -cubic(g, np.asarray(dense_hessian(objective, params, batch))) * g
    expected = {"steps": np.mean(steps, axis=0), "step_sizes": -np.mean(sizes) * g, "batch": whole}
    step_of = jax.jit(cubic_step_of_examples, static_argnames="average")
    for average, truth in expected.items():
        ours = step_of(objective, params, batch, sigma=sigma, average=average)
        np.testing.assert_allclose(flat(ours), truth, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="'steps', 'step_sizes' or 'batch'"):
        cubic_step_of_examples(objective, params, batch, average="mean")


def test_a_skipped_step_leaves_the_inner_state_as_it_was():
    objective, params, batch = problem()
    tx = curvax.scale_by_cubic_step(optax.adam(0.1))
    before = run(tx, objective, params, batch)[0]
    bad = (batch[0].at[0, 0].set(jnp.nan), batch[1])
    updates, state = one_step(tx, objective, before.after, bad, state=before.state)
    assert not flat(updates).any()
    assert flat(before.state.memory).any()
    np.testing.assert_array_equal(flat(state.memory), flat(before.state.memory))
    assert state.info.skipped_steps == 1


def test_with_layers_the_diagonal_is_estimated_anew_at_every_step():
    """Each draw d^T diag(H) d differs from the next and from the exact one, which is their mean."""
    objective, params, batch = problem()
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def curvatures(seeds):
        """Those of two steps from the same parameters, for every seed."""
        _, grads, at = objective.value_and_grad(params, batch)

        def one(seed):
            tx = curvax.scale_by_cubic_step(optax.sgd(1.0), scope="variable", layers=layers, seed=seed)
            _, first = tx.update(grads, tx.init(params), params, at=at)
            _, second = tx.update(grads, first, params, at=at)
            return jnp.stack([first.info.extra["curvature"], second.info.extra["curvature"]])

        return jax.vmap(one)(seeds)

    draws = np.asarray(curvatures(jnp.arange(2000)))
    g = gradient(objective, params, batch)
    exact = g @ (np.diag(dense_hessian(objective, params, batch)) * g)
    error = draws.std() / np.sqrt(draws.size)
    assert error < 0.05 * abs(exact), "too few draws to tell"
    assert abs(draws.mean() - exact) < 5 * error
    assert np.mean(np.abs(draws[:, 0] - draws[:, 1]) > 1e-6 * abs(exact)) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "block"}, "'whole', 'layer'"),
        ({"ascent": "flip"}, "'turn' or"),
        ({"acceptance": 0.1}, "needs a rule"),
    ],
)
def test_misuse_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        curvax.scale_by_cubic_step(optax.sgd(1.0), **options)


@pytest.mark.parametrize("scope", GROUPS)
def test_a_container_of_one_leaf_is_a_container(scope):
    objective = curvax.Objective(lambda p, x: x @ p["w"], curvax.losses.squared_error())
    params, batch = {"w": jnp.ones((2, 1))}, (jnp.ones((3, 2)), jnp.zeros((3, 1)))
    updates, _ = one_step(curvax.scale_by_cubic_step(optax.sgd(1.0), scope=scope), objective, params, batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jnp.all(updates["w"] < 0)
