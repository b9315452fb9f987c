"""The progress of a long operation: bars on a terminal, a line every few seconds elsewhere; both on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap.cli.terminal import text
from onlap.cli.terminal.output import Output, complain, is_terminal
from onlap.errors import shown

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from onlap.progress import Callback, Progress

_ERASE_LINE = "\r\x1b[K"  # ECMA-48, EL
_WIDTH = 24
# Seconds between two lines of one stage if stderr is not a terminal: a log should show progress, and not fill up.
_INTERVAL = 5.0
# Seconds before a rate means anything.
_TOO_SHORT = 0.5
# Characters of a digest, or of another name, that fit beside a bar.
_ITEM = 19


@contextlib.contextmanager
def progress(out: Output) -> Iterator[Callback | None]:
    """A callback that shows every stage of an operation: the amount, the rate, and the time left.

    None with ``-q`` and ``--json``.
    """
    if out.quiet or out.json:
        yield None
    elif not is_terminal(sys.stderr):
        yield _lines()
    else:
        with contextlib.ExitStack() as stack:
            draw: Callback | None = None

            def show(report: Progress) -> None:
                nonlocal draw
                # At the first report: most operations are too short to have one, and rich takes 0.1 s to load.
                draw = draw or stack.enter_context(_drawn())
                draw(report)

            yield show


def _drawn() -> contextlib.AbstractContextManager[Callback]:
    try:
        from rich.progress import Progress as RichProgress
    except ImportError:
        return _one_line()
    return _rich(RichProgress)


def _lines() -> Callback:
    """Print a line per stage every few seconds, and one at the end of a stage that took that long."""
    started: dict[str, float] = {}
    printed: dict[str, float] = {}

    def show(report: Progress) -> None:
        now = time.monotonic()
        start = started.setdefault(report.stage, now)
        last = printed.setdefault(report.stage, now)
        finished = report.done == report.total and report.item is None
        if now - last >= _INTERVAL or (finished and last != start):
            printed[report.stage] = now
            complain(f"onlap: {report.stage}: {_figures(report, start)}")

    return show


@contextlib.contextmanager
def _one_line() -> Iterator[Callback]:
    """Redraw one line, if rich is not installed; it is erased at the end."""
    started: dict[str, float] = {}

    def draw(report: Progress) -> None:
        bar = ""
        if report.total:
            full = min(_WIDTH, report.done * _WIDTH // report.total)
            bar = f" [{'#' * full}{' ' * (_WIDTH - full)}]"
        figures = _figures(report, started.setdefault(report.stage, time.monotonic()))
        sys.stderr.write(f"{_ERASE_LINE}{report.stage}{bar} {figures}")
        sys.stderr.flush()

    try:
        yield draw
    finally:
        sys.stderr.write(_ERASE_LINE)
        sys.stderr.flush()


@contextlib.contextmanager
def _rich(cls: type[RichProgress]) -> Iterator[Callback]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn

    columns = (
        # Without markup: a name must not be read as such.
        TextColumn("{task.description}", markup=False),
        BarColumn(_WIDTH),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TextColumn("{task.fields[item]}", markup=False, style="dim"),
    )
    started: dict[str, float] = {}
    tasks: dict[str, TaskID] = {}
    with cls(*columns, console=Console(stderr=True), transient=True) as drawn:

        def draw(report: Progress) -> None:
            if report.stage not in tasks:
                tasks[report.stage] = drawn.add_task(report.stage, total=report.total, figures="", item="")
            drawn.update(
                tasks[report.stage],
                completed=report.done,
                total=report.total,
                figures=_figures(report, started.setdefault(report.stage, time.monotonic())),
                item=shown(report.item or "")[:_ITEM],
            )

        yield draw


def _figures(report: Progress, started: float) -> str:
    """As ``12.3 MiB of 45.0 MiB, 10.1 MiB/s, 3 s left``."""
    seconds = time.monotonic() - started
    amount = _amount(report, report.done)
    if report.total is not None and report.done != report.total:
        amount = f"{amount} of {_amount(report, report.total)}"
    if seconds < _TOO_SHORT or not report.done:
        return amount
    rate = report.done / seconds
    parts = [amount, f"{_amount(report, int(rate))}/s"]
    if report.total is not None and report.total > report.done:
        parts.append(f"{_duration((report.total - report.done) / rate)} left")
    return ", ".join(parts)


def _amount(report: Progress, number: int) -> str:
    return text.size(number) if report.unit == "bytes" else f"{number:,} {report.unit}"


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
