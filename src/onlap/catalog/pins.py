"""Pins: what says that a snapshot or a blob must stay, and for how long."""

from __future__ import annotations

import sqlite3
import time

from onlap import errors
from onlap.catalog.records import Record
from onlap.errors import shown


def pin(
    connection: sqlite3.Connection,
    owner: str,
    *,
    snapshot: int | None = None,
    digest: str | None = None,
    seconds: float | None = None,
) -> None:
    """Keep a snapshot or a blob; renews the owner's pin on it if there is one.

    Args:
        connection: inside a write transaction.
        owner: who wants it, in words that an error can show, as ``"image debian:13"``.
        snapshot: its id; or
        digest: of the blob.
        seconds: for how long; until :func:`unpin` when None.
    """
    expires = None if seconds is None else time.time_ns() + int(seconds * 1e9)
    unpin(connection, owner, snapshot=snapshot, digest=digest)
    connection.execute("INSERT INTO pins VALUES (?, ?, ?, ?)", (owner, snapshot, digest, expires))


def unpin(
    connection: sqlite3.Connection, owner: str, *, snapshot: int | None = None, digest: str | None = None
) -> None:
    """Take the owner's pin on a snapshot or a blob away."""
    if snapshot is not None:
        connection.execute("DELETE FROM pins WHERE owner = ? AND snapshot = ?", (owner, snapshot))
    else:
        connection.execute("DELETE FROM pins WHERE owner = ? AND digest = ?", (owner, digest))


def unpin_all(connection: sqlite3.Connection, owner: str) -> None:
    """Take every pin of an owner away."""
    connection.execute("DELETE FROM pins WHERE owner = ?", (owner,))


def holders(connection: sqlite3.Connection, *, snapshot: int | None = None, digest: str | None = None) -> list[str]:
    """Who keeps a snapshot or a blob now; what has expired keeps nothing."""
    column, value = ("snapshot", snapshot) if snapshot is not None else ("digest", digest)
    rows = connection.execute(
        f"SELECT owner FROM pins WHERE {column} = ? AND (expires_ns IS NULL OR expires_ns > ?) ORDER BY owner",
        (value, time.time_ns()),
    )
    return [row[0] for row in rows]


def check_unpinned(connection: sqlite3.Connection, record: Record) -> None:
    """Raise FailedPrecondition when somebody keeps the snapshot."""
    owners = holders(connection, snapshot=record.id)
    if owners:
        raise errors.FailedPrecondition(
            f"cannot remove snapshot {shown(record.name)}: it is kept by {shown(', '.join(owners))}",
            key=record.name,
            hint="remove that first",
        )
