"""A driver's home directory: staging, mounts and removal in it, also of what an ended process left."""

from __future__ import annotations

import errno
import os

from onlap import errors
from onlap.errors import shown
from onlap.locks import Flock, claim_directory
from onlap.mounts import mountinfo
from onlap.mounts.holders import holders
from onlap.mounts.unmount import attempts, busy
from onlap.syscalls import mount as calls
from onlap.trees.remove import remove

# How long a removal is retried while something is busy, in seconds; moby's EnsureRemoveAll does 50 tries of 100 ms.
_PATIENCE = 5.0

# Directories being built, those of trial mounts and those of removed layers. They are never ids, since dockerd's are
# hexadecimal. Their maker holds their lock as long as it needs them.
STAGING = ".onlap-new-"
CHECKING = ".onlap-check-"
REMOVED = ".onlap-removed-"
UNFINISHED = (STAGING, CHECKING, REMOVED)


def claim(path: str) -> Flock:
    """Make one of these directories, or take over an abandoned one, and hold it.

    Raises:
        Busy: another process uses it.
        OSError: it cannot be made.
    """
    held = claim_directory(path)
    if held is None:
        raise errors.Busy(f"another process is making {shown(path)}", key=path, hint="let it end, then try again")
    return held


def mounts_below(directory: str) -> list[str]:
    """The mount points in ``directory``, uppermost first; one with several mounts is listed several times."""
    return [os.fsdecode(path) for path in reversed(mountinfo.below(os.fsencode(os.path.realpath(directory))))]


def is_mounted(directory: str) -> bool:
    """Whether another filesystem is mounted at ``directory``; raises OSError if that cannot be determined."""
    try:
        device = os.lstat(directory).st_dev
    except FileNotFoundError:
        return False
    return device != os.lstat(os.path.join(directory, "..")).st_dev


def detach(target: str) -> bool:
    """Unmount the topmost mount at ``target``, now or once its last user is gone; whether anything was mounted.

    Raises:
        OSError: it cannot be unmounted.
    """
    try:
        calls.umount2(target, calls.MNT_DETACH | calls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        raise
    return True


def detach_below(directory: str) -> None:
    """Unmount everything in ``directory``.

    Raises:
        OSError: something cannot be unmounted.
    """
    for target in mounts_below(directory):
        detach(target)


def remove_tree(home_fd: int, home: str, name: str) -> None:
    """Remove a directory of the driver with its contents, and unmount what is mounted there.

    Raises:
        Busy: it is still in use; ``.holders`` says by whom.
        OnlapError: of another kind, for other errors of the kernel.
    """
    path = os.path.join(home, name)
    for last in attempts(_PATIENCE):
        try:
            remove(home_fd, name)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY):
                raise errors.from_oserror(error, doing="remove the layer", key=name) from error
            if last:
                raise busy(path, _holders(path), "end these, then try again") from error
        else:
            return
        with errors.translated("unmount what is in the layer", key=path):
            detach_below(path)


def _holders(path: str) -> list[str]:
    try:
        return holders(path)
    except FileNotFoundError:
        return []
