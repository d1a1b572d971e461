"""Layers are found in every spelling, and their taps give every example's gradient, against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from benchmarks.operations import flops
from curvax import trees
from tests import oracles
from tests.layers.cases import CASES, N


@pytest.fixture(autouse=True)
def _promotion():
    """Modules of other libraries rely on jax's ordinary promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def setting(name):
    case = CASES[name]()
    objective = curvax.Objective(case.model, curvax.losses.squared_error())
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    targets = np.random.default_rng(3).normal(size=outputs.shape)
    return case, objective, (case.inputs, targets)


# Of the other libraries one model of each difficulty; the rest under `make test-all`.
SLOW = {name for name in CASES if name.startswith(("linen", "nnx", "equinox", "haiku"))} - {
    *("linen_attention", "linen_OptimizedLSTMCell", "linen_scan_over_layers", "linen_batch_norm_in_training"),
    *("nnx_conv", "equinox_attention", "haiku_gru"),
}


@pytest.mark.many_compilations("elementwise uses are looked at while tracing, one equation at a time")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_examples_gradients_are_those_of_autodiff(name):
    case, objective, batch = setting(name)
    layers = curvax.find_layers(objective, case.params, batch, fallback="gradient")
    paths = trees.leaf_paths(case.params)
    reasons = {paths[i]: reason for i, reason in layers.reasons.items()}
    assert set(reasons) == set(case.without), str(layers)
    for path, text in case.without.items():
        assert text in reasons[path]
    assert layers.couples_examples == case.couples
    for path, kind in (case.kinds or {}).items():
        assert layers[path].kind == kind

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        loss, gradient, (uses,) = tapped.value_and_gradient(tapped.loss_cotangents())
        return loss, gradient, tapped.to_params([(use, use.per_example()) for use in uses])

    loss, gradient, each = compute(case.params, batch)
    true_loss, true_gradient, true_each = oracle(objective, case.couples)(case.params, batch)
    np.testing.assert_allclose(loss, true_loss, rtol=1e-12)
    for i, path in enumerate(paths):
        ours, theirs = (jax.tree.leaves(tree)[i] for tree in (gradient, true_gradient))
        np.testing.assert_allclose(ours, theirs, atol=case.atol, err_msg=path)
        if path not in case.without and not case.couples:
            ours, theirs = (jax.tree.leaves(tree)[i] for tree in (each, true_each))
            np.testing.assert_allclose(ours, theirs, atol=case.atol, err_msg=path)


def oracle(objective, couples):
    """(params, batch) -> loss, gradient, and every example's gradient if examples are not coupled; by autodiff."""
    if couples:
        return jax.jit(lambda params, batch: (*jax.value_and_grad(objective)(params, batch), None))

    @jax.jit
    def compute(params, batch):
        def one(example):
            return jax.value_and_grad(objective)(params, jax.tree.map(lambda leaf: leaf[None], example))

        losses, each = jax.vmap(one)(batch)
        return jnp.mean(losses), jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each), each

    return compute


@pytest.mark.parametrize("name", ["mlp_x_at_w", "scan_over_layers", "convolutions", "tied_embedding"])
def test_pulling_back_once_gives_what_the_joint_sweep_gives(name):
    case, objective, batch = setting(name)
    layers = curvax.find_layers(objective, case.params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        cotangents = tapped.loss_cotangents()
        uses = tapped.pull_back(cotangents)
        (columns,) = tapped.pull_back_columns(jax.tree.map(lambda leaf: leaf[None], cotangents))[:1]
        summed = tapped.to_params([(use, use.gradient()) for use in uses])
        weighted = tapped.to_params([(use, use.gradient(jnp.arange(1.0, N + 1))) for use in uses])
        each = tapped.to_params([(use, use.per_example()) for use in uses])
        return summed, weighted, each, columns.cotangents[0], uses[0].cotangents, tapped.point.value_and_gradient()

    summed, weighted, each, columns, cotangents, point = compute(case.params, batch)
    loss, gradient, true_each = oracle(objective, False)(case.params, batch)
    np.testing.assert_allclose(point[0], loss, rtol=1e-12)
    np.testing.assert_allclose(columns, cotangents, atol=1e-12)
    weights = np.arange(1.0, N + 1)
    for i, truth in enumerate(map(np.asarray, jax.tree.leaves(gradient))):
        leaf = np.asarray(jax.tree.leaves(true_each)[i])
        np.testing.assert_allclose(jax.tree.leaves(point[1])[i], truth, atol=1e-12)
        np.testing.assert_allclose(jax.tree.leaves(summed)[i], N * truth, atol=1e-11)
        np.testing.assert_allclose(jax.tree.leaves(weighted)[i], np.tensordot(weights, leaf, 1), atol=1e-10)
        np.testing.assert_allclose(jax.tree.leaves(each)[i], leaf, atol=1e-11)


def test_the_batch_may_have_another_size_and_the_step_is_traced_once():
    case, objective, batch = setting("attention_with_merged_axes")
    layers = curvax.find_layers(objective, *jax.eval_shape(lambda *tree: tree, case.params, batch))
    traces = []

    @jax.jit
    def compute(params, batch):
        traces.append(1)
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return tapped, tapped.value_and_gradient()[1]

    for size in (N, 2 * N, 1, N):
        inputs, targets = (np.concatenate([leaf, leaf])[:size] for leaf in batch)
        _, gradient = compute(case.params, (inputs, targets))
        truth = jax.jit(jax.grad(objective))(case.params, (inputs, targets))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient, truth)
    assert len(traces) == 3


