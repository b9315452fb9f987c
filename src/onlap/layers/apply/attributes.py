"""Setting the owners, modes and xattrs in an archive, as far as this process may; what it may not is counted."""

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
    """Sets attributes, and counts those that it could not.

    Args:
        recorded: record owners that cannot be set (see :data:`~onlap.trees.meta.OVERRIDE_XATTR`). Then no archive may
            contain such a record; otherwise it is an ordinary xattr.

    Attributes:
        uid: the owner of this process's new files.
        gid: their group.
        umask: the bits that the kernel clears in their modes.
        skipped: how often each kind could not be kept: ``owner`` (recorded in an xattr where the file can have one),
            ``xattr``, ``acl`` (in a text form), ``device``.
    """

    def __init__(self, *, recorded: bool) -> None:
        self._recorded = recorded
        self.uid = os.geteuid()
        self.gid = os.getegid()
        self.umask = _umask()
        self.skipped: Counter[str] = Counter()
        # Without privilege, chown(2) can at most choose among the user's groups, so the owner is recorded instead.
        self.may_chown = self.uid == 0

    def chown(self, file: int | str, entry: Entry, *, dir_fd: int | None = None) -> None:
        """Give a file its owner, which is not this process.

        Args:
            file: a descriptor; or in ``dir_fd``, the name of a symlink, a device or a FIFO, which can have no ``user.``
                xattr.
            entry: has the owner.
            dir_fd: the directory of a name.
        """
        if self.may_chown:
            try:
                os.chown(file, entry.uid, entry.gid, dir_fd=dir_fd, follow_symlinks=dir_fd is None)
            except OSError as error:
                if error.errno == errno.EPERM:
                    self.may_chown = False
                elif error.errno != errno.EINVAL:  # EINVAL: this id is outside the map of the user namespace
                    raise
            else:
                return
        self.skipped["owner"] += 1
        if not self._recorded or dir_fd is not None:
            return
        try:
            os.setxattr(file, OVERRIDE_XATTR, format_override(entry.uid, entry.gid, entry.mode))
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise

    def is_own(self, entry: Entry) -> bool:
        """Whether an entry's owner is that of this process's new files."""
        return entry.uid == self.uid and entry.gid == self.gid

    def set_xattrs(self, target: int | str, entry: Entry) -> None:
        """Set an entry's xattrs, except those that must not come from an archive.

        Args:
            target: a descriptor, or a path through ``/proc/self/fd``; a symlink is not followed.
            entry: has the xattrs.

        Raises:
            ValueError: an xattr has an impossible name or value.
            OSError: an xattr cannot be set, and not because it is not permitted or supported.
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
                os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise ValueError(f"the kernel refuses the value of its xattr {shown(name)}") from error
                if error.errno not in _NO_XATTR:
                    raise
                self.skipped["xattr"] += 1

    def _is_safe(self, name: str) -> bool:
        """Whether an xattr may come from an archive: not OverlayFS's markers, nor Onlap's own record of owners."""
        if name.startswith("user."):
            return not is_marker(name) and not (self._recorded and name == OVERRIDE_XATTR)
        return name.startswith("security.") or name in (ACCESS_ACL, DEFAULT_ACL)

    def set_directory(self, directory: Directory, entry: Entry, *, fresh: bool, own: bool = False) -> None:
        """Give a directory the attributes of an entry; its times, and what would hinder us, when it is closed.

        Args:
            directory: the directory.
            entry: has the attributes.
            fresh: it was just made, and has no xattrs to remove.
            own: it is known to have this process's owner and group.
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
        directory.own_group = entry.gid == self.gid
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
        """Give a directory the attributes of one that no archive describes: root's, 0755, without xattrs or times."""
        self.set_directory(directory, Entry("", mode=IMPLICIT_MODE), fresh=False)
        directory.times = None

    def clear_xattrs(self, directory: Directory) -> None:
        """Remove all xattrs of a directory except OverlayFS's own."""
        for name in list_xattrs(directory.fd):
            if is_marker(name) or name.startswith("security.selinux"):
                continue
            try:
                os.removexattr(directory.fd, name)
            except OSError as error:
                if error.errno not in (errno.ENODATA, *_NO_XATTR):
                    raise
        directory.acl = None


def _umask() -> int:
    """This process's umask; os.umask() would briefly change it for all threads."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777  # before Linux 4.7 it is unknown, so every mode is set
