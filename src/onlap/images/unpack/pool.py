"""Worker processes for layers: two layers unpack on two cores, which threads of one interpreter do not.

Each is a fresh interpreter (no fork: no SQLite connection crosses one), started when the first job for it comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from onlap import errors
from onlap.images.unpack import jobs

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
    """How many workers are worth while; 0: unpack in this process.

    Args:
        layers: how many there are to unpack.
        size: their bytes, compressed.
    """
    cores = len(os.sched_getaffinity(0))
    if layers < 2 or cores < 2 or size < WORTHWHILE or not sys.executable:
        return 0
    return min(layers, cores, MOST)


class Worker:
    """One worker process; used by one thread at a time, but :meth:`kill` may be called by any."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._mutex = threading.Lock()
        self._killed = False

    def perform(self, job: jobs.Job, progress: Callable[[int], None]) -> jobs.Outcome:
        """Let it do a job.

        Raises:
            Canceled: it was killed.
            Unavailable: it died.
            OnlapError: what the job raised.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(jobs.as_json(job)).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death(process) from None
        for line in process.stdout:
            answer = json.loads(line)
            if "read" in answer:
                progress(answer["read"])
            elif "error" in answer:
                raise _error(answer)
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
                    # Ctrl-C is for the one who waits, who then ends it.
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


def _error(answer: dict[str, Any]) -> errors.OnlapError:
    kind = getattr(errors, answer["error"], errors.Internal)
    error: errors.OnlapError = kind(answer["message"], key=answer["key"], hint=answer["hint"])
    return error
