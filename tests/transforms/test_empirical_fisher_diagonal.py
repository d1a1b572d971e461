"""The family (p, xi, lambda) against a loop of numpy, and its members that optax has (CL-10)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from tests.tolerances import rounding
from tests.transforms.test_step_size_adaptation import GRADIENTS, steps_of

FAMILY = curvax.scale_by_empirical_fisher_diagonal


def loop(exponent, damping, average, decay=0.9, momentum=0.0, debias=True):
    first = second = np.zeros(GRADIENTS.shape[1])
    steps = []
    for k, g in enumerate(GRADIENTS, 1):
        first = momentum * first + (1 - momentum) * g
        if average == "decayed":
            second = decay * second + (1 - decay) * g**2
        else:
            second = np.mean(GRADIENTS[:k] ** 2, axis=0) * (k if average == "sum" else 1)
        m, p = first, second
        if debias:
            m = m / (1 - momentum**k)
            p = p / (1 - decay**k) if average == "decayed" else p
        steps.append(m / (p + damping) ** exponent)
    return np.stack(steps)


@pytest.mark.parametrize(
    "options",
    [
        {"exponent": 1.0, "damping": 0.1, "average": "uniform"},
        {"exponent": 1.0, "damping": 0.1, "average": "sum"},
        {"exponent": 0.75, "damping": 0.01, "average": "decayed", "momentum": 0.8},
        {"exponent": 0.5, "damping": 0.01, "average": "decayed", "momentum": 0.8, "debias": False},
    ],
)
def test_the_family_is_the_loop(options):
    tx = FAMILY(decay=0.9, **options)
    np.testing.assert_allclose(steps_of(tx), loop(**options), rtol=rounding(jnp.float64, 500))


@pytest.mark.parametrize(
    ("ours", "optaxs"),
    [
        (FAMILY(average="sum", damping=0.3), optax.scale_by_rss(initial_accumulator_value=0.1, eps=0.2)),
        (
            FAMILY(decay=0.9, damping=1e-3, debias=False),
            optax.scale_by_rms(0.9, eps=1e-3, eps_in_sqrt=True, bias_correction=False),
        ),
        (FAMILY(decay=0.99, momentum=0.9, damping=1e-3), optax.scale_by_adam(0.9, 0.99, eps=0.0, eps_root=1e-3)),
    ],
    ids=["adagrad", "rmsprop", "adam"],
)
def test_adagrad_rmsprop_and_adam_are_members(ours, optaxs):
    with jax.numpy_dtype_promotion("standard"):  # optax has integers to the power of floats
        expected = steps_of(optaxs)
    np.testing.assert_allclose(steps_of(ours), expected, rtol=rounding(jnp.float64, 500))


def test_steps_of_exponent_one_grow_as_the_gradient_falls_until_the_damping_holds_them():
    """The trap of the empirical Fisher matrix at a minimum: g / g^2 (CL-10)."""
    falling = np.geomspace(1.0, 1e-6, 7)[:, None]
    now = {"exponent": 1.0, "decay": 0.0}
    np.testing.assert_allclose(steps_of(FAMILY(damping=0.0, **now), falling), 1 / falling, rtol=1e-12)
    held = steps_of(FAMILY(damping=1e-4, **now), falling)
    assert held.max() <= 0.5 / np.sqrt(1e-4)
    assert held[-1] < 0.02
    remembered = steps_of(FAMILY(exponent=1.0, damping=0.0, average="uniform"), falling)
    assert remembered.max() <= 1.01 * len(falling)


def test_a_parameter_without_any_gradient_stays():
    still = np.zeros((3, 2))
    assert not steps_of(FAMILY(damping=0.0), still).any()
