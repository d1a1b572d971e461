"""The shared walk: calls known by their shape, loops taken apart, and no more work for a layer than for another."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from curvax.programs.walk import DESCEND, called_program, is_scan, scan_parts, walk

squared_error = curvax.losses.squared_error()


def equation(function, *args):
    """The only equation of a function."""
    (eqn,) = jax.make_jaxpr(function)(*args).jaxpr.eqns
    return eqn


def with_rules(rules):
    function = rules(jnp.sin)
    if rules is jax.custom_jvp:
        function.defjvp(lambda x, t: (jnp.sin(x[0]), t[0]))
    else:
        function.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (g,))
    return function


@pytest.mark.parametrize(
    ("function", "called"),
    [
        (jax.jit(jnp.sin), True),
        (jax.checkpoint(jnp.sin), True),
        (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), x), False),
        (lambda x: jax.lax.while_loop(lambda y: y[0] < 3, lambda y: y + 1, x), False),
        (lambda x: jax.lax.cond(True, jnp.sin, jnp.cos, x), False),
        (jnp.sin, False),
    ],
    ids=["jit", "checkpoint", "fori_loop", "while_loop", "cond", "sin"],
)
def test_a_call_is_known_by_its_shape(function, called):
    eqn = equation(function, jnp.ones(2))
    assert (called_program(eqn) is not None) == called
    assert (called_program(eqn, through_custom_rules=True) is not None) == called


@pytest.mark.parametrize("rules", [jax.custom_jvp, jax.custom_vjp])
def test_functions_with_rules_of_their_own_are_calls_on_request(rules):
    eqn = equation(with_rules(rules), jnp.ones(2))
    assert called_program(eqn) is None
    assert called_program(eqn, through_custom_rules=True) is not None


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_taken_apart_and_run_again(reverse):
    scale, start, xs = jnp.arange(3.0), (jnp.ones(3), jnp.zeros(())), jnp.arange(12.0).reshape(4, 3)

    def step(carry, x):
        a, b = carry
        return (a * scale + x, b + jnp.sum(x)), (a, b, 2 * x)

    eqn = equation(lambda *args: jax.lax.scan(step, *args, reverse=reverse), start, xs)
    parts = scan_parts(eqn)
    consts, carry, scanned = parts.operands([atom.aval.shape for atom in eqn.invars])
    assert (consts, carry, scanned) == ([(3,)], [(3,), ()], [(4, 3)])
    assert [atom.aval.shape for atom in parts.results(eqn.outvars)[1]] == [(4, 3), (4,), (4, 3)]
    assert (parts.length, parts.reverse) == (4, reverse)

    def again(carry, scanned):
        return parts.results(walk(parts.body, [scale, *carry, *scanned], evaluated))

    out, ys = parts.run(again, list(start), [xs])
    for ours, theirs in zip([*out, *ys], jax.tree.leaves(jax.lax.scan(step, start, xs, reverse=reverse)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def evaluated(site, values):
    if called_program(site.eqn) is not None:
        return DESCEND
    return [site.eqn.primitive.bind(*values, **site.eqn.params)]


def test_a_walk_numbers_equations_through_calls():
    program = jax.make_jaxpr(lambda x: jax.jit(lambda y: jnp.cos(jnp.sin(y)))(x) + 1.0)(jnp.ones(()))
    seen = {}

    def handle(site, values):
        seen[site.address] = site.name
        return evaluated(site, values)

    (result,) = walk(program, [jnp.array(0.5)], handle)
    np.testing.assert_allclose(result, np.cos(np.sin(0.5)) + 1, rtol=1e-6)
    assert {address: name for address, name in seen.items() if len(address) == 2} == {(0, 0): "sin", (0, 1): "cos"}
    assert seen[(1,)] == "add"
    assert not any(is_scan(eqn) for eqn in program.jaxpr.eqns)


def calls_to_find(num_layers):
    """How many functions Python calls, of any library, to find the layers of a network with biases and scales."""
    params = [{"w": jnp.ones((3, 3)), "b": jnp.ones(3), "g": jnp.ones(3)} for _ in range(num_layers)]

    def model(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] * (1 + layer["g"]) + layer["b"])
        return x

    objective, batch = curvax.Objective(model, squared_error), (jnp.ones((4, 3)), jnp.ones((4, 3)))
    count = 0

    def called(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        layers = curvax.find_layers(objective, params, batch)
    finally:
        sys.setprofile(before)
    assert len(layers) == 3 * num_layers
    return count


def test_finding_layers_takes_work_in_proportion_to_their_number():
    calls_to_find(2)  # fills the caches of jax
    first, second, third = map(calls_to_find, (10, 40, 70))
    assert third - second <= 1.1 * (second - first)


@pytest.mark.parametrize("kind", ["shared input", "closure"])
@pytest.mark.parametrize("with_layers", [True, False])
def test_a_gain_times_a_traced_number_in_sample_space(kind, with_layers):
    """Layers that are found inside of the program as outside, and the dense solution (G + lambda I)^{-1} g."""
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 2))), "gain": jnp.asarray(generator.normal(size=2))}
    x, y, scale = jnp.asarray(generator.normal(size=(4, 3))), jnp.asarray(generator.normal(size=(4, 2))), jnp.array(2.0)
    shared = kind == "shared input"

    def step(params, scale):
        objective = curvax.Objective(
            lambda p, i: (i["x"] @ p["w"]) * p["gain"] * (i["s"] if shared else scale),
            squared_error,
            example_axes=({"x": 0, "s": None} if shared else 0, 0),
        )
        batch = ({"x": x, "s": scale} if shared else {"x": x}, y)
        layers = curvax.find_layers(objective, params, batch) if with_layers else None
        tx = curvax.scale_by_sample_space(damping=0.5, layers=layers)
        _, grads, at = objective.value_and_grad(params, batch)
        dense = curvax.ggn(at).to_dense()
        return trees.ravel(tx.update(grads, tx.init(params), params, at=at)[0]), trees.ravel(grads), dense

    update, gradient, dense = jax.jit(step)(params, scale)
    np.testing.assert_allclose(update, np.linalg.solve(dense + 0.5 * np.eye(len(dense)), gradient), rtol=1e-8)


@pytest.mark.parametrize("kind", ["shared input", "closure"])
def test_a_bias_times_a_traced_number_has_structure(kind):
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 2))), "b": jnp.asarray(generator.normal(size=2))}
    x, y, scale = jnp.asarray(generator.normal(size=(4, 3))), jnp.asarray(generator.normal(size=(4, 2))), jnp.array(2.0)

    def each(params, scale):
        shared = kind == "shared input"
        objective = curvax.Objective(
            lambda p, i: i["x"] @ p["w"] + p["b"] * (i["s"] if shared else scale),
            squared_error,
            example_axes=({"x": 0, "s": None} if shared else 0, 0),
        )
        batch = ({"x": x, "s": scale} if shared else {"x": x}, y)
        layers = curvax.find_layers(objective, params, batch)
        assert not layers["b"].only_moves
        assert layers["b"].shape == (1, 1, 2)
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return curvax.layers.per_example_gradients(tapped), jax.grad(objective)(params, batch)

    rows, gradient = jax.jit(each)(params, scale)
    residual = np.asarray(x @ params["w"] + 2 * params["b"] - y)
    np.testing.assert_allclose(rows["b"], 2 * residual, rtol=1e-12)
    for row, leaf in zip(jax.tree.leaves(rows), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(np.mean(row, axis=0), leaf, rtol=1e-10, atol=1e-12)


def test_products_of_two_parameters_that_scale_data_have_structure():
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.normal(size=3)) for name in ("a", "b")}
    batch = (jnp.asarray(generator.normal(size=(4, 3))), jnp.asarray(generator.normal(size=(4, 3))))
    objective = curvax.Objective(lambda p, x: jnp.sin((p["a"] * p["b"])[None, :] * x), squared_error)
    layers = curvax.find_layers(objective, params, batch)
    assert {layer.name: layer.kind for layer in layers} == {"a": "scale", "b": "scale"}

    @jax.jit
    def rows(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        single = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(4)]
        each = [jax.grad(objective)(params, one) for one in single]
        return curvax.layers.per_example_gradients(tapped), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    ours, theirs = rows(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), ours, theirs)
    with pytest.raises(ValueError, match="multiplied by another"):
        curvax.layer_hessian(curvax.tap(layers, objective.linearize(params, batch)))


def test_a_leaf_that_is_joined_with_one_without_structure_loses_what_it_was_used_for_before():
    params = {"a": jnp.ones((3, 2)), "b": jnp.full((3, 2), 0.5)}
    batch = (jnp.ones((4, 3)), jnp.ones((4, 2)))

    def model(params, x):
        first = x @ params["a"]
        return first + (x @ jnp.concatenate([params["a"], params["b"]], axis=1))[:, :2] + jnp.sum(jnp.sin(params["b"]))

    objective = curvax.Objective(model, squared_error)
    layers = curvax.find_layers(objective, params, batch, fallback="gradient")
    assert len(layers) == 0
    assert layers.reasons[0] == "is joined with a parameter without structure"

    @jax.jit
    def both(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return tapped.value_and_gradient()[1], jax.grad(objective)(params, batch)

    jax.tree.map(np.testing.assert_allclose, *both(params, batch))


def test_a_model_that_takes_a_multiple_of_something_is_traced_at_multiples_of_its_batch():
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 4))), "o": jnp.asarray(generator.normal(size=(4, 1)))}
    batch = (jnp.asarray(generator.normal(size=(8, 3))), jnp.ones((4, 1)))

    def better_of_pairs(params, x):  # chosen and rejected rows in turn
        scores = (jnp.tanh(x @ params["w"]) @ params["o"]).reshape(-1, 2, 1)
        return scores[:, 0] - scores[:, 1]

    objective = curvax.Objective(better_of_pairs, squared_error)
    layers = curvax.find_layers(objective, params, batch)
    assert [layer.name for layer in layers] == ["o", "w"]
    assert layers.couples_examples

    @jax.jit
    def both(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return tapped.value_and_gradient()[1], jax.grad(objective)(params, batch)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *both(params, batch))
    stuck = curvax.Objective(lambda p, x: x @ p["w"] + jnp.ones((8, 4)), squared_error)
    with pytest.raises(ValueError, match="cannot be traced with 7 examples, nor with 7 times its 8"):
        curvax.find_layers(stuck, params, batch)
