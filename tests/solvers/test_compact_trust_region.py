"""The trust-region problem of compact matrices: optimality conditions, and the dense solver (methods SR-4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import trees
from curvax.solvers import compact_trust_region, dense_trust_region


def random_problem(seed, size=8, count=3):
    """An indefinite matrix more often than not."""
    generator = np.random.default_rng(seed)
    core = generator.normal(size=(count, count))
    scale = generator.normal() + 1
    psi = generator.normal(size=(count, size)) * 10 ** generator.uniform(-1, 1)
    gradient = generator.normal(size=size) * 10 ** generator.uniform(-2, 2)
    return jnp.asarray(scale), jnp.asarray(psi), jnp.asarray(core + core.T), jnp.asarray(gradient)


@jax.jit
def solve(scale, psi, core, gradient, radius):
    matrix = curvax.compact_map(scale, psi, core)
    dense = matrix.to_dense()
    return compact_trust_region(matrix, gradient, radius), dense, dense_trust_region(dense, gradient, radius)


def check_optimal(solution, dense, gradient, radius):
    """(B + sigma I) p = -g, B + sigma I not indefinite, sigma >= 0, sigma (||p|| - radius) = 0."""
    p, sigma = np.asarray(solution.step), float(solution.multiplier)
    unit = np.abs(np.linalg.eigvalsh(dense)).max() + sigma
    residual = dense @ p + sigma * p + gradient
    assert np.linalg.norm(residual) <= 1e-8 * (unit * np.linalg.norm(p) + np.linalg.norm(gradient))
    assert np.linalg.norm(p) <= radius * (1 + 1e-9)
    assert sigma >= 0
    assert sigma * abs(np.linalg.norm(p) - radius) <= 1e-7 * unit * radius
    assert np.linalg.eigvalsh(dense).min() + sigma >= -1e-8 * unit
    np.testing.assert_allclose(solution.norm, np.linalg.norm(p), rtol=1e-8)


def test_five_hundred_random_problems_are_solved_to_the_optimality_conditions():
    indefinite = 0
    for seed in range(500):
        scale, psi, core, gradient = random_problem(seed)
        radius = 10 ** np.random.default_rng(seed).uniform(-2, 2)
        solution, dense, reference = solve(scale, psi, core, gradient, radius)
        check_optimal(solution, np.asarray(dense), np.asarray(gradient), radius)
        np.testing.assert_allclose(solution.model_value, reference.model_value, rtol=1e-6)
        indefinite += np.linalg.eigvalsh(dense).min() < 0
    assert indefinite > 200


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_the_hard_case(where):
    """The gradient is orthogonal to the lowest eigenvector, in the range of Psi or outside of it."""
    if where == "inside":
        scale, psi, core = 1.0, np.eye(6)[:2], np.diag([-0.25, 1.0])  # eigenvalues -3, 2 and 1
        gradient = np.array([0.0, 1, 1, 0, 0, 0])
    else:
        scale, psi, core = -1.0, np.eye(6)[:2], np.diag([0.5, 1.0])  # eigenvalues 1, 0 and -1
        gradient = np.array([1.0, 1, 0, 0, 0, 0])
    for radius in (0.1, 10.0):
        solution, dense, _ = solve(*map(jnp.asarray, (scale, psi, core, gradient)), radius)
        check_optimal(solution, np.asarray(dense), gradient, radius)
        assert bool(solution.hard_case) == (radius == 10.0)


def test_vectors_that_span_everything():
    scale, psi, core, gradient = random_problem(3, size=3, count=3)
    solution, dense, _ = solve(scale, psi, core, gradient, 0.5)
    check_optimal(solution, np.asarray(dense), np.asarray(gradient), 0.5)


@jax.jit
def solve_empty(psi, core, gradient):
    return compact_trust_region(curvax.compact_map(2.0, psi, core, jnp.zeros(3, bool)), gradient, 1e9).step


def test_an_empty_memory_is_a_multiple_of_the_identity():
    _, psi, core, gradient = random_problem(3, size=3, count=3)
    np.testing.assert_allclose(solve_empty(psi, core, gradient), -gradient / 2, rtol=1e-12)


def test_pytrees_and_single_precision():
    generator = np.random.default_rng(0)
    psi = {
        name: jnp.asarray(generator.normal(size=(3, *shape)), jnp.float32)
        for name, shape in (("a", (40, 30)), ("b", (7,)))
    }

    @jax.jit
    def norms(psi, radius):
        core = jnp.diag(jnp.array([1.0, -300.0, 50.0], jnp.float32))
        matrix = curvax.compact_map(jnp.float32(1), psi, core)
        gradient = jax.tree.map(lambda leaf: leaf[0] + 1, psi)
        solution = compact_trust_region(matrix, gradient, radius)
        assert solution.step["a"].dtype == jnp.float32
        residual = trees.add(trees.add_scaled(matrix(solution.step), solution.multiplier, solution.step), gradient)
        return [trees.norm(x) for x in (solution.step, residual, gradient)]

    step, residual, gradient = norms(psi, jnp.float32(2))
    np.testing.assert_allclose(step, 2, rtol=1e-5)
    assert residual < 1e-4 * gradient
