"""Garbage: trees and staging directories that belong to no snapshot, and the space that deleting them frees."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from sqlite3 import Connection
from typing import TypeVar

from onlap import errors
from onlap.catalog import records
from onlap.catalog.db.database import Database
from onlap.catalog.disk.layout import Layout
from onlap.catalog.disk.staging import Staging
from onlap.catalog.disk.trash import Trash

T = TypeVar("T")

# Files per second that the background deletes at most: about a tenth of what a disk of this decade manages, so that
# nobody notices; a layer of 30,000 files is gone in ten seconds.
_BACKGROUND_RATE = 3000.0


class Garbage:
    """The garbage of a root.

    Args:
        layout: of the root.
        database: its records; a tree without one is garbage.
        staging: where dead processes leave what they were building.
        trash: where garbage waits for deletion.
        wake: runs :meth:`work` in the background.
        timeout: how many seconds to wait for others who delete a tree.
    """

    def __init__(
        self,
        layout: Layout,
        database: Database,
        staging: Staging,
        trash: Trash,
        wake: Callable[[], None],
        timeout: float,
    ) -> None:
        self.layout = layout
        self.database = database
        self.staging = staging
        self.trash = trash
        self._wake = wake
        self._timeout = timeout

    def with_space(self, action: Callable[[], T]) -> T:
        """Run an action that frees space, or is needed to free some, also on a full disk.

        The write-ahead log needs a page or two, which a full disk does not have: then the reserve is freed, and if that
        is not enough, the trash is emptied.

        Raises:
            ResourceExhausted: there is still no space.
            OnlapError: what ``action`` raises.
        """
        free_space: Callable[[], object]
        for free_space in (self.layout.drop_reserve, self._empty_trash):
            try:
                return action()
            except errors.ResourceExhausted:
                free_space()
        return action()

    def _empty_trash(self) -> None:
        with errors.translated("delete a removed tree", key=self.layout.root):
            self.trash.sweep(wait=self._timeout)

    def cleanup(self) -> int:
        """Delete all garbage now; returns how many trees. Those that are mounted or read are left."""
        self.collect()
        return self.sweep(wait=True)

    def collect(self, *, wake: bool = False) -> None:
        """Move the garbage to the trash: orphans in ``snapshots/``, staging of dead processes.

        Args:
            wake: have everything in the trash deleted in the background.

        Raises:
            OnlapError: an error of the filesystem.
        """
        with errors.translated("clean up", key=self.layout.root):
            self.staging.collect(lambda path: self.trash.put(path, locked=True))
            self._collect_orphans()
            self.layout.remove_leftovers()
        if wake:
            self._wake()

    def _collect_orphans(self) -> None:
        numbers = [int(name) for name in os.listdir(self.layout.snapshots) if re.fullmatch("[0-9]+", name)]
        known = self.with_space(lambda: self.database.read(records.ids))
        suspects = [number for number in numbers if number not in known]
        if not suspects:
            return

        def operation(connection: Connection) -> None:
            # Under the lock: a tree without a record now has none because its transaction failed, not because it is
            # still running.
            now = records.ids(connection)
            for identifier in suspects:
                if identifier not in now:
                    self.trash.put(self.layout.snapshot(identifier))

        self.with_space(lambda: self.database.write(operation))

    def sweep(self, *, wait: bool = False) -> int:
        """Delete what is in the trash and not in use; returns how many trees.

        Args:
            wait: wait for other threads or processes that are deleting something.
        """
        with errors.translated("delete a removed tree", key=self.layout.root):
            removed = self.trash.sweep(wait=self._timeout if wait else 0).removed
            self.layout.make_reserve()
        return removed

    def work(self, stop: Callable[[], bool]) -> bool:
        """Empty the trash slowly, until ``stop`` returns True; returns whether something in it is still in use."""
        if self.trash.is_empty():
            return False
        swept = self.trash.sweep(stop=stop, rate=_BACKGROUND_RATE)
        if swept.removed:
            self.layout.make_reserve()
        return swept.waiting > 0
