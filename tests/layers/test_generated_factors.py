"""Random networks: Kronecker factors against second moments of what enters and leaves each matrix, written out densely.

A network hands the inputs and the outputs of every matrix to a ``probe``. To curvax that is the identity; the oracle
takes the inputs down there, and differentiates by what it adds to the outputs, so that it knows no rule of any layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import curvax

N, STEPS, WIDTH = 3, 4, 4


def dense(p, x, probe):
    return jnp.tanh(probe(with_one(x), x @ p["w"] + p["b"]))


def transposed(p, x, probe):
    return jnp.sin(probe(with_one(x), jnp.einsum("oi,nti->nto", p["w"], x) + p["b"]))


def alone(p, x, probe):
    return jnp.tanh(probe(x, jax.jit(jnp.matmul)(x, p["w"]))) * p["b"]


def convolution(p, x, probe):
    """Of two channels, dilated, so that a kernel (2, 2, WIDTH) is as large as the other matrices."""
    x = x[..., :2]
    kernel = jnp.reshape(p["w"], (2, 2, WIDTH))
    outputs = jax.lax.conv_general_dilated(
        x, kernel, (1,), [(1, 1)], rhs_dilation=(2,), dimension_numbers=("NHC", "HIO", "NHC")
    )
    around = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    patches = jnp.concatenate([around[:, :STEPS], around[:, 2 : STEPS + 2]], axis=-1)
    return jnp.tanh(probe(with_one(patches), outputs + p["b"]))


def recurrent(p, x, probe):
    """A scan over time to curvax, a loop to the oracle."""
    h = jnp.zeros_like(x[:, 0])
    if probe is identity:
        step = lambda h, x: (jnp.tanh(h @ p["w"] + p["b"] + x),) * 2  # noqa: E731
        return jnp.swapaxes(jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))[1], 0, 1)
    steps = []
    for t in range(STEPS):
        h = jnp.tanh(probe(with_one(h)[:, None], (h @ p["w"] + p["b"])[:, None])[:, 0] + x[:, t])
        steps.append(h)
    return jnp.stack(steps, axis=1)


def attention(p, x, probe):
    queries = probe(x, x @ p["w"])
    return jax.nn.softmax(jnp.einsum("ntd,nsd->nts", queries, x)) @ x * p["b"]


def weight_norm(p, x, probe):
    """A direction without structure, and a gain: neither has a matrix."""
    del probe
    return jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["b"]))


def embedding(p, x, probe):
    """Of the places of the largest entries."""
    words = jnp.argmax(x, axis=-1)
    return probe(jax.nn.one_hot(words, WIDTH, dtype=x.dtype), p["w"][words]) * p["b"]


def with_one(x):
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def identity(inputs, outputs):
    del inputs
    return outputs


MATRICES = [dense, transposed, alone, convolution, recurrent, attention]
WITH_BIAS = [dense, transposed, convolution, recurrent]


def network(chain, tied, params, x, probe_of=lambda _: identity):
    for index, layer in enumerate(chain):
        own = 0 if tied else index
        x = layer(params[own], x, probe_of(own))
    return x


def moments(chain, tied, params, x, sharing):
    """(A, G) for each set of parameters that has a matrix, by its number."""
    owners, shapes = [], []

    def run(params, x, added=None):
        inputs = []

        def probe_of(own):
            def probe(entering, leaving):
                if len(inputs) == len(shapes):
                    owners.append(own)
                    shapes.append(leaving.shape)
                inputs.append(entering)
                return leaving if added is None else leaving + added[len(inputs) - 1]

            return probe

        return network(chain, tied, params, x, probe_of), inputs

    jax.eval_shape(run, params, x)
    if not shapes:
        return {}
    zeros = [jnp.zeros(shape) for shape in shapes]

    @jax.jit
    def differentiated(params, x):
        return run(params, x)[1], jax.jacrev(lambda added: run(params, x, added)[0])(zeros)

    inputs, jacobians = differentiated(params, x)
    # By outputs of an example, its positions and features; examples do not meet.
    own = [np.einsum("nscnro->nscro", jac).reshape(N, -1, *jac.shape[-2:]) for jac in map(np.asarray, jacobians)]
    found = {}
    for place in sorted(set(owners)):
        uses = [k for k, owner in enumerate(owners) if owner == place]
        a = np.concatenate([np.asarray(inputs[k]) for k in uses], axis=1)
        g = np.concatenate([own[k] for k in uses], axis=2)
        if sharing == "reduce":
            a, g = a.mean(axis=1, keepdims=True), g.sum(axis=2, keepdims=True)
        A = np.einsum("nri,nrj->ij", a, a) / (N * a.shape[1])
        found[place] = A, np.einsum("nkri,nkrj->ij", g, g) / N
    return found


@pytest.mark.many_compilations("elementwise uses are looked at while tracing, one equation at a time")
@settings(max_examples=8, deadline=None)
@example(chain=[embedding, attention, weight_norm], sharing="expand", seed=1)
@example(chain=[convolution, transposed, dense], sharing="reduce", seed=2)
@example(chain=[alone, recurrent], sharing="expand", seed=3)
@example(chain=(recurrent, recurrent), sharing="expand", seed=4)
@given(
    chain=st.one_of(
        st.builds(
            lambda first, rest: first + rest,
            st.sampled_from([[], [embedding]]),
            st.lists(st.sampled_from([*MATRICES, weight_norm]), min_size=1, max_size=3),
        ),
        st.builds(lambda layer, count: (layer,) * count, st.sampled_from(MATRICES), st.integers(2, 3)),
    ),
    sharing=st.sampled_from(["expand", "reduce"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_factors_are_the_second_moments(chain, sharing, seed):
    tied = isinstance(chain, tuple)
    sharing = "expand" if tied or chain[0] in (embedding, recurrent) or recurrent in chain else sharing
    draw = np.random.default_rng(seed)
    params = [
        {"w": jnp.asarray(draw.normal(size=(WIDTH, WIDTH)) / 2), "b": jnp.asarray(draw.normal(size=WIDTH))}
        for _ in range(1 if tied else len(chain))
    ]
    batch = tuple(jnp.asarray(draw.normal(size=(N, STEPS, WIDTH))) for _ in range(2))
    objective = curvax.Objective(functools.partial(network, chain, tied), curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, batch, fallback="gradient")

    @jax.jit
    def product(params, batch, vector):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        factors = curvax.layers.kronecker_factors(tapped, curvature=curvax.GaussNewton(), sharing=sharing)
        return curvax.kronecker_map(layers, factors, params)(vector)

    vector = [{name: draw.normal(size=leaf.shape) for name, leaf in own.items()} for own in params]
    result = product(params, batch, jax.tree.map(jnp.asarray, vector))
    expected = moments(chain, tied, params, batch[0], sharing)
    assert sorted(expected) == [k for k, layer in enumerate(chain[: len(params)]) if layer is not weight_norm]
    for place, (a, g) in expected.items():
        layer, own = chain[place], vector[place]
        rows = own["w"].T if layer is transposed else own["w"]
        rows = np.concatenate([rows, own["b"][None]]) if layer in WITH_BIAS else rows
        moved = a @ rows @ g
        weights = moved[:WIDTH].T if layer is transposed else moved[:WIDTH]
        tolerance = 1e-10 * np.abs(moved).max()
        np.testing.assert_allclose(result[place]["w"], weights, atol=tolerance, err_msg=f"{chain} {place}")
        if layer in WITH_BIAS:
            np.testing.assert_allclose(result[place]["b"], moved[WIDTH], atol=tolerance, err_msg=f"{chain} {place}")
