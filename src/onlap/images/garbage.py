"""What no image needs any more: snapshots of layers, and what an unpacking that was killed has left; then the blobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import pins
from onlap.catalog.records import ACTIVE, COMMITTED
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.records import LABEL_LAYER, LABEL_UNPACK
from onlap.snapshots.recorded import RecordedSnapshotter


def collect(snapshotter: RecordedSnapshotter, content: ContentStore) -> int:
    """Remove all that; what is pinned, or has something standing on it, stays. Returns how many blobs went.

    Raises:
        OnlapError: the filesystem or the catalog refuses.
    """
    collect_layers(snapshotter)
    return content.collect()


def collect_layers(snapshotter: RecordedSnapshotter) -> None:
    """Remove the snapshots; errors as of :func:`collect`."""
    for info in list(snapshotter.walk(f'kind=={ACTIVE},labels."{LABEL_UNPACK}"')):
        lease = info.labels[LABEL_UNPACK]
        if not snapshotter.catalog.database.read(lambda c: pins.lives(c, lease)):  # noqa: B023 - run at once
            _remove(snapshotter, info.name)
    # What stands on another goes first, and only then the other is found to be free.
    while True:
        infos = list(snapshotter.walk(f'kind=={COMMITTED},labels."{LABEL_LAYER}"'))
        # Mostly what stands on another was made after it, so that one round takes all.
        if not sum(_remove(snapshotter, info.name) for info in reversed(infos)):
            break


@contextlib.contextmanager
def unless_refused(snapshotter: RecordedSnapshotter, content: ContentStore, lease: Lease) -> Iterator[None]:
    """Take an image in: of one that is hostile or damaged nothing is left; what was interrupted is resumed later."""
    try:
        yield
    except (errors.InvalidArgument, errors.DataLoss, errors.Unimplemented, errors.NotFound):
        with contextlib.suppress(errors.OnlapError):  # the first error is the one to tell
            lease.end()
            collect_layers(snapshotter)
            content.collect(lease.digests)
        raise


def _remove(snapshotter: RecordedSnapshotter, name: str) -> bool:
    def free(connection: Connection) -> bool:
        row = connection.execute(
            "SELECT id FROM snapshots s WHERE owner = ? AND name = ?"
            " AND NOT EXISTS (SELECT 1 FROM snapshots WHERE parent = s.id)",
            (snapshotter.owner, name),
        ).fetchone()
        return row is not None and not pins.holders(connection, snapshot=row[0])

    # Looked at first: a write transaction for each layer that stays would make others wait.
    if not snapshotter.catalog.database.read(free):
        return False
    try:
        snapshotter.remove(name)
    except (errors.NotFound, errors.FailedPrecondition):
        return False  # somebody was faster, or needs it now
    return True
