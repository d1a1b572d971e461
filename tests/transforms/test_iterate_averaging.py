"""The averaging schemes against their formulas (AS-9), the precision of the average, and how it is found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax


def history(scheme, decay, steps=12, dtype=jnp.float64):
    """The iterates theta_0 ... theta_steps of noisy descent, and the averages after each step."""
    tx = optax.chain(optax.scale(-0.3), curvax.average_iterates(scheme, decay=decay))
    theta = {"w": jnp.array([4.0, -2.0], dtype)}
    state, iterates, averages = tx.init(theta), [theta["w"]], []
    for noise in np.random.default_rng(0).standard_normal((steps, 2)):
        gradient = {"w": theta["w"] + jnp.asarray(noise, dtype)}
        updates, state = tx.update(gradient, state, theta)
        theta = optax.apply_updates(theta, updates)
        iterates.append(theta["w"])
        averages.append(curvax.averaged_params(state, like=theta)["w"])
    return np.array(iterates, np.float64), np.array(averages, np.float64)


def test_uniform_is_the_mean_of_all_iterates():
    iterates, averages = history("uniform", 0.5)
    np.testing.assert_allclose(averages, [iterates[: k + 1].mean(0) for k in range(1, 13)], rtol=1e-12)


def test_forgetful_is_a_mean_at_first_and_an_exponential_average_later():
    iterates, averages = history("forgetful", 0.75)
    expected, average = [], iterates[0]
    for k in range(1, 13):
        beta = min(1 - 1 / k, 0.75)
        average = (1 - beta) * iterates[k] + beta * average
        expected.append(average)
    np.testing.assert_allclose(averages, expected, rtol=1e-12)
    np.testing.assert_allclose(averages[3], iterates[1:5].mean(0), rtol=1e-12)


def test_exponential():
    iterates, averages = history("exponential", 0.9)
    average = iterates[0]
    for k in range(1, 13):
        average = 0.9 * average + 0.1 * iterates[k]
    np.testing.assert_allclose(averages[-1], average, rtol=1e-12)


def test_averages_of_bfloat16_parameters_keep_what_single_steps_lose():
    tx = curvax.average_iterates("uniform")
    theta = jnp.ones(1, jnp.bfloat16)
    state = tx.init(theta)
    for _ in range(200):
        _, state = tx.update(jnp.full(1, 1e-3, jnp.bfloat16), state, theta)  # lost when added to 1 in bfloat16
    assert state.average.dtype == jnp.float32
    np.testing.assert_allclose(state.average, 1 + 1e-3 * 200 / 201, rtol=1e-5)
    assert curvax.averaged_params(state, like=theta).dtype == jnp.bfloat16


def test_it_runs_under_jit_and_scan_and_leaves_updates_and_bad_values_alone():
    tx = curvax.average_iterates()
    theta = jnp.ones(3)

    @jax.jit
    def scanned(state):
        return jax.lax.scan(lambda s, u: tx.update(u, s, theta)[::-1], state, jnp.ones((5, 3)))

    state, updates = scanned(tx.init(theta))
    np.testing.assert_array_equal(updates, np.ones((5, 3)))
    assert state.steps == 5
    _, after = tx.update(jnp.array([1.0, jnp.nan, 1.0]), state, theta)
    np.testing.assert_array_equal(after.average, state.average)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="scheme must be"):
        curvax.average_iterates("running")
    with pytest.raises(ValueError, match="decay"):
        curvax.average_iterates(decay=1.0)
    tx = curvax.average_iterates()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="last in the chain"):
        curvax.averaged_params(optax.adam(0.1).init(jnp.ones(2)), like=jnp.ones(2))