@pytest.mark.parametrize("cast_inside", [False, True], ids=["parameters", "computation"])
def test_bfloat16_has_structure_and_its_products_are_summed_in_single_precision(cast_inside):
    generator = np.random.default_rng(0)
    dtype = jnp.float32 if cast_inside else jnp.bfloat16
    params = {
        "w": jnp.asarray(generator.normal(size=(3, 8)), dtype),
        "v": jnp.asarray(generator.normal(size=(8, 2)), dtype),
    }
    batch = (jnp.asarray(generator.normal(size=(N, 3)), dtype), jnp.asarray(generator.normal(size=(N, 2)), dtype))

    def network(params, x, narrow=jnp.bfloat16):
        w, v, x = (leaf.astype(narrow) for leaf in (params["w"], params["v"], x))
        return (jnp.tanh(x @ w) @ v).astype(jnp.float32)

    objective = curvax.Objective(network, curvax.losses.squared_error())
    batch = (batch[0], batch[1].astype(jnp.float32))
    layers = curvax.find_layers(objective, params, batch)
    assert not layers.unstructured
    wide = curvax.Objective(lambda p, x: network(p, x, jnp.float32), curvax.losses.squared_error())

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        for use in tapped.pull_back(tapped.loss_cotangents()):
            assert use.inputs.dtype == use.cotangents.dtype == jnp.float32
        truth = jax.vmap(lambda *one: jax.grad(wide)(params, jax.tree.map(lambda leaf: leaf[None], one)))(*batch)
        return curvax.layers.per_example_gradients(tapped), truth

    each, truth = compute(params, batch)
    for ours, theirs in zip(jax.tree.leaves(each), jax.tree.leaves(truth), strict=True):
        ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
        assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)


def test_a_tapped_point_passes_through_jit():
    case, objective, batch = setting("mlp_x_at_w")
    layers = curvax.find_layers(objective, case.params, batch)
    tapped = jax.jit(lambda params, batch: curvax.tap(layers, objective.linearize(params, batch)))(case.params, batch)

    @jax.jit
    def use(tapped):
        (first,) = (u for u in tapped.pull_back(tapped.loss_cotangents()) if u.layer.name == "0/w")
        return first.gradient(), curvax.ggn(tapped.point)(tapped.point.params)

    gradient, product = use(tapped)
    truth = jax.jit(jax.grad(objective))(case.params, batch)
    np.testing.assert_allclose(gradient[0], N * truth[0]["w"], atol=1e-12)
    expected = oracles.dense_ggn(objective, case.params, batch) @ trees.ravel(case.params)
    np.testing.assert_allclose(trees.ravel(product), expected, atol=1e-12)


def test_a_parameter_without_structure_is_an_error_unless_chosen_otherwise():
    case, objective, batch = setting("custom_vjp_layer")
    with pytest.raises(ValueError, match=r"(?s)no structure was found for w.*custom derivatives"):
        curvax.find_layers(objective, case.params, batch)
    with pytest.raises(ValueError, match="fallback must be"):
        curvax.find_layers(objective, case.params, batch, fallback="none")
    inside = curvax.find_layers(objective, case.params, batch, through_custom_rules=True)
    assert {layer.name for layer in inside} == {"w", "v"}


