"""Structural damping: the Gauss-Newton matrix of the extended network is G + mu D_k (DM-3, T9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from benchmarks.operations import flops
from curvax import damping
from tests.oracles import dense_ggn

KEY, GGN = jax.random.key(0), curvax.GaussNewton()


def recurrent(params, inputs):
    """A tanh network over time: outputs at the last step; aux, the hidden states and their inputs."""
    start = jnp.zeros((inputs.shape[0], params["recurrent"].shape[0]), inputs.dtype)

    def step(hidden, x):
        summed = x @ params["input"] + hidden @ params["recurrent"]
        return jnp.tanh(summed), (jnp.tanh(summed), summed)

    last, (hidden, summed) = jax.lax.scan(step, start, jnp.swapaxes(inputs, 0, 1))
    aux = {"hidden": jnp.swapaxes(hidden, 0, 1), "summed": jnp.swapaxes(summed, 0, 1)}
    return last @ params["output"], aux


def setting(model=recurrent, **options):
    keys = jax.random.split(jax.random.key(3), 5)
    shapes = {"input": (2, 3), "recurrent": (3, 3), "output": (3, 2)}
    params = {name: 0.7 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=False)}
    batch = (jax.random.normal(keys[3], (5, 4, 2)), jax.random.randint(keys[4], (5,), 0, 2))
    return curvax.Objective(model, curvax.losses.softmax_cross_entropy(), has_aux=True, **options), params, batch


def penalty_matrix(name, distance, params, batch):
    """D_k by an objective of its own, whose outputs are the intermediates; its curvature ignores the targets."""
    alone = curvax.Objective(lambda p, x: recurrent(p, x)[1][name], distance)
    inputs = batch[0]
    return dense_ggn(alone, params, (inputs, 0.5 * jnp.ones((*inputs.shape[:2], 3))))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("name", "distance", "relative"),
    [
        ("hidden", curvax.losses.squared_error(), False),
        ("summed", curvax.losses.sigmoid_binary_cross_entropy(), False),
        ("hidden", curvax.losses.squared_error(), True),
    ],
)
def test_the_extended_network_has_the_sum_of_both_matrices(name, distance, relative, chunk_size):
    objective, params, batch = setting(l2=0.01)
    piece = damping.structural(lambda aux: aux[name], strength=0.3, relative=relative, loss=distance)
    make = jax.jit(lambda at, strength: piece.matrix(at, GGN, strength, KEY).to_dense())
    damped = make(objective.linearize(params, batch, chunk_size=chunk_size), 0.5)
    mu = 0.3 * (0.5 if relative else 1)
    matrix = dense_ggn(objective, params, batch)
    expected = matrix + mu * penalty_matrix(name, distance, params, batch) + 0.5 * np.eye(len(matrix))
    np.testing.assert_allclose(damped, expected, rtol=1e-10, atol=1e-12)


def test_fisher_and_another_base_damping():
    objective, params, batch = setting()
    base = damping.scale_sensitive(diagonal=jax.tree.map(jnp.ones_like, params), exponent=0.5)
    piece = damping.structural(lambda aux: aux["hidden"], strength=2.0, relative=False, base=base)
    damped = jax.jit(lambda at: piece.matrix(at, curvax.Fisher(), 0.5, KEY).to_dense())(
        objective.linearize(params, batch)
    )
    matrix = dense_ggn(objective, params, batch)  # the softmax has natural parameters
    expected = matrix + 2 * penalty_matrix("hidden", curvax.losses.squared_error(), params, batch)
    np.testing.assert_allclose(damped, expected + 0.5 * np.eye(len(matrix)), rtol=1e-10, atol=1e-12)


def test_the_diagonal_estimate_of_preconditioners_sees_the_penalty():
    objective, params, batch = setting()
    at = objective.linearize(params, batch)
    damped = damping.structural(lambda aux: aux["hidden"], strength=5.0).matrix(at, GGN, 0.1, KEY)

    @jax.jit
    @jax.vmap
    def estimate(key):
        return curvax.trees.ravel(curvax.estimators.chapelle_erhan_diagonal(damped, key))

    draws = np.asarray(estimate(jax.random.split(jax.random.key(1), 3000)))
    matrix = np.diag(dense_ggn(objective, params, batch))
    exact = matrix + 0.5 * np.diag(penalty_matrix("hidden", curvax.losses.squared_error(), params, batch)) + 0.1
    directions = np.random.default_rng(0).standard_normal((20, draws.shape[1]))
    projected = draws @ directions.T
    errors = (projected.mean(0) - directions @ exact) / (projected.std(0) / np.sqrt(len(draws)))
    assert np.abs(errors).max() < 4.5


def test_one_pass_serves_both_matrices():
    """A product costs little more than without: no second recursion over time for the penalty."""
    objective, params, batch = setting()
    params = {"input": jnp.ones((2, 40)) / 9, "recurrent": jnp.ones((40, 40)) / 90, "output": jnp.ones((40, 2)) / 9}
    piece = damping.structural(lambda aux: aux["hidden"])

    def cost(damp):
        at = objective.linearize(params, batch)
        return flops(lambda at, v: damp.matrix(at, GGN, 0.1, KEY)(v), at, params) - flops(
            lambda at: damp.matrix(at, GGN, 0.1, KEY).maps[0].point.linearizations[0].outputs, at
        )

    assert cost(piece) < 1.25 * cost(damping.tikhonov())


def test_misuse_is_an_error_that_says_what_to_do():
    objective, params, batch = setting()
    at = objective.linearize(params, batch)
    hidden = damping.structural(lambda aux: aux["hidden"])
    with pytest.raises(ValueError, match=r"extends curvax\.GaussNewton\(\) or curvax\.Fisher\(\)"):
        hidden.matrix(at, curvax.Hessian(), 0.1, KEY)
    time_first = damping.structural(lambda aux: {"states": jnp.swapaxes(aux["hidden"], 0, 1)})
    with pytest.raises(ValueError, match=r"intermediates\['states'\] of shape \(4, 5, 3\) must begin with \(5,\)"):
        time_first.matrix(at, GGN, 0.1, KEY)
    scalar = damping.structural(lambda aux: jnp.sum(aux["hidden"]))
    with pytest.raises(ValueError, match=r"of shape \(\) must begin with"):
        scalar.matrix(at, GGN, 0.1, KEY)
    whole = damping.structural(lambda aux: jnp.ones((5, 2), jnp.int32))
    with pytest.raises(TypeError, match=r"intermediates of structural damping.*int32"):
        whole.matrix(at, GGN, 0.1, KEY)
    plain = curvax.Objective(lambda p, x: recurrent(p, x)[0], curvax.losses.softmax_cross_entropy())
    with pytest.raises(ValueError, match="has_aux=True"):
        hidden.matrix(plain.linearize(params, batch), GGN, 0.1, KEY)
    with pytest.raises(ValueError, match="extends the model, not a matrix"):
        hidden.added(GGN.at(at), 0.1, KEY)


def test_a_mask_over_steps_needs_intermediates_with_steps():
    def model(params, x):
        hidden = jnp.tanh(x @ params)
        return hidden, (hidden, jnp.sum(hidden, axis=1))

    objective = curvax.Objective(
        model, curvax.losses.squared_error(), has_aux=True, mask=lambda batch: batch[1][..., 0] > 0
    )
    inputs = np.random.default_rng(0).normal(size=(3, 4, 2))
    batch = (inputs, np.sign(inputs))
    at = objective.linearize(jnp.eye(2), batch)
    steps = damping.structural(lambda aux: aux[0], strength=1.0, relative=False)
    damped = jax.jit(lambda at: steps.matrix(at, GGN, 0.0, KEY).to_dense())(at)
    np.testing.assert_allclose(damped, 2 * dense_ggn(objective, jnp.eye(2), batch), rtol=1e-10)
    with pytest.raises(ValueError, match=r"must begin with \(3, 4\)"):
        damping.structural(lambda aux: aux[1]).matrix(at, GGN, 0.1, KEY)


def test_outputs_of_layers_serve_as_intermediates():
    """The sum that a bias completes is the hidden units' input: the same damping as when the model returns it."""

    def cell(params, x, h):
        return x @ params["in"] + h @ params["across"] + params["bias"]

    def model(params, x):
        def step(h, x):
            s = cell(params, x, h)
            return jnp.tanh(s), s

        last, inputs = jax.lax.scan(step, jnp.zeros((x.shape[0], 3)), x.swapaxes(0, 1))
        return last @ params["out"], inputs.swapaxes(0, 1)

    generator = np.random.default_rng(0)
    shapes = {"in": (2, 3), "across": (3, 3), "bias": (3,), "out": (3, 1)}
    params = {name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()}
    batch = (jnp.asarray(generator.normal(size=(4, 5, 2))), jnp.ones((4, 1)))
    with_aux = curvax.Objective(model, curvax.losses.squared_error(), has_aux=True)
    plain = curvax.Objective(lambda params, x: model(params, x)[0], curvax.losses.squared_error())
    layers = curvax.find_layers(plain, params, batch)
    by_layer = curvax.damping.structural(curvax.damping.LayerOutputs(layers, ("bias",)), strength=0.7)
    by_aux = curvax.damping.structural(lambda inputs: inputs, strength=0.7)
    ours, theirs = (
        jax.jit(lambda p, b, o=o, piece=piece: piece.matrix(o.linearize(p, b), GGN, 0.3, KEY).to_dense())(params, batch)
        for o, piece in ((plain, by_layer), (with_aux, by_aux))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_unknown_layers_are_refused():
    objective = curvax.Objective(lambda w, x: x @ w["w"], curvax.losses.squared_error())
    params, batch = {"w": jnp.ones((2, 1))}, (jnp.ones((3, 2)), jnp.ones((3, 1)))
    layers = curvax.find_layers(objective, params, batch)
    damping = curvax.damping.structural(curvax.damping.LayerOutputs(layers, ("v",)))
    with pytest.raises(KeyError, match="there is no layer 'v'"):
        damping.matrix(objective.linearize(params, batch), GGN, 1.0, KEY)
