"""Sequences of the tasks with long time lags, after Hochreiter and Schmidhuber 1997 as in Martens 2016, section 4.13.

``lag`` is T, the number of steps of a sequence (for memorization the number of steps between what is shown and what is
asked for). All sequences of a task have one length. Where Martens does not say how sequences are drawn, the choice
here is:

- Marks and special symbols stand in windows that scale with T as those of Hochreiter and Schmidhuber do at T = 100:
  the two marks of the arithmetic tasks in [0, T/10) and [T/10, T/2); the symbols of temporal order in [T/10, 2T/10) and
  [5T/10, 6T/10), and with three symbols in [T/10, 2T/10), [3.3T/10, 4.3T/10) and [6.6T/10, 7.6T/10). The least
  lag is 10.
- The numbers of addition and multiplication are uniform in [0, 1) and the target is their plain sum or product.
- Start and end of a sequence carry no extra symbol, and lengths do not vary.
- Memorization: five bits, T blanks, five steps that ask for the bits in order, the first of which carries a signal.
  Only those five steps have targets. The 32 sequences are all there are.
- Random permutation: T + 1 symbols, of which the first T are the inputs and the last T the targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import Literal

import numpy as np

Sequences = tuple[np.ndarray, np.ndarray]
"""Inputs of shape (count, steps, channels), or symbols of shape (count, steps); targets of the last steps, of shape
(count, output steps, 1) for numbers and bits and (count, output steps) for classes."""

NUM_BITS = 5
NUM_PERMUTED = 100


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        draw: (generator, lag, count) -> sequences; fresh ones at every call.
        num_inputs: Channels, or symbols, of the input.
        num_outputs: Numbers, bits or classes at each step that has an output.
        target: What the targets are.
        extra_steps: Steps of a sequence beyond the lag.
        output_steps: The number of last steps that have targets; None for all.
        population: How many sequences there are, if they are few enough to be taken all.
    """

    draw: Callable[[np.random.Generator, int, int], Sequences]
    num_inputs: int
    num_outputs: int
    target: Literal["number", "bit", "class"]
    extra_steps: int = 0
    output_steps: int | None = 1
    population: int | None = None


def addition(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """The sum of the two marked numbers."""
    return _of_two_marked(generator.random((count, lag), np.float32), generator, np.add)


def multiplication(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """The product of the two marked numbers."""
    return _of_two_marked(generator.random((count, lag), np.float32), generator, np.multiply)


def xor(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """Whether the two marked bits differ."""
    bits = generator.integers(0, 2, (count, lag)).astype(np.float32)
    return _of_two_marked(bits, generator, lambda first, second: np.abs(first - second))


def temporal_order(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """Which two of the symbols 0 and 1 came, in their order, among random symbols 2 to 5."""
    return _of_special_symbols(generator, lag, count, [(10, 20), (50, 60)])


def temporal_order_3bit(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """Which three of the symbols 0 and 1 came, in their order, among random symbols 2 to 5."""
    return _of_special_symbols(generator, lag, count, [(10, 20), (33, 43), (66, 76)])


def random_permutation(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """The next symbol; the last is the first again, one of 0 and 1, and those between are random."""
    _check_lag(lag, 2)
    symbols = generator.integers(2, NUM_PERMUTED, (count, lag + 1), np.int32)
    symbols[:, 0] = symbols[:, -1] = generator.integers(0, 2, count)
    return symbols[:, :-1], symbols[:, 1:]


def memorization(generator: np.random.Generator, lag: int, count: int) -> Sequences:
    """The five bits at the start; symbols are the bits 0 and 1, the blank 2 and the signal 3."""
    del generator
    _check_lag(lag, 1)
    if count != 2**NUM_BITS:
        raise ValueError(f"memorization has {2**NUM_BITS} sequences, all of which are taken; asked for {count}")
    bits = (np.arange(count)[:, None] >> np.arange(NUM_BITS)[::-1]) & 1
    symbols = np.full((count, lag + 2 * NUM_BITS), 2, np.int32)
    symbols[:, :NUM_BITS] = bits
    symbols[:, -NUM_BITS] = 3
    return symbols, bits[..., None].astype(np.float32)


TASKS = MappingProxyType(
    {
        "addition": Task(addition, 2, 1, "number"),
        "multiplication": Task(multiplication, 2, 1, "number"),
        "xor": Task(xor, 2, 1, "bit"),
        "temporal_order": Task(temporal_order, 6, 4, "class"),
        "temporal_order_3bit": Task(temporal_order_3bit, 6, 8, "class"),
        "random_permutation": Task(random_permutation, NUM_PERMUTED, NUM_PERMUTED, "class", output_steps=None),
        "memorization": Task(
            memorization, 4, 1, "bit", extra_steps=2 * NUM_BITS, output_steps=NUM_BITS, population=2**NUM_BITS
        ),
    }
)


def _of_two_marked(values, generator, operation):
    count, lag = values.shape
    rows = np.arange(count)
    first, second = _positions(generator, count, lag, [(0, 10), (10, 50)])
    marks = np.zeros_like(values)
    marks[rows, first] = marks[rows, second] = 1
    targets = operation(values[rows, first], values[rows, second])
    return np.stack([values, marks], axis=-1), targets[:, None, None]


def _of_special_symbols(generator, lag, count, windows):
    symbols = generator.integers(2, 6, (count, lag), np.int32)
    rows, targets = np.arange(count), np.zeros((count, 1), np.int32)
    for positions in _positions(generator, count, lag, windows):
        special = generator.integers(0, 2, count, np.int32)
        symbols[rows, positions] = special
        targets = 2 * targets + special[:, None]
    return symbols, targets


def _positions(generator, count, lag, windows):
    """For each window, given in per cent of the lag, one position in each sequence."""
    _check_lag(lag, 10)
    return [generator.integers(low * lag // 100, high * lag // 100, count) for low, high in windows]


def _check_lag(lag, least):
    if lag < least:
        raise ValueError(f"this task needs a lag of at least {least} steps, got {lag}")
