"""What no image needs any more: snapshots of layers, what a killed unpacking has left, and blobs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import pins
from onlap.catalog.pins import Pin
from onlap.catalog.records import ACTIVE, COMMITTED, Record
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.records import LABEL_LAYER, LABEL_UNPACK
from onlap.snapshots.recorded import RecordedSnapshotter


def unneeded(records: Mapping[int, Record], valid: Collection[Pin], *, owner: str) -> list[Record]:
    """The snapshots that nothing keeps; children come before their parents.

    Args:
        records: of all snapshots, by id.
        valid: the pins.
        owner: whose snapshots count; others stay.
    """
    pinned, owners = {pin.snapshot for pin in valid}, {pin.owner for pin in valid}

    def is_free(record: Record) -> bool:
        if record.owner != owner or record.id in pinned:
            return False
        if record.kind == ACTIVE:
            return LABEL_UNPACK in record.labels and record.labels[LABEL_UNPACK] not in owners
        return record.kind == COMMITTED and LABEL_LAYER in record.labels

    def stack(record: Record | None) -> Iterator[int]:
        while record is not None:
            yield record.id
            record = records.get(record.parent_id) if record.parent_id is not None else None

    kept: set[int] = set()
    for record in records.values():
        if not is_free(record):
            kept.update(itertools.takewhile(lambda identifier: identifier not in kept, stack(record)))
    found = [record for record in records.values() if record.id not in kept]
    return sorted(found, key=lambda record: sum(1 for _ in stack(record)), reverse=True)


def collect(snapshotter: RecordedSnapshotter, content: ContentStore) -> int:
    """Remove the snapshots and blobs that nothing keeps.

    Returns:
        How many blobs were deleted.

    Raises:
        OnlapError: the filesystem or the catalog refuses.
    """
    collect_layers(snapshotter)
    return content.collect()


def collect_layers(snapshotter: RecordedSnapshotter) -> None:
    """Remove the snapshots that nothing keeps; errors as of :func:`collect`."""
    catalog = snapshotter.catalog
    records = {record.id: record for record in catalog.walk(None)}
    for record in unneeded(records, catalog.database.read(pins.valid), owner=snapshotter.owner):
        _remove(snapshotter, record.name)


@contextlib.contextmanager
def unless_refused(snapshotter: RecordedSnapshotter, content: ContentStore, lease: Lease) -> Iterator[None]:
    """Leave nothing of an image that is hostile or damaged; what was interrupted stays, to be resumed."""
    try:
        yield
    except (errors.InvalidArgument, errors.DataLoss, errors.Unimplemented, errors.NotFound):
        with contextlib.suppress(errors.OnlapError):  # the first error is the one to report
            lease.end()
            collect_layers(snapshotter)
            content.collect(lease.digests)
        raise


def _remove(snapshotter: RecordedSnapshotter, name: str) -> None:
    def is_free(connection: Connection) -> bool:
        row = connection.execute(
            "SELECT id FROM snapshots s WHERE owner = ? AND name = ?"
            " AND NOT EXISTS (SELECT 1 FROM snapshots WHERE parent = s.id)",
            (snapshotter.owner, name),
        ).fetchone()
        return row is not None and not pins.holders(connection, snapshot=row[0])

    # Checked first: a write transaction for each layer that is needed by now would make others wait.
    if snapshotter.catalog.database.read(is_free):
        with contextlib.suppress(errors.NotFound, errors.FailedPrecondition):  # removed, or needed, by another by now
            snapshotter.remove(name)
