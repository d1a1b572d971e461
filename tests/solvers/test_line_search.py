"""Backtracking along a line against a loop in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.solvers import backtracking_line_search


def by_hand(f, slope, sufficient_decrease, shrink, max_tries, initial):
    step_size, tries = initial, 0
    while not f(step_size) <= f(0.0) + sufficient_decrease * step_size * slope:
        if tries == max_tries:
            return step_size, False
        step_size, tries = shrink * step_size, tries + 1
    return step_size, True


def search(f, slope, *, known=False, **options):
    """The compiled search, all numbers traced, and how often the loss was evaluated."""
    calls = []

    def counted(step_size):
        jax.debug.callback(lambda: calls.append(None))
        return f(step_size)

    first = f(options["initial"]) if known else None
    result = jax.jit(
        lambda slope, first, options: backtracking_line_search(counted, f(0.0), slope, first=first, **options)
    )(jnp.asarray(slope), first, options)
    jax.effects_barrier()
    return result, len(calls)


# f, f'(0): a narrow valley, one wide enough for the first step, and one whose far side is not finite
VALLEYS = {
    "narrow": (lambda a: 40.0 * a**2 - 2.0 * a, -2.0),
    "wide": (lambda a: 0.3 * a**2 - a, -1.0),
    "not finite": (lambda a: jnp.where(a > 0.3, jnp.nan, a**2 - a), -1.0),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shrink", [0.5, 0.8])
@pytest.mark.parametrize("sufficient_decrease", [1e-4, 0.3, 0.9])
@pytest.mark.parametrize("name", VALLEYS)
def test_the_first_step_that_falls_enough(name, sufficient_decrease, shrink, known):
    f, slope = VALLEYS[name]
    options = {"sufficient_decrease": sufficient_decrease, "shrink": shrink, "max_tries": 60, "initial": 1.0}
    expected, found = by_hand(f, slope, **options)
    result, calls = search(f, slope, known=known, **options)
    assert found
    assert result.found
    np.testing.assert_allclose(result.step_size, expected, rtol=1e-12)
    np.testing.assert_allclose(result.value, f(expected), rtol=1e-12)
    assert calls == round(np.log(expected) / np.log(shrink)) + (not known)
    assert (expected < 1) == (name != "wide" or sufficient_decrease == 0.9)


@pytest.mark.parametrize(("sufficient_decrease", "step_size"), [(0.05, 1.0), (0.2, 0.5)])
def test_a_step_whose_loss_falls_too_little_is_shortened(sufficient_decrease, step_size):
    """f(1) = -0.1 and f'(0) = -1: the first step falls by a tenth of what the slope promises."""
    options = {"sufficient_decrease": sufficient_decrease, "shrink": 0.5, "max_tries": 9, "initial": 1.0}
    assert search(lambda a: 0.9 * a**2 - a, -1.0, **options)[0].step_size == step_size


def test_the_search_starts_where_it_is_told_and_gives_up():
    f, slope = VALLEYS["narrow"]
    options = {"sufficient_decrease": 0.1, "shrink": 0.5}
    assert search(f, slope, max_tries=30, initial=0.04, **options)[0].step_size == 0.04
    result, calls = search(f, slope, max_tries=3, initial=1.0, **options)
    assert not result.found
    assert (result.step_size, calls) == (0.125, 4)


@pytest.mark.parametrize("first", [-1.0, 1.0])
def test_an_ascent_direction_is_never_followed(first):
    """Not even if the loss falls along it, or rises by less than the slope allows."""
    result, calls = search(
        lambda a: jnp.asarray(first) * a, 1e-9, sufficient_decrease=1e-4, shrink=0.5, max_tries=30, initial=1.0
    )
    assert not result.found
    assert calls == 1
    flat, _ = search(lambda a: 0.0 * a, 0.0, sufficient_decrease=1e-4, shrink=0.5, max_tries=30, initial=1.0)
    assert flat.found
