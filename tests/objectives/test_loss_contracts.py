"""What every loss promises beside its formulas: dtypes, jit, vmap, errors; losses from functions or without value."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special

import curvax
from curvax import losses

RNG = np.random.default_rng(0)
Z, STEPS = RNG.normal(size=(3, 2)), RNG.normal(size=(2, 2, 3))
LABELS, PROBABILITIES = np.array([1, 0, -1]), special.softmax(RNG.normal(size=(2, 2, 3)), axis=-1)
CASES = {
    "squared_error": (losses.squared_error(), STEPS, STEPS[::-1]),
    "sigmoid": (losses.sigmoid_binary_cross_entropy(), STEPS, STEPS > 0.1),
    "softmax_labels": (losses.softmax_cross_entropy(), Z, LABELS),
    "softmax": (losses.softmax_cross_entropy(), STEPS, PROBABILITIES),
    "poisson": (losses.poisson(), Z, np.array([[0, 3], [2, 0], [0, 1]])),
    "gaussian": (losses.gaussian(), (Z, Z[::-1]), Z + 1),
    "gaussian_exact": (losses.gaussian("exact"), (Z, Z[::-1]), Z + 1),
    "tukey": (losses.tukey_biweight(1.3), STEPS, STEPS[::-1]),
    "welsch": (losses.welsch(0.8), STEPS, STEPS[::-1]),
    "geman_mcclure": (losses.geman_mcclure(0.8), STEPS, STEPS[::-1]),
    "bounded_labels": (losses.bounded_softmax(), Z, LABELS),
    "bounded": (losses.bounded_softmax(), STEPS, PROBABILITIES),
}
BOUNDED = ("tukey", "welsch", "geman_mcclure", "bounded_labels", "bounded")  # no negative log-densities
every_loss = pytest.mark.parametrize("name", CASES)


def dense(matrix, like):
    flat, unravel = ravel_pytree(like)
    return jax.vmap(lambda e: ravel_pytree(matrix.product(unravel(e)))[0], out_axes=1)(jnp.eye(flat.size))


@functools.partial(jax.jit, static_argnums=0)
def measure(loss, outputs, targets):
    return {
        "value": loss.value(outputs, targets),
        "gradient": loss.gradient(outputs, targets),
        "hessian": dense(loss.hessian(outputs, targets), outputs),
        "curvature": dense(loss.curvature(outputs, targets), outputs),
        "decrement": loss.squared_newton_decrement(outputs, targets),
    }


@functools.partial(jax.jit, static_argnums=0)
def derivatives_of_each_example(function, outputs, targets):
    def of_one(output, target):
        flat, unravel = ravel_pytree(output)
        return jax.grad(lambda z: function(unravel(z), target))(flat), jax.hessian(
            lambda z: function(unravel(z), target)
        )(flat)

    return jax.vmap(of_one)(outputs, targets)


def close(got, expected, rtol=1e-11, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, expected)


# Losses from functions


def bernoulli_of_one(p, y):
    """Cross-entropy with the sigmoid left in the model: the outputs are probabilities."""
    return -jnp.sum(jnp.where(y, jnp.log(p), jnp.log1p(-p)))


def tanh_of_one(z, y):
    return jnp.sum((y - jnp.tanh(z)) ** 2) / 2


def of_pytrees(z, y):
    """Not convex, with outputs and targets that are dictionaries."""
    return jnp.sum(jnp.cos(z["a"]) * z["b"] * y["c"]) + z["b"] ** 2 * y["d"][0]


BERNOULLI = losses.from_function(bernoulli_of_one, convex=True, sample=jax.random.bernoulli)


def test_with_the_sigmoid_in_the_model_curvature_is_not_the_fisher_matrix():
    z = np.array([[0.4], [-1.0], [0.4], [-1.0]])
    p, y = special.expit(z), np.array([[True], [True], [False], [False]])
    measured = measure(BERNOULLI, p, y)
    entries = np.where(y, 1 / p**2, 1 / (1 - p) ** 2)
    close(measured["curvature"], np.diag(entries.ravel()))
    fisher = 1 / (p * (1 - p))
    assert np.all(np.abs(entries / fisher - 1) > 0.1)
    squares = np.square(measured["gradient"])
    close(p[:2] * squares[:2] + (1 - p[2:]) * squares[2:], fisher[:2])
    close(p[:2] * entries[:2] + (1 - p[2:]) * entries[2:], fisher[:2])
    with pytest.raises(ValueError, match="no Fisher matrix in closed form; pass key= and num_samples="):
        BERNOULLI.fisher(p)


@pytest.mark.many_compilations("output matrices are called one product at a time")
@pytest.mark.parametrize(
    ("curvature", "treat"),
    [("exact", lambda values: values), ("absolute", np.abs), ("clipped", lambda values: np.maximum(values, 0))],
    ids=["exact", "absolute", "clipped"],
)
@pytest.mark.parametrize("function", [tanh_of_one, of_pytrees])
def test_treatments_of_a_loss_that_is_not_convex(curvature, treat, function):
    rng = np.random.default_rng(1)
    if function is tanh_of_one:
        z, y = 2 * rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    else:
        z = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
        y = {"c": rng.normal(size=(3, 2)), "d": [rng.normal(size=3)]}
    loss = losses.from_function(function, convex=False, curvature=curvature)
    loss.check(z, y)
    measured = measure(loss, z, y)
    gradients, hessians = (np.asarray(x) for x in derivatives_of_each_example(function, z, y))
    values, vectors = np.linalg.eigh(hessians)
    treated = np.einsum("nij,nj,nkj->nik", vectors, treat(values), vectors)
    assert values.min() < -1e-3
    for i in range(3):
        # The entries of example i among those of the whole batch, leaf by leaf.
        index = np.concatenate([np.reshape(leaf, (3, -1))[i] for leaf in jax.tree.leaves(numbered(z))]).astype(int)
        close(measured["hessian"][np.ix_(index, index)], hessians[i])
        close(measured["curvature"][np.ix_(index, index)], treated[i])
        close(ravel_pytree(measured["gradient"])[0][index], gradients[i])
    if curvature == "absolute":
        newton = [g @ np.linalg.inv(c) @ g for g, c in zip(gradients, treated, strict=True)]
    else:
        newton = [
            np.inf if np.any(v < 0) else g @ np.linalg.inv(c) @ g
            for v, g, c in zip(values, gradients, treated, strict=True)
        ]
    np.testing.assert_allclose(measured["decrement"], newton, rtol=1e-9)
    if curvature == "exact":
        with pytest.raises(ValueError, match="no square root"):
            loss.curvature(z, y).sqrt_product(z)


def numbered(tree):
    """``tree`` with its entries replaced by their positions in the vector of all entries."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jnp.arange(flat.size, dtype=flat.dtype))


