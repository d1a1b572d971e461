"""The operation counter against hand counts, against XLA on straight-line programs, and against convolved ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from benchmarks.operations import count_operations, flops

_HAS_ORMQR = hasattr(lax.linalg, "ormqr")


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _matmuls(function, *args, **kwargs):
    return count_operations(function, *args, **kwargs).get("dot_general", 0.0)


# --- Products, elementwise functions, reductions


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (jnp.matmul, [(4, 3, 5), (4, 5, 7)], 4 * 2 * 3 * 5 * 7),
        (jnp.matmul, [(4, 3, 5), (5, 7)], 4 * 2 * 3 * 5 * 7),
        (jnp.vdot, [(6,), (6,)], 12),
        (lambda a: a.T @ a, [(5, 3)], 2 * 3 * 3 * 5),
        (lambda a, b: a + b, [(3, 4), (3, 4)], 12),
        (lambda a, b: a + b, [(3, 4), (4,)], 12),
        (lambda a: jnp.exp(a).sum(axis=0), [(3, 4)], 24),
        (lambda a: a.max() - a.min(), [(3, 4)], 25),
        (lambda a: jnp.cumsum(a, axis=1), [(3, 4)], 12),
        (lambda a: jnp.sort(a, axis=1), [(3, 8)], 3 * 8 * 3),
        (lambda a: jnp.argmax(a, axis=0), [(3, 4)], 12),
        (lambda a: lax.top_k(a, 2), [(8,)], 24),
        (lambda a: a.at[jnp.array([0, 2])].add(a[:2]), [(3, 4)], 8),
        (lambda a: a.at[jnp.array([0, 2])].set(a[:2]), [(3, 4)], 0),
        (lambda a: jnp.concatenate([a.T.reshape(3, 4), jnp.flip(a)])[1:, ::2], [(3, 4)], 0),
        (lambda a: jnp.where(a > 0, a, jnp.zeros((), a.dtype)).astype(jnp.float16), [(3, 4)], 12),
        (lambda a: lax.reduce_window(a, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"), [(4, 4)], 9 * 4),
        (lambda a: lax.reduce(a, jnp.zeros((), a.dtype), lambda x, y: x * y + y, (0,)), [(3, 4)], 12),
        (jnp.fft.fft, [(3, 8)], 3 * 5 * 8 * 3),
        (jnp.fft.rfft, [(3, 8)], 3 * 5 * 8 * 3 / 2),
        (lambda a: jnp.fft.irfft(jnp.fft.rfft(a)), [(3, 8)], 3 * 5 * 8 * 3),
    ],
)
def test_hand_counts(function, shapes, expected):
    assert flops(function, *(_array(*shape) for shape in shapes)) == expected


def test_ragged_product_costs_what_its_rows_cost():
    counts = count_operations(lax.ragged_dot, _array(6, 4), _array(3, 4, 5), _array(3, dtype=jnp.int32))
    assert counts == {"ragged_dot_general": 2 * 6 * 4 * 5}


def test_only_floating_point_operations_count():
    integers = _array(3, 4, dtype=jnp.int32)
    assert flops(lambda a: (a @ a.T + 1).sum() // 2, integers) == 0
    assert flops(lambda: jax.random.bits(jax.random.key(0), (100,))) == 0
    assert flops(lambda a: (a > 0) & (a < 1), _array(5)) == 10


def test_flops_is_the_sum_of_the_counts_by_primitive_with_the_largest_first():
    def function(a, *, scale):
        return jnp.tanh(a @ a) * scale

    counts = count_operations(function, _array(3, 3), scale=_array())
    assert list(counts.items()) == [("dot_general", 54.0), ("mul", 9.0), ("tanh", 9.0)]
    assert flops(function, _array(3, 3), scale=_array()) == 72.0


def test_nothing_is_run_or_compiled():
    def never(a):
        return jax.pure_callback(lambda x: pytest.fail("was run"), a, a)

    assert flops(never, jnp.ones(3)) == 3
    assert flops(jax.jit(lambda a: a @ a), _array(10**6, 10**6)) == 2e18


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtypes_count_alike(dtype):
    assert flops(jax.grad(_mlp_loss), *_mlp([4, 6, 3], 5, dtype)) == flops(jax.grad(_mlp_loss), *_mlp([4, 6, 3], 5))


def test_agrees_with_xla_on_a_straight_line():
    def function(a, b, c):
        return ((a @ b + c) * c) @ b.T - a

    args = [jnp.ones(shape, jnp.float32) for shape in [(6, 5), (5, 4), (6, 4)]]
    assert flops(function, *args) == jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


# --- Networks


def _mlp(sizes, batch, dtype=jnp.float32):
    params = [(_array(m, n, dtype=dtype), _array(n, dtype=dtype)) for m, n in itertools.pairwise(sizes)]
    return params, (_array(batch, sizes[0], dtype=dtype), _array(batch, sizes[-1], dtype=dtype))


def _mlp_outputs(params, inputs):
    *hidden, (last, last_bias) = params
    for weights, bias in hidden:
        inputs = jnp.tanh(inputs @ weights + bias)
    return inputs @ last + last_bias


def _mlp_loss(params, batch):
    inputs, targets = batch
    return jnp.mean((_mlp_outputs(params, inputs) - targets) ** 2)


_SIZES, _BATCH = [784, 1024, 1024, 10], 512
_WEIGHTS = [m * n for m, n in itertools.pairwise(_SIZES)]
_GRADIENT = 2 * _BATCH * (3 * sum(_WEIGHTS) - _WEIGHTS[0])  # nobody asks for the gradient by the inputs


def test_gradient_of_an_mlp():
    assert _matmuls(jax.grad(_mlp_loss), *_mlp(_SIZES, _BATCH)) == _GRADIENT


def test_gradient_by_the_inputs_is_dead_code_unless_returned():
    params, (inputs, targets) = _mlp(_SIZES, _BATCH)

    def by_both(params, inputs, targets):
        return jax.grad(lambda p, x: _mlp_loss(p, (x, targets)), argnums=(0, 1))(params, inputs)

    whole = 2 * _BATCH * 3 * sum(_WEIGHTS)
    assert _matmuls(by_both, params, inputs, targets) == whole
    assert _matmuls(jax.jit(by_both), params, inputs, targets) == whole
    assert _matmuls(lambda *args: jax.jit(by_both)(*args)[0], params, inputs, targets) == _GRADIENT


def test_product_on_an_existing_linearisation():
    structure, (inputs, _) = _mlp(_SIZES, _BATCH)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
    _, jvp = jax.linearize(lambda p: _mlp_outputs(p, jnp.zeros(inputs.shape, inputs.dtype)), params)
    vjp = jax.linear_transpose(jvp, params)
    ratio = _matmuls(lambda v: vjp(jvp(v)), structure) / _GRADIENT
    assert ratio == 2 * (2 * sum(_WEIGHTS) - _WEIGHTS[0]) / (3 * sum(_WEIGHTS) - _WEIGHTS[0])
    assert round(ratio, 4) == 1.2214


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel_dilation", [(1, 1), (2, 1)])
def test_convolution_and_its_kernel_gradient(strides, groups, kernel_dilation):
    """A convolution of ones by ones adds up to the number of products; so does its gradient by the kernel."""
    options = {"window_strides": strides, "rhs_dilation": kernel_dilation, "feature_group_count": groups}
    convolve = functools.partial(lax.conv_general_dilated, padding="VALID", **options)
    inputs, kernel = jnp.ones((2, 4, 11, 9)), jnp.ones((6, 4 // groups, 3, 2))
    products = float(convolve(inputs, kernel).sum())
    assert flops(convolve, inputs, kernel) == 2 * products
    assert count_operations(jax.grad(lambda k: convolve(inputs, k).sum()), kernel) == {
        "conv_general_dilated": 2 * products
    }


def test_convolution_does_not_multiply_the_zeros_of_its_input_dilation():
    """With strides equal to the kernel each input meets one kernel position, also on the way back."""
    kernel, outputs = _array(6, 4, 2, 3), _array(2, 6, 5, 4)
    convolve = functools.partial(lax.conv_general_dilated, window_strides=(2, 3), padding="VALID")

    def by_inputs(cotangent, kernel):
        return jax.linear_transpose(lambda x: convolve(x, kernel), _array(2, 4, 10, 12))(cotangent)

    assert flops(by_inputs, outputs, kernel) == 2 * (2 * 6 * 5 * 4) * (4 * 2 * 3)


def test_convolution_counts_products_with_padding():
    convolve = functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="SAME")
    assert flops(convolve, _array(1, 2, 7), _array(5, 2, 3)) == 2 * (5 * 7) * (2 * 3)


def test_vmap_counts_every_example():
    params, (inputs, targets) = _mlp([4, 6, 3], 5)
    one = _matmuls(jax.grad(_mlp_loss), params, (_array(4), _array(3)))
    assert one == 2 * (3 * (24 + 18) - 24)
    assert _matmuls(jax.vmap(jax.grad(_mlp_loss), in_axes=(None, 0)), params, (inputs, targets)) == 5 * one
    assert flops(jax.vmap(jnp.linalg.cholesky), _array(5, 6, 6)) == 5 * flops(jnp.linalg.cholesky, _array(6, 6))


# --- Factorisations


def _upper_svd(a):
    return jnp.linalg.svd(a, full_matrices=False)


@pytest.mark.parametrize(
    ("name", "function", "shapes", "expected"),
    [
        ("cholesky", jnp.linalg.cholesky, [(6, 6)], 6**3 / 3),
        ("cholesky", jnp.linalg.cholesky, [(2, 5, 6, 6)], 10 * 6**3 / 3),
        ("cholesky_update", lax.linalg.cholesky_update, [(6, 6), (6,)], 3 * 36),
        ("lu", jax.scipy.linalg.lu_factor, [(6, 6)], 2 / 3 * 6**3),
        ("lu", lax.linalg.lu, [(8, 3)], 3**2 * 8 - 3**3 / 3),
        ("qr", jnp.linalg.qr, [(6, 6)], 8 / 3 * 6**3),
        ("qr", jnp.linalg.qr, [(8, 3)], 4 * 8 * 9 - 4 / 3 * 27),
        ("qr", functools.partial(jnp.linalg.qr, mode="complete"), [(8, 3)], 4 * (64 * 3 - 8 * 9 + 9) + 2 * 9 * 7),
        ("qr", jnp.linalg.qr, [(3, 8)], 2 * 9 * 7 + 4 / 3 * 27),
        ("geqrf", functools.partial(jnp.linalg.qr, mode="raw"), [(8, 3)], 2 * 9 * 7),
        ("householder_product", lax.linalg.householder_product, [(8, 3), (3,)], 2 * 9 * 7),
        # JAX 0.8.1 does not have it yet.
        *([("ormqr", lax.linalg.ormqr, [(8, 3), (3,), (8, 5)], 2 * 5 * 3 * (16 - 3))] if _HAS_ORMQR else []),
        ("eigh", jnp.linalg.eigh, [(6, 6)], 9 * 6**3),
        ("eig", jnp.linalg.eig, [(6, 6)], 25 * 6**3),
        ("eig", jnp.linalg.eigvals, [(6, 6)], 10 * 6**3),
        ("schur", lax.linalg.schur, [(6, 6)], 25 * 6**3),
        ("schur", functools.partial(lax.linalg.schur, compute_schur_vectors=False), [(6, 6)], 10 * 6**3),
        ("hessenberg", lax.linalg.hessenberg, [(6, 6)], 10 / 3 * 6**3),
        ("tridiagonal", lax.linalg.tridiagonal, [(6, 6)], 4 / 3 * 6**3),
        ("svd", jnp.linalg.svd, [(6, 6)], 21 * 6**3),
        ("svd", _upper_svd, [(6, 6)], 22 * 6**3),
        ("svd", _upper_svd, [(3, 40)], 6 * 40 * 9 + 20 * 27),
        ("svd", functools.partial(jnp.linalg.svd, compute_uv=False), [(6, 6)], 8 / 3 * 6**3),
        ("triangular_solve", lax.linalg.triangular_solve, [(6, 6), (4, 6)], 6**2 * 4),
        ("triangular_solve", lambda a, b: jax.scipy.linalg.cho_solve((a, True), b), [(6, 6), (6, 4)], 2 * 36 * 4),
        ("tridiagonal_solve", lax.linalg.tridiagonal_solve, [(6,), (6,), (6,), (6, 4)], 3 * 6 + 5 * 24),
        ("symmetric_product", lax.linalg.symmetric_product, [(6, 4), (6, 6)], 36 * 4),
    ],
)
def test_factorisations(name, function, shapes, expected):
    counts = count_operations(function, *(_array(*shape) for shape in shapes))
    assert counts[name] == pytest.approx(expected, rel=1e-12)


def test_one_factorisation_serves_two_solves():
    def solves(a, b):
        return jnp.linalg.solve(a, b), jnp.linalg.solve(a, b + 1), jnp.linalg.slogdet(a)[1]

    counts = count_operations(solves, _array(6, 6), _array(6, 2))
    assert counts["lu"] == pytest.approx(2 / 3 * 6**3)
    assert counts["triangular_solve"] == 2 * 2 * 36 * 2
    assert count_operations(jnp.linalg.solve, _array(6, 6), _array(6, 2))["lu"] == counts["lu"]
    assert "dot_general" not in counts  # the products in custom_linear_solve are for its derivatives


# --- Control flow


def test_loops_multiply():
    def body(x, w):
        return x @ w, None

    assert flops(lambda x, w: lax.scan(body, x, w)[0], _array(2, 3), _array(7, 3, 3)) == 7 * 36
    assert flops(lambda x, w: lax.scan(body, x, w)[0], _array(2, 3), _array(0, 3, 3)) == 0
    assert flops(lambda x, w: lax.fori_loop(2, 9, lambda _, x: x @ w, x), _array(2, 3), _array(3, 3)) == 7 * 36
    assert flops(lambda x: lax.map(jnp.sin, x), _array(5, 3)) == 15


def test_nested_loops_multiply():
    def function(x, w):
        def body(x, _):
            return lax.fori_loop(0, 5, lambda _, x: x @ w, x) @ w, None

        return lax.scan(body, x, None, length=7)[0]

    assert flops(function, _array(2, 3), _array(3, 3)) == 7 * (5 + 1) * 36


def test_conditional_costs_its_dearest_branch():
    def function(index, x, w):
        return lax.switch(index, [lambda: x, lambda: x @ w @ w, lambda: jnp.sin(x)])

    args = _array(dtype=jnp.int32), _array(2, 3), _array(3, 3)
    assert count_operations(function, *args) == {"dot_general": 72}
    assert flops(lambda i, x, w: lax.scan(lambda x, _: (function(i, x, w), None), x, None, length=4)[0], *args) == 288


def test_conditional_on_a_known_counter_costs_the_branch_it_takes():
    """Periodic work of an optimiser: in a call, in a loop that it is constant in, and as a loop's number of trips."""

    @jax.jit
    def step(count, x, w):
        due = (count % 5 == 0) | (count < 2)
        x = lax.cond(due, lambda x: x @ w, lambda x: x, x)

        def body(carry):
            index, x = carry
            return index + 1, lax.cond(due, lambda x: x @ w @ w, lambda x: x @ w, x)

        return lax.while_loop(lambda carry: carry[0] < jnp.where(count % 10 == 0, 3, 1), body, (0, x))[1]

    args = _array(2, 3), _array(3, 3)
    counts = [flops(functools.partial(step, jnp.int32(count)), *args) / 36 for count in (1, 4, 5, 10)]
    assert counts == [3, 1, 3, 7]
    assert flops(step, _array(dtype=jnp.int32), *args, while_trip_count=3) / 36 == 7
    assert flops(step, _array(dtype=jnp.int32), *args, while_trip_count=3, alarms=True) / 36 == 3

    def checked(due, x, w):
        return lax.cond(due | (x[0, 0] > 0), lambda: x @ w, lambda: x)

    assert [flops(functools.partial(checked, jnp.array(due)), *args, alarms=True) for due in (True, False)] == [36, 1]


