"""The threads in which the calls of one store are made."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from onlap import errors
from onlap.cancellation import Call
from onlap.progress import Callback, Progress

T = TypeVar("T")

# Calls wait for the disk more than for the processor; more threads than these make no batch larger.
_THREADS = 16


class Threads:
    """A pool of threads, which end with the store.

    Attributes:
        closed: whether the store is.
        locks: for what no two calls may do to one workspace at a time, by its name.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_THREADS, "onlap")
        self.closed = False
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """Let the threads end; idempotent."""
        self.closed = True
        self._executor.shutdown(wait=False)

    async def call(
        self,
        function: Callable[[], T],
        *,
        undo: Callable[[T], object] | None = None,
        own_thread: bool = False,
        shielded: bool = False,
    ) -> T:
        """Make a call in a thread.

        If the task is canceled, so is the call, where that is possible; in any case its end is awaited. What it made is
        undone, and only then CancelledError is raised.

        Args:
            function: the call.
            undo: undoes what it returned, beside what the code that makes things undoes (:mod:`onlap.cancellation`).
            own_thread: in a thread of its own, since it may take long; what it has made stays.
            shielded: do not cancel the call with the task.
        """
        call = Call()
        future = self._submit(partial(_performed, call, function), own_thread)
        waiting = asyncio.wrap_future(future)
        try:
            await asyncio.wait([waiting])  # which does not cancel it
        except asyncio.CancelledError as canceled:
            if not shielded:
                if future.cancel():  # it had not begun
                    raise
                call.cancel()
            await _certainly(waiting)

            def undone() -> None:
                if undo is not None and future.exception() is None:
                    undo(future.result())
                if not own_thread:
                    call.undo()

            undoing = asyncio.wrap_future(self._submit(undone, own_thread))
            await _certainly(undoing)
            if (error := undoing.exception()) is not None:
                canceled.add_note(f"what the canceled call made could not be undone: {error}")
            raise
        return waiting.result()

    def _submit(self, function: Callable[[], T], own_thread: bool) -> Future[T]:
        executor = ThreadPoolExecutor(1, "onlap") if own_thread else self._executor
        try:
            return executor.submit(contextvars.copy_context().run, function)
        except RuntimeError as error:
            if "new thread" in str(error):
                raise errors.ResourceExhausted(str(error), hint="raise the limit on threads (ulimit -u)") from error
            raise errors.FailedPrecondition("the store is closed", hint="open it again") from error
        finally:
            if own_thread:
                executor.shutdown(wait=False)


async def _certainly(waiting: asyncio.Future[T]) -> None:
    """Wait for the end of a call, however often the task is canceled meanwhile."""
    while not waiting.done():
        with contextlib.suppress(asyncio.CancelledError):  # the first one is raised later
            await asyncio.wait([waiting])
    waiting.exception()  # so that asyncio does not report it as lost


class InLoop:
    """A callback for progress that is called in the thread of the event loop.

    Args:
        callback: the caller's. What it raises cancels the work, at the next report.
    """

    def __init__(self, callback: Callback) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        self.error: Exception | None = None

    def __call__(self, report: Progress) -> None:
        if self.error is not None:
            raise self.error
        self._loop.call_soon_threadsafe(self._report, report)

    def _report(self, report: Progress) -> None:
        try:
            self._callback(report)
        except Exception as error:  # noqa: BLE001 - raised in the call, as the caller's own
            self.error = error


def _performed(call: Call, function: Callable[[], T]) -> T:
    with call:
        return function()