def test_gaussian_curvature_is_the_fisher_matrix_unless_exact_which_is_indefinite():
    outputs, y = (np.array([0.3, -1.0]), np.array([0.1, 0.5])), np.array([1.0, 2.0])
    fisher, exact_hessian = (
        measure(losses.gaussian(choice), outputs, y)["curvature"] for choice in ("fisher", "exact")
    )
    close(fisher, np.diag(np.r_[np.exp(-outputs[1]), 0.5, 0.5]))
    assert np.linalg.eigvalsh(exact_hessian).min() < -0.01
    with pytest.raises(ValueError, match="no square root"):
        losses.gaussian("exact").curvature(outputs, y).sqrt_product(outputs)


# Without a value, and without targets


@pytest.mark.parametrize("name", ["squared_error", "sigmoid", "softmax_labels", "poisson", "gaussian"])
def test_curvature_only_needs_no_targets(name):
    built_in, outputs, _ = CASES[name]
    loss = losses.curvature_only(built_in)
    loss.check(outputs, None)
    matrices = [built_in.fisher(outputs), loss.curvature(outputs, None), loss.fisher(outputs, None)]
    expected, *got = jax.jit(lambda matrices: [dense(matrix, outputs) for matrix in matrices])(matrices)
    for matrix in got:
        np.testing.assert_array_equal(matrix, expected)
    assert (loss.natural, loss.convex, loss.has_value) == (built_in.natural, built_in.convex, False)


def test_curvature_only_in_an_objective():
    objective = curvax.Objective(lambda w, x: jax.nn.sigmoid(x @ w), losses.curvature_only(BERNOULLI))
    params, inputs = np.zeros((2, 1)), np.eye(2)
    targets = np.ones((2, 1))

    @jax.jit
    def diagonals(params, inputs, targets, key):
        without, given = (objective.linearize(params, (inputs, y)) for y in (None, targets))
        return curvax.fisher(without, key=key, num_samples=3).diagonal(), curvax.ggn(given).diagonal()

    for diagonal in diagonals(params, inputs, targets, jax.random.key(0)):
        np.testing.assert_allclose(diagonal, np.full((2, 1), 1 / 8), rtol=1e-12)
    for call in (
        objective,
        objective.value_and_grad,
        lambda *args: curvax.model_lower_bound(objective.linearize(*args)),
        lambda *args: curvax.quadratic_model(objective.linearize(*args)),
    ):
        with pytest.raises(ValueError, match="curvature but no loss value"):
            call(params, (inputs, targets))
    exact_loss = losses.curvature_only(losses.gaussian("exact"))
    with pytest.raises(ValueError, match="depends on the targets, and they are None"):
        exact_loss.curvature((inputs, inputs), None)
    with pytest.raises(ValueError, match="last axis of classes"):
        losses.curvature_only(losses.softmax_cross_entropy()).check(np.zeros(3), None)


