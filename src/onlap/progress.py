"""Progress of a long operation, reported to a callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from onlap import cancellation, errors
from onlap.boundary import mark_callers_own

# Seconds. More frequent callbacks are of no use to a reader, and would cost more than the work on small files.
_INTERVAL = 0.1


class Progress(NamedTuple):
    """A report.

    Attributes:
        stage: what is being done, as ``"import"``.
        done: how many units are done.
        total: how many there are in total, None if that is unknown.
        unit: ``"bytes"``, ``"files"`` or ``"layers"``.
        item: the name of what is being worked on, if it has one.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    item: str | None = None


Callback = Callable[[Progress], None]

# Called with the bytes of a blob that have been transferred so far; raises an error once the work is cancelled.
OnProgress = Callable[[int], None]


class Reporter:
    """Calls a callback at most ten times per second, in the caller's thread, and once more at the end.

    An exception of the callback passes through the operation, which cleans up and ends: this is how it is cancelled.

    Raises:
        InvalidArgument: the callback is not callable.
    """

    def __init__(self, callback: Callback | None, stage: str, unit: str, total: int | None = None) -> None:
        if callback is not None and not callable(callback):
            raise errors.InvalidArgument(
                f"the callback for progress is {errors.shown(repr(callback)[:100])}", hint="it must be callable"
            )
        self._callback = callback
        self._call = cancellation.current()
        self._stage = stage
        self._unit = unit
        self.total = total
        self._next = 0.0
        self._sum = 0

    def __call__(self, done: int, item: str | None = None) -> None:
        """Report how much is done."""
        if self._call is not None:
            self._call.check()
        if self._callback is None:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL
            self._report(Progress(self._stage, done, self.total, self._unit, item))

    def add(self, count: int) -> None:
        """So many more are done than before."""
        self._sum += count
        self(self._sum)

    def finish(self, done: int) -> None:
        """Report that everything is done."""
        self._report(Progress(self._stage, done, done, self._unit, None))

    def _report(self, report: Progress) -> None:
        if self._callback is None:
            return
        try:
            self._callback(report)
        except Exception as error:
            mark_callers_own(error)
            raise
