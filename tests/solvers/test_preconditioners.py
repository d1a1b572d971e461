"""The diagonal preconditioner (CG-6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import solvers


@pytest.mark.many_compilations("formulas at many limits, each a small program")
def test_formula_and_limits():
    diagonal = {"a": jnp.array([1.0, 4.0, 9.0]), "b": jnp.array([[2.0]])}
    r = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([[4.0]])}
    applied = solvers.diagonal_preconditioner(diagonal, offset=0.5, exponent=0.6)(r)
    for name in r:
        np.testing.assert_allclose(applied[name], r[name] / (diagonal[name] + 0.5) ** 0.6, rtol=1e-14)
    default = solvers.diagonal_preconditioner(diagonal)(r)
    np.testing.assert_allclose(default["a"], r["a"] / diagonal["a"] ** 0.75, rtol=1e-14)
    np.testing.assert_allclose(solvers.diagonal_preconditioner(diagonal, exponent=0.0)(r)["a"], r["a"])
    far = solvers.diagonal_preconditioner(diagonal, offset=1e12)(r)["a"]
    np.testing.assert_allclose(far / far[0], r["a"] / r["a"][0], rtol=1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_definite_and_finite_whatever_the_diagonal(dtype):
    r = jnp.ones(4, dtype)
    for entries in ([0.0, 0, 0, 0], [1.0, 0, -1, 1e-30], [1e30, 1e-30, 0, 1]):
        applied = jax.jit(lambda d, r: solvers.diagonal_preconditioner(d)(r))(jnp.array(entries, dtype), r)
        assert applied.dtype == dtype
        assert np.all(np.isfinite(applied))
        assert np.all(applied > 0)


def test_helps_a_badly_scaled_system():
    rng = np.random.default_rng(0)
    scales = np.geomspace(1e-2, 1e2, 30)
    matrix = np.diag(scales**2) + 0.05 * np.outer(scales, scales)
    b = rng.standard_normal(30)

    @jax.jit
    def steps(exponent):
        preconditioner = solvers.diagonal_preconditioner(jnp.diag(jnp.asarray(matrix)), exponent=exponent)
        return solvers.cg(
            lambda v: matrix @ v, b, preconditioner=preconditioner, max_iterations=500, tolerance=1e-8
        ).iterations

    counts = [int(steps(exponent)) for exponent in (0.0, 0.75, 1.0)]
    assert counts[0] > 2 * counts[1] > 2 * counts[2]
    assert counts[2] <= 3


def test_integer_diagonal_is_an_error():
    with pytest.raises(TypeError, match=r"diagonal\['w'\]"):
        solvers.diagonal_preconditioner({"w": jnp.arange(3)})
