"""Threads that do for others what must not be interrupted.

A signal's handler runs in the main thread, between any two bytecodes, and what it raises (KeyboardInterrupt) may leave
a lock taken, a count wrong or a turn never passed on: for all other threads and, where it is a flock, for all other
processes. So whoever shares something does not touch it: a :class:`Helper` does, in a thread where nothing is raised.
The caller only puts a :class:`Job` into a queue, which one call in C does, and waits at a lock of the job's own, which
nobody else needs.
"""

from __future__ import annotations

import signal
from _queue import Empty, SimpleQueue
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Seconds that an idle thread waits for more: to start one takes as long as a few jobs (60 us), and one that stays for
# ever keeps the process from what only a single thread may do (unshare(2), CLONE_NEWUSER).
_LINGER = 1.0


class Job(Generic[T]):
    """Something that a helper does and somebody waits for.

    Args:
        action: what; its argument is the helper's choice.

    Attributes:
        result: what the action returned.
        error: what it raised, or why it was not done.
        finished: whether there will be no more of it.
    """

    __slots__ = ("_begun", "_done", "action", "error", "finished", "result")

    def __init__(self, action: Callable[..., T]) -> None:
        self.action = action
        self.result: T
        self.error: BaseException | None = None
        self.finished = False
        # Plain locks: to take or to release one is a single step, whatever interrupts.
        self._begun = allocate_lock()
        self._done = allocate_lock()
        self._done.acquire()

    # The helper's side

    def begin(self) -> bool:
        """Whether it is to be done: nobody has given it up, and nobody can any more."""
        return self._begun.acquire(blocking=False)

    def perform(self, *arguments: object) -> None:
        """Do it, and keep what comes of it."""
        try:
            self.result = self.action(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for it, whatever it is
            self.error = error

    def finish(self) -> None:
        """Let the caller go on."""
        self.finished = True
        self._done.release()

    # The caller's side

    def wait(self, seconds: float = -1) -> bool:
        """Wait until it is finished; False when that has not come in time."""
        return self.finished or self._done.acquire(timeout=seconds)

    def give_up(self) -> bool:
        """See to it that it is not done; False when it has begun."""
        return self._begun.acquire(blocking=False)

    def check(self) -> None:
        """Raise the error of a finished one, if it has any."""
        if self.error is not None:
            raise self.error


def nothing() -> None:
    """The action of a job that only calls the helper, or waits for it."""


class Helper:
    """A thread, started when there is something to do, and ended when there has been nothing for a while.

    Args:
        serve: does jobs. It gets the first, takes more with :meth:`waiting`, and finishes all that it took. Its second
            argument says that no thread could be started, so that it runs in a caller's and must not wait long.

    Attributes:
        jobs: those that wait.
    """

    def __init__(self, serve: Callable[[Job[object], bool], None]) -> None:
        self._serve = serve
        self.jobs: SimpleQueue[Job[object]] = SimpleQueue()
        self._running = allocate_lock()

    def put(self, job: Job[T]) -> None:
        """Have a job done, soon."""
        self.jobs.put(job)  # type: ignore[arg-type]
        if not self._running.locked():
            try:
                # Not threading.Thread, whose start() may be interrupted with a lock taken that the new thread needs.
                start_new_thread(self._run, (_LINGER, False))
            except RuntimeError:
                # The limit of threads is reached (ulimit -u, pids.max), or the interpreter ends.
                self._run(0, True)

    def ask(self, job: Job[T]) -> None:
        """Have a job done, and wait for it; when the wait is interrupted it goes on.

        Raises:
            BaseException: its error.
        """
        self.put(job)
        job.wait()
        job.check()

    def is_idle(self) -> bool:
        """Whether nothing is being done, nor waits."""
        return self.jobs.empty() and not self._running.locked()

    def waiting(self) -> list[Job[object]]:
        """Take what has been put meanwhile."""
        found = []
        try:
            while True:
                found.append(self.jobs.get_nowait())
        except Empty:
            return found

    def await_more(self, seconds: float) -> list[Job[object]]:
        """Take what has been put, and wait so long when that is nothing."""
        try:
            return [self.jobs.get(timeout=seconds), *self.waiting()]
        except Empty:
            return []

    def _run(self, linger: float, alone: bool) -> None:
        if not alone:
            # While the main thread has a signal pending, the kernel gives the next one to any thread that takes it.
            # Python's handlers run in the main thread, which would sleep on in its system call.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self.jobs.empty() and self._running.acquire(blocking=False):
            try:
                while True:
                    self._serve(self.jobs.get(timeout=linger) if linger else self.jobs.get_nowait(), alone)
            except Empty:
                pass
            finally:
                self._running.release()
            # Whoever put something before that saw a thread, and started none.
