"""Worker processes for the layers of an image. They never open the catalog."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from onlap.images.unpack import jobs
from onlap.images.unpack.jobs import Job, Outcome
from onlap.workers import Pool

_ANSWERER = f"{jobs.__name__}:{jobs.answer.__name__}"

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
    """As many worker processes as :func:`count` says; without any, this process does the jobs.

    Args:
        layers: how many there are to unpack.
        size: their bytes, compressed.

    Attributes:
        threads: how many may call :meth:`perform` at once.
    """

    def __init__(self, layers: int, size: int) -> None:
        most = count(layers, size)
        self.threads = most or 1
        self._pool = Pool(_ANSWERER, most) if most else None

    def perform(self, job: Job, progress: Callable[[int], None]) -> Outcome:
        """Do a job in a worker, or in this process; see :func:`onlap.images.unpack.jobs.perform`.

        Raises:
            Canceled: the worker was killed.
            Unavailable: it died.
        """
        if self._pool is None:
            return jobs.perform(job, progress)
        return jobs.outcome_of(self._pool.perform(job._asdict(), progress=progress))

    def close(self) -> None:
        """End them, also in the middle of their jobs."""
        if self._pool is not None:
            self._pool.close()
