"""Handwritten digits: scikit-learn's 8x8 images, and MNIST with those as its substitute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.data.dataset import Dataset, find_file, rounded_to_bytes, rows_of_pixels

NUM_DIGITS_TRAIN = 1437  # of 1,797, four fifths


def load_mnist(folder: str | Path | None = None, num_train: int | None = None, num_test: int | None = None) -> Dataset:
    """The split of ``mnist_subset.npz``, or else the 8x8 digits (1,437 + 360) enlarged to 28x28."""
    path, reason = find_file("mnist_subset.npz", folder)
    if path is None:
        source = f"scikit-learn's 8x8 digits enlarged to 28x28 instead of MNIST ({reason})"
        small_inputs, targets = shuffled_digits()
        inputs, num_train_all = enlarged(small_inputs), NUM_DIGITS_TRAIN
    else:
        source = "MNIST, the subset in mnist_subset.npz"
        with np.load(path) as arrays:
            inputs = rows_of_pixels(np.concatenate([arrays["x_train"], arrays["x_test"]]))
            targets = np.concatenate([arrays["y_train"], arrays["y_test"]]).astype(np.int32)
            num_train_all = len(arrays["y_train"])
    return split("mnist", source, inputs, targets, num_train_all, (28, 28)).first(num_train, num_test)


def load_digits(folder: str | Path | None = None, num_train: int | None = None, num_test: int | None = None) -> Dataset:
    """The 1,797 digits that scikit-learn ships, in a fixed random order: 1,437 for training, 360 for testing."""
    inputs, targets = shuffled_digits()
    source = "the 8x8 digits that scikit-learn ships"
    return split("digits", source, inputs, targets, NUM_DIGITS_TRAIN, (8, 8)).first(num_train, num_test)


def split(
    name: str, source: str, inputs: np.ndarray, targets: np.ndarray, num_train: int, image_shape: tuple[int, int]
) -> Dataset:
    """The data set whose first ``num_train`` examples are for training and whose others are for testing."""
    return Dataset(
        name=name,
        source=source,
        train_inputs=inputs[:num_train],
        train_targets=targets[:num_train],
        test_inputs=inputs[num_train:],
        test_targets=targets[num_train:],
        image_shape=image_shape,
        num_classes=10,
    )


def shuffled_digits() -> tuple[np.ndarray, np.ndarray]:
    """Rows (1797, 64) of pixels in [0, 1] and their classes."""
    from sklearn import datasets  # here, because it takes seconds to import

    bunch = cast(Any, datasets.load_digits())
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return (bunch.data[order] / 16).astype(np.float32), bunch.target[order].astype(np.int32)


def enlarged(rows: np.ndarray) -> np.ndarray:
    """Rows of 8x8 pixels, linearly interpolated to rows of 28x28."""
    small, large = np.arange(8), np.linspace(0, 7, 28)
    weights = np.maximum(1 - np.abs(large[:, None] - small), 0)
    return rounded_to_bytes(weights @ rows.reshape(-1, 8, 8) @ weights.T).reshape(len(rows), -1)
