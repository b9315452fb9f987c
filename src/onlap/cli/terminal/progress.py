"""How far long work is: bars on a terminal, now and then a line elsewhere; both on stderr."""

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
# Seconds between two lines of one stage where nobody watches a terminal: a log should tell, and not fill up.
_INTERVAL = 5.0
# Seconds in which a rate says nothing yet.
_TOO_SHORT = 0.5
# Characters of a digest, or of another name, that fit beside a bar.
_ITEM = 19


@contextlib.contextmanager
def progress(out: Output) -> Iterator[Callback | None]:
    """A callback that shows every stage of some work: what is done, how fast, how long it still takes.

    None where nobody wants to see it: with ``-q`` and ``--json``.
    """
    if out.quiet or out.json:
        yield None
    elif not is_terminal(sys.stderr):
        yield _Lines()
    else:
        with contextlib.ExitStack() as stack:
            yield _Drawn(stack)


class _Drawn:
    """Draws from the first report on: mostly there is nothing to draw, and rich takes a tenth of a second to load."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._draw: Callback | None = None

    def __call__(self, report: Progress) -> None:
        if self._draw is None:
            self._draw = self._start()
        self._draw(report)

    def _start(self) -> Callback:
        try:
            from rich.progress import Progress as RichProgress
        except ImportError:
            line = _OneLine()
            self._stack.callback(line.erase)
            return line
        return self._stack.enter_context(_rich(RichProgress))


class _Stage:
    """One stage's figures."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.told = self.started

    def describe(self, report: Progress) -> str:
        """As ``12.3 MiB of 45.0 MiB, 10.1 MiB/s, 3 s left``."""
        seconds = time.monotonic() - self.started
        amount = _amount(report, report.done)
        if report.total is not None and report.done != report.total:
            amount = f"{amount} of {_amount(report, report.total)}"
        if seconds < _TOO_SHORT or not report.done:
            return amount
        rate = report.done / seconds
        parts = [amount, f"{_amount(report, int(rate))}/s"]
        if report.total is not None and report.total > report.done:
            parts.append(f"{_seconds((report.total - report.done) / rate)} left")
        return ", ".join(parts)


class _Lines:
    """A line every few seconds, and one at the end of what took so long."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def __call__(self, report: Progress) -> None:
        stage = self._stages.setdefault(report.stage, _Stage())
        now = time.monotonic()
        finished = report.done == report.total and report.item is None
        if now - stage.told >= _INTERVAL or (finished and stage.told != stage.started):
            stage.told = now
            complain(f"onlap: {report.stage}: {stage.describe(report)}")


class _OneLine:
    """A line that is drawn over and over, where rich is not installed."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def __call__(self, report: Progress) -> None:
        stage = self._stages.setdefault(report.stage, _Stage())
        bar = ""
        if report.total:
            full = min(_WIDTH, report.done * _WIDTH // report.total)
            bar = f" [{'#' * full}{' ' * (_WIDTH - full)}]"
        sys.stderr.write(f"{_ERASE_LINE}{report.stage}{bar} {stage.describe(report)}")
        sys.stderr.flush()

    def erase(self) -> None:
        """Leave nothing of it."""
        if self._stages:
            sys.stderr.write(_ERASE_LINE)
            sys.stderr.flush()


@contextlib.contextmanager
def _rich(cls: type[RichProgress]) -> Iterator[Callback]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn

    columns = (
        # Without markup: nothing in a name may mean anything.
        TextColumn("{task.description}", markup=False),
        BarColumn(_WIDTH),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TextColumn("{task.fields[item]}", markup=False, style="dim"),
    )
    tasks: dict[str, TaskID] = {}
    stages: dict[str, _Stage] = {}
    with cls(*columns, console=Console(stderr=True), transient=True) as drawn:

        def show(report: Progress) -> None:
            stage = stages.setdefault(report.stage, _Stage())
            if report.stage not in tasks:
                tasks[report.stage] = drawn.add_task(report.stage, total=report.total, figures="", item="")
            drawn.update(
                tasks[report.stage],
                completed=report.done,
                total=report.total,
                figures=stage.describe(report),
                item=shown(report.item or "")[:_ITEM],
            )

        yield show


def _amount(report: Progress, number: int) -> str:
    return text.size(number) if report.unit == "bytes" else f"{number:,} {report.unit}"


def _seconds(left: float) -> str:
    whole = int(left + 0.5)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
