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
        by_example = estimators.chapelle_erhan_diagonal(curvax.ggn(tapped.point), key)
        by_sum = jnp.square(trees.ravel(curvax.ggn(tapped.point).sample(key, trees.random_rademacher)))
        return trees.ravel(curvax.layers.sampled_ggn_diagonal(tapped, key)), trees.ravel(by_example), by_sum

    draws = draw(jax.random.split(jax.random.key(0), 30))
    *by_example, by_sum = (np.mean(np.sum((np.asarray(each) - truth) ** 2, axis=1)) for each in draws)
    assert max(by_example) < 0.2 * by_sum


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


@pytest.mark.parametrize(
    "network",
    [
        lambda p, x: x @ p["w"] * p["number"],
        lambda p, x: x @ p["w"] + p["number"],
        lambda p, x: x + p["number"] * jnp.tanh(x @ p["w"]),
        lambda p, x: jnp.where(x @ p["w"] > 0, x, p["number"] * x),
        lambda p, x: jnp.concatenate([p["number"] * x, x @ p["w"] + p["number"]], axis=1),
    ],
    ids=["temperature", "offset", "residual gain", "slope", "used twice"],
)
def test_numbers_among_the_parameters(network):
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 3))), "number": jnp.asarray(0.7)}
    x = jnp.asarray(generator.normal(size=(N, 3)))
    batch = (x, jnp.asarray(generator.normal(size=jax.eval_shape(network, params, x).shape)))
    objective = curvax.Objective(network, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, batch, fallback="gradient")

    @jax.jit
    def compute(params, batch):
        tapped = curvax.tap(layers, objective.linearize(params, batch))
        return (
            curvax.layers.per_example_gradients(tapped),
            curvax.layers.gradient_norms(tapped),
            curvax.layers.empirical_fisher_diagonal(tapped),
        )

    each, norms, diagonal = compute(params, batch)
    rows = jacobian_rows(objective, params, batch)
    assert each["number"].shape == (N,)
    np.testing.assert_allclose(each["number"], rows[:, 0], rtol=1e-12)
    np.testing.assert_allclose(each["w"].reshape(N, -1), rows[:, 1:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-12)
    np.testing.assert_allclose(ravel(diagonal), np.mean(rows**2, axis=0), rtol=1e-10, atol=1e-14)


def folded(params, x):
    return jnp.tanh(x @ params["w"]).reshape(-1, 2)


def folded_steps_first(params, x):
    return jnp.swapaxes(jnp.tanh(x @ params["w"]), 0, 1).reshape(-1, 2)


def joined_views(params, x):
    return jnp.concatenate([jnp.tanh(x[:, i] @ params["w"]) for i in range(3)])


@pytest.mark.parametrize("network", [folded, folded_steps_first, joined_views])
def test_rows_folded_into_the_axis_of_the_examples_are_refused_by_examples_alone(network):
    """(examples, steps, ...) with example weights of 1 / steps is the same objective, and is taken."""
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(4, 2))), "b": jnp.zeros(2)}
    x, y = generator.normal(size=(N, 3, 4)), generator.normal(size=(N, 3, 2))
    loss = curvax.losses.squared_error()
    objective = curvax.Objective(lambda p, x: network(p, x) + p["b"], loss)
    targets = jnp.asarray(y.reshape(-1, 2) if network is folded else np.swapaxes(y, 0, 1).reshape(-1, 2))
    batch = (jnp.asarray(x), targets)
    layers = curvax.find_layers(objective, params, batch)
    assert not layers.couples_examples
    assert layers.rows_per_example == (3,)
    assert "The outputs have 3 rows for each example" in str(layers)
    tapped = jax.jit(lambda p, b: curvax.tap(layers, objective.linearize(p, b)))(params, batch)
    factors = functools.partial(curvax.layers.kronecker_factors, curvature=curvax.GaussNewton())
    for function in (
        curvax.layers.gradient_norms,
        curvax.layers.gradient_inner_products,
        curvax.layers.per_example_gradients,
        curvax.layers.empirical_fisher_diagonal,
        curvax.layers.exact_ggn_diagonal,
        functools.partial(curvax.layers.sampled_ggn_diagonal, key=jax.random.key(0)),
        curvax.gram,
        factors,
    ):
        with pytest.raises(ValueError, match=r"term 0 have 3 rows for each example.*return \(examples, steps"):
            function(tapped)
    apart = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w"]) + p["b"], loss, example_weights=lambda batch: jnp.full(N, 1 / 3)
    )

    @jax.jit
    def compute(params, batch, other):
        sampled = curvax.layers.kronecker_factors(tapped, jax.random.key(0))
        ats = objective.linearize(params, batch), apart.linearize(params, other)
        return sampled, [at.loss for at in ats], [curvax.ggn(at).to_dense() for at in ats]

    sampled, losses, matrices = compute(params, batch, (jnp.asarray(x), jnp.asarray(y)))
    assert curvax.trees.all_finite(sampled)
    np.testing.assert_allclose(*losses, rtol=1e-12)
    np.testing.assert_allclose(*matrices, rtol=0, atol=1e-12)
    layers = curvax.find_layers(apart, params, (x, y))
    norms = jax.jit(lambda p: curvax.layers.gradient_norms(curvax.tap(layers, apart.linearize(p, (x, y)))))(params)
    rows = jacobian_rows(curvax.Objective(lambda p, x: jnp.tanh(x @ p["w"]) + p["b"], loss), params, (x, y))
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-10)


