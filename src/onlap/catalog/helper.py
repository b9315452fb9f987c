"""Threads for work that must not be interrupted.

A signal handler runs in the main thread, between any two bytecodes, and what it raises (KeyboardInterrupt) may leave a
lock taken, a count wrong or a turn never passed on: for all other threads and, in the case of a flock, for all other
processes. So the main thread does not touch shared state itself: a :class:`Helper` does, in a thread where no handler
runs. The caller only puts a :class:`Job` into a queue, with one call in C, and waits at a lock that belongs to the job
alone. A caller in another thread may do its job itself (:meth:`Helper.do_here`).
"""

from __future__ import annotations

import signal
import sys
from _queue import Empty, SimpleQueue
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable
from typing import Generic, TypeVar

from onlap import errors
from onlap.forks import restarted_in_children

T = TypeVar("T")

# Seconds that an idle thread waits for more work: starting one takes as long as a few jobs (60 us), and one that stays
# for ever keeps the process from what only single-threaded processes may do (unshare(2), CLONE_NEWUSER).
_LINGER = 1.0
# Seconds after which a waiting caller checks that there is a thread at all.
_LOOK = 1.0


class Job(Generic[T]):
    """A piece of work that a helper does while the caller waits.

    Args:
        action: the work; the helper chooses its arguments.

    Attributes:
        result: what the action returned.
        error: what it raised, or why it was not run.
        finished: whether it has ended.
        helper: the helper that it was given to.
        caller_may_do_it: whether its caller may do it itself, if nothing else is at work: see :meth:`Helper.do_here`.
    """

    __slots__ = ("_begun", "_done", "action", "caller_may_do_it", "error", "finished", "helper", "result")

    def __init__(self, action: Callable[..., T]) -> None:
        self.action = action
        self.helper: Helper | None = None
        self.result: T
        self.error: BaseException | None = None
        self.finished = False
        self.caller_may_do_it = False
        # Plain locks: taking or releasing one is a single step, which no interrupt can split.
        self._begun = allocate_lock()
        self._done = allocate_lock()
        self._done.acquire()

    # For the helper

    def begin(self) -> bool:
        """Claim the job; False if the caller has given it up."""
        return self._begun.acquire(blocking=False)

    def perform(self, *arguments: object) -> None:
        """Run the action, and keep its result or error."""
        try:
            self.result = self.action(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread, whatever it is
            self.error = error

    def finish(self) -> None:
        """Wake the caller."""
        self.finished = True
        self._done.release()

    def fail(self, error: BaseException) -> None:
        """Finish it with an error, unless it has begun or ended."""
        if not self.finished and self.begin():
            self.error = error
            self.finish()

    # For the caller

    def wait(self, seconds: float = -1) -> bool:
        """Wait until it is finished; False after a timeout."""
        left = seconds
        while not self.finished and not self._done.acquire(timeout=_LOOK if left < 0 else min(left, _LOOK)):
            if 0 <= left <= _LOOK:
                return False
            left -= _LOOK if left > 0 else 0
            if self.helper is not None:
                # Without memory, a thread may end before its first bytecode, and reports that to nobody.
                self.helper.start()
        return True

    def give_up(self) -> bool:
        """Cancel the job; False if it has begun."""
        return self._begun.acquire(blocking=False)

    def check(self) -> None:
        """Raise the error of a finished job, if it has one."""
        if self.error is not None:
            raise self.error


def nothing() -> None:
    """The action of a job that only wakes the helper, or waits for it."""


class Helper:
    """A thread that starts when there is work, and ends after a second without any.

    Args:
        serve: does jobs. It gets the first, takes more with :meth:`waiting`, and finishes all that it took. Its second
            argument says whether it runs in a caller's thread, and must not wait long.

    Attributes:
        jobs: the waiting jobs.
    """

    def __init__(self, serve: Callable[[Job[object], bool], None]) -> None:
        self._serve = serve
        self.jobs: SimpleQueue[Job[object]] = SimpleQueue()
        self._running = allocate_lock()
        self._taken: list[Job[object]] = []

    def put(self, job: Job[T]) -> None:
        """Queue a job."""
        job.helper = self
        self.jobs.put(job)  # type: ignore[arg-type]
        self.start()

    def do_here(self, job: Job[T], may: Callable[[], bool]) -> bool:
        """Do a job in the caller's thread, if it can begin at once; two switches of threads take longer than most jobs.

        Args:
            job: the job.
            may: says whether the job can begin without a wait; called while no other job runs.

        Returns:
            Whether it was done; never in the main thread, where handlers of signals run.
        """
        if _is_main_thread():
            return False
        job.caller_may_do_it = True
        if not self._running.acquire(blocking=False):
            return False
        try:
            if not may():
                return False
            job.helper = self
            self._taken = [job]  # type: ignore[list-item]
            self._serve_or_fail(self._taken[0], True)
        finally:
            self._taken = []  # what a job refers to is not kept alive by the helper that it was given to
            self._running.release()
        self.start()  # for what was queued meanwhile
        return True

    def start(self) -> None:
        """Start the thread if there is work and no thread."""
        if self._running.locked() or self.jobs.empty():
            return
        try:
            # Not threading.Thread: its start() may be interrupted while it holds a lock that the new thread needs.
            start_new_thread(self._run, (_LINGER, False))
        except (RuntimeError, MemoryError):
            # The limit of threads is reached (ulimit -u, pids.max), or the interpreter is shutting down.
            self._run(0, True)

    def ask(self, job: Job[T]) -> None:
        """Queue a job, and wait for it; an interrupt ends the wait, not the job.

        Raises:
            BaseException: its error.
        """
        self.put(job)
        job.wait()
        job.check()

    def is_idle(self) -> bool:
        """Whether there is neither a job nor a thread, which stays for a second after its last job."""
        return self.jobs.empty() and not self._running.locked()

    def waiting(self) -> list[Job[object]]:
        """Take the jobs that have been queued in the meantime."""
        found: list[Job[object]] = []
        try:
            while True:
                found.append(self.jobs.get_nowait())
        except Empty:
            self._taken += found
            return found

    def await_more(self, seconds: float) -> list[Job[object]]:
        """Take the queued jobs; wait up to ``seconds`` if there are none."""
        try:
            first = self.jobs.get(timeout=seconds)
            self._taken = [*(job for job in self._taken if not job.finished), first]
            return [first, *self.waiting()]
        except Empty:
            return []

    def _run(self, linger: float, in_caller: bool) -> None:
        if not in_caller:
            # While the main thread has a signal pending, the kernel gives the next one to any thread that accepts it.
            # Python's handlers run in the main thread, which would go on sleeping in its system call.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self.jobs.empty() and self._running.acquire(blocking=False):
            try:
                while True:
                    # A caller that comes alone can do its job itself, unless this thread is still there.
                    lingers = linger and not (len(self._taken) == 1 and self._taken[0].caller_may_do_it)
                    self._taken = [self.jobs.get(timeout=linger) if lingers else self.jobs.get_nowait()]
                    self._serve_or_fail(self._taken[0], in_caller)
            except Empty:
                pass
            finally:
                self._taken = []
                self._running.release()
            # A caller that queued a job before the release saw a running thread, and started none.

    def _serve_or_fail(self, first: Job[object], in_caller: bool) -> None:
        try:
            self._serve(first, in_caller)
        except BaseException as error:  # noqa: BLE001 - raised in the waiting threads; most likely MemoryError
            for job in self._taken:
                job.fail(error)


def _is_main_thread() -> bool:
    threading = sys.modules.get("threading")  # without it there is no other thread
    return threading is None or threading.main_thread().ident == get_ident()


class Batches:
    """Work that one thread does for many callers at once. A forked child begins with nothing to do.

    Args:
        work: does all that there is to do. Callers that wait get its OnlapError.
        seconds: how long what nobody waits for is put off, so that more of it is done at once.
    """

    def __init__(self, work: Callable[[], None], seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self.after_fork()
        restarted_in_children(self)

    def after_fork(self) -> None:
        """In a forked child: the thread stayed with the parent."""
        self._helper = Helper(self._serve)
        self._due = False

    def later(self) -> None:
        """Ask for the work, to be done soon."""
        # The thread ends its wait for more before it looks what there is to do.
        if not self._due:
            self._due = True
            self._helper.put(_Later(nothing))

    def now(self) -> None:
        """Ask for the work, to be done at once, without waiting for it."""
        self._helper.put(Job(nothing))

    def wait(self) -> None:
        """Return when all is done that there was to do at this call.

        Raises:
            OnlapError: it could not be done.
        """
        self._helper.ask(Job(nothing))

    def is_idle(self) -> bool:
        """Whether nothing was asked for, and there is no thread, which stays for a second after its last work."""
        return self._helper.is_idle()

    def _serve(self, first: Job[object], in_caller: bool) -> None:
        jobs = [first, *self._helper.waiting()]
        if not in_caller and all(isinstance(job, _Later) for job in jobs):
            jobs += self._helper.await_more(self._seconds)
        self._due = False
        try:
            self._work()
        except errors.OnlapError as error:
            for job in jobs:
                job.error = error
        finally:
            for job in jobs:
                job.finish()


class _Later(Job[None]):
    """A job that nobody waits for."""

    __slots__ = ()
