"""Unpacking into a root of whole copies (the native snapshotter): each layer onto a copy of the one below, in order."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from onlap import errors
from onlap.catalog.records import Record
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.labels import LABEL_LAYER
from onlap.images.unpack.contract import Layer, Unpacking, drop_active, new_key
from onlap.images.unpack.events import Event, Tell
from onlap.images.unpack.jobs import Outcome
from onlap.progress import Progress
from onlap.snapshots.archives import apply_layer
from onlap.snapshots.recorded import RecordedSnapshotter


class CopiesUnpacking(Unpacking):
    """Layers into a root of copies."""

    def __init__(
        self, snapshotter: RecordedSnapshotter, content: ContentStore, lease: Lease, layers: Sequence[Layer], tell: Tell
    ) -> None:
        super().__init__(snapshotter, content, lease, layers, tell)
        self._offered: set[int] = set()
        self._active: Record | None = None
        self._thread: threading.Thread | None = None

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        if self._thread is not None:
            self._thread.join()
        if self._active is not None:
            drop_active(self._snapshotter, self._active)

    def offer(self, layer: int) -> None:
        self._offered.add(layer)
        self._go_on()

    def _go_on(self) -> None:
        if self._active is not None or self._next not in self._offered:
            return
        number = self._next
        layer = self._layers[number]
        key = new_key(layer.chain_id)
        parent = self._layers[number - 1].chain_id if number else None
        self._snapshotter.prepare(key, parent, self._lease.run.labels)
        self._active = self._snapshotter.record(key)
        self._thread = threading.Thread(target=self._apply, args=(number, key), name="onlap-unpack", daemon=True)
        self._thread.start()

    def _apply(self, number: int, key: str) -> None:
        layer = self._layers[number]

        def progress(report: Progress) -> None:
            self._read(number, report.done)

        try:
            applied = apply_layer(
                self._snapshotter,
                key,
                self._content.path(layer.digest),
                digest=layer.digest,
                diff_id=layer.diff_id,
                progress=progress,
            )
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._tell(Event(number, failure=error))
        else:
            self._tell(Event(number, outcome=Outcome(settled=True, skipped=applied.skipped)))

    def take(self, layer: int, outcome: Outcome) -> None:
        assert self._active is not None
        assert self._thread is not None
        self._thread.join()
        one = self._layers[layer]
        active = self._active
        self._lease.pin(snapshot=active.id)
        try:
            # A copy is made of what is recorded: each layer is recorded, and synced, before the next one starts.
            self._snapshotter.commit(one.chain_id, active.name, {LABEL_LAYER: one.diff_id})
        except errors.AlreadyExists:  # another process was faster, with the same content
            self._lease.unpin_snapshot(active.id)
            drop_active(self._snapshotter, active)
            self._lease.pin(snapshot=self._snapshotter.record(one.chain_id).id)
        self._active = None
        self._next += 1
        self._go_on()
