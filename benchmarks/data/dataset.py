"""What a loaded data set is, and the few steps that all loaders share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples along axis 0, as numpy arrays.

    Attributes:
      name: the key it was loaded by.
      source: in plain words, where the examples come from.
      train_inputs: images as float32 rows with pixels in [0, 1] (faces: standardised), or int32 rows of characters.
      train_targets: int32 classes, the next characters, or None where the inputs are their own targets.
      test_inputs: like ``train_inputs``.
      test_targets: like ``train_targets``.
      image_shape: what a row reshapes to, (height, width) or (height, width, 3); None where the rows are not images.
      num_classes: how many values a target can take; None without targets.
      vocabulary: for text, the character of each code.
      pixel_mean: what was subtracted from the pixels, per pixel or for all.
      pixel_scale: what the pixels were then divided by.
    """

    name: str
    source: str
    train_inputs: np.ndarray
    train_targets: np.ndarray | None
    test_inputs: np.ndarray
    test_targets: np.ndarray | None
    image_shape: tuple[int, ...] | None
    num_classes: int | None = None
    vocabulary: str = ""
    pixel_mean: np.ndarray | float = 0.0
    pixel_scale: float = 1.0

    def __str__(self) -> str:
        if self.image_shape is None:
            kind = f"rows of {self.train_inputs.shape[1]} characters"
        else:
            kind = f"images of {'x'.join(map(str, self.image_shape))}"
        return f"{self.name}: {len(self.train_inputs)} training and {len(self.test_inputs)} test {kind}; {self.source}."

    def first(self, num_train: int | None, num_test: int | None) -> Dataset:
        """The data set of the first training and test examples; None takes all."""
        return replace(
            self,
            train_inputs=_first(self.train_inputs, num_train, f"{self.name} for training"),
            train_targets=_first(self.train_targets, num_train, f"{self.name} for training"),
            test_inputs=_first(self.test_inputs, num_test, f"{self.name} for testing"),
            test_targets=_first(self.test_targets, num_test, f"{self.name} for testing"),
        )

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Images that can be shown, of shape (n, *image_shape) and within [0, 1], from inputs or reconstructions."""
        if self.image_shape is None:
            raise ValueError(f"The rows of {self.name!r} are not images.")
        restored = np.asarray(rows, np.float32) * np.float32(self.pixel_scale) + np.float32(self.pixel_mean)
        return np.clip(restored, 0, 1).reshape(-1, *self.image_shape)


def entropy_floor(images: np.ndarray) -> float:
    """The least sigmoid cross-entropy that any reconstruction of ``images`` can have, in nats per image.

    With grey targets x in [0, 1] the cross-entropy is smallest where the prediction equals x, and there it is the
    entropy: mean over images of sum over pixels of -x log x - (1 - x) log(1 - x).

    >>> entropy_floor(np.array([[0.5, 1.0], [0.5, 0.5]]))  # log 2 for each grey pixel, 0 for the white one
    1.0397...
    """
    images = np.asarray(images)
    total = 0.0
    for start in range(0, len(images), 1000):
        x = images[start : start + 1000].astype(np.float64)
        # the 1 inside each logarithm multiplies a zero: 0 log 0 = 0 without a warning
        total -= np.sum(x * np.log(np.where(x > 0, x, 1)) + (1 - x) * np.log(np.where(x < 1, 1 - x, 1)))
    return float(total / len(images))


def find_file(filename: str, folder: str | Path | None) -> tuple[Path | None, str]:
    """The file's path, or None and why it is not there, in words for ``Dataset.source``."""
    folder = folder or os.environ.get("CURVAX_DATA")
    if not folder:
        return None, "no data folder given"
    path = Path(folder) / filename
    return (path, "") if path.is_file() else (None, f"no {filename} in the data folder")


def rows_of_pixels(images: np.ndarray) -> np.ndarray:
    """Images of bytes as float32 rows within [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def rounded_to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Float32 pixels on the 256 levels of an image file, so that faint tails are exactly zero."""
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.float32) / np.float32(255)


def _first(array, count: int | None, name: str):
    if array is None or count is None:
        return array
    if count > len(array):
        raise ValueError(f"Asked for {count} examples of {name}, of which there are {len(array)}.")
    return array[:count]
