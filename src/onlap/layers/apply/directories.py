"""The directories of the layer that is written: opened without ever leaving it, few at a time, times right in the end.

Writing into a directory changes its times, and a directory's mode may forbid writing into it. So each one that is open
remembers what it must have when it is closed; nothing is remembered of the others, however many there are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict

from onlap.layers import paths
from onlap.overlayfs.markers import get_xattr
from onlap.syscalls import files
from onlap.trees.meta import DEFAULT_ACL
from onlap.trees.walk import OPEN_DIRECTORY

_MAX_OPEN = 64
_OWNER = stat.S_IRWXU


class Directory:
    """An open directory of the layer.

    Attributes:
        path: from the layer's top, without symlinks; empty for the top.
        fd: open for reading.
        times: access and modification time in ns that it has in the end; None: as they come.
        mode: permission bits that it gets at the end; None: it has them.
        acl: the default ACL that it gets at the end. Until then it has none, else new files would inherit it.
        plain_group: whether files made in it get this process's own group.
        dirty: whether anything was changed in it.
        pins: how many use it; it is not closed meanwhile.
    """

    __slots__ = ("acl", "dirty", "fd", "mode", "path", "pins", "plain_group", "times")

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.times: tuple[int, int] | None = None
        self.mode: int | None = None
        self.acl: bytes | None = None
        self.plain_group = False
        self.dirty = False
        self.pins = 0

    def status(self, name: str) -> os.stat_result | None:
        """What ``name`` is in it, None where there is no such name; a symlink is not followed."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def hold_acl(self) -> bool:
        """Take the default ACL away until the directory is closed; whether there is one."""
        acl = get_xattr(self.fd, DEFAULT_ACL)
        if acl is None:
            return False
        os.removexattr(self.fd, DEFAULT_ACL)
        self.acl = acl
        self.dirty = True
        return True


class Blocked:
    """The answer that something in the layer, which is not a directory, is in the way."""

    __slots__ = ()


BLOCKED = Blocked()


