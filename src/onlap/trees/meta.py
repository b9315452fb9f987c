"""What a file is, apart from its name and content."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from typing import NamedTuple

from onlap.overlayfs.markers import is_marker
from onlap.trees.walk import path_of

# How containers/storage records, on a file whose owner could not be set, what it should be: "uid:gid:0mode", in newer
# versions with ":type" behind it (pkg/idtools, ContainersOverrideXattr); fuse-overlayfs has the type in the mode.
# Kept in the same place and form, so that their tools understand it.
#
# Whoever may write to a file may set it. So it is believed only in the roots of those who cannot give files away, where
# Onlap itself writes it, and there only on files of their own, since it is on those that it is written. Anywhere else
# it is an xattr like any other: else a user could make the layers of root's store say that his file is root's.
OVERRIDE_XATTR = "user.containers.override_stat"

_OVERRIDE = re.compile(rb"([0-9]{1,10}):([0-9]{1,10}):([0-7]{1,7})(?::([a-z]+)(?:-[0-9]+-[0-9]+)?)?")
# What containers/storage calls the types of files that can have the xattr: the kernel gives user.* to no other
# (xattr(7)), so that its devices and sockets are empty files, and no owner of ours.
_TYPES = {stat.S_IFREG: b"file", stat.S_IFDIR: b"dir"}
# (uid_t) -1 is no user (chown(2)).
_LAST_ID = 2**32 - 2

ACCESS_ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
# Xfs lists ACLs a second time, under the names that it stores them by (fs/xfs/xfs_xattr.c, xfs_xattr_put_listent).
_XFS_ACLS = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")


class Meta(NamedTuple):
    """The attributes of a file.

    Attributes:
        mode: type and permissions, as in ``st_mode``.
        uid: owner; where it could not be set, the one that was recorded.
        gid: group, likewise.
        size: bytes of a regular file or of a symlink's target, else 0.
        mtime_ns: nanoseconds since the epoch.
        rdev: the device number of a device, else 0.
        target: what a symlink points to.
        xattrs: extended attributes, without OverlayFS's own.
    """

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int = 0
    target: str | None = None
    xattrs: Mapping[str, bytes] = {}

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)


def read_meta(dir_fd: int, name: str, status: os.stat_result, *, recorded: bool = False) -> Meta:
    """The attributes of ``name`` in ``dir_fd``, whose stat is known already.

    Args:
        recorded: the file is in a root where owners that could not be set are recorded (see :data:`OVERRIDE_XATTR`).

    Raises:
        OSError: it cannot be read.
    """
    mode = status.st_mode
    target = os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(mode) else None
    return _meta(status, target, read_xattrs(path_of(dir_fd, name)), recorded)


def read_directory_meta(fd: int, *, recorded: bool = False) -> Meta:
    """The attributes of an open directory."""
    return _meta(os.fstat(fd), None, read_xattrs(fd), recorded)


def _meta(status: os.stat_result, target: str | None, xattrs: dict[str, bytes], recorded: bool) -> Meta:
    mode, uid, gid = status.st_mode, status.st_uid, status.st_gid
    if recorded and uid == os.geteuid() and OVERRIDE_XATTR in xattrs:
        owner = parse_override(xattrs[OVERRIDE_XATTR], mode)
        if owner is not None:
            uid, gid = owner
            del xattrs[OVERRIDE_XATTR]
    return Meta(
        mode,
        uid,
        gid,
        status.st_size if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else 0,
        status.st_mtime_ns,
        status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        target,
        xattrs,
    )


def format_override(uid: int, gid: int, mode: int) -> bytes:
    """The value of OVERRIDE_XATTR."""
    return f"{uid}:{gid}:0{stat.S_IMODE(mode):o}".encode()


def parse_override(value: bytes, mode: int) -> tuple[int, int] | None:
    """Owner and group from OVERRIDE_XATTR; None when it is no such record of a file with this ``st_mode``.

    The permissions in it are not taken: they could be set on the file itself, and a chmod since then changed them only
    there.
    """
    found = _OVERRIDE.fullmatch(value)
    if found is None:
        return None
    uid, gid, recorded = int(found[1]), int(found[2]), int(found[3], 8)
    kind = stat.S_IFMT(mode)
    if uid > _LAST_ID or gid > _LAST_ID or recorded > 0o177777 or stat.S_IFMT(recorded) not in (0, kind):
        return None
    if found[4] is not None and found[4] != _TYPES.get(kind):
        return None
    return uid, gid


def read_xattrs(path: str | int) -> dict[str, bytes]:
    """The extended attributes of a file, without OverlayFS's own; a symlink is not followed.

    The list is asked for first: a file has none mostly, and asking for an absent one costs an exception.
    """
    follow = isinstance(path, int)
    found = {}
    for name in list_xattrs(path):
        if is_marker(name):
            continue
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=follow)
        except OSError as error:
            # ENODATA: removed meanwhile, or listed without being readable (system.nfs4_acl).
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    return found


def list_xattrs(path: str | bytes | int) -> list[str]:
    """The names of a file's extended attributes, each once; a symlink is not followed."""
    try:
        names = os.listxattr(path, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    return [name for name in names if name not in _XFS_ACLS] if names else names


def drop_acls(path: str | int) -> None:
    """Take a directory's ACLs away: those that it inherited, and those that what is made in it would inherit.

    Its mode is to be set afterwards, since the kernel made it from the ACL.
    """
    for name in list_xattrs(path):
        if name in (ACCESS_ACL, DEFAULT_ACL):
            os.removexattr(path, name)
