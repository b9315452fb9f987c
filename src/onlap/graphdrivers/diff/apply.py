"""Applying a layer's archive to a directory, as graph drivers need it.

Unlike :func:`onlap.layers.apply.archive.apply`, it maps owners and hashes nothing (dockerd does that). An archive
without an end marker is complete if it ends between two entries, as in Go's archive/tar; dockerd compares digests.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import BinaryIO

from onlap import errors
from onlap.arguments import check_file
from onlap.graphdrivers.ids import IdMap
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.rollback import emptied_on_error
from onlap.layers.format.reader import TarReader
from onlap.layers.format.tar import FILE
from onlap.overlayfs.markers import Markers
from onlap.trees.walk import opened, walk

_CHUNK = 256 * 1024


def apply_archive(
    archive: BinaryIO, directory: str, *, lowers: Sequence[str] = (), markers: Markers | None, ids: IdMap
) -> int:
    """Write an uncompressed tar into ``directory``; after an error, a directory that was empty is empty again.

    Args:
        archive: read to its end.
        directory: an upper layer that is not mounted, or a whole tree.
        lowers: the layers below, topmost first.
        markers: how whiteouts are written; None: the directory is a whole tree, and whiteouts remove files from it.
        ids: maps the owners in the archive to those on disk.

    Returns:
        The sum of the file sizes in the archive (moby: pkg/archive/diff.go, UnpackLayer).

    Raises:
        InvalidArgument, DataLoss, ResourceExhausted, OnlapError: see :meth:`DiffDriver.apply_diff`.
    """
    check_file(archive, "archive", "read")

    def chunk() -> bytes:
        with errors.translated("read the archive"):
            data = archive.read(_CHUNK)
        if not isinstance(data, bytes):
            raise errors.InvalidArgument("reading the archive does not give bytes", hint="open it in binary mode")
        return data

    reader = TarReader(chunk)
    size = 0
    with ExitStack() as stack:
        with errors.translated("open the layer", key=directory):
            fd = stack.enter_context(opened(directory))
            stack.enter_context(emptied_on_error(fd))
        with errors.translated("open the layers"):
            recorded = markers is not None and markers.recorded
            applier = Applier(reader, fd, lowers, markers, recorded=recorded)
        with closing(applier):
            while (entry := reader.next()) is not None:
                if ids:
                    entry.uid, entry.gid = ids.to_host(entry.uid, entry.gid)
                if entry.type == FILE:
                    size += entry.size
                applier.entry(entry)
            reader.drain()
            applier.finish()
        if ids:
            _chown_directories(fd, ids)
    return size


def _chown_directories(fd: int, ids: IdMap) -> None:
    """Give directories that the archive does not name to the container's root: they were made as this process's."""
    mine = os.geteuid()
    for entry in walk(fd, ordered=False):
        if entry.status.st_uid == mine and stat.S_ISDIR(entry.status.st_mode):
            uid, gid = ids.root
            os.chown(entry.name, uid, gid, dir_fd=entry.dir_fd, follow_symlinks=False)
