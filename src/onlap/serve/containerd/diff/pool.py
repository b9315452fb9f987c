"""Worker processes that are kept between requests: at most one per core, for several layers at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from onlap import errors
from onlap.workers import Worker

# A worker uses some 40 MiB (bench: the peak memory of a pull). More workers gain nothing: the disk is the limit.
_MOST = 8


class _Job:
    """A request: which worker has it, if one does, and whether nobody waits for it any more."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.gone = False


class Pool:
    """Worker processes that are kept until :meth:`close`.

    Args:
        answerer: see :class:`onlap.workers.Worker`.
    """

    def __init__(self, answerer: str) -> None:
        self._answerer = answerer
        self._free = threading.BoundedSemaphore(min(len(os.sched_getaffinity(0)), _MOST))
        self._mutex = threading.Lock()
        # A stack: the one that was used last is used next, so that no more are started than are needed at once.
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False

    def perform(self, request: Mapping[str, Any], when_gone: Callable[[Callable[[], None]], None]) -> dict[str, Any]:
        """What a worker answers, when one is free.

        Args:
            request: for the answerer.
            when_gone: see :meth:`onlap.serve.containerd.methods.Caller.when_gone`; gets what ends the work.

        Raises:
            Canceled: nobody waits any more, or the pool was closed.
            Unavailable: the worker died; its memory may have run out.
            OnlapError: of the answerer.
        """
        job = _Job()

        def gone() -> None:
            with self._mutex:
                job.gone = True
                if job.worker is not None:
                    job.worker.kill()

        when_gone(gone)
        with self._free:
            worker = self._take(job)
            idle = False
            try:
                answer = worker.perform(request)
                idle = True
            except errors.OnlapError:
                idle = True  # or dead
                raise
            finally:
                self._put_back(job, worker, keep=idle)
            return answer

    def warm(self) -> None:
        """Start a worker, so that the first layer need not wait for that; raises OSError if that is impossible."""
        worker = self._take(job := _Job())
        worker.start()
        self._put_back(job, worker, keep=True)

    def _take(self, job: _Job) -> Worker:
        with self._mutex:
            if self._closed:
                raise errors.Canceled("the server stops")
            if job.gone:
                raise errors.Canceled("nobody waits for the layer any more")
            while self._idle and not self._idle[-1].is_usable():
                self._idle.pop().close()
            worker = self._idle.pop() if self._idle else Worker(self._answerer)
            self._busy.add(worker)
            job.worker = worker
            return worker

    def _put_back(self, job: _Job, worker: Worker, *, keep: bool) -> None:
        with self._mutex:
            job.worker = None
            self._busy.remove(worker)
            # A caller that went away in the last moment has killed it, although it had answered.
            keep = keep and not self._closed and worker.is_usable()
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.kill()
            worker.close()

    def close(self) -> None:
        """End all workers, also in the middle of their work."""
        with self._mutex:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.close()
