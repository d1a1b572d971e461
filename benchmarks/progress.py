"""What a run shows while it goes, the table at its end, and the file it leaves behind."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HISTORY = 8
SECONDS_BETWEEN_LIVE_READINGS = 0.25
WIDTH_OF_FILES = 160


class Progress:
    """Shows step, seconds, time left and any figures: live on a terminal, else a plain line every ``interval`` seconds.

    ::

        with Progress(total_steps=500, total_seconds=60, title="kfac on curves") as progress:
            for step in range(1, 501):
                ...
                progress.update(step, {"loss": loss, "damping": damping})

    On a terminal the last figures stand in the bottom row of a table, above them the rows of every ``interval`` seconds
    before. A figure may be a jax scalar: it is read, which waits for the device, only when it is going to be shown, at
    most four times a second. The time left is up to the budget that will be used up first.

    Args:
      total_steps: the budget of steps, if there is one.
      total_seconds: the budget of seconds, if there is one, counted from entering the context.
      title: what is running.
      console: where to write; by default standard output.
      interval: seconds between rows.
      clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        total_seconds: float | None = None,
        title: str = "",
        *,
        console: Console | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total_steps = total_steps
        self.total_seconds = total_seconds
        self.title = title
        self._console = console or default_console()
        self._interval = interval
        self._clock = clock
        self._start = clock()
        self._live: Live | None = None
        self._first: tuple[int, float] | None = None
        self._latest: tuple[int, float, Mapping[str, Any]] | None = None
        self._shown: Row | None = None
        self._rows: deque[Row] = deque(maxlen=HISTORY)
        self._next_reading = self._next_row = 0.0

    def __enter__(self) -> Progress:
        self._start = self._clock()
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        # after an error the arrays of the latest figures may be gone
        if error_type is None and self._latest is not None:
            row = self._read()
            if not self._rows or self._rows[-1].step != row.step:
                self._add(row)
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes the figures after ``step`` steps; names are free and may change from step to step."""
        seconds = self.seconds
        self._latest = (step, seconds, values)
        self._first = self._first or (step, seconds)
        if seconds >= self._next_row:
            self._next_row = seconds + self._interval
            self._next_reading = seconds + SECONDS_BETWEEN_LIVE_READINGS
            self._add(self._read())
        elif self._live is not None and seconds >= self._next_reading:
            self._next_reading = seconds + SECONDS_BETWEEN_LIVE_READINGS
            self._read()

    @property
    def seconds(self) -> float:
        """Seconds since the context was entered."""
        return self._clock() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the first budget is used up, or None where that is not known."""
        candidates = []
        if self.total_seconds is not None:
            candidates.append(self.total_seconds - self.seconds)
        if self.total_steps is not None and self._first is not None and self._latest is not None:
            # the first step compiles, so that the pace is that of the steps after it
            (first_step, first_seconds), (step, seconds, _) = self._first, self._latest
            if step > first_step:
                pace = (seconds - first_seconds) / (step - first_step)
                candidates.append(pace * (self.total_steps - step) - (self.seconds - seconds))
        return max(min(candidates), 0.0) if candidates else None

    def _read(self) -> Row:
        assert self._latest is not None
        step, seconds, values = self._latest
        texts = {name.replace("_", " "): format_number(value) for name, value in values.items()}
        self._shown = Row(step, seconds, self.seconds_left, texts)
        return self._shown

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        if self._live is None:
            title = [self.title] if self.title else []
            fields = [f"step {row.step}", format_seconds(row.seconds), f"{format_seconds(row.left)} left"]
            fields += [f"{name} {text}" for name, text in row.texts.items()]
            self._console.print(" | ".join(title + fields), highlight=False, markup=False, soft_wrap=True)

    def _picture(self) -> Group:
        """What the live display shows; called from its own thread, so that it reads finished rows only."""
        rows, shown = list(self._rows), self._shown
        if shown is not None and (not rows or rows[-1].step != shown.step):
            rows = [*rows[1 - HISTORY :], shown]
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=1.0, completed=self._done(), width=24)
        clock = f"{format_seconds(self.seconds)}, {format_seconds(self.seconds_left)} left"
        head.add_row(Text(self.title, style="bold"), bar, clock if shown else f"{clock} (first step: compiling)")
        if shown is None:
            return Group(head)
        body = Table(box=None, pad_edge=False, header_style="dim")
        names = list(dict.fromkeys(name for row in rows for name in row.texts))
        for name in ["step", "seconds", *names]:
            body.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            texts = [str(row.step), f"{row.seconds:.1f}", *(row.texts.get(name, "-") for name in names)]
            body.add_row(*texts, style="bold" if row is rows[-1] else "dim")
        return Group(head, body)

    def _done(self) -> float:
        shares = [0.0]
        if self.total_seconds:
            shares.append(self.seconds / self.total_seconds)
        if self.total_steps and self._latest is not None:
            shares.append(self._latest[0] / self.total_steps)
        return min(max(shares), 1.0)


class Row(NamedTuple):
    """The figures of one step as they are shown."""

    step: int
    seconds: float
    left: float | None
    texts: dict[str, str]


def table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str = "", console: Console | None = None
) -> None:
    """Prints one line per row with the given entries; an entry that a row lacks shows as a dash."""
    picture = Table(title=title or None, title_style="bold", title_justify="left")
    for name in columns:
        numeric = not any(isinstance(row.get(name), str) for row in rows)
        picture.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        picture.add_row(*(Text(format_number(row.get(name))) for name in columns))
    (console or default_console()).print(picture)


def markdown(columns: Sequence[str], rows: Iterable[Collection[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows]]


def log_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Appends ``record`` to a file of one JSON object per line; numpy and jax values become lists and numbers.

    JSON has no NaN and no infinity: both are written as null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_plain(record), allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_json(path: str | Path) -> list[dict[str, Any]]:
    """The records that ``log_json`` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def format_number(value: Any) -> str:
    """Four significant digits for a float, all digits of an integer, a dash for None, and words as they are.

    >>> [format_number(value) for value in (0.000123456, 123456, 2.0, True, None, "kfac")]
    ['0.0001235', '123456', '2', 'yes', '-', 'kfac']
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def format_seconds(seconds: float | None) -> str:
    """A duration to read at a glance.

    >>> [format_seconds(value) for value in (3.21, 42, 185, 7265, None)]
    ['3.2 s', '42 s', '3 min 05 s', '2 h 01 min', '?']
    """
    if seconds is None:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def default_console() -> Console:
    """Standard output; a file gets lines wide enough for a table, a terminal its own width."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_FILES, force_terminal=False)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
