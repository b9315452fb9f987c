"""Background work: a thread that checkpoints at once, and does the rest once the process is quiet.

It deletes trash, measures and lists layers, and copies records.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from onlap.catalog.helper import Helper, Job, nothing
from onlap.catalog.log import warn

# Seconds. The janitor waits for the end of a burst of removes or commits, so that it does not compete with them.
_QUIET = 0.25
# But a burst that does not end must not put the work off for ever.
_LONGEST_BURST = 5.0
# How long to wait before something that was in use is tried again.
_RETRY = 5.0


class Janitor:
    """A background thread that exists while there is work.

    What it has not done when the process ends, the next process does: nothing of it is needed for correctness.

    Args:
        urgent: work that cannot wait for quiet, and takes milliseconds.
        work: all other work. It gets a function that says whether to stop, calls it now and then, and returns whether
            something has to be tried again later.
    """

    def __init__(self, urgent: Callable[[], None], work: Callable[[Callable[[], bool]], bool]) -> None:
        self._urgent = urgent
        self._work = work
        self.after_fork()

    def after_fork(self) -> None:
        """In the child: the thread stayed with the parent."""
        self._helper = Helper(self._serve)
        self._urgent_due = False
        self._work_due = False
        self._awaiting_quiet = False
        self._last_wake = 0.0
        self._stopping = False

    def wake(self, *, urgent: bool = False) -> None:
        """Start the thread, which finds out what there is to do. Never fails: the caller's own work is done already."""
        if urgent:
            self._urgent_due = True
        else:
            self._last_wake = time.monotonic()
            # Set before the state of the thread is read; the thread ends its wait for quiet before it reads this.
            self._work_due = True
            if self._awaiting_quiet:
                return  # a switch to it and back, once per commit, would cost more than all else here
        if not self._stopping:
            self._helper.put(Job(nothing))

    def stop(self) -> None:
        """Stop the work soon, and wait until it has stopped."""
        self._stopping = True
        if not self._helper.is_idle():
            self._helper.ask(Job(nothing))

    def _is_stopping(self) -> bool:
        return self._stopping

    def _serve(self, first: Job[object], in_caller: bool) -> None:
        calls = [first]
        try:
            # In the caller's thread it would delay a commit that is done.
            if not in_caller:
                self._work_off(calls)
        finally:
            for call in calls:
                call.finish()

    def _work_off(self, calls: list[Job[object]]) -> None:
        retry = False
        while not self._is_stopping():
            self._await_quiet(calls)
            if self._is_stopping():
                return
            if self._work_due or retry:
                self._work_due = False
                retry = self._attempt(lambda: self._work(self._is_stopping))
            if not self._called(calls, _RETRY if retry else 0) and not retry:
                return

    def _await_quiet(self, calls: list[Job[object]]) -> None:
        longest = time.monotonic() + _LONGEST_BURST
        self._awaiting_quiet = True
        try:
            while not self._is_stopping():
                if self._urgent_due:
                    self._urgent_due = False
                    self._attempt(self._urgent)
                left = min(self._last_wake + _QUIET, longest) - time.monotonic()
                if left <= 0:
                    return
                self._called(calls, left)
        finally:
            self._awaiting_quiet = False

    def _called(self, calls: list[Job[object]], seconds: float) -> bool:
        """Whether a job arrives within that time."""
        found = self._helper.await_more(seconds)
        if self._is_stopping():
            calls += found
        else:
            # Nobody waits for these, and in a burst that does not end they would add up.
            for call in found:
                call.finish()
        return bool(found)

    def _attempt(self, action: Callable[[], bool | None]) -> bool:
        """Run ``action``; returns whether it has to be run again."""
        try:
            return bool(action())
        except Exception as error:  # noqa: BLE001 - else the thread would end and never try again
            # Nobody waits for this thread: the log is the only place to report the failure.
            warn(f"background work failed: {error}")
            return True
