"""What a stack of layers changed against another: mostly an upper layer against those below it.

Walks only the layers that the two stacks do not share at the bottom, and looks their names up in the others; a lower
directory is listed only under an opaque or a redirected one, or for the sake of very many names. So the cost is that of
the change, not that of the tree. All of the trees is walked in two cases, where the other names of a file have to be
found: two stacks, neither on top of the other, of which one shows a file with several names that the other had changed;
and a renamed directory (redirect_dir) with a file that has more names than it shows.
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
from onlap.trees.meta import Meta, read_directory_meta, read_meta

# What only the writer of an archive wants to know of a file: another name was linked to it, and it has to be in the
# archive too for that link to have something to point to.
LINKED = frozenset({"links"})
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
        content: read all files whose attributes are the same on both sides. Those that the kernel copied up are read
            anyhow, and those of which :func:`onlap.trees.compare.may_differ` says so.
        since: of that.

    Raises:
        OSError: something cannot be read.
    """
    # Directories that are only on the way to a change, which may be none but for an archive.
    passed: list[Change] = []
    for change, _, _ in stack_items(before, after, markers, content=content, since=since):
        while passed and not change.path.startswith(passed[-1].path + "/"):
            passed.pop()
        if change.kind == MODIFIED and not change.what:
            passed.append(change)
        elif change.what != LINKED and (change.path != "." or change.what != TOUCHED):
            yield from passed
            passed.clear()
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

    Args:
        before, after, markers, content, since: as :func:`stack_changes`.

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
            old, skip = cleanup.enter_context(Stack(before, markers, beside=new)), 0
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
    """

    __slots__ = ("after", "before", "left", "prefix", "unsaid")

    def __init__(
        self, before: MergedDirectory | None, after: MergedDirectory, prefix: str, whole: bool, unsaid: Item | None
    ) -> None:
        self.before = before
        self.after = after
        self.prefix = prefix
        self.left = _suspects(before, after, whole)[::-1]
        self.unsaid = unsaid

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
        # Files of the layers below that a renamed directory shows: by which names, and how many they have.
        self._moved: dict[tuple[int, int], tuple[set[str], int]] = {}
        # Whether names are looked at that both sides have from layers which they share.
        self._whole = False
        if above is None and (shared := _shared(before, after)):
            first = len(before.parts) - shared, len(after.parts) - shared
            names = _pairs(before, after, whole=False)
            self._whole = any(_may_be_linked(old, new, *first) for _, old, new in names)

    def items(self) -> Iterator[Item]:
        """The changes below the top, sorted by path; the other names of what was moved come last."""
        levels = [_Level(self._before, self._after, "", self._whole, None)]
        said = 0  # of so many levels nothing is left to say
        while levels:
            level = levels[-1]
            if not level.left:
                levels.pop().close()
                said = min(said, len(levels))
                continue
            item = self._compare(level, level.left.pop())
            if item is None:
                continue
            differs = item.change.kind != MODIFIED or bool(item.change.what)
            if item.found is not None and stat.S_ISDIR(item.found.status.st_mode):
                levels += self._entered(level, item, None if differs else item)
            if differs:
                for passed in levels[said:]:
                    if passed.unsaid is not None:
                        yield passed.unsaid
                        passed.unsaid = None
                said = len(levels)
                yield item
                self._note_moved(item)
        yield from self._other_names()

    def _note_moved(self, item: Item) -> None:
        found = item.found
        if self._above is None or found is None or found.layer < self._above or found.status.st_nlink == 1:
            return
        mode = found.status.st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISSOCK(mode):  # no archive has sockets
            names, _ = self._moved.setdefault(identity(found.status), (set(), found.status.st_nlink))
            names.add(item.change.path)

    def _other_names(self) -> Iterator[Item]:
        """The names that files in renamed directories have elsewhere, which only a walk of all finds."""
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

    def _compare(self, level: _Level, name: str) -> Item | None:
        path = level.prefix + name
        old = level.before.lookup(name) if level.before is not None else None
        new = level.after.lookup(name)
        if new is None:
            return Item(Change(DELETED, path, self._meta(old), None), None, None) if old is not None else None
        if old is None:
            return Item(Change(ADDED, path, None, self._meta(new)), level.after, new)
        is_directory = stat.S_ISDIR(new.status.st_mode)
        if _same_file(old, new) and not is_directory and (self._above is not None or new.status.st_nlink == 1):
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
        if old.status.st_nlink == 1 and new.status.st_nlink == 1:
            return frozenset()
        if self._above is not None:
            # Copying a file up takes it out of its group, or was done to link to it.
            return LINKED if new.layer < self._above else frozenset()
        if self._links is None:
            self._links = Links(_pairs(self._before, self._after, whole=self._whole))
        return LINKED if self._links.differ(path, new.status) else frozenset()

    def _meta(self, found: Found) -> Meta:
        return read_meta(found.dir_fd, found.name, found.status, recorded=self._recorded)

    def _entered(self, level: _Level, item: Item, unsaid: Item | None) -> Iterator[_Level]:
        assert item.found is not None
        name = item.found.name
        after = level.after.open(name)
        if after is None:
            return
        was_directory = item.change.before is not None and item.change.before.is_dir
        before = level.before.open(name) if was_directory and level.before is not None else None
        yield _Level(before, after, item.change.path + "/", self._whole, unsaid)


def _pairs(
    before: MergedDirectory, after: MergedDirectory, *, whole: bool
) -> Iterator[tuple[str, Found | None, Found | None]]:
    """What each suspect of the new tree is on both sides."""
    left: list[tuple[str, MergedDirectory | None, MergedDirectory]] = [("", before, after)]
    while left:
        prefix, one, other = left.pop()
        for name in _suspects(one, other, whole):
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
    """Whether a file that differs may be linked, on one side only, to a name that only the shared layers have."""
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


def _suspects(before: MergedDirectory | None, after: MergedDirectory, whole: bool) -> list[str]:
    """The names in a directory that may differ: those of the layers that the two sides do not share at the bottom.

    An opaque directory above cuts off what lies below it, and a renamed one shows another: then the bottoms differ,
    and all names are looked at.
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
    """Whether a file may be a copy of one in a layer below, edited, with size and time put back."""
    below = directory.beneath(found)
    if below is None:
        return False
    one, other = below.status, found.status
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _same_file(old: Found, new: Found) -> bool:
    """Whether both are one file of one layer, so that nothing above touched it."""
    return os.path.samestat(old.status, new.status)


def is_empty_layer(directory: str) -> bool:
    """Whether a layer's directory holds nothing at all, not even a whiteout."""
    with os.scandir(directory) as entries:
        return next(iter(entries), None) is None
