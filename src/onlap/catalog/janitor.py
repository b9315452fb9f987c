"""Work that nobody waits for: a thread that deletes trash, measures layers and checkpoints, when there is quiet."""

from __future__ import annotations

import time
from collections.abc import Callable

from onlap.catalog.helper import Helper, Job, nothing
from onlap.catalog.log import warn

# A burst of removes or commits is over before the janitor starts, so that it does not compete with them.
_QUIET = 0.25
# But a burst that does not end must not put the work off for ever.
_LONGEST_BURST = 5.0
# How long to wait before trying again what was in use.
_RETRY = 5.0


class Janitor:
    """One background thread, which exists while there is something to do.

    What it has not done when the process ends, the next one does; nothing of it is needed for correctness.

    Args:
        urgent: what cannot wait for quiet, and takes milliseconds.
        work: does all else that is due, asks its argument now and then whether to stop, and says whether something is
            left that has to be tried again later.
    """

    def __init__(self, urgent: Callable[[], None], work: Callable[[Callable[[], bool]], bool]) -> None:
        self._urgent = urgent
        self._work = work
        self.after_fork()

    def after_fork(self) -> None:
        """In the child: the thread stayed with the parent."""
        self._helper = Helper(self._serve)
        self._pressing = False
        self._later = False
        self._stopping = False

    def wake(self, *, urgent: bool = False) -> None:
        """There is something to do. Never fails: what it is for has been done already."""
        if urgent:
            self._pressing = True
        else:
            self._later = True
        if not self._stopping:
            self._helper.put(Job(nothing))

    def stop(self) -> None:
        """End the work soon, and wait for that."""
        self._stopping = True
        if not self._helper.is_idle():
            self._helper.ask(Job(nothing))

    def _stops(self) -> bool:
        return self._stopping

    def _serve(self, first: Job[object], alone: bool) -> None:
        calls = [first]
        try:
            # Without a thread of its own it would keep whoever has just committed something.
            if not alone:
                self._work_off(calls)
        finally:
            for call in calls:
                call.finish()

    def _work_off(self, calls: list[Job[object]]) -> None:
        retry = False
        while not self._stops():
            self._await_quiet(calls)
            if self._stops():
                return
            if self._later or retry:
                self._later = False
                retry = self._attempt(lambda: self._work(self._stops))
            if not self._called(calls, _RETRY if retry else 0) and not retry:
                return

    def _await_quiet(self, calls: list[Job[object]]) -> None:
        busy_since = time.monotonic()
        called = True
        while called and not self._stops():
            if self._pressing:
                self._pressing = False
                self._attempt(self._urgent)
            called = time.monotonic() - busy_since < _LONGEST_BURST and self._called(calls, _QUIET)

    def _called(self, calls: list[Job[object]], seconds: float) -> bool:
        """Whether somebody calls before the time is over."""
        found = self._helper.await_more(seconds)
        calls += found
        return bool(found)

    def _attempt(self, action: Callable[[], bool | None]) -> bool:
        """Do it; whether it has to be done again."""
        try:
            return bool(action())
        except Exception as error:  # noqa: BLE001 - a thread that ends is a thread that never tries again
            # Nobody waits for this thread, so the log is the only place to tell; it is tried again all the same.
            warn(f"background work failed: {error}")
            return True
