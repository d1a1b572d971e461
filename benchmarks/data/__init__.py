"""The data sets of the benchmarks, each with a substitute that needs no download.

The folder given to :func:`load`, or named by the environment variable ``CURVAX_DATA``, may hold

============================  ==========================================================================
``mnist_subset.npz``          ``x_train``, ``x_test`` uint8 (n, 28, 28); ``y_train``, ``y_test`` (n,)
``cifar10_subset.npz``        ``x_train``, ``x_test`` uint8 (n, 32, 32, 3); ``y_train``, ``y_test`` (n,)
``olivetti_faces.npz``        ``images`` uint8 (400, 64, 64); ``subject`` (400,), which of the 40 people
``tiny_shakespeare.txt``      text
============================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data.cifar10 import load_cifar10
from benchmarks.data.dataset import Dataset, entropy_floor
from benchmarks.data.digits import load_digits, load_mnist
from benchmarks.data.faces import load_faces
from benchmarks.data.shakespeare import load_shakespeare
from benchmarks.data.smooth_curves import curves, load_curves

__all__ = ["LOADERS", "Dataset", "curves", "entropy_floor", "load"]

LOADERS: dict[str, Callable[..., Dataset]] = {
    "cifar10": load_cifar10,
    "curves": load_curves,
    "digits": load_digits,
    "faces": load_faces,
    "mnist": load_mnist,
    "shakespeare": load_shakespeare,
}


def load(
    name: str,
    folder: str | Path | None = None,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    **options: Any,
) -> Dataset:
    """One data set by name; the same arguments always give the same arrays.

    ``print(load(name))`` says what was loaded and where it came from.

    Args:
      name: a key of ``LOADERS``.
      folder: where the files listed above may lie; by default the environment variable ``CURVAX_DATA``. Where a file
        is absent its substitute is used, and ``Dataset.source`` says so.
      num_train: how many training examples, the first ones; by default all there are, or for generated sets a default
        that their loader states.
      num_test: how many test examples, likewise.
      **options: what one loader alone takes: ``max_degrees`` (faces), ``sequence_length`` (shakespeare).

    Raises:
      ValueError: for an unknown name, or for more examples than there are.
    """
    if name not in LOADERS:
        raise ValueError(f"Unknown data set {name!r}; choose one of {', '.join(LOADERS)}.")
    return LOADERS[name](folder, num_train, num_test, **options)
