"""Every loss against formulas written in numpy, and where accuracy is at stake against exact decimal arithmetic."""

import decimal
import functools
from decimal import Decimal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy import special, stats
from scipy.linalg import block_diag

from curvax import losses

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
EXTREMES = [-1e3, -60.0, 0.0, 60.0, 1e3]


class Example(NamedTuple):
    """Outputs, targets, and what the loss must make of them: value, gradient, and blocks of Hessian and Fisher."""

    outputs: object
    targets: np.ndarray
    value: np.ndarray
    gradient: object
    hessian: np.ndarray
    fisher: np.ndarray


def logits(rng, shape, extreme=True):
    z = 2 * rng.normal(size=shape)
    return np.where(rng.random(shape) < 0.3, rng.choice(EXTREMES, size=shape), z) if extreme else z


def squared_error(rng, extreme):
    shape = (2, 2, 3)
    z, y = logits(rng, shape, extreme), rng.normal(size=shape)
    eye = np.eye(z.size)
    return Example(z, y, np.square(z - y) / 2, z - y, eye, eye)


def sigmoid(rng, extreme, shape=(2, 2, 3)):
    z, y = logits(rng, shape, extreme), rng.choice([0.0, 1.0, 0.25, 0.9], size=shape)
    value = -y * special.log_expit(z) - (1 - y) * special.log_expit(-z)
    gradient = (1 - y) * special.expit(z) - y * special.expit(-z)
    fisher = np.diag(np.ravel(special.expit(z) * special.expit(-z)))
    return Example(z, y, value, gradient, fisher, fisher)


def sigmoid_bool(rng, extreme):
    example = sigmoid(rng, extreme, (4,))
    y = example.targets > 0.5
    gradient = special.expit(example.outputs) - y
    value = -special.log_expit(np.where(y, example.outputs, -example.outputs))
    return example._replace(targets=y, value=value, gradient=gradient)


def softmax(rng, extreme):
    shape = [(3, 2), (2, 2, 3)][rng.integers(2)]
    z = logits(rng, shape, extreme)
    y = rng.dirichlet(np.full(shape[-1], 0.3), size=shape[:-1])
    y = np.where(rng.random(shape[:-1])[..., None] < 0.5, np.eye(shape[-1])[np.argmax(y, -1)], y)
    return softmax_example(z, y, y)


def softmax_integer(rng, extreme):
    shape = [(3, 1), (2, 2, 4)][rng.integers(2)]
    z, labels = logits(rng, shape, extreme), rng.integers(-1, shape[-1] + 1, size=shape[:-1])
    return softmax_example(z, labels, labels[..., None] == np.arange(shape[-1]))


def softmax_example(z, targets, y):
    p, mass = special.softmax(z, axis=-1), np.sum(y, axis=-1)
    blocks = [np.diag(row) - np.outer(row, row) for row in p.reshape(-1, p.shape[-1])]
    hessian = [a * block for a, block in zip(mass.ravel(), blocks, strict=True)]
    value = -np.sum(np.where(y > 0, y * special.log_softmax(z, axis=-1), 0), axis=-1)
    # A case without a target has no Fisher matrix either.
    fisher = [(a > 0) * block for a, block in zip(mass.ravel(), blocks, strict=True)]
    return Example(z, targets, value, mass[..., None] * p - y, block_diag(*hessian), block_diag(*fisher))


def poisson(rng, extreme):
    shape = (2, 2, 3)
    z = logits(rng, shape, False)
    if extreme:
        z = np.where(rng.random(shape) < 0.3, rng.choice([-1e3, -60.0, 60.0, 300.0], size=shape), z)
    y = rng.integers(0, 5, size=shape)
    fisher = np.diag(np.exp(z).ravel())
    return Example(z, y, np.exp(z) - y * z, np.exp(z) - y, fisher, fisher)


