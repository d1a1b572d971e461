"""The command that compares first steps: its rows, and that the steps are those of the methods."""

import jax
import pytest

from benchmarks import compile_time


@pytest.fixture(autouse=True)
def as_the_benchmarks_run():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.many_compilations("the benchmark draws its data and begins the states before it compiles")
def test_the_report_has_a_row_for_each_method(tmp_path):
    report = tmp_path / "report.md"
    compile_time.main(["--methods", "lsr1", "kfac", "--output", str(report)])
    rows = [
        line.split(" | ") for line in report.read_text().splitlines() if line.startswith("| ") and "---" not in line
    ]
    assert [row[0].strip("| ") for row in rows] == ["first step", "adam", "lsr1", "kfac"]
    instructions = [int(row[-1].strip(" |")) for row in rows[1:]]
    assert instructions[0] < min(instructions[1:])