def test_an_unused_parameter_is_reported_and_no_error():
    objective = curvax.Objective(lambda p, x: x @ p["w"], curvax.losses.squared_error())
    params, batch = {"w": jnp.ones((3, 2)), "idle": jnp.ones(4)}, (jnp.ones((N, 3)), jnp.ones((N, 2)))
    layers = curvax.find_layers(objective, params, batch)
    assert "is not used" in str(layers)
    assert layers.unstructured == ()
    gradient = jax.jit(lambda p, b: curvax.tap(layers, objective.linearize(p, b)).value_and_gradient()[1])(
        params, batch
    )
    np.testing.assert_array_equal(gradient["idle"], 0)


def test_another_model_or_other_parameters_are_refused():
    case, objective, batch = setting("mlp_x_at_w")
    layers = curvax.find_layers(objective, case.params, batch)
    other = curvax.Objective(lambda p, x: x @ p[0]["w"] @ p[1]["w"], curvax.losses.squared_error())
    with pytest.raises(ValueError, match="not the one that find_layers saw"):
        curvax.tap(layers, other.linearize(case.params, batch))
    with pytest.raises(ValueError, match="not those that find_layers saw"):
        curvax.tap(layers, objective.linearize(case.params[:1], (batch[0], np.zeros((N, 4)))))


def test_a_model_that_only_fits_one_batch_size_is_explained():
    constant = jnp.ones((N, 3))
    objective = curvax.Objective(lambda w, x: (x + constant) @ w, curvax.losses.squared_error())
    with pytest.raises(ValueError, match="cannot be traced with 7 examples"):
        curvax.find_layers(objective, jnp.ones((3, 2)), (constant, jnp.ones((N, 2))))


def paired(params, x):
    """Chosen and rejected rows in turn."""
    scores = (jnp.tanh(x @ params["w"]) @ params["o"]).reshape(-1, 2, 2)
    return scores[:, 0] - scores[:, 1]


def ghost_normalised(params, x):
    """Batch normalisation of four examples at a time."""
    groups = (x @ params["w"]).reshape(-1, 4, 4)
    groups = (groups - groups.mean(1, keepdims=True)) / jnp.sqrt(groups.var(1, keepdims=True) + 1e-3)
    return jnp.tanh(groups.reshape(-1, 4)) @ params["o"]


