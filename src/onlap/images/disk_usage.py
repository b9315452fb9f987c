"""What a root holds, who keeps it, and what a cleanup would free; from records and directory entries, without a walk.

What a killed program has left counts as its own until a cleanup finds that it is dead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from onlap.catalog import pins
from onlap.catalog.records import VIEW
from onlap.content.store import ContentStore
from onlap.images import garbage
from onlap.images.records import LABEL_LAYER, pin_owner
from onlap.snapshots.recorded import RecordedSnapshotter

SNAPSHOT = "snapshot"
LAYER = "layer"
BLOB = "blob"
PARTIAL = "partial"
TRASH = "trash"
LEASE = "lease"


class Item(NamedTuple):
    """What a root holds.

    Attributes:
        type: ``"snapshot"``, ``"layer"`` (the snapshot of an image's layer), ``"blob"``, ``"partial"`` (the part of a
            blob whose fetching was interrupted), ``"trash"`` (a removed tree), ``"lease"`` (what keeps others, and is
            not an image; it takes no space itself).
        name: of a snapshot, a digest, the name in the trash, or the words of the lease.
        owner: of a snapshot; empty for library and command.
        size: bytes on the disk; None where only walking a tree would say.
        holders: why it stays: ``"image NAME"``, ``"snapshot NAME"`` for a child, or the words of a lease.
        reclaimable: whether a cleanup would delete it, once it is not mounted or read anywhere.
        holds: of a lease, the digests and the names of snapshots that it keeps.
    """

    type: str
    name: str
    owner: str = ""
    size: int | None = None
    holders: tuple[str, ...] = ()
    reclaimable: bool = False
    holds: tuple[str, ...] = ()


def items(snapshotter: RecordedSnapshotter, content: ContentStore) -> Iterator[Item]:
    """All that a root holds: the snapshots of every owner, in the order in which they were made; then the rest.

    Raises:
        OnlapError: the catalog or a directory cannot be read.
    """
    catalog = snapshotter.catalog
    valid = catalog.database.read(pins.valid)
    by_snapshot: defaultdict[int, list[str]] = defaultdict(list)
    by_digest: defaultdict[str, list[str]] = defaultdict(list)
    for pin in valid:
        if pin.snapshot is not None:
            by_snapshot[pin.snapshot].append(pin.owner)
        elif pin.digest is not None:
            by_digest[pin.digest].append(pin.owner)
    records = {record.id: record for record in catalog.walk(None)}
    children: defaultdict[int, list[str]] = defaultdict(list)
    for record in records.values():
        if record.parent_id is not None:
            children[record.parent_id].append(f"snapshot {record.name}")
    unneeded = {record.id for record in garbage.unneeded(records, valid, owner="")}
    for record in records.values():
        kind = LAYER if LABEL_LAYER in record.labels else SNAPSHOT
        holders = (*by_snapshot[record.id], *children[record.id])
        size = 0 if record.kind == VIEW else record.size
        yield Item(kind, record.name, record.owner, size, holders, record.id in unneeded)
    for kind, blobs in ((BLOB, content.walk()), (PARTIAL, content.partials())):
        for blob in blobs:
            holders = tuple(by_digest[blob.digest])
            yield Item(kind, blob.digest, "", blob.size, holders, not holders)
    for name in sorted(catalog.trash.names()):
        yield Item(TRASH, name, reclaimable=True)
    for owner in sorted({pin.owner for pin in valid}):
        if not owner.startswith(pin_owner("")):
            digests = [digest for digest, holders in by_digest.items() if owner in holders]
            names = [record.name for record in records.values() if owner in by_snapshot[record.id]]
            yield Item(LEASE, owner, holds=(*digests, *names))
