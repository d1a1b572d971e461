"""Diagonals, norms and inner products by taps, against dense matrices of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import estimators, trees
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
        outputs = case.model(case.params, case.inputs)
    targets = jnp.asarray(np.random.default_rng(3).normal(size=outputs.shape))
    if loss == "softmax_cross_entropy":
        targets = jnp.argmax(targets, axis=-1)
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

    each = jax.jit(jax.vmap(one))(batch)
    return np.concatenate([np.asarray(leaf).reshape(N, -1) for leaf in jax.tree.leaves(each)], axis=1)


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
    truth = curvax.ggn(objective.linearize(params, batch)).diagonal()

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        exact = curvax.layers.exact_ggn_diagonal(tapped)
        return exact, curvax.layers.sampled_ggn_diagonal(tapped, jax.random.key(0), num_samples=400)

    exact, sampled = compute(params, batch)
    np.testing.assert_allclose(ravel(exact), ravel(truth), rtol=1e-9)
    error = np.linalg.norm(ravel(sampled) - ravel(truth)) / np.linalg.norm(ravel(truth))
    assert error < 0.1


def test_squares_of_examples_vary_less_than_squares_of_sums():
    """DG-2: noise of every example's own, squared before the mean, has no cross terms."""
    objective, params, _ = setting("mlp_x_at_w", "softmax_cross_entropy")
    batch = (jnp.asarray(np.random.default_rng(0).normal(size=(60, 3))), jnp.arange(60) % 2)
    layers = curvax.find_layers(objective, params, batch)
    truth = ravel(curvax.ggn(objective.linearize(params, batch)).diagonal())

    @jax.jit
    def draw(key):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        by_sum = estimators.chapelle_erhan_diagonal(curvax.ggn(tapped.point), key)
        return curvax.layers.sampled_ggn_diagonal(tapped, key), by_sum

    draws = [draw(jax.random.key(seed)) for seed in range(30)]
    by_example, by_sum = (np.mean([np.sum((ravel(pair[i]) - truth) ** 2) for pair in draws]) for i in (0, 1))
    assert by_example < 0.2 * by_sum


def test_several_terms_follow_one_another():
    def network(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    loss = curvax.losses.squared_error()
    terms = [curvax.Term(network, loss, select=lambda batch, i=i: batch[i]) for i in (0, 1)]
    objective = curvax.Objective.from_terms(*terms)
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(2, 4))), "v": jnp.asarray(generator.normal(size=(4, 1)))}
    batch = [(jnp.asarray(generator.normal(size=(n, 2))), jnp.ones((n, 1))) for n in (3, 2)]
    tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
    single = curvax.Objective(network, loss)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *batch)
    rows = jacobian_rows(single, params, joined)
    np.testing.assert_allclose(curvax.layers.gradient_norms(tapped), np.linalg.norm(rows, axis=1), rtol=1e-10)
    np.testing.assert_allclose(curvax.layers.gradient_inner_products(tapped), rows @ rows.T, rtol=1e-10)
    each = curvax.layers.per_example_gradients(tapped)
    np.testing.assert_allclose(trees.norm(each), np.linalg.norm(rows), rtol=1e-10)
    truth = np.mean(rows[:3] ** 2, axis=0) + np.mean(rows[3:] ** 2, axis=0)
    np.testing.assert_allclose(ravel(curvax.layers.empirical_fisher_diagonal(tapped)), truth, rtol=1e-10)


def test_coupled_examples_and_cases_finer_than_examples_are_refused():
    def batch_norm(w, x):
        return (x - x.mean(0)) / x.std(0) @ w

    objective = curvax.Objective(batch_norm, curvax.losses.squared_error())
    w, batch = jnp.ones((3, 2)), (jnp.asarray(np.random.default_rng(0).normal(size=(N, 3))), jnp.ones((N, 2)))
    layers = curvax.find_layers(objective, w, batch)
    objective = curvax.Objective(lambda w, x: x @ w - (x @ w).mean(0), curvax.losses.squared_error())
    layers = curvax.find_layers(objective, w, batch)
    with pytest.raises(ValueError, match="couples examples"):
        curvax.layers.gradient_norms(curvax.tap(layers, objective.linearize(w, batch)))
    objective = curvax.Objective(
        lambda w, x: x @ w, curvax.losses.squared_error(), mask=lambda b: jnp.ones((N, 4), bool)
    )
    sequences = (jnp.ones((N, 4, 3)), jnp.ones((N, 4, 2)))
    tapped = curvax.tap(curvax.find_layers(objective, w, sequences), objective.linearize(w, sequences))
    with pytest.raises(ValueError, match="steps of a sequence are the cases"):
        curvax.layers.empirical_fisher_diagonal(tapped)
