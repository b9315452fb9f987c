"""A layer's archive into a directory, as graph drivers need it.

Other than :func:`onlap.layers.apply.archive.apply`: owners are mapped, nothing is hashed (dockerd does that), and an
archive without an end marker is whole when it ends between two entries, as Go's archive/tar has it; dockerd compares
digests.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from typing import BinaryIO

from onlap import errors
from onlap.arguments import check_file
from onlap.graphdrivers.ids import IdMap
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.top import Top
from onlap.layers.format.reader import TarReader
from onlap.layers.format.tar import FILE
from onlap.overlayfs.markers import Markers
from onlap.syscalls import files
from onlap.trees.walk import OPEN_DIRECTORY, walk

_log = logging.getLogger("onlap.graphdrivers")

_CHUNK = 256 * 1024


def apply_archive(
    archive: BinaryIO, directory: str, *, lowers: Sequence[str] = (), markers: Markers | None, ids: IdMap
) -> int:
    """Write an uncompressed tar into ``directory``; if that was empty, it is empty again after an error.

    Args:
        archive: is read to its end.
        directory: an upper layer that is not mounted, or a whole tree.
        lowers: the layers below, topmost first.
        markers: how whiteouts are written; None: the directory is a whole tree, and they remove from it.
        ids: what the owners in the archive are on disk.

    Returns:
        The sizes of all its files, as the archive says them (moby: pkg/archive/diff.go, UnpackLayer).

    Raises:
        InvalidArgument, DataLoss, ResourceExhausted, OnlapError: see :meth:`DiffDriver.apply_diff`.
    """
    check_file(archive, "archive", "read")
    with errors.translated("open the layer", key=directory):
        fd = os.open(directory, OPEN_DIRECTORY)
    try:
        was_empty = not files.list_directory(fd)
        before = Top(fd)
        try:
            return _apply(archive, fd, lowers, markers, ids)
        except BaseException:
            if was_empty:
                _undo(before)
            raise
    finally:
        os.close(fd)


def _apply(archive: BinaryIO, fd: int, lowers: Sequence[str], markers: Markers | None, ids: IdMap) -> int:
    def chunk() -> bytes:
        with errors.translated("read the archive"):
            data = archive.read(_CHUNK)
        if not isinstance(data, bytes):
            raise errors.InvalidArgument("the archive is read as no bytes", hint="open it in binary mode")
        return data

    reader = TarReader(chunk)
    with errors.translated("open the layers"):
        applier = Applier(reader, fd, lowers, markers, recorded=markers is not None and markers.recorded)
    size = 0
    try:
        while (entry := reader.next()) is not None:
            if ids:
                entry.uid, entry.gid = ids.to_host(entry.uid, entry.gid)
            if entry.type == FILE:
                size += entry.size
            applier.entry(entry)
        reader.drain()
        applier.finish()
    finally:
        applier.close()
    if ids:
        _give_away(fd, ids)
    return size


def _give_away(fd: int, ids: IdMap) -> None:
    """Give directories that the archive did not name to the container's root: they were made as ours."""
    mine = os.geteuid()
    for entry in walk(fd, ordered=False):
        if entry.status.st_uid == mine and stat.S_ISDIR(entry.status.st_mode):
            uid, gid = ids.root
            os.chown(entry.name, uid, gid, dir_fd=entry.dir_fd, follow_symlinks=False)


def _undo(before: Top) -> None:
    """Remove what was applied. The first error, which led here, says what is wrong; one of this would hide it."""
    try:
        before.restore()
    except OSError as error:
        _log.warning("what was half applied stays", extra={"fields": {"error": error}})
