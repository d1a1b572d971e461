"""The Gram matrix and solves in the space of the samples, against dense matrices in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from benchmarks.operations import flops
from curvax import trees
from curvax.layers.sample_space import SampleSpace
from tests import oracles


def network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] * params[-1]["g"]


def setting(loss="softmax_cross_entropy", model=network, sizes=(3, 5, 4), count=6, **options):
    generator = np.random.default_rng(0)
    params = [
        {"w": jnp.asarray(generator.normal(size=shape)), "b": jnp.asarray(generator.normal(size=shape[1]))}
        for shape in itertools.pairwise(sizes)
    ]
    params[-1] = {"w": params[-1]["w"], "g": jnp.asarray(generator.normal(size=sizes[-1]))}
    inputs = jnp.asarray(generator.normal(size=(count, sizes[0])))
    targets = jnp.asarray(generator.integers(0, sizes[-1], count))
    if loss == "squared_error":
        targets = jnp.asarray(generator.normal(size=(count, sizes[-1])))
    return curvax.Objective(model, getattr(curvax.losses, loss)(), **options), params, (inputs, targets)


def recurrent(params, x):
    def step(h, _):
        return jnp.tanh(h @ params[0]["w"][:, :3] + params[0]["b"][:3]), None

    return jax.lax.scan(step, x, None, length=3)[0] @ params[0]["w"] @ params[-1]["w"] * params[-1]["g"]


@pytest.mark.parametrize(
    ("curvature", "oracle"),
    [
        (curvax.GaussNewton(), oracles.dense_ggn),
        (curvax.Fisher(), oracles.dense_fisher),
        (curvax.EmpiricalFisher(), oracles.dense_empirical_fisher),
    ],
    ids=["ggn", "fisher", "empirical_fisher"],
)
@pytest.mark.parametrize("model", [network, recurrent])
def test_the_gram_matrix_has_the_eigenvalues_of_the_curvature(curvature, oracle, model):
    weights = jnp.array([1.0, 0.5, 2.0, 1.0, 0.0, 3.0])
    objective, params, batch = setting(model=model, example_weights=lambda batch: weights)
    layers = curvax.find_layers(objective, params, batch)
    dense = oracle(objective, params, batch)

    @jax.jit
    def compute(params, batch):
        space = SampleSpace(curvax.tap(layers, objective.linearize(params, batch)), curvature)
        rows = jax.vmap(lambda v: space.project(trees.unravel(v, params)))(jnp.eye(len(dense))).T
        lifted = jax.vmap(lambda y: trees.ravel(space.lift(y)))(jnp.eye(space.num_rows))
        products = jax.vmap(space.gram_product())(jnp.eye(space.num_rows))
        return space.gram(), rows, lifted, products, curvax.gram(space.tapped, curvature=curvature)

    gram, rows, lifted, products, public = map(np.asarray, compute(params, batch))
    np.testing.assert_allclose(rows.T @ rows, dense, atol=1e-12)
    np.testing.assert_allclose(public, gram, atol=1e-12)
    np.testing.assert_allclose(lifted, rows, atol=1e-12)
    np.testing.assert_allclose(gram, rows @ rows.T, atol=1e-12)
    np.testing.assert_allclose(products, rows @ rows.T, atol=1e-12)


def updated(tx, objective, params, batch, updates=None, state=None):
    """The updates of one step, the state behind it and the gradient, all in one program."""

    @jax.jit
    def step(params, batch, updates, state):
        _, gradient, at = objective.value_and_grad(params, batch)
        state = tx.init(params) if state is None else state
        return *tx.update(gradient if updates is None else updates, state, params, at=at), gradient

    return step(params, batch, updates, state)


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_solves_are_those_of_the_dense_system(method):
    objective, params, batch = setting()
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    vector = jax.tree.map(lambda p: np.cos(np.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    tx = curvax.scale_by_sample_space(damping=0.01, method=method, max_iterations=200, tolerance=1e-13)
    solution, state, _ = updated(tx, objective, params, batch, vector)
    truth = np.linalg.solve(dense + 0.01 * np.eye(len(dense)), flat(vector))
    np.testing.assert_allclose(flat(solution), truth, rtol=1e-8, atol=1e-9)
    assert (int(state.info.inner_iterations) == 0) == (method == "cholesky")


def test_single_precision_is_as_good_as_its_condition_allows():
    objective, params, batch = setting()
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    params32, inputs32 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (params, batch[0]))
    tx = curvax.scale_by_sample_space(damping=1e-3)
    solution, _, gradient = updated(tx, objective, params32, (inputs32, batch[1]))
    assert {leaf.dtype for leaf in jax.tree.leaves(solution)} == {jnp.dtype("float32")}
    truth = np.linalg.solve(dense + 1e-3 * np.eye(len(dense)), flat(gradient).astype(float))
    assert np.linalg.norm(flat(solution) - truth) < 1e-3 * np.linalg.norm(truth)


def test_momentum_is_springs_nearest_solution():
    """delta_k minimises |R delta - b|^2 + lambda |delta - mu delta_{k-1}|^2, where g = R^T b."""
    objective, params, batch = setting()
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))
    damped = dense + 0.1 * np.eye(len(dense))
    tx = curvax.scale_by_sample_space(damping=0.1, momentum=0.9)
    state, last = None, np.zeros(len(dense))
    for _ in range(3):
        result, state, gradient = updated(tx, objective, params, batch, None, state)
        last = np.linalg.solve(damped, flat(gradient) + 0.1 * 0.9 * last)
        np.testing.assert_allclose(flat(result), last, rtol=1e-9, atol=1e-10)


def test_masked_parameters_are_left_out_of_the_curvature():
    objective, params, batch = setting()
    mask = [{"w": True, "b": False}, {"w": True, "g": False}]
    tx = optax.masked(curvax.scale_by_sample_space(damping=0.05), mask)
    result, _, gradient = updated(tx, objective, params, batch)
    kept = flat(jax.tree.map(lambda p, m: np.full(p.size, m), params, mask))
    dense = np.asarray(oracles.dense_ggn(objective, params, batch))[np.ix_(kept, kept)]
    truth = np.linalg.solve(dense + 0.05 * np.eye(len(dense)), flat(gradient)[kept])
    np.testing.assert_allclose(flat(result)[kept], truth, rtol=1e-8)
    np.testing.assert_array_equal(flat(result)[~kept], flat(gradient)[~kept])


def test_parameters_without_structure_keep_their_updates_if_that_was_chosen():
    def model(params, x):
        return x @ params["w"] * jnp.exp(params["t"])

    objective = curvax.Objective(model, curvax.losses.squared_error())
    params, batch = {"w": np.ones((3, 2)), "t": np.ones(())}, (np.eye(3), np.ones((3, 2)))
    with pytest.raises(ValueError, match="no structure was found for t"):
        updated(curvax.scale_by_sample_space(), objective, params, batch)
    layers = curvax.find_layers(objective, params, batch, fallback="gradient")
    result, _, gradient = updated(curvax.scale_by_sample_space(layers), objective, params, batch)
    np.testing.assert_array_equal(result["t"], gradient["t"])
    # The model is linear in w, and each of its two outputs has a column of w to itself.
    dense = np.kron(np.e**2 * np.eye(3) / 3, np.eye(2))
    truth = np.linalg.solve(dense + 1e-3 * np.eye(6), flat(gradient["w"]))
    np.testing.assert_allclose(flat(result["w"]), truth, rtol=1e-6)


def test_misuse_is_explained():
    objective, params, batch = setting()
    tapped = curvax.tap(curvax.find_layers(objective, params, batch), objective.linearize(params, batch))
    with pytest.raises(TypeError, match=r"sample space: curvature= takes a value.*got Hessian\(\)"):
        curvax.gram(tapped, curvature=curvax.Hessian())
    with pytest.raises(TypeError, match=r"scale_by_sample_space: curvature= takes a value.*got 'ggn'"):
        curvax.scale_by_sample_space(curvature="ggn")


def test_a_step_costs_at_most_15_of_adams():
    """235k parameters, a batch of 256, ten outputs; counted operations with every iteration that is allowed."""
    sizes = (784, 256, 128, 10)
    single = jnp.float32
    params = [
        {"w": jax.ShapeDtypeStruct(shape, single), "b": jax.ShapeDtypeStruct(shape[1:], single)}
        for shape in itertools.pairwise(sizes)
    ]

    def model(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    batch = (jax.ShapeDtypeStruct((256, 784), single), jax.ShapeDtypeStruct((256,), jnp.int32))
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
    tx, adam = curvax.scale_by_sample_space(), optax.adam(1e-3)

    def step(params, state, batch):
        loss, gradient, at = objective.value_and_grad(params, batch)
        updates, state = tx.update(gradient, state, params, at=at)
        return optax.apply_updates(params, updates), state, loss

    def adam_step(params, state, batch):
        loss, gradient = jax.value_and_grad(objective)(params, batch)
        updates, state = adam.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    with jax.numpy_dtype_promotion("standard"):
        ours = flops(step, params, jax.eval_shape(tx.init, params), batch, while_trip_count=40)
        theirs = flops(adam_step, params, jax.eval_shape(adam.init, params), batch)
    assert ours / theirs <= 15


def test_a_physics_informed_network_is_solved_in_the_space_of_its_residuals():
    """u'' = -sin on (0, pi), u = 0 at both ends: residuals hold second derivatives of the network in its input."""

    def u(params, x):
        return jnp.tanh(x * params["w1"] + params["b1"]) @ params["w2"]

    def residual(params, x):
        second = jax.vmap(jax.grad(jax.grad(lambda point: u(params, point))))(x)
        return (second + jnp.sin(x))[:, None]

    def boundary(params, x):
        return jax.vmap(lambda point: u(params, point))(x)[:, None]

    loss = curvax.losses.squared_error()
    objective = curvax.Objective.from_terms(
        curvax.Term(residual, loss, select=lambda batch: (batch["inside"], jnp.zeros((12, 1)))),
        curvax.Term(boundary, loss, select=lambda batch: (batch["ends"], jnp.zeros((2, 1))), weight=10.0),
    )
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.normal(size=16)) for name in ("w1", "b1", "w2")}
    batch = {"inside": np.linspace(0.1, 3.0, 12), "ends": np.array([0.0, np.pi])}
    tx = optax.chain(
        curvax.scale_by_sample_space(damping=1e-6),
        optax.scale(-1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
    )

    @jax.jit
    def step(params, state):
        loss, gradient, at = objective.value_and_grad(params, batch)
        line = {"value": loss, "grad": gradient, "value_fn": lambda p, at=None: objective(p, batch)}
        updates, state = tx.update(gradient, state, params, at=at, **line)
        return optax.apply_updates(params, updates), state, loss

    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers of two widths
        state, losses = jax.jit(tx.init)(params), []
        for _ in range(30):
            params, state, value = step(params, state)
            losses.append(float(value))
    assert losses[-1] < 1e-6 * losses[0]
    points = np.linspace(0.2, 2.9, 7)
    np.testing.assert_allclose(jax.jit(boundary)(params, points)[:, 0], np.sin(points), atol=0.02)


@pytest.mark.parametrize(("fallback", "expected"), [("diagonal", None), ("gradient", 1.0)])
def test_parameters_without_structure_go_without_momentum(fallback, expected):
    objective = curvax.Objective(lambda p, x: (x @ p["w"]) * jnp.exp(p["s"]), curvax.losses.squared_error())
    params, batch = {"w": jnp.ones((2, 1)), "s": jnp.array(0.1)}, (jnp.eye(2), jnp.zeros((2, 1)))
    layers = curvax.find_layers(objective, params, batch, fallback=fallback)
    tx = curvax.scale_by_sample_space(layers, momentum=0.9, damping=1e-3)
    at, gradient = objective.linearize(params, batch), jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def run(at):
        def step(state, _):
            updates, state = tx.update(gradient, state, params, at=at)
            return state, updates["s"]

        return jax.lax.scan(step, tx.init(params), length=30)[1]

    updates = run(at)
    np.testing.assert_allclose(updates, updates[0], rtol=1e-9)
    if expected is not None:
        assert updates[0] == expected