def gaussian(rng, extreme):
    shape = (2, 2, 2)
    m, s, y = logits(rng, shape, extreme), rng.uniform(-3, 3, shape), rng.normal(size=shape)
    if extreme:
        s = np.where(rng.random(shape) < 0.3, rng.choice([-60.0, 60.0, 300.0], size=shape), s)
    r, inverse = (y - m), np.exp(-s)
    value = -stats.norm.logpdf(y, m, np.exp(s / 2)) - np.log(2 * np.pi) / 2
    gradient = (-r * inverse, (1 - r**2 * inverse) / 2)
    mean, cross, variance = (np.diag(np.ravel(x)) for x in (inverse, r * inverse, r**2 * inverse / 2))
    half = np.eye(m.size) / 2
    hessian = np.block([[mean, cross], [cross, variance]])
    return Example((m, s), y, value, gradient, hessian, block_diag(mean, half))


BUILT_IN = {
    "squared_error": (losses.squared_error(), squared_error),
    "sigmoid": (losses.sigmoid_binary_cross_entropy(), sigmoid),
    "sigmoid_bool": (losses.sigmoid_binary_cross_entropy(), sigmoid_bool),
    "softmax": (losses.softmax_cross_entropy(), softmax),
    "softmax_integer": (losses.softmax_cross_entropy(), softmax_integer),
    "poisson": (losses.poisson(), poisson),
    "gaussian": (losses.gaussian(), gaussian),
    "gaussian_exact": (losses.gaussian("exact"), gaussian),
}
every_loss = pytest.mark.parametrize("name", BUILT_IN)
natural_loss = pytest.mark.parametrize("name", [name for name, (loss, _) in BUILT_IN.items() if loss.natural])


def dense(matrix, like):
    flat, unravel = ravel_pytree(like)
    return jax.vmap(lambda e: ravel_pytree(matrix.product(unravel(e)))[0], out_axes=1)(
        jnp.eye(flat.size, dtype=flat.dtype)
    )


@functools.partial(jax.jit, static_argnums=0)
def measure(loss, outputs, targets):
    return {
        "value": loss.value(outputs, targets),
        "gradient": loss.gradient(outputs, targets),
        "hessian": dense(loss.hessian(outputs, targets), outputs),
        "curvature": dense(loss.curvature(outputs, targets), outputs),
        "fisher": dense(loss.fisher(outputs, targets), outputs),
        "decrement": loss.squared_newton_decrement(outputs, targets),
    }


@functools.partial(jax.jit, static_argnums=0)
def decrement(loss, outputs, targets):
    return loss.squared_newton_decrement(outputs, targets)


@functools.partial(jax.jit, static_argnums=0)
def autodiff(loss, outputs, targets):
    flat, unravel = ravel_pytree(outputs)

    def total(z):
        return jnp.sum(loss.value(unravel(z), targets))

    return jax.grad(total)(flat), jax.hessian(total)(flat)


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def close(got, expected, rtol=1e-11, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, expected)


@every_loss
@given(seed=seeds, extreme=st.booleans())
@few
def test_value_gradient_hessian_and_fisher_match_their_formulas(name, seed, extreme):
    loss, make = BUILT_IN[name]
    example = make(np.random.default_rng(seed), extreme)
    measured = measure(loss, example.outputs, example.targets)
    close(measured["value"], example.value)
    close(measured["gradient"], example.gradient)
    close(measured["hessian"], example.hessian)
    close(measured["fisher"], example.fisher)
    close(measured["curvature"], example.fisher if name == "gaussian" else example.hessian)
    loss.check(example.outputs, example.targets)


@every_loss
@given(seed=seeds)
@few
def test_gradient_and_hessian_are_the_derivatives_of_the_value(name, seed):
    loss, make = BUILT_IN[name]
    example = make(np.random.default_rng(seed), False)
    measured = measure(loss, example.outputs, example.targets)
    gradient, hessian = autodiff(loss, example.outputs, example.targets)
    close(flatten(measured["gradient"]), gradient)
    close(measured["hessian"], hessian)


@natural_loss
@given(seed=seeds)
@few
def test_natural_losses_have_a_hessian_that_ignores_the_targets_and_is_the_fisher_matrix(name, seed):
    loss, make = BUILT_IN[name]
    example = make(np.random.default_rng(seed), True)
    targets = np.flip(np.clip(example.targets, 0, example.outputs.shape[-1] - 1 if name[:7] == "softmax" else None), 0)
    measured = measure(loss, example.outputs, targets)
    close(measured["hessian"], measured["fisher"])


