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
        self._unmeasured: list[int] | None = None

    def committed(self, identifier: int) -> None:
        """Have a newly committed snapshot measured."""
        if self._unmeasured is not None:
            self._unmeasured.append(identifier)

    def of(self, record: Record) -> tuple[int, int]:
        """Inodes and bytes of a committed snapshot; measured now unless they are known."""
        if record.inodes is not None and record.size is not None:
            return record.inodes, record.size
        measured = usage(self.layout.tree(record.id))
        # The answer does not depend on recording it: on a full or read-only disk it is measured again the next time.
        with contextlib.suppress(errors.ResourceExhausted, errors.FailedPrecondition):
            self.database.write(lambda c: records.set_usages(c, [(*measured, record.id)]))
        return measured

    def measure(self, stop: Callable[[], bool]) -> None:
        """Measure what has not been measured, until ``stop`` returns True."""
        if self._unmeasured is None:
            # Only once, for what other processes left: they measure their later commits, or the first request does.
            self._unmeasured = self.database.read(records.unmeasured)
        while self._unmeasured:
            due = self._unmeasured[:_MEASURED_AT_ONCE]
            measured = []
            for identifier in due:
                if stop():
                    return
                try:
                    measured.append((*usage(self.layout.tree(identifier)), identifier))
                except OSError as error:
                    if error.errno != errno.ENOENT:  # else it was removed in the meantime, or is reported as lost
                        warn(f"cannot measure a layer: {error}")
            self.database.write(lambda c: records.set_usages(c, measured))  # noqa: B023 - run at once
            del self._unmeasured[: len(due)]
