"""After a power cut: lost trees are recreated where possible."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.catalog import Catalog
from onlap.catalog.disk.boot import boot_and_mount
from onlap.catalog.disk.layout import QUARANTINE
from onlap.catalog.log import warn
from onlap.catalog.records import Record
from onlap.errors import shown
from onlap.syscalls.files import is_directory


def recover(catalog: Catalog, remake: Callable[[Record], bool]) -> None:
    """Look for trees lost in a power cut, if there may have been one since the root was last opened.

    A durable row does not make its new directory durable: the rename into ``snapshots/`` may be lost while the row is
    kept, and an fsync of ``snapshots/`` in every prepare would double its time.

    Args:
        catalog: of the root; its snapshots that cannot be repaired are in :attr:`Catalog.lost` afterwards.
        remake: recreates what is missing of a snapshot's directory, and returns whether it is complete.
    """
    with errors.translated("open the root", key=catalog.layout.root):
        now = boot_and_mount(catalog.layout.snapshots)
    if catalog.database.read(lambda c: records.setting(c, "epoch")) == now:
        return
    outdated: list[int] = []
    for record in catalog.walk(None):
        if not _recovered(catalog, record, remake):
            catalog.lost.append(record)
        elif not catalog.sidecars.is_current(record):  # no sync wrote it to the disk
            outdated.append(record.id)

    def operation(connection: Connection) -> None:
        records.set_due(connection, outdated)
        # Otherwise the next process that opens the root has to know as well; likewise while it cannot be written.
        if not catalog.lost:
            records.put_setting(connection, "epoch", now)

    if outdated or not catalog.lost:
        with contextlib.suppress(errors.OnlapError):
            catalog.database.write(operation)
    for record in catalog.lost:
        warn(f"snapshot {shown(record.name)} has lost its tree; see: onlap check --repair")


def _recovered(catalog: Catalog, record: Record, remake: Callable[[Record], bool]) -> bool:
    try:
        if remake(record):
            return True
    except (OSError, errors.OnlapError) as error:
        # A tree that cannot be recreated must not block the others: it is tried again when the root is next opened.
        failure: Exception | None = error
    else:
        failure = None
    # Read again, since a removal deletes the record first.
    if catalog.by_id(record.id) is None:
        return True
    if failure is not None:
        warn(f"cannot recreate the tree of snapshot {shown(record.name)}: {failure}")
    return False


def restore(catalog: Catalog, record: Record, staged: str) -> None:
    """Put a recreated tree in its place, unless another process was faster or the snapshot is gone."""

    def operation(connection: Connection) -> None:
        now = records.by_id(connection, record.id)
        if now is None or now.kind != record.kind or is_directory(catalog.layout.tree(record.id)):
            return
        place = catalog.layout.snapshot(record.id)
        if is_directory(f"{place}/{QUARANTINE}"):  # what was set aside stays
            os.rename(f"{staged}/fs", catalog.layout.tree(record.id))
            return
        catalog.trash.put(place)  # what is left of it
        os.rename(staged, place)

    catalog.database.write(operation)
