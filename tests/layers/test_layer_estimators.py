"""Diagonals, norms and inner products by taps, against dense matrices of autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import estimators, trees
from tests import oracles
from tests.layers.cases import CASES, N

NAMES = [
    "mlp_x_at_w",
    "stacked_slices",
    "scan_over_time",
    "tied_embedding",
    "convolutions_channels_first",
    "vmapped_experts",
]


def setting(name, loss="squared_error", **options):
    case = CASES[name]()
    with jax.numpy_dtype_promotion("standard"):
        outputs = jax.eval_shape(case.model, case.params, case.inputs)
    targets = np.random.default_rng(3).normal(size=outputs.shape)
    if loss == "softmax_cross_entropy":
        targets = np.argmax(targets, axis=-1)
    objective = curvax.Objective(case.model, getattr(curvax.losses, loss)(), **options)
    return objective, case.params, (case.inputs, targets)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def jacobian_rows(objective, params, batch):
    """Every example's gradient as a row."""

    def one(example):
        return jax.grad(objective)(params, jax.tree.map(lambda leaf: leaf[None], example))

    return np.asarray(jax.jit(jax.vmap(lambda example: trees.ravel(one(example))))(batch))


def ravel(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_norms_inner_products_and_the_empirical_diagonal(name):
    objective, params, batch = setting(name)
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return (
            curvax.layers.per_example_gradients(tapped),
            curvax.layers.gradient_norms(tapped),
            curvax.layers.gradient_inner_products(tapped),
            curvax.layers.empirical_fisher_diagonal(tapped),
        )

    each, norms, products, diagonal = compute(params, batch)
    rows = jacobian_rows(objective, params, batch)
    ours = np.concatenate([np.asarray(leaf).reshape(N, -1) for leaf in jax.tree.leaves(each)], axis=1)
    np.testing.assert_allclose(ours, rows, atol=1e-11)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-10)
    np.testing.assert_allclose(products, rows @ rows.T, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(ravel(diagonal), np.mean(rows**2, axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"), [("mlp_x_at_w", "softmax_cross_entropy"), ("dense_used_twice", "squared_error")]
)
def test_gauss_newton_diagonals(name, loss):
    weights = jnp.array([0.5, 2.0, 1.0, 0.0, 3.0])
    objective, params, batch = setting(name, loss, l2=0.3, example_weights=lambda batch: weights)
    layers = curvax.find_layers(objective, params, batch)
    truth = np.diag(oracles.dense_ggn(objective, params, batch))

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        exact = curvax.layers.exact_ggn_diagonal(tapped)
        return exact, curvax.layers.sampled_ggn_diagonal(tapped, jax.random.key(0), num_samples=400)

    exact, sampled = compute(params, batch)
    np.testing.assert_allclose(ravel(exact), truth, rtol=1e-9)
    assert np.linalg.norm(ravel(sampled) - truth) < 0.1 * np.linalg.norm(truth)


def test_squares_of_examples_vary_less_than_squares_of_sums():
    """DG-2: noise of every example's own, squared before the mean, has no cross terms."""
    objective, params, _ = setting("mlp_x_at_w", "softmax_cross_entropy")
    batch = (np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 2)
    layers = curvax.find_layers(objective, params, batch)
    truth = np.diag(oracles.dense_ggn(objective, params, batch))

    @jax.jit
    @jax.vmap
    def draw(key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        by_sum = estimators.chapelle_erhan_diagonal(curvax.ggn(tapped.point), key)
        return trees.ravel(curvax.layers.sampled_ggn_diagonal(tapped, key)), trees.ravel(by_sum)

    draws = draw(jax.random.split(jax.random.key(0), 30))
    by_example, by_sum = (np.mean(np.sum((np.asarray(each) - truth) ** 2, axis=1)) for each in draws)
    assert by_example < 0.2 * by_sum


def test_several_terms_follow_one_another():
    def network(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    loss = curvax.losses.squared_error()
    terms = [curvax.Term(network, loss, select=lambda batch, i=i: batch[i]) for i in (0, 1)]
    objective = curvax.Objective.from_terms(*terms)
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(2, 4))), "v": jnp.asarray(generator.normal(size=(4, 1)))}
    batch = [(generator.normal(size=(n, 2)), np.ones((n, 1))) for n in (3, 2)]
    layers = curvax.find_layers(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return (
            jax.vmap(trees.ravel)(curvax.layers.per_example_gradients(tapped)),
            curvax.layers.gradient_norms(tapped),
            curvax.layers.gradient_inner_products(tapped),
            trees.ravel(curvax.layers.empirical_fisher_diagonal(tapped)),
        )

    each, norms, products, diagonal = compute(params, batch)
    single = curvax.Objective(network, loss)
    rows = jacobian_rows(single, params, jax.tree.map(lambda a, b: np.concatenate([a, b]), *batch))
    np.testing.assert_allclose(each, rows, rtol=1e-10)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-10)
    np.testing.assert_allclose(products, rows @ rows.T, rtol=1e-10)
    truth = np.mean(rows[:3] ** 2, axis=0) + np.mean(rows[3:] ** 2, axis=0)
    np.testing.assert_allclose(diagonal, truth, rtol=1e-10)


@pytest.mark.parametrize("shape", [(N,), (N, 4)], ids=["one row an example", "four rows an example"])
def test_norms_of_an_embedding_used_once_count_rows_that_repeat_together(shape):
    """The gradient of a row is the sum over the positions that read it: ||sum_r ds_r||, not the root of a sum."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 3, shape)  # four reads of three rows: one is read twice
    params = {"table": generator.normal(size=(3, 2)), "w": generator.normal(size=(2, 2))}
    objective = curvax.Objective(lambda p, ids: jnp.tanh(p["table"][ids]) @ p["w"], curvax.losses.squared_error())
    batch = (tokens, generator.normal(size=(*shape, 2)))
    layers = curvax.find_layers(objective, params, batch)
    assert layers["table"].kind == "embedding"
    compute = jax.jit(lambda p, b: curvax.layers.gradient_norms(curvax.tap(layers, objective.linearize(p, b))))
    rows = jacobian_rows(objective, params, batch)
    np.testing.assert_allclose(compute(params, batch), np.linalg.norm(rows, axis=1), rtol=1e-10)


def test_coupled_examples_and_cases_finer_than_examples_are_refused():
    def standardised(w, x):
        return (x - x.mean(0)) / x.std(0) @ w

    def centred(w, x):
        return x @ w - (x @ w).mean(0)

    def layers_and_tap(objective, batch):
        layers = curvax.find_layers(objective, w, batch)
        return layers, jax.jit(lambda w, b: curvax.tap(layers, objective.linearize(w, b)))(w, batch)

    w, batch = np.ones((3, 2)), (np.random.default_rng(0).normal(size=(N, 3)), np.ones((N, 2)))
    loss = curvax.losses.squared_error()
    for model in (standardised, centred):
        layers, tapped = layers_and_tap(curvax.Objective(model, loss), batch)
        assert layers.couples_examples
        for function in (
            curvax.layers.gradient_norms,
            curvax.layers.gradient_inner_products,
            curvax.layers.per_example_gradients,
            curvax.layers.empirical_fisher_diagonal,
            curvax.layers.exact_ggn_diagonal,
            functools.partial(curvax.layers.sampled_ggn_diagonal, key=jax.random.key(0)),
        ):
            with pytest.raises(ValueError, match="couples examples"):
                function(tapped)
    objective = curvax.Objective(
        lambda w, x: x @ w, curvax.losses.squared_error(), mask=lambda b: jnp.ones((N, 4), bool)
    )
    _, tapped = layers_and_tap(objective, (np.ones((N, 4, 3)), np.ones((N, 4, 2))))
    with pytest.raises(ValueError, match="steps of a sequence are the cases"):
        curvax.layers.empirical_fisher_diagonal(tapped)


def exponentials(params, x):
    return x @ jnp.exp(params["w"])


def products(params, x):
    return jnp.tanh(x @ params["v"])


@pytest.mark.parametrize(
    "models", [(exponentials,), (products, exponentials), (exponentials, products)], ids=["alone", "last", "first"]
)
@pytest.mark.parametrize("fallback", ["gradient", "diagonal"])
def test_what_has_no_structure_has_zeros_of_the_right_shapes(models, fallback):
    """Alone, and as one of two terms; in single precision, so that zeros of another dtype would be noticed."""
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.normal(size=(3, 2)), jnp.float32) for name in ("w", "v")}
    counts = (4, 3)[: len(models)]
    batch = [tuple(jnp.asarray(generator.normal(size=(n, k)), jnp.float32) for k in (3, 2)) for n in counts]
    loss = curvax.losses.squared_error()
    terms = [curvax.Term(model, loss, select=lambda batch, i=i: batch[i]) for i, model in enumerate(models)]
    objective = curvax.Objective.from_terms(*terms)
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)
    tx = curvax.scale_by_sample_space(layers, damping=0.1, method="cg")

    @jax.jit
    def compute(params, batch):
        _, gradient, at = objective.value_and_grad(params, batch)
        tapped = curvax.tap(layers, at)
        return (
            curvax.layers.per_example_gradients(tapped),
            curvax.layers.gradient_norms(tapped),
            curvax.layers.gradient_inner_products(tapped),
            curvax.gram(tapped),
            tx.update(gradient, tx.init(params), params, at=at)[0],
        )

    with jax.numpy_dtype_promotion("strict"):
        each, norms, inner, gram, updates = compute(params, batch)
    rows = []
    for model, (x, y) in zip(models, batch, strict=True):
        single = curvax.Objective(model, loss)
        own = jax.jit(jax.vmap(lambda x, y, f=single: jax.grad(f)(params, (x[None], y[None]))["v"].ravel()))(x, y)
        rows.append(np.asarray(own, np.float64))
    truth = np.concatenate(rows)
    np.testing.assert_array_equal(each["w"], np.zeros((sum(counts), 3, 2)))
    np.testing.assert_allclose(each["v"].reshape(-1, 6), truth, rtol=1e-5)
    np.testing.assert_allclose(norms, np.linalg.norm(truth, axis=1), rtol=1e-5)
    np.testing.assert_allclose(inner, truth @ truth.T, rtol=1e-4, atol=1e-5)
    assert gram.shape == (2 * sum(counts),) * 2
    places = np.concatenate([np.full(2 * n, model is products) for n, model in zip(counts, models, strict=True)])
    assert np.all(np.asarray(gram)[~places] == 0)
    assert np.all(np.diag(gram)[places] > 0)
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
