"""Schedules that optax does not have; for learning rates, damping and decay use ``optax.schedules``."""

from __future__ import annotations

import math
from collections.abc import Callable


def exponential_batch_size(
    first: int, whole: int, *, steps_to_whole: int = 500, multiple_of: int = 1
) -> Callable[[int], int]:
    r"""Batch sizes that grow exponentially, m_i = min(m_1 exp((i - 1) / b), |S|), from m_1 to the whole training set.

    b is such that step ``steps_to_whole`` is the first with the whole set. The progress of a second-order step grows
    faster than the batch while its noise dominates, and its cost in proportion to it. Every new size compiles a step
    anew; ``multiple_of`` keeps the sizes few, and is the chunk size where batches are taken in chunks. Source: Martens
    2016, section 6.13.

    Args:
        first: m_1, the first batch size.
        whole: |S|, the number of training examples.
        steps_to_whole: The step, counted from 1, that takes them all.
        multiple_of: Sizes are rounded up to a multiple of this, the whole set excepted.

    Returns:
        A function from the number of the step, from 1, to its batch size.

    Raises:
        ValueError: ``first`` is not between 1 and ``whole``, or one of the others is too small.

    Example:
        >>> size = curvax.schedules.exponential_batch_size(1000, 20_000)
        >>> size(1), size(250), size(500), size(900)
        (1000, 4459, 20000, 20000)
    """
    if not 1 <= first <= whole:
        raise ValueError(f"the first batch of {first} examples must be between 1 and the {whole} there are")
    if steps_to_whole < 2 or multiple_of < 1:
        raise ValueError("steps_to_whole must be at least 2 and multiple_of at least 1")
    growth = math.log(whole / first) / (steps_to_whole - 1)

    def size(step: int) -> int:
        if step >= steps_to_whole:
            return whole
        exact = first * math.exp((step - 1) * growth)
        return min(whole, multiple_of * math.ceil(round(exact, 6) / multiple_of))

    return size
