"""The attributes of a file: everything but its name and content."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from typing import NamedTuple

from onlap.overlayfs.markers import is_marker
from onlap.trees.walk import path_of

# How containers/storage records the owner of a file whose owner cannot be set: "uid:gid:0mode", in newer versions
# followed by ":type" (pkg/idtools, ContainersOverrideXattr); fuse-overlayfs has the type in the mode. Onlap uses the
# same name and form, so that their tools understand it.
#
# Whoever may write to a file may set it. So it is trusted only in roots of users who cannot change owners, where Onlap
# itself writes it, and only on their own files, since it is written only on those. Anywhere else it is an ordinary
# xattr: otherwise a user could make the layers of root's store claim that a file of theirs is root's.
OVERRIDE_XATTR = "user.containers.override_stat"

# Compiled at its first use, which keeps the start of the command cheap.
_OVERRIDE = rb"([0-9]{1,10}):([0-9]{1,10}):([0-7]{1,7})(?::([a-z]+)(?:-[0-9]+-[0-9]+)?)?"
# What containers/storage calls the types of files that can have the xattr: the kernel allows user.* only on these
# (xattr(7)), so that its devices and sockets are empty files, whose records are not owners of ours.
_TYPES = {stat.S_IFREG: b"file", stat.S_IFDIR: b"dir"}
# (uid_t) -1 is not a user (chown(2)).
_LAST_ID = 2**32 - 2

ACCESS_ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
# Xfs lists ACLs twice, also by their names on disk (fs/xfs/xfs_xattr.c, xfs_xattr_put_listent).
_XFS_ACLS = ("trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT")


class Meta(NamedTuple):
    """The attributes of a file.

    Attributes:
        mode: type and permissions, as in ``st_mode``.
        uid: owner; the recorded one if it could not be set.
        gid: group, likewise.
        size: bytes of a regular file or of a symlink's target, otherwise 0.
        mtime_ns: nanoseconds since the epoch.
        rdev: the device number of a device, otherwise 0.
        target: the target of a symlink.
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
    """The attributes of ``name`` in ``dir_fd``, whose status is known.

    Args:
        recorded: whether the file's root records owners that could not be set (see :data:`OVERRIDE_XATTR`).

    Raises:
        OSError: it cannot be read.
    """
    mode = status.st_mode
    target = os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(mode) else None
    return _meta(status, target, read_xattrs(path_of(dir_fd, name)), recorded)


def read_open_meta(fd: int, status: os.stat_result, *, recorded: bool = False) -> tuple[Meta, bool]:
    """The attributes of an open regular file whose status is known, and whether it has xattrs of OverlayFS's own.

    By a descriptor the xattrs take a tenth of the time that a name takes, which leads through /proc.
    """
    found = read_xattrs(fd, markers=True)
    xattrs = {name: value for name, value in found.items() if not is_marker(name)}
    is_marked = len(xattrs) < len(found)
    return _meta(status, None, xattrs, recorded), is_marked


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
    """Owner and group from OVERRIDE_XATTR; None if the value is not such a record for a file with this ``st_mode``.

    The recorded permissions are ignored: they could be set on the file itself, and a later chmod changed only those.
    """
    found = re.fullmatch(_OVERRIDE, value)
    if found is None:
        return None
    uid, gid, recorded = int(found[1]), int(found[2]), int(found[3], 8)
    kind = stat.S_IFMT(mode)
    if uid > _LAST_ID or gid > _LAST_ID or recorded > 0o177777 or stat.S_IFMT(recorded) not in (0, kind):
        return None
    if found[4] is not None and found[4] != _TYPES.get(kind):
        return None
    return uid, gid


def read_xattrs(path: str | int, *, markers: bool = False) -> dict[str, bytes]:
    """The extended attributes of a file; a symlink is not followed.

    The names are listed first: most files have none, and reading a missing one costs an exception.

    Args:
        path: a path or a descriptor.
        markers: include OverlayFS's own.
    """
    follow = isinstance(path, int)
    found = {}
    for name in list_xattrs(path):
        if not markers and is_marker(name):
            continue
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=follow)
        except OSError as error:
            # ENODATA: removed meanwhile, or listed without being readable (system.nfs4_acl).
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    return found


def list_xattrs(path: str | bytes | int, *, follow: bool = False) -> list[str]:
    """The names of a file's extended attributes, without duplicates; a symlink is followed only if that is asked."""
    try:
        names = os.listxattr(path, follow_symlinks=follow or isinstance(path, int))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    return [name for name in names if name not in _XFS_ACLS] if names else names


def drop_acls(path: str | int) -> None:
    """Remove a directory's ACLs: the one that it inherited, and the default one that new files would inherit.

    Set its mode afterwards, since the kernel derived it from the ACL.
    """
    for name in list_xattrs(path):
        if name in (ACCESS_ACL, DEFAULT_ACL):
            os.removexattr(path, name)