@pytest.mark.parametrize(
    ("condition", "start", "step", "trips"),
    [
        (lambda i: i < 7, 0, 1, 7),
        (lambda i: i < 7, 0, 2, 4),
        (lambda i: i <= 7, 1, 2, 4),
        (lambda i: jnp.greater(7, i), 0, 3, 3),
        (lambda i: jnp.greater_equal(7, i), 1, 3, 3),
        (lambda i: i > 0, 7, -2, 4),
        (lambda i: i >= 0, 6, -2, 4),
        (lambda i: i < 0, 5, 1, 0),
    ],
)
def test_while_loop_with_a_counter(condition, start, step, trips):
    def function(x, w):
        init, advance = jnp.int32(start), jnp.int32(step)
        return lax.while_loop(lambda s: condition(s[0]), lambda s: (s[0] + advance, s[1] @ w), (init, x))[1]

    def subtracting(x, w):
        init = (start, x)
        return jax.jit(lambda: lax.while_loop(lambda s: condition(s[0]), lambda s: (s[0] - -step, s[1] @ w), init))()[1]

    assert flops(function, _array(2, 3), _array(3, 3)) == 36 * trips
    assert flops(subtracting, _array(2, 3), _array(3, 3)) == 36 * trips
    counter = start
    for _ in range(trips):  # the table above is right
        assert condition(counter)
        counter += step
    assert not condition(counter)


