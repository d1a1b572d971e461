"""The divergence of the predictions between two parameters, and its second order (NG-2; Martens 2016, section 5.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses, trees
from tests import oracles, problems
from tests.tolerances import rounding

DIRECTIONS = {"forward": False, "reverse": True}
every_problem = pytest.mark.parametrize("name", problems.PROBLEMS)


@jax.jit
def direction(params):
    """Of a length at which predictions change but do not saturate."""
    step = trees.random_normal(jax.random.key(7), params)
    return trees.scale(1 / trees.norm(step), step)


def of(objective, params, others, batch, reverse):
    first, second = (params, others) if reverse else (others, params)
    return oracles.divergence(objective, first, second, batch)


@pytest.mark.parametrize(
    ("name", "chunk_size"), [*((name, None) for name in problems.PROBLEMS), ("weighted", 2), ("two_terms", 2)]
)
def test_both_directions_are_the_expectations_over_all_targets(name, chunk_size):
    _, objective, params, batch = problems.problem(name)

    @jax.jit
    def compute(params, others):
        at = objective.linearize(params, batch, chunk_size=chunk_size)
        return [curvax.kl_divergence(at, others, reverse=reverse) for reverse in DIRECTIONS.values()]

    others = jax.jit(trees.add)(params, direction(params))
    for got, reverse in zip(compute(params, others), DIRECTIONS.values(), strict=True):
        expected = of(objective, params, others, batch, reverse)
        assert expected > 1e-4
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@every_problem
def test_the_expansion_is_half_the_form_of_the_fisher_matrix_without_the_penalty(name):
    _, objective, params, batch = problems.problem(name)
    step = direction(params)
    got = jax.jit(lambda p, d: curvax.quadratic_divergence(objective.linearize(p, batch), d))(params, step)
    matrix, flat = oracles.dense_fisher(objective.replace(l2=None), params, batch), oracles.ravel(step)
    np.testing.assert_allclose(got, flat @ matrix @ flat / 2, rtol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "recurrent", "poisson", "gaussian", "weighted", "deep_linear"])
def test_the_rest_of_the_expansion_is_of_third_order_at_either_end_and_of_fourth_in_the_mean(name):
    """Slopes over four octaves of ||delta||; the mean of both directions goes with the mean of both matrices."""
    _, objective, params, batch = problems.problem(name)
    unit = direction(params)

    @jax.jit
    @jax.vmap
    def rests(length):
        step = trees.scale(length, unit)
        others = trees.add(params, step)
        here, there = objective.linearize(params, batch), objective.linearize(others, batch)
        exact = [curvax.kl_divergence(here, others, reverse=reverse) for reverse in DIRECTIONS.values()]
        second = [curvax.quadratic_divergence(at, step) for at in (here, there)]
        thirds = jnp.stack([value - form for value in exact for form in second])
        return thirds, sum(exact) / 2 - sum(second) / 2, sum(second) / 2

    # So short that the next order does not show, so long that rounding does not.
    lengths = 2.0 ** -np.arange(8, 13)
    thirds, fourth, forms = map(np.abs, rests(lengths))
    slopes = np.diff(np.log2(thirds), axis=0)
    np.testing.assert_allclose(slopes, -3, atol=0.1)
    np.testing.assert_allclose(np.diff(np.log2(fourth)), -4, atol=0.1)
    np.testing.assert_allclose(np.diff(np.log2(forms)), -2, atol=0.1)


def test_it_is_zero_at_the_point_and_not_negative_anywhere():
    _, objective, params, batch = problems.problem("mlp")

    @jax.jit
    def compute(keys):
        at = objective.linearize(params, batch)

        def one(key):
            others = trees.add(params, trees.random_normal(key, params))
            return [curvax.kl_divergence(at, others, reverse=reverse) for reverse in DIRECTIONS.values()]

        return curvax.kl_divergence(at, params), jnp.stack(jax.vmap(one)(keys))

    nothing, values = compute(jax.random.split(jax.random.key(0), 50))
    assert nothing == 0
    assert np.all(values > 0)


def test_the_fisher_matrix_is_its_hessian_in_either_argument():
    _, objective, params, batch = problems.problem("gaussian")

    @jax.jit
    def compute(flat):
        at = objective.linearize(params, batch)

        def of(flat, reverse):
            return curvax.kl_divergence(at, oracles.unravel(flat, params), reverse=reverse)

        return [(jax.grad(of)(flat, r), jax.hessian(of)(flat, r)) for r in DIRECTIONS.values()]

    matrix = oracles.dense_fisher(objective, params, batch)
    scale = float(np.abs(matrix).max())
    for slope, hessian in compute(oracles.ravel(params)):
        np.testing.assert_allclose(slope, 0, atol=rounding(jnp.float64, 100, scale=scale))
        np.testing.assert_allclose(hessian, matrix, atol=rounding(jnp.float64, 1000, scale=scale))


@pytest.mark.parametrize("name", ["mlp", "poisson", "weighted", "deep_linear"])
def test_of_natural_parameters_one_draw_is_the_divergence_itself(name):
    """-log r(y|z') + log r(y|z) is affine in T(y), and the slope takes T(y) out."""
    _, objective, params, batch = problems.problem(name)
    others = trees.add(params, direction(params))

    @jax.jit
    def compute(params, others):
        at = objective.linearize(params, batch)
        drawn = curvax.kl_divergence(at, others, key=jax.random.key(3), num_samples=1)
        return drawn, curvax.kl_divergence(at, others)

    drawn, exact = compute(params, others)
    np.testing.assert_allclose(drawn, exact, rtol=1e-10)


def test_draws_have_the_divergence_for_mean_whatever_the_direction_and_the_chunks():
    _, objective, params, batch = problems.problem("gaussian")
    others = trees.add(params, trees.scale(0.5, direction(params)))

    @jax.jit
    def compute(keys):
        whole, chunked = (objective.linearize(params, batch, chunk_size=size) for size in (None, 2))

        def draws(at, reverse):
            def one(key):
                return curvax.kl_divergence(at, others, reverse=reverse, key=key, num_samples=2)

            return jax.vmap(one)(keys)

        exact = [curvax.kl_divergence(whole, others, reverse=r) for r in DIRECTIONS.values()]
        return exact, [draws(whole, r) for r in DIRECTIONS.values()], draws(chunked, False)

    exact, drawn, chunked = compute(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(chunked, drawn[0], rtol=1e-10)
    for value, draws in zip(exact, map(np.asarray, drawn), strict=True):
        error = draws.std() / np.sqrt(len(draws))
        assert abs(draws.mean() - value) < 4 * error
        assert error < 0.02 * value, "too few draws to notice a bias"


def test_the_deviation_of_the_draws_falls_as_the_divergence_does():
    """Without the term of the slope it would be of first order in delta, and drown what it estimates."""
    _, objective, params, batch = problems.problem("gaussian")
    unit = direction(params)

    @jax.jit
    @jax.vmap
    def compute(length):
        at, others = objective.linearize(params, batch), trees.add(params, trees.scale(length, unit))
        keys = jax.random.split(jax.random.key(1), 200)
        draws = jax.vmap(lambda key: curvax.kl_divergence(at, others, key=key, num_samples=1))(keys)
        return jnp.std(draws) / curvax.kl_divergence(at, others)

    relative = np.asarray(compute(10.0 ** -np.arange(1, 5)))
    assert relative.max() < 1.3 * relative.min()


def test_the_monte_carlo_expansion_is_that_of_the_monte_carlo_fisher_matrix():
    _, objective, params, batch = problems.problem("regularised")
    step = direction(params)

    @jax.jit
    def compute(params, step):
        key, at = jax.random.key(5), objective.linearize(params, batch)
        got = curvax.quadratic_divergence(at, step, key=key, num_samples=3)
        free = objective.replace(l2=None).linearize(params, batch)
        return got, curvax.fisher(free, key=key, num_samples=3).quadratic(step) / 2

    np.testing.assert_allclose(*compute(params, step), rtol=1e-12)


def test_complex_outputs_count_by_both_parts_and_a_loss_value_is_not_needed():
    """N(z, I) of real and imaginary part: half the squared distance. Without a value, and without targets."""

    def model(w, x):
        return jax.lax.complex(x @ w * jnp.cos(x @ w), x @ w * jnp.sin(x @ w))

    objective = curvax.Objective(model, losses.curvature_only(losses.squared_error()))
    x = jnp.eye(3)

    @jax.jit
    def compute(w, other):
        at = objective.linearize(w, (x, None))
        drawn = curvax.kl_divergence(at, other, key=jax.random.key(0), num_samples=2)
        return curvax.kl_divergence(at, other), drawn

    w, other = np.array([0.3, -1.0, 2.0]), np.array([0.2, 1.0, 2.5])
    exact, drawn = compute(w, other)
    expected = np.mean(np.abs(w * np.exp(1j * w) - other * np.exp(1j * other)) ** 2) / 2
    np.testing.assert_allclose([exact, drawn], expected, rtol=1e-12)


def test_what_is_missing_is_said():
    objective = curvax.Objective(lambda w, x: x @ w, losses.from_function(lambda z, y: jnp.sum(z * y), convex=True))
    w, batch = jnp.ones((2, 1)), (jnp.eye(2), jnp.ones((2, 1)))
    at = objective.linearize(w, batch)
    with pytest.raises(ValueError, match="no divergence in closed form; pass key= and num_samples="):
        curvax.kl_divergence(at, w)
    with pytest.raises(ValueError, match="make it with sample="):
        curvax.kl_divergence(at, w, key=jax.random.key(0), num_samples=1)
    with pytest.raises(ValueError, match="takes both key= and num_samples="):
        curvax.kl_divergence(at, w, num_samples=1)
    with pytest.raises(ValueError, match="takes both key= and num_samples="):
        curvax.quadratic_divergence(at, w, key=jax.random.key(0))
    with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
        curvax.kl_divergence(at, w, key=jax.random.key(0), num_samples=0)
    with pytest.raises(ValueError, match="params"):
        curvax.kl_divergence(at, {"w": w})
