"""The progress display on and off a terminal, the printed table and the file of records."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import progress
from benchmarks.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file_console():
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def test_plain_lines_every_interval_and_at_the_end(clock, file_console):
    with Progress(10, title="[kfac] on curves", console=file_console, interval=5.0, clock=clock) as shown:
        for step in range(1, 11):
            clock.now += 2.0
            shown.update(step, {"loss": 1.0 / step, "step_ratio": jnp.float32(0.5), "cg_iterations": step})
    lines = file_console.file.getvalue().splitlines()
    assert lines == [
        "[kfac] on curves | step 1 | 2.0 s | ? left | loss 1 | step ratio 0.5 | cg iterations 1",
        "[kfac] on curves | step 4 | 8.0 s | 12 s left | loss 0.25 | step ratio 0.5 | cg iterations 4",
        "[kfac] on curves | step 7 | 14 s | 6.0 s left | loss 0.1429 | step ratio 0.5 | cg iterations 7",
        "[kfac] on curves | step 10 | 20 s | 0.0 s left | loss 0.1 | step ratio 0.5 | cg iterations 10",
    ]


def test_the_last_step_is_shown_once(clock, file_console):
    with Progress(3, console=file_console, interval=0.0, clock=clock) as shown:
        for step in (1, 2, 3):
            clock.now += 1.0
            shown.update(step, {})
    assert file_console.file.getvalue().count("step 3") == 1


def test_the_last_step_is_shown_though_the_interval_is_not_over(clock, file_console):
    with Progress(console=file_console, interval=60.0, clock=clock) as shown:
        shown.update(1, {"loss": 2.0})
        shown.update(2, {"loss": 1.0})
    assert file_console.file.getvalue().splitlines() == [
        "step 1 | 0.0 s | ? left | loss 2",
        "step 2 | 0.0 s | ? left | loss 1",
    ]


def test_figures_are_read_only_when_shown(clock, file_console):
    class Counted:
        reads = 0

        def item(self):
            Counted.reads += 1
            return 1.0

    with Progress(console=file_console, interval=1.0, clock=clock) as shown:
        for step in range(1, 101):
            clock.now += 0.05
            shown.update(step, {"loss": Counted()})
    assert Counted.reads == len(file_console.file.getvalue().splitlines()) <= 6


def test_time_left_is_that_of_the_budget_used_up_first(clock, file_console):
    with Progress(100, 30.0, console=file_console, clock=clock) as shown:
        assert shown.seconds_left == 30.0
        clock.now += 10.0  # the first step compiles
        shown.update(1, {})
        assert shown.seconds_left == 20.0
        clock.now += 0.9
        shown.update(10, {})
        np.testing.assert_allclose(shown.seconds_left, 9.0)
        clock.now += 4.0  # waiting takes from what is left
        np.testing.assert_allclose(shown.seconds_left, 5.0)
        clock.now += 400.0
        assert shown.seconds_left == 0.0


def test_time_left_is_unknown_without_a_budget(clock, file_console):
    with Progress(console=file_console, clock=clock) as shown:
        shown.update(1, {})
        clock.now += 1.0
        shown.update(2, {})
        assert shown.seconds_left is None


def test_an_error_passes_through_without_reading_figures(clock, file_console):
    class Deleted:
        def item(self):
            raise RuntimeError("array has been deleted")

    def interrupted():
        with Progress(console=file_console, interval=60.0, clock=clock) as shown:
            shown.update(1, {"loss": 1.0})
            shown.update(2, {"loss": Deleted()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "step 2" not in file_console.file.getvalue()


def test_nothing_is_printed_for_a_run_without_steps(file_console):
    with Progress(console=file_console):
        pass
    assert file_console.file.getvalue() == ""


def test_a_terminal_shows_the_latest_figures_and_rows_before(clock):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, legacy_windows=False, _environ={})
    with Progress(100, title="kfac on curves", console=console, interval=1.0, clock=clock) as shown:
        for step in range(1, 21):
            clock.now += 0.3
            shown.update(step, {"loss": 100.0 + step, "damping": jnp.float32(0.25)})
    written = console.file.getvalue()
    last_picture = written[written.rindex("kfac on curves") :]
    for text in ("step", "seconds", "loss", "damping", "101", "117", "120", "0.25", "6.0 s, 24 s left"):
        assert text in last_picture
    assert "119" not in last_picture


def test_a_file_gets_plain_lines_by_default(capsys):
    with Progress(title="quiet") as shown:
        shown.update(1, {"loss": 3.0})
    written = capsys.readouterr().out
    assert written.startswith("quiet | step 1 | ")
    assert "\x1b" not in written


def test_table_has_a_line_per_row_and_a_dash_for_what_is_missing(capsys):
    rows = [{"name": "kfac [tuned]", "loss": 0.123456}, {"name": "adam", "test_error": np.float32(2.5)}]
    progress.table(rows, ["name", "loss", "test_error"], title="CURVES")
    written = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in written.splitlines()]
    assert "CURVES" in written
    assert ["name", "loss", "test error"] in lines
    assert ["kfac [tuned]", "0.1235", "-"] in lines
    assert ["adam", "-", "2.5"] in lines


def test_records_are_appended_one_per_line(tmp_path):
    path = tmp_path / "runs" / "kfac.jsonl"
    progress.log_json(path, {"step": 1, "loss": jnp.float32(0.5), "accepted": np.bool_(True), "name": "kfac"})
    progress.log_json(
        path,
        {"step": np.int32(2), "loss": float("nan"), "factors": jnp.array([1.0, jnp.inf]), "more": {"a": (1, -np.inf)}},
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == progress.read_json(path)
    assert progress.read_json(path) == [
        {"step": 1, "loss": 0.5, "accepted": True, "name": "kfac"},
        {"step": 2, "loss": None, "factors": [1.0, None], "more": {"a": [1, None]}},
    ]
    assert "NaN" not in path.read_text(encoding="utf-8")
    assert "Infinity" not in path.read_text(encoding="utf-8")
