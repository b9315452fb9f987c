"""mount(2), umount2(2) and the mount API of Linux 5.2: fsopen, fsconfig, fsmount, move_mount, open_tree, mount_setattr.

Sources: mount(2), fsopen(2), fsconfig(2), fsmount(2), move_mount(2), open_tree(2), mount_setattr(2);
include/uapi/linux/mount.h.
"""

from __future__ import annotations

import ctypes
import os

from onlap.syscalls import _libc
from onlap.syscalls._libc import fspath

Path = str | bytes | os.PathLike[str]

# mount(2), flags
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

# umount2(2)
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

# fsopen(2), fsconfig(2), fsmount(2)
FSOPEN_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 1

# fsmount(2) and mount_setattr(2)
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR__ATIME = 0x70  # the bits of NOATIME and STRICTATIME, which are one field
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000

# open_tree(2), move_mount(2)
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000


def mount(source: str | bytes, target: Path, fstype: str | None, flags: int, data: bytes | None) -> None:
    """mount(2). The kernel *silently truncates* ``data`` of more than a page: the caller checks its length."""
    _libc.call(
        "mount",
        fspath(source),
        fspath(target),
        fspath(fstype) if fstype is not None else None,
        ctypes.c_ulong(flags),
        data,
        path=target,
    )


def umount2(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    _libc.call("umount2", fspath(target), ctypes.c_int(flags), path=target)


def fsopen(fstype: str) -> int:
    """A file descriptor for configuring a new superblock of ``fstype``."""
    return _libc.syscall(_libc.FSOPEN, fspath(fstype), FSOPEN_CLOEXEC, path=fstype)


def fsconfig_string(fs: int, key: str, value: str | bytes) -> None:
    """Set an option to a string of at most 255 bytes; the kernel refuses more with EINVAL."""
    encoded = fspath(value)
    _libc.syscall(_libc.FSCONFIG, fs, FSCONFIG_SET_STRING, key.encode(), encoded, 0, path=value)


def fsconfig_fd(fs: int, key: str, fd: int) -> None:
    """Set an option to an open directory."""
    _libc.syscall(_libc.FSCONFIG, fs, FSCONFIG_SET_FD, key.encode(), None, fd)


def fsconfig_flag(fs: int, key: str) -> None:
    """Set an option without a value."""
    _libc.syscall(_libc.FSCONFIG, fs, FSCONFIG_SET_FLAG, key.encode(), None, 0, path=key)


def fsconfig_create(fs: int) -> None:
    """Create the configured superblock."""
    _libc.syscall(_libc.FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(fs: int, attributes: int = 0) -> int:
    """A detached mount of the superblock, as a file descriptor of its root; unmounted when the last one closes."""
    return _libc.syscall(_libc.FSMOUNT, fs, FSMOUNT_CLOEXEC, attributes)


def fs_context_log(fs: int) -> str:
    """The kernel's messages about a failed configuration, joined; empty if there are none."""
    messages: list[str] = []
    while True:
        try:
            message = os.read(fs, 1024)
        except OSError:  # ENODATA: the log is empty; EINVAL before Linux 5.2: there is none
            return "; ".join(messages)
        # "e overlay: text": the first letter is the level (error, warning, info).
        messages.append(message.decode("utf-8", "replace").strip()[2:])


def clone_mount(mount_fd: int) -> int:
    """Another detached mount of what a detached mount shows; EINVAL before Linux 6.15."""
    return _libc.syscall(_libc.OPEN_TREE, mount_fd, b"", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH)


def pivot_root(new_root: Path, put_old: Path) -> None:
    """pivot_root(2)."""
    _libc.call("pivot_root", fspath(new_root), fspath(put_old), path=new_root)


def move_mount(mount_fd: int, target: Path) -> None:
    """Attach a detached mount at ``target``."""
    _libc.syscall(_libc.MOVE_MOUNT, mount_fd, b"", AT_FDCWD, fspath(target), MOVE_MOUNT_F_EMPTY_PATH, path=target)


def open_tree(path: Path, *, recursive: bool = False) -> int:
    """A detached bind mount of ``path``."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    return _libc.syscall(_libc.OPEN_TREE, AT_FDCWD, fspath(path), flags, path=path)


class _MountAttr(ctypes.Structure):
    """struct mount_attr (include/uapi/linux/mount.h), version 0: 32 bytes."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(fd: int, *, set_attributes: int, userns_fd: int = 0, recursive: bool = False) -> None:
    """Change the attributes of the mount that ``fd`` is the root of (Linux 5.12)."""
    # EINVAL if a new atime setting does not clear the old one.
    cleared = MOUNT_ATTR__ATIME if set_attributes & MOUNT_ATTR__ATIME else 0
    attributes = _MountAttr(set_attributes, cleared, 0, userns_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _libc.syscall(_libc.MOUNT_SETATTR, fd, b"", flags, ctypes.byref(attributes), ctypes.sizeof(attributes))
