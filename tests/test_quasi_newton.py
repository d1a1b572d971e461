"""Limited-memory SR1 matrices against the recursive update, and the minimisation of plain functions with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import quasi_newton, trees
from curvax.quasi_newton import MinimizeReason, minimize, sr1_map, sr1_memory, sr1_update
from curvax.solvers import compact_trust_region

SIZE = 12


def pairs(seed, count, curvature=None):
    """Steps, and changes of a gradient along them: of a quadratic, or without any law."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=(count, SIZE))
    changes = steps @ curvature if curvature is not None else generator.normal(size=(count, SIZE))
    return jnp.asarray(steps), jnp.asarray(changes)


def recursive(scale, operands, images):
    """B+ = B + r r^T / (r^T a)."""
    matrix = scale * np.eye(SIZE)
    for a, b in zip(np.asarray(operands), np.asarray(images), strict=True):
        r = b - matrix @ a
        matrix = matrix + np.outer(r, r) / (r @ a)
    return matrix


update = jax.jit(sr1_update, static_argnames="tolerance")
dense = jax.jit(lambda memory, scale: sr1_map(memory, scale).to_dense())
minimized = jax.jit(minimize, static_argnums=0, static_argnames=("method", "max_iterations", "memory_size"))


def remembered(operands, images, scale, size, tolerance=1e-8):
    memory = sr1_memory(jnp.zeros(SIZE), size)
    skipped = dropped = 0
    for a, b in zip(operands, images, strict=True):
        memory, left_out, lost = update(memory, a, b, scale, tolerance=tolerance)
        skipped, dropped = skipped + int(left_out), dropped + int(lost)
    return memory, skipped, dropped


@pytest.mark.parametrize("seed", range(5))
def test_both_forms_are_the_recursive_update_and_inverse_to_each_other(seed):
    curvature = np.random.default_rng(seed + 50).normal(size=(SIZE, SIZE))
    steps, changes = pairs(seed, 5, curvature + curvature.T)
    direct, skipped, dropped = remembered(steps, changes, 0.7, 5)
    assert (skipped, dropped) == (0, 0)
    truth = recursive(0.7, steps, changes)
    ours = np.asarray(dense(direct, 0.7))
    np.testing.assert_allclose(ours, truth, atol=1e-12 * np.abs(truth).max() * np.linalg.cond(direct.core))
    np.testing.assert_allclose(ours @ np.asarray(steps).T, np.asarray(changes).T, atol=1e-8)  # all of them, as H is one
    inverse, _, _ = remembered(changes, steps, 1 / 0.7, 5)
    np.testing.assert_allclose(
        np.asarray(dense(inverse, 1 / 0.7)), np.linalg.inv(truth), atol=1e-9 * np.linalg.cond(truth)
    )
    v = jnp.asarray(np.random.default_rng(9).normal(size=SIZE))
    np.testing.assert_allclose(
        jax.jit(lambda memory, v: sr1_map(memory, 0.7).solve(v))(direct, v), np.linalg.solve(truth, v), rtol=1e-7
    )


def test_the_printed_matrix_without_symmetrisation_is_another():
    """Methods SR-1, [ERR]: S^T Y is symmetric only where the pairs are of one quadratic."""
    steps, changes = pairs(0, 4)
    memory, _, _ = remembered(steps, changes, 1.0, 4)
    truth = recursive(1.0, steps, changes)
    np.testing.assert_allclose(dense(memory, 1.0), truth, atol=1e-10 * np.abs(truth).max())
    s, y = np.asarray(steps).T, np.asarray(changes).T
    psi = y - s
    printed = np.eye(SIZE) + psi @ np.linalg.inv(s.T @ y - s.T @ s) @ psi.T
    assert np.abs(printed - truth).max() > 0.1


def test_the_ring_keeps_the_newest_pairs_in_their_order():
    steps, changes = pairs(0, 9)
    memory, _, dropped = remembered(steps, changes, 1.0, 4)
    assert dropped == 0
    truth = recursive(1.0, steps[-4:], changes[-4:])
    np.testing.assert_allclose(dense(memory, 1.0), truth, atol=1e-9 * np.abs(truth).max())


