"""What a layer changed, from the stacks of directories that make up it and its parent: no mount, no walk of an image.

It reads what OverlayFS wrote (opaque and renamed directories, files with only metadata, whiteouts that are hard links
of one another) as the kernel does, and so needs no other way for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from onlap import errors
from onlap.graphdrivers.contract import ADDED, DELETED, MODIFIED, Change
from onlap.graphdrivers.ids import IdMap
from onlap.layers.diff.changes import stack_changes
from onlap.layers.diff.write import Encoding, piped, write_layer
from onlap.layers.format.reader import TarReader
from onlap.layers.format.writer import TarWriter
from onlap.overlayfs.markers import Markers
from onlap.trees import compare
from onlap.trees.walk import opened, walk

_CHUNK = 256 * 1024
_BY_CONTENT = Encoding(content=True)
_KINDS = {compare.ADDED: ADDED, compare.MODIFIED: MODIFIED, compare.DELETED: DELETED}

# A container may run in the layer, and take away what is just looked at.
_TRIES = 5


def layer_changes(before: Sequence[str], after: Sequence[str], markers: Markers) -> list[Change]:
    """How one stack of directories differs from another, in Docker's words.

    Args:
        before: topmost first; none for nothing.
        after: likewise.
        markers: the flavour of the markers in them.

    Raises:
        OnlapError: something cannot be read.
    """
    for attempt in range(_TRIES):
        try:
            return list(as_docker(stack_changes(before, after, markers, content=True)))
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or attempt == _TRIES - 1:
                raise errors.from_oserror(error, doing="compare layers", key=after[0]) from error
    raise errors.Internal("the last try returned or raised")


def as_docker(found: Iterable[compare.Change]) -> Iterable[Change]:
    """The changes as ``docker diff`` shows them, in their order.

    The top directory is never named. Of a directory, the time of modification is no change: it moves with what is in it
    (moby#9874).
    """
    # Directories on the way, named only if something below them is.
    pending: list[str] = []
    for change in found:
        if change.path == ".":
            continue
        while pending and not change.path.startswith(pending[-1] + "/"):
            pending.pop()
        old, new = change.before, change.after
        directory = old is not None and old.is_dir and new is not None and new.is_dir
        if directory and not change.what - {"mtime"}:
            pending.append(change.path)
            continue
        for path in pending:
            yield Change("/" + path, MODIFIED)
        pending.clear()
        yield Change("/" + change.path, _KINDS[change.kind])


def write_diff(before: Sequence[str], after: Sequence[str], markers: Markers, ids: IdMap, out: BinaryIO) -> None:
    """Write how one stack of directories differs from another as a layer's archive, owners as a container sees them.

    Raises:
        OnlapError: something cannot be read, or has a name that no layer can hold.
    """
    with errors.translated("write the difference of layers", key=after[0]):
        if ids:
            with piped(before, after, markers, _BY_CONTENT) as source:
                _map_owners(source, out, ids)
        else:
            write_layer(before, after, markers, out, _BY_CONTENT)


def _map_owners(source: BinaryIO, out: BinaryIO, ids: IdMap) -> None:
    reader = TarReader(lambda: source.read(_CHUNK))
    writer = TarWriter(out.write)
    while (entry := reader.next()) is not None:
        base = os.path.basename(entry.name)
        if not base.startswith(".wh."):  # a whiteout has no owner
            entry.uid, entry.gid = ids.to_container(entry.uid, entry.gid)
        writer.begin(entry)
        while data := reader.piece():
            writer.write(data)
    reader.drain()
    writer.end()


def layer_size(directory: str) -> int:
    """The bytes of all files in one layer's directory, each file with several names once.

    Source: moby v26.1.5, pkg/directory/directory_unix.go.

    Raises:
        OnlapError: it cannot be read.
    """
    size = 0
    seen: set[tuple[int, int]] = set()
    with errors.translated("measure a layer", key=directory), opened(directory) as fd:
        for entry in walk(fd, ordered=False):
            status = entry.status
            if not status.st_size or status.st_mode & 0o170000 == 0o040000:
                continue
            if status.st_nlink > 1:
                identity = status.st_dev, status.st_ino
                if identity in seen:
                    continue
                seen.add(identity)
            size += status.st_size
    return size
