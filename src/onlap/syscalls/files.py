"""Calls on files that the standard library lacks: openat2, FICLONE, syncfs, renameat2, statfs, a mount's id; a listing.

Sources: openat2(2), ioctl_ficlone(2), syncfs(2), rename(2), statfs(2), statx(2);
include/uapi/linux/{openat2,fs,stat}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import weakref
from typing import BinaryIO

from onlap.syscalls import _libc
from onlap.syscalls._libc import fspath

# openat2(2), how.resolve
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# _IOW(0x94, 9, int), include/uapi/linux/fs.h
FICLONE = 0x40049409

BTRFS = 0x9123683E  # BTRFS_SUPER_MAGIC, linux/magic.h

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

# The kernel's PATH_MAX counts the closing NUL.
_MAX_PATH = 4095
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000  # Linux 6.8
_STATX_MASK_OFFSET = 0  # struct statx: stx_mask, the first 32 bits
_STATX_MNT_ID_OFFSET = 0x90  # struct statx: stx_mnt_id
_STATX_SIZE = 0x100
_STATFS_SIZE = 0x100  # struct statfs is 120 bytes on 64-bit machines, and less on others


class Descriptor:
    """An open file that a thing keeps for as long as it is open itself, and that is closed with it at the latest.

    Args:
        path: what to open.
        flags: of open(2).

    Attributes:
        fd: the descriptor; -1 after :meth:`close`.
    """

    fd = -1

    def __init__(self, path: str, flags: int) -> None:
        self.fd = fd = os.open(path, flags)
        # An interrupt may come before anyone can close it, or end what would. Not __del__, which also runs for closed
        # ones, at any moment, and in which Python drops what a signal handler raises.
        self._forgotten = weakref.finalize(self, os.close, fd)
        self._forgotten.atexit = False

    def close(self) -> None:
        """Close it; idempotent, and never fails."""
        fd = self.fd
        if fd < 0:
            return
        # An interrupt comes as a call begins or ends: all calls are inside this block.
        try:
            self._forgotten.detach()
        finally:
            # Again, if an interrupt kept it: the number is soon another file's, which would be closed then.
            self._forgotten.detach()
            self.fd = -1
            try:
                os.close(fd)
            except OSError:
                pass  # EIO, EINTR: it is closed all the same (close(2))


class _OpenHow(ctypes.Structure):
    """struct open_how (include/uapi/linux/openat2.h), version 0: 24 bytes."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


# openat2(2), EAGAIN: any rename or mount, of any program, while it resolves a ".." below a directory (fs/namei.c,
# handle_dots: rename_lock and mount_lock are the machine's) ends it. The window is a microsecond, so that not even a
# program that does nothing but rename hits it so often in a row.
_AGAIN = 128


def openat2(path: str | bytes, flags: int, *, dir_fd: int, resolve: int) -> int:
    """Open ``path`` under ``dir_fd`` with restrictions on how it may be resolved; close-on-exec.

    Raises:
        OSError: EAGAIN if, each time, there was a rename or a mount on the machine while a ``..`` was resolved.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    arguments = dir_fd, fspath(path), ctypes.byref(how), ctypes.sizeof(how)
    for _ in range(_AGAIN):
        try:
            return _libc.syscall(_libc.OPENAT2, *arguments, path=path)
        except BlockingIOError:
            continue
    return _libc.syscall(_libc.OPENAT2, *arguments, path=path)


def open_beneath(path: str, flags: int, *, dir_fd: int, resolve: int) -> int:
    """Open ``path`` below a directory, however long the path is; none of its components may be a symlink.

    Raises:
        OSError: ELOOP or ENOTDIR if a component is a symlink or a file; otherwise as :func:`openat2`.
    """
    resolve |= RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
    left = os.fsencode(path)
    here = dir_fd
    try:
        while True:
            cut = len(left) if len(left) <= _MAX_PATH else left.rindex(b"/", 0, _MAX_PATH + 1)
            last = cut == len(left)
            below = _open_part(left[:cut], flags if last else _PASS, here, resolve)
            if here != dir_fd:
                os.close(here)
            here, left = below, left[cut + 1 :]
            if last:
                break
    except BaseException:
        if here != dir_fd:
            os.close(here)
        raise
    return here


def _open_part(path: bytes, flags: int, dir_fd: int, resolve: int) -> int:
    try:
        return openat2(path, flags, dir_fd=dir_fd, resolve=resolve)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    # Before Linux 5.6: one component after the other.
    *names, last = path.split(b"/")
    here = dir_fd
    try:
        for name in names:
            below = os.open(name, _PASS, dir_fd=here)
            if here != dir_fd:
                os.close(here)
            here = below
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=here)
    finally:
        if here != dir_fd:
            os.close(here)


# Functions of os.path with these tasks answer no to whatever error: also of a bad disk, and without memory.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def exists(path: str) -> bool:
    """Whether there is anything by that name, also a symlink to nothing; raises OSError when that cannot be told."""
    return _mode(path, follow=False) is not None


def is_directory(path: str, *, follow: bool = True) -> bool:
    """Whether it is a directory, or, unless told otherwise, a symlink to one; raises OSError if that cannot be told."""
    mode = _mode(path, follow=follow)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: str) -> bool:
    """Whether it is a regular file, or a symlink to one; raises OSError when that cannot be told."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: str, *, follow: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise


