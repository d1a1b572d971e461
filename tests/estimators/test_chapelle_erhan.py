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


@pytest.mark.parametrize("name", ["mlp", "gaussian", "weighted", "regularised", "recurrent", "tied"])
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


def centred(params, x):
    """Examples are coupled, as by batch statistics in training."""
    x = x @ params["a"]
    return jnp.tanh(x - jnp.mean(x, axis=0)) @ params["b"]


def of_six(params, x):
    """Cannot be traced at another number of examples."""
    return (jnp.tanh(x @ params["a"]).reshape(6, 4) @ params["b"]).reshape(x.shape[0], 2)


def other_at_six(params, x):
    """Computes differently for six examples than for seven and eleven."""
    hidden = jnp.tanh(x @ params["a"])
    return hidden @ jnp.sin(params["b"]) if x.shape[0] == 6 else hidden @ params["b"]


def recurrent(params, x):
    """Outputs at every step."""

    def step(h, x):
        h = jnp.tanh(x @ params["a"] + h)
        return h, h @ params["b"]

    return jax.lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def entangled(params, x):
    """One leaf has no structure."""
    return jnp.tanh(x @ params["a"]) @ jnp.sin(params["b"])


@pytest.mark.parametrize(
    ("model", "chunk_size"),
    [(centred, None), (of_six, None), (other_at_six, None), (recurrent, None), (entangled, None), (entangled, 2)],
)
def test_unbiased_whatever_tells_examples_apart(model, chunk_size):
    """Coupled examples, none but six, masked steps of sequences, a leaf without structure, a point in chunks."""
    draw = np.random.default_rng(0)
    shape, options = (6, 3), {}
    if model is recurrent:
        shape, mask = (6, 5, 3), np.arange(5) < np.array([5, 3, 1, 4, 2, 5])[:, None]
        options = {"mask": lambda batch: jnp.asarray(mask)}
    objective = curvax.Objective(model, curvax.losses.softmax_cross_entropy(), **options)
    params = {"a": jnp.asarray(draw.normal(size=(3, 4))), "b": jnp.asarray(draw.normal(size=(4, 2)))}
    batch = jnp.asarray(draw.normal(size=shape)), jnp.asarray(draw.integers(0, 2, shape[:-1]))

    @jax.jit
    @jax.vmap
    def estimates(key):
        matrix = curvax.ggn(objective.linearize(params, batch, chunk_size=chunk_size))
        return trees.ravel(curvax.estimators.chapelle_erhan_diagonal(matrix, key))

    seen = np.asarray(estimates(jax.random.split(jax.random.key(1), DRAWS)))
    exact = np.diag(jax.jit(oracles.dense_ggn)(objective, params, batch))
    errors = (seen.mean(0) - exact) / np.maximum(seen.std(0) / np.sqrt(DRAWS), 1e-9 * exact.max())
    assert np.abs(errors).max() < 5
    assert seen.std(0).sum() < 0.1 * np.sqrt(DRAWS) * exact.sum(), "too few draws to notice a bias"


def test_gradients_of_examples_are_formed_in_the_memory_of_the_activations():
    """Weights shared over two steps: all gradients at once would be 40 MB; and what does not divide evenly counts."""
    draw = np.random.default_rng(0)

    def twice(params, x):
        return jnp.tanh(jnp.tanh(x @ params) @ params)[:, :1]

    objective = curvax.Objective(twice, curvax.losses.squared_error())
    for count, width in ((13, 6), (1001, 70)):
        params = jnp.asarray(draw.normal(size=(width, width)) / width**0.5)
        batch = jnp.asarray(draw.normal(size=(count, width))), jnp.zeros((count, 1))

        @jax.jit
        def estimate(params, batch):
            matrix = curvax.ggn(objective.linearize(params, batch))
            return curvax.estimators.chapelle_erhan_diagonal(matrix, jax.random.key(0))

        compiled = estimate.lower(params, batch).compile()
        if count > 1000:
            assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * count * params.size * 8
        # With one output noise of signs is squared away, and the estimate is exact.
        rows = jax.jit(jax.jacobian(twice))(params, batch[0])[:, 0]
        np.testing.assert_allclose(compiled(params, batch), np.mean(np.square(rows), axis=0), rtol=1e-9)
