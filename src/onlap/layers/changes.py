"""What a stack of layers changed against another: mostly an upper layer against those below it.

Walks only the layers that the two stacks do not share at the bottom, and looks their names up in the others; a lower
directory is listed only under an opaque or a redirected one. So the cost is that of the change, not that of the tree.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from onlap.layers.links import Links, descend
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory, Stack
from onlap.trees.compare import (
    ADDED,
    ALWAYS,
    DELETED,
    MODIFIED,
    NEVER,
    Change,
    Since,
    differences,
    may_differ,
    same_content,
)
from onlap.trees.meta import Meta, read_directory_meta, read_meta

# What only the writer of an archive wants to know of a file: another name was linked to it, and it has to be in the
# archive too for that link to have something to point to.
LINKED = frozenset({"links"})
# Descriptors of directories in layers that are kept open, the tops aside.
_MAX_DESCRIPTORS = 512
# Of the top directory: its time moves with every file that is made or removed right below, so that it alone is no
# change; "docker diff" does not show it either.
TOUCHED = frozenset({"mtime"})


class Item(NamedTuple):
    """A change, and where the file is: valid until the next one is asked for.

    Attributes:
        change: what it is.
        directory: the merged directory that holds it; None for the top directory, and for what was deleted.
        found: the file in it, likewise.
    """

    change: Change
    directory: MergedDirectory | None
    found: Found | None


def upper_changes(upper: str, lowers: Sequence[str], markers: Markers) -> Iterator[Change]:
    """How the merged tree of ``upper`` on ``lowers`` differs from that of ``lowers`` alone, sorted by path.

    Args:
        upper: the layer's directory.
        lowers: the layers below it, topmost first; none means that all of it was added.
        markers: the flavour of the markers in them.

    Raises:
        OSError: something cannot be read.
    """
    return stack_changes(lowers, [upper, *lowers], markers)


def stack_changes(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    *,
    content: bool = False,
    since: Since = (NEVER, NEVER),
) -> Iterator[Change]:
    """How the merged tree of one stack of layers differs from that of another, sorted by path.

    A directory is a change also when only something below it is. Of a directory that was removed only the directory is
    named.

    Args:
        before: layers, topmost first.
        after: layers, likewise.
        markers: the flavour of the markers in all of them.
        content: read all files whose attributes are the same on both sides. Where one stack lies on top of the other,
            those that the kernel copied up are read anyhow; else those of which
            :func:`onlap.trees.compare.may_differ` says so.
        since: see there.

    Raises:
        OSError: something cannot be read.
    """
    for change, _, _ in stack_items(before, after, markers, content=content, since=since):
        if change.what != LINKED and (change.path != "." or change.what != TOUCHED):
            yield change


def stack_items(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    *,
    content: bool = False,
    since: Since = (NEVER, NEVER),
) -> Iterator[Item]:
    """The same with where the files are, and with what an archive needs besides: :data:`LINKED` files, the top's time.

    Raises:
        OSError: something cannot be read.
    """
    with ExitStack() as cleanup:
        new = cleanup.enter_context(Stack(after, markers))
        above = len(after) - len(before)
        on_top = above >= 0 and list(after[above:]) == list(before)
        if on_top:
            # As mostly: then each layer needs to be open but once.
            old, skip = new, above
        else:
            old, skip = cleanup.enter_context(Stack(before, markers)), 0
        one, other = old.top(skip), new.top()
        if other.parts:
            yield from _top(one, other, markers.recorded)
        read = (ALWAYS, ALWAYS) if content or on_top else since
        yield from _Walk(one, other, read, above if on_top else None, markers.recorded).items()


def _top(before: MergedDirectory, after: MergedDirectory, recorded: bool) -> Iterator[Item]:
    new = read_directory_meta(after.parts[0].fd, recorded=recorded)
    old = read_directory_meta(before.parts[0].fd, recorded=recorded) if before.parts else None
    what = frozenset(differences(old, new)) if old is not None else TOUCHED
    if what:
        yield Item(Change(MODIFIED, ".", old, new, what), None, None)


class _Level:
    """A directory that the walk is in.

    Attributes:
        before: the directory on the old side; None where that has none.
        after: the directory on the new side.
        prefix: its path with a slash, empty for the top.
        left: the names that are still to be compared, the next one last.
        unsaid: the change that it is itself, as long as nothing in it has been found that differs.
        closed: whether its descriptors were given back for a while.
    """

    __slots__ = ("after", "before", "closed", "left", "prefix", "unsaid")

    def __init__(
        self, before: MergedDirectory | None, after: MergedDirectory, prefix: str, unsaid: Item | None
    ) -> None:
        self.before = before
        self.after = after
        self.prefix = prefix
        self.left = (after.names() if before is None else _suspects(before, after))[::-1]
        self.unsaid = unsaid
        self.closed = False

    @property
    def descriptors(self) -> int:
        return len(self.after.parts) + (len(self.before.parts) if self.before is not None else 0)

    def close(self) -> None:
        self.after.close()
        if self.before is not None:
            self.before.close()
        self.closed = True


class _Walk:
    """One comparison: without recursion, and with few descriptors however deep the trees are.

    Args:
        before: the top directory on the old side.
        after: the top directory on the new side.
        since: which files with the same attributes are read, see :func:`onlap.trees.compare.may_differ`.
        above: how many layers of the new stack lie on top of the whole old one; None when they are two stacks.
        recorded: whether owners may be recorded in an xattr.
    """

    def __init__(
        self, before: MergedDirectory, after: MergedDirectory, since: Since, above: int | None, recorded: bool
    ) -> None:
        self._recorded = recorded
        self._before = before
        self._after = after
        self._since = since
        self._above = above
        self._links: Links | None = None
        self._levels: list[_Level] = []
        self._descriptors = 0

    def items(self) -> Iterator[Item]:
        """The changes below the top, sorted by path."""
        levels = self._levels = [_Level(self._before, self._after, "", None)]
        try:
            while levels:
                level = levels[-1]
                if not level.left:
                    self._leave()
                    continue
                if level.closed:
                    self._reopen(level)
                name = level.left.pop()
                item = self._compare(level, name)
                if item is None:
                    continue
                said = item.change.kind != MODIFIED or bool(item.change.what)
                if item.found is not None and stat.S_ISDIR(item.found.status.st_mode):
                    self._enter(level, item, None if said else item)
                if said:
                    for passed in levels:
                        if passed.unsaid is not None:
                            yield passed.unsaid
                            passed.unsaid = None
                    yield item
        finally:
            while levels:
                self._leave()

    def _compare(self, level: _Level, name: str) -> Item | None:
        path = level.prefix + name
        old = level.before.lookup(name) if level.before is not None else None
        new = level.after.lookup(name)
        if new is None:
            return Item(Change(DELETED, path, self._meta(old), None), None, None) if old is not None else None
        if old is None:
            return Item(Change(ADDED, path, None, self._meta(new)), level.after, new)
        is_directory = stat.S_ISDIR(new.status.st_mode)
        if _same_file(old, new) and not is_directory:
            return None
        old_meta, new_meta = self._meta(old), self._meta(new)
        what = frozenset(differences(old_meta, new_meta))
        if not what and not is_directory:
            assert level.before is not None
            what = self._beyond_attributes(level.before, level.after, old, new, path)
            if not what:
                return None
        return Item(Change(MODIFIED, path, old_meta, new_meta, what), level.after, new)

    def _beyond_attributes(
        self, before: MergedDirectory, after: MergedDirectory, old: Found, new: Found, path: str
    ) -> frozenset[str]:
        """How a file differs whose attributes are all the same.

        A program that puts size and time back after an edit (moby#31805) is found out only by reading. Under an upper
        layer that is cheap: only files that the kernel copied up come here, and nothing else tells why it did.
        """
        regular = stat.S_ISREG(new.status.st_mode)
        doubtful = regular and may_differ(old.status, new.status, self._since)
        if doubtful and not _same_data(before, after, old, new, path):
            return frozenset({"content"})
        if old.status.st_nlink == 1 and new.status.st_nlink == 1:
            return frozenset()
        if self._above is not None:
            # Copying a file up takes it out of its group, or was done to link to it.
            return LINKED if new.layer < self._above else frozenset()
        if self._links is None:
            self._links = Links(self._before, self._after)
        return LINKED if self._links.differ(path, new.status) else frozenset()

    def _meta(self, found: Found) -> Meta:
        return read_meta(found.dir_fd, found.name, found.status, recorded=self._recorded)

    # Levels

    def _enter(self, level: _Level, item: Item, unsaid: Item | None) -> None:
        assert item.found is not None
        name = item.found.name
        after = level.after.open(name)
        if after is None:
            return
        was_directory = item.change.before is not None and item.change.before.is_dir
        before = level.before.open(name) if was_directory and level.before is not None else None
        entered = _Level(before, after, item.change.path + "/", unsaid)
        self._levels.append(entered)
        self._descriptors += entered.descriptors
        self._spare()

    def _leave(self) -> None:
        level = self._levels.pop()
        if self._levels and not level.closed:
            self._close(level)

    def _close(self, level: _Level) -> None:
        self._descriptors -= level.descriptors
        level.close()

    def _spare(self) -> None:
        """Give back descriptors of the directories that are needed last."""
        for level in self._levels[1:-1]:
            if self._descriptors <= _MAX_DESCRIPTORS:
                return
            if not level.closed:
                self._close(level)

    def _reopen(self, level: _Level) -> None:
        level.after = descend(self._after, level.prefix)
        level.closed = False
        if level.before is not None:
            level.before = descend(self._before, level.prefix)
        self._descriptors += level.descriptors


def _suspects(before: MergedDirectory, after: MergedDirectory) -> list[str]:
    """The names in a directory that may differ: those of the layers that the two sides do not share at the bottom.

    An opaque directory above cuts off what lies below it, and a renamed one shows another: then the bottoms differ,
    and all names are looked at.
    """
    one, other = [_identity(part.fd) for part in before.parts], [_identity(part.fd) for part in after.parts]
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    names: set[str] = set()
    for part in (*before.parts[: len(one) - shared], *after.parts[: len(other) - shared]):
        with os.scandir(part.fd) as entries:
            names.update(entry.name for entry in entries)
    return sorted(names, key=os.fsencode)


def _same_data(before: MergedDirectory, after: MergedDirectory, old: Found, new: Found, path: str) -> bool:
    one = before.data(old, path)
    try:
        other = after.data(new, path)
        try:
            return same_content(one, other)
        finally:
            os.close(other)
    finally:
        os.close(one)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _same_file(old: Found, new: Found) -> bool:
    """Whether both are one file of one layer, so that nothing above touched it."""
    return (old.status.st_dev, old.status.st_ino) == (new.status.st_dev, new.status.st_ino)


def is_empty_layer(directory: str) -> bool:
    """Whether a layer's directory holds nothing at all, not even a whiteout."""
    with os.scandir(directory) as entries:
        return next(iter(entries), None) is None