class Directories:
    """The open directories of a layer.

    Args:
        top: a descriptor of the layer's top directory, open for reading; left open.
        check_acl: whether directories that are there already may have a default ACL.
    """

    def __init__(self, top: int, *, check_acl: bool) -> None:
        self._open: OrderedDict[str, Directory] = OrderedDict()
        self._gid = os.getegid()
        self.check_acl = True
        self.top = self._known(Directory("", top))
        self.check_acl = check_acl or self.top.acl is not None

    def find(self, path: str) -> Directory | Blocked | None:
        """The directory at ``path``, none of whose names may be a symlink.

        Returns:
            None where it does not exist, :data:`BLOCKED` where a name on the way, or the last one, is not a directory.

        Raises:
            OSError: it cannot be opened.
        """
        if not path:
            return self.top
        directory = self._open.get(path)
        if directory is not None:
            self._open.move_to_end(path)
            return directory
        try:
            fd = self._open_fd(path)
        except FileNotFoundError:
            return None
        except PermissionError:
            return self._force(path)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                return BLOCKED
            raise
        return self._add(self._known(Directory(path, fd)))

    def keep_above(self, path: str) -> None:
        """Open the directory that holds ``path``, if that is open: it is one step from there, and many from the top.

        Raises:
            OSError: it cannot be opened.
        """
        above = path.rpartition("/")[0]
        below = self._open.get(path)
        if not above or above in self._open or below is None:
            return
        try:
            fd = os.open("..", OPEN_DIRECTORY, dir_fd=below.fd)
        except PermissionError:
            return  # find() knows what to do
        self._add(self._known(Directory(above, fd)))

    def make(self, parent: Directory, name: str, mode: int) -> Directory:
        """Make and open a directory; its times are as they come, its mode is at most the one given.

        Raises:
            FileExistsError: there is something.
            OSError: it cannot be made.
        """
        os.mkdir(name, mode | _OWNER, dir_fd=parent.fd)
        parent.dirty = True
        directory = Directory(paths.join(parent.path, name), os.open(name, OPEN_DIRECTORY, dir_fd=parent.fd))
        directory.dirty = True
        return self._add(directory)

    def close_below(self, path: str, *, forget: bool = False) -> None:
        """Close ``path`` and all below it; with ``forget`` their attributes do not matter any more."""
        for key in [key for key in self._open if paths.is_below(key, path)]:
            self._close(self._open.pop(key), forget=forget)

    def close(self, *, forget: bool = False) -> None:
        """Close all but the top, and give them their attributes; with ``forget`` as far as can be."""
        suppressed = (OSError,) if forget else ()
        try:
            while self._open:
                _, directory = self._open.popitem()
                with contextlib.suppress(*suppressed):
                    self._close(directory)
            with contextlib.suppress(*suppressed):
                settle(self.top)
        finally:
            for directory in self._open.values():
                os.close(directory.fd)
            self._open.clear()

    def _known(self, directory: Directory) -> Directory:
        """Note what a directory that existed before has, so that it has it again in the end."""
        status = os.fstat(directory.fd)
        directory.times = (status.st_atime_ns, status.st_mtime_ns)
        directory.plain_group = status.st_gid == self._gid
        if not status.st_mode & stat.S_IWUSR or not status.st_mode & stat.S_IXUSR:
            self._open_up(directory, status)
        if self.check_acl:
            directory.hold_acl()
        return directory

    def _open_up(self, directory: Directory, status: os.stat_result) -> None:
        if os.geteuid() == 0:
            return
        directory.mode = stat.S_IMODE(status.st_mode)
        directory.dirty = True
        os.chmod(directory.fd, directory.mode | _OWNER)

    def _add(self, directory: Directory) -> Directory:
        self._open[directory.path] = directory
        if len(self._open) > _MAX_OPEN:
            for path, oldest in self._open.items():
                if not oldest.pins and oldest is not directory:
                    del self._open[path]
                    self._close(oldest)
                    break
        return directory

    def _close(self, directory: Directory, *, forget: bool = False) -> None:
        try:
            if not forget:
                settle(directory)
        finally:
            os.close(directory.fd)

    def _open_fd(self, path: str) -> int:
        above, _, name = path.rpartition("/")
        parent = self._open.get(above, self.top)
        return files.open_beneath(
            name if parent.path == above else path, OPEN_DIRECTORY, dir_fd=parent.fd, resolve=files.RESOLVE_NO_XDEV
        )

    def _force(self, path: str) -> Directory | Blocked | None:
        """Open a directory though the modes on the way forbid it: its owner may change them, and puts them back."""
        directory = self.top
        for name in path.split("/"):
            here = paths.join(directory.path, name)
            known = self._open.get(here)
            if known is None:
                try:
                    known = self._add(self._forced(directory, here, name))
                except FileNotFoundError:
                    return None
                except NotADirectoryError:
                    return BLOCKED
            directory = known
        return directory

    def _forced(self, parent: Directory, path: str, name: str) -> Directory:
        try:
            return self._known(Directory(path, os.open(name, OPEN_DIRECTORY, dir_fd=parent.fd)))
        except PermissionError:
            fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd)
        try:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            os.chmod(f"/proc/self/fd/{fd}", mode | _OWNER)
        finally:
            os.close(fd)
        directory = self._known(Directory(path, os.open(name, OPEN_DIRECTORY, dir_fd=parent.fd)))
        directory.mode = mode
        directory.dirty = True
        return directory


def settle(directory: Directory) -> None:
    """Give a directory the attributes that it must have in the end."""
    if not directory.dirty:
        return
    if directory.acl is not None:
        os.setxattr(directory.fd, DEFAULT_ACL, directory.acl)
    if directory.mode is not None:
        os.chmod(directory.fd, directory.mode)
    if directory.times is not None:
        os.utime(directory.fd, ns=directory.times)
