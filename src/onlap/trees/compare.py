"""Comparing trees: what a :class:`Change` is, and how one file differs from another."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from onlap.syscalls import files
from onlap.trees.meta import Meta, read_directory_meta, read_meta
from onlap.trees.walk import OPEN_DIRECTORY, OPEN_FILE, Descent, opened, walk

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


def compare(
    one: str, other: str, *, content: bool = False, since: Since = (NEVER, NEVER), recorded: bool = False
) -> Iterator[Change]:
    """How the tree ``other`` differs from the tree ``one``, sorted by path.

    Args:
        one: a directory.
        other: a directory.
        content: read all files whose attributes are equal; else those for which :func:`may_differ`.
        since: see there.
        recorded: see :func:`~onlap.trees.meta.read_meta`.

    Raises:
        OSError: something cannot be read.
    """
    with opened(one) as before, opened(other) as after:
        old, new = (read_directory_meta(fd, recorded=recorded) for fd in (before, after))
        yield from top_change(old, new)
        yield from _Comparison(before, after, content, since, recorded).changes()


def top_change(before: Meta, after: Meta) -> Iterator[Change]:
    """The change of a tree's top directory.

    Its time alone is none: it moves with every file that is made or removed right below, and ``docker diff`` does not
    show it either.
    """
    what = differences(before, after)
    if what - {"mtime"}:
        yield Change(MODIFIED, ".", before, after, frozenset(what))


def _listing(fd: int) -> dict[str, os.stat_result]:
    return {entry.name: entry.stat(follow_symlinks=False) for entry in files.list_directory(fd)}


def added_tree(top: str, *, recorded: bool = False) -> Iterator[Change]:
    """Everything in the tree at ``top``, as added, but not ``top`` itself."""
    with opened(top) as fd:
        yield from _added_below(fd, "", recorded)


def _added_below(fd: int, prefix: str, recorded: bool) -> Iterator[Change]:
    for entry in walk(fd):
        meta = read_meta(entry.dir_fd, entry.name, entry.status, recorded=recorded)
        yield Change(ADDED, prefix + entry.path, None, meta)


class _Level:
    """A directory that both trees have, being compared."""

    __slots__ = ("change", "names", "new", "old", "prefix")

    def __init__(self, before: int, after: int, prefix: str, change: Change | None) -> None:
        self.old, self.new = _listing(before), _listing(after)
        self.names = iter(sorted(self.old.keys() | self.new.keys(), key=os.fsencode))
        self.prefix = prefix
        # What is to be said of the directory itself once something in it differs; None when it has been said.
        self.change = change


class _Comparison:
    """Two trees, walked beside each other without recursion."""

    def __init__(self, before: int, after: int, content: bool, since: Since, recorded: bool) -> None:
        self._before, self._after = Descent(before), Descent(after)
        self._content = content
        self._since = since
        self._recorded = recorded
        self._levels = [_Level(before, after, "", None)]
        self._said = 0  # of so many levels nothing is left to say

    def changes(self) -> Iterator[Change]:
        try:
            while self._levels:
                level = self._levels[-1]
                for name in level.names:
                    depth = len(self._levels)
                    for change in self._compare(level, name):
                        yield from self._announced()
                        yield change
                    if len(self._levels) > depth:
                        entered = self._levels[-1].change
                        if entered is not None and entered.what:
                            yield from self._announced()
                        break
                else:
                    self._levels.pop()
                    self._said = min(self._said, len(self._levels))
                    if self._levels:
                        self._before.leave()
                        self._after.leave()
        finally:
            self._before.close()
            self._after.close()

    def _announced(self) -> Iterator[Change]:
        """The directories on the way to a change, which are named before it, each once."""
        for level in self._levels[self._said :]:
            if level.change is not None:
                yield level.change
                level.change = None
        self._said = len(self._levels)

    def _compare(self, level: _Level, name: str) -> Iterator[Change]:
        path = level.prefix + name
        old, new = level.old.get(name), level.new.get(name)
        if new is None:
            assert old is not None
            yield Change(DELETED, path, read_meta(self._before.fd, name, old, recorded=self._recorded), None)
            return
        meta = read_meta(self._after.fd, name, new, recorded=self._recorded)
        if old is None:
            yield Change(ADDED, path, None, meta)
            yield from self._below(name, meta, path)
            return
        before = read_meta(self._before.fd, name, old, recorded=self._recorded)
        what = differences(before, meta)
        if before.is_dir and meta.is_dir:
            self._enter(name, path, Change(MODIFIED, path, before, meta, frozenset(what)))
            return
        doubtful = not what and stat.S_ISREG(new.st_mode) and (self._content or may_differ(old, new, self._since))
        if doubtful and not os.path.samestat(old, new) and not self._same_content(name):
            what.add("content")
        if what:
            yield Change(MODIFIED, path, before, meta, frozenset(what))
            yield from self._below(name, meta, path)

    def _enter(self, name: str, path: str, change: Change) -> None:
        """Go into a directory that both have."""
        before = os.open(name, OPEN_DIRECTORY, dir_fd=self._before.fd)
        self._before.enter(before)
        after = os.open(name, OPEN_DIRECTORY, dir_fd=self._after.fd)
        self._after.enter(after)
        self._levels.append(_Level(before, after, path + "/", change))

    def _below(self, name: str, meta: Meta, path: str) -> Iterator[Change]:
        """What is in a directory that is there now and was none before."""
        if not meta.is_dir:
            return
        with opened(name, dir_fd=self._after.fd) as fd:
            yield from _added_below(fd, path + "/", self._recorded)

    def _same_content(self, name: str) -> bool:
        with (
            opened(name, OPEN_FILE, dir_fd=self._before.fd) as one,
            opened(name, OPEN_FILE, dir_fd=self._after.fd) as other,
        ):
            return same_content(one, other)
