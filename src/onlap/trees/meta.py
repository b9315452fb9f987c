"""What a file is, apart from its name and content."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

from onlap.overlayfs.markers import is_marker
from onlap.trees.walk import path_of

# How containers/storage records, on a file whose owner could not be set, what it should be: "uid:gid:0mode"
# (pkg/idtools, ContainersOverrideXattr). Kept in the same place and form, so that its tools understand it.
OVERRIDE_XATTR = "user.containers.override_stat"


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


def read_meta(dir_fd: int, name: str, status: os.stat_result) -> Meta:
    """The attributes of ``name`` in ``dir_fd``, whose stat is known already.

    Raises:
        OSError: it cannot be read.
    """
    mode = status.st_mode
    target = os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(mode) else None
    return _meta(status, target, read_xattrs(path_of(dir_fd, name)))


def read_directory_meta(fd: int) -> Meta:
    """The attributes of an open directory."""
    return _meta(os.fstat(fd), None, read_xattrs(fd))


def _meta(status: os.stat_result, target: str | None, xattrs: dict[str, bytes]) -> Meta:
    mode, uid, gid = status.st_mode, status.st_uid, status.st_gid
    override = xattrs.pop(OVERRIDE_XATTR, None)
    if override is not None:
        uid, gid = parse_override(override)
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


def parse_override(value: bytes) -> tuple[int, int]:
    """Owner and group from OVERRIDE_XATTR.

    The mode in it is not taken: it could be set on the file itself, and a chmod since then changed it only there.

    Raises:
        ValueError: it has another form.
    """
    uid, gid = value.split(b":")[:2]
    return int(uid), int(gid)


def read_xattrs(path: str | int) -> dict[str, bytes]:
    """The extended attributes of a file, without OverlayFS's own; a symlink is not followed.

    The list is asked for first: a file has none mostly, and asking for an absent one costs an exception.
    """
    follow = isinstance(path, int)
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise
    found = {}
    for name in names:
        if is_marker(name):
            continue
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=follow)
        except OSError as error:
            # ENODATA: removed meanwhile, or listed without being readable (system.nfs4_acl).
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    return found
