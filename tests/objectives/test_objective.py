"""The objective: terms, weights, masks, penalty, aux, what has no value, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles


def linear(params, x):
    return x @ params["w"]


def squares(**options):
    return curvax.Objective(linear, curvax.losses.squared_error(), **options)


PARAMS = {"w": jnp.arange(6.0).reshape(3, 2) / 6}
BATCH = tuple(jnp.asarray(np.random.default_rng(0).normal(size=(5, n))) for n in (3, 2))
ERRORS = 0.5 * np.sum((np.asarray(BATCH[0]) @ np.asarray(PARAMS["w"]) - np.asarray(BATCH[1])) ** 2, axis=1)


def close(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=1e-14)


@jax.jit
def evaluated(objective, params, batch):
    """Loss and gradient by autodiff, and the Gauss-Newton matrix."""
    return *jax.value_and_grad(objective)(params, batch), curvax.ggn(objective.linearize(params, batch)).to_dense()


def test_it_is_the_mean_over_examples_of_the_sum_over_outputs():
    close(squares()(PARAMS, BATCH), ERRORS.mean())


def test_weights_multiply_and_masks_choose_and_count():
    weights, mask = np.array([1.0, 0.0, 2.0, 0.5, 3.0]), np.array([True, False, True, True, False])
    batch = {"pair": BATCH, "weights": weights, "mask": mask}
    options = {"select": lambda b: b["pair"]}
    weighted = squares(example_weights=lambda b: b["weights"], **options)
    close(evaluated(weighted, PARAMS, batch)[0], np.sum(weights * ERRORS) / 5)
    masked = evaluated(squares(mask=lambda b: b["mask"], **options), PARAMS, batch)
    close(masked[0], ERRORS[mask].mean())
    both = squares(mask=lambda b: b["mask"], example_weights=lambda b: b["weights"], **options)
    close(evaluated(both, PARAMS, batch)[0], np.sum(weights * mask * ERRORS) / 3)
    kept = np.asarray(BATCH[0])[mask]
    close(masked[2], np.kron(kept.T @ kept, np.eye(2)) / 3)


def test_a_mask_over_steps_makes_the_mean_over_steps():
    outputs = jnp.arange(24.0).reshape(2, 3, 4)
    mask = jnp.array([[True, True, False], [True, False, False]])
    objective = curvax.Objective(
        lambda p, x: p * x, curvax.losses.squared_error(), select=lambda b: (b[0], b[1]), mask=lambda b: b[2]
    )
    batch = (outputs, jnp.zeros_like(outputs), mask)
    close(objective(jnp.array(1.0), batch), 0.5 * np.sum(np.asarray(outputs)[np.asarray(mask)] ** 2) / 3)


def test_nothing_left_by_the_mask_is_zero_loss_and_zero_curvature():
    objective = squares(select=lambda b: b[0], mask=lambda b: b[1])
    loss, gradient, at = objective.value_and_grad(PARAMS, (BATCH, jnp.zeros(5, bool)))
    close(loss, 0)
    close(gradient["w"], np.zeros((3, 2)))
    close(curvax.ggn(at)(PARAMS)["w"], np.zeros((3, 2)))


def test_a_case_that_the_mask_leaves_out_may_have_an_infinite_loss():
    objective = curvax.Objective(
        lambda w, x: x * w, curvax.losses.poisson(), select=lambda b: b[0], mask=lambda b: b[1]
    )
    batch = ((np.array([[1.0], [2000.0]]), np.ones((2, 1))), np.array([True, False]))

    @jax.jit
    def compute(w, batch):
        loss, gradient, at = objective.value_and_grad(w, batch)
        maps = [curvax.hessian(objective.linearize(w, batch, chunk_size=size)) for size in (None, 1)]
        return loss, gradient, curvax.ggn(at).to_dense(), [(m.to_dense(), m.quadratic(w)) for m in maps]

    loss, gradient, ggn, hessians = compute(np.ones(1), batch)
    close(loss, np.e - 1)
    close(gradient, [np.e - 1])
    close(ggn, [[np.e]])
    for dense, quadratic in hessians:
        close(dense, [[np.e]])
        close(quadratic, np.e)


def test_padding_an_example_and_masking_it_changes_nothing():
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.full_like(leaf[:2], 7.0)]), BATCH)
    objective = squares(select=lambda b: b[0], mask=lambda b: b[1])
    actual = objective.value_and_grad(PARAMS, (padded, jnp.arange(7) < 5))
    expected = squares().value_and_grad(PARAMS, BATCH)
    close(actual[0], expected[0])
    close(actual[1]["w"], expected[1]["w"])


@pytest.mark.parametrize("mask", [None, lambda p: {"w": True, "b": False}, {"w": True, "b": False}])
def test_penalty_of_the_leaves_the_user_chooses(mask):
    params = {**PARAMS, "b": np.array([2.0, 3.0])}
    objective = curvax.Objective(lambda p, x: x @ p["w"] + p["b"], curvax.losses.squared_error(), l2=0.4, l2_mask=mask)
    plain = objective.replace(l2=None)
    norm = np.sum(np.asarray(params["w"]) ** 2) + (13.0 if mask is None else 0.0)
    with_penalty, without = (evaluated(o, params, BATCH) for o in (objective, plain))
    close(with_penalty[0] - without[0], 0.2 * norm, 1e-10)
    for name, penalised in (("w", True), ("b", mask is None)):
        close(with_penalty[1][name] - without[1][name], 0.4 * penalised * np.asarray(params[name]), 1e-10)
    close(with_penalty[2] - without[2], 0.4 * np.diag([float(mask is None)] * 2 + [1.0] * 6))


@pytest.mark.parametrize("marks", [(True, False), (False, True), (False, False)])
def test_penalised_leaves_may_be_narrower_than_the_others(marks):
    params = {"b": jnp.array([2.0, 3.0], jnp.float32), "w": jnp.asarray(PARAMS["w"], jnp.float64)}
    penalty = curvax.Objective(
        lambda p, x: x @ p["w"] + p["b"].astype(x.dtype),
        curvax.losses.squared_error(),
        l2=0.4,
        l2_mask=dict(zip("bw", marks, strict=True)),
    ).penalty
    squares = [np.sum(np.asarray(params[name], float) ** 2) * on for name, on in zip("bw", marks, strict=True)]
    close(penalty.value(params), 0.2 * sum(squares), 1e-6)
    close(penalty.inner_products(params, (params, params)), [0.4 * sum(squares)], 1e-6)


@pytest.mark.parametrize("make", [lambda leaf: jnp.array(leaf.ndim > 1), lambda leaf: 0.5, lambda leaf: leaf > 0])
def test_a_mask_of_the_penalty_that_is_no_bool_is_refused(make):
    objective = squares(l2=0.1, l2_mask=lambda params: jax.tree.map(make, params))
    with pytest.raises(TypeError, match=r"l2_mask\['w'\] is .*bool"):
        jax.jit(objective)(PARAMS, BATCH)


def test_strength_of_penalty_and_weight_of_a_term_are_traced_and_compile_once():
    traces = []
    term = curvax.Term(linear, curvax.losses.squared_error())

    @jax.jit
    def loss(objective):
        traces.append(1)
        return objective(PARAMS, BATCH)

    for l2, weight in ((0.0, 1.0), (0.5, 1.0), (0.5, 3.0)):
        weighted = dataclasses.replace(term, weight=jnp.array(weight))
        objective = curvax.Objective.from_terms(weighted, l2=jnp.array(l2))
        norm = np.sum(np.asarray(PARAMS["w"]) ** 2)
        close(loss(objective), weight * ERRORS.mean() + l2 / 2 * norm)
    assert len(traces) == 1


def test_aux_comes_out_of_the_same_pass():
    calls = []

    def model(params, x):
        calls.append(1)
        outputs = linear(params, x)
        return outputs, {"mean": jnp.mean(outputs)}

    objective = curvax.Objective(model, curvax.losses.squared_error(), has_aux=True)
    (loss, aux), gradient, _ = objective.value_and_grad(PARAMS, BATCH, has_aux=True)
    assert len(calls) == 1
    close(loss, ERRORS.mean())
    close(aux["mean"], np.mean(np.asarray(BATCH[0]) @ np.asarray(PARAMS["w"])))
    close(gradient["w"], evaluated(squares(), PARAMS, BATCH)[1]["w"])
    close(objective(PARAMS, BATCH), ERRORS.mean())
    with pytest.raises(ValueError, match="chunk"):
        objective.value_and_grad(PARAMS, BATCH, has_aux=True, chunk_size=2)
    with pytest.raises(ValueError, match="has_aux=True"):
        squares().value_and_grad(PARAMS, BATCH, has_aux=True)


def test_random_keys_and_statistics_travel_in_the_inputs_and_are_not_cut_up():
    def model(params, inputs):
        x, key, statistics = inputs
        noise = jax.random.normal(key, params["w"].shape)
        return (x - statistics["mean"]) @ (params["w"] + 0.1 * noise)

    inputs = (BATCH[0], jax.random.key(3), {"mean": jnp.ones(3)})
    objective = curvax.Objective(model, curvax.losses.squared_error(), example_axes=((0, None, None), 0))
    whole = objective.value_and_grad(PARAMS, (inputs, BATCH[1]))
    chunked = objective.value_and_grad(PARAMS, (inputs, BATCH[1]), chunk_size=2)
    close(chunked[0], whole[0])
    close(chunked[1]["w"], whole[1]["w"], 1e-10)
    one_axis = curvax.Objective(model, curvax.losses.squared_error())
    with pytest.raises(ValueError, match="example_axes"):
        one_axis.value_and_grad(PARAMS, (inputs, BATCH[1]), chunk_size=2)


def test_examples_on_another_axis_of_the_inputs():
    objective = curvax.Objective(lambda p, x: x.T @ p["w"], curvax.losses.squared_error(), example_axes=(1, 0))
    batch = (BATCH[0].T, BATCH[1])
    loss, gradient, _ = objective.value_and_grad(PARAMS, batch, chunk_size=2)
    close(loss, ERRORS.mean())
    close(gradient["w"], evaluated(squares(), PARAMS, BATCH)[1]["w"], 1e-10)


def test_batch_normalisation_couples_examples_and_is_differentiated_through():
    def model(params, x):
        x = x @ params["w"]
        return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3)

    objective = curvax.Objective(model, curvax.losses.squared_error())
    close(evaluated(objective, PARAMS, BATCH)[2], oracles.dense_ggn(objective, PARAMS, BATCH), 1e-9)


def test_curvature_without_a_loss_value():
    objective = curvax.Objective(linear, curvax.losses.curvature_only(curvax.losses.softmax_cross_entropy()))
    full = curvax.Objective(linear, curvax.losses.softmax_cross_entropy())
    labels = np.array([0, 1, 0, 1, 1])
    tx = curvax.scale_by_dense_curvature(damping=0.1)

    @jax.jit
    def compute(params, inputs):
        at = objective.linearize(params, (inputs, None))
        updates, _ = tx.update(params, tx.init(params), params, at=at)
        return curvax.ggn(at).to_dense(), curvax.fisher(at).to_dense(), trees.ravel(updates)

    ggn, fisher, updates = compute(PARAMS, BATCH[0])
    expected = np.asarray(oracles.dense_fisher(full, PARAMS, (BATCH[0], labels)))
    close(ggn, expected)
    close(fisher, expected)
    close(updates, np.linalg.solve(expected + 0.1 * np.eye(6), np.asarray(PARAMS["w"]).ravel()), 1e-9)
    for call in (
        lambda: objective(PARAMS, (BATCH[0], labels)),
        lambda: objective.value_and_grad(PARAMS, (BATCH[0], labels)),
    ):
        with pytest.raises(ValueError, match="curvature but no loss value"):
            call()
    with pytest.raises(ValueError, match="curvature only"):
        curvax.hessian(objective.linearize(PARAMS, (BATCH[0], None)))


def test_it_is_a_pytree_that_survives_a_round_trip():
    objective = squares(l2=0.1)
    leaves, treedef = jax.tree.flatten(objective)
    assert leaves == [1.0, 0.1]
    close(treedef.unflatten(leaves)(PARAMS, BATCH), objective(PARAMS, BATCH))
    assert "linear" in repr(objective)


BAD = {
    "integer parameters": (
        TypeError,
        r"params\['w'\] has dtype int32",
        lambda: squares()({"w": jnp.ones((3, 2), jnp.int32)}, BATCH),
    ),
    "complex parameters": (
        TypeError,
        "real and an imaginary leaf",
        lambda: squares().linearize({"w": jnp.ones((3, 2), jnp.complex64)}, BATCH),
    ),
    "an empty batch": (ValueError, "empty", lambda: squares()(PARAMS, (BATCH[0][:0], BATCH[1][:0]))),
    "a batch that is no pair": (TypeError, "pass select=", lambda: squares()(PARAMS, {"x": BATCH[0]})),
    "targets of another shape": (
        ValueError,
        r"must have shape \(5, 2\).*got \(5, 1\)",
        lambda: squares()(PARAMS, (BATCH[0], BATCH[1][:, :1])),
    ),
    "targets of another dtype": (
        TypeError,
        "floating-point, got int32",
        lambda: squares()(PARAMS, (BATCH[0], jnp.ones((5, 2), jnp.int32))),
    ),
    "too few targets": (ValueError, "5 examples", lambda: squares()(PARAMS, (BATCH[0], BATCH[1][:3]))),
    "a scalar output": (
        ValueError,
        "examples on axis 0",
        lambda: curvax.Objective(lambda p, x: jnp.sum(p["w"]), curvax.losses.squared_error())(PARAMS, BATCH),
    ),
    "weights of another shape": (
        ValueError,
        r"example_weights of shape \(4,\)",
        lambda: squares(example_weights=lambda b: jnp.ones(4))(PARAMS, BATCH),
    ),
    "a mask of numbers": (
        TypeError,
        "mask must be boolean",
        lambda: squares(mask=lambda b: jnp.ones(5))(PARAMS, BATCH),
    ),
    "a penalty mask of another structure": (
        ValueError,
        "l2_mask .*missing 'w'",
        lambda: squares(l2=1.0, l2_mask={"v": True})(PARAMS, BATCH),
    ),
    "a vector of another structure": (
        ValueError,
        "vector .*missing 'w'; surplus 'v'",
        lambda: curvax.ggn(squares().linearize(PARAMS, BATCH))({"v": PARAMS["w"]}),
    ),
    "a vector of another shape": (
        ValueError,
        r"vector\['w'\] has shape \(2, 3\)",
        lambda: curvax.hessian(squares().linearize(PARAMS, BATCH))({"w": PARAMS["w"].T}),
    ),
    "a key without a number of samples": (
        ValueError,
        "both key= and num_samples=",
        lambda: curvax.fisher(squares().linearize(PARAMS, BATCH), key=jax.random.key(0)),
    ),
    "no terms": (TypeError, "one or more curvax.Term", lambda: curvax.Objective.from_terms()),
    "a chunk of nothing": (ValueError, "must be positive", lambda: squares().linearize(PARAMS, BATCH, chunk_size=0)),
    "a misspelt replacement": (TypeError, "takes l2", lambda: squares().replace(l1=0.1)),
    "outputs of the whole batch from chunks": (
        ValueError,
        "without chunk_size",
        lambda: squares().linearize(PARAMS, BATCH, chunk_size=2).outputs,
    ),
    "a dense matrix of too many parameters": (
        ValueError,
        "limit 20,000",
        lambda: curvax.from_matvec(lambda v: v, jnp.zeros(20_001)).to_dense(),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_that_names_the_culprit(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_nan_in_the_batch_gives_nan_not_an_error():
    batch = (BATCH[0].at[0, 0].set(jnp.nan), BATCH[1])
    loss, gradient, at = squares().value_and_grad(PARAMS, batch)
    assert np.isnan(loss)
    assert np.isnan(gradient["w"]).any()
    assert np.isnan(jax.jit(lambda at: curvax.ggn(at).quadratic(PARAMS))(at))


@pytest.mark.parametrize("kind", ["labels", "one-hot", "steps"])
def test_cases_without_a_target_count_in_no_curvature(kind):
    """Hessian, Fisher matrix, its estimate and draws leave padding out as a mask does; rows of zeros count in N."""
    generator = np.random.default_rng(0)
    labels = jnp.array([0, -100, 2, -100, -100, 1] * 20)
    w, x = generator.normal(size=(4, 3)), generator.normal(size=(120, 4))
    loss = curvax.losses.softmax_cross_entropy(ignore_label=None if kind == "one-hot" else -100)
    targets = jax.nn.one_hot(labels, 3) if kind == "one-hot" else labels
    if kind == "steps":
        x, targets, labels = x.reshape(40, 3, 4), targets.reshape(40, 3), labels.reshape(40, 3)
    present = (labels >= 0) & (labels < 3)
    objective = curvax.Objective(lambda w, x: x @ w, loss)
    masked = curvax.Objective(lambda w, x: x @ w, loss, mask=lambda batch: present)
    tx = curvax.natural_gradient(max_iterations=20)

    @jax.jit
    def compute(w, batch):
        at, other = objective.linearize(w, batch), masked.linearize(w, batch)
        key = jax.random.key(0)
        sampled = curvax.fisher(at, key=key, num_samples=400).to_dense()
        drawn = curvax.tap(layers, at).sampled_cotangents(key)[0]
        _, gradient = at.value_and_gradient()
        _, state = tx.update(gradient, tx.init(w), w, at=at)
        maps = curvax.fisher(at), curvax.ggn(at), curvax.fisher(other)
        return [m.to_dense() for m in maps], sampled, drawn, state.info.skipped_steps

    layers = curvax.find_layers(objective, w, (x, targets))
    (fisher, ggn, other), sampled, drawn, skipped = compute(w, (x, targets))
    share = np.mean(np.asarray(present)) if kind == "one-hot" else 1
    np.testing.assert_allclose(fisher, share * np.asarray(other), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(fisher, ggn, rtol=1e-12, atol=1e-15)
    assert np.linalg.norm(sampled - fisher) < 0.1 * np.linalg.norm(fisher)
    assert np.all(np.any(np.asarray(drawn) != 0, axis=-1) == np.asarray(present))
    assert skipped == 0
