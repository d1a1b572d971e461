"""CIFAR-10, or else coloured shapes: ten classes of 32x32 colour images either way."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.data.dataset import Dataset, find_file, rounded_to_bytes, rows_of_pixels

SIZE = 32
NUM_SUBSTITUTE_TRAIN, NUM_SUBSTITUTE_TEST = 5000, 1000


def load_cifar10(
    folder: str | Path | None = None, num_train: int | None = None, num_test: int | None = None
) -> Dataset:
    """The split of ``cifar10_subset.npz``, or else 5,000 + 1,000 (or as many as asked for) generated shapes."""
    path, reason = find_file("cifar10_subset.npz", folder)
    if path is None:
        source = f"generated coloured shapes instead of CIFAR-10 ({reason})"
        train_inputs, train_targets = shapes(NUM_SUBSTITUTE_TRAIN if num_train is None else num_train, seed=0)
        test_inputs, test_targets = shapes(NUM_SUBSTITUTE_TEST if num_test is None else num_test, seed=1)
    else:
        source = "CIFAR-10, the subset in cifar10_subset.npz"
        with np.load(path) as arrays:
            train_inputs, train_targets = rows_of_pixels(arrays["x_train"]), arrays["y_train"].astype(np.int32)
            test_inputs, test_targets = rows_of_pixels(arrays["x_test"]), arrays["y_test"].astype(np.int32)
    return Dataset(
        name="cifar10",
        source=source,
        train_inputs=train_inputs,
        train_targets=train_targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        image_shape=(SIZE, SIZE, 3),
        num_classes=10,
    ).first(num_train, num_test)


def shapes(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels (num_images, 3072) and classes: one tilted shape on a shaded, noisy ground in two random colours.

    The classes are disc, ring, square, frame, triangle, diamond, plus, cross, level bars and upright bars. Colour says
    nothing about the class.
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 10, num_images)
    centre = rng.uniform(11, 20, (num_images, 2, 1, 1))
    radius = rng.uniform(7, 12, (num_images, 1, 1))
    tilt = np.deg2rad(rng.uniform(-15, 15, (num_images, 1, 1)))
    ground = rng.random((num_images, 1, 1, 3))
    # at least 0.3 from the ground in every colour, so that each shape can be seen
    ink = (ground + rng.uniform(0.3, 0.7, ground.shape)) % 1
    slope = rng.uniform(-0.2, 0.2, (num_images, 2, 1, 1))
    noise = rng.normal(0, 0.04, (num_images, SIZE, SIZE, 3))

    down, right = np.mgrid[:SIZE, :SIZE]
    down_from, right_from = down - centre[:, 0], right - centre[:, 1]
    v = (np.cos(tilt) * down_from - np.sin(tilt) * right_from) / radius
    u = (np.sin(tilt) * down_from + np.cos(tilt) * right_from) / radius
    inside = np.zeros_like(u)
    for index in range(10):
        chosen = classes == index
        inside[chosen] = depth(index, u[chosen], v[chosen])
    cover = np.clip(inside * radius + 0.5, 0, 1)[..., None]  # smooth over one pixel
    shade = (slope[:, 0] * (down / SIZE - 0.5) + slope[:, 1] * (right / SIZE - 0.5))[..., None]
    images = cover * ink + (1 - cover) * ground + shade + noise
    return rounded_to_bytes(images).reshape(num_images, -1), classes.astype(np.int32)


def depth(index: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How deep (u, v) lies inside shape number ``index`` of radius about 1: positive inside, negative outside."""
    distance, widest = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    rising, falling = (u + v) / np.sqrt(2), (u - v) / np.sqrt(2)
    box = 0.85 - widest
    if index == 0:
        return 0.95 - distance
    if index == 1:
        return 0.22 - np.abs(distance - 0.75)
    if index == 2:
        return box
    if index == 3:
        return 0.2 - np.abs(widest - 0.65)
    if index == 4:
        return 0.5 - np.maximum(v, np.abs(u) * np.sqrt(0.75) - v / 2)
    if index == 5:
        return 0.75 - np.maximum(np.abs(rising), np.abs(falling))
    if index == 6:
        return np.minimum(box, 0.27 - np.minimum(np.abs(u), np.abs(v)))
    if index == 7:
        return np.minimum(0.9 - distance, 0.22 - np.minimum(np.abs(rising), np.abs(falling)))
    along = v if index == 8 else u
    return np.minimum(box, np.cos(2.5 * np.pi * along) / (2.5 * np.pi))