@pytest.mark.parametrize(
    "network",
    [
        lambda p, i: i["x"] @ p["w"] + p["z"][jnp.arange(len(i["x"]))],
        lambda p, i: jnp.tanh(i["x"] @ p["w"]) * p["z"][jnp.arange(len(i["x"]))],
        lambda p, i: i["x"] @ p["w"] - p["z"][: len(i["x"])],
        lambda p, i: jnp.tanh(jnp.tanh(i["x"] @ p["w"]) + 2 * p["z"][::-1][: len(i["x"])]),
    ],
    ids=["shift", "scale", "slice", "reversed"],
)
def test_rows_that_belong_to_examples_have_no_structure_and_those_looked_up_do(network):
    """Codes of an auto-decoder, one for each example."""
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=(3, 2))), "z": jnp.asarray(generator.normal(size=(80, 2)))}
    batch = ({"x": jnp.asarray(generator.normal(size=(4, 3)))}, jnp.asarray(generator.normal(size=(4, 2))))
    loss = curvax.losses.squared_error()
    objective = curvax.Objective(network, loss)
    with pytest.raises(ValueError, match=r"no structure was found for z;[\s\S]*has a row for each example; look rows"):
        curvax.find_layers(objective, params, batch)
    layers = curvax.find_layers(objective, params, batch, fallback="diagonal")
    looked_up = curvax.Objective(lambda p, i: i["x"] @ p["w"] + p["z"][i["n"]], loss)
    numbered = ({"n": jnp.arange(4), **batch[0]}, batch[1])
    table = curvax.find_layers(looked_up, params, numbered)
    assert table["z"].kind == "embedding"

    @jax.jit
    def compute(params, batch, numbered):
        at = objective.linearize(params, batch)
        norms = curvax.layers.gradient_norms(curvax.tap(table, looked_up.linearize(params, numbered)))
        return curvax.layers.exact_ggn_diagonal(curvax.tap(layers, at)), norms

    diagonal, norms = compute(params, batch, numbered)
    np.testing.assert_allclose(
        ravel(diagonal), np.diag(oracles.dense_ggn(objective, params, batch)), rtol=1e-10, atol=1e-14
    )
    rows = jacobian_rows(looked_up, params, numbered)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-10)


