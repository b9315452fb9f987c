"""Worker processes for layers: two layers unpack on two cores, which threads of one interpreter do not.

Each is a fresh interpreter (no fork: no SQLite connection crosses one), started when the first job for it comes. It
reads jobs as lines of JSON from stdin, and writes lines to stdout: how far a job is, and its outcome. It never opens
the catalog. When the process that started it is gone, so are its pipes, and it ends with the next line.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from onlap import errors
from onlap.images.unpack import jobs
from onlap.images.unpack.jobs import Job, Outcome

# The caller's import path, so that it finds the Onlap that runs here, and the libraries that it uses.
_PROGRAM = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from onlap.images.unpack.worker import main
sys.exit(main())
"""

# Compressed bytes of all layers below which starting an interpreter (50 ms) costs more than it gains.
WORTHWHILE = 8 << 20
MOST = 4


def count(layers: int, size: int) -> int:
    """How many workers are worthwhile; 0: unpack in this process.

    Args:
        layers: how many there are to unpack.
        size: their bytes, compressed.
    """
    cores = len(os.sched_getaffinity(0))
    if layers < 2 or cores < 2 or size < WORTHWHILE or not sys.executable:
        return 0
    return min(layers, cores, MOST)


class Workers:
    """Workers for some layers, if they are worthwhile.

    Args:
        layers: how many there are to unpack.
        size: their bytes, compressed.

    Attributes:
        threads: how many may call :meth:`perform` at once.
    """

    def __init__(self, layers: int, size: int) -> None:
        self._workers = [Worker() for _ in range(count(layers, size))]
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        if not self._workers:
            self._idle.put(None)  # unpack in this process
        self.threads = self._idle.qsize()

    def perform(self, job: Job, progress: Callable[[int], None]) -> Outcome:
        """Do a job in an idle worker, or in this process; see :func:`onlap.images.unpack.jobs.perform`.

        Raises:
            Canceled: the worker was killed.
            Unavailable: it died.
        """
        worker = self._idle.get()
        try:
            return jobs.perform(job, progress) if worker is None else worker.perform(job, progress)
        finally:
            self._idle.put(worker)

    def kill(self) -> None:
        """End them in the middle of their jobs."""
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """Wait until they have ended."""
        for worker in self._workers:
            worker.close()


class Worker:
    """One worker process; used by one thread at a time, but any thread may call :meth:`kill`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._mutex = threading.Lock()
        self._killed = False

    def perform(self, job: Job, progress: Callable[[int], None]) -> Outcome:
        """See :meth:`Workers.perform`."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job._asdict()).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death(process) from None
        for line in process.stdout:
            answer = json.loads(line)
            if "read" in answer:
                progress(answer["read"])
            elif "error" in answer:
                kind: type[errors.OnlapError] = getattr(errors, answer["error"], errors.Internal)
                raise kind(answer["message"], key=answer["key"], hint=answer["hint"])
            else:
                return jobs.outcome_of(answer["outcome"])
        raise self._death(process)

    def _started(self) -> subprocess.Popen[bytes]:
        with self._mutex:
            if self._killed:
                raise errors.Canceled("the work was stopped")
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, json.dumps([os.path.abspath(path) for path in sys.path])],
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
            f"a process that unpacked a layer ended with status {status}", hint="try again; is there enough memory?"
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


def main() -> int:
    """The program of a worker process."""
    for line in sys.stdin.buffer:
        job = Job(**json.loads(line))
        try:
            outcome = jobs.perform(job, lambda done: _answer({"read": done}))
        except errors.OnlapError as error:
            _answer({"error": type(error).__name__, "message": error.message, "key": error.key, "hint": error.hint})
        else:
            _answer({"outcome": outcome._asdict()})
    return 0


def _answer(value: dict[str, Any]) -> None:
    # ASCII: names that are not UTF-8 come through as the escapes of their surrogates.
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()