def test_pairs_without_information_are_left_out():
    steps, changes = pairs(0, 2)
    memory, skipped, _ = remembered(steps, changes, 1.0, 4)
    assert skipped == 0
    matrix = np.asarray(dense(memory, 1.0))
    a = jnp.asarray(np.random.default_rng(1).normal(size=SIZE))
    orthogonal = jnp.asarray(np.random.default_rng(2).normal(size=SIZE))
    orthogonal = orthogonal - a * (a @ orthogonal) / (a @ a)
    useless = {
        "r orthogonal to a": (a, matrix @ a + orthogonal),
        "already obeyed": (a, matrix @ a),
        "no step": (jnp.zeros(SIZE), jnp.zeros(SIZE)),
        "not finite": (a, a.at[0].set(jnp.nan)),
    }
    for what, (operand, image) in useless.items():
        after, left_out, _ = update(memory, operand, image, 1.0, tolerance=1e-8)
        assert left_out, what
        jax.tree.map(np.testing.assert_array_equal, after, memory)


def test_a_matrix_that_is_no_longer_defined_loses_its_oldest_pairs():
    """A second pair whose psi is parallel to the first's makes Psi dependent."""
    steps, changes = pairs(0, 1)
    psi = changes[0] - steps[0]
    other = jnp.asarray(np.random.default_rng(3).normal(size=SIZE))
    memory, skipped, dropped = remembered([steps[0], other], [changes[0], other + 3 * psi], 1.0, 3)
    assert (skipped, dropped) == (0, 1)
    truth = recursive(1.0, other[None], (other + 3 * psi)[None])
    np.testing.assert_allclose(dense(memory, 1.0), truth, atol=1e-9 * np.abs(truth).max())


def test_memory_is_a_fixed_point_of_scan_and_vmap():
    steps, changes = pairs(0, 9)

    @jax.jit
    def run(steps, changes):
        def body(memory, pair):
            updated = sr1_update(memory, *pair, 1.0)
            return updated.memory, updated.skipped

        return jax.lax.scan(body, sr1_memory(jnp.zeros(SIZE), 4), (steps, changes))[0]

    alone = run(steps, changes)
    truth, _, _ = remembered(steps, changes, 1.0, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), alone, truth)
    many = jax.vmap(run)(jnp.stack([steps, 2 * steps]), jnp.stack([changes, changes]))
    np.testing.assert_allclose(many.core[0], alone.core, atol=1e-10)


def rosenbrock(x):
    return jnp.sum(100 * (x["b"] - x["a"] ** 2) ** 2 + (1 - x["a"]) ** 2)


@pytest.mark.parametrize("method", ["trust_region", "line_search"])
def test_rosenbrocks_function_is_minimised(method):
    start = {"a": jnp.full(2, -1.2), "b": jnp.ones(2)}
    result = jax.jit(lambda x: minimize(rosenbrock, x, method=method, max_iterations=500, tolerance=1e-7))(start)
    assert MinimizeReason(int(result.reason)) is MinimizeReason.GRADIENT
    np.testing.assert_allclose(trees.ravel(result.value), 1.0, atol=1e-6)
    assert 0 < result.accepted <= result.iterations
    assert result.gradient_norm <= 1e-7


def test_quadratics_end_in_as_many_steps_as_they_have_dimensions():
    """Nocedal and Wright 2006, theorem 6.1: SR1 knows the matrix after n independent steps."""
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    matrix = jnp.asarray(axes @ np.diag([0.5, 1, 2, 4, 8, 16.0]) @ axes.T)
    target = jnp.asarray(generator.normal(size=6))
    result = minimized(lambda x: x @ matrix @ x / 2 - target @ x, jnp.zeros(6), memory_size=6, initial_radius=1e6)
    assert result.iterations <= 12
    np.testing.assert_allclose(result.value, np.linalg.solve(matrix, target), rtol=1e-6)


