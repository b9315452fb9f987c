"""The directories of the layer being written: opened without ever leaving it, a few at a time, with correct times.

Writing into a directory changes its times, and its mode may forbid writing. So each open directory remembers the
attributes that it must have when it is closed; nothing is kept about the others, however many there are.
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
        times: its final access and modification time in ns; None: whatever they are then.
        mode: its final permission bits; None: it has them already.
        acl: its final default ACL. Until then it has none, since new files would inherit it.
        own_group: whether new files in it get this process's own group.
        dirty: whether anything in it was changed.
        pins: how many callers use it; it is not closed meanwhile.
    """

    __slots__ = ("acl", "dirty", "fd", "mode", "own_group", "path", "pins", "times")

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.times: tuple[int, int] | None = None
        self.mode: int | None = None
        self.acl: bytes | None = None
        self.own_group = False
        self.dirty = False
        self.pins = 0

    def status(self, name: str) -> os.stat_result | None:
        """The status of ``name`` in it; None if it does not exist. A symlink is not followed."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def hold_acl(self) -> bool:
        """Remove the default ACL until the directory is closed; return whether there is one."""
        acl = get_xattr(self.fd, DEFAULT_ACL)
        if acl is None:
            return False
        os.removexattr(self.fd, DEFAULT_ACL)
        self.acl = acl
        self.dirty = True
        return True

    def settle(self) -> None:
        """Set its final attributes."""
        if not self.dirty:
            return
        if self.acl is not None:
            os.setxattr(self.fd, DEFAULT_ACL, self.acl)
        if self.mode is not None:
            os.chmod(self.fd, self.mode)
        if self.times is not None:
            os.utime(self.fd, ns=self.times)


class Blocked:
    """The result if a name on the path is not a directory in the layer."""

    __slots__ = ()


BLOCKED = Blocked()


class Directories:
    """The open directories of a layer.

    Args:
        top: a descriptor of the layer's top directory, open for reading; left open.
        check_acl: whether existing directories may have a default ACL.
    """

    def __init__(self, top: int, *, check_acl: bool) -> None:
        self._open: OrderedDict[str, Directory] = OrderedDict()
        self._gid = os.getegid()
        self.check_acl = True
        self.top = self._existing("", top)
        self.check_acl = check_acl or self.top.acl is not None

    def find(self, path: str) -> Directory | Blocked | None:
        """The directory at ``path``, none of whose names may be a symlink.

        Returns:
            None if it does not exist, :data:`BLOCKED` if any of its names is not a directory.

        Raises:
            OSError: it cannot be opened.
        """
        if not path:
            return self.top
        directory = self._open.get(path)
        if directory is not None:
            self._open.move_to_end(path)
            return directory
        above, _, name = path.rpartition("/")
        parent = self._open.get(above, self.top)
        try:
            fd = files.open_beneath(
                name if parent.path == above else path, OPEN_DIRECTORY, dir_fd=parent.fd, resolve=files.RESOLVE_NO_XDEV
            )
        except FileNotFoundError:
            return None
        except PermissionError:
            return self._force(path)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                return BLOCKED
            raise
        return self._add(self._existing(path, fd))

    def keep_above(self, path: str) -> None:
        """If ``path`` is open, open its parent: it is one step from there, and may be many from the top.

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
            return  # left to find()
        self._add(self._existing(above, fd))

    def make(self, parent: Directory, name: str, mode: int) -> Directory:
        """Make and open a directory; its mode is at most the given one, its times are not set.

        Raises:
            FileExistsError: the name exists.
            OSError: it cannot be made.
        """
        os.mkdir(name, mode | _OWNER, dir_fd=parent.fd)
        parent.dirty = True
        directory = Directory(paths.join(parent.path, name), os.open(name, OPEN_DIRECTORY, dir_fd=parent.fd))
        directory.dirty = True
        return self._add(directory)

    def close_below(self, path: str, *, forget: bool = False) -> None:
        """Close ``path`` and everything below it; with ``forget``, without setting their attributes."""
        for key in [key for key in self._open if paths.is_below(key, path)]:
            self._close(self._open.pop(key), forget=forget)

    def close(self, *, ignore_errors: bool = False) -> None:
        """Close all but the top, and set all attributes."""
        suppressed = (OSError,) if ignore_errors else ()
        try:
            while self._open:
                _, directory = self._open.popitem()
                with contextlib.suppress(*suppressed):
                    self._close(directory)
            with contextlib.suppress(*suppressed):
                self.top.settle()
        finally:
            for directory in self._open.values():
                os.close(directory.fd)
            self._open.clear()

    def _existing(self, path: str, fd: int) -> Directory:
        """A directory that existed before, whose attributes are to be restored at the end; closed on an error."""
        directory = Directory(path, fd)
        try:
            status = os.fstat(fd)
            directory.times = (status.st_atime_ns, status.st_mtime_ns)
            directory.own_group = status.st_gid == self._gid
            if (not status.st_mode & stat.S_IWUSR or not status.st_mode & stat.S_IXUSR) and os.geteuid() != 0:
                directory.mode = stat.S_IMODE(status.st_mode)
                directory.dirty = True
                os.chmod(fd, directory.mode | _OWNER)
            if self.check_acl:
                directory.hold_acl()
        except BaseException:
            if path:  # the top is the caller's
                os.close(fd)
            raise
        return directory

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
                directory.settle()
        finally:
            os.close(directory.fd)

    def _force(self, path: str) -> Directory | Blocked | None:
        """Open a directory although modes on the path forbid it: their owner may change and later restore them."""
        directory = self.top
        for name in path.split("/"):
            here = paths.join(directory.path, name)
            known = self._open.get(here)
            if known is None:
                try:
                    known = self._add(self._force_one(directory, here, name))
                except FileNotFoundError:
                    return None
                except NotADirectoryError:
                    return BLOCKED
            directory = known
        return directory

    def _force_one(self, parent: Directory, path: str, name: str) -> Directory:
        try:
            return self._existing(path, os.open(name, OPEN_DIRECTORY, dir_fd=parent.fd))
        except PermissionError:
            fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd)
        try:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            os.chmod(f"/proc/self/fd/{fd}", mode | _OWNER)
        finally:
            os.close(fd)
        directory = self._existing(path, os.open(name, OPEN_DIRECTORY, dir_fd=parent.fd))
        directory.mode = mode
        directory.dirty = True
        return directory
