"""Worker processes: fresh interpreters that do one request after the other, on a core of their own.

Threads of one interpreter do not unpack two layers on two cores. Workers are started afresh, not forked, so that no
SQLite connection gets into them. A worker reads requests as lines of JSON from stdin, and writes lines to stdout: how
far a request is, and its answer. When the process that started it is gone, so are its pipes, and it ends at once, in
the middle of a request.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from onlap import errors

# The caller's import path, so that it finds the Onlap that runs here, and the libraries that it uses.
PROGRAM = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from onlap.workers import main
main(sys.argv[2])
"""

# Answers a request; both are what JSON can hold. It may report how far it is, in a unit of its own.
Answerer = Callable[[Mapping[str, Any], Callable[[int], None]], Mapping[str, Any]]


class Worker:
    """One worker process, started by its first request.

    One thread at a time uses it, but any thread may call :meth:`kill`.

    Args:
        answerer: the name of the :data:`Answerer` that answers the requests there, as ``"package.module:name"``.
    """

    def __init__(self, answerer: str) -> None:
        self._answerer = answerer
        self._process: subprocess.Popen[bytes] | None = None
        self._mutex = threading.Lock()
        self._killed = False
        self._owes_answer = False

    def perform(self, request: Mapping[str, Any], progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Have a request answered.

        Args:
            request: for the answerer.
            progress: called with what the answerer reports. If it raises, the answer is still to come, and the worker
                is not usable any more.

        Raises:
            Canceled: the worker was killed by :meth:`kill`.
            Unavailable: it died.
            OnlapError: of the kind that the answerer raised, or for an OSError there. Other exceptions end the worker.
            OSError: no process can be started.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        self._owes_answer = True
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death(process) from None
        for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # it was killed while it wrote: a pipe takes a long line in pieces
            reported: dict[str, Any] = json.loads(line)
            if "reached" in reported:
                progress(reported["reached"])
                continue
            self._owes_answer = False
            if "error" in reported:
                kind: type[errors.OnlapError] = getattr(errors, reported["error"], errors.Internal)
                raise kind(reported["message"], key=reported["key"], hint=reported["hint"])
            answer: dict[str, Any] = reported["answer"]
            return answer
        raise self._death(process)

    def start(self) -> None:
        """Start it already, so that the first request need not wait for that.

        Raises:
            Canceled: it was killed.
            OSError: no process can be started.
        """
        self._started()

    def is_usable(self) -> bool:
        """Whether it can be given a request: it has answered the last one, and neither we nor the kernel killed it."""
        with self._mutex:
            return not (self._killed or self._owes_answer) and (self._process is None or self._process.poll() is None)

    def _started(self) -> subprocess.Popen[bytes]:
        with self._mutex:
            if self._killed:
                raise errors.Canceled("the work was stopped")
            if self._process is None:
                path = json.dumps([os.path.abspath(path) for path in sys.path])
                self._process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, path, self._answerer],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # Ctrl-C is for the process that waits, which then ends this one.
                    process_group=0,
                )
            return self._process

    def _death(self, process: subprocess.Popen[bytes]) -> errors.OnlapError:
        status = process.wait()
        if self._killed:
            return errors.Canceled("the work was stopped")
        return errors.Unavailable(
            f"a worker process ended with status {status}", hint="try again; is there enough memory?"
        )

    def kill(self) -> None:
        """End it at once."""
        with self._mutex:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Let it end, and wait for that."""
        with self._mutex:
            process, self._process, self._killed = self._process, None, True
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # it is dead already
        process.wait()


class _Job:
    """A request: which worker has it, if one does, and whether nobody waits for it any more."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.gone = False


class Pool:
    """Worker processes for several requests at once, each kept until :meth:`close`.

    Args:
        answerer: see :class:`Worker`.
        most: how many there may be.
    """

    def __init__(self, answerer: str, most: int) -> None:
        self._answerer = answerer
        self._free = threading.BoundedSemaphore(most)
        self._mutex = threading.Lock()
        # A stack: the one that was used last is used next, so that no more are started than are needed at once.
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False

    def perform(
        self,
        request: Mapping[str, Any],
        when_gone: Callable[[Callable[[], None]], None] = lambda _: None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:
        """What a worker answers, when one is free.

        Args:
            request: for the answerer.
            when_gone: called at once with a function that ends the work; call that, in any thread, when nobody waits
                for the answer any more.
            progress: called with what the answerer reports; what it raises ends the worker.

        Raises:
            Canceled: nobody waits any more, or the pool was closed.
            Unavailable: the worker died; its memory may have run out.
            OnlapError: of the answerer.
            OSError: no process can be started.
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
            try:
                return worker.perform(request, progress)
            finally:
                self._put_back(job, worker)

    def warm(self) -> None:
        """Start a worker, so that the first layer need not wait for that.

        Raises:
            Canceled: the pool was closed.
            OSError: no process can be started.
        """
        with self._free:
            worker = self._take(job := _Job())
            try:
                worker.start()
            finally:
                self._put_back(job, worker)

    def _take(self, job: _Job) -> Worker:
        with self._mutex:
            if self._closed:
                raise errors.Canceled("the work was stopped")
            if job.gone:
                raise errors.Canceled("nobody waits for the answer any more")
            while self._idle and not self._idle[-1].is_usable():
                self._idle.pop().close()
            worker = self._idle.pop() if self._idle else Worker(self._answerer)
            self._busy.add(worker)
            job.worker = worker
            return worker

    def _put_back(self, job: _Job, worker: Worker) -> None:
        with self._mutex:
            job.worker = None
            self._busy.remove(worker)
            # A caller that went away in the last moment has killed it, although it had answered.
            keep = not self._closed and worker.is_usable()
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


def main(answerer: str) -> None:
    """The program of a worker process."""
    _be_killed_first()
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    module, _, name = answerer.partition(":")
    answer: Answerer = getattr(importlib.import_module(module), name)
    for line in sys.stdin.buffer:
        try:
            with errors.translated("work on a layer"):
                answered = answer(json.loads(line), lambda reached: _tell({"reached": reached}))
        except errors.OnlapError as error:
            _tell({"error": type(error).__name__, "message": error.message, "key": error.key, "hint": error.hint})
        else:
            _tell({"answer": answered})


def _tell(value: Mapping[str, Any]) -> None:
    # ASCII: names that are not UTF-8 come through as the escapes of their surrogates.
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def _end_with_the_caller() -> None:
    """End when the other end of stdin is closed.

    Not only between requests: whoever starts the killed caller again may delete or fill the same directories.
    """
    closed = select.poll()
    closed.register(sys.stdin.fileno(), 0)  # POLLHUP is always reported (poll(2))
    closed.poll()
    os._exit(0)


def _be_killed_first() -> None:
    """Let the kernel kill this process and not the one that started it when memory runs out: only one request is lost.

    A service may have protected itself (OOMScoreAdjust= of systemd), and its children inherit that (proc(5)).
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
        if int(file.read()) < 0:
            file.write(b"0")
