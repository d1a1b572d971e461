"""Every way to invert a matrix against a dense float64 inverse, and where each stops being good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.matrices.inverses import inverse_of, inverse_root, inverses_of_stacks, over_blocks, sequenced
from tests.tolerances import rounding

METHODS = ["cholesky", "schur", "eigen", "newton_schulz"]


def spd(seed, size, condition, dtype=np.float64):
    """A symmetric matrix with eigenvalues from 1 / condition to 1, spread evenly in their logarithms."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.geomspace(1 / condition, 1, size) if size > 1 else np.ones(1)
    matrix = ((vectors * values) @ vectors.T).astype(dtype)
    return (matrix + matrix.T) / 2


def invert(matrices, method, previous=None):
    return np.asarray(jax.jit(lambda m, p: inverse_of(m, method, p))(matrices, previous))


def backward_errors(inverse, matrix):
    """||I - A X|| in the spectral norm, worked out in float64."""
    exact = matrix.astype(np.float64)
    return np.linalg.norm(np.eye(len(matrix)) - exact @ inverse.astype(np.float64), 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 7, 601])
def test_stacks_are_inverted_one_by_one_and_to_symmetric_matrices(method, size):
    stack = np.stack([spd(seed, size, 50.0) for seed in (0, 1)])
    found = invert(stack, method)
    tolerance = rounding(np.float64, size + 20, scale=50.0, condition=50.0)  # ||A^{-1}|| times its relative change
    np.testing.assert_allclose(found, np.linalg.inv(stack), atol=tolerance)
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))