def test_while_loop_whose_bound_is_carried():
    def function(x):
        return lax.while_loop(lambda s: s[2] > s[0], lambda s: (s[0] + 1, s[1] * x, s[2]), (0, x, 5))[1]

    assert flops(function, _array(3)) == 15


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: lax.fori_loop(0, n, lambda _, y: y * x, x),
        lambda x, n: lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] * 2, s[1] * x), (1, x))[1],
        lambda x, n: lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + n, s[1] * x), (n * 0, x))[1],
        lambda x, n: lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] - 1, s[1] * x), (0, x))[1],
        lambda x, n: lax.while_loop(lambda s: s[0] < s[2], lambda s: (s[0] + 1, s[1] * x, s[2] - 1), (0, x, 9))[1],
        lambda x, n: lax.while_loop(lambda s: s[0] < 7, lambda s: (-1 - s[0], s[1] * x), (0, x))[1],
        lambda x, n: lax.while_loop(lambda s: s[0] < 7.5, lambda s: (s[0] + 1.0, s[1] * x), (0.0, x))[1],
    ],
)
def test_while_loop_that_depends_on_data_asks_for_its_trip_count(function):
    args = _array(3), _array(dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"float32\[3\].*pass while_trip_count="):
        flops(function, *args)
    counts = count_operations(function, *args, while_trip_count=10)
    assert counts["mul"] == 30


