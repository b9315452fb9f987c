"""How one stack of layers differs from another: mostly an upper layer from the layers below it.

Walks only the layers that the two stacks do not share at the bottom, and looks up their names in the others. A lower
directory is listed only under an opaque or redirected one, or if very many names are looked up in it. So the cost is
that of the change, not that of the tree. The whole trees are walked in two cases, to find the other names of a file:
two stacks, neither on top of the other, of which one shows a file with several names that the other had changed; and a
renamed directory (redirect_dir) with a file that has more names than the directory shows.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from onlap.layers.diff.links import Links, identity, signature
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
from onlap.trees.meta import Meta, read_directory_meta, read_meta, read_open_meta

# Only the writer of an archive needs this change: another name was linked to the file, so the file must be in the
# archive for that link to have a target.
LINKED = frozenset({"links"})
# The top directory's mtime moves with every file that is created or removed directly below, so alone it is not a
# change. "docker diff" does not show it either.
TOUCHED = frozenset({"mtime"})


class Item(NamedTuple):
    """A change and where its file is; valid until the next item is requested.

    Attributes:
        change: the change.
        directory: the merged directory that holds the file; None for the top directory and for deletions.
        found: the file in it; None likewise.
        old_directory: the merged directory that held the old file; None for the top directory and what is added.
        old: the old file in it; None likewise.
        fd: a descriptor of the file's data, which the walk closes; -1 if it is not open.
    """

    change: Change
    directory: MergedDirectory | None
    found: Found | None
    old_directory: MergedDirectory | None = None
    old: Found | None = None
    fd: int = -1


def stack_changes(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    *,
    content: bool = False,
    since: Since = (NEVER, NEVER),
    directory_times: bool = True,
) -> Iterator[Change]:
    """How the merged tree of one stack of layers differs from that of another, sorted by path.

    A directory is also a change if only something below it changed. Of a removed directory, only the directory itself
    is reported.

    Args:
        before: layers, topmost first.
        after: layers, likewise.
        markers: the flavour of the markers in all of them.
        content: read all files whose attributes are the same on both sides. Files that the kernel copied up are always
            read, as are those for which :func:`onlap.trees.compare.may_differ` is true.
        since: passed to that function.
        directory_times: whether a new mtime alone is a change of a directory.

    Raises:
        OSError: something cannot be read.
    """
    items = stack_items(
        before, after, markers, content=content, since=since, for_archive=False, directory_times=directory_times
    )
    for item in items:
        yield item.change


def stack_items(
    before: Sequence[str],
    after: Sequence[str],
    markers: Markers,
    *,
    content: bool = False,
    since: Since = (NEVER, NEVER),
    for_archive: bool = True,
    directory_times: bool = True,
) -> Iterator[Item]:
    """The same with each file's location.

    Args:
        before, after, markers, content, since, directory_times: as :func:`stack_changes`.
        for_archive: also report what only an archive needs: :data:`LINKED` files, and the top's mtime.

    Raises:
        OSError: something cannot be read.
    """
    with ExitStack() as cleanup:
        new = cleanup.enter_context(Stack(after, markers))
        above = len(after) - len(before)
        on_top = above >= 0 and list(after[above:]) == list(before)
        if on_top:
            # The usual case: each layer needs to be open only once.
            old, skip = new, above
        else:
            old, skip = cleanup.enter_context(Stack(before, markers, beside=new)), 0
        walk = _Walk(
            old.top(skip),
            new.top(),
            (ALWAYS, ALWAYS) if content or on_top else since,
            above if on_top else None,
            markers.recorded,
            for_archive=for_archive,
            directory_times=directory_times,
        )
        yield from walk.items()


class _Level:
    """A directory on the walk's path.

    Attributes:
        before: the directory on the old side; None if it has none.
        after: the directory on the new side.
        prefix: its path with a slash, empty for the top.
        left: the names still to be compared, the next one last.
        pending: its own change, until something in it differs.
    """

    __slots__ = ("after", "before", "left", "pending", "prefix")

    def __init__(
        self, before: MergedDirectory | None, after: MergedDirectory, prefix: str, whole: bool, pending: Item | None
    ) -> None:
        self.before = before
        self.after = after
        self.prefix = prefix
        self.left = _candidates(before, after, whole)[::-1]
        self.pending = pending

    def close(self) -> None:
        self.after.close()
        if self.before is not None:
            self.before.close()


class _Walk:
    """One comparison, without recursion.

    Args:
        before: the top directory on the old side.
        after: the top directory on the new side.
        since: which files with the same attributes are read, see :func:`onlap.trees.compare.may_differ`.
        above: how many layers of the new stack lie on top of the whole old stack; None if neither is on the other.
        recorded: whether owners may be recorded in an xattr.
        for_archive: whether to report what only an archive needs.
        directory_times: whether a new mtime alone is a change of a directory.
    """

    def __init__(
        self,
        before: MergedDirectory,
        after: MergedDirectory,
        since: Since,
        above: int | None,
        recorded: bool,
        *,
        for_archive: bool,
        directory_times: bool,
    ) -> None:
        self._recorded = recorded
        self._before = before
        self._after = after
        self._since = since
        self._above = above
        self._for_archive = for_archive
        self._directory_times = directory_times
        self._links: Links | None = None
        # Files of the layers below that a renamed directory shows: the names shown, and the link count.
        self._moved: dict[tuple[int, int], tuple[set[str], int]] = {}
        # The new file that is compared, if it is open.
        self._fd = -1
        # Whether names are compared that both sides have from shared layers.
        self._whole = False
        if for_archive and above is None and (shared := _shared(before, after)):
            first = len(before.parts) - shared, len(after.parts) - shared
            names = _pairs(before, after, whole=False)
            self._whole = any(_may_be_linked(old, new, *first) for _, old, new in names)

    def items(self) -> Iterator[Item]:
        """The changes, sorted by path; the other names of moved files come last."""
        try:
            yield from self._items()
        finally:
            self._close_file()

    def _items(self) -> Iterator[Item]:
        if self._after.parts:
            yield from self._top()
        levels = [_Level(self._before, self._after, "", self._whole, None)]
        reported = 0  # how many levels have nothing pending
        while levels:
            level = levels[-1]
            if not level.left:
                levels.pop().close()
                reported = min(reported, len(levels))
                continue
            item = self._compare(level, level.left.pop())
            if item is None:
                continue
            differs = item.change.kind != MODIFIED or bool(item.change.what)
            if item.found is not None and stat.S_ISDIR(item.found.status.st_mode):
                levels += self._descend(level, item, None if differs else item)
            if differs:
                for above in levels[reported:]:
                    if above.pending is not None:
                        yield above.pending
                        above.pending = None
                reported = len(levels)
                yield item
                self._note_moved(item)
        yield from self._other_names()

    def _top(self) -> Iterator[Item]:
        new = read_directory_meta(self._after.parts[0].fd, recorded=self._recorded)
        old, what = None, TOUCHED
        if self._before.parts:
            old = read_directory_meta(self._before.parts[0].fd, recorded=self._recorded)
            what = frozenset(differences(old, new))
        if what and (self._for_archive or what != TOUCHED):
            yield Item(Change(MODIFIED, ".", old, new, what), None, None)

    def _note_moved(self, item: Item) -> None:
        found = item.found
        if not self._for_archive or self._above is None:
            return
        if found is None or found.layer < self._above or found.status.st_nlink == 1:
            return
        mode = found.status.st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISSOCK(mode):  # no archive has sockets
            names, _ = self._moved.setdefault(identity(found.status), (set(), found.status.st_nlink))
            names.add(item.change.path)

    def _other_names(self) -> Iterator[Item]:
        """The other names of files in renamed directories, which only a walk of the whole tree finds."""
        moved = {file: names for file, (names, count) in self._moved.items() if len(names) < count}
        left = [("", self._after)] if moved else []
        while left:
            prefix, directory = left.pop()
            below = []
            for name in directory.names():
                found = directory.lookup(name)
                path = prefix + name
                if found is None:
                    continue
                if stat.S_ISDIR(found.status.st_mode):
                    inside = directory.open(name)
                    below += [(path + "/", inside)] if inside is not None else []
                elif path not in moved.get(identity(found.status), (path,)):
                    meta = self._meta(found)
                    yield Item(Change(MODIFIED, path, meta, meta, LINKED), directory, found)
            left += reversed(below)
            directory.close()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _compare(self, level: _Level, name: str) -> Item | None:
        self._close_file()
        path = level.prefix + name
        old = level.before.lookup(name) if level.before is not None else None
        new = level.after.lookup(name)
        if new is None:
            if old is None:
                return None
            return Item(Change(DELETED, path, self._meta(old), None), None, None, level.before, old)
        if old is None:
            return Item(Change(ADDED, path, None, self._new_meta(new)), level.after, new, fd=self._fd)
        is_directory = stat.S_ISDIR(new.status.st_mode)
        if _same_file(old, new) and not is_directory and (self._above is not None or new.status.st_nlink == 1):
            return None
        old_meta, new_meta = self._meta(old), self._new_meta(new)
        what = frozenset(differences(old_meta, new_meta))
        if is_directory and not self._directory_times:
            what -= {"mtime"}
        if not what and not is_directory:
            assert level.before is not None
            what = self._beyond_attributes(level.before, level.after, old, new, path)
            if not what:
                return None
        return Item(Change(MODIFIED, path, old_meta, new_meta, what), level.after, new, level.before, old, self._fd)

    def _beyond_attributes(
        self, before: MergedDirectory, after: MergedDirectory, old: Found, new: Found, path: str
    ) -> frozenset[str]:
        """How a file with equal attributes differs.

        An edit that restores size and mtime (moby#31805) is found only by reading. Under an upper layer that is cheap:
        only files that the kernel copied up come here, and nothing else tells why it did.
        """
        regular = stat.S_ISREG(new.status.st_mode)
        doubtful = (
            regular
            and not _same_file(old, new)
            and (
                may_differ(old.status, new.status, self._since)
                or (self._above is None and (_is_copy(before, old) or _is_copy(after, new)))
            )
        )
        if doubtful and not _same_data(before, after, old, new, path):
            return frozenset({"content"})
        if not self._for_archive or (old.status.st_nlink == 1 and new.status.st_nlink == 1):
            return frozenset()
        if self._above is not None:
            # The copy-up separated the file from its other names, or was done to link to it.
            return LINKED if new.layer < self._above else frozenset()
        if self._links is None:
            self._links = Links(_pairs(self._before, self._after, whole=self._whole))
        return LINKED if self._links.differ(path, new.status) else frozenset()

    def _meta(self, found: Found) -> Meta:
        return read_meta(found.dir_fd, found.name, found.status, recorded=self._recorded)

    def _new_meta(self, found: Found) -> Meta:
        """As :meth:`_meta`, of the new file. For an archive, a file with data of its own is left open in ``_fd``."""
        if not self._for_archive or not found.status.st_size or not stat.S_ISREG(found.status.st_mode):
            return self._meta(found)
        try:
            self._fd = found.open()
        except OSError:
            return self._meta(found)  # what cannot be read may not have changed
        meta, is_marked = read_open_meta(self._fd, found.status, recorded=self._recorded)
        if is_marked:  # a metacopy file, perhaps
            self._close_file()
        return meta

    def _descend(self, level: _Level, item: Item, pending: Item | None) -> Iterator[_Level]:
        assert item.found is not None
        name = item.found.name
        after = level.after.open(name)
        if after is None:
            return
        was_directory = item.change.before is not None and item.change.before.is_dir
        before = level.before.open(name) if was_directory and level.before is not None else None
        yield _Level(before, after, item.change.path + "/", self._whole, pending)


def _pairs(
    before: MergedDirectory, after: MergedDirectory, *, whole: bool
) -> Iterator[tuple[str, Found | None, Found | None]]:
    """Each candidate of the new tree with what it is on both sides."""
    left: list[tuple[str, MergedDirectory | None, MergedDirectory]] = [("", before, after)]
    while left:
        prefix, one, other = left.pop()
        for name in _candidates(one, other, whole):
            old = one.lookup(name) if one is not None else None
            new = other.lookup(name)
            yield prefix + name, old, new
            below = other.open(name) if new is not None and stat.S_ISDIR(new.status.st_mode) else None
            if below is not None:
                left.append((f"{prefix}{name}/", one.open(name) if one is not None else None, below))
        other.close()
        if one is not None:
            one.close()


def _may_be_linked(old: Found | None, new: Found | None, old_shared: int, new_shared: int) -> bool:
    """Whether a changed file may be linked, on one side only, to a name that only the shared layers have."""
    if new is None or (old is not None and _same_file(old, new)):
        return False
    if new.layer >= new_shared and new.status.st_nlink > 1 and not stat.S_ISDIR(new.status.st_mode):
        return True
    return (
        old is not None
        and old.layer >= old_shared
        and old.status.st_nlink > 1
        and signature(old.status) == signature(new.status)
    )


def _shared(before: MergedDirectory, after: MergedDirectory) -> int:
    """How many parts the two sides share at the bottom."""
    shared = 0
    for one, other in zip(reversed(before.parts), reversed(after.parts), strict=False):
        if one.identity != other.identity:
            break
        shared += 1
    return shared


def _candidates(before: MergedDirectory | None, after: MergedDirectory, whole: bool) -> list[str]:
    """The names in a directory that may differ: those of the layers that the two sides do not share at the bottom.

    Under an opaque or a renamed directory the bottoms differ, so all names are compared.
    """
    if before is None:
        return after.names()
    shared = 0 if whole else _shared(before, after)
    return sorted(before.names_above(shared) | after.names_above(shared), key=os.fsencode)


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


def _is_copy(directory: MergedDirectory, found: Found) -> bool:
    """Whether a file may be an edited copy of one in a layer below, with size and mtime restored."""
    below = directory.beneath(found)
    if below is None:
        return False
    one, other = below.status, found.status
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _same_file(old: Found, new: Found) -> bool:
    """Whether both are the same file of the same layer, so no layer above changed it."""
    return os.path.samestat(old.status, new.status)


def is_empty_layer(directory: str) -> bool:
    """Whether a layer's directory is empty, without even a whiteout."""
    with os.scandir(directory) as entries:
        return next(iter(entries), None) is None
