"""Martens' progress rule (CG-2), the iterate store and the walk back over it (CG-5), and monitors (CG-3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import solvers
from curvax.krylov.conjugate_gradient import StoredIterates
from curvax.solvers import StopReason

N = 300
DIAGONAL = np.geomspace(1e-4, 1, N)
B = np.random.default_rng(0).standard_normal(N)
CAP = 200


@functools.partial(jax.jit, static_argnames="store_at")
def run(b, x0, progress_tolerance, *, store_at=None):
    return solvers.cg(
        lambda v: DIAGONAL * v,
        b,
        x0=x0,
        max_iterations=CAP,
        tolerance=0.0,
        progress_tolerance=progress_tolerance,
        store_at=store_at,
    )


@functools.cache
def full_run(warm):
    """The iterates 1 to CAP of a run without a progress rule."""
    return run(B, warm * np.ones(N), -np.inf, store_at=tuple(range(1, CAP + 1)))


def first_stalled(q, progress_tolerance, guarded=True):
    """Eq. 4.2 as it is printed, with q = M - M(0)."""
    for j in range(1, CAP + 1):
        k = max(10, j // 10)
        if j > k and (q[j] < 0 or not guarded) and (q[j] - q[j - k]) / q[j] < progress_tolerance:
            return j
    return CAP


@pytest.mark.parametrize("warm", [0.0, 300.0, -3000.0])
@pytest.mark.parametrize("progress_tolerance", [5e-2, 1e-2, 1e-3, 1e-4])
def test_progress_rule_stops_where_the_formula_does(warm, progress_tolerance):
    trace = np.asarray(full_run(warm).model_trace)
    expected = first_stalled(trace, progress_tolerance)
    result = run(B, warm * np.ones(N), progress_tolerance)
    assert result.iterations == expected
    assert result.reason == (StopReason.PROGRESS if expected < CAP else StopReason.MAX_ITERATIONS)
    np.testing.assert_allclose(result.model_trace[:expected], trace[:expected], rtol=1e-9)
    assert np.all(result.model_trace[expected:] == result.model_value)


def test_cases_of_the_progress_rule_are_telling():
    """In one the window grows; in another a rule without the guard on q would stop before q is below zero."""
    trace = np.asarray(full_run(0.0).model_trace)
    assert 100 < first_stalled(trace, 1e-3) < CAP
    trace = np.asarray(full_run(-3000.0).model_trace)
    assert trace[first_stalled(trace, 5e-2, guarded=False)] > 0 > trace[first_stalled(trace, 5e-2)]


def test_progress_is_relative_to_the_scale_of_b():
    for scale in (1e-100, 1e100):
        assert run(B * scale, np.zeros(N), 1e-3).iterations == run(B, np.zeros(N), 1e-3).iterations


def test_store_keeps_the_iterates_asked_for_and_the_last():
    everything = full_run(0.0)
    store_at = solvers.geometric_iterations(CAP)
    result = run(B, np.zeros(N), 1e-2, store_at=store_at)
    last = int(result.iterations)
    numbers = [number for number in store_at if number < last] + [last]
    assert result.stored.used == len(numbers) < len(store_at)
    assert result.stored.iterations.tolist() == numbers + [0] * (len(store_at) + 1 - len(numbers))
    for slot, number in enumerate(numbers):
        np.testing.assert_allclose(
            result.stored.values[slot], everything.stored.values[number - 1], rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(result.stored.model_values[slot], everything.model_trace[number], rtol=1e-9)
    assert np.all(result.stored.values[len(numbers) - 1] == result.value)
    assert not np.any(result.stored.values[len(numbers) :])


def test_store_numbers():
    assert solvers.geometric_iterations(250) == tuple(sorted({round(1.3**j) for j in range(1, 22)}))


def test_nothing_is_stored_unless_asked():
    result = run(B, np.zeros(N), 1e-2)
    assert result.stored is None
    assert result.monitor_state is None
    assert all(leaf.size for leaf in jax.tree.leaves(result))


def objective(x):
    """A function that the quadratic model describes near zero only."""
    return 0.5 * jnp.sum(DIAGONAL * x**2) - jnp.sum(B * x) + 2e-4 * jnp.sum(x**2)


def values_along(run_result):
    return np.asarray(jax.vmap(objective)(run_result.stored.values))


def test_backtracking_walks_back_while_the_objective_improves():
    result = run(B, np.zeros(N), 1e-4, store_at=solvers.geometric_iterations(CAP))
    used = int(result.stored.used)
    values = values_along(result)[:used]
    best = used - 1
    while best > 0 and values[best - 1] < values[best]:
        best -= 1
    assert 3 < best < used - 3
    chosen = jax.jit(lambda stored: solvers.backtrack(stored, objective))(result.stored)
    assert chosen.iteration == result.stored.iterations[best]
    assert chosen.evaluations == used - best + 1
    np.testing.assert_allclose(chosen.objective, values[best], rtol=1e-12)
    np.testing.assert_allclose(chosen.value, result.stored.values[best])
    assert chosen.model_value == result.stored.model_values[best]


def test_backtracking_passes_over_iterates_where_the_objective_overflows():
    stored = run(B, np.zeros(N), 1e-4, store_at=solvers.geometric_iterations(CAP)).stored
    lengths = np.linalg.norm(stored.values, axis=1)
    limit = lengths[5] * 1.001
    chosen = jax.jit(lambda s: solvers.backtrack(s, lambda x: jnp.where(jnp.linalg.norm(x) > limit, jnp.nan, -1.0)))(
        stored
    )
    assert chosen.iteration == stored.iterations[5]
    nowhere = jax.jit(lambda s: solvers.backtrack(s, lambda x: jnp.nan * jnp.sum(x)))(stored)
    assert nowhere.objective == np.inf


def monitored(monitor):
    return jax.jit(lambda b: solvers.cg(lambda v: DIAGONAL * v, b, max_iterations=CAP, tolerance=0.0, monitor=monitor))(
        B
    )


@pytest.mark.parametrize("period", [1, 7])
def test_reduction_monitor_stops_at_ninety_per_cent_of_the_best(period):
    reductions = -values_along(full_run(0.0))
    largest = 0.0
    for iteration in range(period, CAP + 1, period):
        largest = max(largest, reductions[iteration - 1])
        if reductions[iteration - 1] < 0.9 * largest:
            break
    result = monitored(solvers.reduction_monitor(objective, 0.0, period=period))
    assert result.reason == StopReason.MONITOR
    assert result.iterations == iteration < CAP
    np.testing.assert_allclose(result.monitor_state, largest, rtol=1e-9)


@pytest.mark.parametrize(("window", "margin"), [(10, 0.0), (3, 0.0), (10, 0.5)])
def test_lookback_monitor_stops_when_worse_than_before(window, margin):
    values = values_along(full_run(0.0))
    limits = values + margin * np.abs(values)  # by a share of the reduction h(0) - h = -values that there was
    stops = [i + 1 for i in range(window, CAP) if values[i] > limits[i - window]]
    result = monitored(solvers.lookback_monitor(lambda x: objective(x) + 1.5, 1.5, window=window, margin=margin))
    assert result.reason == StopReason.MONITOR
    assert result.iterations == stops[0]
    np.testing.assert_allclose(result.monitor_state[-1], values[stops[0] - 1] + 1.5, rtol=1e-9)


def first_stop(monitor, values):
    """The number of the first of these values of the objective at which a monitor stops, or None."""

    def look(carry, value):
        state, iteration = carry
        state, stop = monitor.update(state, value, iteration)
        return (state, iteration + 1), stop

    stops = jax.lax.scan(look, (monitor.state, 1), jnp.array(values))[1]
    return int(np.argmax(stops)) + 1 if np.any(stops) else None


@pytest.mark.parametrize(
    ("values", "stop"),
    [
        ([2.0, 3.0, 4.0], 2),  # a run that only rises from h(0) = 1
        ([9.0, 7.0, 4.0, 2.0, 0.5, 0.4], None),  # a warm start that improves
        ([9.0, 7.0, 7.5, 7.7], 4),  # one that turns: -6.7 is below -6 by more than a tenth
        ([0.5, 0.2, 0.25, 0.3], 4),  # the reduction falls to 0.7 of 0.8
        ([jnp.inf, 3.0, 0.5], None),
        ([0.5, jnp.nan], 2),
    ],
)
def test_the_ninety_per_cent_rule_on_runs_above_where_they_began(values, stop):
    assert first_stop(solvers.reduction_monitor(lambda x: x, 1.0), values) == stop


@pytest.mark.parametrize("choose", [solvers.backtrack, solvers.best_stored])
@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        ([0.9, 0.8, 0.7, 0.95], 3),  # the walk goes on while it improves
        ([5.0, 6.0, 20.0, 19.0], 0),  # it only rose: neither the last, better than the one before it, nor the first
        ([0.9, 3.0, 9.0, 8.0], 1),
        ([1.0 + 1e-15] * 4, 4),  # within rounding of h(0), as at convergence
        ([jnp.nan, jnp.nan, jnp.inf, jnp.nan], 0),
    ],
)
def test_where_nothing_is_better_than_zero_zero_is_chosen(choose, values, chosen):
    stored = StoredIterates(
        values=jnp.array(values), iterations=jnp.arange(1, 5), model_values=-jnp.arange(1.0, 5.0), used=jnp.array(4)
    )
    result = jax.jit(lambda stored: choose(stored, lambda x: x, 1.0))(stored)
    if chosen == 4 and choose is solvers.best_stored:
        chosen = 1
    assert result.iteration == chosen
    assert result.stayed == (chosen == 0)
    assert result.objective == (values[chosen - 1] if chosen else 1.0)
    assert result.value == (values[chosen - 1] if chosen else 0.0)
    assert result.model_value == -chosen


@pytest.mark.parametrize("choice", ["walk", "best", "last"])
@pytest.mark.parametrize(
    "loss",
    [
        objective,
        lambda x: jnp.sqrt(1 + 1e3 * jnp.sum((x - 1e-3 * B) ** 2)),  # the chosen iterate leads too far as well
        lambda x: jnp.where(jnp.sum(x**2) > 30.0, jnp.nan, -jnp.sum(B * x)),
        lambda x: jnp.sum(x**2) + 1.0,  # nothing is better than zero
        lambda x: jnp.sum(B * x),  # an ascent direction
    ],
)
def test_choosing_and_searching_in_one_loop_is_one_after_the_other(choice, loss):
    stored = run(B, np.zeros(N), 1e-4, store_at=solvers.geometric_iterations(CAP)).stored
    here, gradient = (
        loss(jnp.zeros(N)),
        jax.grad(lambda x: jnp.where(jnp.isfinite(loss(x)), loss(x), 0.0))(jnp.zeros(N)),
    )
    choose = {"walk": solvers.backtrack, "best": solvers.best_stored, "last": solvers.last_stored}[choice]

    @jax.jit
    def one_after_the_other(stored):
        chosen = choose(stored, loss, here)
        search = solvers.backtracking_line_search(
            lambda a: loss(a * chosen.value),
            here,
            gradient @ chosen.value,
            sufficient_decrease=1e-2,
            shrink=0.8,
            max_tries=60,
            first=chosen.objective,
        )
        return chosen, search

    together = jax.jit(lambda s: solvers.choose_and_search(s, loss, here, gradient, choice=choice))(stored)
    expected = one_after_the_other(stored)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), together, expected)


def test_monitor_stops_at_a_non_finite_objective():
    result = monitored(solvers.lookback_monitor(lambda x: jnp.nan * jnp.sum(x), 1.0))
    assert result.iterations == 1


def test_every_reason_has_a_text():
    texts = {StopReason(code).text for code in range(len(StopReason))}
    assert len(texts - {""}) == len(StopReason)
    assert StopReason(int(run(B, np.zeros(N), 1e-2).reason)).text == StopReason.PROGRESS.text
