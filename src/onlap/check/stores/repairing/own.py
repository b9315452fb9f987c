"""Whether a directory is one that only we, or root, can change: what is done in it by its path stays there."""

from __future__ import annotations

import os
import stat

from onlap import errors
from onlap.errors import shown
from onlap.syscalls.namespaces import in_user_namespace

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_own(path: str) -> None:
    """Refuse a directory that another user could lead elsewhere, or write to; with all that is above it.

    Raises:
        PermissionDenied: there is one.
        OSError: it cannot be looked at.
    """
    if os.geteuid() != 0 or in_user_namespace():
        return  # an ordinary user can be led to no more than the user's own
    path, above = os.path.realpath(path), "/"
    for name in path.split("/"):
        above = os.path.join(above, name)
        status = os.lstat(above)
        # In a sticky directory nobody renames what is another's (inode(7)), but anybody makes new files.
        is_sticky = status.st_mode & stat.S_ISVTX and above != path
        if status.st_uid != 0 or (status.st_mode & _OTHERS_WRITE and not is_sticky):
            raise errors.PermissionDenied(
                f"another user could change {shown(above)} (user {status.st_uid}, mode "
                f"{stat.S_IMODE(status.st_mode):04o}), and so make a repair change something else",
                key=above,
                hint="repair it as that user, in the user namespace of its tools (podman unshare, rootlesskit)",
            )