def test_negative_weights_count_by_their_size_where_a_definite_matrix_is_needed():
    """As of advantages: G itself is indefinite and exact; its roots, and what is solved with them, are of |w|."""
    weights = jnp.array([1.0, -2.0, 0.5, 0.0, -0.1])
    objective, params, batch = setting("mlp_x_at_w", example_weights=lambda batch: weights)
    positive, _, _ = setting("mlp_x_at_w", example_weights=lambda batch: jnp.abs(weights))
    layers = curvax.find_layers(objective, params, batch)
    tx = {method: curvax.scale_by_sample_space(layers, damping=0.1, method=method) for method in ("cholesky", "cg")}

    @jax.jit
    def compute(params, batch):
        at, other = objective.linearize(params, batch), positive.linearize(params, batch)
        tapped = curvax.tap(layers, at)
        vector = jax.tree.map(jnp.ones_like, params)
        steps = [t.update(vector, t.init(params), params, at=at)[0] for t in tx.values()]
        key = jax.random.key(0)
        factors = [curvax.layers.kronecker_factors(curvax.tap(layers, a), key) for a in (at, other)]
        draws = [curvax.ggn(a).sample(key) for a in (at, other)]
        signed = curvax.ggn(at).to_dense(), curvax.layers.exact_ggn_diagonal(tapped)
        return curvax.gram(tapped), list(map(trees.ravel, steps)), factors, draws, signed

    gram, steps, factors, draws, (matrix, diagonal) = compute(params, batch)
    truth, definite = (np.asarray(oracles.dense_ggn(o, params, batch)) for o in (objective, positive))
    assert np.linalg.eigvalsh(truth)[0] < -1e-3
    np.testing.assert_allclose(matrix, truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ravel(diagonal), np.diag(truth), rtol=1e-9, atol=1e-12)
    top = np.linalg.eigvalsh(definite)[-len(gram) :]
    np.testing.assert_allclose(np.linalg.eigvalsh(gram)[-len(top) :], top, rtol=0, atol=1e-11)
    solved = np.linalg.solve(definite + 0.1 * np.eye(len(definite)), np.ones(len(definite)))
    for step, tolerance in zip(steps, (1e-8, 1e-4), strict=True):
        assert np.linalg.norm(step - solved) < tolerance * np.linalg.norm(solved)
    for ours, theirs in (factors, draws):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), ours, theirs)


def in_rows(params, x):
    return x @ params["w"]


def in_a_part(params, x):
    return x @ jnp.concatenate([params["w"][:1] * 2, jnp.pad(params["w"][1:], ((0, 1), (0, 0)))])[:2]


def in_a_sum(params, x):
    return x @ (params["w"] + params["w"][::-1]) + params["b"]


def inside(params, x):
    """Computed in float16 for parameters in float32."""
    w = params["w"].astype(jnp.float16)
    return x @ jnp.stack([w[0], w[1]])


@pytest.mark.parametrize("size", [2.0**-13, 500.0], ids=["small", "large"])
@pytest.mark.parametrize("network", [in_rows, in_a_part, in_a_sum, inside])
def test_diagonals_of_float16_do_not_leave_its_range(size, network):
    """Squares of 2^-13 and 500 are 1.5e-8 and 250000; float16 has numbers from 6e-8 to 65504."""
    dtype = jnp.float32 if network is inside else jnp.float16
    params = {"w": jnp.zeros((2, 1), dtype), "b": jnp.zeros(1, dtype)}
    batch = (jnp.asarray([[size, -size], [size, size / 2]], jnp.float16), jnp.ones((2, 1), jnp.float32))
    objective = curvax.Objective(network, curvax.losses.squared_error())
    layers = curvax.find_layers(objective, params, batch)

    def of_factors(tapped, params):
        """Of Kronecker factors, with one output and one block those of the matrix itself."""
        if network is in_a_sum:  # entries that are in several of a matrix's have no Kronecker product
            return ()
        factors = curvax.layers.kronecker_factors(tapped, curvature=curvax.GaussNewton())
        K = curvax.kronecker_map(layers, factors, params)
        return K.diagonal(), K.decomposed().diagonal()

    @jax.jit
    def compute(params, batch):
        at = objective.linearize(params, batch)
        tapped, key = curvax.tap(layers, at), jax.random.key(0)
        G = curvax.ggn(at)
        return (
            curvax.layers.empirical_fisher_diagonal(tapped),
            curvax.layers.exact_ggn_diagonal(tapped),
            curvax.layers.sampled_ggn_diagonal(tapped, key),
            G.diagonal(),
            curvax.estimators.chapelle_erhan_diagonal(G, key, layers=layers),
            *of_factors(tapped, params),
        ), (curvax.layers.gradient_norms(tapped), jnp.diag(curvax.layers.gradient_inner_products(tapped)))

    diagonals, (norms, products) = compute(params, batch)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, batch))
    model = curvax.Objective(network if network is not inside else in_rows, curvax.losses.squared_error())
    rows = jacobian_rows(model, *wide)
    for diagonal in diagonals:
        assert {leaf.dtype for leaf in jax.tree.leaves(diagonal)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(ravel(diagonal), np.mean(rows**2, axis=0), rtol=5e-3)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=5e-3)
    np.testing.assert_allclose(products, np.sum(rows**2, axis=1), rtol=5e-3)
