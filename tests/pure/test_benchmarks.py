"""The report of the benchmarks: which ratios it refuses, what it records, and when a later run is worse."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

from bench import check, lib, readme
from bench.lib import plots
from bench.lib.page import publish

PROGRAMS = sorted(path.stem for path in (lib.REPOSITORY / "bench").glob("*.py") if path.stem != "image_worker")
KEY = ("layers", "apply; tar")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_can_be_imported(program: str) -> None:
    importlib.import_module(f"bench.{program}")


@pytest.mark.parametrize(
    "peer, ours, given",
    [
        ([1.0, 1.0, 1.0], [2.0, 2.2, 1.9], True),
        ([1.0, 1.0, 1.0], [1.1, 0.9, 1.2], False),
        # 0.5x: the rounds may differ by a factor of two, either way round.
        ([2.0, 2.0, 2.0], [1.0, 0.8, 1.4], True),
        ([2.0, 2.0, 2.0], [1.0, 0.6, 1.4], False),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], True),
    ],
)
def test_a_ratio_whose_rounds_differ_more_than_the_sides_is_refused(
    peer: list[float], ours: list[float], given: bool
) -> None:
    row = lib.Row("apply", "s", peer, ours, lib.Reach(most=3))
    assert (row.ratio is not None) == given
    assert row.verdict == "reached"
    assert row.cells()["Onlap / peer"].startswith("rounds differ") != given


@pytest.mark.parametrize("most, verdict", [(0.8, "below"), (1.0, ""), (1.3, "reached")])
def test_rounds_that_differ_are_judged_if_all_say_the_same(most: float, verdict: str) -> None:
    row = lib.Row("apply", "s", [1.0, 1.0, 1.0], [1.1, 0.9, 1.2], lib.Reach(most=most))
    assert row.ratio is None
    assert row.verdict == verdict


@pytest.mark.parametrize("stretch, verdict", [(0.5, "reached"), (1.0, "reached"), (1.3, "stretch")])
def test_rounds_that_differ_have_reached_what_all_of_them_have(stretch: float, verdict: str) -> None:
    row = lib.Row("apply", "s", [1.0, 1.0, 1.0], [1.1, 0.9, 1.2], lib.Reach(most=1.4, stretch=stretch))
    assert row.ratio is None
    assert row.verdict == verdict


def test_a_plot_in_words_has_all_bars_and_their_floor_once() -> None:
    series = {"gzip": [("ours", [1.0]), ("theirs", [2.0])]}
    plot = lib.Plot("pull", "Pull", "", "s", series, [("ours", [0.5]), ("theirs", [0.5])], floor_label="blobs")
    assert plot.alternative == "Pull (s): gzip 1 at ours; gzip 2 at theirs; blobs 0.5"


def test_the_plot_of_growth_has_a_colour_for_each_line() -> None:
    growth = importlib.import_module("bench.growth")
    point = dict.fromkeys(growth.CONSTANT, 1.0)
    runs: dict[str, list[lib.Result]] = {"operations 10": [point], "floor": [{"seconds": 1.0, "cycles": 10}]}
    assert 1 < len(growth.plot(runs, [10]).series) <= len(plots.COLORS)


def test_the_speed_in_readme_is_greater_where_onlap_is_faster() -> None:
    def cells(unit: str, ratio: str) -> dict[str, str]:
        return {"unit": unit, "peer": "2 (1-3)", "Onlap": "1 (1-1)", "Onlap / peer": ratio}

    label = readme.SHOWN[0][2]
    for unit, ratio, speed in (
        ("s", "0.436x (0.383-0.499)", "2.29x"),
        ("MB/s", "3.43x (2.29-4.76)", "3.43x"),
        ("s", "rounds differ (0.871-2.08)", "rounds differ"),
    ):
        rows = {(bench, row): cells(unit, ratio) for bench, row, _ in readme.SHOWN}
        assert f"| {label} | 2 {unit} | 1 {unit} | {speed} |" in readme.figures(rows)


def test_a_row_of_results_has_processor_time_memory_and_floor() -> None:
    peer, ours = [{"n": 4, "cpu_s": 2.0, "peak_mib": 10.0}], [{"n": 8, "cpu_s": 0.08, "peak_mib": 20.0}]
    row = lib.Row.of("cycles", "cycles/s", peer, ours, "n", floor=[{"n": 16}], per="n")
    cells = row.cells()
    assert cells["CPU"] == "0.5 s / 10 ms"
    assert cells["MiB"] == "10 / 20"
    assert cells["Onlap / floor"] == "0.5x"
    bare = lib.Row("cycles", "cycles/s", [1.0], [2.0])
    assert {name for name in bare.cells() if not bare.cells()[name]} >= {"floor", "durability", "CPU"}


def test_what_is_published_is_read_again(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    rows = [lib.Row(KEY[1], "s", [1.0, 1.0], [2.0, 2.5], lib.Reach(most=3, stretch=2), durability="Onlap syncs")]
    details = lib.Details("More:", ["run", "s"], [["a", "1"]])
    plot = lib.Plot("apply", "Apply", "files", "s", {"Onlap": [(1, [1.0])]})
    for _ in range(2):  # the second time it is replaced
        publish("layers", "Layers", rows, conditions={}, details=details, plots=[plot], document=document)
        publish("other", "Other", [lib.Figure("open", "ms", [1.0], 2)], conditions={}, document=document)
    found = lib.recorded(document)
    assert list(found) == [KEY, ("other", "open")]
    assert found[KEY]["durability"] == "Onlap syncs"
    assert check.recorded_ranges(found) == {KEY: (2, 2.5)}
    assert document.read_text().count("![Apply (s): Onlap 1 at 1](plots/apply.svg)") == 1
    assert document.read_text().count("\nrounds: 2\n") == 1


@pytest.mark.parametrize(
    "unit, ours, worse",
    [("s", [2.6, 3.0], True), ("s", [2.4, 3.0], False), ("MB/s", [1.0, 1.9], True), ("MB/s", [2.6, 3.0], False)],
)
def test_a_ratio_is_worse_if_all_rounds_are(unit: str, ours: list[float], worse: bool) -> None:
    measured = {KEY: lib.Row(KEY[1], unit, [1.0, 1.0], ours)}
    assert bool(list(check.findings({KEY: (2.0, 2.5)}, measured))) == worse


def test_a_recorded_row_that_was_not_measured_is_told() -> None:
    assert list(check.findings({KEY: (2.0, 2.5)}, {})) == ["layers: apply; tar: not measured"]


def test_the_page_can_be_read() -> None:
    """Each ratio of docs/benchmarks.md has its range, which the check of a release compares."""
    rows = {key: cells for key, cells in lib.recorded().items() if cells.get("Onlap / peer")}
    assert rows
    assert check.recorded_ranges(rows).keys() == rows.keys()


def test_a_call_is_measured_with_what_its_children_use() -> None:
    with lib.Worker([sys.executable, "-c", WORKER]) as worker:
        result = worker("spend")
    assert result["seconds"] == 1  # the answer comes first
    assert result["cpu_s"] >= 0.1
    assert result["peak_mib"] >= 40


WORKER = """
import subprocess, sys
spend = "import time\\nwhile time.process_time() < 0.2: pass"
for line in sys.stdin:
    subprocess.run([sys.executable, "-c", spend], check=True)
    memory = bytearray(40 << 20)
    print('{"seconds": 1}', flush=True)
"""


def test_a_peak_is_that_of_the_call() -> None:
    memory = bytearray(60 << 20)
    before = lib.measured(lambda: None, os.getpid())["peak_mib"]
    del memory
    assert lib.measured(lambda: None, os.getpid())["peak_mib"] < before - 30


def test_readme_has_the_numbers_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main("--check") == 0, capsys.readouterr().out


def test_readme_with_another_number_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", other)
    text = (lib.REPOSITORY / "README.md").read_text()
    other.write_text(text.replace(" cycles/s |", "0 cycles/s |", 1))
    assert readme.main("--check") == 1
    assert readme.main() == 0
    assert other.read_text() == text
    other.write_text(text + "\nIt takes a millisecond.\n")
    assert readme.main("--check") == 1
    assert "'millisecond'" in capsys.readouterr().out
