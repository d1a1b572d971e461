"""Pictures of runs: loss against steps and seconds, accuracy, the figures of a method, and reconstructed images.

A run is a list of records, dicts with ``step``, ``seconds`` and the figures of that step, as ``progress.read_json``
returns them. Records that lack a figure, or where it is not finite, are left out of its curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

Record = Mapping[str, Any]
Runs = Mapping[str, Sequence[Record]]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that white paper swallows
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GREY = "#666666"
DOTS_PER_INCH = 150
MAX_POINTS = 100


def plot_runs(
    runs: Runs,
    path: str | Path,
    *,
    title: str,
    floor: float | None = None,
    key: str = "loss",
    label: str | None = None,
    count: str = "step",
) -> None:
    """One curve per run of a positive figure against steps and, side by side, against seconds, all axes logarithmic.

    Where a run has many more points than can be told apart, its curve is the geometric mean of the points in each of
    ``MAX_POINTS`` equal stretches of the axis, and the points themselves stay behind it as a faint line.

    Args:
      runs: records by the run's name.
      path: the picture's file; its ending gives the format.
      title: above the picture.
      floor: the least value the figure can take, such as ``data.entropy_floor``: it is subtracted, because near the
        floor a logarithm of the figure itself would show nothing.
      key: which figure.
      label: the figure in words; by default ``key``.
      count: "step", or "epoch" or "seen" where the records have that.
    """
    label = label or key.replace("_", " ")
    if floor is not None:
        label = f"{label}\nabove its floor of {floor:.4g}"
    figure, axes = _steps_and_seconds(title, label, count)
    lowest = floor or 0.0
    for ax, across in zip(axes, (count, "seconds"), strict=True):
        for index, records in enumerate(runs.values()):
            x, y = _curve(records, across, key)
            shown = (x > 0) & (y > lowest)
            x, y = x[shown], y[shown] - lowest
            if len(x) > 2 * MAX_POINTS:
                ax.plot(x, y, color=COLOURS[index % len(COLOURS)], linewidth=0.6, alpha=0.25)
                x, y = _thinned(x, y)
            _draw(ax, x, y, index)
        _log_axis(ax, "x")
        _log_axis(ax, "y")
    _legend(figure, list(runs))
    _save(figure, path)


def plot_accuracy(
    runs: Runs,
    path: str | Path,
    *,
    title: str,
    key: str = "test_accuracy",
    label: str | None = None,
    count: str = "step",
) -> None:
    """One curve per run of a share between 0 and 1, in per cent, against steps and, side by side, against seconds."""
    figure, axes = _steps_and_seconds(title, label or key.replace("_", " "), count)
    for ax, across in zip(axes, (count, "seconds"), strict=True):
        for index, records in enumerate(runs.values()):
            _draw(ax, *_curve(records, across, key), index)
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        ax.set_xlim(left=0)
    _legend(figure, list(runs))
    _save(figure, path)


def plot_figures(runs: Runs, path: str | Path, *, keys: Sequence[str], title: str) -> None:
    """One panel per figure, such as ``damping``, ``step_ratio`` or ``inner_iterations``, against steps.

    A panel is logarithmic where the figure is positive throughout and spans more than a factor of 30.
    """
    figure = Figure(figsize=(7.5, 0.9 + 1.9 * len(keys)), layout="constrained")
    figure.suptitle(title, fontsize="large")
    panels = figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for ax, key in zip(panels, keys, strict=True):
        curves = [_curve(records, "step", key) for records in runs.values()]
        for index, (x, y) in enumerate(curves):
            _draw(ax, x, y, index)
        values = np.concatenate([y for _, y in curves])
        _style(ax, "", key.replace("_", " "))
        if values.size and values.min() > 0 and values.max() > 30 * values.min():
            _log_axis(ax, "y")
    panels[-1].set_xlabel("steps")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, list(runs))
    _save(figure, path)


def plot_reconstructions(
    originals: np.ndarray,
    reconstructions: Mapping[str, np.ndarray],
    image_shape: tuple[int, ...],
    path: str | Path,
    *,
    title: str | None = None,
    num_images: int = 12,
) -> None:
    """A row of original images and below it one row of reconstructions per run.

    Args:
      originals: pixels in [0, 1], shape (n, ...) with ``image_shape`` as the other axes, flat or not
        (``Dataset.pixels`` restores standardised ones).
      reconstructions: the same images as each run renders them, by the run's name.
      image_shape: (height, width), or (height, width, 3) for colour.
      path: the picture's file.
      title: above the picture.
      num_images: how many images at most, the first ones.
    """
    rows = {"original": originals, **reconstructions}
    columns = min(num_images, len(originals))
    side = 0.62
    label_width = 0.25 + 0.085 * max(map(len, rows))
    figure = Figure(figsize=(label_width + side * columns, side * len(rows) + (0.4 if title else 0.1)))
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    if title:
        figure.suptitle(title, fontsize="medium")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for cells, (name, images) in zip(grid, rows.items(), strict=True):
        for ax, image in zip(cells, np.asarray(images)[:columns], strict=True):
            ax.imshow(np.clip(image, 0, 1).reshape(image_shape), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    _save(figure, path)


def _steps_and_seconds(title: str, label: str, count: str = "step") -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(title, fontsize="large")
    axes = figure.subplots(1, 2, sharey=True)
    _style(axes[0], "targets seen" if count == "seen" else f"{count}s", label)
    _style(axes[1], "seconds", "")
    axes[1].tick_params(labelleft=False)
    return figure, axes


def _curve(records: Sequence[Record], across: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record[across], record[key]) for record in records if _given(record, across) and _given(record, key)]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Geometric means within equal stretches of log x; the last x stays where the run ended."""
    edges = np.geomspace(x.min(), x.max(), MAX_POINTS + 1)
    stretch = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, MAX_POINTS - 1)
    counts = np.bincount(stretch, minlength=MAX_POINTS)
    used = counts > 0
    means = [np.exp(np.bincount(stretch, np.log(v), MAX_POINTS)[used] / counts[used]) for v in (x, y)]
    return np.append(means[0][:-1], x[-1]), means[1]


def _given(record: Record, key: str) -> bool:
    return record.get(key) is not None


def _draw(ax: Axes, x: np.ndarray, y: np.ndarray, index: int) -> None:
    """A run's curve, with a mark at its end so that short curves and their ends can be told apart."""
    ax.plot(x, y, **_look(index), markevery=[len(x) - 1] if len(x) else None)


def _look(index: int) -> dict[str, Any]:
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _style(ax: Axes, xlabel: str, ylabel: str) -> None:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize="small", color=GREY)


def _log_axis(ax: Axes, which: str) -> None:
    """A logarithmic axis with enough labels also where it spans less than a decade."""
    if not any(len(np.asarray(line.get_xdata())) for line in ax.get_lines()):
        return  # a logarithmic axis without points warns
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if decades > 0.8:
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain_number if low >= 1e-3 and high < 1e6 else LogFormatterSciNotation())
    axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, _position: float) -> str:
    return f"{value:g}"


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """All runs below the axes, where no curve is hidden."""
    handles = [Line2D([], [], label=name, **_look(index)) for index, name in enumerate(names)]
    letters = 13 * figure.get_figwidth()
    columns = max(1, min(len(names), int(letters / (8 + max(map(len, names), default=0)))))
    look = {"fontsize": "small", "frameon": False, "handlelength": 3.2}
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, **look)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