def test_a_saddle_is_left_where_lbfgs_stays():
    """Both come down the ridge to the saddle and find a gradient within the tolerance; only one sees the way on.

    L-BFGS keeps its matrix positive definite and cannot know of the negative curvature, which the first SR1 pair shows.
    """
    import optax

    def saddle(x):
        return x[0] ** 2 / 2 + x[1] ** 4 / 4 - x[1] ** 2 / 2

    start, tolerance = jnp.array([1.0, 1e-5]), 1e-3
    result = minimized(saddle, start, tolerance=tolerance, max_iterations=200)
    assert MinimizeReason(int(result.reason)) is MinimizeReason.GRADIENT
    np.testing.assert_allclose(jnp.abs(result.value), [0, 1], atol=1e-2)

    lbfgs = optax.lbfgs(memory_size=5)
    value_and_grad = optax.value_and_grad_from_state(saddle)

    @jax.jit
    def descend(x):
        def body(carry):
            x, state = carry
            loss, gradient = value_and_grad(x, state=state)
            updates, state = lbfgs.update(gradient, state, x, value=loss, grad=gradient, value_fn=saddle)
            return optax.apply_updates(x, updates), state

        return jax.lax.while_loop(
            lambda c: jnp.linalg.norm(jax.grad(saddle)(c[0])) > tolerance, body, (x, lbfgs.init(x))
        )

    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers of two widths
        x, _ = descend(start)
    np.testing.assert_allclose(x, [0, 0], atol=tolerance)


def test_probing_for_negative_curvature_ends_where_there_is_none():
    """A matrix that is wrong about the curvature at the minimum is corrected by the steps that it asks for."""
    matrix = jnp.diag(jnp.array([1.0, 5.0, 20.0, 70.0]))
    result = minimized(lambda x: x @ matrix @ x / 2 - jnp.sum(jnp.cos(3 * x)), jnp.full(4, 0.7), tolerance=1e-7)
    assert MinimizeReason(int(result.reason)) in (MinimizeReason.GRADIENT, MinimizeReason.SMALL_STEP)
    np.testing.assert_allclose(result.gradient_norm, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("bowl", "last", "accepted", "tried", "reach"),
    [
        (4.0, 0.5, True, 1 / 8, 1 / 8),  # from (1, 1) along -g = -(8, 8): 1, 1/2 and 1/4 lead to where f is no lower
        (4.0, 0.01, True, 0.02, 0.02),  # the first step of the search, twice the last
        (None, 0.5, False, 1 / 8, 1 / 4),  # f rises whatever the gradient says: half the last, not what was tried
    ],
)
def test_the_next_search_starts_from_what_this_one_found(bowl, last, accepted, tried, reach):
    def evaluate(step):
        x = 1 + step
        return (jnp.linalg.norm(step) if bowl is None else bowl * jnp.sum(x**2)), 8.0 * x

    @jax.jit
    def search(last, most, decrease):
        loss, gradient = evaluate(jnp.zeros(2))
        options = {"sufficient_decrease": decrease, "most_halvings": most, "scale": jnp.ones(())}
        taken = quasi_newton.line_search_step(evaluate, loss, gradient, sr1_memory(gradient), last, **options)
        return taken.accepted, taken.step, taken.reach

    got = search(jnp.asarray(last), 3, jnp.float32(1e-4))
    assert got[0] == accepted
    np.testing.assert_allclose(got[1], np.full(2, -8 * tried), rtol=1e-12)
    np.testing.assert_allclose(got[2], reach, rtol=1e-12)


@pytest.mark.parametrize("method", ["trust_region", "line_search"])
def test_options_may_be_traced_and_no_rank_is_promoted(method):
    start = {"a": jnp.full(2, -1.2), "b": jnp.ones(2)}

    def run(options):
        return minimize(rosenbrock, start, method=method, **options)

    options = {"max_iterations": 7, "tolerance": 1e-6, "scale": 2.0, "initial_radius": 0.5}
    traced = {
        name: np.asarray(value, np.int32 if name == "max_iterations" else np.float32) for name, value in options.items()
    }
    options = {name: value.item() for name, value in traced.items()}
    expected = jax.jit(lambda: run(options))()
    assert expected.iterations == 7
    with jax.numpy_rank_promotion("raise"):
        got = jax.jit(run)(traced)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, expected)