# Dtypes


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_results_have_the_dtype_of_the_outputs(name, dtype):
    loss, outputs, targets = CASES[name]
    outputs = jax.tree.map(lambda z: jnp.asarray(z, dtype), outputs)

    def everything(outputs, targets):
        matrix = loss.curvature(outputs, targets)
        products = [matrix.product(outputs), matrix.pinv_product(outputs), loss.gradient(outputs, targets)]
        if name != "gaussian_exact":
            products.append(matrix.sqrt_transpose_product(matrix.sqrt_product(outputs)))
        if name in BOUNDED:
            return products, loss.value(outputs, targets)
        values = loss.value(outputs, targets), loss.negative_log_density(outputs, targets)
        sample = loss.sample(jax.random.key(0), jax.tree.map(lambda z: z[0], outputs))
        divergence = loss.divergence(outputs, outputs, targets)
        return products, values, divergence, loss.squared_newton_decrement(outputs, targets), sample

    *results, sample = jax.tree.leaves(jax.jit(everything).lower(outputs, targets).out_info)
    assert {result.dtype for result in results} == {jnp.dtype(dtype)}
    assert sample.dtype == dtype or ("softmax" in name and jnp.issubdtype(sample.dtype, jnp.integer))


@every_loss
def test_bfloat16_outputs_give_the_value_to_bfloat16_accuracy(name):
    loss, outputs, targets = CASES[name]
    narrow = jax.tree.map(lambda z: jnp.asarray(z, jnp.bfloat16), outputs)
    exact = jax.jit(loss.value)(jax.tree.map(lambda z: z.astype(np.float64), narrow), targets)
    rounding = 4 * float(jnp.finfo(jnp.bfloat16).eps) * (1 + np.abs(exact).max())
    np.testing.assert_allclose(jax.jit(loss.value)(narrow, targets).astype(np.float64), exact, rtol=0, atol=rounding)


def test_an_objective_takes_narrow_outputs_to_float32_before_the_loss():
    z, y = jnp.array([[1.1, -2.3]], jnp.bfloat16), np.array([0])
    objective = curvax.Objective(lambda w, x: (x + w).astype(jnp.bfloat16), losses.softmax_cross_entropy())
    loss = jax.jit(objective)(jnp.zeros((), jnp.bfloat16), (z, y))
    assert loss.dtype == jnp.float32
    value = jax.jit(lambda z, y: losses.softmax_cross_entropy().value(z.astype(jnp.float32), y)[0])
    np.testing.assert_allclose(loss, value(z, y), rtol=2e-7)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64])
def test_integers_of_every_width_number_the_classes(dtype):
    z = np.random.default_rng(0).normal(size=(3, 300))
    labels = np.array([0, 44, 127], dtype)  # 300 classes do not fit in 8 bits: class 256 must not be taken for 0
    value = losses.softmax_cross_entropy().value(z, labels)
    np.testing.assert_allclose(value, -special.log_softmax(z, axis=1)[np.arange(3), labels], rtol=1e-12)


def test_numpy_integers_without_x64_raise_no_warning():
    with jax.enable_x64(False):
        value = losses.softmax_cross_entropy().value(jnp.zeros((2, 2)), np.array([0, 1], np.int64))
    assert value.dtype == jnp.float32


def test_excluded_classes_of_logit_minus_infinity_do_not_matter():
    loss, kept = losses.softmax_cross_entropy(), [0, 2]
    z = np.array([[0.5, -np.inf, -1.0], [0.3, -np.inf, 2.0]])
    y = np.array([[0.25, 0.0, 0.75], [1.0, 0.0, 0.0]])
    with_excluded, without = measure(loss, z, y), measure(loss, z[:, kept], y[:, kept])
    gradient, hessian = with_excluded.pop("gradient"), with_excluded.pop("hessian")
    close(gradient[:, kept], without["gradient"])
    np.testing.assert_array_equal(gradient[:, 1], 0)
    close(hessian[np.ix_([0, 2, 3, 5], [0, 2, 3, 5])], without["hessian"])
    for name in ("value", "decrement"):
        close(with_excluded[name], without[name])


