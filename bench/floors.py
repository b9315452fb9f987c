"""The system calls of a benchmark's subject and nothing else: what nobody can be faster than on this filesystem."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from bench import lib

# What SQLite appends to its log for a snapshot: six pages, each with a header (sqlite.org/fileformat2.html, 4.1).
LOG_OF_CALL = 6 * (4096 + 24)
LOG_SIZE = 8 << 20


def cycles(place: Path, *, clients: int, seconds: float) -> lib.Result:
    """Cycles of prepare, commit and remove: a durable record of each call, and the directories.

    One thread makes the calls of all clients, and flushes the log once for all of them.
    """
    place.mkdir()
    with ExitStack() as stack:
        log = os.open(place / "log", os.O_RDWR | os.O_CREAT, 0o600)
        stack.callback(os.close, log)
        os.pwrite(log, bytes(LOG_SIZE), 0)  # no flush has to write a new size
        os.fsync(log)
        record = os.urandom(LOG_OF_CALL * clients)
        end = 0

        def flush() -> None:
            nonlocal end
            end = 0 if end + len(record) > LOG_SIZE else end
            os.pwrite(log, record, end)
            os.fdatasync(log)
            end += len(record)

        made = 0
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            for number in range(clients):
                tree = f"{place}/new-{number}"
                for path in (tree, f"{tree}/fs", f"{tree}/work"):
                    os.mkdir(path)
                os.rename(tree, f"{place}/{number}")
            flush()
            flush()
            for number in range(clients):
                os.rename(f"{place}/{number}", f"{place}/trash-{made + number}")
            flush()
            made += clients
    shutil.rmtree(place)  # not timed, as with either side
    return {"cycles": made, "seconds": took}
