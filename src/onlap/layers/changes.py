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

from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory, Stack
from onlap.trees.compare import ADDED, DELETED, MODIFIED, Change, differences, same_content
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
    before: Sequence[str], after: Sequence[str], markers: Markers, *, content: bool = False
) -> Iterator[Change]:
    """How the merged tree of one stack of layers differs from that of another, sorted by path.

    A directory is a change also when only something below it is. Of a directory that was removed only the directory is
    named.

    Args:
        before: layers, topmost first.
        after: layers, likewise.
        markers: the flavour of the markers in all of them.
        content: read files whose attributes are the same on both sides. Where one stack lies on top of the other, those
            that the kernel copied up are read anyhow.

    Raises:
        OSError: something cannot be read.
    """
    for change, _, _ in stack_items(before, after, markers, content=content):
        if change.what != LINKED and (change.path != "." or change.what != TOUCHED):
            yield change


def stack_items(
    before: Sequence[str], after: Sequence[str], markers: Markers, *, content: bool = False
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
            yield from _top(one, other)
        yield from _Walk(content or on_top, above if on_top else 0).directory(one, other, "")


def _top(before: MergedDirectory, after: MergedDirectory) -> Iterator[Item]:
    new = read_directory_meta(after.parts[0].fd)
    old = read_directory_meta(before.parts[0].fd) if before.parts else None
    what = frozenset(differences(old, new)) if old is not None else TOUCHED
    if what:
        yield Item(Change(MODIFIED, ".", old, new, what), None, None)


class _Walk:
    """One comparison.

    Args:
        content: whether files with the same attributes are read.
        above: how many layers of the new stack lie on top of the whole old one; 0 when they are two stacks.
    """

    def __init__(self, content: bool, above: int) -> None:
        self._content = content
        self._above = above

    def directory(self, before: MergedDirectory, after: MergedDirectory, prefix: str) -> Iterator[Item]:
        """The changes in a directory that exists on both sides."""
        for name in _suspects(before, after):
            path = prefix + name
            old, new = before.lookup(name), after.lookup(name)
            if new is None:
                if old is not None:
                    yield Item(Change(DELETED, path, _meta(old), None), None, None)
            elif old is None:
                yield from self._added(after, new, path)
            elif not _same_file(old, new) or stat.S_ISDIR(new.status.st_mode):
                yield from self._changed(before, after, old, new, path)

    def _added(self, parent: MergedDirectory, found: Found, path: str) -> Iterator[Item]:
        yield Item(Change(ADDED, path, None, _meta(found)), parent, found)
        yield from self._below_added(parent, found, path)

    def _below_added(self, parent: MergedDirectory, found: Found, path: str) -> Iterator[Item]:
        here = parent.open(found.name) if stat.S_ISDIR(found.status.st_mode) else None
        if here is None:
            return
        with here:
            for name in here.names():
                below = here.lookup(name)
                if below is not None:
                    yield from self._added(here, below, f"{path}/{name}")

    def _changed(
        self, before: MergedDirectory, after: MergedDirectory, old: Found, new: Found, path: str
    ) -> Iterator[Item]:
        old_meta, new_meta = _meta(old), _meta(new)
        what = frozenset(differences(old_meta, new_meta))
        if not what and stat.S_ISREG(new.status.st_mode):
            what = self._beyond_attributes(before, after, old, new, path)
        below: Iterator[Item] = iter(())
        if old_meta.is_dir and new_meta.is_dir:
            below = self._directories(before, after, old.name, path)
        elif new_meta.is_dir:
            below = self._below_added(after, new, path)
        # A directory is named before what is in it, and only if there is something: so the first of it is looked for.
        first = next(below, None)
        if what or first is not None:
            yield Item(Change(MODIFIED, path, old_meta, new_meta, what), after, new)
        if first is not None:
            yield first
            yield from below

    def _beyond_attributes(
        self, before: MergedDirectory, after: MergedDirectory, old: Found, new: Found, path: str
    ) -> frozenset[str]:
        """How a file differs whose attributes are all the same.

        A program that puts size and time back after an edit (moby#31805) is found out only by reading. Under an upper
        layer that is cheap: only files that the kernel copied up come here, and nothing else tells why it did.
        """
        if self._content and not _same_data(before, after, old, new, path):
            return frozenset({"content"})
        links = new.status.st_nlink
        copied_up = new.layer < self._above
        if links > 1 and (copied_up or links != old.status.st_nlink):
            return LINKED
        return frozenset()

    def _directories(self, before: MergedDirectory, after: MergedDirectory, name: str, path: str) -> Iterator[Item]:
        one, other = before.open(name), after.open(name)
        if one is None or other is None:
            return
        with one, other:
            yield from self.directory(one, other, path + "/")


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


def _meta(found: Found) -> Meta:
    return read_meta(found.dir_fd, found.name, found.status)


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
