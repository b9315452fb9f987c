"""Layers become snapshots that are named by their chain IDs, as containerd names them: what each way to do it keeps."""

from __future__ import annotations

import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from onlap import errors
from onlap.catalog.records import Record
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.unpack.events import Event, Stopped, Tell
from onlap.images.unpack.jobs import Outcome
from onlap.snapshots.recorded import RecordedSnapshotter


class Layer(NamedTuple):
    """One layer of an image.

    Attributes:
        digest: of the blob.
        size: of the blob, in bytes.
        diff_id: of the archive in it.
        chain_id: the snapshot's name.
    """

    digest: str
    size: int
    diff_id: str
    chain_id: str


class Unpacking(ABC):
    """Layers being unpacked: a context manager, used by one thread.

    Args:
        snapshotter: of the root.
        content: where the blobs are, or will be.
        lease: pins what is made until the image has it.
        layers: lowest first.
        tell: hears of what becomes of them; called from other threads.

    Attributes:
        start: how many of the lowest layers are there already.
    """

    def __init__(
        self, snapshotter: RecordedSnapshotter, content: ContentStore, lease: Lease, layers: Sequence[Layer], tell: Tell
    ) -> None:
        self._snapshotter = snapshotter
        self._content = content
        self._lease = lease
        self._layers = layers
        self._tell = tell
        self.start, self._base = present(snapshotter, lease, layers)
        self._next = self.start
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether all layers are unpacked, and only :meth:`commit` is left."""
        return self._next == len(self._layers)

    def __enter__(self) -> Unpacking:
        return self

    @abstractmethod
    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None: ...

    @abstractmethod
    def offer(self, layer: int) -> None:
        """The blob of a layer is in the content store."""

    @abstractmethod
    def take(self, layer: int, outcome: Outcome) -> None:
        """A layer was unpacked, as an event said."""

    def commit(self) -> str | None:
        """Make all of them durable snapshots; the name of the topmost, None when there are no layers."""
        return self._layers[-1].chain_id if self._layers else None

    def _read(self, layer: int, done: int) -> None:
        """So many bytes of a layer were unpacked, says the thread that does it; raises Stopped when it is to end."""
        if self._stopped:
            raise Stopped
        self._tell(Event(layer, read=done))


def present(snapshotter: RecordedSnapshotter, lease: Lease, layers: Sequence[Layer]) -> tuple[int, Record | None]:
    """How many of the lowest layers are snapshots already, and the topmost of those; it is pinned."""
    for number in range(len(layers), 0, -1):
        try:
            record = snapshotter.record(layers[number - 1].chain_id)
        except errors.NotFound:
            continue
        lease.pin(snapshot=record.id)
        try:
            if snapshotter.record(record.name).id == record.id:  # not removed before it was pinned
                return number, record
        except errors.NotFound:
            continue
    return 0, None


def new_key(chain_id: str) -> str:
    """A key for an active snapshot that will be called so; as containerd's unpacker forms it."""
    return f"extract-{secrets.token_hex(4)} {chain_id}"


def drop_active(snapshotter: RecordedSnapshotter, record: Record) -> None:
    """Remove a snapshot that a layer was to be unpacked into; cleanup takes it later where that fails."""
    with contextlib.suppress(errors.OnlapError):
        snapshotter.remove(record.name, force=True)
