"""How much committed snapshots take: measured once, in the background or when somebody asks."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.db.database import Database
from onlap.catalog.disk.layout import Layout
from onlap.catalog.log import warn
from onlap.catalog.records import Record
from onlap.trees.usage import usage

# Measured in one go between two transactions of the background.
_MEASURED_AT_ONCE = 64


class Usages:
    """Inodes and bytes of the committed snapshots of a root.

    Args:
        layout: of the root.
        database: its records, which keep what was measured.
    """

    def __init__(self, layout: Layout, database: Database) -> None:
        self.layout = layout
        self.database = database
        self._unmeasured: list[int] | None = None

    def committed(self, identifier: int) -> None:
        """A snapshot was committed, and is to be measured."""
        if self._unmeasured is not None:
            self._unmeasured.append(identifier)

    def of(self, record: Record) -> tuple[int, int]:
        """Inodes and bytes of a committed snapshot; measured now if nobody has done it yet."""
        if record.inodes is not None and record.size is not None:
            return record.inodes, record.size
        measured = usage(self.layout.tree(record.id))
        # To know it does not need a place to note it: on a full or read-only disk it is measured again the next time.
        with contextlib.suppress(errors.ResourceExhausted, errors.FailedPrecondition):
            self.database.write(lambda c: records.set_usage(c, record.id, *measured))
        return measured

    def measure(self, stop: Callable[[], bool]) -> None:
        """Measure what nobody has measured yet, until ``stop`` says so."""
        if self._unmeasured is None:
            # Once: what others left. What they commit from now on they measure, or whoever asks first.
            self._unmeasured = self.database.read(records.unmeasured)
        while self._unmeasured:
            due = self._unmeasured[:_MEASURED_AT_ONCE]
            measured = []
            for identifier in due:
                if stop():
                    return
                try:
                    measured.append((identifier, *usage(self.layout.tree(identifier))))
                except OSError as error:
                    if error.errno != errno.ENOENT:  # else it was removed meanwhile, or is lost: others tell
                        warn(f"cannot measure a layer: {error}")
            self.database.write(lambda c: _note_usages(c, measured))  # noqa: B023 - run at once
            del self._unmeasured[: len(due)]


def _note_usages(connection: Connection, measured: list[tuple[int, int, int]]) -> None:
    for identifier, inodes, size in measured:
        records.set_usage(connection, identifier, inodes, size)
