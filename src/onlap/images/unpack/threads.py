"""Threads that work, and one thread that waits for them, handles what they report and raises what they raise."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from onlap import errors
from onlap.progress import Callback, Reporter

if TYPE_CHECKING:
    from onlap.images.spec.model import Descriptor

# Seconds that the waiting thread sleeps at most, so that Ctrl-C is noticed (CPython runs signal handlers between two
# bytecodes of the main thread; a wait without a timeout is interrupted, but not on every platform).
_PATIENCE = 1.0


class EventLoop:
    """Calls that threads hand to the one thread that waits, as ``call_soon_threadsafe`` of asyncio.

    Args:
        halt: see below; by default a new one.

    Attributes:
        halt: set when the work is cancelled.
    """

    def __init__(self, halt: threading.Event | None = None) -> None:
        self.halt = halt or threading.Event()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def call_soon(self, function: Callable[..., None], *args: object) -> None:
        """Let the waiting thread call a function; its exceptions end the wait."""
        self._calls.put(partial(function, *args))

    def run_until(self, done: Callable[[], bool]) -> None:
        """Make the calls that threads hand over, until ``done()`` is true."""
        while not done():
            try:
                call = self._calls.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
            call()

    def check(self) -> None:
        """Raise Canceled in a thread whose work is cancelled."""
        if self.halt.is_set():
            raise errors.Canceled("the work was stopped")


class ThreadPool:
    """Threads that do jobs in order; started when there are jobs.

    They are daemons, so that one that waits for a silent network does not keep the interpreter from exiting.

    Args:
        loop: raises what a job raised.
        name: of the threads.
        most: how many there are at most.
    """

    def __init__(self, loop: EventLoop, name: str, most: int) -> None:
        self._loop = loop
        self._name = name
        self._most = most
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., None], *args: object) -> None:
        """Let a thread call a function, unless the work is cancelled before."""
        self._jobs.put(partial(function, *args))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # the limit of threads is reached (ulimit -u); fewer of them take longer
                self._threads.remove(thread)
                if not self._threads:
                    raise

    def close(self, patience: float | None = None) -> None:
        """Wait until the threads have done their jobs, or no longer than ``patience`` seconds."""
        deadline = None if patience is None else time.monotonic() + patience
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._loop.halt.is_set():
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                self._loop.call_soon(_raise, error)
                return


def _raise(error: BaseException) -> None:
    raise error


class Stage:
    """Progress of one stage that several blobs go through at once, in bytes.

    Args:
        progress: called with reports of it.
        name: of the stage.
        blobs: by number.
    """

    def __init__(self, progress: Callback | None, name: str, blobs: Mapping[int, Descriptor]) -> None:
        self._blobs = blobs
        self._total = sum(blob.size for blob in blobs.values())
        self._report = Reporter(progress if blobs else None, name, "bytes", self._total)
        self._done: dict[int, int] = {}

    def advance(self, number: int, done: int | None = None) -> None:
        """So many bytes of a blob are done; by default all."""
        blob = self._blobs[number]
        self._done[number] = blob.size if done is None else done
        self._report(sum(self._done.values()), blob.digest)

    def finish(self) -> None:
        """All bytes of all blobs are done."""
        self._report.finish(self._total)
