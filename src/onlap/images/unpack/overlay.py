"""Layers become snapshots that are named by their chain IDs, as containerd names them.

On an overlay root each layer is a directory of its own, so that all of them are unpacked at once, in whatever order
they come, each without a parent; what an archive removes from the layers below is done when those are there
(:mod:`onlap.images.unpack.parentless`), and the commit gives each its parent (containerd v2.2, core/unpack, calls this
rebase). One sync makes all of them durable. Layers that are there already are not unpacked again.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.checks import check_commit, check_parent
from onlap.catalog.records import Record
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.images.labels import LABEL_LAYER
from onlap.images.unpack import jobs
from onlap.images.unpack.contract import Layer, Unpacking, drop_active, new_key
from onlap.images.unpack.events import Event, Tell
from onlap.images.unpack.jobs import Job, Outcome
from onlap.images.unpack.pool import Worker, count
from onlap.layers.diff.changes import is_empty_layer
from onlap.snapshots.recorded import RecordedSnapshotter

_KEPT = (errors.Unavailable, errors.Canceled, errors.ResourceExhausted)


class OverlayUnpacking(Unpacking):
    """Layers into an overlay root."""

    def __init__(
        self, snapshotter: RecordedSnapshotter, content: ContentStore, lease: Lease, layers: Sequence[Layer], tell: Tell
    ) -> None:
        super().__init__(snapshotter, content, lease, layers, tell)
        self._catalog = snapshotter.catalog
        self._committed = self.start
        self._lowers = [] if self._base is None else snapshotter.layers(self._base)
        self._actives: dict[int, Record] = {}
        self._jobs: dict[int, Job] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._held = contextlib.ExitStack()
        self._pool = _Pool(layers[self.start :])

    def __enter__(self) -> Unpacking:
        if self._base is not None:
            self._held.enter_context(self._catalog.hold([self._base.id, *self._snapshotter.ancestors(self._base)]))
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        self._stopped = True
        self._pool.close(kill=error is not None)
        try:
            if error is not None and (isinstance(error, _KEPT) or not isinstance(error, errors.OnlapError)):
                self._keep()
        finally:
            self._held.close()
            for record in self._actives.values():
                drop_active(self._snapshotter, record)

    def offer(self, layer: int) -> None:
        if layer < self.start or layer in self._jobs:
            return
        chain_id = self._layers[layer].chain_id
        key = new_key(chain_id)
        self._snapshotter.prepare(key, labels=self._lease.run.labels)
        record = self._actives[layer] = self._snapshotter.record(key)
        one = self._layers[layer]
        lowers = self._lowers if layer == self._next else None
        job = Job(
            self._content.path(one.digest),
            one.digest,
            one.diff_id,
            self._catalog.layout.tree(record.id),
            self._snapshotter.markers.flavour,
            lowers,
        )
        self._submit(layer, job)

    def _submit(self, layer: int, job: Job) -> None:
        self._jobs[layer] = job

        def work(worker: Worker | None) -> None:
            try:
                outcome = self._perform(worker, layer, job)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                self._tell(Event(layer, failure=error))
            else:
                self._tell(Event(layer, outcome=outcome))

        self._pool.submit(work)

    def _perform(self, worker: Worker | None, layer: int, job: Job) -> Outcome:
        def progress(done: int) -> None:
            self._read(layer, done)

        return jobs.perform(job, progress) if worker is None else worker.perform(job, progress)

    def take(self, layer: int, outcome: Outcome) -> None:
        self._outcomes[layer] = outcome
        while (here := self._next) in self._outcomes:
            job, outcome = self._jobs[here], self._outcomes[here]
            if outcome.needs_parent:
                del self._outcomes[here]
                self._submit(here, job._replace(lowers=list(self._lowers)))
                return
            if not outcome.settled:
                jobs.settle(job, outcome, self._lowers)
            self._lowers = [job.tree, *self._lowers]
            self._next += 1

    def commit(self) -> str | None:
        self._commit(len(self._layers))
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

        def operation(connection: Connection) -> list[int]:
            made = []
            for number in todo:
                layer, active = self._layers[number], self._actives[number]
                if not records.exists(connection, owner, layer.chain_id):
                    above = self._layers[number - 1].chain_id if number else None
                    parent = check_parent(connection, owner, above)
                    now = check_commit(connection, owner, layer.chain_id, active.name, above)
                    identifier = None if parent is None else parent.id
                    labels = {LABEL_LAYER: layer.diff_id}
                    records.make_committed(connection, now, layer.chain_id, identifier, labels, empty[number])
                    made.append(number)
            # Those below it are kept by what stands on them.
            top = records.get(connection, owner, self._layers[end - 1].chain_id)
            pins.pin(connection, self._lease.owner, snapshot=top.id)
            return made

        # One transaction: nobody sees the lower half of a stack, and takes it for garbage. A layer that another process
        # was faster with has the same content, and ours is dropped in the end.
        for number in self._catalog.database.write(operation):
            del self._actives[number]
        self._committed = end

    def _keep(self) -> None:
        """After an interruption: what is whole stays, for the next attempt to go on with."""
        with contextlib.suppress(errors.OnlapError):  # the first error is the one to tell
            self._commit(self._next)


Work = Callable[[Worker | None], None]


class _Pool:
    """Threads that unpack, each with a worker process if those are worth while."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        processes = count(len(layers), sum(layer.size for layer in layers))
        self._workers: list[Worker | None] = [Worker() for _ in range(processes)] or [None]
        self._threads: list[threading.Thread] = []
        self._queue: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, work: Work) -> None:
        with self._changed:
            self._queue.append(work)
            self._changed.notify()
        if len(self._threads) < len(self._workers):
            worker = self._workers[len(self._threads)]
            thread = threading.Thread(target=self._run, args=(worker,), name="onlap-unpack", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, worker: Worker | None) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                work = self._queue.popleft()
            work(worker)

    def close(self, *, kill: bool) -> None:
        """End the threads and the processes; with ``kill`` in the middle of their work."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            if worker is not None and kill:
                worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            if worker is not None:
                worker.close()
