"""Cubic-regularised learning rates against brute force and dense Hessians (methods CR-5 to CR-9)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import trees
from curvax.damping import cubic_rule
from curvax.transforms import cubic_step_of_examples, cubic_step_size


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adam raises floats to integer powers
        yield


def problem(seed=0):
    generator = np.random.default_rng(seed)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "v": jnp.asarray(generator.normal(size=(4, 2)))}
    batch = (jnp.asarray(generator.normal(size=(6, 3))), jnp.asarray(generator.integers(0, 2, 6)))
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], curvax.losses.softmax_cross_entropy(), l2=0.1
    )
    return objective, params, batch


def one_step(tx, objective, params, batch):
    @jax.jit
    def step(params, state):
        _, gradient, at = objective.value_and_grad(params, batch)
        return tx.update(gradient, state, params, at=at)

    return step(params, tx.init(params))


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


@pytest.mark.parametrize("scope", ["whole", "leaf", "variable"])
def test_steps_are_those_of_the_dense_hessian(scope):
    """CR-8: per layer the diagonal block, per variable a signed unit step with the diagonal."""
    objective, params, batch = problem()
    sigma = 20.0
    tx = curvax.scale_by_cubic_step(optax.adam(0.3), sigma=sigma, scope=scope)
    step, state = one_step(tx, objective, params, batch)
    gradient = np.asarray(trees.ravel(jax.grad(objective)(params, batch)))
    hessian = np.asarray(jax.jit(lambda p: curvax.hessian(objective.linearize(p, batch)).to_dense())(params))
    direction = -np.sign(gradient)  # Adam's first step
    groups = {"whole": [range(20)], "leaf": [range(8), range(8, 20)], "variable": [[i] for i in range(20)]}[scope]
    expected = np.zeros(20)
    for group in groups:
        d = np.zeros(20)
        d[list(group)] = direction[list(group)]
        a, c, n3 = gradient @ d, d @ hessian @ d, np.linalg.norm(d) ** 3
        expected += d * (-c + np.sqrt(c**2 - 2 * a * sigma * n3)) / (sigma * n3)
    np.testing.assert_allclose(trees.ravel(step), expected, rtol=1e-5)  # Adam's epsilon
    np.testing.assert_allclose(abs(state.info.alpha), np.linalg.norm(expected) / (0.3 * np.sqrt(20)), rtol=1e-5)


def test_the_length_of_the_inner_update_is_of_no_account():
    objective, params, batch = problem()
    steps = [one_step(curvax.scale_by_cubic_step(optax.sgd(rate)), objective, params, batch)[0] for rate in (1e-4, 3.0)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *steps)


def test_an_ascent_direction_is_turned_or_kept():
    objective, params, batch = problem()
    down, _ = one_step(curvax.scale_by_cubic_step(optax.sgd(1.0)), objective, params, batch)
    uphill = optax.scale(1.0)
    turned, state = one_step(curvax.scale_by_cubic_step(uphill), objective, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), turned, down)
    assert state.info.alpha < 0
    kept, _ = one_step(curvax.scale_by_cubic_step(uphill, ascent="keep"), objective, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), kept, jax.grad(objective)(params, batch))


def test_sigma_adapts_and_bad_steps_may_be_rejected():
    def well(output, target):
        return jnp.sum(jnp.log(jnp.cosh(20 * (output - target)))) / 20

    objective = curvax.Objective(lambda w, x: x * w, curvax.losses.from_function(well, convex=True))
    w, batch = jnp.array(3.0), (jnp.ones((1,)), jnp.zeros((1,)))
    tx = curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=1e-3, rule=cubic_rule(), acceptance=0.1)
    state, sigmas, losses = tx.init(w), [], [float(objective(w, batch))]

    @jax.jit
    def step(w, state):
        _, gradient, at = objective.value_and_grad(w, batch)
        updates, state = tx.update(gradient, state, w, at=at)
        return optax.apply_updates(w, updates), state

    accepted = []
    for _ in range(40):
        w, state = step(w, state)
        sigmas.append(float(state.info.sigma))
        accepted.append(bool(state.info.accepted))
        losses.append(float(objective(w, batch)))
    assert max(sigmas) > 2 * sigmas[0], "no step was too long"
    assert not all(accepted)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 1e-3 * losses[0]


def test_the_three_ways_of_averaging():
    """CR-6: E[alpha_j g_j], E[alpha_j] E[g_j], and one alpha for the batch's direction."""
    objective, params, batch = problem()
    sigma, each = 7.0, []
    for i in range(6):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        each.append(one_step(curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=sigma), objective, params, one))
    steps = np.stack([np.asarray(trees.ravel(step)) for step, _ in each])
    sizes = np.array([float(state.info.alpha) for _, state in each])
    gradient = np.asarray(trees.ravel(jax.grad(objective)(params, batch)))
    whole, _ = one_step(curvax.scale_by_cubic_step(optax.sgd(1.0), sigma=sigma), objective, params, batch)
    expected = {"steps": steps.mean(0), "step_sizes": -sizes.mean() * gradient, "batch": np.asarray(trees.ravel(whole))}
    for average, truth in expected.items():
        ours = jax.jit(lambda p, how=average: cubic_step_of_examples(objective, p, batch, sigma=sigma, average=how))(
            params
        )
        np.testing.assert_allclose(trees.ravel(ours), truth, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="'steps', 'step_sizes' or 'batch'"):
        cubic_step_of_examples(objective, params, batch, average="mean")


def test_a_skipped_step_leaves_the_inner_state_as_it_was():
    objective, params, batch = problem()
    tx = curvax.scale_by_cubic_step(optax.adam(0.1))
    bad = (batch[0].at[0, 0].set(jnp.nan), batch[1])
    updates, state = one_step(tx, objective, params, bad)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, state.inner, tx.init(params).inner)
    assert state.info.skipped_steps == 1


def test_a_sampled_diagonal_may_stand_in_for_the_exact_one():
    objective, params, batch = problem()
    layers = curvax.find_layers(objective, params, batch)

    def diagonal(at):
        return curvax.layers.exact_ggn_diagonal(curvax.layers.tap(layers, at))

    tx = curvax.scale_by_cubic_step(optax.sgd(1.0), scope="variable", diagonal=diagonal)
    step, _ = one_step(tx, objective, params, batch)
    assert objective(trees.add(params, step), batch) < objective(params, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scope": "layer"}, "'whole', 'leaf'"), ({"ascent": "flip"}, "'turn' or"), ({"acceptance": 0.1}, "needs a rule")],
)
def test_misuse_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        curvax.scale_by_cubic_step(problem()[0], optax.sgd(1.0), **options)


@pytest.mark.parametrize("scope", ["whole", "leaf", "variable"])
def test_a_container_of_one_leaf_is_a_container(scope):
    objective = curvax.Objective(lambda p, x: x @ p["w"], curvax.losses.squared_error())
    params, batch = {"w": jnp.ones((2, 1))}, (jnp.ones((3, 2)), jnp.zeros((3, 1)))
    tx = curvax.scale_by_cubic_step(optax.sgd(1.0), scope=scope)
    _, gradient, at = objective.value_and_grad(params, batch)
    updates, _ = tx.update(gradient, tx.init(params), params, at=at)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jnp.all(updates["w"] < 0)
