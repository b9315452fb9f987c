"""The end of overlays that nobody uses any more, in the background.

When an overlay's last mount goes, the kernel first writes back the whole filesystem of its upper layer
(generic_shutdown_super, fs/super.c; ovl_sync_fs, fs/overlayfs/super.c). That takes milliseconds, or seconds after much
was written. Another mount of it, which is detached, lets the mount point be free before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from onlap.catalog.helper import Helper, Job, nothing
from onlap.forks import closed_in_children, restarted_in_children
from onlap.syscalls.mount import open_tree

# Seconds that one waits for others: the first of them writes back what all have left.
_TOGETHER = 0.1
# One more is waited for, since each keeps its layers' space.
_MOST = 32


class Endings:
    """The overlays of a store that are about to end."""

    def __init__(self) -> None:
        self.after_fork()
        restarted_in_children(self)

    def after_fork(self) -> None:
        """In a forked child: they are the parent's."""
        self._helper = Helper(self._serve)
        self._waiting: list[Callable[[], None]] = []
        self._due = False

    def postpone(self, fd: int, *, soon: bool) -> None:
        """Close the last descriptor of an overlay beside the caller, whose it is no longer.

        Args:
            fd: the descriptor.
            soon: at once, since the caller will wait for it; otherwise together with others.
        """
        self._waiting.append(closed_in_children(fd))
        if soon:
            self._helper.put(Job(nothing))
        elif len(self._waiting) > _MOST:
            self.wait()
        elif not self._due:
            self._due = True
            self._helper.put(_Later(nothing))

    def wait(self) -> None:
        """Return when all that were postponed have ended."""
        if self._waiting or not self._helper.is_idle():
            self._helper.ask(Job(nothing))

    def _serve(self, first: Job[object], in_caller: bool) -> None:
        jobs = [first, *self._helper.waiting()]
        if not in_caller and all(isinstance(job, _Later) for job in jobs):
            jobs += self._helper.await_more(_TOGETHER)
        self._due = False
        try:
            while self._waiting:
                self._waiting.pop(0)()
        finally:
            for job in jobs:
                job.finish()


class _Later(Job[None]):
    """A job that nobody waits for."""

    __slots__ = ()


def another_mount(path: str) -> int | None:
    """A detached mount of the filesystem that is mounted at a path; None if the kernel cannot make one."""
    with contextlib.suppress(OSError):
        return open_tree(path)
    return None
