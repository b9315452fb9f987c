"""When checkpoints become durable: their content is written to the disk in the background, many at once."""

from __future__ import annotations

from collections.abc import Collection
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records as rows
from onlap.catalog.catalog import Catalog
from onlap.catalog.disk.boot import boot_id
from onlap.catalog.helper import Batches
from onlap.catalog.log import warn
from onlap.catalog.records import HAS_LABEL, Condition
from onlap.errors import shown
from onlap.workspaces.records import OWNER, UNSYNCED, node_id

# Seconds that a checkpoint waits for others, to be written with them. Each write competes with what is done meanwhile.
_TOGETHER = 0.1
# What UNSYNCED says after a failed sync: nobody knows what the disk lacks.
_FAILED = "failed"


class Durability:
    """Writes the content of checkpoints to the disk, and notes that it is there.

    Args:
        catalog: of the root.
        volatile: whether the root is volatile: then no checkpoint becomes durable.

    Attributes:
        suspect: ids of snapshots in the catalog that had not reached the disk at the last power cut, or could not be
            written.
    """

    def __init__(self, catalog: Catalog, *, volatile: bool) -> None:
        self._catalog = catalog
        self._volatile = volatile
        self._writes = Batches(self._try_to_write, _TOGETHER)
        found = catalog.database.read(lambda c: rows.labelled(c, OWNER, UNSYNCED))
        boot = boot_id() if found else ""
        self.suspect = frozenset(identifier for identifier, value in found.items() if value != boot)
        if len(self.suspect) < len(found):
            self.begin()  # another process did not get to it

    def check_possible(self) -> None:
        """Raise FailedPrecondition in a volatile root."""
        if self._volatile:
            raise errors.FailedPrecondition(
                f"the root {shown(self._catalog.layout.root)} is volatile: nothing in it survives a reboot",
                key=self._catalog.layout.root,
                hint="leave durable out, or use another root",
            )

    def begin(self) -> None:
        """Write what is there now, in the background and soon."""
        if not self._volatile:
            self._writes.later()

    def wait(self) -> None:
        """Return when all checkpoints made so far are durable.

        Raises:
            OnlapError: they cannot be written.
        """
        self._writes.wait()

    def finish(self) -> None:
        """Wait for what was begun, and leave what fails to the next process."""
        if not self._writes.is_idle():
            try:
                self.wait()
            except errors.OnlapError as error:
                warn(f"some checkpoints are not durable: {error}")

    def check(self, ids: tuple[int, ...], workspace: str) -> None:
        """Raise DataLoss if one of these snapshots has not reached the disk, and never will."""
        self._check(self.suspect.intersection(ids), workspace)

    def check_written(self, ids: tuple[int, ...], workspace: str) -> None:
        """Raise DataLoss if one of these snapshots has not reached the disk."""
        found = self._catalog.database.read(lambda c: rows.labelled(c, OWNER, UNSYNCED))
        self._check(found.keys() & set(ids), workspace)

    def _check(self, lost: Collection[int], workspace: str) -> None:
        record = self._catalog.by_id(min(lost)) if lost else None
        if record is not None:
            raise errors.DataLoss(
                f"checkpoint {shown(node_id(record))} of workspace {shown(workspace)} had not reached the disk "
                "before a power cut or a failure of the disk, and may lack content",
                key=workspace,
                hint="go back to a checkpoint before it; see: onlap ws log",
            )

    def _try_to_write(self) -> None:
        try:
            self._write()
        except errors.OnlapError as error:
            warn(f"cannot write checkpoints to the disk: {error}")
            raise

    def _write(self) -> None:
        condition = Condition(HAS_LABEL, (UNSYNCED, boot_id()))
        due = [record.id for record in self._catalog.walk(OWNER, condition)]
        if not due:
            return
        try:
            self._catalog.sync()
        except errors.OnlapError:
            self._label(due, _FAILED)
            raise
        self._label(due, None)

    def _label(self, ids: list[int], value: str | None) -> None:
        def operation(connection: Connection) -> list[int]:
            # The kernel tells of a failed write once. If it told somebody else, the sync here has succeeded.
            lost = rows.lost_up_to(connection)
            failed = []
            for identifier in ids:
                if rows.by_id(connection, identifier) is not None:  # else it was removed meanwhile
                    now = _FAILED if identifier <= lost else value
                    rows.set_labels(connection, identifier, {UNSYNCED: now})
                    failed += [identifier] if now == _FAILED else []
            return failed

        self.suspect = self.suspect.union(self._catalog.database.write(operation))
        for identifier in ids:
            self._catalog.sidecars.changed(identifier)
