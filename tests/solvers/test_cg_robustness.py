"""What conjugate gradients do with extreme scales, large n, indefinite and singular systems, NaN, vmap and sharding."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvax
from curvax import solvers, trees
from curvax.solvers import StopReason

N = 8
SCALES = {
    "float64": (1e-8, 1e-30, 1e-150, 1e120, 2.0**-400),
    "float32": (1e-8, 1e-20, 1e-30, 1e20, 2.0**-90),
}


@functools.partial(jax.jit, static_argnames="steps")
def solve(matrix, b, tolerance, x0=None, *, steps=40):
    return solvers.cg(lambda v: matrix @ v, b, x0=x0, max_iterations=steps, tolerance=tolerance)


def symmetric(seed, eigenvalues):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return (vectors * np.asarray(eigenvalues)) @ vectors.T, vectors, rng.standard_normal(len(eigenvalues))


def close(actual, expected, rtol):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(dtype, factor) for dtype, factors in SCALES.items() for factor in factors],
)
@pytest.mark.parametrize("what", ["b", "matrix"])
def test_tiny_and_huge_systems_take_the_same_steps(dtype, factor, what):
    matrix, _, b = symmetric(0, np.geomspace(1, 100, N))
    matrix, b = matrix.astype(dtype), b.astype(dtype)
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    plain = solve(matrix, b, tolerance)
    scale = np.asarray(factor, dtype)
    if what == "b":
        result, back = solve(matrix, b * scale, tolerance), 1 / factor
    else:
        result, back = solve(matrix * scale, b, tolerance), factor
    assert result.reason == plain.reason == StopReason.CONVERGED
    assert abs(int(result.iterations) - int(plain.iterations)) <= 1
    exact = np.log2(factor) % 1 == 0
    close(np.asarray(result.value, float) * back, np.asarray(plain.value, float), 0.0 if exact else 100 * tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tolerance_is_relative_to_b_also_from_a_warm_start_far_off(scale):
    matrix, _, b = symmetric(1, np.geomspace(1, 10, N))
    result = solve(matrix, b * scale, 1e-7, 1e5 * b * scale)
    assert result.reason == StopReason.CONVERGED
    close(result.value, np.linalg.solve(matrix, b * scale), 1e-6)


@pytest.mark.parametrize("x0", [None, np.ones(N)])
def test_zero_right_hand_side_returns_zero_at_once(x0):
    matrix, _, _ = symmetric(2, np.geomspace(1, 10, N))
    result = solve(matrix, np.zeros(N), 1e-8, x0)
    assert result.iterations == 0
    assert result.reason == StopReason.CONVERGED
    assert not np.any(result.value)
    assert result.residual_norm == result.model_value == 0


@pytest.mark.parametrize(("lowest", "most"), [(0.5, 9), (1e-2, 75)])
def test_a_million_unknowns_in_float32(lowest, most):
    """Sums of a million float32 terms are accurate enough: the true residual is where the recurrence says it is."""
    n = 1_000_000
    diagonal = jnp.linspace(lowest, 1, n, dtype=jnp.float32)
    b = jax.random.normal(jax.random.key(0), (n,), jnp.float32)
    result = jax.jit(lambda d, b: solvers.cg(lambda v: d * v, b, max_iterations=100, tolerance=1e-6))(diagonal, b)
    x, d, b = (np.asarray(array, np.float64) for array in (result.value, diagonal, b))
    assert result.reason == StopReason.CONVERGED
    assert result.iterations <= most
    assert np.linalg.norm(d * x - b) < 1.2e-6 * np.linalg.norm(b)
    np.testing.assert_allclose(result.model_value, 0.5 * x @ (d * x) - b @ x, rtol=1e-5)


@pytest.mark.parametrize("b_index", [None, 2])
def test_negative_curvature_is_returned_with_the_iterate_so_far(b_index):
    eigenvalues = np.array([1.0, 2, 3, 4, 5, 6, 7, -2])
    matrix, vectors, b = symmetric(3, eigenvalues)
    # Almost no weight on the negative eigenvalue: some good steps come first.
    b = vectors @ np.append(np.ones(N - 1), 1e-3) if b_index is None else vectors[:, -1] + 0.1 * vectors[:, b_index]
    result = solve(matrix, b, 1e-10)
    assert result.reason == StopReason.NEGATIVE_CURVATURE
    assert result.iterations == 0 if b_index is not None else result.iterations > 2
    direction, x = np.asarray(result.negative_curvature_direction), np.asarray(result.value)
    assert direction @ matrix @ direction < 0
    assert direction @ (matrix @ x - b) < 0
    value = 0.5 * x @ matrix @ x - b @ x
    assert value <= 0
    np.testing.assert_allclose(result.model_value, value, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(matrix @ x - b), result.residual_norm, rtol=1e-9)
    if b_index is not None:
        # Its length means nothing.
        close(direction / np.linalg.norm(direction), b / np.linalg.norm(b), 1e-12)


def test_no_direction_is_returned_without_negative_curvature():
    matrix, _, b = symmetric(4, np.ones(N))
    assert not np.any(solve(matrix, b, 1e-8).negative_curvature_direction)


@pytest.mark.parametrize("condition", [1e10, 1e13])
def test_small_curvature_is_not_taken_for_none(condition):
    """Two eigenvalues far apart: after one step the direction has next to no curvature in units of the matrix."""
    diagonal = np.where(np.arange(N) < 4, 1.0, 1 / condition)
    result = solve(np.diag(diagonal), np.ones(N), 1e-9)
    assert result.reason == StopReason.CONVERGED
    np.testing.assert_allclose(result.value, 1 / diagonal, rtol=1e-3)
    # From this b the cosine between the first direction and its product is the least that the condition allows.
    result = solve(np.diag(diagonal), 1 / np.sqrt(diagonal), 1e-4)
    assert result.reason == StopReason.CONVERGED
    diagonal = np.where(np.arange(N) < 4, 1.0, 1e-5).astype(np.float32)
    result = solve(np.diag(diagonal), np.ones(N, np.float32), 1e-5)
    assert result.reason == StopReason.CONVERGED


def test_singular_consistent_system_gives_the_shortest_solution():
    matrix, _, x = symmetric(5, np.array([0, 0, 0, 1, 2, 3, 5, 8.0]))
    result = solve(matrix, matrix @ x, 1e-10)
    assert result.reason == StopReason.CONVERGED
    close(result.value, np.linalg.pinv(matrix, rcond=1e-10) @ (matrix @ x), 1e-9)


def test_singular_inconsistent_system_ends_in_the_null_space():
    result = solve(np.diag(np.array([0, 0, 0, 1, 2, 3, 5, 8.0])), np.ones(N), 1e-10)
    assert result.reason == StopReason.NEGATIVE_CURVATURE
    direction = np.asarray(result.negative_curvature_direction)
    close(direction, direction[0] * (np.arange(N) < 3), 1e-9)
    assert direction[0] > 0
    assert np.all(np.isfinite(result.value))


def test_zero_matrix_ends_at_once():
    result = solve(np.zeros((N, N)), np.ones(N), 1e-10)
    assert result.reason == StopReason.NEGATIVE_CURVATURE
    assert result.iterations == 0
    assert not np.any(result.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input_ends_at_once_with_a_finite_value(bad):
    matrix, _, b = symmetric(6, np.geomspace(1, 10, N))
    broken_matrix, broken_b, x0 = matrix.copy(), b.copy(), np.full(N, bad)
    broken_matrix[2, 3] = broken_b[5] = bad
    for result in (solve(broken_matrix, b, 1e-8), solve(matrix, broken_b, 1e-8), solve(broken_matrix, b, 1e-8, b)):
        assert result.reason == StopReason.NON_FINITE
        assert result.iterations == 0
        assert np.all(np.isfinite(result.value))
    cold = solve(matrix, b, 1e-8, np.zeros(N))
    close(solve(matrix, b, 1e-8, x0).value, cold.value, 0.0)


def test_a_product_that_fails_on_the_way_leaves_the_last_iterate():
    matrix, _, b = symmetric(7, np.geomspace(1, 10, N))

    def matvec(v):
        return jnp.where(jnp.linalg.norm(v) < 0.05, jnp.nan, matrix @ v)

    result = jax.jit(lambda b: solvers.cg(matvec, b, max_iterations=40, tolerance=1e-12, store_at=(2, 40)))(b)
    assert result.reason == StopReason.NON_FINITE
    steps = int(result.iterations)
    assert steps > 2
    good = solve(matrix, b, 1e-12, steps=steps)
    close(result.value, good.value, 1e-13)
    close(result.stored.values[1], good.value, 1e-13)
    assert result.stored.iterations.tolist() == [2, steps]
    assert np.all(np.isfinite(result.model_trace))


@pytest.mark.parametrize(("sign", "reason"), [(-1.0, StopReason.BREAKDOWN), (np.nan, StopReason.NON_FINITE)])
def test_preconditioner_that_is_not_positive_definite(sign, reason):
    result = jax.jit(
        lambda b: solvers.cg(lambda v: 2 * v, b, preconditioner=lambda r: sign * r, max_iterations=5, tolerance=1e-8)
    )(np.ones(N))
    assert result.reason == reason
    assert result.iterations == 0
    assert not np.any(result.value)


def test_lanes_of_vmap_stop_for_themselves():
    good, _, b = symmetric(8, np.geomspace(1, 10, N))
    easy, _, _ = symmetric(9, np.resize([1.0, 2.0], N))
    indefinite, _, _ = symmetric(10, np.linspace(-1, 6.5, N))
    matrices = np.stack([good, easy, indefinite, good * np.nan, good])
    right = np.stack([b, b, b, b, np.zeros(N)])
    together = jax.jit(jax.vmap(lambda a, b: solve(a, b, 1e-10)))(matrices, right)
    assert [StopReason(int(code)).name for code in together.reason] == [
        "CONVERGED", "CONVERGED", "NEGATIVE_CURVATURE", "NON_FINITE", "CONVERGED",
    ]  # fmt: skip
    assert together.iterations[1] == 2
    for lane in range(5):
        alone = solve(matrices[lane], right[lane], 1e-10)
        assert alone.iterations == together.iterations[lane]
        np.testing.assert_allclose(together.value[lane], alone.value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(together.model_trace[lane], alone.model_trace, rtol=1e-9, atol=1e-12)


def test_new_values_do_not_retrace():
    traces = []

    @jax.jit
    def run(linear_map, b, x0, tolerance, progress_tolerance):
        traces.append(1)
        return solvers.cg(
            linear_map, b, x0=x0, max_iterations=20, tolerance=tolerance, progress_tolerance=progress_tolerance
        )

    for factor in (1.0, 2.0):
        linear_map = curvax.Diagonal({"w": factor * jnp.arange(1.0, 5)})
        right = {"w": factor * jnp.ones(4)}
        result = run(linear_map, right, trees.scale(factor, right), 1e-9 * factor, 1e-4)
        close(result.value["w"], 1 / np.arange(1.0, 5), 1e-8)
    assert len(traces) == 1


def test_runs_inside_scan_with_a_warm_start():
    matrix, _, b = symmetric(11, np.geomspace(1, 10, N))

    def step(x, _):
        result = solvers.cg(lambda v: matrix @ v, b, x0=x, max_iterations=2, tolerance=1e-12)
        return result.value, result.residual_norm

    x, norms = jax.jit(lambda x: jax.lax.scan(step, x, length=30))(jnp.zeros(N))
    close(x, np.linalg.solve(matrix, b), 1e-6)
    assert norms[-1] < 1e-6 * norms[0]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_vectors_give_the_same_solution(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    diagonal, b = np.linspace(1, 4, 16).reshape(8, 2), np.random.default_rng(12).standard_normal((8, 2))

    @jax.jit
    def run(diagonal, b):
        result = solvers.cg(
            lambda v: diagonal * v,
            b,
            x0=b,
            preconditioner=solvers.diagonal_preconditioner(diagonal, exponent=0.2),
            max_iterations=20,
            tolerance=1e-10,
            store_at=(3,),
        )
        loss = lambda x: jnp.sum(diagonal * x**2 / 2 - b * x) + jnp.sum(x**4)  # noqa: E731
        return result, solvers.choose_and_search(result.stored, loss, 0.0, -b, sufficient_decrease=0.4)

    expected, expected_choice = run(diagonal, b)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        actual, choice = run(jax.device_put(diagonal, sharding), jax.device_put(b, sharding))
    assert actual.value.sharding.spec == PartitionSpec("data", None) or axis_type == AxisType.Auto
    close(actual.value, expected.value, 1e-12)
    close(actual.stored.values, expected.stored.values, 1e-12)
    jax.tree.map(lambda x, y: close(x, y, 1e-10), choice, expected_choice)


def test_no_warning_and_no_dtype_surprise_without_x64():
    matrix, _, b = symmetric(13, np.geomspace(1, 10, N))
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = solve(jnp.asarray(matrix, jnp.float32), jnp.asarray(b, jnp.float32), 1e-5)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {"float32", "int32"}
    close(result.value, np.linalg.solve(matrix, b), 1e-4)


def bad_calls():
    run = functools.partial(solvers.cg, max_iterations=5, tolerance=1e-6)
    tree = {"layer": {"w": jnp.ones(3)}}
    return {
        "integer leaf": (lambda: run(lambda v: v, {"w": jnp.arange(3)}), TypeError, r"b\['w'\] has dtype int"),
        "warm start": (
            lambda: run(lambda v: v, tree, x0={"layer": {"w": jnp.ones(4)}}),
            ValueError,
            r"x0\['layer/w'\]",
        ),
        "product": (lambda: run(lambda v: {"layer": {"w": v["layer"]["w"][:2]}}, tree), ValueError, "result of matvec"),
        "preconditioner": (
            lambda: run(lambda v: v, tree, preconditioner=lambda r: r["layer"]),
            ValueError,
            "result of preconditioner",
        ),
        "cap": (lambda: solvers.cg(lambda v: v, tree, max_iterations=0, tolerance=0.1), ValueError, "at least 1"),
        "store": (
            lambda: run(lambda v: v, tree, store_at=(2, 6)),
            ValueError,
            "iterate 6; iterates are numbered 1 to 5",
        ),
        "ratio": (lambda: solvers.geometric_iterations(5, ratio=1.0), ValueError, "above 1"),
    }


@pytest.mark.many_compilations("an error ends the trace, so nothing is compiled as a whole")
@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_an_error_that_says_where(case):
    call, error, message = bad_calls()[case]
    with pytest.raises(error, match=message):
        call()


def test_the_step_to_a_warm_start_is_not_counted_nor_shown():
    matrix, b, x0 = 2.0 * np.eye(N), np.arange(1.0, N + 1), np.linspace(-1.0, 1.0, N)
    seen = solvers.Monitor(lambda count, x, iteration: (count + 1, iteration >= 9), jnp.array(0))

    @jax.jit
    def run(b, x0):
        return solvers.cg(
            lambda v: matrix @ v, b, x0=x0, max_iterations=5, tolerance=1e-12, store_at=(1, 3), monitor=seen
        )

    result = run(b, x0)
    assert result.iterations == result.monitor_state == 1
    assert result.stored.used == 1
    close(result.stored.values[1], x0, 1e-15)  # a slot without an iterate
    close(result.model_trace[0], x0 @ x0 - b @ x0, 1e-14)
    close(result.value, b / 2, 1e-14)


@pytest.mark.parametrize(("size_of_x0", "size_of_b"), [(1e3, 1e-3), (1e-4, 1e3)])
@pytest.mark.parametrize("preconditioner", [None, lambda r: 2 * r])
def test_a_warm_start_of_another_size_in_half_precision(size_of_x0, size_of_b, preconditioner):
    diagonal = jnp.linspace(1.0, 2.0, N, dtype=jnp.float16)
    b, x0 = (jnp.full(N, size, jnp.float16) for size in (size_of_b, size_of_x0))
    result = jax.jit(lambda b, x0: solvers.cg(lambda v: diagonal * v, b, x0=x0, max_iterations=3 * N, tolerance=1e-3))(
        b, x0
    )
    # Rounding is that of the largest iterate.
    np.testing.assert_allclose(result.value, b / diagonal, rtol=2e-3, atol=2e-3 * size_of_x0)


@pytest.mark.parametrize(
    ("matvec", "size", "of_x0"),
    [(lambda v: jnp.where(v[0] == 0, v, jnp.nan), 1.0, 1.0), (lambda v: v, 1e-20, 1.0), (lambda v: v, 1.0, 1e30)],
)
def test_from_a_warm_start_that_cannot_be_reached_back_to_zero(matvec, size, of_x0):
    """Its product is not finite, or the square of the residual."""
    b, x0 = size * jnp.eye(N, dtype=jnp.float32)[1], jnp.full(N, of_x0, jnp.float32)
    result = jax.jit(lambda b, x0: solvers.cg(matvec, b, x0=x0, max_iterations=9, tolerance=1e-6, store_at=(1, 2)))(
        b, x0
    )
    assert result.reason == StopReason.CONVERGED
    assert result.iterations == result.stored.used == 1
    close(result.value, b, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("method", "warm"), [("cg", False), ("cg", True), ("steihaug", False)])
def test_neither_the_scale_of_b_nor_that_of_the_preconditioner_matters(method, warm, dtype):
    """To the bit, for powers of two (of cg: steihaug has units of the radius); nothing may leave the range between."""
    matrix, _, b = symmetric(0, np.linspace(1, 4, N))
    matrix, b = matrix.astype(dtype), b.astype(dtype)
    x0 = b[::-1] / 3 if warm else None
    spread = np.geomspace(1, 4, N).astype(dtype)
    most, rounding = {"float16": (2**7, 1e-3), "float32": (2**40, 0.0 if method == "cg" else 1e-6)}[dtype]

    @jax.jit
    def run(b, x0, scale):
        options = {"max_iterations": 6, "tolerance": 0.0, "preconditioner": lambda r: scale * spread * r}
        if method == "cg":
            return solvers.cg(lambda v: matrix @ v, b, x0=x0, **options).value
        return solvers.steihaug(lambda v: matrix @ v, b, radius=jnp.asarray(1e30, jnp.float32), **options).value

    one = np.asarray(run(b, x0, np.asarray(1, dtype)), float)
    for of_b in (1 / most, 1, most):
        for of_scale in (1 / most, most):
            factor = np.asarray(of_b, dtype)
            own = run(b * factor, None if x0 is None else x0 * factor, np.asarray(of_scale, dtype))
            close(np.asarray(own, float) / of_b, one, rounding)


@pytest.mark.parametrize("period", [1, 2])
def test_a_monitor_sees_what_is_counted_alone(period):
    seen = []

    def update(count, x, iteration):
        jax.debug.callback(lambda number: seen.append(int(number)), iteration)
        return count + 1, jnp.zeros((), bool)

    matrix, _, b = symmetric(1, np.geomspace(1, 100, N))
    monitor = solvers.Monitor(update, jnp.array(0))
    run = jax.jit(
        lambda b, x0: solvers.cg(
            lambda v: matrix @ v, b, x0=x0, max_iterations=3 + period, tolerance=0.0, monitor=monitor
        )
    )
    result = run(b, jnp.ones(N))
    jax.effects_barrier()
    assert sorted(seen) == list(range(1, 4 + period))
    assert result.monitor_state == 3 + period
