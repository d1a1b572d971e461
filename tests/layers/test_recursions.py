"""Layer-wise recursions against ``jax.hessian`` and against the paper's formulas written out, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.layers.recursions import positive_part, propagate
from tests.tolerances import rounding

L = curvax.losses
N = 6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def plain(params, x):
    x = jax.nn.sigmoid(x @ params["w1"] + params["b1"])
    x = jnp.tanh(x @ params["w2"] + params["b2"])
    return x @ params["w3"] + params["b3"]


def spelled(params, x):
    """Transposed weights, columns for examples, features turned round, a call inside, an output that is not affine."""
    x = jax.nn.gelu(x @ params["w1"] + params["b1"])
    columns = jax.jit(jax.nn.silu)(jnp.dot(params["w2"].T, x.T) + params["b2"][:, None])
    x = columns.T[:, ::-1]
    x = jnp.where(x > 0.1, x * jnp.exp(-x), 0.5 * x**3)
    return jax.nn.softmax(x @ params["w3"] + params["b3"])


def without_bias(params, x):
    x = jax.nn.softplus(x @ params["w1"])
    return jax.nn.softplus(x @ params["w2"]) @ params["w3"]


def scaled(params, x):
    """As neural tangent kernels have it: weights times a constant before their use."""
    x = jnp.tanh(x @ (0.5 * params["w1"]) + 0.1 * params["b1"])
    return jnp.tanh(x @ params["w2"] + params["b2"]) @ (2.0 * params["w3"]) + params["b3"]


def weights(seed=0, sizes=(4, 5, 3, 3), scale=1.0):
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes), 1):
        params |= {f"w{i}": scale * normal(seed + i, n, m), f"b{i}": normal(seed + 10 + i, m)}
    return params


MODELS = {f.__name__: f for f in (plain, spelled, without_bias, scaled)}
LOSSES = {
    "softmax": (L.softmax_cross_entropy(), jnp.asarray([0, 1, 2, 2, 1, 0])),
    "squared": (L.squared_error(), normal(7, N, 3)),
    "bounded": (L.bounded_softmax(), jnp.asarray([0, 1, 2, 2, 1, 0])),
    "welsch": (L.welsch(0.7), normal(7, N, 3)),
}

PROBLEMS = [
    *(("plain", loss) for loss in LOSSES),
    *((model, "softmax") for model in MODELS if model != "plain"),
    ("spelled", "welsch"),
]


def setting(model="plain", loss="softmax", count=N, params=None, **options):
    criterion, targets = LOSSES[loss]
    model = MODELS[model] if isinstance(model, str) else model
    params = weights() if params is None else params
    if model is without_bias:
        params = {k: v for k, v in params.items() if k[0] == "w"}
    objective = curvax.Objective(model, criterion, **options)
    batch = (normal(5, N, 4)[:count], targets[:count])
    return objective, params, batch, curvax.find_layers(objective, params, batch)


def run(function, objective, params, batch, layers):
    return jax.jit(lambda p, b: function(curvax.tap(layers, objective.linearize(p, b))))(params, batch)


def diagonal_blocks(matrix, params):
    edges = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(params))])
    return [np.asarray(matrix)[a:b, a:b] for a, b in itertools.pairwise(edges)]


def oracle(objective, params, batch):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return diagonal_blocks(jax.jit(jax.hessian(lambda v: objective(unravel(v), batch)))(flat), params)


def close(found, expected, operations=200):
    # The sums are of products of weights with Hessians of losses, of some tenths, which may cancel.
    scale = max(np.abs(expected).max(), 0.1)
    np.testing.assert_allclose(found, expected, atol=rounding(np.float64, operations, scale), rtol=0)


@pytest.mark.many_compilations("the oracle is a Hessian; arrays of the setting are made eagerly")
@pytest.mark.parametrize(("model", "loss"), PROBLEMS)
def test_exact_blocks_are_those_of_the_hessian(model, loss):
    problem = setting(model, loss)
    found = diagonal_blocks(run(lambda t: curvax.layers.block_hessian(t).to_dense(), *problem), problem[1])
    for own, expected in zip(found, oracle(*problem[:3]), strict=True):
        close(own, expected)


@pytest.mark.many_compilations("the oracle is a Hessian; arrays of the setting are made eagerly")
@pytest.mark.parametrize(("model", "loss"), PROBLEMS)
def test_the_expectation_is_exact_for_one_example_and_for_the_last_layer(model, loss):
    one = setting(model, loss, count=1)
    dense = run(lambda t: curvax.layers.layerwise_curvature(t, "hessian").to_dense(), *one)
    for own, expected in zip(diagonal_blocks(dense, one[1]), oracle(*one[:3]), strict=True):
        close(own, expected)
    many = setting(model, loss)
    dense = run(lambda t: curvax.layers.layerwise_curvature(t, "hessian").to_dense(), *many)
    names = sorted(many[1])
    if "b3" in names:  # h does not enter the block of the last bias, so no mean of products is split
        place = names.index("b3")
        close(diagonal_blocks(dense, many[1])[place], oracle(*many[:3])[place])


def pch(params, x, targets, loss, kind):
    """Chen et al. 2018, eqs. 4 to 8, for ``plain`` in numpy: (H_t, E[h h^T]) from first to last."""
    sigmoid = lambda s: 1 / (1 + np.exp(-s))  # noqa: E731
    p = {name: np.asarray(value) for name, value in params.items()}
    x = np.asarray(x)
    s1 = x @ p["w1"] + p["b1"]
    h1 = sigmoid(s1)
    s2 = h1 @ p["w2"] + p["b2"]
    h2 = np.tanh(s2)
    first = {2: h1 * (1 - h1), 3: 1 - h2**2}
    second = {2: h1 * (1 - h1) * (1 - 2 * h1), 3: -2 * h2 * (1 - h2**2)}
    z = jnp.asarray(h2 @ p["w3"] + p["b3"])

    def of_one(z, y):
        return jnp.sum(loss.value(z[None], y[None]))

    grads = np.asarray(jax.jit(jax.vmap(jax.grad(of_one)))(z, targets))
    own = np.asarray(jax.jit(jax.vmap(jax.hessian(of_one)))(z, targets)).mean(0)
    replace = {"pch1": np.abs, "pch2": lambda v: np.maximum(v, 0), "hessian": lambda v: v, "gauss_newton": None}[kind]
    if kind in ("pch1", "pch2"):
        values, vectors = np.linalg.eigh(own)
        own = (vectors * np.abs(values)) @ vectors.T
    found = [own]
    for t in (3, 2):
        weights, count = p[f"w{t}"], len(x)
        curved = (weights @ found[0] @ weights.T) * (first[t].T @ first[t] / count)
        if replace is not None:
            curved = curved + np.diag(replace((second[t] * (grads @ weights.T)).mean(0)))
        grads = (grads @ weights.T) * first[t]
        found.insert(0, curved)
    return found, [h.T @ h / len(x) for h in (x, h1, h2)]


@pytest.mark.many_compilations("arrays of the setting and the oracle's derivatives are made eagerly")
@pytest.mark.parametrize(
    ("kind", "loss"),
    # The Gauss-Newton matrix of losses that are not convex begins with what they put in the place of their Hessian.
    [*itertools.product(("pch1", "pch2", "hessian"), LOSSES), ("gauss_newton", "softmax"), ("gauss_newton", "squared")],
)
def test_recursions_are_the_formulas_of_the_paper(kind, loss):
    problem = setting("plain", loss)
    found = run(lambda t: propagate(t, kind), *problem)
    curvatures, moments = pch(problem[1], *problem[2], problem[0].terms[0].loss, kind)
    for own, expected in zip(found.outputs, curvatures, strict=True):
        close(own, expected)
    for rows, expected in zip(found.rows, moments, strict=True):
        close(rows.T @ rows, expected)


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
def test_the_three_treatments_of_second_derivatives_differ():
    problem = setting()
    kinds = ("pch1", "pch2", "hessian", "gauss_newton")
    first = {k: np.asarray(run(lambda t, k=k: propagate(t, k).outputs[0], *problem)) for k in kinds}
    for a, b in itertools.combinations(kinds, 2):
        assert np.abs(first[a] - first[b]).max() > 1e-3, (a, b)


@pytest.mark.many_compilations("arrays of the settings are made eagerly")
@pytest.mark.parametrize("loss", LOSSES)
def test_positive_curvature_is_positive_whatever_the_weights(loss):
    problem = setting("spelled", loss)

    def least(params, batch):
        objective, layers = problem[0], problem[3]
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        kinds = ("pch1", "pch2", "gauss_newton")
        found = [propagate(tapped, k).outputs for k in kinds]
        return [[(jnp.linalg.eigvalsh(h)[0], jnp.trace(h)) for h in kind] for kind in found]

    compiled = jax.jit(least)
    for seed in range(20):
        params = weights(100 * seed, scale=3.0)
        for value, trace in itertools.chain(*compiled(params, problem[2])):
            assert value >= -rounding(np.float64, 200, float(trace) + 1e-12)


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
def test_fisher_recursions_are_second_moments_of_gradients():
    objective, params, batch, layers = setting()

    def of_biases(params, x, y):
        grads = jax.grad(lambda p: objective(p, (x[None], y[None])))(params)
        return [grads[f"b{t}"] for t in (1, 2, 3)]

    grads = jax.jit(jax.vmap(of_biases, (None, 0, 0)))(params, *batch)
    found = run(lambda t: propagate(t, "empirical_fisher").outputs, objective, params, batch, layers)
    for own, g in zip(found, grads, strict=True):
        close(own, np.asarray(g.T @ g) / N)

    def sampled(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        keys = jax.random.split(jax.random.key(0), 4000)
        return jax.lax.map(lambda key: propagate(tapped, "fisher", key).outputs[2], keys)

    draws = np.asarray(jax.jit(sampled)(params, batch))
    p = np.asarray(jax.nn.softmax(plain(params, batch[0])))
    expected = np.mean([np.diag(row) - np.outer(row, row) for row in p], axis=0)
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - expected) <= 5 * error + 1e-12)


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
@pytest.mark.parametrize("activation", [jax.nn.sigmoid, jnp.tanh, jax.nn.relu])
def test_what_splitting_the_mean_costs_is_bounded_by_the_variance_of_the_curvature(activation):
    """Chen et al. 2018, eq. 7, with the fourth power of the Lipschitz constant, eq. 17 (PC-11)."""
    lipschitz = {jax.nn.sigmoid: 0.25, jnp.tanh: 1.0, jax.nn.relu: 1.0}[activation]

    def model(params, x):
        return activation(x @ params["w1"]) @ params["w2"]

    objective = curvax.Objective(model, L.softmax_cross_entropy())
    batch = (normal(5, 20, 4), jnp.asarray(np.arange(20) % 3))
    layers = curvax.find_layers(objective, {"w1": normal(0, 4, 6), "w2": normal(1, 6, 3)}, batch)

    def sides(w1, w2):
        tapped = curvax.tap(layers, objective.linearize({"w1": w1, "w2": w2}, batch))
        first, last = curvax.layers.block_hessian(tapped).curvatures
        # The diagonal with second derivatives is a mean in both.
        covariance = jnp.mean(first, axis=0) - propagate(tapped, "hessian").outputs[0]
        inner = jnp.einsum("io,nop,jp->nij", w2, last, w2)
        return jnp.sum(covariance**2), lipschitz**4 * jnp.sum(jnp.var(inner, axis=0))

    rng = np.random.default_rng(0)
    draws = (rng.normal(size=(200, 4, 6)), rng.normal(size=(200, 6, 3)))
    left, right = (np.asarray(side) for side in jax.jit(jax.vmap(sides))(*draws))
    assert np.all(left <= right)
    assert np.max(left / right) > 1e-3  # the two are of one kind


def test_along_negative_curvature_newton_goes_up_and_positive_curvature_down():
    """Property 1 of Chen et al. 2018: there the model is concave, and its stationary point a maximum (PC-12)."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    hessian, gradient = root + root.T, rng.normal(size=8)
    values, vectors = np.linalg.eigh(hessian)
    down = vectors[:, values < 0]
    assert down.shape[1]

    def change(step):
        return gradient @ step + step @ hessian @ step / 2

    newton = -down @ np.linalg.solve(down.T @ hessian @ down, down.T @ gradient)
    others = newton + rng.normal(size=(100, down.shape[1])) @ down.T
    assert change(newton) > 0
    assert all(change(other) < change(newton) for other in others)
    for replace in (jnp.abs, lambda values: jnp.maximum(values, 0) + 1e-3):
        step = -np.linalg.solve(np.asarray(jax.jit(positive_part, static_argnums=1)(hessian, replace)), gradient)
        assert gradient @ step < 0
    step = down @ (down.T @ -np.linalg.solve(np.asarray(positive_part(hessian, jnp.abs)), gradient))
    assert change(step) < 0


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
@pytest.mark.parametrize("model", ["plain", "scaled"])
@pytest.mark.parametrize("inputs", ["second", "rank_one"])
def test_the_map_answers_the_protocol(inputs, model):
    problem = setting(model)
    vector = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), problem[1])
    keys = jax.random.split(jax.random.key(1), 3000)

    def answers(tapped):
        H = curvax.layers.layerwise_curvature(tapped, inputs=inputs)
        draws = jax.vmap(lambda key: curvax.trees.vdot(H.sample(key), vector))(keys)
        return H.to_dense(), H(vector), H.solve(vector, damping=0.3), H.logdet(damping=0.3), draws

    dense, product, solved, logdet, draws = run(answers, *problem)
    dense, flat = np.asarray(dense), np.asarray(curvax.trees.ravel(vector))
    damped = dense + 0.3 * np.eye(len(dense))
    size = np.abs(dense).max() * np.abs(flat).max()
    close(curvax.trees.ravel(product), dense @ flat)
    np.testing.assert_allclose(damped @ np.asarray(curvax.trees.ravel(solved)), flat, atol=1e-11 * max(1, size))
    np.testing.assert_allclose(logdet, np.linalg.slogdet(damped)[1], rtol=1e-11)
    variance = flat @ dense @ flat
    assert abs(np.mean(np.square(draws)) - variance) < 5 * variance * np.sqrt(2 / len(draws))