@every_loss
@given(seed=seeds)
@few
def test_squared_newton_decrement_is_that_of_the_dense_matrices(name, seed):
    loss, make = BUILT_IN[name]
    example = make(np.random.default_rng(seed), False)
    measured = measure(loss, example.outputs, example.targets)
    assert measured["decrement"].shape == measured["value"].shape
    if name == "gaussian_exact":  # indefinite: the quadratic model has no minimum
        assert np.all(np.isposinf(measured["decrement"]))
        return
    gradient, curvature = flatten(example.gradient), np.asarray(measured["curvature"])
    expected = gradient @ np.linalg.pinv(curvature, rcond=1e-12, hermitian=True) @ gradient
    np.testing.assert_allclose(np.sum(measured["decrement"]), expected, rtol=1e-7, atol=1e-12)
    assert np.all(np.asarray(measured["decrement"]) >= 0)


def softmax_of_one(z, y):
    return jax.nn.logsumexp(z) - jnp.sum(jnp.where(jnp.arange(z.size) == y, z, 0))


SOFTMAX_OF_FUNCTION = losses.from_function(softmax_of_one, convex=True, natural=True, sample=jax.random.categorical)


def test_a_natural_loss_from_a_function_equals_the_built_in_one():
    z, y = logits(np.random.default_rng(0), (3, 2), False), np.array([0, 0, 1])
    of_function, built_in = measure(SOFTMAX_OF_FUNCTION, z, y), measure(losses.softmax_cross_entropy(), z, y)
    close(of_function, built_in, rtol=1e-9)
    np.testing.assert_array_equal(draw(SOFTMAX_OF_FUNCTION, z, 5), draw(losses.softmax_cross_entropy(), z, 5))


# Accuracy and saturation, against decimal arithmetic with as many digits as plain formulas need


def exact(function, *arrays):
    """``function`` of Decimals at every entry, in 150 digits."""
    with decimal.localcontext(decimal.Context(prec=150, Emin=-999999, Emax=999999)):
        results = [
            function(*(Decimal(float(x)) for x in entries)) for entries in zip(*map(np.ravel, arrays), strict=True)
        ]
    return np.reshape([float(result) for result in results], np.shape(arrays[0]))


