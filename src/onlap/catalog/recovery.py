"""After a power cut: trees that it took are made again, where they can be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.catalog import Catalog
from onlap.catalog.disk.epoch import epoch
from onlap.catalog.log import warn
from onlap.catalog.records import Record
from onlap.errors import shown


def recover(catalog: Catalog, remake: Callable[[Record], bool]) -> None:
    """Look for trees that a power cut took, when there may have been one since the root was opened last.

    A durable row does not make its fresh directory durable: the rename into ``snapshots/`` may be lost while the
    row is kept, and an fsync of ``snapshots/`` on every prepare would double its time.

    Args:
        catalog: of the root; those of its snapshots that cannot be made whole are in :attr:`Catalog.lost` then.
        remake: makes what is missing of a snapshot's directory and says whether it is whole then.
    """
    with errors.translated("open the root", key=catalog.layout.root):
        now = epoch(catalog.layout.snapshots)
    if catalog.database.read(lambda c: records.setting(c, "epoch")) == now:
        return
    catalog.lost = [record for record in catalog.walk(None) if not _recovered(catalog, record, remake)]
    if not catalog.lost:
        # Else whoever opens the root next shall know as well; and as long as it cannot be written, too.
        with contextlib.suppress(errors.OnlapError):
            catalog.database.write(lambda c: records.put_setting(c, "epoch", now))
    for record in catalog.lost:
        warn(f"snapshot {shown(record.name)} has lost its tree in a crash; remove it, leaf first")


def _recovered(catalog: Catalog, record: Record, remake: Callable[[Record], bool]) -> bool:
    try:
        if remake(record):
            return True
    except (OSError, errors.OnlapError) as error:
        # One that cannot be made again must not keep the others: it is tried again when the root is opened next.
        failure: Exception | None = error
    else:
        failure = None
    # Looked at again, since whoever removes one deletes its record first.
    if catalog.database.read(lambda c: records.by_id(c, record.id)) is None:
        return True
    if failure is not None:
        warn(f"cannot make the tree of snapshot {shown(record.name)} again: {failure}")
    return False


def restore(catalog: Catalog, record: Record, staged: str) -> None:
    """Put a tree that was made again in its place, unless another process was faster or the snapshot is gone."""

    def operation(connection: Connection) -> None:
        now = records.by_id(connection, record.id)
        if now is None or now.kind != record.kind or os.path.isdir(catalog.layout.tree(record.id)):
            return
        catalog.trash.put(catalog.layout.snapshot(record.id))  # what a power cut left of it
        os.rename(staged, catalog.layout.snapshot(record.id))

    catalog.database.write(operation)
