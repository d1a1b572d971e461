"""Curvature points and maps as values: they cross jit, wrappers and frameworks; and the penalty that they hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import curvax
from curvax import trees
from curvax.objectives.penalty import Penalty
from tests import oracles, problems


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def with_aux(params, x):
    return network(params, x), {"mean": jnp.mean(x)}


LOSS = curvax.losses.squared_error()
PARAMS = {
    name: np.random.default_rng(i).normal(size=s) for i, (name, s) in enumerate({"w": (3, 4), "v": (4, 2)}.items())
}
BATCH = tuple(np.random.default_rng(2).normal(size=(5, n)) for n in (3, 2))
TERMS = [curvax.Term(network, LOSS), curvax.Term(lambda p, x: x @ p["w"] @ p["v"], LOSS, weight=0.5)]
OBJECTIVES = {
    "one term": (curvax.Objective(network, LOSS), {}),
    "in chunks": (curvax.Objective(network, LOSS), {"chunk_size": 2}),
    "l2": (curvax.Objective(network, LOSS, l2=0.3, l2_mask={"w": True, "v": False}), {}),
    "l2 in chunks": (curvax.Objective(network, LOSS, l2=0.3), {"chunk_size": 3}),
    "two terms": (curvax.Objective.from_terms(*TERMS), {}),
    "aux": (curvax.Objective(with_aux, LOSS, has_aux=True), {}),
    "weights and mask": (
        curvax.Objective(
            network, LOSS, example_weights=lambda b: jnp.arange(5.0), mask=lambda b: jnp.array([True] * 4 + [False])
        ),
        {},
    ),
}
MAKERS = {
    "ggn": (curvax.ggn, oracles.dense_ggn),
    "hessian": (curvax.hessian, oracles.dense_hessian),
    "empirical_fisher": (curvax.empirical_fisher, oracles.dense_empirical_fisher),
}


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def moved(step):
    """Other values of the same shapes, as the next step of training has them."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * step, PARAMS), jax.tree.map(lambda leaf: leaf - 0.1 * step, BATCH)


class Traces:
    """A function under jit that counts how often it is traced."""

    def __init__(self, function):
        self.count = 0

        def counted(*args):
            self.count += 1
            return function(*args)

        self.call = jax.jit(counted)


@pytest.mark.parametrize("setting", OBJECTIVES)
def test_a_point_made_eagerly_and_used_in_a_program_is_traced_once(setting):
    objective, options = OBJECTIVES[setting]
    use = Traces(lambda at: (at.loss, curvax.ggn(at).to_dense()))
    for step in range(3):
        params, batch = moved(step)
        loss, gradient, at = objective.value_and_grad(params, batch, **options)
        got = use.call(at)
        np.testing.assert_allclose(got[0], loss, rtol=1e-12)
        np.testing.assert_allclose(got[1], oracles.dense_ggn(objective, params, batch), rtol=0, atol=1e-10)
        truth = jax.jit(jax.value_and_grad(objective))(params, batch)
        np.testing.assert_allclose(loss, truth[0], rtol=1e-12)
        np.testing.assert_allclose(flat(gradient), flat(truth[1]), rtol=1e-9, atol=1e-12)
    assert use.count == 1