def test_diagonals_are_inverted_entry_by_entry():
    np.testing.assert_array_equal(invert(np.array([[1.0, 2.0], [4.0, 8.0]]), "schur"), [[1, 0.5], [0.25, 0.125]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_float32_inverts_ill_conditioned_factors(method, condition):
    """The residual is the condition times rounding: the error of an inverse that is computed from rounded entries."""
    matrix = spd(2, 601, condition, np.float32)
    found = invert(matrix[None], method)[0]
    assert found.dtype == np.float32
    assert backward_errors(found, matrix) < rounding(np.float32, 601, condition=condition)
    assert np.all(np.linalg.eigvalsh(found.astype(np.float64)) > 0)


def test_cholesky_factors_by_halves_invert_what_float32_can_hardly_tell_from_singular():
    matrix = spd(2, 601, 1e6, np.float32)
    found = invert(matrix[None], "cholesky")[0]
    assert backward_errors(found, matrix) < rounding(np.float32, 601, condition=1e6)
    assert np.all(np.linalg.eigvalsh(found.astype(np.float64)) > 0)


@pytest.mark.parametrize("method", METHODS)
def test_matrices_of_near_sizes_and_any_scale_are_inverted_together(method):
    """Sizes that share a loop and sizes that do not, filled up and not, diagonals between them, from starts or none."""
    sizes, scales = [(2, 7), (1, 9), (3, 8), (1, 40), (2, 5), (1, 9)], [1.0, 1e6, 1e-6, 1.0, 3.0, 1e-3]
    stacks = [
        scale * np.stack([spd(7 * seed + n, n, 30.0) for seed in range(count)])
        for (count, n), scale in zip(sizes, scales, strict=True)
    ]
    stacks.insert(2, np.array([[1.0, 4.0]]))
    exact = [1 / stack if stack.ndim == 2 else np.linalg.inv(stack) for stack in stacks]
    invert_all = jax.jit(lambda stacks, starts: inverses_of_stacks(stacks, method, starts))
    for starts in (None, [1.1 * inverse for inverse in exact]):
        for found, inverse in zip(invert_all(stacks, starts), exact, strict=True):
            scale = np.max(np.abs(inverse))
            np.testing.assert_allclose(found, inverse, atol=rounding(np.float64, 100, scale=scale, condition=30.0))
            assert found.shape == inverse.shape


def test_those_of_near_sizes_are_compiled_once():
    """By the Cholesky factors that the program takes: as many for a class of sizes as for its largest matrix alone."""

    def count(sizes):
        stacks = [jnp.zeros((1, n, n)) for n in sizes]
        text = jax.jit(lambda stacks: inverses_of_stacks(stacks)).lower(stacks).as_text()
        return text.count("stablehlo.cholesky") + text.count("potrf")

    assert count((31,)) == 1
    assert count((30, 31, 31, 65, 66, 250, 251)) == sum(count((n,)) for n in (31, 66, 251))


def test_a_stack_that_is_split_over_devices_is_gathered_once_and_not_for_each_of_its_matrices():
    mesh = jax.make_mesh((8,), ("blocks",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("blocks"))
    stack = np.stack([spd(seed, 6, 10.0) for seed in range(16)])
    jitted = jax.jit(lambda stacks: inverses_of_stacks(stacks), in_shardings=split, out_shardings=split)
    lines = jitted.lower([stack, stack]).compile().as_text().splitlines()
    entry = next(place for place, line in enumerate(lines) if line.startswith("ENTRY"))
    gathers = [place for place, line in enumerate(lines) if " all-gather(" in line]
    assert gathers
    assert min(gathers) > entry  # none within the computation of a loop, which stands before the program's
    for found in jitted([stack, stack]):
        np.testing.assert_allclose(found, np.linalg.inv(stack), rtol=1e-10, atol=1e-10)


def test_one_that_is_not_positive_definite_does_not_spoil_those_beside_it():
    stacks = [np.stack([spd(1, 6, 10.0), -np.eye(6), spd(2, 6, 10.0)]), spd(3, 7, 10.0)[None]]
    found = jax.jit(lambda stacks: inverses_of_stacks(stacks))(stacks)
    finite = [bool(np.all(np.isfinite(matrix))) for stack in found for matrix in stack]
    assert finite == [True, False, True, True]
    assert not np.any(np.isfinite(np.diagonal(found[0][1])))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("size", [3, 127, 128, 300])
def test_the_root_of_an_inverse_has_the_precision_of_a_cholesky_factor_at_any_scale(size, scale):
    """In float32, near the ends of its range as well: what the factorised matrix has besides is not felt."""
    matrix = (np.float32(scale) * spd(9, size, 1e4)).astype(np.float32)
    root = np.asarray(jax.jit(inverse_root)(matrix)).astype(np.float64)
    exact = matrix.astype(np.float64)
    solved = np.linalg.inv(np.linalg.cholesky(exact)).T
    error = np.linalg.norm(root - solved, 2) / np.linalg.norm(solved, 2)
    assert error < rounding(np.float32, size, condition=1e4)


def test_what_is_not_positive_definite_has_no_root():
    late = np.eye(300)
    late[299, 299] = -1.0  # in the last of the parts that it is cut into
    for matrix in (-np.eye(3), np.diag([1.0, 0.0, 1.0]), np.full((3, 3), np.nan), late):
        assert not np.all(np.isfinite(jax.jit(inverse_root)(matrix)))


@pytest.mark.parametrize("size", [3, 700])
def test_the_root_of_an_inverse_is_triangular_and_makes_the_matrix_the_identity(size):
    matrix = spd(8, size, 100.0)
    root = np.asarray(jax.jit(inverse_root)(matrix))
    np.testing.assert_array_equal(root, np.triu(root))
    np.testing.assert_allclose(root.T @ matrix @ root, np.eye(size), atol=rounding(np.float64, size, condition=100.0))


def test_eigenvalues_that_rounding_made_negative_are_raised():
    matrix = spd(3, 20, 1e3, np.float32)
    indefinite = matrix - 2e-3 * np.eye(20, dtype=np.float32)
    found = invert(indefinite[None], "eigen")[0]
    assert np.all(np.isfinite(found))
    assert np.all(np.linalg.eigvalsh(found.astype(np.float64)) > 0)


STARTS = {
    "none": lambda exact: None,
    "near": lambda exact: exact / 1.05,
    "zeros": np.zeros_like,
    "another scale": lambda exact: 30 * exact,
    "noise": lambda exact: np.random.default_rng(0).normal(size=exact.shape),
    "not finite": lambda exact: np.full_like(exact, np.nan),
    "infinite": lambda exact: np.full_like(exact, np.inf),
}


@pytest.mark.parametrize("start", STARTS)
def test_newton_schulz_arrives_from_wherever_it_starts(start):
    matrix = spd(4, 40, 1e3)
    exact = np.linalg.inv(matrix)
    previous = STARTS[start](exact)
    found = invert(matrix[None], "newton_schulz", None if previous is None else previous[None])[0]
    np.testing.assert_allclose(found, exact, atol=rounding(np.float64, 200, scale=1e3, condition=1e3))
    np.testing.assert_array_equal(found, found.T)


def test_newton_schulz_takes_what_it_is_given_where_that_is_good_enough():
    """One step from a residual of the root of the rounding: X <- X (2 I - A X)."""
    matrix = spd(5, 10, 10.0)
    near = np.linalg.inv(matrix) * (1 + 1e-9)
    found = invert(matrix[None], "newton_schulz", near[None])[0]
    np.testing.assert_allclose(found, near @ (2 * np.eye(10) - matrix @ near), rtol=1e-12, atol=1e-12)


def test_newton_schulz_stops_at_the_precision_that_there_is():
    """Of a matrix that is singular in float32 it gives something finite, or what is worse than nothing would spread."""
    matrix = spd(6, 50, 1e12, np.float32)
    assert np.all(np.isfinite(invert(matrix[None], "newton_schulz")))


def test_what_is_done_one_after_another_is_done_in_order():
    found = jax.jit(lambda x: sequenced([jnp.sin, jnp.cos], [x, 2 * x], after=x))(1.0)
    np.testing.assert_allclose(found, [np.sin(1.0), np.cos(2.0)])


def test_one_matrix_alone_is_multiplied_without_a_batch_axis():
    stack = np.random.default_rng(0).normal(size=(3, 4, 4))
    for count in (1, 3):
        lowered = jax.jit(lambda x: over_blocks(jnp.matmul, x, x)).trace(stack[:count]).jaxpr
        (product,) = [equation for equation in lowered.eqns if equation.primitive.name == "dot_general"]
        assert product.outvars[0].aval.ndim == (2 if count == 1 else 3)
        np.testing.assert_allclose(over_blocks(jnp.matmul, stack[:count], stack[:count]), stack[:count] @ stack[:count])
