"""A differ for drivers that bring none: it gets both trees and compares them.

Source of the contract: moby v26.1.5, daemon/graphdriver/fsdiff.go. That one compares times of modification by the
second where either has no fraction, and so loses edits that keep a file's size and time (moby#31805); to see later
changes it sleeps to the next full second after each diff. Here files whose attributes are the same are read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from onlap import errors
from onlap.forks import only_here
from onlap.graphdrivers.contract import DELETED, Change, ProtoDriver
from onlap.graphdrivers.diff.applying import apply_archive
from onlap.graphdrivers.diff.stacks import layer_changes, write_diff
from onlap.graphdrivers.ids import IdMap
from onlap.overlayfs.markers import TRUSTED, Markers


class NaiveDiffer:
    """The :class:`~onlap.graphdrivers.contract.DiffDriver` of a driver that has only the first half.

    Args:
        driver: gives the trees.
        ids: how owners on disk and in archives differ.
    """

    # A merged tree shows none, whatever the flavour.
    _markers = Markers(TRUSTED)

    def __init__(self, driver: ProtoDriver, ids: IdMap | None = None) -> None:
        self._driver = driver
        self._ids = ids or IdMap()

    @contextmanager
    def _got(self, id: str) -> Iterator[list[str]]:
        """The tree of ``id`` as a stack of one layer; none for no id."""
        if not id:
            yield []
            return
        directory = self._driver.get(id)
        put = only_here(self._driver.put)
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
    """The bytes of the files in ``directory`` that are new or changed, each file with several names once.

    Source: moby v26.1.5, pkg/archive/changes.go, ChangesSize.

    Raises:
        OnlapError: for what the kernel says.
    """
    size = 0
    seen: set[tuple[int, int]] = set()
    for change in changes:
        if change.kind == DELETED:
            continue
        try:
            status = os.lstat(directory + change.path)
        except FileNotFoundError:
            continue  # it went meanwhile: a container may run in it
        except OSError as error:
            raise errors.from_oserror(error, doing="measure a layer", key=change.path) from error
        identity = status.st_dev, status.st_ino
        if stat.S_ISDIR(status.st_mode) or identity in seen:
            continue
        if status.st_nlink > 1:
            seen.add(identity)
        size += status.st_size
    return size
