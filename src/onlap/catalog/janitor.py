"""Work that nobody waits for: a thread that deletes trash, measures layers and checkpoints, when there is quiet."""

from __future__ import annotations

import threading
from collections.abc import Callable

# A burst of removes or commits is over before the janitor starts, so that it does not compete with them.
_QUIET = 0.25


class Janitor:
    """One background thread, started when there is something to do and gone when all is done.

    Args:
        work: does all that is due, asks its argument now and then whether to stop, and says whether something is left
            that has to be tried again later.
    """

    # How long to wait before trying again what was in use.
    _RETRY = 5.0

    def __init__(self, work: Callable[[Callable[[], bool]], bool]) -> None:
        self._work = work
        self._fresh()

    def _fresh(self) -> None:
        self._mutex = threading.Lock()
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """In the child: the thread stayed with the parent."""
        self._fresh()

    def wake(self) -> None:
        """There is something to do."""
        self._due.set()
        if self._thread is None:
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
        while not self._stopping.is_set():
            self._due.wait()
            while self._due.is_set():
                self._due.clear()
                if self._stopping.wait(_QUIET):
                    return
            try:
                left = self._work(self._stopping.is_set)
            except Exception as error:
                # Nobody waits for this thread, so the log is the only place to tell; it is tried again all the same.
                # Imported here, since it is a tenth of the time that a short command may take to start.
                import logging

                logging.getLogger("onlap.catalog").warning("background work failed: %s", error)
                left = True
            if left and not self._stopping.wait(self._RETRY):
                self._due.set()