def over_devices(params, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    hidden = jax.shard_map(
        jnp.tanh,
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("data"),
        out_specs=jax.sharding.PartitionSpec("data"),
    )(x @ params["w"])
    return hidden @ params["o"]


@pytest.mark.many_compilations("three models, and their gradients outside of jit")
@pytest.mark.parametrize("model", [paired, ghost_normalised, over_devices])
def test_models_that_want_a_multiple_of_something(model):
    """The uses of each layer have its gradient between them, though no odd number of examples goes through."""
    draw = np.random.default_rng(0)
    params = {"w": jnp.asarray(draw.normal(size=(3, 4))), "o": jnp.asarray(draw.normal(size=(4, 2)))}
    inputs = jnp.asarray(draw.normal(size=(8, 3)))
    targets = jnp.asarray(draw.normal(size=jax.eval_shape(model, params, inputs).shape))
    objective = curvax.Objective(model, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, (inputs, targets))
    assert {layer.name for layer in layers} == {"w", "o"}

    @jax.jit
    def both(params):
        tapped = curvax.tap(layers, objective.linearize(params, (inputs, targets)))
        cotangents = (model(params, inputs) - targets) / len(targets)
        uses = tapped.by_layer(tapped.pull_back((cotangents,)))
        summed = {name: sum(use.gradient() for use in own)[0] for name, own in uses.items()}
        return summed, jax.grad(objective)(params, (inputs, targets))

    summed, gradient = both(params)
    for name in params:
        np.testing.assert_allclose(summed[name], gradient[name], rtol=1e-11, atol=1e-14)


def test_several_terms_share_layers():
    def network(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    loss = curvax.losses.squared_error()
    inner = curvax.Term(network, loss, select=lambda batch: batch["inner"])
    border = curvax.Term(network, loss, select=lambda batch: batch["border"], weight=3.0)
    objective = curvax.Objective.from_terms(inner, border, l2=0.1)
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(2, 4))), "v": jnp.asarray(generator.normal(size=(4, 1)))}
    batch = {
        "inner": (jnp.asarray(generator.normal(size=(6, 2))), jnp.ones((6, 1))),
        "border": (jnp.asarray(generator.normal(size=(3, 2))), jnp.ones((3, 1))),
    }
    layers = curvax.find_layers(objective, params, batch)
    assert [len(layer.members) for layer in layers] == [2, 2]
    loss, gradient, _ = jax.jit(lambda p, b: curvax.tap(layers, objective.linearize(p, b)).value_and_gradient())(
        params, batch
    )
    truth = jax.jit(jax.value_and_grad(objective))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), (loss, gradient), truth)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_gradient_and_taps_cost_at_most_1_45_gradients(form, remat):
    """Counted operations, against the cheapest gradient: that without remat where remat is not asked for."""
    width, depth, batch_size = 256, 6, 128

    def block(x, w):
        return jnp.tanh(x @ w), None

    inner = jax.checkpoint(block) if remat else block

    def network(params, x):
        if form == "scanned":
            return jax.lax.scan(inner, x, params)[0]
        for w in params:
            x, _ = inner(x, w)
        return x

    single = jax.ShapeDtypeStruct((batch_size, width), jnp.float32)
    objective = curvax.Objective(network, curvax.losses.squared_error())
    params = (
        jax.ShapeDtypeStruct((depth, width, width), jnp.float32)
        if form == "scanned"
        else [jax.ShapeDtypeStruct((width, width), jnp.float32)] * depth
    )
    layers = curvax.find_layers(objective, params, (single, single))

    def with_taps(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        loss, gradient, (uses,) = tapped.value_and_gradient(tapped.loss_cotangents())
        return loss, gradient, [(use.inputs, use.cotangents) for use in uses]

    ratio = flops(with_taps, params, (single, single)) / flops(jax.value_and_grad(objective), params, (single, single))
    assert ratio <= 1.45


@pytest.mark.many_compilations("the layers are used outside of jit")
def test_a_parameter_that_is_joined_with_a_masked_one_is_said_to_have_no_layer():
    """What is added up with another leaf is no layer once that one is hidden: refused, or treated as asked."""
    draw = np.random.default_rng(0)
    params = {name: jnp.asarray(draw.normal(size=(3, 2))) for name in "pqw"} | {
        "w": jnp.asarray(draw.normal(size=(4, 3)))
    }
    objective = curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) @ (p["p"] + p["q"]), curvax.losses.squared_error())
    batch = jnp.asarray(draw.normal(size=(6, 4))), jnp.asarray(draw.normal(size=(6, 2)))
    with pytest.raises(
        ValueError, match=r"p: joined in one layer with a parameter that is masked.*mask both or neither"
    ):
        curvax.find_layers(objective, params, batch).restricted(["p", "w"])
    both = curvax.find_layers(objective, params, batch).restricted(["w"])
    assert [layer.name for layer in both] == ["w"]
    assert both.unstructured == ()
    layers = curvax.find_layers(objective, params, batch, fallback="diagonal").restricted(["p", "w"])
    assert "is joined with a parameter that is masked" in str(layers)
    factors = curvax.layers.kronecker_factors(
        curvax.tap(layers, objective.linearize(params, batch)), curvature=curvax.GaussNewton()
    )
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    np.testing.assert_allclose(factors.diagonals[0].reshape(-1), np.diag(dense)[:6], rtol=1e-9)


@pytest.mark.many_compilations("the layers are used outside of jit")
def test_a_parameter_that_is_joined_in_one_use_of_two_has_no_layer_when_that_one_is_masked():
    """Factors of the other use alone would be a part of its curvature for the whole; and so for what hangs on it."""
    draw = np.random.default_rng(0)
    params = {name: jnp.asarray(draw.normal(size=(3, 3))) for name in "pqrw"}

    def model(p, x):
        x = jnp.tanh(x @ p["w"])
        return x @ p["p"] + jnp.tanh(x) @ (p["p"] + p["q"]) + jnp.sin(x) @ (p["p"] + p["r"])

    objective = curvax.Objective(model, curvax.losses.squared_error())
    batch = tuple(jnp.asarray(draw.normal(size=(6, 3))) for _ in range(2))
    with pytest.raises(ValueError, match="p, r: joined in one layer with a parameter that is masked"):
        curvax.find_layers(objective, params, batch).restricted(["p", "r", "w"])
    layers = curvax.find_layers(objective, params, batch, fallback="diagonal").restricted(["p", "r", "w"])
    assert [layer.name for layer in layers] == ["w"]
    factors = curvax.layers.kronecker_factors(
        curvax.tap(layers, objective.linearize(params, batch)), curvature=curvax.GaussNewton()
    )
    dense = np.diag(oracles.dense_ggn(objective, params, batch))
    for diagonal, own in zip(factors.diagonals, (dense[:9], dense[18:27]), strict=True):
        np.testing.assert_allclose(diagonal.reshape(-1), own, rtol=1e-9)
