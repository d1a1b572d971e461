"""Random rank-one estimates of Hessians, and the recursion of Becker and LeCun, against dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import estimators, trees
from tests import oracles
from tests.layers.test_layer_estimators import setting

DRAWS = 4000


def joined(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def dense_hessian(objective, params, batch):
    return np.asarray(oracles.dense_hessian(objective, params, batch))


def check_unbiased(draws, truth):
    """No entry of the mean is further from the truth than five and a half of its deviations."""
    draws = np.asarray(draws)
    deviation = draws.std(axis=0) / np.sqrt(len(draws))
    error = np.abs(draws.mean(axis=0) - truth)
    assert np.all(error < 5.5 * deviation + 1e-9 * np.abs(truth).max())


def check_whole_hessian(objective, params, batch):
    """Curvature propagation estimates all of the Hessian."""

    @jax.jit
    @jax.vmap
    def draw(key):
        left, right = estimators.propagate_curvature(objective.linearize(params, batch), key=key)
        return jnp.outer(joined(left), joined(right))

    check_unbiased(draw(jax.random.split(jax.random.key(0), DRAWS)), dense_hessian(objective, params, batch))


@pytest.mark.parametrize("name", ["mlp_x_at_w", "scan_over_time", "dense_used_twice"])
def test_two_vectors_estimate_the_whole_hessian(name):
    weights = jnp.array([0.5, 2.0, 1.0, 0.0, 3.0])
    objective, params, batch = setting(name, l2=0.3, example_weights=lambda batch: weights)

    check_whole_hessian(objective, params, batch)


def normalised(params, x):
    """Division, products of two varying operands, a softmax and a reused variable."""
    hidden = x @ params["w"]
    centred = hidden - hidden.mean(-1, keepdims=True)
    hidden = centred / jnp.sqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 0.1)
    attention = jax.nn.softmax(hidden, axis=-1)
    return jax.nn.gelu(hidden * attention * params["s"]) @ params["v"]


def normalised_setting(loss):
    generator = np.random.default_rng(0)
    shapes = {"w": (2, 3), "s": (3,), "v": (3, 2)}
    params = {name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()}
    batch = (jnp.asarray(generator.normal(size=(4, 2))), jnp.asarray(generator.normal(size=(4, 2))))
    return curvax.Objective(normalised, loss), params, batch


@pytest.mark.parametrize("convex", [True, False])
def test_any_operation_and_any_loss(convex):
    def value(output, target):
        return jnp.sum(jnp.square(jnp.tanh(output) - target) if not convex else jnp.square(output - target))

    loss = curvax.losses.from_function(value, convex=convex)
    objective, params, batch = normalised_setting(loss)

    @jax.jit
    @jax.vmap
    def draw(key):
        left, right = estimators.propagate_curvature(objective.linearize(params, batch), key=key)
        return jax.tree.map(jnp.multiply, left, right)

    draws = draw(jax.random.split(jax.random.key(0), DRAWS))
    flat = np.concatenate([np.asarray(leaf).reshape(DRAWS, -1) for leaf in jax.tree.leaves(draws)], axis=1)
    check_unbiased(flat, np.diag(dense_hessian(objective, params, batch)))


def test_products_of_a_draw_vary_less_than_a_hessian_product_times_its_vector():
    """DG-3 against DG-4."""
    objective, params, batch = setting("mlp_x_at_w", "softmax_cross_entropy")
    truth = dense_hessian(objective, params, batch)

    @jax.jit
    @jax.vmap
    def squared_errors(key):
        left, right = estimators.propagate_curvature(objective.linearize(params, batch), key=key)
        v = trees.random_rademacher(key, params)
        naive = jnp.outer(joined(curvax.hessian(objective.linearize(params, batch))(v)), joined(v))
        return jnp.sum(jnp.square(jnp.outer(joined(left), joined(right)) - truth)), jnp.sum(jnp.square(naive - truth))

    ours, naive = (float(jnp.mean(x)) for x in squared_errors(jax.random.split(jax.random.key(0), 500)))
    assert ours < naive


# With the pass switched off (XLA_FLAGS=--xla_disable_hlo_passes=convolution-canonicalization), or from 0.8.2 on, jit
# gives what the same equations give one by one.
CHANNELS_FIRST = pytest.param(
    "convolutions_channels_first",
    marks=pytest.mark.skipif(jax.__version__ == "0.8.1", reason="XLA 0.8.1 compiles a convolution's transpose wrong"),
)


@pytest.mark.parametrize("name", ["mlp_x_at_w", "stacked_slices", CHANNELS_FIRST, "tied_embedding", "dense_used_twice"])
def test_the_diagonal_by_layers(name):
    weights = jnp.array([0.5, 2.0, 1.0, 0.0, 3.0])
    objective, params, batch = setting(name, l2=0.3, example_weights=lambda batch: weights)
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    @jax.vmap
    def draw(key):
        return estimators.sampled_hessian_diagonal(curvax.tap(layers, objective.linearize(params, batch)), key)

    draws = draw(jax.random.split(jax.random.key(0), DRAWS))
    flat = np.concatenate([np.asarray(leaf).reshape(DRAWS, -1) for leaf in jax.tree.leaves(draws)], axis=1)
    check_unbiased(flat, np.diag(dense_hessian(objective, params, batch)))


def test_products_by_examples_vary_less_than_products_of_sums():
    objective, params, _ = setting("mlp_x_at_w", "softmax_cross_entropy")
    batch = (jnp.asarray(np.random.default_rng(0).normal(size=(60, 3))), jnp.arange(60) % 2)
    layers = curvax.find_layers(objective, params, batch)
    truth = np.diag(dense_hessian(objective, params, batch))

    @jax.jit
    @jax.vmap
    def squared_errors(key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        by_example = estimators.sampled_hessian_diagonal(tapped, key)
        by_sum = trees.multiply(*estimators.propagate_curvature(objective.linearize(params, batch), key=key))
        return [jnp.sum(jnp.square(trees.ravel(x) - truth)) for x in (by_example, by_sum)]

    by_example, by_sum = (float(jnp.mean(x)) for x in squared_errors(jax.random.split(jax.random.key(0), 50)))
    assert by_example < 0.2 * by_sum


def test_curvature_propagation_refuses_what_it_cannot_do():
    objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.curvature_only(curvax.losses.squared_error()))
    w = jnp.ones((2, 1))
    with pytest.raises(ValueError, match="needs the loss"):
        estimators.propagate_curvature(objective.linearize(w, (jnp.ones((3, 2)), None)), key=jax.random.key(0))
    objective = curvax.Objective(lambda w, x: x @ w - (x @ w).mean(0), curvax.losses.squared_error())
    batch = (jnp.asarray(np.random.default_rng(0).normal(size=(5, 2))), jnp.ones((5, 1)))
    tapped = curvax.tap(curvax.find_layers(objective, w, batch), objective.linearize(w, batch))
    with pytest.raises(ValueError, match="couples examples"):
        estimators.sampled_hessian_diagonal(tapped, jax.random.key(0))


def becker_lecun_by_hand(params, x, output_diagonal, output_gradient, hessian):
    """q_s = phi'^2 q_a [+ phi'' da], q_a = sq(W)^T q_s, layer by layer (methods DG-6)."""
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    slope, bend = 1 - hidden**2, -2 * hidden * (1 - hidden**2)
    q = output_diagonal
    result = {"w2": (hidden**2).T @ q, "b2": q.sum(0)}
    q = slope**2 * (q @ (params["w2"] ** 2).T)
    if hessian:
        q = q + bend * (output_gradient @ params["w2"].T)
    return {**result, "w1": (x**2).T @ q, "b1": q.sum(0)}


