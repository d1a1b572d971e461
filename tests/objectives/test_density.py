"""The density exp(-L(y, z)) / Z that a loss defines, and its Fisher matrix (NG-6, AD-12; Martens 2016, 5.1, 5.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

import curvax
from curvax import losses
from tests import oracles, problems

NU = 3.0
Z = np.array([[0.3, -2.0], [1.4, 0.0], [6.0, -0.7]])
Y = np.array([[0.0, 1.0], [-2.0, 0.5], [1.0, 1.0]])


def line(count):
    """A rule for the plane around an output of two entries: y = z + tan t, with midpoints t of (-pi/2, pi/2)."""
    t = (np.arange(count) + 0.5) * np.pi / count - np.pi / 2
    nodes, weights = np.tan(t), np.pi / count / np.cos(t) ** 2
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    products = np.outer(weights, weights).ravel()
    return lambda z: (z + grid, jnp.asarray(products))


def of_differences(negative_log, **options):
    """L(y, z) = sum_j -log c(y_j - z_j)."""
    return losses.from_function(lambda z, y: jnp.sum(negative_log(y - z)), **options)


def student(a):
    return (NU + 1) / 2 * jnp.log1p(a**2 / NU)


def logistic(a):
    return a + 2 * jax.nn.softplus(-a)


# The function -log c, whether it is convex, log Z of two entries, and E[(c' / c)^2].
DIFFERENCES = {
    "student": (student, False, -2 * stats.t.logpdf(0, NU), (NU + 1) / (NU + 3)),
    "logistic": (logistic, True, 0.0, 1 / 3),
    "normal": (lambda a: a**2 / 2, True, np.log(2 * np.pi), 1.0),
}


def dense(matrix, like):
    flat, unravel = ravel_pytree(like)
    return jax.vmap(lambda e: ravel_pytree(matrix.product(unravel(e)))[0], out_axes=1)(jnp.eye(flat.size))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_density_of_a_difference_does_not_depend_on_the_output_and_has_a_multiple_of_the_identity(name):
    """Park et al. 2000: F is the classical Gauss-Newton matrix times the Fisher information of c."""
    negative_log, convex, log_z, information = DIFFERENCES[name]
    loss = of_differences(negative_log, convex=convex, support=line(120))

    @jax.jit
    def compute(z, y):
        return loss.log_normaliser(z), dense(loss.fisher(z), z), loss.negative_log_density(z, y)

    normaliser, fisher, density = compute(Z, Y)
    np.testing.assert_allclose(normaliser, log_z, atol=1e-7)  # of the rule
    np.testing.assert_allclose(fisher, information * np.eye(6), atol=1e-7)
    family = {"student": functools.partial(stats.t.logpdf, df=NU)}.get(name)
    family = family or {"logistic": stats.logistic.logpdf, "normal": stats.norm.logpdf}[name]
    np.testing.assert_allclose(density, -family(Y - Z).sum(-1), rtol=1e-7)


def test_as_printed_the_density_of_least_squares_is_none():
    """Section 5.4 has c(a) = a^2 / 2, whose integral is infinite; -log c(a) = a^2 / 2 is meant (above)."""

    def on(radius):
        def support(z):
            nodes = (jnp.arange(4000.0) + 0.5) / 2000 - 1
            return z + radius * nodes, jnp.full(4000, radius / 2000)

        loss = losses.from_function(lambda z, y: -jnp.log((y - z) ** 2 / 2), convex=False, support=support)
        return np.exp(jax.jit(loss.log_normaliser)(np.zeros(1)))

    np.testing.assert_allclose([on(r)[0] for r in (1.0, 10.0, 100.0)], [1 / 3, 1e3 / 3, 1e6 / 3], rtol=1e-6)


def cross_entropy(z, y):
    return jnp.sum(jax.nn.softplus(z) - y * z)


def test_the_cross_entropy_is_of_a_density_on_two_points_and_of_none_on_the_interval():
    """Z = 1 for bits; for targets between 0 and 1 it is (e^z - 1) / z / (1 + e^z), and L is no density's logarithm."""
    interval = (np.arange(2000) + 0.5)[:, None] / 2000
    supports = {"bits": (jnp.array([[0.0], [1.0]]), jnp.ones(2)), "interval": (interval, jnp.full(2000, 1 / 2000))}
    z = np.array([[-3.0], [0.5], [4.0]])
    made = {
        k: losses.from_function(cross_entropy, convex=True, support=lambda z, own=v: own) for k, v in supports.items()
    }
    bits, interval = (jax.jit(made[kind].log_normaliser)(z) for kind in supports)
    np.testing.assert_allclose(bits, 0, atol=1e-15)
    np.testing.assert_allclose(interval, np.log(np.expm1(z) / z / (1 + np.exp(z)))[:, 0], atol=1e-6)
    assert np.ptp(interval) > 0.5


