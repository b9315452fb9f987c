"""Unpacking into a root of whole copies (the native snapshotter): each layer onto a copy of the one below, in order."""

from __future__ import annotations

from onlap import errors
from onlap.catalog.records import Record
from onlap.images.records import LABEL_LAYER
from onlap.images.unpack.contract import Unpacking, drop_active, new_key
from onlap.images.unpack.threads import ThreadPool
from onlap.snapshots.transfer.archives import apply_layer


class CopiesUnpacking(Unpacking):
    """Layers unpacked into a root of copies."""

    def __enter__(self) -> Unpacking:
        self._offered: set[int] = set()
        self._active: Record | None = None
        self._threads = ThreadPool(self._loop, "onlap-unpack", 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.halt.set()
        self._threads.close()
        if self._active is not None:
            drop_active(self._snapshotter, self._active)

    def offer(self, layer: int) -> None:
        self._offered.add(layer)
        self._start_next()

    def _start_next(self) -> None:
        layer = self._next
        if self._active is not None or layer not in self._offered:
            return
        key = new_key(self._image.chain_ids[layer])
        parent = self._image.chain_ids[layer - 1] if layer else None
        self._snapshotter.prepare(key, parent, self._lease.run.labels)
        self._active = self._snapshotter.record(key)
        self._threads.submit(self._apply, layer, self._active)

    def _apply(self, layer: int, active: Record) -> None:
        digest = self._image.layers[layer].digest
        apply_layer(
            self._snapshotter,
            active.name,
            self._content.path(digest),
            digest=digest,
            diff_id=self._image.diff_ids[layer],
            progress=lambda report: self._read(layer, report.done),
        )
        self._loop.call_soon(self._applied, layer, active)

    def _applied(self, layer: int, active: Record) -> None:
        chain_id = self._image.chain_ids[layer]
        self._lease.pin(snapshot=active.id)
        try:
            # A copy is made of what is recorded: each layer is recorded, and synced, before the next one starts.
            self._snapshotter.commit(chain_id, active.name, {LABEL_LAYER: self._image.diff_ids[layer]})
        except errors.AlreadyExists:  # another process was faster, with the same content
            self._lease.unpin_snapshot(active.id)
            drop_active(self._snapshotter, active)
            self._lease.pin(snapshot=self._snapshotter.record(chain_id).id)
        self._active = None
        self._next += 1
        self._stage.advance(layer)
        self._start_next()
