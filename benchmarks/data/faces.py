"""FACES: 25x25 patches of faces, after Hinton and Salakhutdinov (2006).

The paper cut its patches out of the 400 Olivetti faces (40 people, 64x64) at varying scale, orientation and position;
Martens (2010) trains on 103,500 of them. Here each patch is one face, turned by up to ``max_degrees`` about a point up
to two pixels from the centre, mirrored in half of the cases, reduced by a factor between 1.4 and 1.8, and cut to the
central 25x25. ``max_degrees=90`` covers all orientations, as the paper does; the default keeps faces upright.

The first 30 people are for training and the last 10 for testing, so that no test patch shows a face that was trained
on. As in the paper, the mean of each pixel is subtracted and everything is divided by one number, which makes the
average variance of a pixel 1; both come from the training patches. An average squared error of 625 per training image
is therefore that of predicting the mean. ``Dataset.pixels`` undoes this for pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.data.dataset import Dataset, find_file

SIZE = 25
FULL_SIZE = 64
NUM_TRAIN_PEOPLE = 30
MAX_SHIFT = 2.0
REDUCTION = (1.4, 1.8)


def load_faces(
    folder: str | Path | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    max_degrees: float = 15.0,
) -> Dataset:
    """20,000 training and 10,000 test patches by default, of ``olivetti_faces.npz`` or else of drawn faces."""
    path, reason = find_file("olivetti_faces.npz", folder)
    if path is None:
        source = f"25x25 patches of 400 drawn faces instead of the Olivetti faces ({reason})"
        images, people = drawn_faces()
    else:
        source = "25x25 patches of the Olivetti faces in olivetti_faces.npz"
        with np.load(path) as arrays:
            images, people = arrays["images"].astype(np.float32) / 255, arrays["subject"]
    images = slightly_blurred(images)
    known = people < NUM_TRAIN_PEOPLE
    train = patches(images[known], 20_000 if num_train is None else num_train, max_degrees, seed=0)
    test = patches(images[~known], 10_000 if num_test is None else num_test, max_degrees, seed=1)
    mean = np.asarray(np.mean(train, axis=0, dtype=np.float64), np.float32)
    scale = float(np.sqrt(np.mean(np.var(train, axis=0, dtype=np.float64))))
    return Dataset(
        name="faces",
        source=f"{source}, turned by up to {max_degrees:g} degrees",
        train_inputs=(train - mean) / np.float32(scale),
        train_targets=None,
        test_inputs=(test - mean) / np.float32(scale),
        test_targets=None,
        image_shape=(SIZE, SIZE),
        pixel_mean=mean,
        pixel_scale=scale,
    )


def patches(images: np.ndarray, num_patches: int, max_degrees: float, seed: int) -> np.ndarray:
    """Rows (num_patches, 625) of pixels in [0, 1], cycling through the faces in one random order.

    Fewer patches of the same seed are the first of more.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    uniform = rng.random((num_patches, 5), np.float32)
    rows = np.empty((num_patches, SIZE * SIZE), np.float32)
    for start in range(0, num_patches, 1000):
        some = slice(start, start + 1000)
        faces = order[np.arange(start, start + len(rows[some])) % len(images)]
        rows[some] = interpolated(images, faces, *patch_positions(uniform[some], max_degrees))
    return rows