@pytest.mark.parametrize("setting", ["one term", "in chunks", "two terms"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_map_made_eagerly_and_used_in_a_program_is_traced_once(kind, setting):
    objective, options = OBJECTIVES[setting]
    make, oracle = MAKERS[kind]
    product = Traces(lambda matrix, v: trees.ravel(matrix(v)))
    for step in range(3):
        params, batch = moved(step)
        got = product.call(make(objective.linearize(params, batch, **options)), PARAMS)
        np.testing.assert_allclose(got, oracle(objective, params, batch) @ flat(PARAMS), rtol=0, atol=1e-10)
    assert product.count == 1


@pytest.mark.parametrize("setting", OBJECTIVES)
def test_a_point_made_in_one_program_and_used_in_another_is_traced_once(setting):
    objective, options = OBJECTIVES[setting]
    make = Traces(lambda params, batch: objective.value_and_grad(params, batch, **options)[1:])
    tx = curvax.natural_gradient(max_iterations=2)
    state = tx.init(PARAMS)
    use = Traces(lambda grads, state, params, at: tx.update(grads, state, params, at=at))
    results = []
    for step in range(3):
        params, batch = moved(step)
        gradient, at = make.call(params, batch)
        results.append(use.call(gradient, state, params, at)[0])
        alone = jax.jit(
            lambda p, b: tx.update(objective.value_and_grad(p, b)[1], state, p, at=objective.linearize(p, b))
        )
        np.testing.assert_allclose(flat(results[-1]), flat(alone(params, batch)[0]), rtol=1e-7, atol=1e-10)
    assert (make.count, use.count) == (1, 1)


def test_another_strength_of_the_penalty_is_another_number_and_no_new_program():
    objective = curvax.Objective(network, LOSS, l2=0.1)
    use = Traces(lambda at: trees.ravel(curvax.ggn(at).diagonal()))
    diagonals = [np.asarray(use.call(objective.replace(l2=l2).linearize(PARAMS, BATCH))) for l2 in (0.0, 0.5, 2.0)]
    assert use.count == 1
    np.testing.assert_allclose(np.diff(diagonals, axis=0), [[0.5] * 20, [1.5] * 20], rtol=1e-9)


def test_a_point_holds_what_it_was_made_from():
    objective, _ = OBJECTIVES["aux"]
    at = objective.linearize(PARAMS, BATCH)
    np.testing.assert_array_equal(flat(at.params), flat(PARAMS))
    np.testing.assert_allclose(at.outputs, np.tanh(BATCH[0] @ PARAMS["w"]) @ PARAMS["v"], rtol=1e-12)
    np.testing.assert_allclose(at.aux["mean"], BATCH[0].mean(), rtol=1e-12)
    step = {"w": None, "v": np.ones((4, 2))}

    @jax.jit
    def losses(at):
        return at.loss_along(step), at.loss_at({"w": PARAMS["w"], "v": PARAMS["v"] + 1})

    along, there = losses(at)
    outputs = np.tanh(BATCH[0] @ PARAMS["w"]) @ (PARAMS["v"] + 1)
    np.testing.assert_allclose(there, 0.5 * np.sum((outputs - BATCH[1]) ** 2) / 5, rtol=1e-12)
    np.testing.assert_allclose(along, there, rtol=1e-12)
    assert objective.linearize(PARAMS, BATCH, chunk_size=2).aux is None


# Models and inputs that jit cannot take as arguments


@dataclasses.dataclass
class Scaled:
    """A model with an array in it: it has no hash, and two of them cannot be compared."""

    scale: np.ndarray

    def __call__(self, params, x):
        return x * self.scale @ params["w"] @ params["v"]


def test_models_that_cannot_be_hashed_work_eagerly():
    w, v = PARAMS["w"], PARAMS["v"]
    for scale in (np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 1.0])):
        loss, gradient, at = curvax.Objective(Scaled(scale), LOSS).value_and_grad(PARAMS, BATCH)
        x = BATCH[0] * scale
        residual = (x @ w @ v - BATCH[1]) / 5
        np.testing.assert_allclose(loss, 2.5 * np.sum(residual**2), rtol=1e-12)
        np.testing.assert_allclose(gradient["w"], x.T @ residual @ v.T, rtol=1e-10)
        np.testing.assert_allclose(gradient["v"], (x @ w).T @ residual, rtol=1e-10)
        np.testing.assert_allclose(at.outputs, x @ w @ v, rtol=1e-12)


@pytest.mark.many_compilations("what Python has to read keeps the model out of jit")
@pytest.mark.parametrize("flag", [True, False, np.True_, "double", "plain"])
def test_a_flag_or_a_name_among_the_inputs_is_for_python_to_read(flag):
    def model(params, inputs):
        x, flag = inputs
        return network(params, 2 * x if flag in (True, np.True_, "double") else x)

    objective = curvax.Objective(model, LOSS, example_axes=((0, None), 0))
    factor = 2 if flag in (True, np.True_, "double") else 1
    plain, scaled = curvax.Objective(network, LOSS), (factor * BATCH[0], BATCH[1])
    loss, gradient, at = objective.value_and_grad(PARAMS, ((BATCH[0], flag), BATCH[1]))
    truth, true_gradient = jax.jit(jax.value_and_grad(plain))(PARAMS, scaled)
    np.testing.assert_allclose(loss, truth, rtol=1e-12)
    np.testing.assert_allclose(flat(gradient), flat(true_gradient), rtol=1e-10)
    product = flat(curvax.ggn(at)(PARAMS))
    np.testing.assert_allclose(product, oracles.dense_ggn(plain, PARAMS, scaled) @ flat(PARAMS), rtol=1e-9)


# flax's nnx, which takes the containers of pytrees apart


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.norm(self.first(x))))


def nnx_setting():
    module = Net(nnx.Rngs(0))
    functional = curvax.nnx.functional(module)
    objective = curvax.Objective(functional.model_fn, LOSS, has_aux=True, example_axes=functional.example_axes)
    data, targets = (np.asarray(leaf, np.float32) for leaf in BATCH)
    return module, functional.params, objective, ((data, functional.rest), targets)


