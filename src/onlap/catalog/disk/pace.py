"""The pace of background work."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stopped(Exception):
    """The work was asked to stop, in the middle of a tree."""


class Pace:
    """Called for every unit of work: sleeps to keep the rate, and raises :class:`Stopped` once the work must stop.

    Args:
        stop: asked after every burst.
        rate: units per second; None for no limit.
        burst: units between two rests. Sleeping takes about 60 us too long, so that a rest is worth it only then.
    """

    def __init__(self, stop: Callable[[], bool], rate: Callable[[], float | None], burst: int) -> None:
        self._stop = stop
        self._rate = rate
        self._burst = burst
        self._done = 0

    def __call__(self, units: int = 1) -> None:
        self._done += units
        if self._done < self._burst:
            return
        done, self._done = self._done, 0
        if self._stop():
            raise Stopped
        rate = self._rate()
        if rate is not None:
            time.sleep(done / rate)
