"""Layers become snapshots that are named by their chain IDs, as in containerd: what all snapshotters share."""

from __future__ import annotations

import contextlib
import secrets
from abc import ABC, abstractmethod

from onlap import errors
from onlap.catalog.records import Record
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.index import Image
from onlap.images.unpack.threads import EventLoop, Stage
from onlap.progress import Callback
from onlap.snapshots.recorded import RecordedSnapshotter


class Unpacking(ABC):
    """The layers of an image being unpacked: a context manager, used by the thread that runs the loop.

    Args:
        snapshotter: of the root.
        content: where the blobs are, or will be.
        lease: pins the snapshots until the image has them.
        image: whose layers.
        loop: runs what the threads that unpack hand over.
        progress: called with reports of the stage ``unpack``, in bytes.

    Attributes:
        start: how many of the lowest layers are unpacked already.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        content: ContentStore,
        lease: Lease,
        image: Image,
        loop: EventLoop,
        progress: Callback | None,
    ) -> None:
        self._snapshotter = snapshotter
        self._content = content
        self._lease = lease
        self._image = image
        self._loop = loop
        self.start, self._base = _find_unpacked(snapshotter, lease, image.chain_ids)
        self._next = self.start
        self._stage = Stage(progress, "unpack", dict(list(enumerate(image.layers))[self.start :]))

    @property
    def finished(self) -> bool:
        """Whether all layers are unpacked, and only :meth:`commit` is left."""
        return self._next == len(self._image.layers)

    def __enter__(self) -> Unpacking:
        return self

    @abstractmethod
    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None: ...

    @abstractmethod
    def offer(self, layer: int) -> None:
        """The blob of a layer, which is not unpacked yet, is in the content store."""

    def commit(self) -> str | None:
        """Make all layers durable snapshots.

        Returns:
            The name of the topmost; None where there are no layers.
        """
        self._stage.finish()
        return self._image.chain_ids[-1] if self._image.chain_ids else None

    def _read(self, layer: int, done: int) -> None:
        """Report the bytes of a layer that were unpacked, from the thread that does it.

        Raises:
            Canceled: the thread must stop.
        """
        self._loop.check()
        self._loop.call_soon(self._stage.advance, layer, done)


def _find_unpacked(
    snapshotter: RecordedSnapshotter, lease: Lease, chain_ids: tuple[str, ...]
) -> tuple[int, Record | None]:
    """How many of the lowest layers are snapshots already, and the topmost of those, which is pinned."""
    for number in range(len(chain_ids), 0, -1):
        try:
            record = snapshotter.record(chain_ids[number - 1])
            lease.pin(snapshot=record.id)
            if snapshotter.record(record.name).id == record.id:  # not removed before it was pinned
                return number, record
        except errors.NotFound:
            continue
    return 0, None


def new_key(chain_id: str) -> str:
    """A key for an active snapshot that will be committed under ``chain_id``, in the form of containerd's unpacker."""
    return f"extract-{secrets.token_hex(4)} {chain_id}"


def drop_active(snapshotter: RecordedSnapshotter, record: Record) -> None:
    """Remove a snapshot that a layer was to be unpacked into; where that fails, cleanup removes it later."""
    with contextlib.suppress(errors.OnlapError):
        snapshotter.remove(record.name, force=True)
