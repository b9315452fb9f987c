"""Layers unpacked into an overlay root.

There each layer is a directory of its own, so that all of them are unpacked at once, in any order, each without a
parent. What an archive removes from the layers below is done when those are there
(:mod:`onlap.images.unpack.parentless`), and the commit gives each its parent (containerd v2.2, core/unpack, calls this
rebase). One sync makes all of them durable. Layers that exist already are not unpacked again.
"""

from __future__ import annotations

import contextlib
from functools import partial
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.checks import check_commit, check_parent
from onlap.catalog.records import Record
from onlap.images.records import LABEL_LAYER
from onlap.images.unpack import jobs
from onlap.images.unpack.contract import Unpacking, drop_active, new_key
from onlap.images.unpack.jobs import Job, Outcome
from onlap.images.unpack.threads import ThreadPool
from onlap.images.unpack.workers import Workers
from onlap.layers.diff.changes import is_empty_layer

# After these, what was unpacked is worth keeping for the next attempt.
_RESUMABLE = (errors.Unavailable, errors.Canceled, errors.ResourceExhausted)


class OverlayUnpacking(Unpacking):
    """Layers unpacked into an overlay root."""

    def __enter__(self) -> Unpacking:
        self._catalog = self._snapshotter.catalog
        self._committed = self.start
        self._lowers: list[str] = []
        self._actives: dict[int, Record] = {}
        self._jobs: dict[int, Job] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._held = contextlib.ExitStack()
        due = self._image.layers[self.start :]
        self._workers = Workers(len(due), sum(layer.size for layer in due))
        self._threads = ThreadPool(self._loop, "onlap-unpack", self._workers.threads)
        if self._base is not None:
            self._lowers = self._snapshotter.layers(self._base)
            self._held.enter_context(self._catalog.hold([self._base.id, *self._snapshotter.ancestors(self._base)]))
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        self._loop.halt.set()
        if error is not None:
            self._workers.close()
        self._threads.close()
        self._workers.close()
        try:
            if error is not None and (isinstance(error, _RESUMABLE) or not isinstance(error, errors.OnlapError)):
                with contextlib.suppress(errors.OnlapError):  # the first error is the one to report
                    self._commit(self._next)
        finally:
            self._held.close()
            for record in self._actives.values():
                drop_active(self._snapshotter, record)

    def offer(self, layer: int) -> None:
        key = new_key(self._image.chain_ids[layer])
        self._snapshotter.prepare(key, labels=self._lease.run.labels)
        record = self._actives[layer] = self._snapshotter.record(key)
        digest = self._image.layers[layer].digest
        job = Job(
            self._content.path(digest),
            digest,
            self._image.diff_ids[layer],
            self._catalog.layout.tree(record.id),
            self._snapshotter.markers.flavour,
            self._lowers if layer == self._next else None,
        )
        self._submit(layer, job)

    def _submit(self, layer: int, job: Job) -> None:
        self._jobs[layer] = job
        self._threads.submit(self._perform, layer, job)

    def _perform(self, layer: int, job: Job) -> None:
        outcome = self._workers.perform(job, partial(self._read, layer))
        self._loop.call_soon(self._performed, layer, outcome)

    def _performed(self, layer: int, outcome: Outcome) -> None:
        self._outcomes[layer] = outcome
        while (here := self._next) in self._outcomes:
            job, outcome = self._jobs[here], self._outcomes[here]
            if outcome.needs_parent:
                del self._outcomes[here]
                self._submit(here, job._replace(lowers=list(self._lowers)))
                break
            if not outcome.settled:
                jobs.settle(job, outcome, self._lowers)
            self._lowers = [job.tree, *self._lowers]
            self._next += 1
        self._stage.advance(layer)

    def commit(self) -> str | None:
        self._commit(len(self._image.layers))
        return super().commit()

    def _commit(self, end: int) -> None:
        """Record the layers up to ``end``, after one sync for all of them."""
        todo = range(self._committed, end)
        if not todo:
            return
        empty = {number: is_empty_layer(self._jobs[number].tree) for number in todo}
        if self._snapshotter.syncs and not all(empty.values()):
            self._catalog.sync()
        owner = self._snapshotter.owner
        names = self._image.chain_ids

        def operation(connection: Connection) -> list[int]:
            made = []
            for number in todo:
                name = names[number]
                if not records.exists(connection, owner, name):
                    below = names[number - 1] if number else None
                    parent = check_parent(connection, owner, below)
                    now = check_commit(connection, owner, name, self._actives[number].name, below)
                    identifier = None if parent is None else parent.id
                    labels = {LABEL_LAYER: self._image.diff_ids[number]}
                    records.make_committed(connection, now, name, identifier, labels, empty[number])
                    made.append(number)
            # The layers below are kept by those that are based on them.
            top = records.get(connection, owner, names[end - 1])
            pins.pin(connection, self._lease.owner, snapshot=top.id)
            return made

        # One transaction: nobody sees the lower half of a stack and takes it for garbage. Where another process was
        # faster with a layer, it has the same content, and ours is dropped in the end.
        for number in self._catalog.database.write(operation):
            del self._actives[number]
        self._committed = end
