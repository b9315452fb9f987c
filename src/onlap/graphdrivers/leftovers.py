"""What is mounted or half made below a driver's home, also by a process that has ended."""

from __future__ import annotations

import errno
import os
import time

from onlap import errors
from onlap.errors import shown
from onlap.locks import Held, claim_directory
from onlap.mounts import mountinfo
from onlap.mounts.holders import holders
from onlap.syscalls import mount as sys
from onlap.trees.remove import remove

# How long a removal goes on while something is busy, in seconds; moby's EnsureRemoveAll has 50 tries of 100 ms.
_PATIENCE = 5.0
_WAIT = 0.05

# Directories that are being built, and those that are tried in: never an id, since dockerd's are hexadecimal. Whoever
# made one holds its lock as long as it needs it.
STAGING = ".onlap-new-"
CHECKING = ".onlap-check-"
UNFINISHED = (STAGING, CHECKING)


def claim(path: str) -> Held:
    """Make one of these directories, or take over one that was left, and hold it.

    Raises:
        Busy: another process is at it.
        OSError: it cannot be made.
    """
    held = claim_directory(path)
    if held is None:
        raise errors.Busy(f"another process is making {shown(path)}", key=path, hint="let it end, then try again")
    return held


def mounts_below(directory: str) -> list[str]:
    """The mount points in ``directory``, those on top first; one that has several mounts comes several times."""
    return [os.fsdecode(path) for path in reversed(mountinfo.below(os.fsencode(os.path.realpath(directory))))]


def is_mounted(directory: str) -> bool:
    """Whether something is mounted there; no when it does not exist."""
    return os.path.ismount(directory)


def detach(target: str) -> bool:
    """Unmount what is topmost at ``target``, now or when its last user is gone; whether something was mounted.

    Raises:
        OSError: it cannot be.
    """
    try:
        sys.umount2(target, sys.MNT_DETACH | sys.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        raise
    return True


def detach_below(directory: str) -> None:
    """Unmount all that is mounted in ``directory``.

    Raises:
        OSError: something cannot be.
    """
    for target in mounts_below(directory):
        detach(target)


def remove_tree(home_fd: int, home: str, name: str) -> None:
    """Remove a directory of the driver with all in it; what is mounted there is unmounted.

    Raises:
        Busy: the kernel does not let it go; ``.holders`` says for whom.
        OnlapError: of another kind, for what the kernel says.
    """
    path = os.path.join(home, name)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            remove(home_fd, name)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY):
                raise errors.from_oserror(error, doing="remove the layer", key=name) from error
            if time.monotonic() >= deadline:
                raise errors.Busy(
                    f"{shown(path)} cannot be removed", key=name, hint="end these, try again", holders=_holders(path)
                ) from error
        else:
            return
        _detach_all(path)
        # There is no event for the end of the last use.
        time.sleep(_WAIT)


def _detach_all(path: str) -> None:
    with errors.translated("unmount what is in the layer", key=path):
        detach_below(path)


def _holders(path: str) -> list[str]:
    try:
        return holders(path)
    except FileNotFoundError:
        return []
