"""CURVES: images of one smooth stroke each, determined by three random points (Hinton and Salakhutdinov 2006).

The six coordinates are all there is to know about an image, and its pixels depend on them in a far from linear way,
which is what makes the set hard for an autoencoder with a code of six numbers. These are not the paper's images but
new ones drawn from its description. The range of the points and the pen are chosen so that standard PCA with 18
components leaves an average squared error of 5.85 per test image; on the paper's images it leaves 5.90 (its figure 2A).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.data.dataset import Dataset, rounded_to_bytes

SIZE = 28
PEN = 1.0  # standard deviation of the stroke's profile, in pixels
LOWEST, HIGHEST = 5.0, 22.0  # the coordinates of the points: the stroke stays inside the image
LEAST_DISTANCE = 4.0  # between neighbouring points, in pixels
LEAST_ANGLE = 60.0  # at the middle point, in degrees: sharper turns would be cusps
STROKE_SAMPLES = 64
BLOCK = 1000


def load_curves(folder: str | Path | None = None, num_train: int | None = None, num_test: int | None = None) -> Dataset:
    """20,000 training and 10,000 test images by default, the paper's numbers; always generated."""
    return Dataset(
        name="curves",
        source="generated: smooth strokes through three random points",
        train_inputs=curves(20_000 if num_train is None else num_train, seed=0),
        train_targets=None,
        test_inputs=curves(10_000 if num_test is None else num_test, seed=1),
        test_targets=None,
        image_shape=(SIZE, SIZE),
    )


def curves(num_images: int, seed: int) -> np.ndarray:
    """Float32 rows of shape (num_images, 784) with pixels in [0, 1], most of them 0.

    Fewer images of the same seed are the first of more.
    """
    rng = np.random.default_rng(seed)
    images = [np.zeros((0, SIZE * SIZE), np.float32)]
    while sum(map(len, images)) < num_images:
        images.append(draw(smooth_triples(rng)))
    return np.concatenate(images)[:num_images]


def smooth_triples(rng: np.random.Generator) -> np.ndarray:
    """Point triples of shape (n, 3, 2), those of one block of uniform draws that make a smooth curve."""
    points = rng.uniform(LOWEST, HIGHEST, (BLOCK, 3, 2))
    to_start, to_end = points[:, 0] - points[:, 1], points[:, 2] - points[:, 1]
    start_distance, end_distance = np.linalg.norm(to_start, axis=1), np.linalg.norm(to_end, axis=1)
    cosine = np.sum(to_start * to_end, axis=1) / (start_distance * end_distance)
    apart = np.minimum(start_distance, end_distance) >= LEAST_DISTANCE
    return points[apart & (cosine <= np.cos(np.deg2rad(LEAST_ANGLE)))]


def draw(points: np.ndarray) -> np.ndarray:
    """Rows of pixels from triples of points (x, y): the natural cubic splines through them, in Gaussian ink.

    A pixel's ink is the integral of a Gaussian along the curve, which for a straight stroke at distance d is exactly
    exp(-d^2 / (2 PEN^2)). The Gaussian is a product over x and y, so that the integral is a product of two matrices.
    """
    path = spline_weights() @ points
    steps = np.gradient(path, axis=1)
    ink = np.hypot(steps[..., 0], steps[..., 1]) / (PEN * np.sqrt(2 * np.pi))
    ink[:, [0, -1]] /= 2  # the trapezoidal rule
    offsets = (path[..., None] - np.arange(SIZE)).astype(np.float32) / np.float32(PEN)
    columns, rows = np.moveaxis(np.exp(-(offsets**2) / 2), 2, 0)
    images = np.swapaxes(rows * ink[..., None].astype(np.float32), 1, 2) @ columns
    return rounded_to_bytes(images).reshape(len(points), -1)


def spline_weights() -> np.ndarray:
    """Weights (samples, 3) of the points in the natural cubic spline with knots at 0, 1 and 2.

    The spline's second derivative is 0 at both ends and 3/2 (p_0 - 2 p_1 + p_2) in the middle.
    """
    position = np.linspace(0, 2, STROKE_SAMPLES)[:, None]
    inward = 1 - np.abs(position - 1)  # 0 at the nearer end, 1 at the middle
    start, middle, end = np.eye(3)
    chord = (1 - inward) * np.where(position < 1, start, end) + inward * middle
    return chord + (inward**3 - inward) / 6 * 1.5 * (start - 2 * middle + end)
