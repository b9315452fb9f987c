"""The worker process that unpacks layers: jobs as lines of JSON on stdin, what becomes of them on stdout.

It never opens the catalog. When the process that started it is gone, so are its pipes, and it ends with the next line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from onlap import errors
from onlap.images.unpack import jobs

# Seconds between two reports.
_INTERVAL = 0.1


def main() -> int:
    """Do what is asked, until nobody asks."""
    for line in sys.stdin.buffer:
        job = jobs.Job(**json.loads(line))
        try:
            outcome = jobs.perform(job, _Reports())
        except errors.OnlapError as error:
            _say({"error": type(error).__name__, "message": error.message, "key": error.key, "hint": error.hint})
        else:
            _say({"outcome": jobs.as_json(outcome)})
    return 0


class _Reports:
    """Says how far it is, a few times a second."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL
            _say({"read": done})


def _say(value: dict[str, Any]) -> None:
    # ASCII: names that are not UTF-8 come through as the escapes of their surrogates.
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()
