"""One syncfs(2) for all waiting callers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from onlap.catalog.helper import Helper, Job, nothing
from onlap.forks import restarted_in_children
from onlap.syscalls.files import Descriptor, syncfs

# Errors of a syncfs(2) that was not run at all: nothing is known to be lost.
_NOT_DONE = (errno.ENOSYS, errno.EPERM, errno.EBADF, errno.EINTR, errno.EAGAIN)


class Syncer:
    """Writes a filesystem to the disk, for many threads at once.

    A caller may only join a syncfs that starts after its call: a running one may have passed the caller's pages
    already. Callers that wait while one runs share the next, and each gets its result.

    The kernel reports a write-back error once to each open file, and considers the pages that it could not write clean
    from then on (Linux, Documentation/core-api/errseq.rst): the next syncfs succeeds without them. So a failure
    concerns every caller that had written before it, also one that asks later.

    Args:
        directory: on the filesystem; opened now, so that write-back errors from now on are seen (Linux 5.8).
        failed: called after each failure, before any caller learns of that run or a later one.

    Attributes:
        failures: how many there have been.
    """

    def __init__(self, directory: str, failed: Callable[[], None] = lambda: None) -> None:
        self._file = Descriptor(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._failed = failed
        self.failures = 0
        self.after_fork()
        restarted_in_children(self)

    def after_fork(self) -> None:
        """In the child: the helper stayed with the parent."""
        self._helper = Helper(self._serve)

    def close(self) -> None:
        """Close the descriptor; idempotent, and never fails."""
        self._file.close()

    def sync(self, since: int | None = None) -> None:
        """Return when everything written before the call is on the disk.

        Args:
            since: the value of :attr:`failures` when the caller began to write, if it can start over.

        Raises:
            OSError: EIO or ENOSPC of the write-back, in this run or, with ``since``, in an earlier one.
        """
        self._helper.ask(Job(nothing))
        if since is not None and since != self.failures:
            raise OSError(errno.EIO, "earlier writes may be lost: an earlier sync failed")

    def _serve(self, first: Job[object], _in_caller: bool) -> None:
        jobs = [first, *self._helper.waiting()]
        try:
            syncfs(self._file.fd)
        except OSError as error:
            if error.errno not in _NOT_DONE:
                self.failures += 1
                self._failed()
            for job in jobs:
                job.error = OSError(error.errno, error.strerror)
        finally:
            for job in jobs:
                job.finish()
