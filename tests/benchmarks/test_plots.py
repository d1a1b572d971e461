"""The pictures: that they are written, and that what is drawn is what the records say."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def run(num_steps, rate, seconds_per_step=0.1, **figures):
    return [
        {"step": step, "seconds": seconds_per_step * step, "loss": 2 + 50 * np.exp(-rate * step), **figures}
        for step in range(num_steps)
    ]


def assert_picture(path, least_width=300):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] >= least_width
    assert pixels[..., :3].std() > 0.02


def test_runs_are_drawn_above_the_floor_against_steps_and_seconds(tmp_path, drawn):
    path = tmp_path / "new" / "runs.png"
    runs = {"curvax.kfac": run(40, 0.1, 0.2), "adam 2e-3": run(40, 0.02)}
    plots.plot_runs(runs, path, title="CURVES", floor=2.0, label="cross-entropy (nats)")
    assert_picture(path)
    (figure,) = drawn
    by_step, by_second = figure.axes
    assert by_step.get_xlabel() == "steps"
    assert by_second.get_xlabel() == "seconds"
    assert by_step.get_ylabel() == "cross-entropy (nats)\nabove its floor of 2"
    assert {ax.get_xscale() for ax in figure.axes} == {ax.get_yscale() for ax in figure.axes} == {"log"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    for line, records in zip(by_step.get_lines(), runs.values(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 40))  # a logarithmic axis has no step 0
        np.testing.assert_allclose(line.get_ydata(), [record["loss"] - 2 for record in records[1:]])
    np.testing.assert_allclose(by_second.get_lines()[0].get_xdata(), 0.2 * np.arange(1, 40))


def test_points_without_a_value_or_at_the_floor_are_left_out(tmp_path, drawn):
    records = [
        {"step": 1, "seconds": 1.0, "loss": 8.0},
        {"step": 2, "seconds": 2.0, "loss": None},
        {"step": 3, "seconds": 3.0, "loss": float("inf")},
        {"step": 4, "seconds": 4.0},
        {"step": 5, "seconds": 5.0, "loss": 2.0},
        {"step": 6, "seconds": None, "loss": 4.0},
    ]
    plots.plot_runs({"one": records}, tmp_path / "runs.png", title="gaps", floor=2.0)
    by_step, by_second = drawn[0].axes
    np.testing.assert_allclose(by_step.get_lines()[0].get_xydata(), [[1, 6], [6, 2]])
    np.testing.assert_allclose(by_second.get_lines()[0].get_xydata(), [[1, 6]])


def test_long_runs_are_thinned_to_geometric_means(tmp_path, drawn):
    steps = np.arange(1, 5001)
    values = 100 / steps * np.where(steps % 2, 2.0, 0.5)
    records = [{"step": s, "seconds": s / 10, "loss": v} for s, v in zip(steps.tolist(), values.tolist(), strict=True)]
    plots.plot_runs({"noisy": records}, tmp_path / "runs.png", title="long")
    faint, curve = drawn[0].axes[0].get_lines()
    np.testing.assert_allclose(faint.get_ydata(), values)
    x, y = curve.get_xydata().T
    assert len(x) <= plots.MAX_POINTS
    assert x[-1] == 5000
    late = (x > 200) & (x < 4000)
    np.testing.assert_allclose(y[late], 100 / x[late], rtol=0.05)


def test_runs_without_any_point_still_make_a_picture(tmp_path):
    plots.plot_runs(
        {"failed": [], "diverged": [{"step": 1, "seconds": 1.0, "loss": None}]}, tmp_path / "a.png", title=""
    )
    plots.plot_accuracy({"failed": []}, tmp_path / "b.png", title="")
    plots.plot_figures({"failed": []}, tmp_path / "c.png", keys=["damping"], title="")
    for name in "abc":
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(("low", "high"), [(90.0, 110.0), (3.0, 40.0), (1e-6, 1e3)])
def test_axes_of_any_span_have_at_least_two_labels(tmp_path, drawn, low, high):
    values = np.geomspace(high, low, 20)
    records = [{"step": 30 + i, "seconds": 1.0 + i, "loss": value} for i, value in enumerate(values)]
    plots.plot_runs({"one": records}, tmp_path / "runs.png", title="span")
    ax = drawn[0].axes[0]
    for axis in (ax.xaxis, ax.yaxis):
        bottom, top = axis.get_view_interval()
        labels = [
            label.get_text()
            for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
            if bottom <= place <= top and label.get_text()
        ]
        assert len(labels) >= 2


def test_twenty_runs_all_look_different():
    looks = [plots._look(index) for index in range(20)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 20


def test_accuracy_is_drawn_in_per_cent(tmp_path, drawn):
    runs = {"kfac": [{"step": s, "seconds": 2.0 * s, "test_accuracy": 1 - 0.9 / (1 + s)} for s in range(10)]}
    plots.plot_accuracy(runs, tmp_path / "accuracy.png", title="MNIST")
    assert_picture(tmp_path / "accuracy.png")
    ax = drawn[0].axes[0]
    assert ax.get_ylabel() == "test accuracy"
    assert ax.get_yscale() == ax.get_xscale() == "linear"
    assert ax.yaxis.get_major_formatter()(0.5) == "50%"
    assert len(ax.get_lines()[0].get_xdata()) == 10


def test_figures_have_one_panel_each_logarithmic_where_they_span_much(tmp_path, drawn):
    records = [{"step": s, "seconds": s, "damping": 150 * 0.5**s, "step_ratio": (-1.0) ** s} for s in range(12)]
    plots.plot_figures({"kfac": records}, tmp_path / "figures.png", keys=["damping", "step_ratio"], title="damping")
    assert_picture(tmp_path / "figures.png")
    damping, ratio = drawn[0].axes
    assert (damping.get_ylabel(), ratio.get_ylabel()) == ("damping", "step ratio")
    assert (damping.get_yscale(), ratio.get_yscale()) == ("log", "linear")
    assert ratio.get_xlabel() == "steps"


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_reconstructions_stand_below_their_originals(tmp_path, drawn, shape):
    rng = np.random.default_rng(0)
    originals = rng.random((20, np.prod(shape)))
    rows = {"curvax.kfac": originals * 0.9, "adam": originals + 1.0}
    plots.plot_reconstructions(originals, rows, shape, tmp_path / "images.png", title="CURVES", num_images=6)
    assert_picture(tmp_path / "images.png")
    axes = drawn[0].axes
    assert len(axes) == 18
    assert [axes[i].get_ylabel() for i in (0, 6, 12)] == ["original", "curvax.kfac", "adam"]
    np.testing.assert_allclose(axes[3].get_images()[0].get_array(), originals[3].reshape(shape))
    np.testing.assert_allclose(axes[9].get_images()[0].get_array(), 0.9 * originals[3].reshape(shape))
    np.testing.assert_allclose(axes[15].get_images()[0].get_array(), 1.0)  # clipped