def test_results_say_why_they_ended():
    at_start = minimized(lambda x: jnp.sum(x**2), jnp.zeros(2))
    assert MinimizeReason(int(at_start.reason)).text == "the gradient is within the tolerance"
    assert at_start.iterations == 0
    few = minimized(rosenbrock, {"a": jnp.array(-1.2), "b": jnp.array(1.0)}, max_iterations=3)
    assert MinimizeReason(int(few.reason)) is MinimizeReason.MAX_ITERATIONS
    infinite = minimized(lambda x: jnp.log(x[0]), jnp.array([-1.0]))
    assert MinimizeReason(int(infinite.reason)) is MinimizeReason.NON_FINITE
    kink = minimized(lambda x: jnp.abs(x[0] - 1 / 3), jnp.array([0.0]), tolerance=0.0)
    assert MinimizeReason(int(kink.reason)) is MinimizeReason.SMALL_STEP
    with pytest.raises(ValueError, match="method must be one of 'trust_region', 'line_search', got 'newton'"):
        minimize(rosenbrock, jnp.zeros(2), method="newton")
    with pytest.raises(ValueError, match="size is 0; it must be at least 1"):
        quasi_newton.sr1_memory(jnp.zeros(2), 0)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_pairs_of_any_size_that_single_precision_holds(size):
    memory = sr1_memory(jnp.zeros(3, jnp.float32))
    for s in np.eye(3, dtype=np.float32)[:2]:
        memory, skipped, dropped = update(memory, jnp.asarray(size * s), jnp.asarray(3 * size * s), 1.0)
        assert not skipped
        assert dropped == 0
    np.testing.assert_allclose(dense(memory, 1.0), np.diag([3.0, 3.0, 1.0]), rtol=1e-5)


def test_a_matrix_with_huge_entries_stays_what_it_is_in_single_precision():
    memory = sr1_memory(jnp.zeros(3, jnp.float32))
    for s in np.eye(3, dtype=np.float32)[:2]:
        memory, _, _ = update(memory, jnp.asarray(s), jnp.asarray(np.float32(1e20) * s), 1.0)
    np.testing.assert_allclose(dense(memory, 1.0), np.diag([1e20, 1e20, 1.0]), rtol=1e-5)
    step = jax.jit(lambda m: compact_trust_region(sr1_map(m, 1.0), jnp.ones(3, jnp.float32), 1.0).step)(memory)
    np.testing.assert_allclose(step, [0, 0, -1], atol=1e-5)


def test_a_pair_that_overflows_is_left_out_and_the_memory_stays_sound():
    memory = sr1_memory(jnp.zeros(2, jnp.float32))
    huge = jnp.array([3e38, 3e38], jnp.float32)
    memory, skipped, _ = update(memory, jnp.array([1e-5, 0], jnp.float32), huge, 1.0)
    assert skipped
    memory, skipped, _ = update(memory, jnp.array([1, 0], jnp.float32), jnp.array([2, 0], jnp.float32), 1.0)
    assert not skipped
    np.testing.assert_allclose(dense(memory, 1.0), np.diag([2.0, 1.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "start"),
    [
        (lambda x: jnp.cosh(x[0] - 1) + jnp.sum((x - 1) ** 2) / 2, [20.0, 3.0]),
        (lambda x: 1e12 * jnp.sum((x - 1) ** 2 * jnp.array([1.0, 10.0], jnp.float32)), [3.0, 4.0]),
    ],
    ids=["overflows", "steep"],
)
def test_first_steps_that_overflow_do_not_stop_a_minimisation(function, start):
    result = minimized(function, jnp.array(start, jnp.float32), tolerance=1e-3)
    np.testing.assert_allclose(result.value, 1.0, atol=1e-3)


def test_a_step_onto_a_kink_without_a_gradient_is_not_taken():
    result = minimized(lambda x: jnp.sqrt(x[0] ** 2), jnp.ones(1), tolerance=1e-3)
    assert jnp.isfinite(result.gradient_norm)
    assert abs(result.value[0]) < 1e-5
    assert int(result.reason) == MinimizeReason.SMALL_STEP