TRANSFORMATIONS = {
    "natural_gradient": lambda: curvax.natural_gradient(max_iterations=2),
    "curveball": lambda: curvax.curveball(),
    "hessian_free": lambda: curvax.hessian_free(max_iterations=3),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_nnx_takes_a_point_apart_and_nothing_changes(name):
    with jax.numpy_dtype_promotion("standard"):
        module, params, objective, batch = nnx_setting()
        tx = TRANSFORMATIONS[name]()

        @jax.jit
        def step(params, batch):
            _, gradient, at = objective.value_and_grad(params, batch)
            return gradient, at, *tx.update(gradient, tx.init(params), params, at=at)

        gradient, at, updates, _ = step(params, batch)
        pure = jax.jit(lambda gradient, params, at: tx.update(gradient, tx.init(params), params, at=at))
        # What nnx.Optimizer.update does to all its arguments.
        as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # its name until flax 0.12.6
        taken_apart = pure(*(as_pure(argument) for argument in (gradient, params, at)))[0]
        np.testing.assert_allclose(flat(taken_apart), flat(updates), rtol=1e-5, atol=1e-6)

        assert np.linalg.norm(flat(updates)) > 1e-4

        @nnx.jit
        def train(module, batch):
            optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
            _, gradient, at = objective.value_and_grad(nnx.state(module, nnx.Param), batch)
            optimizer.update(module, gradient, at=at)

        expected = flat(params) + flat(updates)
        train(module, batch)
        np.testing.assert_allclose(flat(nnx.state(module, nnx.Param)), expected, rtol=1e-5, atol=1e-6)


# The penalty


@pytest.mark.parametrize(
    ("mask", "on"),
    [
        (None, (True, True)),
        ({"v": True, "w": False}, (True, False)),
        (lambda params: {name: leaf.shape[0] == 3 for name, leaf in params.items()}, (False, True)),
    ],
    ids=["none", "pytree", "function"],
)
def test_the_penalty_is_half_the_squared_norm_of_the_chosen_leaves(mask, on):
    penalty = Penalty.of(0.4, mask)
    value, gradient, curvature = jax.jit(
        lambda penalty, params: (penalty.value(params), penalty.gradient(params), penalty.curvature(params))
    )(penalty, PARAMS)
    chosen = dict(zip(("v", "w"), on, strict=True))
    np.testing.assert_allclose(value, 0.2 * sum(np.sum(PARAMS[k] ** 2) for k, use in chosen.items() if use), rtol=1e-12)
    for name, use in chosen.items():
        np.testing.assert_allclose(gradient[name], 0.4 * use * PARAMS[name], rtol=1e-12)
        np.testing.assert_allclose(curvature[name], 0.4 * use, rtol=1e-12)


def test_no_penalty_is_false_and_nothing():
    penalty = Penalty.of(None, {"w": True, "v": True})
    assert not penalty
    assert Penalty.of(0.0, None)  # a strength that is zero now may be traced
    assert penalty.value(PARAMS) == 0
    assert not flat(penalty.gradient(PARAMS)).any()
    assert not flat(penalty.curvature(PARAMS)).any()


def test_penalties_of_equal_masks_and_traced_strengths_compile_once():
    value = Traces(lambda penalty: penalty.value(PARAMS))
    for l2 in (jnp.array(0.0), jnp.array(0.5), jnp.array(3.0)):
        # The mask is made anew each time, once of numpy's bools.
        mask = {"w": True, "v": False} if l2 > 0 else {"w": np.True_, "v": np.False_}
        np.testing.assert_allclose(value.call(Penalty.of(l2, mask)), l2 / 2 * np.sum(PARAMS["w"] ** 2), rtol=1e-12)
    assert value.count == 1
    value.call(Penalty.of(jnp.array(0.5), {"w": True, "v": True}))
    assert value.count == 2


def test_a_penalty_changes_value_gradient_and_matrix_of_a_point_by_its_own():
    problem = problems.problem("regularised")
    plain = problem.objective.replace(l2=None)

    @jax.jit
    def compute(objective, params, batch):
        loss, gradient, at = objective.value_and_grad(params, batch)
        return at.loss, loss, trees.ravel(gradient), curvax.ggn(at).to_dense(), curvax.hessian(at).to_dense()

    penalised, bare = (compute(o, problem.params, problem.batch) for o in (problem.objective, plain))
    on = flat(jax.tree.map(lambda leaf: np.full(leaf.shape, float(leaf.ndim > 1)), problem.params))
    theta = flat(problem.params)
    differences = [np.asarray(a) - np.asarray(b) for a, b in zip(penalised, bare, strict=True)]
    half = 0.15 * np.sum(on * theta**2)
    for got, expected in zip(differences, (half, half, 0.3 * on * theta, *[0.3 * np.diag(on)] * 2), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_a_point_can_be_given_another_penalty():
    at = curvax.Objective(network, LOSS).linearize(PARAMS, BATCH)
    penalised = dataclasses.replace(at, penalty=Penalty.of(2.0, None))
    losses = jax.jit(lambda *points: [point.loss for point in points])(at, penalised)
    np.testing.assert_allclose(losses[1] - losses[0], np.sum(flat(PARAMS) ** 2), rtol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("l2", [None, 0.3])
def test_the_gradient_at_other_parameters_is_that_of_a_point_there(l2, chunk_size):
    objective = curvax.Objective.from_terms(*TERMS, l2=l2)
    moved = {"w": PARAMS["w"], "v": PARAMS["v"] + 1}

    @jax.jit
    def compute(params, moved, batch):
        at = objective.linearize(params, batch, chunk_size=chunk_size)
        return at.gradient_at(moved), at.loss_at(moved)

    gradient, loss = compute(PARAMS, moved, BATCH)
    value, expected = jax.jit(jax.value_and_grad(lambda p: oracles.value(objective, p, BATCH)))(moved)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    for name, leaf in gradient.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-12, atol=1e-14)
