"""The rules of table X-1: what they do at, above and below their thresholds (T7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.damping import DampingRule


@pytest.mark.parametrize(
    ("ratio", "factor"), [(1.0, 2 / 3), (0.76, 2 / 3), (0.75, 1), (0.5, 1), (0.25, 1), (0.24, 1.5), (-np.inf, 1.5)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_thresholds(ratio, factor, dtype):
    new = DampingRule().adapt(jnp.asarray(3.0, dtype), jnp.asarray(ratio, dtype), count=1)
    assert new.dtype == dtype
    np.testing.assert_allclose(new, 3 * factor, rtol=1e-6)


def test_it_acts_once_in_a_period_and_stays_in_its_range():
    rule = DampingRule(period=5, decrease=0.5, increase=2.0, minimum=1e-2, maximum=10.0)
    adapt = jax.jit(lambda damping, ratio, count: rule.adapt(damping, ratio, count=count))
    damping = jnp.array(1.0)
    history = [damping := adapt(damping, 0.9, count) for count in range(1, 41)]
    assert [float(x) for x in history[:5]] == [1, 1, 1, 1, 0.5]
    assert history[-1] == 1e-2
    for count in range(1, 100):
        damping = adapt(damping, -1.0, count)
    assert damping == 10


def test_a_rule_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="decrease"):
        DampingRule(decrease=1.5)


@pytest.mark.parametrize(
    ("rule", "start", "good", "bad", "period", "good_factor", "bad_factor"),
    [
        (curvax.damping.kfac_rule(), 150.0, 0.76, 0.24, 5, 0.95**5, 0.95**5),
        (curvax.damping.kfac_rule(period=3), 150.0, 0.76, 0.24, 3, 0.95**3, 0.95**3),
        (curvax.damping.curveball_rule(), 10.0, 1.51, 0.49, 5, 0.999, 0.999),
        (curvax.damping.cubic_rule(), 10.0, 0.91, 0.09, 1, 0.5, 0.5),
        (curvax.damping.cubic_rule(0.25, 3.0), 10.0, 0.91, 0.09, 1, 0.25, 1 / 3),
    ],
)
def test_named_rules_are_those_of_their_papers(rule, start, good, bad, period, good_factor, bad_factor):
    adapt = jax.jit(lambda ratio, count: rule.adapt(jnp.array(start), ratio, count=count))
    assert period == 1 or adapt(good, period - 1) == start
    np.testing.assert_allclose(adapt(good, period), start * good_factor, rtol=1e-12)
    np.testing.assert_allclose(adapt(bad, 2 * period), start / bad_factor, rtol=1e-12)
    assert adapt((good + bad) / 2, period) == start


@pytest.mark.parametrize(
    ("ratio", "norm", "factor"),
    [(0.76, 0.81, 2), (0.76, 0.79, 1), (0.74, 1.0, 1), (0.1, 1.0, 1), (0.09, 0.1, 0.5), (-np.inf, 1.0, 0.5)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_radius_grows_for_good_long_steps_and_shrinks_for_bad_ones(ratio, norm, factor, dtype):
    radius = jnp.asarray(3.0, dtype)
    new = curvax.damping.RadiusRule().adapt(radius, jnp.asarray(ratio, dtype), step_norm=jnp.asarray(3 * norm, dtype))
    assert new.dtype == dtype
    assert new == 3 * factor


def test_the_radius_stays_in_its_range():
    rule = curvax.damping.RadiusRule(minimum=0.5, maximum=4.0)
    grown, shrunk = (rule.adapt(jnp.array(r), ratio, step_norm=r) for r, ratio in ((3.0, 1.0), (0.6, -1.0)))
    assert (grown, shrunk) == (4.0, 0.5)


def test_rules_are_no_functions():
    """optax.inject_hyperparams takes what can be called for a schedule."""
    assert not any(map(callable, (DampingRule(), curvax.damping.RadiusRule(), curvax.damping.BestOfThree())))


def test_best_of_three_keeps_the_lowest_model_and_survives_failed_candidates():
    rule = curvax.damping.BestOfThree(factor=0.25, period=20, maximum=8.0)
    candidates = rule.candidates(jnp.array(4.0, jnp.float32))
    assert candidates.dtype == jnp.float32
    assert candidates.tolist() == [4, 1, 8]  # 16 is beyond the maximum
    cases = [([-1.0, -2, -3], 8), ([-1, np.nan, 0], 4), ([np.nan, -1e-9, np.nan], 1), ([np.nan] * 3, 4)]
    cases += [([np.nan, np.inf, np.nan], 4), ([-1, -np.inf, 0], 4), ([np.inf, 0, -1], 8)]
    for values, best in cases:
        kept = 0
        for other in (1, 2):
            kept = other if rule.prefers(jnp.array(values[other]), jnp.array(values[kept])) else kept
        assert candidates[kept] == best
    assert [count for count in range(1, 61) if rule.due(jnp.array(count))] == [20, 40, 60]


def test_rules_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="shrink"):
        curvax.damping.RadiusRule(shrink=2.0)
    with pytest.raises(ValueError, match="factor"):
        curvax.damping.BestOfThree(factor=1.0)