@every_loss
def test_no_rank_is_promoted(name):
    loss, outputs, targets = CASES[name]
    expected = measure(loss, outputs, targets)
    with jax.numpy_rank_promotion("raise"):
        got = measure(loss, outputs, targets)

        @jax.jit
        def others(outputs, targets, key):
            loss.curvature(outputs, targets).pinv_product(outputs)
            if name in BOUNDED:
                return None
            if name != "gaussian_exact":
                loss.fisher(outputs).sqrt_product(outputs)
            return loss.sample(key, jax.tree.map(lambda z: z[0], outputs))

        others(outputs, targets, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# jit and vmap


@every_loss
def test_vmap_is_a_loop_and_jit_does_not_trace_equal_losses_anew(name):
    loss, outputs, targets = CASES[name]
    pairs = [(outputs, targets), jax.tree.map(lambda x: np.flip(x, 0), (outputs, targets))]
    mapped = jax.vmap(functools.partial(measure, loss))(*jax.tree.map(lambda *leaves: np.stack(leaves), *pairs))
    for i, pair in enumerate(pairs):
        close(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], mapped), measure(loss, *pair), rtol=1e-9)
    traces = 0

    @jax.jit
    def product(matrix, vector):
        nonlocal traces
        traces += 1
        return matrix.product(vector)

    for outputs, targets in pairs:
        equal_loss = type(loss)(**vars(loss))
        product(equal_loss.curvature(outputs, targets), outputs)
    assert traces == 1


# Errors

