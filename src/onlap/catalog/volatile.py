"""Roots whose content no sync writes to the disk: after a reboot they are empty."""

from __future__ import annotations

from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.catalog import Catalog
from onlap.catalog.disk.boot import boot_id
from onlap.errors import shown

# The setting of a volatile root: the boot in which it was last emptied.
VOLATILE = "volatile"


def settle(catalog: Catalog, wanted: bool) -> bool:
    """Whether a root is volatile. A new one becomes what is wanted; one of an earlier boot is emptied.

    Args:
        catalog: of the root, just opened.
        wanted: whether the caller wants a volatile root.

    Raises:
        FailedPrecondition: a volatile root is wanted, and this one keeps its content.
        OnlapError: an error of the filesystem.
    """
    boot = boot_id()
    found = catalog.database.read(lambda c: records.setting(c, VOLATILE))
    if found == boot or (found is None and not wanted):
        return found is not None

    def operation(connection: Connection) -> set[int]:
        now = records.setting(connection, VOLATILE)
        if now is None and records.settings(connection):
            raise errors.FailedPrecondition(
                f"the root {shown(catalog.layout.root)} keeps its content, and cannot become volatile",
                key=catalog.layout.root,
                hint="make another root for volatile snapshots",
            )
        emptied = set() if now == boot else records.ids(connection)
        if emptied:
            records.delete_all(connection)
        records.put_setting(connection, VOLATILE, boot)
        return emptied

    emptied = catalog.database.write(operation)
    with errors.translated("empty the volatile root", key=catalog.layout.root):
        for identifier in emptied:
            catalog.trash.put(catalog.layout.snapshot(identifier))
    return True
