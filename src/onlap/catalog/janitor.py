"""Work that nobody waits for: a thread that deletes trash, measures layers and checkpoints, when there is quiet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from onlap.catalog.log import warn

# A burst of removes or commits is over before the janitor starts, so that it does not compete with them.
_QUIET = 0.25
# But a burst that does not end must not put the work off for ever.
_LONGEST_BURST = 5.0
# How long to wait before trying again what was in use.
_RETRY = 5.0


class Janitor:
    """One background thread, started when there is first something to do.

    Args:
        urgent: what cannot wait for quiet, and takes milliseconds.
        work: does all else that is due, asks its argument now and then whether to stop, and says whether something is
            left that has to be tried again later.
    """

    def __init__(self, urgent: Callable[[], None], work: Callable[[Callable[[], bool]], bool]) -> None:
        self._urgent = urgent
        self._work = work
        self._fresh()

    def _fresh(self) -> None:
        self._mutex = threading.Lock()
        self._due = threading.Event()
        self._pressing = threading.Event()
        self._later = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """In the child: the thread stayed with the parent."""
        self._fresh()

    def wake(self, *, urgent: bool = False) -> None:
        """There is something to do."""
        if urgent:
            self._pressing.set()
        else:
            self._later = True
        self._due.set()
        with self._mutex:
            if self._thread is None and not self._stopping.is_set():
                # A daemon: what it has not done, the next one does; nothing of it is needed for correctness.
                self._thread = threading.Thread(target=self._run, name="onlap-janitor", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread soon, and wait for it."""
        with self._mutex:
            self._stopping.set()
            thread = self._thread
        self._due.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        retry = False
        while True:
            self._due.wait(_RETRY if retry else None)
            busy_since = time.monotonic()
            while self._due.is_set():
                self._due.clear()
                if self._stopping.is_set():
                    return
                if self._pressing.is_set():
                    self._pressing.clear()
                    self._attempt(self._urgent)
                if time.monotonic() - busy_since < _LONGEST_BURST:
                    self._due.wait(_QUIET)
            if self._stopping.is_set():
                return
            if self._later or retry:
                self._later = False
                retry = self._attempt(lambda: self._work(self._stopping.is_set))

    def _attempt(self, action: Callable[[], bool | None]) -> bool:
        """Do it; whether it has to be done again."""
        try:
            return bool(action())
        except Exception as error:  # noqa: BLE001 - a thread that ends is a thread that never tries again
            # Nobody waits for this thread, so the log is the only place to tell; it is tried again all the same.
            warn(f"background work failed: {error}")
            return True
