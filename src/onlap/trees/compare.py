"""Changes, and how one file differs from another."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from onlap.trees.meta import Meta

ADDED = "A"
MODIFIED = "C"
DELETED = "D"

_CHUNK = 256 * 1024

# From which ctime on files of the one tree, and files of the other, may have been edited since one was copied from the
# other; in nanoseconds. Nobody can reset a ctime.
Since = tuple[int, int]
ALWAYS, NEVER = -(1 << 63), 1 << 63


class Change(NamedTuple):
    """One path that differs.

    Attributes:
        kind: ``"A"`` added, ``"C"`` changed, ``"D"`` deleted, as in ``docker diff``. A directory is also changed if
            only something below it is.
        path: relative to the top, ``"."`` for the top itself.
        before: the old attributes; None if added.
        after: the new attributes; None if deleted.
        what: what changed: of ``type mode owner size mtime content target rdev xattrs``; empty for a directory of which
            only the contents changed. Content is compared, and included, only if nothing else differs.
    """

    kind: str
    path: str
    before: Meta | None
    after: Meta | None
    what: frozenset[str] = frozenset()


def differences(before: Meta, after: Meta) -> set[str]:
    """Which attributes of a file differ; only ``{"type"}`` if the types do."""
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

    Equal mtimes say little without nanoseconds: two edits within a second have the same mtime, and archives truncate
    it (containerd also reads such files: continuity, fs/path.go, sameFile). And a program may restore an mtime.

    Args:
        old: the status of one file, which has the size and mtime of the other.
        new: the status of the other file.
        since: the ctimes from which on the one, and the other, may have been edited.
    """
    whole = new.st_mtime_ns % 1_000_000_000 == 0
    return whole or old.st_ctime_ns >= since[0] or new.st_ctime_ns >= since[1]


def same_content(one: int, other: int) -> bool:
    """Whether two open files hold the same bytes from their current offsets on."""
    while True:
        a = os.read(one, _CHUNK)
        b = os.read(other, _CHUNK)
        # A read may be short.
        while len(a) != len(b):
            fd, missing = (one, len(b) - len(a)) if len(a) < len(b) else (other, len(a) - len(b))
            more = os.read(fd, missing)
            if not more:
                return False
            a, b = (a + more, b) if fd == one else (a, b + more)
        if a != b:
            return False
        if not a:
            return True
