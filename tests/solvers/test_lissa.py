"""LiSSA against the partial sums of its series, dense (CB-8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import solvers

N = 6


def problem(seed, largest=1.5):
    rng = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(rng.normal(size=(N, N)))
    return vectors @ np.diag(np.geomspace(0.1, largest, N)) @ vectors.T, rng.normal(size=N)


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_it_is_the_partial_sum_of_the_series(count, scale):
    matrix, b = problem(0)
    found = jax.jit(lambda b: solvers.lissa(lambda v, r: matrix @ v, b, num_iterations=count, scale=scale))(b)
    step = np.eye(N) - scale * matrix
    np.testing.assert_allclose(found, sum(np.linalg.matrix_power(step, r) @ (scale * b) for r in range(count)))


@pytest.mark.parametrize(("largest", "converges"), [(1.9, True), (2.1, False)])
def test_it_converges_below_twice_the_inverse_of_the_largest_eigenvalue(largest, converges):
    matrix, b = problem(1, largest)
    found = jax.jit(lambda b: solvers.lissa(lambda v, r: matrix @ v, b, num_iterations=400))(b)
    exact = np.linalg.solve(matrix, b)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 1e-10 if converges else error > 1e3


def test_independent_estimates_are_unbiased():
    """Each of two halves of the data with even chances, over all sequences of them."""
    halves = np.stack([problem(seed, 1.0)[0] for seed in (2, 3)])
    b, count = problem(2)[1], 4
    sequences = np.array(np.meshgrid(*[[0, 1]] * count)).reshape(count, -1).T

    @jax.jit
    def mean(sequences):
        def run(sequence):
            return solvers.lissa(lambda v, r: jnp.asarray(halves)[sequence[r]] @ v, b, num_iterations=count)

        return jnp.mean(jax.vmap(run)(sequences), axis=0)

    whole = halves.mean(axis=0)
    expected = sum(np.linalg.matrix_power(np.eye(N) - whole, r) @ b for r in range(count))
    np.testing.assert_allclose(mean(jnp.asarray(sequences)), expected, rtol=1e-12)


def test_a_newton_step_of_a_model_by_batches():
    """Pytrees, half precision beside single, and a traced number of iterations."""
    draw = np.random.default_rng(4)
    params = {"w": jnp.zeros((3, 2), jnp.float32), "b": jnp.zeros(2, jnp.bfloat16)}
    inputs = jnp.asarray(draw.normal(size=(4, 8, 3)) / 2, jnp.float32)
    targets = jnp.asarray(draw.normal(size=(4, 8, 2)), jnp.float32)
    objective = curvax.Objective(lambda p, x: x @ p["w"] + p["b"].astype(x.dtype), curvax.losses.squared_error())

    @jax.jit
    def step(count):
        everything = tuple(x.reshape(32, -1) for x in (inputs, targets))
        gradient = jax.grad(objective)(params, everything)

        def product(v, r):
            batch = tuple(x[r % 4] for x in (inputs, targets))
            return curvax.ggn(objective.linearize(params, batch))(v)

        downhill = jax.tree.map(jnp.negative, gradient)
        return solvers.lissa(product, downhill, num_iterations=count, scale=0.5), everything

    found, everything = step(400)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, params)
    with_one = np.concatenate([everything[0], np.ones((32, 1))], axis=1)
    exact = np.linalg.lstsq(with_one, np.asarray(everything[1]), rcond=None)[0]
    stacked = np.concatenate([found["w"], np.asarray(found["b"], float)[None]])
    assert np.linalg.norm(stacked - exact) < 0.3 * np.linalg.norm(exact)  # as each batch has a solution of its own


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="num_iterations is 0; it must be at least 1"):
        solvers.lissa(lambda v, r: v, jnp.ones(2), num_iterations=0)
    with pytest.raises(ValueError, match=r"the result of matvec.*has shape"):
        solvers.lissa(lambda v, r: v[:1], jnp.ones(2), num_iterations=1)
