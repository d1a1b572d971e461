import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import estimators, trees
from tests.tolerances import rounding

SIZE, PAIRS = 40, 4
SPREAD = np.linspace(-3, 5, SIZE)


@functools.cache
def compiled(which):
    """The pairs for three keys; every test that can uses these few programs."""
    keys = jax.random.split(jax.random.key(0), 3)

    def solve(linear_map, tolerance):
        def one(key):
            return estimators.top_eigenpairs(linear_map, key, num_pairs=PAIRS, which=which, tolerance=tolerance)

        return jax.vmap(one)(keys)

    return jax.jit(solve)


def each_key(results):
    return [jax.tree.map(lambda leaf, index=index: leaf[index], results) for index in range(3)]


def wanted(values, which):
    order = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    return values[np.argsort(order, kind="stable")][:PAIRS]


def check(result, matrix, values, which, scale=1.0, tolerance=1e-11, atol=1e-12):
    vectors = np.asarray(jax.vmap(trees.ravel)(result.vectors), float)
    found, largest = np.asarray(result.values, float) / scale, np.max(np.abs(values)) or 1.0
    np.testing.assert_allclose(found, wanted(np.asarray(values, float), which), atol=atol * largest)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(PAIRS), atol=atol * 10)
    residuals = np.linalg.norm(vectors @ matrix - found[:, None] * vectors, axis=1) / largest
    assert np.all(residuals <= tolerance)
    assert np.all(np.asarray(result.converged))
    assert np.all(np.asarray(result.residuals) <= tolerance)


SPECTRA = {
    "spread": SPREAD,
    "positive": np.geomspace(1e-2, 1, SIZE),
    "decaying": 0.1 ** np.arange(SIZE),
    "low rank": np.r_[3, -2, np.zeros(SIZE - 2)],
    "clustered": np.r_[5, 5 - 1e-6, 5 - 2e-6, 5 - 1e-3, np.linspace(-4, 4, SIZE - 4)],
    "multiple": np.r_[[5] * 3, [4.5] * 2, np.linspace(-4, 4, SIZE - 5)],
    "more copies than wanted": np.r_[[5] * 7, np.linspace(-4, 4, SIZE - 7)],
    "multiple below": np.r_[[-5] * 3, np.linspace(-4, 3.9, SIZE - 3)],
    "identity": np.ones(SIZE),
    "two values": np.r_[[2] * 5, np.ones(SIZE - 5)],
}


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_pairs_to_rounding_with_multiplicity(which, dense_map, symmetric):
    for values in SPECTRA.values():
        matrix = symmetric(values)
        for result in each_key(compiled(which)(dense_map(matrix), 1e-11)):
            check(result, matrix, values, which)
            assert 1 <= result.restarts < 60


def test_scales(dense_map, symmetric):
    for scale in (1e-20, 1e20):
        for result in each_key(compiled("largest")(dense_map(scale * symmetric(SPREAD)), 1e-11)):
            check(result, symmetric(SPREAD), SPREAD, "largest", scale)


def test_single_precision(dense_map, symmetric):
    # Three sums over a vector stand behind one another: A v, its projection on the basis, and the length of the basis.
    atol = rounding(jnp.float32, 3 * SIZE)
    for scale in (1.0, 1e-8, 1e8):
        for values in (SPREAD, SPECTRA["multiple"], SPECTRA["identity"]):
            for result in each_key(compiled("largest")(dense_map(scale * symmetric(values), jnp.float32), 2e-5)):
                assert result.values.dtype == jnp.float32
                check(result, symmetric(values), values, "largest", scale, tolerance=2e-5, atol=atol)


def test_the_zero_map(dense_map):
    for result in each_key(compiled("largest")(dense_map(np.zeros((SIZE, SIZE))), 1e-11)):
        check(result, np.zeros((SIZE, SIZE)), np.zeros(SIZE), "largest", atol=1e-13)


