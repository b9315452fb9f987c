"""Unmounting, with patience and a clear word about who is in the way."""

from __future__ import annotations

import errno
import time

from onlap import errors
from onlap.errors import shown
from onlap.mounts.holders import holders
from onlap.syscalls import mount as sys

# There is no event for "no longer busy": the kernel has to be asked again. 1 ms first, since most holders are a
# program that is just ending; doubled up to 100 ms.
_FIRST_WAIT = 0.001
_LONGEST_WAIT = 0.1


def unmount(target: str, *, timeout: float = 5.0, lazy: bool = False) -> None:
    """Unmount what is mounted topmost at ``target``.

    Args:
        target: the mount point.
        timeout: how many seconds to go on asking while it is busy.
        lazy: detach it at once, and let the kernel unmount it when its last user is gone. Never done unless asked.

    Raises:
        Busy: it is still in use; ``.holders`` says by whom.
        InvalidArgument: nothing is mounted there.
        OnlapError: of another kind, for whatever else the kernel says.
    """
    deadline = time.monotonic() + timeout
    wait = _FIRST_WAIT
    flags = sys.UMOUNT_NOFOLLOW | (sys.MNT_DETACH if lazy else 0)
    while True:
        try:
            sys.umount2(target, flags)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise errors.InvalidArgument(f"nothing is mounted at {shown(target)}", key=target) from error
            if error.errno != errno.EBUSY:
                raise errors.from_oserror(error, doing="unmount", key=target) from error
            if time.monotonic() >= deadline:
                raise _busy(target) from error
        else:
            return
        time.sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)


def _busy(target: str) -> errors.Busy:
    found = holders(target)
    who = "; ".join(found[:5]) or "nobody that /proc shows"
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return errors.Busy(
        f"{shown(target)} is busy, held by {who}{more}",
        key=target,
        hint="end these, then unmount it again",
        holders=found,
    )