@pytest.mark.many_compilations("arrays of the settings are made eagerly")
def test_weights_masks_and_the_penalty_count():
    objective, params, (x, y), _ = setting()
    select, mask = lambda b: b[:2], lambda b: b[2]
    weighted = curvax.Objective(plain, objective.terms[0].loss, select=select, mask=mask, l2=0.1)
    batch = (x, y, jnp.asarray([True, True, False, True, False, True]))
    kept = np.flatnonzero(np.asarray(batch[2]))
    small = curvax.Objective(plain, objective.terms[0].loss, l2=0.1)

    def dense(goal, batch, function):
        found = curvax.find_layers(goal, params, batch)
        return np.asarray(run(lambda t: function(t).to_dense(), goal, params, batch, found))

    for function in (curvax.layers.layerwise_curvature, curvax.layers.block_hessian):
        close(dense(weighted, batch, function), dense(small, (x[kept], y[kept]), function))


@pytest.mark.many_compilations("arrays of the settings are made eagerly")
def test_negative_weights_turn_the_hessian_round():
    objective, params, (x, y), _ = setting(count=1)
    weighted = curvax.Objective(plain, objective.terms[0].loss, select=lambda b: b[:2], example_weights=lambda b: b[2])
    batch = (x, y, jnp.asarray([-2.0]))
    layers = curvax.find_layers(weighted, params, batch)
    for function in (lambda t: curvax.layers.layerwise_curvature(t, "hessian"), curvax.layers.block_hessian):
        dense = run(lambda t, f=function: f(t).to_dense(), weighted, params, batch, layers)
        for own, expected in zip(diagonal_blocks(dense, params), oracle(weighted, params, batch), strict=True):
            close(own, expected)


