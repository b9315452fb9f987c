"""The attributes that a merge gives to files."""

from __future__ import annotations

import errno
import os
import stat

from onlap.trees.meta import Meta, drop_acls
from onlap.workspaces.merge.target import own_xattrs

# What cannot be kept is left out, as by a copy: an owner that the user namespace lacks, xattrs on some filesystems.
_NO_OWNER = (errno.EPERM, errno.EINVAL)
_NO_XATTR = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


def give(path: str, wanted: Meta, had: Meta | None = None) -> None:
    """Give a file attributes; the times last, since the rest changes them.

    Args:
        path: of a file that nobody else can replace, as that of a descriptor in ``/proc/self/fd``.
        wanted: the attributes.
        had: the attributes that it has; None for a new file of ours.

    Raises:
        OSError: they cannot be set.
    """
    link = stat.S_ISLNK(wanted.mode)
    if os.geteuid() == 0 and (had is None or (had.uid, had.gid) != (wanted.uid, wanted.gid)):
        try:
            os.chown(path, wanted.uid, wanted.gid, follow_symlinks=not link)
        except OSError as error:
            if error.errno not in _NO_OWNER:
                raise
    xattrs, old = own_xattrs(wanted), own_xattrs(had) if had is not None else {}
    if not link:
        if xattrs != old:
            if had is not None:
                os.chmod(path, had.mode & 0o777 | stat.S_IRWXU)  # user.* needs permission to write
            _set_xattrs(path, xattrs, old)
        os.chmod(path, stat.S_IMODE(wanted.mode))
    os.utime(path, ns=(wanted.mtime_ns, wanted.mtime_ns), follow_symlinks=not link)


def _set_xattrs(path: str, wanted: dict[str, bytes], had: dict[str, bytes]) -> None:
    for name in had.keys() - wanted.keys():
        os.removexattr(path, name)
    for name, value in wanted.items():
        if had.get(name) != value:
            try:
                os.setxattr(path, name, value)
            except OSError as error:
                # Of the other classes, a process in a user namespace may set only some.
                if error.errno not in _NO_XATTR or (name.startswith("user.") and error.errno != errno.EOPNOTSUPP):
                    raise


def new_directory(parent: int, name: str) -> None:
    """Make a directory that only this user can use, without ACLs; raises OSError."""
    os.mkdir(name, 0o700, dir_fd=parent)
    drop_acls(f"/proc/self/fd/{parent}/{name}")
