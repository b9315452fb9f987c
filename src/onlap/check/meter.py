"""What a check has read: counted, paced, reported, and ended in time."""

from __future__ import annotations

import time

from onlap import errors
from onlap.arguments import check_number
from onlap.catalog.background.manifests import FILE_COST
from onlap.catalog.disk.pace import Pace
from onlap.progress import Callback, Reporter

_BURST = 4 << 20


class Meter:
    """Called with the size of each chunk that was read, in bytes, and with 0 per file; waits where that is too fast.

    Args:
        max_duration: seconds after which :meth:`is_over`; None for no limit.
        rate: bytes per second to read at most; None for no limit.
        progress: called with the bytes read, at most ten times a second.

    Attributes:
        files: how many were read.
        size: how many bytes were.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(self, max_duration: float | None, rate: float | None, progress: Callback | None) -> None:
        for value, name in ((max_duration, "longest duration"), (rate, "rate")):
            if value is not None:
                check_number(value, name)
                if value <= 0:
                    raise errors.InvalidArgument(f"the {name} is {value}", hint="it must be more than 0")
        self._end = None if max_duration is None else time.monotonic() + max_duration
        self._pace = Pace(lambda: False, lambda: rate, _BURST)
        self._report = Reporter(progress, "check", "bytes")
        self.files = self.size = 0

    def __call__(self, size: int) -> None:
        if not size:
            self.files += 1
            self._pace(FILE_COST)
            return
        self.size += size
        self._report(self.size)
        self._pace(size)

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._end is not None and time.monotonic() >= self._end

    def finish(self) -> None:
        """Report the last figure."""
        self._report.finish(self.size)
