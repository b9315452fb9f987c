"""One syncfs(2) for all who wait together."""

from __future__ import annotations

import os
import threading

from onlap.syscalls.files import syncfs


class Syncer:
    """Writes a filesystem to the disk, for many threads at once.

    A caller may join only a syncfs that starts after it came: one that is under way has perhaps passed the caller's
    pages already. Those who wait while one runs share the next.

    Args:
        directory: on the filesystem; opened now, so that errors of write-back from now on are seen (Linux 5.8).
    """

    def __init__(self, directory: str) -> None:
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._started = 0
        self._finished = 0
        self._failures: dict[int, OSError] = {}

    def after_fork(self) -> None:
        """In the child: forget whom the parent's threads waited for."""
        self._reset()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def sync(self) -> None:
        """Return when all that was written before the call is on the disk.

        Raises:
            OSError: EIO or ENOSPC of the write-back; every caller that shared the syncfs gets it.
        """
        with self._changed:
            run = self._started + 1
            while self._finished < run:
                if self._started == self._finished:
                    self._started = run
                    break
                self._changed.wait()
            else:
                self._raise_failure(run)
                return
        failure = None
        try:
            syncfs(self._fd)
        except OSError as error:
            failure = error
        with self._changed:
            self._finished = run
            self._failures.pop(run - 2, None)  # whoever waited for that one has long been told
            if failure is not None:
                self._failures[run] = failure
            self._changed.notify_all()
        if failure is not None:
            raise failure

    def _raise_failure(self, run: int) -> None:
        failure = self._failures.get(run)
        if failure is not None:
            raise OSError(failure.errno, failure.strerror)
