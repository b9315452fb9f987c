"""Unmounting: it retries while a mount is busy, and the error says who holds it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator

from onlap import errors
from onlap.errors import shown
from onlap.syscalls import mount as calls

# Seconds. There is no event for "no longer busy", and flock(2) has no timeout: the kernel has to be polled. The first
# wait is short, since most holders are just ending; then it doubles.
_FIRST_WAIT = 0.001
_LONGEST_WAIT = 0.05


def unmount(target: str, *, timeout: float = 5.0, lazy: bool = False) -> None:
    """Unmount the topmost mount at ``target``.

    Args:
        target: the mount point.
        timeout: how many seconds to retry while it is busy.
        lazy: detach it at once, and let the kernel unmount it when its last user is gone.

    Raises:
        Busy: it is still in use; ``.holders`` says by whom.
        InvalidArgument: nothing is mounted there.
        OnlapError: of another kind, for other errors of the kernel.
    """
    flags = calls.UMOUNT_NOFOLLOW | (calls.MNT_DETACH if lazy else 0)
    for last in attempts(timeout):
        try:
            calls.umount2(target, flags)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise errors.InvalidArgument(f"nothing is mounted at {shown(target)}", key=target) from error
            if error.errno != errno.EBUSY:
                raise errors.from_oserror(error, doing="unmount", key=target) from error
            if last:
                from onlap.mounts.holders import holders

                raise busy(target, holders(target), "end these processes, then unmount it again") from error
        else:
            return


def await_nobody(target: str, find: Callable[[], list[str]], *, timeout: float = 5.0) -> None:
    """Wait until a tree is unused that has no mount point, so that no unmount can fail with EBUSY.

    Args:
        target: the tree, for the message.
        find: returns who uses it.
        timeout: how many seconds to retry.

    Raises:
        Busy: it is still in use; ``.holders`` says by whom.
    """
    for last in attempts(timeout):
        found = find()
        if not found:
            return
        if last:
            raise busy(target, found, "end these processes")


def attempts(timeout: float) -> Iterator[bool]:
    """Yields for each attempt, with growing pauses between them, whether it is the last."""
    deadline = time.monotonic() + timeout
    wait = _FIRST_WAIT
    while time.monotonic() < deadline:
        yield False
        time.sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)
    yield True


def busy(target: str, found: list[str], hint: str) -> errors.Busy:
    """The error for a tree that is in use, by ``found`` (from :mod:`onlap.mounts.holders`)."""
    who = "; ".join(found[:5]) or "a process that /proc does not show"
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return errors.Busy(
        f"{shown(target)} is busy, held by {who}{more}",
        key=target,
        hint=hint,
        holders=found,
    )
