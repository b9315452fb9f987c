"""What an overlay's upper layer changed against the layers below it.

Walks the upper only and looks its names up in the lowers; a lower directory is listed only under an opaque or a
redirected one. So the cost is that of the change, not that of the tree.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory, Stack
from onlap.trees.compare import (
    ADDED,
    DELETED,
    MODIFIED,
    Change,
    differences,
    same_content,
    top_change,
)
from onlap.trees.meta import Meta, read_directory_meta, read_meta


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


def stack_changes(before: Sequence[str], after: Sequence[str], markers: Markers) -> Iterator[Change]:
    """How the merged tree of one stack of layers differs from that of another; what they share is not looked at.

    Args:
        before: layers, topmost first.
        after: layers, likewise.
        markers: the flavour of the markers in all of them.

    Raises:
        OSError: something cannot be read.
    """
    with ExitStack() as cleanup:
        new = cleanup.enter_context(Stack(after, markers))
        above = len(after) - len(before)
        if above >= 0 and list(after[above:]) == list(before):
            # One on top of the other, as mostly: then each layer needs to be open but once.
            old, skip = new, above
        else:
            old, skip = cleanup.enter_context(Stack(before, markers)), 0
        one, other = old.top(skip), new.top()
        if one.parts and other.parts:
            yield from top_change(read_directory_meta(one.parts[0].fd), read_directory_meta(other.parts[0].fd))
        yield from _directory(one, other, "")


def _directory(before: MergedDirectory, after: MergedDirectory, prefix: str) -> list[Change]:
    """The changes in a directory that exists on both sides."""
    changes: list[Change] = []
    for name in _suspects(before, after):
        path = prefix + name
        old, new = before.lookup(name), after.lookup(name)
        if new is None:
            if old is not None:
                changes.append(Change(DELETED, path, _meta(old), None))
        elif old is None:
            changes += _added(after, new, path)
        elif not _same_file(old, new) or stat.S_ISDIR(new.status.st_mode):
            changes += _changed(before, after, old, new, path)
    return changes


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


def _added(parent: MergedDirectory, found: Found, path: str) -> Iterator[Change]:
    yield Change(ADDED, path, None, _meta(found))
    if not stat.S_ISDIR(found.status.st_mode):
        return
    here = parent.open(found.name)
    if here is None:
        return
    with here:
        for name in here.names():
            below = here.lookup(name)
            if below is not None:
                yield from _added(here, below, f"{path}/{name}")


def _changed(before: MergedDirectory, after: MergedDirectory, old: Found, new: Found, path: str) -> Iterator[Change]:
    old_meta, new_meta = _meta(old), _meta(new)
    what = differences(old_meta, new_meta)
    if not what and stat.S_ISREG(new.status.st_mode) and not _same_data(before, after, old, new, path):
        # A program that puts size and time back after an edit (moby#31805) is found out only by reading; it is
        # read only here, where the kernel copied the file up and nothing else tells why.
        what = {"content"}
    below: list[Change] = []
    if old_meta.is_dir and new_meta.is_dir:
        below = _directories(before, after, old.name, path)
    elif new_meta.is_dir:
        below = list(_added(after, new, path))[1:]
    if what or below:
        yield Change(MODIFIED, path, old_meta, new_meta, frozenset(what))
        yield from below


def _directories(before: MergedDirectory, after: MergedDirectory, name: str, path: str) -> list[Change]:
    one, other = before.open(name), after.open(name)
    if one is None or other is None:
        return []
    with one, other:
        return _directory(one, other, path + "/")


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
