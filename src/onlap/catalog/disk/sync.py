"""One syncfs(2) for all who wait together."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from onlap.catalog.helper import Helper, Job, nothing
from onlap.syscalls.files import syncfs

# What syncfs(2) says when it has not been done at all: nothing is known to be lost.
_NOT_DONE = (errno.ENOSYS, errno.EPERM, errno.EBADF, errno.EINTR, errno.EAGAIN)


class Syncer:
    """Writes a filesystem to the disk, for many threads at once.

    A caller may join only a syncfs that starts after it came: one that is under way has perhaps passed the caller's
    pages already. Those who wait while one runs share the next, and each is told how that one ended.

    The kernel reports an error of write-back once to each open file, and the pages that it could not write count as
    clean from then on (Linux, Documentation/core-api/errseq.rst): the next syncfs succeeds without them. So a failure
    is everybody's who had written before it, also if they ask later.

    Args:
        directory: on the filesystem; opened now, so that errors of write-back from now on are seen (Linux 5.8).
        failed: called after each failure, before anybody is told of that or of a later run.

    Attributes:
        failures: how many there have been.
    """

    def __init__(self, directory: str, failed: Callable[[], None] = lambda: None) -> None:
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._failed = failed
        self.failures = 0
        self.after_fork()

    def after_fork(self) -> None:
        """In the child: forget whom the parent's threads waited for."""
        self._helper = Helper(self._serve)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def sync(self, since: int | None = None) -> None:
        """Return when all that was written before the call is on the disk.

        Args:
            since: the number of :attr:`failures` when the caller began to write, if it can begin anew.

        Raises:
            OSError: EIO or ENOSPC of the write-back, in this run or, with ``since``, in an earlier one.
        """
        self._helper.ask(Job(nothing))
        if since is not None and since != self.failures:
            raise OSError(errno.EIO, "what was written before may be lost: an earlier sync failed")

    def _serve(self, first: Job[object], _alone: bool) -> None:
        jobs = [first, *self._helper.waiting()]
        try:
            syncfs(self._fd)
        except OSError as error:
            if error.errno not in _NOT_DONE:
                self.failures += 1
                self._failed()
            for job in jobs:
                job.error = OSError(error.errno, error.strerror)
        finally:
            for job in jobs:
                job.finish()
