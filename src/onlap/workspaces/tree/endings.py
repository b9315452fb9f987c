"""The end of overlays that nobody uses any more, in the background.

When an overlay's last mount goes, the kernel first writes back the whole filesystem of its upper layer
(generic_shutdown_super, fs/super.c; ovl_sync_fs, fs/overlayfs/super.c). That takes milliseconds, or seconds after much
was written. Another mount of it, which is detached, lets the mount point be free before that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from onlap.catalog.helper import Batches
from onlap.forks import closed_in_children, restarted_in_children
from onlap.syscalls.mount import open_tree

# Seconds that one waits for others: the first of them writes back what all have left.
_TOGETHER = 0.1
# One more is waited for, since each keeps its layers' space.
_MOST = 32


class Endings:
    """The overlays of a store that are about to end."""

    def __init__(self) -> None:
        self._ends = Batches(self._end, _TOGETHER)
        self.after_fork()
        restarted_in_children(self)

    def after_fork(self) -> None:
        """In a forked child: they are the parent's."""
        self._waiting: list[Callable[[], None]] = []

    def postpone(self, fd: int, *, soon: bool) -> None:
        """Close the last descriptor of an overlay beside the caller, whose it is no longer.

        Args:
            fd: the descriptor.
            soon: at once, since the caller will wait for it; otherwise together with others.
        """
        self._waiting.append(closed_in_children(fd))
        if soon:
            self._ends.now()
        elif len(self._waiting) > _MOST:
            self.wait()
        else:
            self._ends.later()

    def wait(self) -> None:
        """Return when all that were postponed have ended."""
        if self._waiting or not self._ends.is_idle():
            self._ends.wait()

    def _end(self) -> None:
        while self._waiting:
            self._waiting.pop(0)()


def another_mount(path: str) -> int | None:
    """A detached mount of the filesystem that is mounted at a path; None if the kernel cannot make one."""
    with contextlib.suppress(OSError):
        return open_tree(path)
    return None
