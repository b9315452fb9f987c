"""What a :class:`Change` is, and how one file differs from another."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from onlap.trees.meta import Meta

ADDED = "A"
MODIFIED = "C"
DELETED = "D"

_CHUNK = 256 * 1024

# From when on a file of one tree, and one of the other, may have been edited since the one was copied from the other:
# nanoseconds of ctime, which nobody can put back.
Since = tuple[int, int]
ALWAYS, NEVER = -(1 << 63), 1 << 63


class Change(NamedTuple):
    """One path that differs.

    Attributes:
        kind: ``"A"`` added, ``"C"`` changed, ``"D"`` deleted, as ``docker diff`` has them. A directory is changed also
            when only something below it is.
        path: relative to the top, ``"."`` for the top itself.
        before: the attributes it had; None when added.
        after: the attributes it has; None when deleted.
        what: how it changed: of ``type mode owner size mtime content target rdev xattrs``; empty for a directory that
            is only on the way to a change. Content is compared, and named, only where nothing else differs.
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


def may_differ(old: os.stat_result, new: os.stat_result, since: Since) -> bool:
    """Whether two files with equal attributes may have different content.

    Equal times say little where they have no nanoseconds: two edits within a second have the same, and archives cut
    them (containerd reads such files too: continuity, fs/path.go, sameFile). And a program may put a time back.

    Args:
        old: the status of the one, whose size and time are those of the other.
        new: of the other.
        since: the ctime from which on the one, and the other, may have been edited.
    """
    whole = new.st_mtime_ns % 1_000_000_000 == 0
    return whole or old.st_ctime_ns >= since[0] or new.st_ctime_ns >= since[1]


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