@pytest.mark.parametrize("hessian", [False, True])
def test_becker_lecun_is_the_recursion_of_the_papers(hessian):
    generator = np.random.default_rng(0)
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}
    params = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    x, labels = generator.normal(size=(6, 3)), generator.integers(0, 2, 6)
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], curvax.losses.softmax_cross_entropy(), l2=0.1
    )
    tree, batch = jax.tree.map(jnp.asarray, (params, (x, labels)))
    ours = jax.jit(lambda p: estimators.becker_lecun_diagonal(objective.linearize(p, batch), hessian=hessian))(tree)
    logits = np.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (p - np.eye(2)[labels]) / 6
    truth = becker_lecun_by_hand(params, x, p * (1 - p) / 6, gradient, hessian)
    for name in shapes:
        np.testing.assert_allclose(ours[name], truth[name] + 0.1, rtol=1e-10)
    # The last layer's is exact.
    exact = np.diag(dense_hessian(objective, tree, batch))
    np.testing.assert_allclose(ours["w2"].ravel(), exact[-8:], rtol=1e-10)


def recurrent_by_hand(p, x, q):
    """The recursion of ``scan_over_time``, back through the steps."""
    states = [np.broadcast_to(p["start"], (len(x), 4))]
    for t in range(x.shape[1]):
        states.append(np.tanh(x[:, t] @ p["w"] + states[-1] @ p["u"] + p["b"]))
    result, at_state = dict.fromkeys(p, 0.0), 0.0
    for t in reversed(range(x.shape[1])):
        at_state = at_state + q[:, t] @ (p["v"] ** 2).T
        result["v"] += (states[t + 1] ** 2).T @ q[:, t]
        at_sum = (1 - states[t + 1] ** 2) ** 2 * at_state
        result["w"] += (x[:, t] ** 2).T @ at_sum
        result["u"] += (states[t] ** 2).T @ at_sum
        result["b"] += at_sum.sum(0)
        at_state = at_sum @ (p["u"] ** 2).T
    return {**result, "start": at_state.sum(0)}