def exact_softmax(row):
    with decimal.localcontext(decimal.Context(prec=150)):
        powers = [Decimal(float(z)).exp() for z in row]
        return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_keeps_relative_accuracy_where_saturated(dtype):
    grid = np.array([-80, -40, -17, -9, -2, 0, 1, 8, 16, 30, 41, 80], dtype)
    z, targets = np.tile(grid, 3), np.repeat(np.array([0, 1, 0.25], dtype), len(grid))
    loss = losses.sigmoid_binary_cross_entropy()
    measured = measure(loss, z, targets)
    eps = float(np.finfo(dtype).eps)
    value = exact(lambda z, y: (1 + z.exp()).ln() - y * z, z, targets)
    gradient = exact(lambda z, y: 1 / (1 + (-z).exp()) - y, z, targets)
    entries = exact(lambda z: z.exp() / (1 + z.exp()) ** 2, z)
    newton = exact(lambda z, y: (z.exp() - y * (1 + z.exp())) ** 2 / z.exp(), z, targets)
    np.testing.assert_allclose(measured["value"], value, rtol=4 * eps)
    np.testing.assert_allclose(measured["gradient"], gradient, rtol=100 * eps)  # exp of -80: |z| eps
    np.testing.assert_allclose(np.diag(measured["fisher"]), entries, rtol=8 * eps)
    np.testing.assert_allclose(measured["decrement"], newton, rtol=100 * eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_keeps_relative_accuracy_where_saturated(dtype):
    z = np.array([[0, -17, -15, -20], [500, 491, 480, 470], [-3, 37, -2, 0], [1, 1, 1, 1], [-9, 7, 9, 9]], dtype)
    loss, eps = losses.softmax_cross_entropy(), float(np.finfo(dtype).eps)
    p = [exact_softmax(row) for row in z]
    for c in range(4):
        measured = measure(loss, z, np.full(5, c))
        one_hot = np.eye(4)[c]
        with decimal.localcontext(decimal.Context(prec=150)):
            value = [float(-row[c].ln()) for row in p]
            newton = [float((1 - row[c]) / row[c]) for row in p]
            gradient = [[float(q - Decimal(y)) for q, y in zip(row, one_hot, strict=True)] for row in p]
            blocks = [[[float(a * ((i == j) - b)) for j, b in enumerate(r)] for i, a in enumerate(r)] for r in p]
        np.testing.assert_allclose(measured["value"], value, rtol=50 * eps)  # |z| eps, as in every exp(z)
        np.testing.assert_allclose(measured["gradient"], gradient, rtol=80 * eps)
        np.testing.assert_allclose(measured["hessian"], block_diag(*blocks), rtol=100 * eps)
        np.testing.assert_allclose(measured["decrement"], newton, rtol=100 * eps)


def test_decrement_where_the_model_is_certain():
    sigmoid_loss, softmax_loss, poisson_loss = (BUILT_IN[name][0] for name in ("sigmoid", "softmax", "poisson"))
    right_and_wrong = decrement(sigmoid_loss, np.array([1e3, -1e3, 600.0, -600.0]), np.array([1, 1, 0, 0]))
    np.testing.assert_allclose(right_and_wrong, [0, np.inf, np.exp(600), np.exp(-600)], rtol=1e-12)
    z = np.array([[1e3, 0.0, -1e3], [1e3, 0.0, -1e3], [600.0, 0.0, -100.0]])
    np.testing.assert_allclose(decrement(softmax_loss, z, np.array([0, 2, 1])), [0, np.inf, np.exp(600)], rtol=1e-12)
    uniform = np.full((3, 3), 1 / 3)
    np.testing.assert_array_equal(np.isinf(decrement(softmax_loss, z, uniform)), [True, True, False])
    np.testing.assert_allclose(
        decrement(poisson_loss, np.array([-1e3, -1e3, 3.0]), np.array([0, 1, 0])), [0, np.inf, np.exp(3)], rtol=1e-12
    )
    means, log_variances = np.array([0.0, 0.0, 1.0]), np.array([-1e3, -2e3, -1e3])
    certain = decrement(losses.gaussian(), (means, log_variances), np.zeros(3))
    np.testing.assert_array_equal(certain, [0.5, 0.5, np.inf])


@given(seed=seeds)
@few
def test_decrement_of_a_function_never_under_estimates(seed):
    rng = np.random.default_rng(seed)
    z, labels = (
        np.where(rng.random((4, 3)) < 0.5, rng.choice([-30.0, -9.0, 1e3], size=(4, 3)), 0),
        rng.integers(0, 3, 4),
    )
    built_in = decrement(losses.softmax_cross_entropy(), z, labels)
    of_function = decrement(SOFTMAX_OF_FUNCTION, z, labels)
    # Entries of the Hessian are sums of terms of size 1, so rounding turns what is left of the gradient below 1e-7.
    assert np.all(np.asarray(of_function) >= np.asarray(built_in) * (1 - 1e-6) - 1e-6)


# The predictive distribution


def draw(loss, outputs, number):
    """Samples for the one example at axis 0 of the outputs, in a new leading axis."""
    keys = jax.random.split(jax.random.key(0), number)
    return jax.jit(jax.vmap(lambda key: loss.sample(key, jax.tree.map(lambda z: jnp.asarray(z)[0], outputs))))(keys)


def within_error(samples, expected):
    """The mean of the samples is the expectation, up to five standard errors."""
    error = np.std(samples, axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(np.mean(samples, axis=0) - expected) <= 5 * error + 1e-12)


SAMPLED = {
    "squared_error": (np.array([[0.3, -2.0]]), lambda z: (z, np.ones_like(z))),
    "sigmoid": (np.array([[0.3, -2.0]]), lambda z: (special.expit(z), special.expit(z) * special.expit(-z))),
    "poisson": (np.array([[0.3, -2.0]]), lambda z: (np.exp(z), np.exp(z))),
    "gaussian": ((np.array([[0.3, -2.0]]), np.array([[0.7, -1.0]])), lambda z: (z[0], np.exp(z[1]))),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_have_the_moments_of_the_distribution(name):
    loss, _ = BUILT_IN[name]
    outputs, moments = SAMPLED[name]
    samples = np.asarray(draw(loss, outputs, 20_000))
    mean, variance = (moment[0] for moment in moments(outputs))
    assert samples.shape == (20_000, 2)
    assert samples.dtype == np.float64
    within_error(samples, mean)
    within_error((samples - mean) ** 2, variance)
    covariance = (samples[:, 0] - mean[0]) * (samples[:, 1] - mean[1])
    within_error(covariance, 0)
    loss.check(outputs, jnp.asarray(samples[:1]))


def test_samples_of_classes_have_their_frequencies():
    loss, z = losses.softmax_cross_entropy(), np.array([[[0.0, 1.0, -1.0], [5.0, 0.0, 0.0]]])
    samples = np.asarray(draw(loss, z, 20_000))
    assert samples.shape == (20_000, 2)
    within_error(samples[..., None] == np.arange(3), special.softmax(z[0], axis=-1))
    loss.check(z, jnp.asarray(samples[:1]))


@pytest.mark.parametrize("name", [*SAMPLED, "softmax"])
def test_fisher_is_the_covariance_of_gradients_and_the_mean_hessian_at_sampled_targets(name):
    loss, _ = BUILT_IN[name]
    outputs = SAMPLED[name][0] if name in SAMPLED else np.array([[0.0, 1.0, -1.0]])
    samples = draw(loss, outputs, 5_000)

    @jax.jit
    def compute(samples):
        def one(target):
            gradient = ravel_pytree(loss.gradient(outputs, target[None]))[0]
            return jnp.outer(gradient, gradient), gradient, dense(loss.hessian(outputs, target[None]), outputs)

        return *jax.vmap(one)(samples), dense(loss.fisher(outputs), outputs)

    squares, gradients, hessians, fisher = map(np.asarray, compute(samples))
    within_error(squares, fisher)
    within_error(gradients, 0)
    within_error(hessians, fisher)


def divergence_of(name, z, other):
    """KL(R_z || R_z') by decimal arithmetic, of single entries or of one distribution over classes."""
    with decimal.localcontext() as context:
        context.prec = 60
        z, other = ([Decimal(float(x)) for x in row] for row in (z, other))
        if name == "squared_error":
            return [float((a - b) ** 2 / 2) for a, b in zip(z, other, strict=True)]
        if name == "gaussian":
            (m, s), (n, t) = z, other
            return [float(((s - t).exp() - 1 - (s - t) + (m - n) ** 2 * (-t).exp()) / 2)]
        if name == "poisson":
            return [float(b.exp() - a.exp() - a.exp() * (b - a)) for a, b in zip(z, other, strict=True)]
        if name == "sigmoid":  # a distribution over two classes for each entry
            pairs = [([a, Decimal(0)], [b, Decimal(0)]) for a, b in zip(z, other, strict=True)]
        else:
            pairs = [(z, other)]
        result = []
        for a, b in pairs:
            log_p, log_q = ([x - sum(y.exp() for y in row).ln() for x in row] for row in (a, b))
            result.append(float(sum(p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True))))
        return result


@pytest.mark.parametrize("name", ["squared_error", "sigmoid", "softmax", "poisson", "gaussian"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_divergences_are_accurate_however_near_or_far_the_distributions_are(name, dtype):
    """Where they nearly meet the naive formulas are nothing but rounding; where one is certain they overflow."""
    rng, loss = np.random.default_rng(0), BUILT_IN[name][0]
    z, sizes = 2 * rng.normal(size=(40, 2)), np.tile([1e-3, 1e-2, 0.1, 1.0, 5.0], 8)
    others = z + sizes[:, None] * rng.normal(size=(40, 2))
    certain = np.array([[40.0, -40.0], [-40.0, 40.0], [12.0, 0.0], [39.0, -39.5]])
    z, others = np.concatenate([z, certain]).astype(dtype), np.concatenate([others, certain[::-1]]).astype(dtype)

    @jax.jit
    def compute(z, others):
        if name == "gaussian":
            z, others = ((x[:, :1], x[:, 1:]) for x in (z, others))
        return loss.divergence(z, others)

    got = np.asarray(compute(z, others)).reshape(len(z), -1)
    assert got.dtype == dtype
    eps = float(np.finfo(dtype).eps)
    for row, one, other in zip(got, z, others, strict=True):
        # A logarithm of a probability of size s is off by eps s, and a divergence is its square or itself.
        size = 1 + np.abs(one).max() + np.abs(other).max()
        gaps = np.abs(one - other) if len(row) == 2 else np.abs(one - other).max(keepdims=True)
        expected = np.array(divergence_of(name, one, other))
        assert np.all(np.abs(row - expected) <= 30 * eps * size / np.minimum(gaps, 1) * expected)


@every_loss
def test_the_divergence_is_zero_where_the_distributions_meet_and_its_hessian_is_the_fisher_matrix(name):
    loss, make = BUILT_IN[name]
    example = make(np.random.default_rng(1), False)
    flat, unravel = ravel_pytree(example.outputs)

    @jax.jit
    def compute(flat):
        def of(first, second):
            return jnp.sum(loss.divergence(unravel(first), unravel(second), example.targets))

        ways = [lambda x: of(x, flat), lambda x: of(flat, x)]
        return of(flat, flat), [(jax.grad(way)(flat), jax.hessian(way)(flat)) for way in ways]

    value, ways = compute(flat)
    assert value == 0
    for gradient, hessian in ways:
        close(gradient, np.zeros(flat.size))
        close(hessian, example.fisher)


def test_divergences_of_what_is_impossible():
    """A class that the first distribution excludes costs what the second gives to it; the other way round, infinity."""
    loss = losses.softmax_cross_entropy()
    z, excluded = np.array([[0.0, 0.0]]), np.array([[0.0, -np.inf]])
    compute = jax.jit(lambda a, b: (loss.divergence(a, b), jax.grad(lambda a: jnp.sum(loss.divergence(a, b)))(a)))
    value, gradient = compute(excluded, z)
    close(value, np.log(2))
    assert np.all(np.isfinite(gradient))
    assert compute(z, excluded)[0] == np.inf
    close(compute(excluded, excluded)[0], [0.0])


def test_cases_without_a_target_have_no_divergence():
    loss, z = losses.softmax_cross_entropy(ignore_label=-100), np.array([[0.5, 1.0], [0.3, 2.0]])
    value = jax.jit(loss.divergence)(z, z[::-1], np.array([1, -100]))
    assert value[0] > 0
    assert value[1] == 0
    drawn = jax.jit(loss.draw_divergence)(jax.random.split(jax.random.key(0), 2), z, z[::-1], np.array([1, -100]))
    close(drawn, value)


def test_densities_are_normalised():
    z = np.array([0.3, -2.0, 1.4])
    sigmoid_loss, poisson_loss, softmax_loss = (BUILT_IN[name][0] for name in ("sigmoid", "poisson", "softmax"))

    @functools.partial(jax.jit, static_argnums=0)
    def probability(loss, outputs, targets):
        return jnp.exp(-loss.negative_log_density(outputs, targets))

    close(sum(probability(sigmoid_loss, z, np.full(3, y)) for y in (0.0, 1.0)), np.ones(3))
    counts = np.broadcast_to(np.arange(60)[:, None], (60, 3))
    close(probability(poisson_loss, np.broadcast_to(z, (60, 3)), counts), stats.poisson.pmf(counts, np.exp(z)))
    close(probability(poisson_loss, np.broadcast_to(z, (60, 3)), counts).sum(axis=0), np.ones(3))
    rows = np.broadcast_to(z, (3, 3))
    close(probability(softmax_loss, rows, np.arange(3)).sum(), 1.0)
    close(probability(softmax_loss, rows, np.eye(3)), special.softmax(z))
    grid = np.linspace(-40, 40, 4001)
    means, log_variances = np.full(4001, 0.3), np.full(4001, 1.1)
    for density in (
        probability(losses.squared_error(), means, grid),
        probability(losses.gaussian(), (means, log_variances), grid),
    ):
        close(np.sum(density) * (grid[1] - grid[0]), 1.0)
