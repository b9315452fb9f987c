"""A differ for drivers without one: it gets both trees and compares them.

Source of the contract: moby v26.1.5, daemon/graphdriver/fsdiff.go. Docker's compares mtimes by the second if either has
no fraction, and so loses edits that keep a file's size and mtime (moby#31805); to see later changes it sleeps to the
next full second after each diff. This one reads files with equal attributes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from onlap import errors
from onlap.forks import unless_forked
from onlap.graphdrivers.contract import DELETED, Change, ProtoDriver
from onlap.graphdrivers.diff.apply import apply_archive
from onlap.graphdrivers.diff.changes import layer_changes, write_diff
from onlap.graphdrivers.ids import IdMap
from onlap.overlayfs.markers import TRUSTED, Markers


class NaiveDiffer:
    """The :class:`~onlap.graphdrivers.contract.DiffDriver` of a driver that is only a ``ProtoDriver``.

    Args:
        driver: provides the trees.
        ids: maps owners in archives to those on disk.
    """

    # A merged tree shows no markers, whatever the flavour.
    _markers = Markers(TRUSTED)

    def __init__(self, driver: ProtoDriver, ids: IdMap | None = None) -> None:
        self._driver = driver
        self._ids = ids or IdMap()

    @contextmanager
    def _got(self, id: str) -> Iterator[list[str]]:
        """The tree of ``id`` as a stack of one layer; empty if ``id`` is empty."""
        if not id:
            yield []
            return
        directory = self._driver.get(id)
        put = unless_forked(self._driver.put)
        try:
            yield [directory]
        finally:
            put(id)

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        """See :meth:`DiffDriver.diff`."""
        with self._got(parent) as before, self._got(id) as after:
            write_diff(before, after, self._markers, self._ids, out)

    def changes(self, id: str, parent: str) -> list[Change]:
        """See :meth:`DiffDriver.changes`."""
        with self._got(parent) as before, self._got(id) as after:
            return layer_changes(before, after, self._markers)

    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        """See :meth:`DiffDriver.apply_diff`; the size is that of the archive's files."""
        with self._got(id) as (directory,):
            return apply_archive(archive, directory, markers=None, ids=self._ids)

    def diff_size(self, id: str, parent: str) -> int:
        """See :meth:`DiffDriver.diff_size`."""
        with self._got(parent) as before, self._got(id) as after:
            return size_of(after[0], layer_changes(before, after, self._markers))


def size_of(directory: str, changes: list[Change]) -> int:
    """The bytes of the new or changed files in ``directory``; a file with several names counts once.

    Source: moby v26.1.5, pkg/archive/changes.go, ChangesSize.

    Raises:
        OnlapError: a file cannot be read.
    """
    size = 0
    seen: set[tuple[int, int]] = set()
    for change in changes:
        if change.kind == DELETED:
            continue
        try:
            status = os.lstat(directory + change.path)
        except FileNotFoundError:
            continue  # removed meanwhile: a container may run in the tree
        except OSError as error:
            raise errors.from_oserror(error, doing="measure a layer", key=change.path) from error
        identity = status.st_dev, status.st_ino
        if stat.S_ISDIR(status.st_mode) or identity in seen:
            continue
        if status.st_nlink > 1:
            seen.add(identity)
        size += status.st_size
    return size