def embedding_by_hand(p, tokens, q):
    """The recursion of ``tied_embedding``, whose table is read first and multiplied by last."""
    rows = p["table"][tokens] + p["position"]
    hidden = np.tanh(rows @ p["w"])
    table = np.einsum("ntv,nth->vh", q, hidden**2)
    at_sum = (1 - hidden**2) ** 2 * (q @ p["table"] ** 2)
    at_rows = at_sum @ (p["w"] ** 2).T
    np.add.at(table, tokens, at_rows)
    return {"table": table, "w": np.einsum("ntd,nth->dh", rows**2, at_sum), "position": at_rows.sum(0)}


def convolutions_by_hand(p, x, q):
    """The recursion of ``convolutions_channels_first``, by the dense Jacobian of each of its operations."""
    layout = ("NCH", "OIH", "NHC")
    stages = [
        lambda p, x: jax.lax.conv(x, p["one"], (1, 2), "VALID"),
        lambda p, x: jnp.tanh(x),
        lambda p, x: x.mean(axis=2),
        lambda p, x: jax.lax.conv_general_dilated(x, p["two"], (1,), "SAME", dimension_numbers=layout),
        lambda p, x: jnp.tanh(x),
        lambda p, x: x.reshape(x.shape[0], -1)[:, :12] @ p["w"],
    ]

    @jax.jit
    def compute(p, x, q):
        values = [x]
        for stage in stages:
            values.append(stage(p, values[-1]))
        result = trees.zeros_like(p)
        for stage, value in zip(reversed(stages), reversed(values[:-1]), strict=True):
            jacobians = jax.jacrev(stage, argnums=(0, 1))(p, value)
            squares = jax.tree.map(lambda j, q=q: jnp.tensordot(q, j**2, q.ndim), jacobians)
            result, q = trees.add(result, squares[0]), squares[1]
        return result

    return compute(p, x, q)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("scan_over_time", recurrent_by_hand),
        ("convolutions_channels_first", convolutions_by_hand),
        ("tied_embedding", embedding_by_hand),
    ],
)
def test_becker_lecun_takes_other_networks(name, by_hand):
    objective, params, batch = setting(name)
    ours = jax.jit(lambda p, b: estimators.becker_lecun_diagonal(objective.linearize(p, b)))(params, batch)
    inputs, targets = jax.tree.map(np.asarray, batch)
    truth = by_hand(jax.tree.map(np.asarray, params), inputs, np.full(targets.shape, 1 / len(targets)))
    for key in params:
        np.testing.assert_allclose(ours[key], truth[key], rtol=1e-9, err_msg=key)


@pytest.mark.many_compilations("an error ends the trace, so nothing is compiled as a whole")
@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float32")])
def test_becker_lecun_in_narrow_and_in_mixed_precision(dtypes, hessian):
    """Parameters of one dtype, a network that works in another: as in float64, up to the rounding of the narrower."""
    draw = np.random.default_rng(0)
    params = {"w": draw.normal(size=(3, 4)), "b": draw.normal(size=4), "v": draw.normal(size=(4, 2))}
    batch = draw.normal(size=(8, 3)), np.arange(8) % 2

    def diagonal(own, within):
        def model(p, x):
            p, x = jax.tree.map(lambda leaf: leaf.astype(within), (p, x))
            return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]

        objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, own), params)
        data = jnp.asarray(batch[0], own), jnp.asarray(batch[1])
        found = jax.jit(lambda p, b: estimators.becker_lecun_diagonal(objective.linearize(p, b), hessian=hessian))
        return found(cast, data)

    expected = diagonal("float64", "float64")
    for name, leaf in diagonal(*dtypes).items():
        assert leaf.dtype == dtypes[0]
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(leaf.astype("float64"), expected[name], atol=0.05 * largest)


def test_becker_lecun_names_an_operation_without_a_rule():
    objective = curvax.Objective(lambda w, x: jnp.linalg.inv(w + x), curvax.losses.squared_error())
    batch = (jnp.ones((1, 2, 2)), jnp.ones((1, 2, 2)))
    with pytest.raises(ValueError, match="no rule for the operation `custom_linear_solve`"):
        estimators.becker_lecun_diagonal(objective.linearize(jnp.eye(2), batch))


