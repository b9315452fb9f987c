"""Whether two trees are the same, by system calls alone: the library under test is not involved."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Mapping
from typing import NamedTuple

__all__ = ["ASPECTS", "Listing", "Node", "assert_same_tree", "differences", "read_tree"]

# What is compared; each can be ignored by its name.
ASPECTS = ("type", "mode", "owner", "times", "xattrs", "links", "size", "content", "target", "rdev")

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFSOCK: "socket",
}
# OverlayFS's own: the kernel hides them inside a mount, but a bare layer shows them.
# Xfs lists ACLs a second time, under the names that it stores them by.
_MARKERS = ("trusted.overlay.", "user.overlay.", "trusted.SGI_ACL_")
_SHOWN = 32


class Node(NamedTuple):
    """One file, with everything that is compared.

    Attributes:
        type: in words.
        mode: permissions, set-user-ID and the like.
        owner: user and group.
        times: the time of modification, in ns since the epoch.
        xattrs: all except OverlayFS's own.
        links: the other paths of the same file in the tree.
        size: of a regular file, otherwise 0.
        content: the SHA-256 of a regular file's content, and its first bytes.
        target: of a symlink.
        rdev: major and minor number of a device.
    """

    type: str
    mode: str
    owner: tuple[int, int]
    times: int
    xattrs: Mapping[str, bytes]
    links: tuple[bytes, ...]
    size: int
    content: tuple[str, bytes]
    target: bytes
    rdev: tuple[int, int]


# By path from the top, which itself is b".".
Listing = Mapping[bytes, Node]


def read_tree(directory: str | os.PathLike[str]) -> Listing:
    """A whole tree, for later comparison; contents are read.

    Raises:
        OSError: something cannot be read.
    """
    top = os.fsencode(directory)
    found: dict[bytes, os.stat_result] = {}
    _list(top, b"", found)
    groups: dict[tuple[int, int], list[bytes]] = {}
    for path, status in found.items():
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    linked = {path: tuple(p for p in sorted(group) if p != path) for group in groups.values() for path in group}
    return {path: _node(os.path.join(top, path), found[path], linked.get(path, ())) for path in sorted(found)}


def _list(top: bytes, prefix: bytes, found: dict[bytes, os.stat_result]) -> None:
    if not prefix:
        found[b"."] = os.stat(top)
    with os.scandir(top) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            found[prefix + entry.name] = status
            if stat.S_ISDIR(status.st_mode):
                _list(entry.path, prefix + entry.name + b"/", found)


def _node(where: bytes, status: os.stat_result, links: tuple[bytes, ...]) -> Node:
    kind = stat.S_IFMT(status.st_mode)
    regular, device = kind == stat.S_IFREG, kind in (stat.S_IFCHR, stat.S_IFBLK)
    return Node(
        _TYPES.get(kind, oct(kind)),
        oct(stat.S_IMODE(status.st_mode)),
        (status.st_uid, status.st_gid),
        status.st_mtime_ns,
        _xattrs(where),
        links,
        status.st_size if regular else 0,
        _content(where) if regular else ("", b""),
        os.readlink(where) if kind == stat.S_IFLNK else b"",
        (os.major(status.st_rdev), os.minor(status.st_rdev)) if device else (0, 0),
    )


def _xattrs(where: bytes) -> dict[str, bytes]:
    try:
        names = os.listxattr(where, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise
    return {name: os.getxattr(where, name, follow_symlinks=False) for name in names if not name.startswith(_MARKERS)}


def _content(where: bytes) -> tuple[str, bytes]:
    with open(where, "rb") as file:
        beginning = file.read(_SHOWN)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest(), beginning


def differences(
    one: str | os.PathLike[str] | Listing,
    other: str | os.PathLike[str] | Listing,
    *,
    ignore: Collection[str] = (),
) -> list[str]:
    """The differences of two trees, one line each, sorted by path.

    Args:
        one: a directory, or a result of :func:`read_tree`.
        other: likewise.
        ignore: those of :data:`ASPECTS` that may differ.

    Raises:
        ValueError: ``ignore`` has other names.
        OSError: something cannot be read.
    """
    unknown = set(ignore) - set(ASPECTS)
    if unknown:
        raise ValueError(f"no such aspect of a file: {', '.join(sorted(unknown))}")
    before = one if isinstance(one, Mapping) else read_tree(one)
    after = other if isinstance(other, Mapping) else read_tree(other)
    aspects = [aspect for aspect in ASPECTS if aspect not in ignore]
    lines = []
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            lines.append(f"{path!r}: only in the first ({before[path].type})")
        elif path not in before:
            lines.append(f"{path!r}: only in the second ({after[path].type})")
        else:
            lines += _compare(path, before[path], after[path], aspects)
    return lines


def _compare(path: bytes, one: Node, other: Node, aspects: list[str]) -> list[str]:
    if one.type != other.type and "type" in aspects:
        return [f"{path!r}: type {one.type} != {other.type}"]  # the other differences follow from it
    lines = []
    for aspect in aspects:
        first, second = getattr(one, aspect), getattr(other, aspect)
        if first == second:
            continue
        if aspect == "content":
            first, second = f"{first[1]!r}...", f"{second[1]!r}..."
        lines.append(f"{path!r}: {aspect} {first} != {second}")
    return lines


def assert_same_tree(
    one: str | os.PathLike[str] | Listing,
    other: str | os.PathLike[str] | Listing,
    *,
    ignore: Collection[str] = (),
) -> None:
    """Raise AssertionError unless two trees are the same in all of :data:`ASPECTS`; its message lists the differences.

    The arguments are those of :func:`differences`.
    """
    lines = differences(one, other, ignore=ignore)
    if lines:
        more = [f"... and {len(lines) - 40} more"] if len(lines) > 40 else []
        raise AssertionError("\n".join(["the trees differ:", *lines[:40], *more]))
