"""A small tree of files kept in memory, to be put in its place again and again."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from typing import NamedTuple

_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class _Entry(NamedTuple):
    path: str
    status: os.stat_result
    content: bytes | str
    xattrs: dict[str, bytes]
    link: str | None


class Copy:
    """What is below a directory, which nobody uses while it is read or restored.

    Args:
        place: the directory.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._entries: list[_Entry] = []
        known: dict[int, str] = {}
        for directory, subdirectories, files in os.walk(place):
            subdirectories.sort()
            links = [name for name in subdirectories if os.path.islink(f"{directory}/{name}")]
            paths = [directory, *(f"{directory}/{name}" for name in sorted([*files, *links]))]
            for path in paths:
                status = os.lstat(path)
                link = known.setdefault(status.st_ino, path) if not stat.S_ISDIR(status.st_mode) else path
                content: bytes | str = b""
                if stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as file:
                        content = file.read()
                elif stat.S_ISLNK(status.st_mode):
                    content = os.readlink(path)
                names = os.listxattr(path, follow_symlinks=False)
                xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
                self._entries.append(_Entry(path, status, content, xattrs, None if link == path else link))

    def restore(self) -> None:
        """Make the directory what it was; mounts below it go."""
        unmount_below(self._place)
        if os.path.lexists(self._place):
            shutil.rmtree(self._place)
        for path, status, content, xattrs, link in self._entries:
            mode = status.st_mode
            if link is not None:
                os.link(link, path, follow_symlinks=False)
                continue
            if stat.S_ISDIR(mode):
                os.mkdir(path)
            elif stat.S_ISLNK(mode):
                os.symlink(content, path)
            elif stat.S_ISREG(mode):
                assert isinstance(content, bytes)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.write(fd, content)
                os.close(fd)
            else:
                os.mknod(path, mode, status.st_rdev)
            os.lchown(path, status.st_uid, status.st_gid)
            if not stat.S_ISLNK(mode):
                os.chmod(path, stat.S_IMODE(mode))
            for name, value in xattrs.items():
                os.setxattr(path, name, value, follow_symlinks=False)
        for path, status, *_ in reversed(self._entries):  # directories after what is in them
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def unmount_below(place: str) -> None:
    """Take away what is mounted below a directory."""
    for path in reversed(mounts_below(place)):
        _libc.umount2(os.fsencode(path), _MNT_DETACH)


def mounts_below(place: str) -> list[str]:
    """The mount points below a directory, in the order in which they were mounted."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        paths = [line.split(" ", 5)[4] for line in file]
    return [path for path in paths if path.startswith(f"{place}/")]


# File handles: which inode there is below, or that there is one. They differ from run to run.
_HANDLES = ("overlay.origin", "overlay.impure", "overlay.uuid", "overlay.nlink")


def contents(place: str, *, times: bool = False) -> dict[str, object]:
    """All of a tree but its times: of each path its type, mode, owner, xattrs and content.

    Args:
        place: the tree.
        times: when files were written, too; not directories, in which others put files.
    """
    found: dict[str, object] = {}
    for path in sorted(_paths(place)):
        status = os.lstat(path)
        content: object = None
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                content = file.read().hex()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False).hex()
            for name in os.listxattr(path, follow_symlinks=False)
            if not name.endswith(_HANDLES)
        }
        links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        found[path.removeprefix(place) or "/"] = [
            status.st_mode, status.st_uid, status.st_gid, status.st_rdev, links, xattrs, content,
            status.st_mtime_ns if times and not stat.S_ISDIR(status.st_mode) else 0,
        ]  # fmt: skip
    return found


def _paths(place: str) -> list[str]:
    found = []
    for directory, subdirectories, files in os.walk(place):
        found.append(directory)
        found += [f"{directory}/{name}" for name in files]
        found += [f"{directory}/{name}" for name in subdirectories if os.path.islink(f"{directory}/{name}")]
    return found
