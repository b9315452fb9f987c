"""The directory that is merged into, and what is in it, without ever leaving it.

Its directories are opened by openat2(2) relative to its descriptor, through no symlink and into no mount.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack

from onlap.syscalls import files
from onlap.trees.meta import ACCESS_ACL, DEFAULT_ACL, Meta, read_directory_meta, read_meta
from onlap.trees.walk import OPEN_DIRECTORY, open_on_mount
from onlap.workspaces.merge.entries import TOP, Seen

# Without O_NOFOLLOW, with which a symlink at the end is ENOTDIR, like a file; none is followed all the same.
_DIRECTORY = OPEN_DIRECTORY & ~os.O_NOFOLLOW
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

GONE = "its directory is not there any more"
A_FILE = "a file is on its way"
_A_SYMLINK = "a symlink is on its way"
_A_MOUNT = "something is mounted on its way, or on it"
_IN_THE_WAY = {errno.ENOENT: GONE, errno.ENOTDIR: A_FILE, errno.ELOOP: _A_SYMLINK, errno.EXDEV: _A_MOUNT}

# Not by the owner, or not on this filesystem.
_NO_LEASE = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
_SET_ID = stat.S_ISUID | stat.S_ISGID


class Blocked(Exception):
    """A path of the target cannot be reached without leaving it.

    Args:
        reason: what is in the way.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Moving(Exception):
    """A file of the target changes while it is looked at."""


class Target:
    """An open directory that is merged into; a context manager that closes it.

    Args:
        path: the directory; a symlink to it is followed.

    Attributes:
        path: its absolute path, without symlinks.
        fd: its descriptor.
        status: its status.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)
        self._above = ""
        self._directory = -1
        self.fd = os.open(self.path, OPEN_DIRECTORY)
        try:
            self._mount = None if _has_openat2(self.fd) else files.mount_id(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.forget()
        finally:
            os.close(self.fd)

    @property
    def status(self) -> os.stat_result:
        """The directory's own status."""
        return os.fstat(self.fd)

    def named(self, error: OSError, path: str) -> OSError:
        """An error about ``path`` with the name that the caller knows, instead of one of /proc."""
        return OSError(error.errno, error.strerror, os.path.join(self.path, path))

    def forget(self) -> None:
        """Close the directory that was used last."""
        fd, self._directory = self._directory, -1
        if fd >= 0:
            os.close(fd)

    def at(self, path: str) -> tuple[int, str]:
        """A descriptor of the directory that holds ``path``, valid until the next call, and its name there.

        Raises:
            Blocked: there is none, or something else is on the way.
            OSError: it cannot be opened.
        """
        above, _, name = path.rpartition("/")
        if not above:
            return self.fd, name
        if above != self._above or self._directory < 0:
            self.forget()
            try:
                self._directory = files.open_beneath(above, _DIRECTORY, dir_fd=self.fd, resolve=files.RESOLVE_NO_XDEV)
            except OSError as error:
                raise _blocked(error) from error
            self._above = above
            if self._mount is not None and files.mount_id(self._directory) != self._mount:
                self.forget()
                raise Blocked(_A_MOUNT)
        return self._directory, name

    def place(self, path: str) -> int:
        """A descriptor of ``path`` itself, whatever it is, which allows only to look at it (``O_PATH``).

        Raises:
            Blocked: it cannot be reached, or something is mounted there.
            OSError: ENOENT: it is not there.
        """
        if path == TOP:
            return os.dup(self.fd)
        directory, name = self.at(path)
        try:
            return open_on_mount(directory, name, _LOOK)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _blocked(error) from error

    def look(self, path: str) -> Seen | None:
        """What is at ``path``, without its content; None if nothing.

        Raises:
            Blocked: it cannot be reached, or something is mounted there.
            Moving: it changes meanwhile.
            OSError: it cannot be read.
        """
        if path == TOP:
            return Seen(self.status.st_ino, read_directory_meta(self.fd))
        directory, name = self.at(path)
        try:
            fd = self.place(path)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            try:
                meta = read_meta(directory, name, status)
                now = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                raise Moving from None
            except OSError as error:
                if error.errno != errno.EINVAL:  # readlink of what is no symlink any more
                    raise
                raise Moving from error
            if not os.path.samestat(status, now) or status.st_ctime_ns != now.st_ctime_ns:
                raise Moving
            return Seen(status.st_ino, meta)
        finally:
            os.close(fd)

    def digest(self, path: str, seen: Seen, of: Callable[[int], bytes] | None = None) -> bytes:
        """The SHA-256 of a regular file's content.

        Args:
            path: from the top.
            seen: the file.
            of: makes another digest of an open file.

        Raises:
            Blocked: it cannot be reached.
            Moving: it is not the file that was seen, or changes meanwhile.
            OSError: it cannot be read.
        """
        directory, name = self.at(path)
        try:
            fd = open_regular(directory, name, seen.inode)
        except FileNotFoundError:
            raise Moving from None
        try:
            before = os.fstat(fd)
            found = (of or digest)(fd)
            after = os.fstat(fd)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise Moving
            return found
        finally:
            os.close(fd)