def test_condition_runs_once_more_than_the_body():
    def function(x):
        return lax.while_loop(lambda y: jnp.max(jnp.abs(y)) > 1, lambda y: y / 2, x)

    assert count_operations(function, _array(3), while_trip_count=4) == {
        "abs": 15,
        "reduce_max": 15,
        "div": 12,
        "gt": 5,
    }


def test_dead_while_loop_needs_no_trip_count():
    assert flops(lambda x: (lax.while_loop(lambda y: y[0] > 0, jnp.sin, x), x + 1)[1], _array(3)) == 3


def test_sharded_program_counts_all_devices():
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))

    def gram(a):
        lax.psum(jnp.sin(a), "batch")  # dead
        return lax.psum(a.T @ a, "batch")

    sharded = jax.shard_map(gram, mesh=mesh, in_specs=PartitionSpec("batch", None), out_specs=PartitionSpec())
    assert count_operations(sharded, _array(8, 3)) == {
        "dot_general": flops(lambda a: a.T @ a, _array(8, 3)),
        "psum_invariant": 4 * 9,
    }


# --- Repeated operations


def test_gradients_of_two_losses_share_the_forward_pass():
    params, batch = _mlp(_SIZES, _BATCH)

    def other_loss(params, batch):
        return jnp.sum(jnp.cos(_mlp_outputs(params, batch[0])))

    def both(params, batch):
        return jax.jit(jax.grad(_mlp_loss))(params, batch), jax.grad(other_loss)(params, batch)

    assert _matmuls(both, params, batch) == 2 * _GRADIENT - 2 * _BATCH * sum(_WEIGHTS)


