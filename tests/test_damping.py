"""The Levenberg-Marquardt rule: what it does at, above and below its thresholds (T7)."""

import jax.numpy as jnp
import numpy as np
import pytest

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
