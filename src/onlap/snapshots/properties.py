"""What a root is: the kind of its snapshotter and its properties, written when it is made and checked ever after."""

from __future__ import annotations

import os
from collections.abc import Callable
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import records
from onlap.catalog.db.database import Database
from onlap.errors import shown
from onlap.syscalls.namespaces import in_user_namespace

_KIND = "snapshotter"


def records_owners() -> bool:
    """Whether the owners in this process's copies are recorded where they cannot be set: it may not give files away."""
    return os.geteuid() != 0 or in_user_namespace()


def kind(database: Database) -> str | None:
    """The kind of snapshotter that a root is for; None when nobody has used it yet."""
    return database.read(lambda c: records.setting(c, _KIND))


def settle(database: Database, wanted: str, new: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The properties of a root of the wanted kind; a fresh root becomes of that kind.

    Args:
        database: the root's.
        wanted: the kind.
        new: the properties of a fresh root.

    Raises:
        FailedPrecondition: the root is for another kind.
    """
    names = tuple(new())
    found = database.read(lambda c: _read(c, names))
    if found[_KIND] is None:
        fresh = new()

        def operation(connection: Connection) -> None:
            if records.setting(connection, _KIND) is None:
                for key, value in {_KIND: wanted, **fresh}.items():
                    records.put_setting(connection, key, value)

        database.write(operation)
        found = database.read(lambda c: _read(c, names))
    if found[_KIND] != wanted:
        raise errors.FailedPrecondition(
            f"this root is for the {shown(found[_KIND])} snapshotter, not for {wanted}",
            hint="open it without naming a snapshotter, or make another root",
        )
    return {name: value for name in names if (value := found[name]) is not None}


def _read(connection: Connection, names: tuple[str, ...]) -> dict[str, str | None]:
    return {name: records.setting(connection, name) for name in (_KIND, *names)}
