"""EA-CG: its solvers against dense float64 systems and against each other, and the steps of the method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.layers.layerwise_solvers import EACG, KFI, Damped, KroneckerCG, LayerSystem, Limits
from curvax.solvers import cg

ALPHA = 0.07
DAMPED = Damped(jnp.asarray(1 - ALPHA), jnp.asarray(ALPHA))
EXACT = Limits(jnp.asarray(500), jnp.asarray(1e-14))


def system(seed, inputs=6, outputs=4, bias=True, examples=20):
    rng = np.random.default_rng(seed)
    root, rows = rng.normal(size=(outputs, outputs)), rng.normal(size=(examples, inputs)) + 0.5
    fields = root @ root.T, rows.mean(0), rows / np.sqrt(examples), rng.normal(size=(inputs, outputs))
    return LayerSystem(*map(jnp.asarray, fields), jnp.asarray(rng.normal(size=outputs)) if bias else None, jnp.ones(()))


SYSTEMS = [system(0), system(1), system(2, 5, 4, bias=False), system(3, 7, 3), system(4, 7, 3, examples=3)]


def second(s):
    return np.asarray(s.rows).T @ np.asarray(s.rows)


def dense(left, right, gradient):
    """((1 - alpha) left (x) right + alpha I)^{-1} g."""
    matrix = (1 - ALPHA) * np.kron(left, right)
    return np.linalg.solve(matrix + ALPHA * np.eye(len(matrix)), np.asarray(gradient).reshape(-1)).reshape(
        gradient.shape
    )


def solved(solver, systems=SYSTEMS, limits=EXACT):
    return jax.jit(lambda systems: solver.solve(systems, DAMPED, limits))(systems)


@pytest.mark.parametrize("solver", [EACG(), KroneckerCG()])
def test_solutions_are_those_of_the_dense_systems(solver):
    for (weights, bias), s in zip(solved(solver).layers, SYSTEMS, strict=True):
        left = np.outer(s.mean, s.mean) if isinstance(solver, EACG) else second(s)
        np.testing.assert_allclose(weights, dense(left, s.curvature, s.weights), rtol=1e-9, atol=1e-10)
        assert (bias is None) == (s.bias is None)
        if bias is not None:
            np.testing.assert_allclose(bias, dense(np.eye(1), s.curvature, s.bias), rtol=1e-9, atol=1e-10)


def test_the_closed_form_of_the_rank_one_system():
    """What is orthogonal to E[h] is divided by alpha, what is along it meets (1 - alpha) |m|^2 H + alpha I (PC-6)."""
    for (weights, _), s in zip(solved(EACG()).layers, SYSTEMS, strict=True):
        m, h, v = np.asarray(s.mean), np.asarray(s.curvature), np.asarray(s.weights)
        along = m @ v / (m @ m)
        small = np.linalg.solve((1 - ALPHA) * (m @ m) * h + ALPHA * np.eye(len(h)), along)
        expected = (v - np.outer(m, along)) / ALPHA + np.outer(m, small)
        np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_iterate_is_that_of_conjugate_gradients_on_the_whole_matrix(count):
    limits = Limits(jnp.asarray(count), jnp.asarray(1e-14))

    def whole(s):
        def matvec(v):
            return (1 - ALPHA) * jnp.outer(s.mean, (s.mean @ v) @ s.curvature) + ALPHA * v

        return cg(matvec, s.weights, max_iterations=count, tolerance=1e-14).value

    found = solved(EACG(), limits=limits)
    for (weights, _), s in zip(found.layers, SYSTEMS, strict=True):
        np.testing.assert_allclose(weights, jax.jit(whole)(s), rtol=1e-9, atol=1e-9)
    assert found.iterations == min(count, 5)


@pytest.mark.parametrize("inputs", ["second", "rank_one"])
def test_factored_inverses_are_those_of_the_damped_factors(inputs):
    for (weights, bias), s in zip(solved(KFI(inputs)).layers, SYSTEMS, strict=True):
        left = second(s) if inputs == "second" else np.outer(s.mean, s.mean)
        right = np.asarray(s.curvature)
        pi = np.sqrt((np.trace(left) / len(left)) / (np.trace(right) / len(right)))
        gamma = np.sqrt(ALPHA / (1 - ALPHA))
        left, right = left + pi * gamma * np.eye(len(left)), right + gamma / pi * np.eye(len(right))
        expected = np.linalg.solve(left, np.asarray(s.weights)) @ np.linalg.inv(right) / (1 - ALPHA)
        np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-11)
        if bias is not None:
            np.testing.assert_allclose(bias, dense(np.eye(1), s.curvature, s.bias), rtol=1e-9, atol=1e-10)


def test_layers_without_gradient_or_without_input_stay_finite():
    s = system(0)
    still = s._replace(weights=jnp.zeros_like(s.weights), bias=jnp.zeros(4))
    dark = s._replace(mean=jnp.zeros_like(s.mean), rows=jnp.zeros_like(s.rows))
    for solver in (EACG(), KroneckerCG(), KFI(), KFI("rank_one")):
        (nothing, none), (weights, bias) = solved(solver, [still, dark]).layers
        assert not np.any(nothing)
        assert not np.any(none)
        assert np.all(np.isfinite(weights))
        assert np.all(np.isfinite(bias))
    for solver in (EACG(), KroneckerCG()):
        np.testing.assert_allclose(solved(solver, [dark]).layers[0][0], dark.weights / ALPHA, rtol=1e-12)


# --- the method -----------------------------------------------------------------------------------------------------


def network(params, x):
    x = jax.nn.sigmoid(x @ params["w1"] + params["b1"])
    return jnp.tanh(x @ params["w2"]) @ (2.0 * params["w3"]) + params["b3"]


def setting(loss=None, **options):
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "w3": (3, 3), "b3": (3,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    batch = (jnp.asarray(rng.normal(size=(12, 4))), jnp.asarray(rng.integers(0, 3, 12)))
    loss = curvax.losses.softmax_cross_entropy() if loss is None else loss
    objective = curvax.Objective(network, loss, **options)
    return objective, params, batch, curvax.find_layers(objective, params, batch)


def one_step(make, objective, params, batch, layers):
    tx = make(layers)

    def step(params, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        return gradient, tx.update(gradient, tx.init(params), params, at=at)

    gradient, (updates, state) = jax.jit(step)(params, batch)
    return gradient, updates, state


@pytest.mark.many_compilations("arrays of the setting are made eagerly, and a dense matrix is the oracle")
@pytest.mark.parametrize("curvature", ["pch1", "pch2", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize(("solver", "inputs"), [("ea_cg", "rank_one"), ("kronecker_cg", "second")])
def test_a_step_solves_with_the_layerwise_curvature(curvature, solver, inputs):
    """With weights that are scaled before their use and with a penalty."""
    problem = setting(l2=0.05)
    objective, params, batch, layers = problem

    def make(layers):
        return curvax.scale_by_ea_cg(
            layers, curvature=curvature, solver=solver, alpha=ALPHA, max_iterations=300, tolerance=1e-13
        )

    def dense_map(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return curvax.layers.layerwise_curvature(tapped, curvature, inputs=inputs).to_dense()

    gradient, updates, _ = one_step(make, *problem)
    matrix = np.asarray(jax.jit(dense_map)(params, batch))  # with the penalty
    system = (1 - ALPHA) * matrix + ALPHA * np.eye(len(matrix))
    expected = np.linalg.solve(system, np.asarray(curvax.trees.ravel(gradient)))
    np.testing.assert_allclose(curvax.trees.ravel(updates), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.many_compilations("arrays of the setting are made eagerly, and a dense matrix is the oracle")
def test_the_length_of_a_step_is_the_best_by_the_exact_matrix():
    alpha = 0.7
    problem = setting()
    objective, params, batch, _ = problem
    gradient, updates, state = one_step(lambda layers: curvax.ea_cg(layers, initial_alpha=alpha), *problem)
    _, direction, _ = one_step(lambda layers: curvax.scale_by_ea_cg(layers, alpha=alpha), *problem)
    exact = np.asarray(jax.jit(lambda p, b: curvax.ggn(objective.linearize(p, b)).to_dense())(params, batch))
    g, u, x = (np.asarray(curvax.trees.ravel(tree)) for tree in (gradient, updates, direction))
    damped = exact + alpha / (1 - alpha) * np.eye(len(exact))
    rate = g @ x / (x @ damped @ x)
    np.testing.assert_allclose(u, -rate * x, rtol=1e-9)
    np.testing.assert_allclose(state.info.predicted_change, g @ u + u @ damped @ u / 2, rtol=1e-9)
    np.testing.assert_allclose(state.info.step_size, rate, rtol=1e-9)
    np.testing.assert_allclose(state.info.extra["alpha"], alpha, rtol=1e-12)
    _, short, _ = one_step(lambda layers: curvax.ea_cg(layers, initial_alpha=alpha, learning_rate=rate / 3), *problem)
    np.testing.assert_allclose(curvax.trees.ravel(short), u / 3, rtol=1e-9)
    _, capped, _ = one_step(lambda layers: curvax.ea_cg(layers, initial_alpha=alpha, learning_rate=9 * rate), *problem)
    np.testing.assert_allclose(curvax.trees.ravel(capped), u, rtol=1e-9)
    _, fixed, _ = one_step(lambda layers: curvax.ea_cg(layers, alpha=alpha, learning_rate=9 * rate), *problem)
    np.testing.assert_allclose(curvax.trees.ravel(fixed), 9 * u, rtol=1e-9)


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
def test_a_step_that_promises_more_than_the_loss_is_shortened_until_it_promises_the_loss():
    objective, params, batch, layers = problem = setting()
    gradient, updates, state = one_step(lambda layers: curvax.ea_cg(layers, initial_alpha=ALPHA), *problem)
    _, direction, _ = one_step(lambda layers: curvax.scale_by_ea_cg(layers, alpha=ALPHA), *problem)
    del layers
    loss = jax.jit(objective)(params, batch)
    np.testing.assert_allclose(state.info.predicted_change, -loss, rtol=1e-9)
    x, u, g = (np.asarray(curvax.trees.ravel(tree)) for tree in (direction, updates, gradient))
    np.testing.assert_allclose(u, -state.info.step_size * x, rtol=1e-9)
    assert g @ u < -loss  # the shorter of the two lengths with that promise, before the least of the model


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
def test_a_loss_that_a_weight_makes_negative_is_not_climbed():
    """The whole loss is then no bound on what a step can promise."""
    objective, params, batch, _ = setting()
    negative = curvax.Objective.from_terms(dataclasses.replace(objective.terms[0], weight=-1.0))
    problem = negative, params, batch, curvax.find_layers(negative, params, batch)
    alpha = 0.999  # beyond the negative curvature
    gradient, updates, state = one_step(lambda layers: curvax.ea_cg(layers, initial_alpha=alpha), *problem)
    assert state.info.loss < 0
    assert state.info.step_size > 0
    assert curvax.trees.vdot(gradient, updates) < 0


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
def test_judged_by_the_same_batch_lambda_follows_the_ratio_there():
    objective, params, batch, layers = problem = setting()
    rule = curvax.damping.kfac_rule(period=1)
    _, updates, state = one_step(
        lambda layers: curvax.ea_cg(layers, initial_alpha=0.7, rule=rule, judged_by="same_batch"), *problem
    )
    del layers
    after = optax.apply_updates(params, updates)
    before, behind = (float(jax.jit(objective)(p, batch)) for p in (params, after))
    ratio = (behind - before) / float(state.info.predicted_change)
    np.testing.assert_allclose(state.info.step_ratio, ratio, rtol=1e-7)
    np.testing.assert_allclose(state.strength, rule.adapt(jnp.asarray(0.7 / 0.3), ratio, count=1), rtol=1e-12)


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
@pytest.mark.parametrize("solver", ["ea_cg", "kronecker_cg", "kfi"])
@pytest.mark.parametrize("loss", [curvax.losses.softmax_cross_entropy(), curvax.losses.bounded_softmax()])
def test_the_full_batch_is_fitted_with_any_loss_and_solver(loss, solver):
    objective, params, batch, layers = setting(loss)
    tx = curvax.ea_cg(layers, solver=solver)

    def step(carry, _):
        params, state = carry
        loss, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return (optax.apply_updates(params, updates), state), loss

    losses = np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 100)[1])(params))
    assert np.all(np.isfinite(losses))
    assert losses.min() < 0.3 * losses[0]
    if loss.convex:  # the other has plateaus, on which the gradient vanishes and with it all that says how far to go
        assert losses[-1] <= 1.01 * losses.min()


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
@pytest.mark.parametrize("solver", ["ea_cg", "kronecker_cg", "kfi"])
def test_much_damping_turns_any_step_to_the_gradient(solver):
    problem = setting()
    cosines = []
    for damping in (1e2, 1e5):
        alpha = damping / (1 + damping)
        gradient, updates, _ = one_step(
            lambda layers, a=alpha: curvax.ea_cg(layers, initial_alpha=a, solver=solver), *problem
        )
        g, u = (np.asarray(curvax.trees.ravel(tree)) for tree in (gradient, updates))
        cosines.append(-g @ u / np.linalg.norm(g) / np.linalg.norm(u))
    assert cosines[-1] > 0.99
    assert cosines[-1] >= cosines[0]


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
def test_a_scheduled_alpha_that_is_none_skips_the_step():
    problem = setting()
    for number, skipped in ((0.5, 0), (1.0, 1), (-0.5, 1)):
        schedule = optax.constant_schedule(number)
        for method in (curvax.scale_by_ea_cg, curvax.ea_cg):
            _, updates, state = one_step(lambda layers, m=method, s=schedule: m(layers, alpha=s), *problem)
            assert state.info.skipped_steps == skipped
            assert bool(np.any(curvax.trees.ravel(updates))) == (not skipped)


def test_what_cannot_be_is_refused_where_the_method_is_made():
    _, _, _, layers = setting()
    for alpha in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            curvax.ea_cg(layers, alpha=alpha)
        with pytest.raises(ValueError, match="between 0 and 1"):
            curvax.ea_cg(layers, initial_alpha=alpha)
        with pytest.raises(ValueError, match="between 0 and 1"):
            curvax.scale_by_ea_cg(layers, alpha=alpha)
    with pytest.raises(ValueError, match="alpha= is one that stays"):
        curvax.ea_cg(layers, alpha=0.1, initial_alpha=0.1)
    with pytest.raises(ValueError, match="curvature must be"):
        curvax.ea_cg(layers, curvature="hessian")
    with pytest.raises(ValueError, match="solver must be"):
        curvax.ea_cg(layers, solver="cg")
    with pytest.raises(TypeError, match="find_layers"):
        curvax.ea_cg(setting()[0])