def test_loops_share_nothing():
    def outputs(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def value_and_gradient_apart(x, ws):
        return outputs(x, ws).sum(), jax.grad(lambda ws: outputs(x, ws).sum())(ws)

    args = _array(2, 3), _array(7, 3, 3)
    once = 7 * 36
    assert _matmuls(outputs, *args) == once
    assert _matmuls(lambda *a: (outputs(*a), outputs(*a)), *args) == 2 * once
    assert _matmuls(jax.grad(lambda ws, x: outputs(x, ws).sum()), *reversed(args)) == 3 * once
    assert _matmuls(value_and_gradient_apart, *args) == 4 * once


def test_what_is_merged_and_what_is_not():
    x, y = _array(5), _array(5)
    assert flops(lambda x, y: (x + y, y + x), x, y) == 5
    assert flops(lambda x, y: (x - y, y - x), x, y) == 10
    assert flops(lambda x: (x * 2, x * 3), x) == 10
    assert flops(lambda x: (x * 2, x * jnp.float32(2)), x) == 5
    assert flops(lambda x: (jnp.sin(x + 1), jax.jit(jnp.sin)(1 + x)), x) == 10
    assert flops(lambda x: (jnp.sin(x), jnp.sin(lax.stop_gradient(x))), x) == 5
    barrier = lax.optimization_barrier
    assert flops(lambda x: (jnp.sin(x), jnp.sin(barrier(x)), jnp.sin(barrier(x))), x) == 15
    matrix = _array(3, 4)
    assert flops(lambda a: (a.sum(axis=0), a.sum(axis=1)), matrix) == 24
    assert flops(lambda a: (a.sum(axis=0), jnp.sum(a, 0)), matrix) == 12
    table = jnp.arange(5.0, dtype=jnp.float32)
    assert flops(lambda x: (x + table, jax.jit(lambda x: x + table)(x)), x) == 5
    other = jnp.ones(5, jnp.float32)
    assert flops(lambda x: (x + table, x + other), x) == 10
    assert flops(lambda x, y: (x + y, jax.vjp(lambda z: (z, z), x)[1]((x, y))), x, y) == 5
    # ``sin`` casts a Python integer to a weakly typed number, ``astype`` to another: the same to XLA.
    assert count_operations(lambda i: (jnp.sin(i), jnp.sin(lax.convert_element_type(i, jnp.float64))), 3) == {"sin": 1}


def test_operations_are_not_merged_across_a_loop_or_a_branch():
    def loop(x):
        return jnp.sin(x), lax.scan(lambda c, _: (c + jnp.sin(x), None), x, None, length=3)[0]

    def branch(x):
        return jnp.sin(x), lax.cond(x[0] > 0, lambda: jnp.sin(x), lambda: x)

    assert count_operations(loop, _array(5))["sin"] == 20
    assert count_operations(branch, _array(5))["sin"] == 10


_NAMES = ["sub", "add", "mul", "sin"]
_FUNCTIONS = {"sub": jnp.subtract, "add": jnp.add, "mul": jnp.multiply, "sin": lambda x, _: jnp.sin(x)}
_STEPS = st.tuples(st.sampled_from(_NAMES), st.integers(0, 9), st.integers(0, 9), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(_STEPS, min_size=1, max_size=10), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_straight_line_programs_cost_their_distinct_reachable_expressions(steps, results):
    """Against symbolic expressions as nested tuples, counted as a set."""

    def program(x, y):
        values = [x, y]
        for name, i, j, jitted in steps:
            function = jax.jit(_FUNCTIONS[name]) if jitted else _FUNCTIONS[name]
            values.append(function(values[i % len(values)], values[j % len(values)]))
        return [values[k % len(values)] for k in results]

    expressions = [("x",), ("y",)]
    for name, i, j, _ in steps:
        operands = [expressions[i % len(expressions)], expressions[j % len(expressions)]]
        if name == "sin":
            operands = operands[:1]
        elif name in ("add", "mul"):
            operands = sorted(operands, key=repr)
        expressions.append((name, *operands))

    def reach(expression):
        return {expression}.union(*map(reach, expression[1:]))

    distinct = set().union(*(reach(expressions[k % len(expressions)]) for k in results)) - {("x",), ("y",)}
    assert flops(program, _array(3), _array(3)) == 3 * len(distinct)


# --- Dead code


def test_dead_outputs_of_a_scan():
    def function(x, w):
        def body(carry, _):
            return carry * 2, (carry @ w, jnp.sin(carry))

        return lax.scan(body, x, None, length=7)

    args = _array(2, 3), _array(3, 3)
    assert flops(lambda *a: function(*a), *args) == 7 * (6 + 36 + 6)
    assert flops(lambda *a: function(*a)[1][0], *args) == 7 * (6 + 36)
    assert flops(lambda *a: function(*a)[0], *args) == 7 * 6
    assert flops(lambda *a: jax.jit(function)(*a)[0], *args) == 7 * 6


def test_dead_carries_of_a_loop_and_what_only_they_read():
    def function(x, n=None):
        def body(carry):
            _, b, c, d, i = carry
            return b + 1, jnp.sin(c), c * 2, d @ d, i + 1  # the first reads b reads c; nobody reads d

        init = (x, x, x, jnp.outer(x, x), 0)
        if n is None:
            return lax.fori_loop(0, 7, lambda _, carry: body(carry), init)
        return lax.while_loop(lambda carry: carry[4] < n, body, init)

    x = _array(3)
    for loop in (function, lambda x: function(x, 7)):
        assert flops(lambda x, loop=loop: loop(x)[0], x) == 7 * 9
        assert flops(lambda x, loop=loop: loop(x)[1], x) == 7 * 6
        assert flops(lambda x, loop=loop: loop(x)[2], x) == 7 * 3
        assert flops(lambda x, loop=loop: loop(x)[3], x) == 7 * 54 + 9
        assert flops(loop, x) == 7 * (9 + 54) + 9


def test_dead_results_of_a_branch():
    def function(x):
        return lax.cond(x[0] > 0, lambda x: (jnp.sin(x), x @ x), lambda x: (x, x[0]), x)

    assert flops(lambda x: function(x)[0], _array(3)) == 1 + 3
    assert flops(lambda x: function(x)[1], _array(3)) == 1 + 6


def test_operands_that_one_branch_reads_are_alive():
    def function(x):
        y, z, dead = jnp.sin(x), jnp.cos(x), jnp.exp(x)
        return lax.cond(x[0] > 0, lambda y, z, dead: y * 2, lambda y, z, dead: z, y, z, dead)

    assert count_operations(function, _array(3)) == {"cos": 3, "mul": 3, "sin": 3, "gt": 1}


def test_carries_that_only_the_condition_reads_are_alive():
    def function(x):
        return lax.while_loop(lambda s: s[0][0] > 0, lambda s: (jnp.sin(s[0]), s[1] * 2), (x, x))[1]

    assert count_operations(function, _array(3), while_trip_count=4) == {"mul": 12, "sin": 12, "gt": 5}


def test_operations_behind_an_effect_are_alive():
    def function(x):
        jax.debug.print("{}", jnp.sin(x))
        return jnp.cos(x)

    assert count_operations(function, _array(3)) == {"cos": 3, "sin": 3}

    def looped(x):
        lax.scan(lambda c, _: (function(c), None), x, None, length=4)
        return x

    assert count_operations(looped, _array(3)) == {"cos": 12, "sin": 12}


# --- Custom derivatives and rematerialisation


def test_custom_derivatives_count_the_function_itself():
    x = _array(5)
    assert count_operations(jax.nn.relu, x) == {"max": 5}
    counts = count_operations(jax.nn.softplus, x)
    assert counts == {"max": 5, "sub": 5, "ne": 5, "abs": 5, "neg": 5, "exp": 5, "log1p": 5, "add": 10}

    @jax.custom_vjp
    def double(x):
        return x * 2

    double.defvjp(lambda x: (x * 2, jnp.sin(x)), lambda residual, cotangent: (cotangent + residual,))
    assert count_operations(double, x) == {"mul": 5}
    assert count_operations(jax.grad(lambda x: double(x).sum()), x) == {"sin": 5, "add": 5}
    assert count_operations(jax.vmap(double), _array(3, 5)) == {"mul": 15}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_checkpoint_recomputes(wrap):
    params, batch = _mlp([4, 6, 6, 3], 5)
    forward, first_layers = 2 * 5 * (24 + 36 + 18), 2 * 5 * (24 + 36)
    whole = 2 * 5 * (3 * (24 + 36 + 18) - 24)

    def gradient(**options):
        def loss(params, batch):
            outputs = jax.checkpoint(_mlp_outputs, **options)(params, batch[0])
            return jnp.mean((outputs - batch[1]) ** 2)

        return wrap(jax.grad(loss))

    assert _matmuls(jax.grad(_mlp_loss), params, batch) == whole
    assert _matmuls(gradient(), params, batch) == whole + first_layers
    assert _matmuls(gradient(prevent_cse=False), params, batch) == whole
    assert _matmuls(gradient(policy=jax.checkpoint_policies.everything_saveable), params, batch) == whole
    assert _matmuls(jax.checkpoint(_mlp_outputs), params, batch[0]) == forward


def test_checkpoint_without_derivatives_is_a_call():
    assert flops(lambda x: (jnp.sin(x), jax.checkpoint(jnp.sin)(x)), _array(3)) == 3


def test_checkpoint_in_a_scan():
    def gradient(wrap):
        def loss(ws, x):
            body = wrap(lambda x, w: jnp.tanh(x @ w))
            return lax.scan(lambda x, w: (body(x, w), None), x, ws)[0].sum()

        return jax.grad(loss)

    args = _array(7, 3, 3), _array(2, 3)
    once = 7 * 36
    assert _matmuls(gradient(lambda f: f), *args) == 3 * once
    assert _matmuls(gradient(jax.checkpoint), *args) == 4 * once
    assert _matmuls(gradient(functools.partial(jax.checkpoint, prevent_cse=False)), *args) == 4 * once


def test_iterations_of_conjugate_gradients():
    def solve(a, b):
        return jax.scipy.sparse.linalg.cg(lambda x: a @ x, b, maxiter=50)[0]

    once, more = (_matmuls(solve, _array(20, 20), _array(20), while_trip_count=n) for n in (10, 11))
    assert more - once == 2 * 20**2 + 2 * 2 * 20  # a product with the matrix and two inner products
