"""Comparing trees: what a :class:`Change` is, and how one file differs from another."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from onlap.trees.meta import Meta, read_directory_meta, read_meta
from onlap.trees.walk import OPEN_DIRECTORY

ADDED = "A"
MODIFIED = "C"
DELETED = "D"

_CHUNK = 256 * 1024


class Change(NamedTuple):
    """One path that differs.

    Attributes:
        kind: ``"A"`` added, ``"C"`` changed, ``"D"`` deleted, as ``docker diff`` has them. A directory is changed also
            when only something below it is.
        path: relative to the top, ``"."`` for the top itself.
        before: the attributes it had; None when added.
        after: the attributes it has; None when deleted.
        what: how it changed: of ``type mode owner size mtime content target rdev xattrs``; empty for a directory that
            is only on the way to a change.
    """

    kind: str
    path: str
    before: Meta | None
    after: Meta | None
    what: frozenset[str] = frozenset()


def differences(before: Meta, after: Meta) -> set[str]:
    """In what the attributes of a file differ; of two types nothing but ``{"type"}``."""
    if stat.S_IFMT(before.mode) != stat.S_IFMT(after.mode):
        return {"type"}
    found = set()
    if before.mode != after.mode:
        found.add("mode")
    if (before.uid, before.gid) != (after.uid, after.gid):
        found.add("owner")
    if before.size != after.size:
        found.add("size")
    if before.mtime_ns != after.mtime_ns:
        found.add("mtime")
    if before.target != after.target:
        found.add("target")
    if before.rdev != after.rdev:
        found.add("rdev")
    if before.xattrs != after.xattrs:
        found.add("xattrs")
    return found


def same_content(one: int, other: int) -> bool:
    """Whether two open files hold the same bytes from where they stand."""
    while True:
        a = os.read(one, _CHUNK)
        b = os.read(other, _CHUNK)
        if a != b:
            # A read may be short; compare what both have before saying no.
            if not a or not b:
                return False
            a += _read_up_to(one, len(b) - len(a))
            b += _read_up_to(other, len(a) - len(b))
            if a != b:
                return False
        if not a:
            return True


def _read_up_to(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := os.read(fd, length - len(data))):
        data += more
    return data


def compare(one: str, other: str, *, content: bool = False) -> Iterator[Change]:
    """How the tree ``other`` differs from the tree ``one``, sorted by path.

    Args:
        one: a directory.
        other: a directory.
        content: read files whose attributes are equal too; else size and time in nanoseconds speak for the content.

    Raises:
        OSError: something cannot be read.
    """
    before = os.open(one, OPEN_DIRECTORY)
    try:
        after = os.open(other, OPEN_DIRECTORY)
        try:
            yield from top_change(read_directory_meta(before), read_directory_meta(after))
            yield from _compare(before, after, "", content)
        finally:
            os.close(after)
    finally:
        os.close(before)


def top_change(before: Meta, after: Meta) -> Iterator[Change]:
    """The change of a tree's top directory.

    Its time alone is none: it moves with every file that is made or removed right below, and ``docker diff`` does not
    show it either.
    """
    what = differences(before, after)
    if what - {"mtime"}:
        yield Change(MODIFIED, ".", before, after, frozenset(what))


def _compare(before: int, after: int, prefix: str, content: bool) -> list[Change]:
    old, new = _listing(before), _listing(after)
    changes: list[Change] = []
    for name in sorted(old.keys() | new.keys(), key=os.fsencode):
        path = prefix + name
        if name not in new:
            changes.append(Change(DELETED, path, read_meta(before, name, old[name]), None))
        elif name not in old:
            changes += added(after, name, new[name], path)
        else:
            changes += _changed(before, old[name], after, new[name], name, path, content)
    return changes


def _listing(fd: int) -> dict[str, os.stat_result]:
    with os.scandir(fd) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def added_tree(top: str) -> Iterator[Change]:
    """Everything in the tree at ``top``, as added, but not ``top`` itself."""
    fd = os.open(top, OPEN_DIRECTORY)
    try:
        for name, status in sorted(_listing(fd).items(), key=lambda item: os.fsencode(item[0])):
            yield from added(fd, name, status, name)
    finally:
        os.close(fd)


def added(dir_fd: int, name: str, status: os.stat_result, path: str) -> Iterator[Change]:
    """``name`` and all that is in it, as added."""
    meta = read_meta(dir_fd, name, status)
    yield Change(ADDED, path, None, meta)
    if stat.S_ISDIR(status.st_mode):
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
        try:
            for child, child_status in sorted(_listing(fd).items(), key=lambda item: os.fsencode(item[0])):
                yield from added(fd, child, child_status, f"{path}/{child}")
        finally:
            os.close(fd)


def _changed(
    before: int,
    old: os.stat_result,
    after: int,
    new: os.stat_result,
    name: str,
    path: str,
    content: bool,
) -> Iterator[Change]:
    old_meta, new_meta = read_meta(before, name, old), read_meta(after, name, new)
    what = differences(old_meta, new_meta)
    if content and stat.S_ISREG(new.st_mode) and not what & {"type", "size"} and not _same_file(old, new):
        one = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=before)
        try:
            two = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=after)
            try:
                if not same_content(one, two):
                    what.add("content")
            finally:
                os.close(two)
        finally:
            os.close(one)
    below: list[Change] = []
    if old_meta.is_dir and new_meta.is_dir:
        one = os.open(name, OPEN_DIRECTORY, dir_fd=before)
        try:
            two = os.open(name, OPEN_DIRECTORY, dir_fd=after)
            try:
                below = _compare(one, two, path + "/", content)
            finally:
                os.close(two)
        finally:
            os.close(one)
    elif new_meta.is_dir:
        below = list(added(after, name, new, path))[1:]
    if what or below:
        yield Change(MODIFIED, path, old_meta, new_meta, frozenset(what))
        yield from below


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
