"""The Chapelle-Erhan diagonal: unbiased, exact in its penalty, less variable with signs than normal noise (T4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from tests import oracles, problems

DRAWS = 3000


def draws(name, distribution):
    _, objective, params, batch = problems.problem(name)

    @jax.jit
    @jax.vmap
    def draw(key):
        matrix = curvax.ggn(objective.linearize(params, batch))
        return trees.ravel(
            curvax.estimators.chapelle_erhan_diagonal(matrix, key, num_samples=2, distribution=distribution)
        )

    exact = np.diag(jax.jit(oracles.dense_ggn)(objective, params, batch))
    return np.asarray(draw(jax.random.split(jax.random.key(0), DRAWS))), exact


@pytest.mark.parametrize("name", ["mlp", "gaussian", "weighted", "regularised"])
def test_unbiased_and_less_variable_with_signs_than_with_normal_noise(name):
    signs, exact = draws(name, trees.random_rademacher)
    normal, _ = draws(name, trees.random_normal)
    for estimates in (signs, normal):
        assert (estimates >= 0).all()
        deviation = estimates.std(0) / np.sqrt(DRAWS)
        seen = deviation > 1e-12 * exact.max()
        assert np.abs((estimates.mean(0) - exact)[seen] / deviation[seen]).max() < 5
        np.testing.assert_allclose(estimates.mean(0)[~seen], exact[~seen], atol=1e-12)
        assert deviation.sum() < 0.1 * exact.sum(), "too few draws to notice a bias"
    assert signs.var(0).sum() < normal.var(0).sum()


def test_the_penalty_is_exact():
    objective = curvax.Objective(lambda w, x: 0.0 * (x @ w), curvax.losses.squared_error(), l2=0.3)
    matrix = curvax.ggn(objective.linearize(jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.ones((4, 2)))))
    estimate = curvax.estimators.chapelle_erhan_diagonal(matrix, jax.random.key(0))
    np.testing.assert_allclose(estimate, np.full((3, 2), 0.3), rtol=1e-12)