def patch_positions(uniform: np.ndarray, max_degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Where in the face each pixel of the patch lies, (n, 625) rows and columns, from five numbers in [0, 1] each."""
    turn, reduction, shift_down, shift_right, mirror = uniform.T[..., None]
    angle = np.deg2rad(max_degrees) * (2 * turn - 1)
    step = REDUCTION[0] + (REDUCTION[1] - REDUCTION[0]) * reduction
    down, right = (np.mgrid[:SIZE, :SIZE].reshape(2, -1) - (SIZE - 1) / 2).astype(np.float32)
    rows = step * (np.cos(angle) * down + np.sin(angle) * right) + MAX_SHIFT * (2 * shift_down - 1)
    columns = step * (np.cos(angle) * right - np.sin(angle) * down) + MAX_SHIFT * (2 * shift_right - 1)
    columns = np.where(mirror < 0.5, columns, -columns)
    # beyond an edge, which only the corners of a patch turned by more than 30 degrees can reach, the edge is repeated
    centre, last = (FULL_SIZE - 1) / 2, np.float32(FULL_SIZE - 1.001)
    return np.clip(centre + rows, 0, last), np.clip(centre + columns, 0, last)


def interpolated(images: np.ndarray, faces: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Linear interpolation of ``images[faces]`` at the given positions, before the last row and column."""
    top, left = rows.astype(np.int32), columns.astype(np.int32)
    down, right = rows - top, columns - left
    pixels = images.reshape(-1)
    corner = (faces[:, None] * FULL_SIZE + top) * FULL_SIZE + left
    upper = pixels[corner] * (1 - right) + pixels[corner + 1] * right
    lower = pixels[corner + FULL_SIZE] * (1 - right) + pixels[corner + FULL_SIZE + 1] * right
    return upper * (1 - down) + lower * down


def slightly_blurred(images: np.ndarray) -> np.ndarray:
    """The binomial-like filter (1, 4, 1) / 6 along both axes, against aliasing when the faces are reduced."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    padded = (padded[:, :-2] + 4 * padded[:, 1:-1] + padded[:, 2:]) / 6
    return ((padded[:, :, :-2] + 4 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 6).astype(np.float32)


def drawn_faces() -> tuple[np.ndarray, np.ndarray]:
    """400 smooth, face-like images (400, 64, 64) in [0, 1] and whom of 40 people each shows.

    A person is a set of proportions and tones; that person's ten images differ in pose, expression and light.
    """
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(40), 10)

    def of_person(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, 40).astype(np.float32)[people][:, None, None]

    def of_image(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, 400).astype(np.float32)[:, None, None]

    y, x = np.mgrid[:FULL_SIZE, :FULL_SIZE].astype(np.float32) / (FULL_SIZE / 2) - 1
    x, y = x - of_image(-0.08, 0.08), y - of_image(-0.06, 0.06)
    nod = of_image(-0.06, 0.06)  # moves the features within the head
    glance = of_image(-0.08, 0.08)

    def spot(across: np.ndarray | float, down: np.ndarray | float, width, height) -> np.ndarray:
        return np.exp(-(((x - glance - across) / width) ** 2) - ((y - nod - down) / height) ** 2)

    head_width, head_height = of_person(0.68, 0.85), of_person(0.9, 1.05)
    skin, hair = of_person(0.45, 0.75), of_person(0.05, 0.4)
    radius = np.hypot(x / head_width, (y - 0.05) / head_height)
    head = 1 / (1 + np.exp(14 * (radius - 1)))
    light = of_image(-0.2, 0.2) * x + of_image(-0.15, 0.15) * y
    face = skin * (1 - 0.35 * radius**2) + light

    hairline = of_person(-0.75, -0.5)
    face += (hair - face) / (1 + np.exp(12 * (y - nod - hairline - 0.25 * x**2)))
    eye_distance, eye_height, brow = of_person(0.28, 0.4), of_person(-0.28, -0.15), of_person(0.1, 0.3)
    brow_height, openness = of_person(0.13, 0.2), of_image(0.04, 0.08)
    for side in (-1, 1):
        face -= 0.12 * spot(side * eye_distance, eye_height, 0.2, 0.13)  # the hollow
        face -= 0.3 * spot(side * eye_distance, eye_height, 0.1, openness)
        face -= brow * spot(side * eye_distance, eye_height - brow_height, 0.17, 0.05)
        face += 0.06 * spot(side * 0.4, 0.25, 0.2, 0.2)  # the cheek
    nose = of_person(0.1, 0.25)
    face += 0.12 * spot(0.0, (nose + eye_height) / 2, 0.07, 0.25)
    face -= 0.25 * spot(0.0, nose + 0.05, of_person(0.1, 0.17), 0.05)
    mouth, smile = of_person(0.42, 0.56), of_image(-0.5, 0.5)
    mouth_line = mouth - smile * ((x - glance) ** 2 - 0.03)
    face -= of_person(0.15, 0.35) * spot(0.0, mouth_line, of_person(0.18, 0.28), 0.045 + of_image(0.0, 0.04))
    face -= of_person(-0.1, 0.25) * spot(0.0, mouth + 0.1, 0.45, 0.25)  # a beard, or light on the chin
    images = head * face + (1 - head) * of_image(0.1, 0.5)
    return np.clip(images, 0, 1), people