def hermite(z):
    """Nodes of Gauss and Hermite around one entry with learnt variance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    mean, log_variance = z
    deviation = jnp.exp(log_variance / 2)
    return mean + deviation * nodes[:, None], deviation[0] * weights * np.exp(nodes**2 / 2)


LISTED = {
    "bits": (
        losses.sigmoid_binary_cross_entropy(),
        losses.from_function(
            cross_entropy, convex=True, support=lambda z: (jnp.array([[0.0, 0], [0, 1], [1, 0], [1, 1]]), jnp.ones(4))
        ),
        (Z, Z[::-1]),
    ),
    "classes": (
        losses.softmax_cross_entropy(),
        losses.from_function(
            lambda z, y: -jax.nn.log_softmax(z)[y], convex=True, support=lambda z: (jnp.arange(2), jnp.ones(2))
        ),
        (Z, Z[::-1]),
    ),
    "gaussian": (
        losses.gaussian(),
        losses.from_function(
            lambda z, y: jnp.sum((y - z[0]) ** 2 * jnp.exp(-z[1]) + z[1]) / 2,
            convex=False,
            curvature="fisher",
            support=hermite,
        ),
        ((Z[:, :1], Z[:, 1:] / 4), (Z[:, :1] + 0.3, Z[:, 1:] / 4 + 0.2)),
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_of_losses_that_are_built_in_it_is_what_they_have(name):
    own, made, (z, other) = LISTED[name]

    @jax.jit
    def compute(z, other):
        def of(loss):
            divergences = [jnp.sum(loss.divergence(*pair).reshape(len(Z), -1), 1) for pair in ((z, other), (other, z))]
            return dense(loss.fisher(z), z), divergences

        return of(own), of(made), made.log_normaliser(z)

    expected, got, normaliser = compute(z, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), got, expected)
    np.testing.assert_allclose(normaliser, np.log(2 * np.pi) / 2 if name == "gaussian" else 0, atol=1e-10)


def test_the_fisher_matrix_replaces_an_indefinite_hessian():
    """Student's t has redescending residuals: outliers have negative curvature, the Fisher matrix has none."""
    model, params, (x, _) = (
        problems.problem("deep_linear").objective.terms[0].model_fn,
        *problems.problem("deep_linear")[2:],
    )
    y = np.random.default_rng(0).standard_cauchy(size=(5, 2)) * 3
    loss = of_differences(student, convex=False, curvature="fisher", support=line(60))
    exact = of_differences(student, convex=False)

    @jax.jit
    def compute(params):
        at = curvax.Objective(model, loss).linearize(params, (x, y))
        indefinite = curvax.ggn(curvax.Objective(model, exact).linearize(params, (x, y)))
        return curvax.ggn(at).to_dense(), curvax.fisher(at).to_dense(), indefinite.to_dense()

    ggn, fisher, hessian = compute(params)
    squares = curvax.Objective(model, losses.squared_error())
    classical = oracles.dense_ggn(squares, params, (x, y))
    np.testing.assert_allclose(ggn, fisher, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(fisher, (NU + 1) / (NU + 3) * classical, atol=1e-8)
    assert np.linalg.eigvalsh(hessian)[0] < -0.1


def test_draws_have_the_distribution_of_the_support():
    loss = of_differences(student, convex=False, support=line(60))
    z = np.array([1.0, -2.0])

    @jax.jit
    def compute(keys):
        draws = jax.vmap(lambda key: loss.sample(key, jnp.asarray(z)))(keys)
        gradients = jax.vmap(lambda y: loss.gradient(jnp.asarray(z)[None], y[None])[0])(draws)
        return draws, jnp.einsum("ki,kj->kij", gradients, gradients)

    draws, squares = map(np.asarray, compute(jax.random.split(jax.random.key(0), 4000)))
    error = squares.std(0) / np.sqrt(len(squares))
    assert np.all(np.abs(squares.mean(0) - (NU + 1) / (NU + 3) * np.eye(2)) < 4.5 * error)
    for level in (-1.0, 0.0, 2.0):
        shares = np.mean(draws - z < level, axis=0)
        np.testing.assert_allclose(shares, special.stdtr(NU, level), atol=0.04)


def test_the_divergence_of_the_support_is_of_second_order_with_its_fisher_matrix():
    loss = of_differences(student, convex=False, support=line(60))
    objective, w = curvax.Objective(lambda w, x: jnp.tanh(x @ w), loss), np.eye(2)
    batch, step = (Z, Y), np.array([[0.3, -0.2], [0.5, 0.1]])

    @jax.jit
    @jax.vmap
    def rests(length):
        at = objective.linearize(jnp.asarray(w), batch)
        form = curvax.quadratic_divergence(at, length * step)
        return jnp.stack([curvax.kl_divergence(at, w + length * step, reverse=r) - form for r in (False, True)])

    slopes = np.diff(np.log2(np.abs(rests(2.0 ** -np.arange(4, 9)))), axis=0)
    np.testing.assert_allclose(slopes[-1], -3, atol=0.1)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="curvature='fisher' needs support="):
        of_differences(student, convex=False, curvature="fisher")
    with pytest.raises(ValueError, match="make it with support="):
        of_differences(student, convex=False).log_normaliser(Z)