SOFTMAX, GAUSSIAN, SQUARED = losses.softmax_cross_entropy(), losses.gaussian(), losses.squared_error()
BINARY, COUNTS = losses.sigmoid_binary_cross_entropy(), losses.poisson()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "error", "message"),
    [
        (SQUARED, Z, Z[:, 0], ValueError, r"targets must have shape \(3, 2\), to match the outputs, got \(3,\)"),
        (SQUARED, Z, Z.astype(int), TypeError, "targets must be floating-point, got int64; cast them"),
        (SQUARED, {"a": Z}, Z, TypeError, r"must return one array, got .*float64\(3, 2\)"),
        (SQUARED, Z, None, TypeError, r"targets must be one array of shape \(3, 2\), got None"),
        (SQUARED, Z, {"a": Z}, TypeError, r"targets must be one array of shape \(3, 2\)"),
        (BINARY, Z, Z[:2], ValueError, r"targets must have shape \(3, 2\)"),
        (COUNTS, Z, Z[:2], ValueError, r"targets must have shape \(3, 2\)"),
        (SOFTMAX, Z, np.eye(3, 2, dtype=int), TypeError, "look one-hot; cast them to floating point"),
        (SOFTMAX, Z, np.zeros((3, 1), int), ValueError, r"integer targets must have shape \(3,\)"),
        (
            SOFTMAX,
            Z,
            np.zeros(3),
            TypeError,
            r"are class labels and must be integers, got float64",
        ),
        (SOFTMAX, Z, Z > 0, TypeError, "must be floating-point, got bool"),
        (SOFTMAX, Z, None, TypeError, r"integers of shape \(3,\).*must be one array .*got None"),
        (SOFTMAX, np.zeros(3), np.zeros(3, int), ValueError, r"need a last axis of classes, got shape \(3,\)"),
        (SOFTMAX, (Z, Z), np.zeros(3, int), TypeError, "must return one array"),
        (GAUSSIAN, Z, Z, TypeError, r"must return the pair \(mean, log variance\), got float64\(3, 2\)"),
        (GAUSSIAN, (Z, {"s": Z}), Z, TypeError, "must return the pair"),
        (GAUSSIAN, (Z, Z[:, :1]), Z, ValueError, r"mean \(3, 2\) and log variance \(3, 1\) differ in shape"),
        (GAUSSIAN, (Z, Z), Z[:, 0], ValueError, r"targets must have shape \(3, 2\)"),
        (
            losses.from_function(lambda z, y: z - y, convex=True),
            Z,
            Z,
            ValueError,
            r"return one scalar.*got float64\(2,\)",
        ),
        (losses.from_function(lambda z, y: (z[0], y[0]), convex=True), Z, Z, ValueError, "return one scalar"),
    ],
)
def test_check_says_what_is_expected(loss, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        loss.check(outputs, targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.gaussian("hessian"), "curvature must be one of 'fisher', 'exact', got 'hessian'"),
        (
            lambda: losses.from_function(tanh_of_one, convex=False, curvature="clip"),
            "curvature must be one of 'exact', 'absolute', 'clipped', 'fisher', got 'clip'",
        ),
        (lambda: losses.from_function(tanh_of_one, convex=False, natural=True), "natural=True needs convex=True"),
        (lambda: losses.from_function(tanh_of_one, convex=True).sample(jax.random.key(0), Z), "make it with sample="),
        (lambda: losses.from_function(tanh_of_one, convex=True).negative_log_density(Z, Z), "no normalised density"),
    ],
)
def test_errors_of_makers_and_of_what_a_loss_does_not_have(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gaussian_takes_named_tuples_and_lists():
    class Output(NamedTuple):
        mean: np.ndarray
        log_variance: np.ndarray

    for outputs in (Output(Z, Z), [Z, Z]):
        GAUSSIAN.check(outputs, Z)
        assert jax.tree.structure(GAUSSIAN.fisher(outputs).product(outputs)) == jax.tree.structure(outputs)


# Bounded losses


@pytest.mark.many_compilations("the outputs of each test are arrays of their own")
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_losses_are_what_they_say(name):
    """Value against the printed formula, derivatives against differentiation, and curvature without negative values."""
    loss, outputs, targets = CASES[name]
    if name in ("bounded_labels", "bounded"):
        p = special.softmax(outputs, axis=-1)
        if name == "bounded":
            mass, right = 1.0, np.sum(p * targets, axis=-1)
        else:  # the last one has no label
            mass, right = np.array([1.0, 1.0, 0.0]), np.r_[p[[0, 1], [1, 0]], 0]
        expected = mass / (1 + np.exp(5.0 * (right - 0.2)))
    else:
        c, r = loss.scale, outputs - targets
        expected = {
            "tukey": np.where(np.abs(r) <= c, c**2 / 6 * (1 - (1 - (r / c) ** 2) ** 3), c**2 / 6),
            "welsch": c**2 / 2 * (1 - np.exp(-((r / c) ** 2))),
            "geman_mcclure": r**2 / 2 / (1 + (r / c) ** 2),
        }[name]
    measured = measure(loss, outputs, targets)
    close(measured["value"], expected)

    @jax.jit
    def derivatives(outputs):
        def total(z):
            return jnp.sum(loss.value(z.reshape(outputs.shape), targets))

        return jax.grad(total)(outputs.reshape(-1)), jax.hessian(total)(outputs.reshape(-1))

    gradient, hessian = derivatives(jnp.asarray(outputs))
    close(measured["gradient"].reshape(-1), gradient)
    close(measured["hessian"], hessian)
    if name != "bounded_labels":  # of which both labels are likely, where the loss is convex
        assert np.linalg.eigvalsh(hessian).min() < -1e-3
    assert np.linalg.eigvalsh(measured["curvature"]).min() > -1e-12
    if name not in ("bounded_labels", "bounded"):  # the quadratic of the weights touches the loss and lies above it
        for step in np.linspace(-3, 3, 25):
            r, w = outputs - targets, np.diag(measured["curvature"]).reshape(outputs.shape)
            above = measured["value"] + w * ((r + step) ** 2 - r**2) / 2
            assert np.all(np.asarray(loss.value(outputs + step, targets)) <= above + 1e-12)
    with pytest.raises(ValueError, match="no negative log-density"):
        loss.fisher(outputs)


@pytest.mark.parametrize("make", [losses.tukey_biweight, losses.welsch, losses.geman_mcclure])
def test_robust_losses_keep_their_digits_for_small_residuals_and_stay_finite_for_large_ones(make):
    loss = make()
    small = jnp.asarray([1e-6, 1e-4, 1e-3, 1e-2], jnp.float32)
    value = jax.jit(loss.value)(small, jnp.zeros_like(small))
    np.testing.assert_allclose(value, np.asarray(small, np.float64) ** 2 / 2, rtol=1e-3)
    large = jnp.asarray([1e4, 1e15, 3e19], jnp.float32)
    value, gradient = jax.jit(lambda z: (loss.value(z, jnp.zeros_like(z)), loss.gradient(z, jnp.zeros_like(z))))(large)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))
    curved = jax.jit(lambda z: loss.hessian(z, jnp.zeros_like(z)).product(jnp.ones_like(z)))(large)
    np.testing.assert_allclose(curved, 0, atol=1e-6)
