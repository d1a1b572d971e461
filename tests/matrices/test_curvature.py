"""Curvature products against dense float64 matrices (T1, T2, T3), and their invariances."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax
from curvax import trees
from tests import oracles, problems

EXACT = {
    "hessian": (curvax.hessian, oracles.dense_hessian),
    "ggn": (curvax.ggn, oracles.dense_ggn),
    "fisher": (curvax.fisher, oracles.dense_fisher),
    "empirical_fisher": (curvax.empirical_fisher, oracles.dense_empirical_fisher),
}


def close(actual, expected, rtol=1e-10):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(np.abs(expected).max(), 1e-300))


@functools.cache
def dense(kind, name):
    return np.asarray(EXACT[kind][1](*problems.problem(name)[1:]))


@functools.partial(jax.jit, static_argnames=("kind", "chunk_size"))
def made(kind, objective, params, batch, chunk_size=None):
    return EXACT[kind][0](objective.linearize(params, batch, chunk_size=chunk_size))


@jax.jit
def evaluated(matrix, u, v):
    """Everything cheap that a map answers."""
    return matrix.to_dense(), trees.ravel(matrix(v)), matrix.quadratic(v), matrix.bilinear(u, v)


def check_map(matrix, expected, like, rtol=1e-10):
    u, v = (trees.random_normal(jax.random.key(i), like) for i in (1, 2))
    flat_u, flat_v = np.asarray(trees.ravel(u)), np.asarray(trees.ravel(v))
    wanted = expected, expected @ flat_v, flat_v @ expected @ flat_v, flat_u @ expected @ flat_v
    for actual, value in zip(evaluated(matrix, u, v), wanted, strict=True):
        close(actual, value, rtol)


def trees_close(actual, expected, rtol=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    close(trees.ravel(actual), trees.ravel(expected), rtol)


def cases(names, first):
    """Every kind with every problem.

    The Fisher matrices differ from the Gauss-Newton matrix by what stands between J and J^T alone: in `make test` they
    meet the problems in ``first``, under `make test-all` the others.
    """
    return [
        pytest.param(
            kind, name, id=f"{kind}-{name}", marks=pytest.mark.slow if "fisher" in kind and name not in first else ()
        )
        for kind in EXACT
        for name in names
    ]


@pytest.mark.parametrize(("kind", "name"), cases(problems.PROBLEMS, ("mlp", "sequence", "poisson")))
def test_every_column_quadratic_and_bilinear_form_equals_the_dense_matrix(kind, name):
    problem = problems.problem(name)
    check_map(made(kind, *problem[1:]), dense(kind, name), problem.params)


@pytest.mark.parametrize(("kind", "name"), cases(["sequence", "two_terms", "weighted"], ("weighted",)))
def test_results_do_not_depend_on_the_chunk_size(kind, name):
    problem = problems.problem(name)
    # The chunks do not divide the batch; those of one term of "two_terms" are larger than its batch.
    chunked = made(kind, *problem[1:], chunk_size=2 if name == "sequence" else 4)
    check_map(chunked, dense(kind, name), problem.params)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_value_and_gradient_equal_automatic_differentiation_of_the_objective(name):
    _, objective, params, batch = problems.problem(name)
    loss, gradient = jax.jit(jax.value_and_grad(objective))(params, batch)
    for chunk_size in (None, 2):
        compute = jax.jit(lambda p, b, size=chunk_size: objective.value_and_grad(p, b, chunk_size=size)[:2])
        actual_loss, actual = compute(params, batch)
        close(actual_loss, loss)
        trees_close(actual, gradient)


def test_jacobian_products_agree_with_finite_differences_and_with_each_other():
    _, objective, params, batch = problems.problem("recurrent")
    model, step = objective.terms[0].model_fn, 1e-5

    @jax.jit
    def evaluate(params, batch):
        at = objective.linearize(params, batch)
        v = trees.random_normal(jax.random.key(0), params)
        u = trees.random_normal(jax.random.key(1), at.outputs)
        ahead = model(trees.add_scaled(params, step, v), batch[0])
        behind = model(trees.add_scaled(params, -step, v), batch[0])
        product, back = at.jacobian_product(v), at.jacobian_transpose_product(u)
        return product, (ahead - behind) / (2 * step), trees.vdot(u, product), trees.vdot(back, v)

    product, difference, forwards, backwards = evaluate(params, batch)
    close(product, difference, 1e-8)
    close(forwards, backwards)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_ggn_is_the_hessian_of_the_objective_of_the_linearised_model(name):
    """AD-9; for a loss whose matrix is not its Hessian the two must differ."""
    _, objective, params, batch = problems.problem(name)

    def linearised(term):
        def model(p, inputs):
            delta = trees.sub(p, params)
            return trees.add(*jax.jvp(lambda q: term.model_fn(q, inputs), (params,), (delta,)))

        return curvax.Term(**{**vars(term), "model_fn": model})

    linear = objective.replace(terms=tuple(map(linearised, objective.terms)))
    hessian, ggn = oracles.dense_hessian(linear, params, batch), dense("ggn", name)
    if name == "gaussian":
        assert np.abs(hessian - ggn).max() > 0.01 * np.abs(ggn).max()
    else:
        close(hessian, ggn)


@pytest.mark.parametrize("name", ["mlp", "recurrent", "tied", "poisson"])
def test_hessian_is_ggn_plus_the_residual_term(name):
    """AD-5: H = G + sum_i scale_i sum_j [grad_z L]_j Hess [f]_j."""
    _, objective, params, batch = problems.problem(name)
    loss, model = objective.terms[0].loss, objective.terms[0].model_fn

    @jax.jit
    def residual(params, batch):
        slope = loss.gradient(model(params, batch[0]), batch[1]) / batch[1].shape[0]
        return jax.hessian(lambda p: jnp.sum(slope * model(trees.unravel(p, params), batch[0])))(trees.ravel(params))

    close(dense("hessian", name), dense("ggn", name) + residual(params, batch))


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_ggn_equals_fisher_exactly_for_natural_losses(name):
    natural = all(term.loss.natural for term in problems.problem(name).objective.terms)
    assert natural == (name != "gaussian")
    close(dense("ggn", name), dense("fisher", name))


def test_ggn_differs_from_fisher_with_the_output_nonlinearity_in_the_model():
    """AD-7, AD-12: sigmoid in the model with squared error, softmax in the model with -sum y log z."""
    _, objective, params, batch = problems.problem("mlp")
    logits = objective.terms[0].model_fn
    targets = jax.nn.one_hot(batch[1], 3)
    log_loss = curvax.losses.from_function(lambda z, y: -jnp.sum(y * jnp.log(z)), convex=True)
    inside = curvax.Objective(lambda p, x: jax.nn.softmax(logits(p, x)), log_loss)
    ggn = jax.jit(lambda p, b: curvax.ggn(inside.linearize(p, b)).to_dense())(params, (batch[0], targets))
    assert np.abs(ggn - dense("fisher", "mlp")).max() > 0.05 * np.abs(ggn).max()
    assert np.linalg.eigvalsh(ggn).min() > -1e-12


@pytest.mark.parametrize("name", ["recurrent", "deep_linear", "poisson", "gaussian", "weighted", "sequence"])
def test_monte_carlo_fisher_converges_to_the_exact_one(name):
    """Along random directions, where the rare targets that make single entries heavy-tailed are mixed with others."""
    _, objective, params, batch = problems.problem(name)
    exact = dense("fisher", name)
    directions = [trees.random_normal(jax.random.key(i), params) for i in range(6)]

    @jax.jit
    @jax.vmap
    def draw(key):
        matrix = curvax.fisher(objective.linearize(params, batch), key=key, num_samples=2)
        return jnp.stack([matrix.quadratic(v) for v in directions])

    draws = np.asarray(draw(jax.random.split(jax.random.key(3), 4000)))
    expected = np.array([trees.ravel(v) @ exact @ trees.ravel(v) for v in directions])
    deviation = draws.std(0) / np.sqrt(len(draws))
    assert np.abs((draws.mean(0) - expected) / deviation).max() < 4.5
    assert (deviation < 0.05 * expected).all(), "too few draws to notice a bias"


def test_monte_carlo_fisher_does_not_depend_on_the_chunk_size_and_is_a_function_of_its_key():
    _, objective, params, batch = problems.problem("mlp")

    @functools.partial(jax.jit, static_argnames="chunk_size")
    def make(key, chunk_size=None):
        return curvax.fisher(
            objective.linearize(params, batch, chunk_size=chunk_size), key=key, num_samples=3
        ).to_dense()

    whole = make(jax.random.key(0))
    close(make(jax.random.key(0), chunk_size=4), whole)
    assert np.abs(make(jax.random.key(1)) - whole).max() > 1e-3 * np.abs(whole).max()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["gaussian", *(pytest.param(name, marks=SLOW) for name in ("sequence", "weighted", "two_terms"))]
)
def test_samples_have_the_covariance_of_the_map(name):
    problem = problems.problem(name)
    matrix = made("ggn", *problem[1:])
    for distribution in (trees.random_normal, trees.random_rademacher):
        draw = jax.jit(jax.vmap(lambda key, d=distribution: trees.ravel(matrix.sample(key, d))))
        draws = draw(jax.random.split(jax.random.key(0), 4000))
        expected = dense("ggn", name)
        products = np.einsum("ki,kj->kij", draws, draws)
        error = products.mean(0) - expected
        deviation = products.std(0) / np.sqrt(len(draws))
        seen = deviation > 1e-12
        assert np.abs(error[seen] / deviation[seen]).max() < 6
        assert np.linalg.norm(error) < 0.15 * np.linalg.norm(expected)
        chunked = made("ggn", *problem[1:], chunk_size=2)
        key = jax.random.key(5)
        sampled = jax.jit(lambda matrix, key, d=distribution: trees.ravel(matrix.sample(key, d)))(chunked, key)
        close(sampled, draw(key[None])[0])


@pytest.mark.parametrize("form", ["a difference", "twice negative", "in a sum", "scaled twice", "restricted"])
def test_samples_of_definite_maps_with_negative_scalars(form):
    """No part with a negative scalar has draws of its own, so that they are those of the whole."""
    matrix = made("ggn", *problems.problem("gaussian")[1:])
    forms = {
        "a difference": lambda: matrix - 0.75 * matrix,
        "twice negative": lambda: -(-0.25 * matrix),
        "in a sum": lambda: matrix + (0.25 * matrix - matrix),
        "scaled twice": lambda: matrix + 0.75 * (-matrix),
        "restricted": lambda: (matrix - 0.75 * matrix).restrict(matrix.structure),
    }
    whole = forms[form]()
    draws = jax.jit(jax.vmap(lambda key: trees.ravel(whole.sample(key))))(jax.random.split(jax.random.key(0), 4000))
    expected = dense("ggn", "gaussian") / 4
    assert np.linalg.norm(draws.T @ draws / len(draws) - expected) < 0.15 * np.linalg.norm(expected)


@pytest.mark.many_compilations("a map over a loader holds Python objects and runs outside of jit")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ggn", "weighted"),
        ("ggn", "two_terms"),
        ("fisher", "sequence"),
        ("hessian", "regularised"),
        ("empirical_fisher", "weighted"),
    ],
)
def test_unequal_batches_accumulate_to_the_matrix_of_all_of_them(kind, name):
    _, objective, params, batch = problems.problem(name)
    half = jax.tree.map(lambda leaf: leaf[:2], batch)
    rest = jax.tree.map(lambda leaf: leaf[2:], batch)
    v = trees.random_normal(jax.random.key(1), params)
    total = curvax.over_batches(EXACT[kind][0], objective, params, [half, rest])
    expected = dense(kind, name)
    close(trees.ravel(total(v)), expected @ trees.ravel(v))
    close(total.quadratic(v), trees.ravel(v) @ expected @ trees.ravel(v))
    close(total.bilinear(params, v), trees.ravel(params) @ expected @ trees.ravel(v))


def test_over_batches_refuses_what_it_cannot_read_twice():
    _, objective, params, batch = problems.problem("mlp")
    with pytest.raises(TypeError, match="pass a list or a loader"):
        curvax.over_batches(curvax.ggn, objective, params, iter([batch]))
    with pytest.raises(ValueError, match="no batches"):
        curvax.over_batches(curvax.ggn, objective, params, [])


def test_the_protocol_agrees_with_dense_linear_algebra():
    problem = problems.problem("regularised")
    expected = dense("ggn", "regularised")
    shifted = expected + 0.5 * np.eye(len(expected))
    v = trees.random_normal(jax.random.key(0), problem.params)
    flat = np.asarray(trees.ravel(v))
    block = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v)

    @jax.jit
    def evaluate(matrix, v, block):
        return {
            "solve": trees.ravel(matrix.solve(v, damping=0.5)),
            "logdet": matrix.logdet(damping=0.5),
            "trace": matrix.trace(),
            "diagonal": trees.ravel(matrix.diagonal()),
            "sqrt": trees.ravel(matrix.sqrt(v)),
            "inverse_sqrt": trees.ravel(matrix.inverse_sqrt(v, damping=0.5)),
            "block": jax.vmap(trees.ravel)(matrix.block(block)),
            "sum": (matrix + 2.0 * matrix).to_dense(),
            "multiple": (matrix * jnp.array(2.0)).trace(),
        }

    got = evaluate(made("ggn", *problem[1:]), v, block)
    values, vectors = np.linalg.eigh(expected)
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    close(got["solve"], np.linalg.solve(shifted, flat))
    close(got["logdet"], np.linalg.slogdet(shifted)[1])
    close(got["trace"], np.trace(expected))
    close(got["diagonal"], np.diag(expected))
    close(got["sqrt"], root @ flat, 1e-7)
    values, vectors = np.linalg.eigh(shifted)
    close(got["inverse_sqrt"], vectors @ (values**-0.5 * (vectors.T @ flat)))
    close(got["block"], np.stack([expected @ flat, 2 * expected @ flat]))
    close(got["sum"], 3 * expected)
    close(got["multiple"], 2 * np.trace(expected))


@pytest.mark.parametrize("kind", EXACT)
def test_restriction_is_the_principal_submatrix(kind):
    problem = problems.problem("mlp")
    part = [{"kernel": None, "bias": layer["bias"]} for layer in problem.params]
    keep = np.concatenate(
        [
            np.full(leaf.size, path.endswith("bias"))
            for path, leaf in zip(trees.leaf_paths(problem.params), jax.tree.leaves(problem.params), strict=True)
        ]
    )
    restricted = made(kind, *problem[1:]).restrict(part)
    check_map(restricted, dense(kind, "mlp")[np.ix_(keep, keep)], part)


@pytest.mark.parametrize("kind", EXACT)
def test_maps_pass_through_jit_vmap_scan_and_compile_once(kind):
    problem = problems.problem("mlp")
    expected, traces = dense(kind, "mlp"), []

    @jax.jit
    def product(matrix, vector):
        traces.append(1)
        return trees.ravel(matrix(vector))

    v = trees.random_normal(jax.random.key(1), problem.params)
    flat = np.asarray(trees.ravel(v))
    for _ in range(3):
        close(product(made(kind, *problem[1:]), v), expected @ flat)
    assert len(traces) == 1

    @jax.jit
    def vmapped_and_scanned(params, batch):
        def one(p):
            return trees.ravel(EXACT[kind][0](problem.objective.linearize(p, batch))(v))

        many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), params)
        matrix = EXACT[kind][0](problem.objective.linearize(params, batch))
        powers = jax.lax.scan(lambda x, _: (matrix(x), None), v, length=3)[0]
        return jax.vmap(one)(many), one(jax.tree.map(lambda leaf: leaf[1], many)), trees.ravel(powers)

    products, second, powers = vmapped_and_scanned(problem.params, problem.batch)
    close(products, [expected @ flat, second])
    close(powers, expected @ expected @ expected @ flat)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", EXACT)
def test_a_batch_sharded_over_eight_devices_gives_what_one_device_gives(kind, axis_type):
    objective = problems.problem("mlp").objective
    params = problems.problem("mlp").params
    batch = (jax.random.normal(jax.random.key(0), (16, 4)), jax.random.randint(jax.random.key(1), (16,), 0, 3))
    v = trees.random_normal(jax.random.key(2), params)

    def everything(params, batch, v):
        loss, gradient, at = objective.value_and_grad(params, batch)
        matrix = EXACT[kind][0](at)
        return loss, gradient, matrix(v), matrix.quadratic(v)

    expected = jax.jit(everything)(params, batch, v)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        replicate = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
        actual = jax.jit(everything)(replicate(params), sharded, replicate(v))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", EXACT)
def test_float32_products_are_accurate(kind):
    problem = problems.problem("mlp", dtype=jnp.float32)
    v = trees.random_normal(jax.random.key(1), problem.params)
    result = jax.jit(lambda o, params, batch, v: EXACT[kind][0](o.linearize(params, batch))(v))(*problem[1:], v)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    close(trees.ravel(result), dense(kind, "mlp") @ np.asarray(trees.ravel(v), np.float64), 3e-6)


def test_bfloat16_parameters_keep_their_dtype_and_losses_are_float32():
    problem = problems.problem("mlp", dtype=jnp.bfloat16)

    @jax.jit
    def evaluate(params, batch):
        loss, gradient, at = problem.objective.value_and_grad(params, batch)
        return loss, gradient, curvax.ggn(at)(gradient)

    loss, gradient, product = evaluate(problem.params, problem.batch)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((gradient, product))} == {jnp.dtype("bfloat16")}


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    examples=st.integers(1, 5),
    loss_name=st.sampled_from(["squared_error", "sigmoid_binary_cross_entropy", "softmax_cross_entropy", "poisson"]),
    container=st.sampled_from([list, tuple, lambda layers: {f"layer{i}": w for i, w in enumerate(layers)}]),
    l2=st.sampled_from([None, 0.0, 0.7]),
    seed=st.integers(0, 10_000),
)
def test_random_trees_shapes_and_losses(sizes, examples, loss_name, container, l2, seed):
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=shape) for shape in itertools.pairwise(sizes)]
    params = {"layers": container(weights), "nothing": None, "gain": generator.normal(size=())}
    params, v = jax.tree.map(np.asarray, params), jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), params)
    v = jax.tree.map(np.asarray, v)

    def model(params, x):
        layers = params["layers"]
        for w in layers.values() if isinstance(layers, dict) else layers:
            x = jnp.tanh(x) @ w
        return 3 * jnp.tanh(x * params["gain"] / 3)  # the oracle adds up counts to 200: no rate is to come near

    targets = generator.dirichlet(np.ones(sizes[-1]), examples)
    objective = curvax.Objective(model, getattr(curvax.losses, loss_name)(), l2=l2)
    batch = (generator.normal(size=(examples, sizes[0])), targets)

    @jax.jit
    def compute(params, batch, v):
        at = objective.linearize(params, batch)
        return [(make(at)(v), oracle(objective, params, batch)) for make, oracle in EXACT.values()]

    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(v)])
    for product, expected in compute(params, batch, v):
        # What cancels, as all does with one class, is of order one, and its rounding is left.
        scale = max(np.abs(expected).max(), 1e-5) * (1 + np.linalg.norm(flat))
        assert jax.tree.structure(product) == jax.tree.structure(params)
        got = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(product)])
        np.testing.assert_allclose(got, expected @ flat, rtol=0, atol=1e-10 * scale)
