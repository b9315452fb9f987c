"""What a layer changed, from the directories of the layer and its parents: without a mount or a walk of the image.

It reads what OverlayFS wrote (opaque and renamed directories, metacopy files, whiteouts that are hard links of one
another) as the kernel does, so it needs no fallback for them.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from typing import BinaryIO

from onlap import errors
from onlap.graphdrivers.contract import ADDED, DELETED, MODIFIED, Change
from onlap.graphdrivers.ids import IdMap
from onlap.layers.diff.changes import stack_changes
from onlap.layers.diff.write import write_plain
from onlap.overlayfs.markers import Markers
from onlap.trees import compare
from onlap.trees.usage import inodes
from onlap.trees.walk import opened

_KINDS = {compare.ADDED: ADDED, compare.MODIFIED: MODIFIED, compare.DELETED: DELETED}

# A container may run in the layer and remove a file while it is compared.
_TRIES = 5


def layer_changes(before: Sequence[str], after: Sequence[str], markers: Markers) -> list[Change]:
    """How one stack of directories differs from another, as ``docker diff`` shows it.

    The top directory is never included, nor a directory of which only the mtime changed: it moves with the directory's
    contents (moby#9874).

    Args:
        before: topmost first; empty for no layer.
        after: likewise.
        markers: the flavour of the markers in them.

    Raises:
        OnlapError: something cannot be read.
    """
    for attempt in range(_TRIES):
        try:
            found = stack_changes(before, after, markers, content=True, directory_times=False)
            return [Change("/" + change.path, _KINDS[change.kind]) for change in found if change.path != "."]
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or attempt == _TRIES - 1:
                raise errors.from_oserror(error, doing="compare layers", key=after[0]) from error
    raise errors.Internal("the last try returned or raised")


def write_diff(before: Sequence[str], after: Sequence[str], markers: Markers, ids: IdMap, out: BinaryIO) -> None:
    """Write how one stack of directories differs from another as a layer's archive, with the container's owners.

    Raises:
        OnlapError: something cannot be read, or has a name that no layer can hold.
    """
    with errors.translated("write the difference of layers", key=after[0]):
        write_plain(before, after, markers, out, owners=ids.to_container if ids else None)


def layer_size(directory: str) -> int:
    """The bytes of all files in one layer's directory; a file with several names counts once.

    Source: moby v26.1.5, pkg/directory/directory_unix.go.

    Raises:
        OnlapError: it cannot be read.
    """
    with errors.translated("measure a layer", key=directory), opened(directory) as fd:
        return sum(status.st_size for status in inodes(fd) if not stat.S_ISDIR(status.st_mode))
