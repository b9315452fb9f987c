"""The disk usage of committed snapshots: measured once, in the background or on request."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

from onlap import errors
from onlap.catalog import records
from onlap.catalog.db.database import Database
from onlap.catalog.disk.layout import Layout
from onlap.catalog.log import warn
from onlap.catalog.records import Record
from onlap.trees.usage import usage

# How many are measured between two transactions.
_MEASURED_AT_ONCE = 64


class Usages:
    """Inodes and bytes of the committed snapshots of a root.

    Args:
        layout: of the root.
        database: its records, which keep the results.
    """

    def __init__(self, layout: Layout, database: Database) -> None:
        self.layout = layout
        self.database = database
        self._unmeasured: set[int] = set()
        self._looked = False

    def committed(self, identifier: int) -> None:
        """Note that a snapshot was committed."""
        self._unmeasured.add(identifier)

    def removed(self, identifier: int) -> None:
        """Note that a snapshot was removed: most are, in a burst, before their turn comes."""
        self._unmeasured.discard(identifier)

    def of(self, record: Record) -> tuple[int, int]:
        """Inodes and bytes of a committed snapshot; measured now unless they are known."""
        if record.inodes is not None and record.size is not None:
            return record.inodes, record.size
        measured = usage(self.layout.tree(record.id))
        self._record([(*measured, record.id)])
        return measured

    def measure(self, stop: Callable[[], bool]) -> None:
        """Measure what has not been measured, until ``stop`` returns True.

        Raises:
            OnlapError: the catalog cannot be read, or not be written now.
        """
        if not self._looked:
            # Only once, for what other processes left: they measure their later commits, or the first request does.
            self._unmeasured.update(self.database.read(records.unmeasured))
            self._looked = True
        while batch := self._next_batch():
            measured = []
            for identifier in batch:
                if stop():
                    return
                try:
                    measured.append((*usage(self.layout.tree(identifier)), identifier))
                except OSError as error:
                    if error.errno != errno.ENOENT:  # else it was removed in the meantime, or is reported as lost
                        warn(f"cannot measure a layer: {error}")
            try:
                self._record(measured)
            except errors.OnlapError:
                self._unmeasured.update(batch)
                raise

    def _next_batch(self) -> list[int]:
        batch: list[int] = []
        with contextlib.suppress(KeyError):  # none is left, or was removed meanwhile
            while len(batch) < _MEASURED_AT_ONCE:
                batch.append(self._unmeasured.pop())
        return batch

    def _record(self, measured: list[tuple[int, int, int]]) -> None:
        # On a full or read-only disk they are measured again when they are asked for, or by the next process.
        with contextlib.suppress(errors.ResourceExhausted, errors.FailedPrecondition):
            self.database.write(lambda c: records.set_usages(c, measured))
