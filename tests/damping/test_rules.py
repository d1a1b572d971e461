"""The rules of table X-1: what they do at, above and below their thresholds (T7)."""

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
    new = DampingRule()(jnp.asarray(3.0, dtype), jnp.asarray(ratio, dtype), jnp.array(1))
    assert new.dtype == dtype
    np.testing.assert_allclose(new, 3 * factor, rtol=1e-6)


def test_it_acts_once_in_a_period_and_stays_in_its_range():
    rule = DampingRule(period=5, decrease=0.5, increase=2.0, minimum=1e-2, maximum=10.0)
    damping = jnp.array(1.0)
    history = [damping := rule(damping, jnp.array(0.9), jnp.array(count)) for count in range(1, 41)]
    assert [float(x) for x in history[:5]] == [1, 1, 1, 1, 0.5]
    assert history[-1] == 1e-2
    for count in range(1, 100):
        damping = rule(damping, jnp.array(-1.0), jnp.array(count))
    assert damping == 10


def test_a_rule_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="decrease"):
        DampingRule(decrease=1.5)


@pytest.mark.parametrize(
    ("rule", "start", "good", "bad", "period", "good_factor"),
    [
        (curvax.damping.kfac_rule(), 150.0, 0.76, 0.24, 5, 0.95**5),
        (curvax.damping.kfac_rule(period=3), 150.0, 0.76, 0.24, 3, 0.95**3),
        (curvax.damping.curveball_rule(), 10.0, 1.51, 0.49, 5, 0.999),
    ],
)
def test_named_rules_are_those_of_their_papers(rule, start, good, bad, period, good_factor):
    damping = jnp.array(start)
    assert rule(damping, jnp.array(good), jnp.array(period - 1)) == start
    np.testing.assert_allclose(rule(damping, jnp.array(good), jnp.array(period)), start * good_factor, rtol=1e-12)
    np.testing.assert_allclose(rule(damping, jnp.array(bad), jnp.array(2 * period)), start / good_factor, rtol=1e-12)
    assert rule(damping, jnp.array((good + bad) / 2), jnp.array(period)) == start


@pytest.mark.parametrize(
    ("ratio", "norm", "factor"),
    [(0.76, 0.81, 2), (0.76, 0.79, 1), (0.74, 1.0, 1), (0.1, 1.0, 1), (0.09, 0.1, 0.5), (-np.inf, 1.0, 0.5)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_radius_grows_for_good_long_steps_and_shrinks_for_bad_ones(ratio, norm, factor, dtype):
    radius = jnp.asarray(3.0, dtype)
    new = curvax.damping.RadiusRule()(radius, jnp.asarray(ratio, dtype), jnp.asarray(3 * norm, dtype))
    assert new.dtype == dtype
    assert new == 3 * factor


def test_best_of_three_keeps_the_lowest_model_and_survives_failed_candidates():
    rule = curvax.damping.BestOfThree(factor=0.25, period=20, maximum=8.0)
    candidates = rule.candidates(jnp.array(4.0, jnp.float32))
    assert candidates.dtype == jnp.float32
    assert candidates.tolist() == [4, 1, 8]  # 16 is beyond the maximum
    for values, best in (([-1.0, -2, -3], 8), ([-1, np.nan, 0], 4), ([np.nan, -1e-9, np.nan], 1), ([np.nan] * 3, 4)):
        assert rule.choose(candidates, jnp.array(values)) == best
    assert [count for count in range(1, 61) if rule.due(jnp.array(count))] == [20, 40, 60]


def test_rules_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="shrink"):
        curvax.damping.RadiusRule(shrink=2.0)
    with pytest.raises(ValueError, match="factor"):
        curvax.damping.BestOfThree(factor=1.0)