@pytest.mark.many_compilations("arrays of the settings are made eagerly")
def test_weights_of_both_signs_leave_the_hessian_finite_and_its_last_block_exact():
    objective, params, (x, y), _ = setting()
    weighted = curvax.Objective(plain, objective.terms[0].loss, select=lambda b: b[:2], example_weights=lambda b: b[2])
    batch = (x, y, jnp.asarray([2.0, -0.5, 1.0, 0.0, -1.0, 3.0]))
    layers = curvax.find_layers(weighted, params, batch)

    def dense(tapped):
        return curvax.layers.layerwise_curvature(tapped, "hessian").to_dense()

    found = np.asarray(run(dense, weighted, params, batch, layers))
    assert np.all(np.isfinite(found))
    place = sorted(params).index("b3")
    close(diagonal_blocks(found, params)[place], oracle(weighted, params, batch)[place])


REFUSED = {
    "softmax between": (lambda p, x: jax.nn.softmax(x @ p["w1"]) @ p["w2"] @ p["w3"], "reduce_max"),
    "a sum along the features": (lambda p, x: jnp.cumsum(x @ p["w1"], 1) @ p["w2"] @ p["w3"], "cumsum"),
    "a connection that skips": (lambda p, x: _skip(p, x), "dot_general"),
    "a residual connection": (lambda p, x: _residual(p, x), "add"),
    "gates": (lambda p, x: ((x @ p["w1"]) @ p["w2"] * jax.nn.sigmoid((x @ p["w1"]) @ p["w2"])) @ p["w3"], "2 times"),
    "gates of one layer": (lambda p, x: _gated(p, x), "mul"),
    "sorted features": (lambda p, x: jnp.sort(x @ p["w1"], axis=1) @ p["w2"] @ p["w3"], "sort"),
    "sorted examples": (lambda p, x: jnp.sort(x @ p["w1"], axis=0) @ p["w2"] @ p["w3"], "sort"),
    "normalised features": (lambda p, x: _normalised(p, x), "reduce_sum"),
    "a call back": (lambda p, x: _called_back(p, x), "callback"),
    "a rule for reverse mode alone": (lambda p, x: _reverse_only(x @ p["w1"]) @ p["w2"] @ p["w3"], "custom_jvp"),
    "past the last layer": (lambda p, x: _past(p, x), "outputs"),
    "two branches": (lambda p, x: (x @ p["w1"]) @ p["w2"] + (x[:, :3] @ p["w3"]), "both read"),
    "one layer twice": (lambda p, x: (x @ p["w1"]) @ p["w2"] @ p["w3"] @ p["w3"], "used 2 times"),
    "a scale": (lambda p, x: (jnp.tanh(x @ p["w1"]) * p["b1"]) @ p["w2"] @ p["w3"], "b1"),
    "a sequence": (lambda p, x: (jnp.stack([x, x], 1) @ p["w1"] @ p["w2"] @ p["w3"]).sum(1), "shared by 2"),
}


