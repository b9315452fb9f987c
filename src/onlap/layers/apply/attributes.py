"""Giving files the owners, modes and xattrs that an archive says, as far as this process may; the rest is counted."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter

from onlap.errors import shown
from onlap.layers.apply.directories import Directory
from onlap.layers.format.tar import Entry
from onlap.overlayfs.markers import is_marker
from onlap.trees.meta import ACCESS_ACL, DEFAULT_ACL, OVERRIDE_XATTR, format_override, list_xattrs

# xattr(7): XATTR_NAME_MAX, XATTR_SIZE_MAX
_MAX_XATTR_NAME = 255
_MAX_XATTR_VALUE = 65536
_NO_XATTR = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)

IMPLICIT_MODE = 0o755


class Attributes:
    """What this process may set, and what it could not.

    Args:
        recorded: record the owner that could not be set (see :data:`~onlap.trees.meta.OVERRIDE_XATTR`). Then no archive
            may bring such a record; else it is an xattr like any other.

    Attributes:
        uid: the owner of what this process makes.
        gid: its group.
        umask: the bits that the kernel takes away from what this process makes.
        skipped: how often each kind could not be kept: ``owner`` (recorded in an xattr where the file can have one),
            ``xattr``, ``acl`` (in a text form), ``device``.
    """

    def __init__(self, *, recorded: bool) -> None:
        self._recorded = recorded
        self.uid = os.geteuid()
        self.gid = os.getegid()
        self.umask = _umask()
        self.skipped: Counter[str] = Counter()
        # Without privilege chown(2) can at most choose among the user's groups: the owner is recorded instead.
        self.may_chown = self.uid == 0

    def chown(self, fd: int, entry: Entry) -> None:
        """Give an open file or directory its owner, which is not this process."""
        if self.may_chown:
            try:
                os.chown(fd, entry.uid, entry.gid)
            except OSError as error:
                self._refused(error)
            else:
                return
        self.skipped["owner"] += 1
        if not self._recorded:
            return
        try:
            os.setxattr(fd, OVERRIDE_XATTR, format_override(entry.uid, entry.gid, entry.mode))
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise

    def chown_at(self, directory: Directory, name: str, entry: Entry) -> None:
        """The same for what is not opened: a symlink, a device, a FIFO. They take no ``user.`` xattr."""
        if self.may_chown:
            try:
                os.chown(name, entry.uid, entry.gid, dir_fd=directory.fd, follow_symlinks=False)
            except OSError as error:
                self._refused(error)
            else:
                return
        self.skipped["owner"] += 1

    def _refused(self, error: OSError) -> None:
        if error.errno == errno.EPERM:
            self.may_chown = False
        elif error.errno != errno.EINVAL:  # EINVAL: this id is outside the map of the user namespace
            raise error

    def is_own(self, entry: Entry) -> bool:
        """Whether an entry's owner is that of what this process makes."""
        return entry.uid == self.uid and entry.gid == self.gid

    def set_xattrs(self, target: int | str, entry: Entry) -> None:
        """Set an entry's xattrs, but for those that must not come from an archive.

        Args:
            target: a descriptor, or a path through ``/proc/self/fd`` to what is not a symlink to follow.

        Raises:
            ValueError: an xattr has an impossible name or value.
            OSError: it cannot be set for another reason than that it must not.
        """
        for name, value in (entry.xattrs or {}).items():
            if not name or len(os.fsencode(name)) > _MAX_XATTR_NAME or "\0" in name:
                raise ValueError(f"an xattr has an impossible name: {shown(name)}")
            if len(value) > _MAX_XATTR_VALUE:
                raise ValueError(
                    f"the xattr {shown(name)} has {len(value)} bytes, and the kernel takes {_MAX_XATTR_VALUE}"
                )
            if not self._is_safe(name):
                self.skipped["xattr"] += 1
                continue
            try:
                if isinstance(target, int):
                    os.setxattr(target, name, value)
                else:
                    os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise ValueError(f"the kernel refuses the value of its xattr {shown(name)}") from error
                if error.errno not in _NO_XATTR:
                    raise
                self.skipped["xattr"] += 1

    def _is_safe(self, name: str) -> bool:
        """Whether an xattr may come from an archive: not what steers OverlayFS, or Onlap's own record of owners."""
        if name.startswith("user."):
            return not is_marker(name) and not (self._recorded and name == OVERRIDE_XATTR)
        return name.startswith("security.") or name in (ACCESS_ACL, DEFAULT_ACL)

    def set_directory(self, directory: Directory, entry: Entry, *, fresh: bool, own: bool = False) -> None:
        """Give a directory the attributes of an entry; its times, and what would be in our way, when it is closed.

        Args:
            fresh: it was just made, and has no attributes that must go.
            own: it surely has this process's owner and group.
        """
        fd = directory.fd
        directory.dirty = True
        if not fresh:
            self.clear_xattrs(directory)
        if not self.is_own(entry):
            self.chown(fd, entry)
        elif not own:
            os.chown(fd, entry.uid, entry.gid)
        directory.acl = None
        if entry.xattrs:
            self.set_xattrs(fd, entry)
            if DEFAULT_ACL in entry.xattrs:
                directory.hold_acl()
        directory.plain_group = entry.gid == self.gid
        mode = entry.mode
        if self.uid and mode & stat.S_IRWXU != stat.S_IRWXU:
            directory.mode = mode
            mode |= stat.S_IRWXU
        else:
            directory.mode = None
        os.chmod(fd, mode)
        atime = entry.mtime_ns if entry.atime_ns is None else entry.atime_ns
        directory.times = (atime, entry.mtime_ns)

    def reset_directory(self, directory: Directory) -> None:
        """Make a directory as one that nobody described: root's, 0755, without xattrs, with the time of its making."""
        self.set_directory(directory, Entry("", mode=IMPLICIT_MODE), fresh=False)
        directory.times = None

    def clear_xattrs(self, directory: Directory) -> None:
        """Remove all xattrs of a directory but OverlayFS's own."""
        for name in list_xattrs(directory.fd):
            if not is_marker(name) and not name.startswith("security.selinux"):
                _remove_xattr(directory.fd, name)
        directory.acl = None


def _remove_xattr(fd: int, name: str) -> None:
    try:
        os.removexattr(fd, name)
    except OSError as error:
        if error.errno not in (errno.ENODATA, *_NO_XATTR):
            raise


def _umask() -> int:
    """This process's umask; os.umask() would change it for a moment, for all threads."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777  # before Linux 4.7: nothing is known, so every mode is set