def list_directory(fd: int) -> list[os.DirEntry[str]]:
    """The current entries of an open directory, unordered.

    Btrfs shows a descriptor only the names that existed when it was opened or last rewound (fs/btrfs/inode.c,
    btrfs_opendir and btrfs_dir_llseek), and all users of a descriptor share its offset.
    """
    os.lseek(fd, 0, os.SEEK_SET)
    with os.scandir(fd) as entries:
        return list(entries)


def names_in(path: str) -> list[str]:
    """The names in a directory, sorted; none if there is no such directory.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        if error.errno in _NOT_THERE:
            return []
        raise


# To open a file of ours to read, whatever is in its place: not through a symlink, nor waiting for a FIFO's writer.
OUR_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_file(path: str) -> BinaryIO:
    """Open a file of ours to read, as :data:`OUR_FILE` does.

    Raises:
        OSError: it cannot be opened.
    """
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | OUR_FILE))


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``: one write(2) may write less, as on a disk that is nearly full."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def clone_file(source_fd: int, target_fd: int) -> None:
    """Make the target share all of the source's blocks (FICLONE); EOPNOTSUPP or EXDEV if that is impossible."""
    import fcntl

    fcntl.ioctl(target_fd, FICLONE, source_fd)


def syncfs(fd: int) -> None:
    """Write the whole filesystem that ``fd`` is on to the disk.

    Since Linux 5.8 it reports write-back errors that happened after ``fd`` was opened.
    """
    _libc.call("syncfs", ctypes.c_int(fd))


def renameat2(source_dir_fd: int, source: str | bytes, target_dir_fd: int, target: str | bytes, flags: int) -> None:
    """renameat2(2)."""
    _libc.call(
        "renameat2",
        ctypes.c_int(source_dir_fd),
        fspath(source),
        ctypes.c_int(target_dir_fd),
        fspath(target),
        ctypes.c_uint(flags),
        path=source,
    )


def filesystem_magic(fd: int) -> int:
    """The type of the filesystem that ``fd`` is on, as a number (statfs(2), ``f_type``; linux/magic.h)."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    _libc.call("fstatfs", ctypes.c_int(fd), buffer)
    # The first member is a long of 32 useful bits; a wider one may repeat their sign.
    kind = int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return kind & 0xFFFFFFFF


def mount_id(fd: int) -> int:
    """The id of the mount that ``fd`` is on, as mountinfo shows it (proc_pid_fdinfo(5), Linux 3.15)."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return next(int(line[len(b"mnt_id:") :]) for line in file if line.startswith(b"mnt_id:"))


def unique_mount_id(fd: int) -> int | None:
    """The id of the mount that ``fd`` is on, never reused until reboot; None before Linux 6.8."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _libc.call(
        "statx",
        ctypes.c_int(fd),
        b"",
        ctypes.c_int(_AT_EMPTY_PATH),
        ctypes.c_uint(_STATX_MNT_ID_UNIQUE),
        buffer,
    )
    mask = int.from_bytes(buffer.raw[_STATX_MASK_OFFSET : _STATX_MASK_OFFSET + 4], sys.byteorder)
    if not mask & _STATX_MNT_ID_UNIQUE:
        return None
    return int.from_bytes(buffer.raw[_STATX_MNT_ID_OFFSET : _STATX_MNT_ID_OFFSET + 8], sys.byteorder)
