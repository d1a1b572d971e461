"""Sparse initialisation: so many nonzeros a unit, in places and of sizes drawn as documented (HF-8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.initializers import sparse


@pytest.mark.parametrize(("shape", "count"), [((784, 40), 15), ((7, 5), 7), ((3, 3, 8, 6), 15), ((15, 2), 15)])
def test_every_unit_has_so_many_incoming_weights(shape, count):
    kernel = sparse()(jax.random.key(0), shape, jnp.float32)
    assert kernel.shape == shape
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(np.sum(kernel.reshape(-1, shape[-1]) != 0, axis=0), count)


def test_places_are_uniform_and_independent_and_values_normal():
    kernel = np.asarray(sparse(4, stddev=0.5)(jax.random.key(1), (20, 20_000)))
    nonzero = kernel != 0
    assert abs(nonzero.mean(1) - 0.2).max() < 4.5 * np.sqrt(0.16 / 20_000)
    together = (nonzero[0] & nonzero[1]).mean()  # without replacement: 4/20 * 3/19
    expected = 4 / 20 * 3 / 19
    assert abs(together - expected) < 4.5 * np.sqrt(expected / 20_000)
    values = kernel[nonzero]
    assert abs(values.mean()) < 4.5 * 0.5 / np.sqrt(values.size)
    assert abs(values.std() / 0.5 - 1) < 4.5 / np.sqrt(2 * values.size)


def test_it_serves_as_a_jax_initializer_under_jit():
    drawn = jax.jit(lambda key: sparse(3)(key, (9, 4)))(jax.random.key(2))
    np.testing.assert_array_equal(drawn, sparse(3)(jax.random.key(2), (9, 4)))


def test_misuse():
    with pytest.raises(ValueError, match="num_nonzeros"):
        sparse(0)
    with pytest.raises(ValueError, match="two axes"):
        sparse()(jax.random.key(0), (5,))


def test_growing_batches_follow_the_formula():
    """m_i = min(m_1 exp((i - 1) / b), |S|) with b = 499 / ln(|S| / m_1): 166.6 for CURVES (KF-17)."""
    size = curvax.schedules.exponential_batch_size(1000, 20_000)
    b = 499 / np.log(20)
    np.testing.assert_allclose(b, 166.6, atol=0.05)
    for step in (1, 2, 77, 300, 499):
        assert abs(size(step) - 1000 * np.exp((step - 1) / b)) <= 1
    assert size(500) == size(10_000) == 20_000
    coarse = curvax.schedules.exponential_batch_size(1000, 20_000, multiple_of=500)
    sizes = [coarse(step) for step in range(1, 520)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 45
    assert all(s % 500 == 0 for s in sizes)
    for options in ({"first": 0, "whole": 5}, {"first": 6, "whole": 5}, {"first": 1, "whole": 5, "steps_to_whole": 1}):
        with pytest.raises(ValueError, match=r"first batch|steps_to_whole"):
            curvax.schedules.exponential_batch_size(**options)