def _skip(p, x):
    h = jnp.tanh(x @ p["w1"])
    return (jnp.tanh(h @ p["w2"]) + h @ jnp.ones((5, 3))) @ p["w3"]


def _residual(p, x):
    h = jnp.tanh(x @ p["w1"])
    return (h[:, :3] + jnp.tanh(h @ p["w2"])) @ p["w3"]


def _gated(p, x):
    h = x @ p["w1"]
    return (h * jax.nn.sigmoid(h[:, ::-1])) @ p["w2"] @ p["w3"]


def _normalised(p, x):
    h = x @ p["w1"]
    return ((h - h.mean(1, keepdims=True)) / (h.std(1, keepdims=True) + 1)) @ p["w2"] @ p["w3"]


def _called_back(p, x):
    h = x @ p["w1"]
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h) @ p["w2"] @ p["w3"]


@jax.custom_vjp
def _reverse_only(x):
    return jnp.tanh(x)


_reverse_only.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def _past(p, x):
    h = jnp.tanh(x @ p["w1"])
    return (h @ p["w2"]) @ p["w3"] + h[:, :3]


@pytest.mark.many_compilations("arrays of the setting are made eagerly")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused_with_what_stands_in_the_way(name):
    model, what = REFUSED[name]
    used = {"a scale": ("w1", "w2", "w3", "b1")}.get(name, ("w1", "w2", "w3"))
    params = {k: v for k, v in weights().items() if k in used}
    objective = curvax.Objective(model, L.squared_error())
    batch = (normal(5, N, 4), normal(6, N, 3))
    layers = curvax.find_layers(objective, params, batch)
    with pytest.raises(ValueError, match=what):
        run(lambda t: propagate(t), objective, params, batch, layers)
