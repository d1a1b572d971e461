"""Step costs over a whole cycle: periodic work is counted as it occurs."""

import jax
import numpy as np
import pytest

import curvax
from benchmarks import step_cost
from benchmarks.operations import flops


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.many_compilations("the benchmark draws its data and copies its parameters eagerly")
def test_the_mean_over_a_cycle_has_periodic_work_once():
    """CurveBall adapts its damping, a forward pass, at every fifth step."""
    names = {"adam": step_cost.FIRST_ORDER["adam"], "curveball": step_cost.BY_PRODUCTS["curveball"]}
    network = step_cost.Network("", lambda: step_cost.dense((6, 5, 4), 8), names)
    objective, params, batch = network.make()
    rows = step_cost.measure(network, 1)
    assert [row["optimiser"] for row in rows] == list(names)
    assert rows[0]["state / parameters"] == "2.02"  # two moments and a counter

    run = step_cost.Measured(names["curveball"], objective, params, batch, None)
    run.run_cycle()
    assert len(run.cycles[0]) == 5
    always = curvax.curveball(rule=curvax.damping.DampingRule())
    never = curvax.curveball(rule=curvax.damping.DampingRule(period=1000))
    dear, cheap = (
        flops(step_cost.training_step(objective, tx), params, jax.eval_shape(tx.init, params), batch, alarms=alarms)
        for tx, alarms in ((always, False), (never, True))
    )
    assert dear > cheap
    np.testing.assert_allclose(run.operations(), cheap + (dear - cheap) / 5, rtol=1e-2)


@pytest.mark.many_compilations("the benchmark draws its data and copies its parameters eagerly")
def test_the_two_further_trials_of_algorithm_7_are_counted_where_they_occur():
    objective, params, batch = step_cost.dense((6, 5, 4), 8)
    layers = curvax.find_layers(objective, params, batch)
    tx = step_cost.algorithm_7(layers)

    def count(steps, trials):
        def step(params, state, batch):
            return step_cost.training_step(objective, tx)(params, state._replace(steps=np.int32(steps)), batch)

        return flops(step, params, jax.eval_shape(tx.init, params), batch, while_trip_count=trials, alarms=True)

    period = curvax.damping.BestOfThree().period
    one = count(period - 1, 1) - count(period - 1, 0)
    assert one > 0
    np.testing.assert_allclose(count(period - 1, 2) - count(period - 1, 1), one)
    assert count(period, 2) == count(period, 0)