def test_a_map_that_is_not_finite_stops_at_once(dense_map):
    broken = compiled("largest")(dense_map(np.full((SIZE, SIZE), np.nan)), 1e-11)
    assert not np.any(np.asarray(broken.converged))
    assert np.all(np.asarray(broken.restarts) == 0)


def test_a_tolerance_below_rounding_is_reported_as_missed(dense_map, symmetric):
    for result in each_key(compiled("largest")(dense_map(symmetric(SPREAD)), 1e-17)):
        assert not np.all(np.asarray(result.converged))
        np.testing.assert_allclose(result.values, wanted(SPREAD, "largest"), rtol=1e-13)


def small_basis(max_restarts):
    keys = jax.random.split(jax.random.key(0), 30)

    def one(linear_map, key):
        return estimators.top_eigenpairs(
            linear_map, key, num_pairs=PAIRS, num_steps=PAIRS + 3, max_restarts=max_restarts
        )

    return jax.jit(lambda linear_map: jax.vmap(functools.partial(one, linear_map))(keys))


def test_a_small_basis_takes_restarts_and_still_finds_copies_behind_small_gaps(dense_map, symmetric):
    solve, default = small_basis(300), float(jnp.finfo(jnp.float64).eps) ** (2 / 3)
    for values in (SPREAD, np.r_[[5] * 3, np.linspace(-3, 4.9, SIZE - 3)]):
        matrix = symmetric(values)
        results = solve(dense_map(matrix))
        expected = wanted(values, "largest")
        np.testing.assert_allclose(results.values, np.broadcast_to(expected, results.values.shape), rtol=1e-12)
        assert np.all(np.asarray(results.residuals) <= default)
        assert np.all(np.asarray(results.converged))
        assert np.all(np.asarray(results.restarts) > 10)


def test_too_few_restarts_are_reported(dense_map, symmetric):
    matrix = symmetric(SPREAD)
    results = small_basis(2)(dense_map(matrix))
    assert np.all(np.asarray(results.restarts) == 2)
    assert not np.any(np.asarray(results.converged))
    vectors = np.asarray(jax.vmap(jax.vmap(trees.ravel))(results.vectors))
    residuals = np.linalg.norm(vectors @ matrix - np.asarray(results.values)[..., None] * vectors, axis=-1)
    np.testing.assert_allclose(results.residuals * 5, residuals, rtol=0.1)  # 5 up to the norm found so far


def test_all_pairs_of_a_small_map(dense_map, symmetric):
    matrix = symmetric(np.r_[2, 2, np.linspace(-1, 1, 6)])
    solve = jax.jit(lambda a, key: estimators.top_eigenpairs(a, key, num_pairs=8, which="smallest"))
    result = solve(dense_map(matrix), jax.random.key(0))
    np.testing.assert_allclose(result.values, np.linalg.eigvalsh(matrix), atol=1e-13)
    assert np.all(np.asarray(result.converged))
    assert result.restarts == 0


def test_narrow_leaves(dense_map, symmetric):
    for result in each_key(compiled("largest")(dense_map(symmetric(SPREAD), jnp.bfloat16), 1e-2)):
        assert {leaf.dtype for leaf in jax.tree.leaves(result.vectors)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(result.values, wanted(SPREAD, "largest"), atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is 0; it must be at least 1"),
        ({"num_pairs": 41}, "num_pairs is 41, but the map has only 40 parameters"),
        ({"num_pairs": 4, "num_steps": 5}, "num_steps is 5; for 4 pairs it must be at least 6"),
        ({"num_pairs": 4, "which": "top"}, "'largest', 'smallest', 'magnitude'"),
        ({"num_pairs": 4, "max_restarts": -1}, "max_restarts is -1"),
    ],
)
def test_errors(arguments, message, dense_map):
    with pytest.raises(ValueError, match=message):
        estimators.top_eigenpairs(dense_map(np.eye(SIZE)), jax.random.key(0), **arguments)
