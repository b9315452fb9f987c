"""What a root holds, who keeps it, and what a cleanup would free: from records and directory entries, walking no tree.

What programs that were killed have left counts as theirs until a cleanup finds that they are dead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from onlap.catalog import pins
from onlap.catalog.records import ACTIVE, COMMITTED, VIEW, Record
from onlap.content.store import ContentStore
from onlap.images.records import LABEL_LAYER, LABEL_UNPACK, pin_owner
from onlap.snapshots.recorded import RecordedSnapshotter

SNAPSHOT = "snapshot"
LAYER = "layer"
BLOB = "blob"
PARTIAL = "partial"
TRASH = "trash"
LEASE = "lease"


class Thing(NamedTuple):
    """One thing.

    Attributes:
        type: ``"snapshot"``, ``"layer"`` (the snapshot of an image's layer), ``"blob"``, ``"partial"`` (the part of one
            whose fetching was interrupted), ``"trash"`` (a removed tree), ``"lease"`` (what keeps things, and is no
            image; it takes nothing itself).
        name: of a snapshot, a digest, the name in the trash, or the words of the lease.
        owner: of a snapshot; empty for library and command.
        size: bytes on the disk; None where they are not known without walking a tree.
        holders: why it stays: ``"image NAME"``, ``"snapshot NAME"`` for one that stands on it, or the words of a lease.
        reclaimable: whether a cleanup would delete it; what is mounted or read somewhere waits.
        holds: of a lease, the digests and the names of snapshots that it keeps.
    """

    type: str
    name: str
    owner: str = ""
    size: int | None = None
    holders: tuple[str, ...] = ()
    reclaimable: bool = False
    holds: tuple[str, ...] = ()


def things(snapshotter: RecordedSnapshotter, content: ContentStore) -> Iterator[Thing]:
    """All things of a root: snapshots in the order of their making, of every owner; then the rest.

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
    owners = {pin.owner for pin in valid}
    kept = _kept(records, {record.id for record in records.values() if not _is_free(record, by_snapshot, owners)})
    for record in records.values():
        kind = LAYER if LABEL_LAYER in record.labels else SNAPSHOT
        holders = (*by_snapshot[record.id], *children[record.id])
        size = 0 if record.kind == VIEW else record.size
        yield Thing(kind, record.name, record.owner, size, holders, record.id not in kept)
    for kind, blobs in ((BLOB, content.walk()), (PARTIAL, content.partials())):
        for blob in blobs:
            holders = tuple(by_digest[blob.digest])
            yield Thing(kind, blob.digest, "", blob.size, holders, not holders)
    for name in sorted(catalog.trash.names()):
        yield Thing(TRASH, name, reclaimable=True)
    for owner in sorted(owners):
        if not owner.startswith(pin_owner("")):
            digests = [digest for digest, holders in by_digest.items() if owner in holders]
            names = [record.name for record in records.values() if owner in by_snapshot[record.id]]
            yield Thing(LEASE, owner, holds=(*digests, *names))


def _is_free(record: Record, pinned: Collection[int], owners: Collection[str]) -> bool:
    """Whether nothing but what stands on it keeps a snapshot from a cleanup (:mod:`onlap.images.garbage`)."""
    if record.owner or record.id in pinned:
        return False
    if record.kind == ACTIVE:
        return LABEL_UNPACK in record.labels and record.labels[LABEL_UNPACK] not in owners
    return record.kind == COMMITTED and LABEL_LAYER in record.labels


def _kept(records: Mapping[int, Record], stay: set[int]) -> set[int]:
    """The snapshots that stay, with all that they stand on."""
    kept: set[int] = set()
    for identifier in stay:
        below: int | None = identifier
        while below is not None and below not in kept and below in records:
            kept.add(below)
            below = records[below].parent_id
    return kept