def test_becker_lecun_through_a_product_of_a_value_with_itself():
    # Both operands are the same value; each sends the square of the other back.
    w, x = jnp.array([[0.7, -0.4], [0.3, 0.9]]), jnp.array([[1.0, 2.0]])
    objective = curvax.Objective(lambda w, x: x @ (w @ w), curvax.losses.squared_error())
    at_product = np.square(x).T * np.ones((1, 2))
    truth = at_product @ np.square(w).T + np.square(w).T @ at_product
    batch = (x, jnp.zeros((1, 2)))
    np.testing.assert_allclose(estimators.becker_lecun_diagonal(objective.linearize(w, batch)), truth, rtol=1e-10)


@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.silu,
        jax.nn.gelu,
        lambda z: jax.nn.gelu(z, approximate=False),
        jax.nn.mish,
        jax.nn.soft_sign,
        lambda z: jnp.logaddexp(z, -z),
        lambda z: z * jnp.exp(-(z**2)) + jnp.sin(z) / (1 + z**2),
    ],
    ids=["silu", "gelu", "gelu by erf", "mish", "soft_sign", "logaddexp", "written out"],
)
def test_becker_lecun_is_exact_for_outputs_apart_whatever_the_activation(activation, hessian):
    objective = curvax.Objective(lambda w, x: activation(x * w), curvax.losses.squared_error())
    w, batch = jnp.array([0.8, 0.5]), (jnp.array([[0.7, -1.3], [0.4, 2.0]]), jnp.array([[0.2, 0.4], [1.0, -1.0]]))
    truth = np.diag((oracles.dense_hessian if hessian else oracles.dense_ggn)(objective, w, batch))
    compute = jax.jit(lambda w, b: estimators.becker_lecun_diagonal(objective.linearize(w, b), hessian=hessian))
    np.testing.assert_allclose(compute(w, batch), truth, rtol=1e-9)


def test_a_chain_of_elementwise_equations_beside_other_uses_of_its_parts():
    def model_fn(w, x):
        z = x @ w
        a = jnp.tanh(z)
        return a @ w.T + jnp.exp(a) + z * a

    generator = np.random.default_rng(0)
    w, batch = 0.5 * generator.normal(size=(2, 2)), (generator.normal(size=(3, 2)), np.ones((3, 2)))
    objective = curvax.Objective(model_fn, curvax.losses.squared_error())
    check_whole_hessian(objective, w, batch)


@pytest.mark.parametrize("kind", ["examples", "terms"])
def test_negative_weights_have_a_hessian_too(kind):
    def model_fn(w, x):
        return jnp.tanh(x @ w)

    loss, w = curvax.losses.squared_error(), jnp.full((2, 1), 0.3)
    batch = (jax.random.normal(jax.random.key(0), (4, 2)), jnp.ones((4, 1)))
    if kind == "examples":
        weights = jnp.array([1.0, -0.5, 2.0, 0.0])
        objective = curvax.Objective(model_fn, loss, example_weights=lambda batch: weights)
    else:
        terms = [curvax.Term(model_fn, loss), curvax.Term(lambda w, x: x @ w, loss, weight=-0.5)]
        objective = curvax.Objective.from_terms(*terms)
    check_whole_hessian(objective, w, batch)


def test_an_example_that_is_left_out_need_not_be_finite():
    # z^2 / t is infinite at t = 0, where the mask is.
    loss = curvax.losses.from_function(lambda z, t: jnp.sum(z**2) / t[0], convex=True)
    objective = curvax.Objective(lambda w, x: jnp.tanh(x @ w), loss, mask=lambda batch: batch[1][:, 0] > 0)
    w = jnp.full((2, 1), 0.3)
    batch = (np.random.default_rng(0).normal(size=(3, 2)), np.array([[1.0], [0.0], [2.0]]))
    kept = (batch[0][::2], batch[1][::2])
    without = curvax.Objective(lambda w, x: jnp.tanh(x @ w), loss)
    layers = curvax.find_layers(objective, w, batch)

    @jax.jit
    def compute(w, batch):
        tapped = curvax.tap(layers, objective.linearize(w, batch))
        draws = estimators.sampled_hessian_diagonal(tapped, jax.random.key(1), num_samples=2000)
        return curvax.layer_hessian(tapped).to_dense(), trees.ravel(draws)

    dense, draws = compute(w, batch)
    truth = dense_hessian(without, w, kept)
    np.testing.assert_allclose(dense, truth, rtol=1e-9)
    np.testing.assert_allclose(draws, np.diag(truth), rtol=0.1)
