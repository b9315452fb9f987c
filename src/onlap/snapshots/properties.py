"""The kind and properties of a root, written when it is made and checked each time it is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.db.database import Database
from onlap.errors import shown
from onlap.syscalls.namespaces import in_user_namespace

_KIND = "snapshotter"


def records_owners() -> bool:
    """Whether this process records owners in an xattr because it may not set them."""
    return os.geteuid() != 0 or in_user_namespace()


def kind(database: Database) -> str | None:
    """The kind of snapshotter that a root is for; None if it has not been used yet."""
    return database.read(lambda c: records.setting(c, _KIND))


def load_or_create(database: Database, wanted: str, new: Mapping[str, str]) -> dict[str, str]:
    """The properties of a root of the wanted kind; a new root gets this kind.

    Args:
        database: the database of the root.
        wanted: the kind.
        new: the properties of a new root.

    Raises:
        FailedPrecondition: the root is for another kind.
    """
    found = database.read(lambda c: _read(c, new))
    if found[_KIND] is None:

        def operation(connection: Connection) -> None:
            if records.setting(connection, _KIND) is None:
                for key, value in {_KIND: wanted, **new}.items():
                    records.put_setting(connection, key, value)

        database.write(operation)
        found = database.read(lambda c: _read(c, new))
    if found[_KIND] != wanted:
        raise errors.FailedPrecondition(
            f"this root is for the {shown(found[_KIND])} snapshotter, not for {wanted}",
            hint="open it without naming a snapshotter, or make another root",
        )
    return {name: value for name in new if (value := found[name]) is not None}


def _read(connection: Connection, names: Iterable[str]) -> dict[str, str | None]:
    return {name: records.setting(connection, name) for name in (_KIND, *names)}
