"""Caps, tolerances and radii that are known at run time only, as ``optax.inject_hyperparams`` hands them over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import solvers

DIAGONAL = np.geomspace(0.1, 10, 12)
B = np.random.default_rng(0).standard_normal(12)


def matvec(v):
    return jnp.asarray(DIAGONAL) * v


def in_subspace(max_iterations, tolerance):
    subspace = solvers.krylov_subspace(matvec, B, num_vectors=4)
    return solvers.minimize_in_subspace(
        lambda x: jnp.sum(jnp.cosh(x)) - B @ x, subspace, max_iterations=max_iterations, tolerance=tolerance
    )


def compact(radius):
    psi = np.random.default_rng(1).standard_normal((2, 12))
    return solvers.compact_trust_region(curvax.compact_map(1.5, psi, jnp.diag(jnp.array([-0.1, 2.0]))), B, radius)


def preconditioner(offset, exponent):
    return solvers.diagonal_preconditioner(jnp.asarray(DIAGONAL), offset=offset, exponent=exponent)(B)


# The call and its options
CASES = {
    "cg": (lambda **options: solvers.cg(matvec, B, **options), {"max_iterations": 5, "tolerance": 1e-2}),
    "cg to a tolerance": (
        lambda **options: solvers.cg(matvec, B, **options),
        {"max_iterations": 50, "tolerance": 0.25},
    ),
    "steihaug": (
        lambda **options: solvers.steihaug(matvec, B, **options),
        {"max_iterations": 3, "tolerance": 1e-2, "radius": 16.0},
    ),
    "steihaug to the boundary": (
        lambda **options: solvers.steihaug(matvec, B, **options),
        {"max_iterations": 30, "tolerance": 1e-2, "radius": 0.5},
    ),
    "subspace": (in_subspace, {"max_iterations": 3, "tolerance": 2.0**-20}),
    "dense": (lambda radius: solvers.dense_trust_region(jnp.diag(DIAGONAL - 1), B, radius), {"radius": 0.5}),
    "compact": (compact, {"radius": 0.5}),
    "preconditioner": (preconditioner, {"offset": 0.5, "exponent": 0.75}),
}


@pytest.mark.parametrize("integers", [np.int32, np.int64])
@pytest.mark.parametrize("name", CASES)
def test_traced_options_are_those_of_python_and_no_rank_is_promoted(name, integers):
    call, options = CASES[name]
    traced = {key: integers(x) if isinstance(x, int) else np.float32(x) for key, x in options.items()}
    expected = jax.jit(lambda: call(**{key: x.item() for key, x in traced.items()}))()
    with jax.numpy_rank_promotion("raise"):
        got = jax.jit(lambda options: call(**options))(traced)
    if name.startswith("cg"):
        assert got.model_trace is None
        expected = expected._replace(model_trace=None)
    if "max_iterations" in options:
        assert (expected.iterations == options["max_iterations"]) == ("to" not in name.split())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)


@pytest.mark.parametrize("option", [{"progress_tolerance": 1e-4}, {"store_at": (1, 2)}])
def test_rules_that_look_back_need_a_cap_that_is_known(option):
    with pytest.raises(ValueError, match="need max_iterations as a Python integer"):
        jax.jit(lambda cap: solvers.cg(matvec, B, max_iterations=cap, tolerance=0.1, **option))(5)
