"""Models with reverse-mode rules alone: curvature of each equals that of the same function with all rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.ode import odeint

import curvax
from curvax import trees
from curvax.programs.linearize import linearize
from tests import oracles


@jax.custom_vjp
def activation(x):
    return jnp.tanh(x)


activation.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


@jax.custom_vjp
def by_itself(x):
    return jnp.tanh(x)


# The backward rule has a function without a forward rule in it, so the gradient has none either.
by_itself.defvjp(lambda x: (by_itself(x), x), lambda x, g: (g * (1 - by_itself(x) ** 2),))


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


def fixed_point_iteration(w, x):
    return jax.lax.fori_loop(0, 80, lambda _, z: jnp.tanh(w @ z + x), jnp.zeros_like(x))


@jax.custom_vjp
def fixed_point(w, x):
    """The solution of z = tanh(w z + x)."""
    return jax.lax.while_loop(
        lambda z: jnp.max(jnp.abs(jnp.tanh(w @ z + x) - z)) > 1e-15, lambda z: jnp.tanh(w @ z + x), jnp.zeros_like(x)
    )


def _fixed_point_backwards(residuals, g):
    w, x, z = residuals
    _, pull_back = jax.vjp(lambda w, x, z: jnp.tanh(w @ z + x), w, x, z)
    jacobian = jax.jacrev(lambda z: jnp.tanh(w @ z + x))(z)
    return pull_back(jnp.linalg.solve((jnp.eye(z.size) - jacobian).T, g))[:2]


fixed_point.defvjp(lambda w, x: ((z := fixed_point(w, x)), (w, x, z)), _fixed_point_backwards)


def network(function):
    return lambda p, x: function(x @ p["w"]) @ p["w"]


def layers_under_scan(function):
    def model(p, x):
        step = jax.checkpoint(lambda h: function(h @ p["w"]))
        return jax.lax.scan(lambda h, _: (jnp.where(h > 9, h, step(h)), None), x, length=2)[0]

    return model


def solver(function):
    return lambda p, x: jax.vmap(functools.partial(function, 0.3 * p["w"]))(x)


def straight_through(x):
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


MODELS = {
    "activation": (network(activation), network(jnp.tanh)),
    "its own derivative": (network(by_itself), network(jnp.tanh)),
    "scan and remat": (layers_under_scan(activation), layers_under_scan(jnp.tanh)),
    "straight through": (network(rounded), network(straight_through)),
    "fixed point": (solver(fixed_point), solver(fixed_point_iteration)),
}
PARAMS = {"w": jax.random.normal(jax.random.key(0), (3, 3))}
BATCH = jax.random.normal(jax.random.key(1), (5, 3)), jax.random.normal(jax.random.key(2), (5, 3))
LEFT, RIGHT = ({"w": jax.random.normal(jax.random.key(i), (3, 3))} for i in (3, 4))


def objectives(name):
    return [curvax.Objective(model, curvax.losses.squared_error()) for model in MODELS[name]]


def close(actual, expected, rtol=1e-10):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", MODELS)
def test_products_and_forms_equal_those_of_the_function_with_all_rules(name, chunk_size):
    reverse, both = objectives(name)

    @jax.jit
    def answers(params, batch):
        at = reverse.linearize(params, batch, chunk_size=chunk_size)
        maps = curvax.ggn(at), curvax.hessian(at), curvax.fisher(at, key=jax.random.key(0), num_samples=1)
        return [(m.to_dense(), m.bilinear(LEFT, RIGHT), m.quadratic(RIGHT)) for m in maps]

    ggn, hessian, sampled = answers(PARAMS, BATCH)
    u, v = trees.ravel(LEFT), trees.ravel(RIGHT)
    wanted = oracles.dense_ggn(both, PARAMS, BATCH), oracles.dense_hessian(both, PARAMS, BATCH)
    for (dense, bilinear, quadratic), matrix in zip((ggn, hessian), wanted, strict=True):
        close(dense, matrix)
        close(bilinear, u @ matrix @ v)
        close(quadratic, v @ matrix @ v)
    close(sampled[2], v @ sampled[0] @ v)


METHODS = {
    "hessian_free": curvax.hessian_free(max_iterations=6),
    "newton_cg": curvax.newton_cg(max_iterations=6),
    "natural_gradient": curvax.natural_gradient(max_iterations=6),
    "curveball": curvax.curveball(),
    "krylov_subspace_descent": curvax.krylov_subspace_descent(num_vectors=3),
    "levenberg_marquardt": curvax.levenberg_marquardt(),
    "lsr1": curvax.lsr1(),
    "scale_by_cubic_step": curvax.scale_by_cubic_step(optax.sgd(1.0)),
    "scale_by_sample_space": curvax.scale_by_sample_space(damping=0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_as_with_all_rules(method):
    tx = METHODS[method]

    @functools.partial(jax.jit, static_argnums=0)
    def step(which):
        _, grads, at = objectives("its own derivative")[which].value_and_grad(PARAMS, BATCH)
        return tx.update(grads, tx.init(PARAMS), PARAMS, at=at)[0]["w"]

    close(step(0), step(1), 1e-8)


def test_layers_of_a_network_whose_activation_has_a_reverse_rule_alone():
    @functools.partial(jax.jit, static_argnums=0)
    def answers(which):
        objective = curvax.Objective(MODELS["activation"][which], curvax.losses.squared_error())
        at = objective.linearize(PARAMS, BATCH)
        tapped = curvax.tap(curvax.find_layers(objective, PARAMS, BATCH), at)
        return (
            curvax.ggn(tapped.point)(RIGHT)["w"],
            curvax.hessian(tapped.point).quadratic(RIGHT),
            curvax.gram(tapped),
            curvax.layers.exact_ggn_diagonal(tapped)["w"],
            curvax.layer_hessian(tapped).quadratic(RIGHT),
            curvax.estimators.becker_lecun_diagonal(at)["w"],
            curvax.estimators.sampled_hessian_diagonal(tapped, jax.random.key(0))["w"],
        )

    for reverse, both in zip(answers(0), answers(1), strict=True):
        close(reverse, both)


def test_models_with_forward_rules_pay_nothing():
    model = functools.partial(MODELS["activation"][1], x=BATCH[0])
    linear, plain = linearize(model, PARAMS), jax.linearize(model, PARAMS)[1]
    assert linear.forward
    assert str(jax.make_jaxpr(linear.jvp)(RIGHT)) == str(jax.make_jaxpr(plain)(RIGHT))
    assert not linearize(functools.partial(MODELS["activation"][0], x=BATCH[0]), PARAMS).forward


def test_a_point_made_outside_of_jit_crosses_its_border_once():
    objective, traces = objectives("activation")[0], []

    @jax.jit
    def product(at, v):
        traces.append(1)
        return curvax.ggn(at)(v)["w"]

    expected = oracles.dense_ggn(objectives("activation")[1], PARAMS, BATCH) @ trees.ravel(RIGHT)
    for _ in range(2):
        close(product(objective.linearize(PARAMS, BATCH), RIGHT).ravel(), expected)
    assert len(traces) == 1


def test_a_backward_rule_without_a_transpose_leaves_the_gradient_and_is_refused_where_j_v_is_needed():
    @jax.custom_vjp
    def halved(x):
        return x / 2

    def backwards(_, g):  # the solution of h = g - h by iteration
        halve = lambda h: 0.75 * h + (g - h) / 4  # noqa: E731
        return (jax.lax.while_loop(lambda h: jnp.max(jnp.abs(g - 2 * h)) > 1e-15, halve, g),)

    halved.defvjp(lambda x: (x / 2, None), backwards)
    objective = curvax.Objective(lambda p, x: halved(x @ p["w"]), curvax.losses.squared_error())
    _, grads, at = jax.jit(objective.value_and_grad)(PARAMS, BATCH)
    close(grads["w"], BATCH[0].T @ (BATCH[0] @ PARAMS["w"] / 2 - BATCH[1]) / 2 / len(BATCH[0]))
    with pytest.raises(TypeError, match=r"cannot be differentiated in reverse either .*while_loop.* custom_jvp"):
        curvax.ggn(at)(RIGHT)


@pytest.mark.slow
def test_a_neural_ode_by_odeint_equals_the_same_equation_by_fixed_steps():
    def slope(h, _, w):
        return jnp.tanh(w @ h)

    def adaptive(p, x):
        return jax.vmap(lambda h: odeint(slope, h, jnp.array([0.0, 1.0]), p["w"])[-1])(x)

    def runge_kutta(p, x):
        def step(h, _):
            first = slope(h, 0.0, p["w"])
            second = slope(h + first / 100, 0.0, p["w"])
            third = slope(h + second / 100, 0.0, p["w"])
            return h + (first + 2 * second + 2 * third + slope(h + third / 50, 0.0, p["w"])) / 300, None

        return jax.vmap(lambda h: jax.lax.scan(step, h, length=50)[0])(x)

    @functools.partial(jax.jit, static_argnums=0)
    def products(model):
        at = curvax.Objective(model, curvax.losses.squared_error()).linearize(PARAMS, BATCH)
        return curvax.ggn(at)(RIGHT)["w"], curvax.hessian(at)(RIGHT)["w"]

    for reverse, both in zip(products(adaptive), products(runge_kutta), strict=True):
        close(reverse, both, 1e-6)  # the tolerances of odeint are 1.4e-8
