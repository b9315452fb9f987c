"""Manifests: what each committed layer holds, listed in the background, for ``check`` to compare with and repair by.

::

    ROOT/snapshots/<id>/about/manifest   see onlap.trees.manifest; its digest is in the catalog

What a process does not get done, the next one does, or ``cleanup --manifests``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from onlap import errors
from onlap.catalog import records
from onlap.catalog.checks import lost
from onlap.catalog.db.database import Database
from onlap.catalog.disk.layout import Layout
from onlap.catalog.disk.pace import Pace, Stopped
from onlap.catalog.disk.staging import Staging
from onlap.catalog.log import warn
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.locks import lock_directory
from onlap.syscalls.files import open_file
from onlap.trees.walk import opened

if TYPE_CHECKING:
    from onlap.trees import manifest

# Bytes read per second in the background: a small part of what a disk gives, and a tenth of what one core hashes.
RATE = 100e6
# A file costs as much as so many bytes to open and to look at.
FILE_COST = 20_000
_BURST = 4 << 20


class Manifests:
    """The manifests of a root.

    Args:
        layout: of the root.
        staging: where they are written before they have their place.
        database: its records, which keep the digests.
        made: called with the id of a snapshot that got its manifest.
    """

    def __init__(self, layout: Layout, staging: Staging, database: Database, made: Callable[[int], None]) -> None:
        self.layout = layout
        self.staging = staging
        self.database = database
        self._made = made
        self._unlisted: set[int] = set()
        self._looked = False

    def committed(self, identifier: int) -> None:
        """Note that a snapshot was committed."""
        self._unlisted.add(identifier)

    def removed(self, identifier: int) -> None:
        """Note that a snapshot was removed: most are, in a burst, before their turn comes."""
        self._unlisted.discard(identifier)

    def make(self, stop: Callable[[], bool]) -> int:
        """Make those that are missing, slowly, until ``stop`` says so; returns how many.

        Raises:
            OnlapError: the catalog cannot be read.
        """
        if not self._looked:
            # Only once, for what other processes left: they list their later commits, or the next process does.
            self._unlisted.update(self.database.read(records.without_manifest))
            self._looked = True
        made = 0
        pace = Pace(stop, lambda: RATE, _BURST)
        while self._unlisted and not stop():
            try:
                identifier = self._unlisted.pop()
            except KeyError:
                break  # it was removed meanwhile
            try:
                made += self._make(identifier, pace)
            except Stopped:
                self._unlisted.add(identifier)
                break
        return made

    def make_all(self) -> int:
        """Make all that are missing, also those of other processes, as fast as it goes; returns how many.

        Raises:
            OnlapError: the catalog cannot be read.
        """
        pace = Pace(lambda: False, lambda: None, _BURST)
        return sum(self._make(identifier, pace) for identifier in self.database.read(records.without_manifest))

    def _make(self, identifier: int, pace: Pace) -> bool:
        """Make one, unless there is one already; returns whether it was made."""
        try:
            return self._try(identifier, pace)
        except (OSError, errors.OnlapError) as error:
            # check reports one that is lost or damaged.
            warn(f"cannot note what the layer {identifier} holds: {error}")
            return False

    def ensure(self, record: Record) -> str:
        """The digest of a committed snapshot's manifest, which is made now if it is missing.

        Raises:
            DataLoss: its tree is lost.
            OnlapError: it cannot be made.
        """
        with errors.translated("list the content of a layer", key=record.name):
            self._try(record.id, Pace(lambda: False, lambda: None, _BURST))
        digest = self.database.read(lambda c: records.manifest(c, record.id))
        if digest is None:
            raise lost(record)
        return digest

    def _try(self, identifier: int, pace: Pace) -> bool:
        record = self.database.read(lambda c: records.by_id(c, identifier))
        if record is None or self.database.read(lambda c: records.manifest(c, identifier)) is not None:
            return False
        try:
            held = lock_directory(self.layout.snapshot(identifier), shared=True)
        except FileNotFoundError:
            return False  # removed meanwhile, or lost, which check reports
        if held is None:
            return False  # it is being deleted
        with held, opened(self.layout.tree(identifier)) as tree:
            digest = self._write(identifier, tree, pace)
        self.database.write(lambda c: records.set_manifest(c, identifier, digest))
        self._made(identifier)
        return True

    def _write(self, identifier: int, tree: int, pace: Pace) -> str:
        from onlap.trees import manifest

        listed = manifest.entries(tree, lambda size: pace(size or FILE_COST))
        # Durable before the catalog refers to it, so that a missing one means that something was lost.
        with self.staging.file(self.layout.manifest(identifier)) as file:
            digest = manifest.write(listed, file)
            file.flush()
            os.fsync(file.fileno())
        with opened(self.layout.snapshot(identifier)) as above:
            os.fsync(above)
        return digest

    def entries(self, record: Record) -> list[manifest.Entry] | None:
        """What a committed layer held when its manifest was written; None if it has none yet.

        Raises:
            DataLoss: the manifest is damaged, or gone.
            OnlapError: it cannot be read.
        """
        from onlap.trees import manifest

        digest = self.database.read(lambda c: records.manifest(c, record.id))
        if digest is None:
            return None
        path = self.layout.manifest(record.id)
        try:
            with open_file(path) as file:
                return manifest.read(file, digest)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise errors.DataLoss(f"the manifest of snapshot {shown(record.name)} is gone", key=record.name) from error
        except OSError as error:
            raise errors.from_oserror(error, doing="read a manifest", key=record.name) from error