def _has_openat2(fd: int) -> bool:
    """Whether the kernel keeps out of mounts by itself: since Linux 5.6."""
    try:
        os.close(files.openat2(".", _LOOK, dir_fd=fd, resolve=files.RESOLVE_BENEATH))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return False
    return True


def open_regular(directory: int, name: str, inode: int) -> int:
    """Open a file to read it if it is still the regular file of this inode; never anything else, such as a FIFO.

    Raises:
        FileNotFoundError: it is another file.
        OSError: it cannot be opened.
    """
    with ExitStack() as on_error:
        with ExitStack() as stack:
            place = open_on_mount(directory, name, _LOOK)
            stack.callback(os.close, place)
            status = os.fstat(place)
            if status.st_ino != inode or not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(errno.ENOENT, "it was replaced meanwhile", name)
            fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
            on_error.callback(os.close, fd)
        on_error.pop_all()
    return fd


def digest(fd: int) -> bytes:
    """The SHA-256 of an open file's content."""
    import hashlib

    with open(fd, "rb", buffering=0, closefd=False) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _blocked(error: OSError) -> Exception:
    reason = _IN_THE_WAY.get(error.errno or 0)
    return error if reason is None else Blocked(reason)


def as_written(meta: Meta) -> Meta:
    """A file's attributes as a merge by this user gives them.

    Only root keeps owners. Otherwise the file is the user's own, and another's set-user-ID bits must not become theirs.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or (meta.uid, meta.gid) == (uid, gid) or stat.S_ISLNK(meta.mode):
        return meta
    mode = meta.mode if meta.is_dir else meta.mode & ~_SET_ID
    return meta._replace(uid=uid, gid=gid, mode=mode)


def alike(one: Meta, other: Meta) -> bool:
    """Whether two files have the same type, mode, size, symlink target, device number and xattrs; and owner, for root.

    Times are not compared.
    """
    if (one.mode, one.rdev, one.target) != (other.mode, other.rdev, other.target):
        return False
    if stat.S_ISREG(one.mode) and one.size != other.size:
        return False
    if os.geteuid() == 0 and (one.uid, one.gid) != (other.uid, other.gid):
        return False
    return own_xattrs(one) == own_xattrs(other)


def own_xattrs(meta: Meta) -> dict[str, bytes]:
    """The xattrs that a merge sets and compares: those that the user could have set.

    A security module gives every file a label of its own, and only root may set others than ``user.*`` and ACLs.
    """
    if os.geteuid() == 0:
        return {name: value for name, value in meta.xattrs.items() if name != "security.selinux"}
    return {
        name: value
        for name, value in meta.xattrs.items()
        if name.startswith("user.") or name in (ACCESS_ACL, DEFAULT_ACL)
    }


def open_for_writing(directory: int, name: str) -> bool:
    """Whether a program has a regular file open for writing, or mapped so; False where the filesystem cannot tell.

    The kernel grants a read lease only when nobody has (fcntl(2), F_SETLEASE).
    """
    import fcntl
    import signal

    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        return False
    try:
        fd = open_regular(directory, name, status.st_ino)
    except PermissionError:
        return False
    try:
        # Not SIGIO, which would end us if somebody opened the file by another name at this moment.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LEASE:
            raise
    finally:
        os.close(fd)
    return False
