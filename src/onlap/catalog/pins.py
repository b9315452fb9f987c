"""Pins, each of which protects a snapshot or a blob until it is removed or expires."""

from __future__ import annotations

import time
from sqlite3 import Connection
from typing import NamedTuple

from onlap import errors
from onlap.catalog.records import Record
from onlap.errors import shown

# The longest time until a pin expires: a longer one was written while the clock was wrong.
_LONGEST_NS = 24 * 3600 * 1_000_000_000
_IS_VALID = "(expires_ns IS NULL OR expires_ns BETWEEN ? AND ?)"


def pin(
    connection: Connection,
    owner: str,
    *,
    snapshot: int | None = None,
    digest: str | None = None,
) -> None:
    """Keep a snapshot or a blob until :func:`unpin`.

    Args:
        connection: inside a write transaction.
        owner: who needs it, in words that an error can show, as ``"image debian:13"``.
        snapshot: its id; or
        digest: of the blob.
    """
    unpin(connection, owner, snapshot=snapshot, digest=digest)
    connection.execute("INSERT INTO pins VALUES (?, ?, ?, NULL)", (owner, snapshot, digest))


def unpin(connection: Connection, owner: str, *, snapshot: int | None = None, digest: str | None = None) -> None:
    """Remove the owner's pin on a snapshot or a blob."""
    if snapshot is not None:
        connection.execute("DELETE FROM pins WHERE owner = ? AND snapshot = ?", (owner, snapshot))
    else:
        connection.execute("DELETE FROM pins WHERE owner = ? AND digest = ?", (owner, digest))


def lasting(connection: Connection, pattern: str) -> list[str]:
    """The owners of pins that do not expire, where a LIKE pattern matches them."""
    sql = "SELECT DISTINCT owner FROM pins WHERE expires_ns IS NULL AND owner LIKE ?"
    return [row[0] for row in connection.execute(sql, (pattern,))]


def postpone(connection: Connection, owner: str, seconds: float) -> None:
    """Let an owner's pins on blobs expire after so many seconds, and remove those on snapshots."""
    expires = time.time_ns() + int(seconds * 1e9)
    connection.execute("DELETE FROM pins WHERE owner = ? AND snapshot IS NOT NULL", (owner,))
    connection.execute("UPDATE pins SET expires_ns = ? WHERE owner = ?", (expires, owner))


def unpin_all(connection: Connection, owner: str) -> None:
    """Remove all pins of an owner."""
    connection.execute("DELETE FROM pins WHERE owner = ?", (owner,))


def unpin_removed(connection: Connection) -> None:
    """Remove the pins on snapshots that are gone."""
    connection.execute("DELETE FROM pins WHERE snapshot IS NOT NULL AND snapshot NOT IN (SELECT id FROM snapshots)")


class Pin(NamedTuple):
    """A row: the owner, and the id of a snapshot or the digest of a blob."""

    owner: str
    snapshot: int | None
    digest: str | None


def valid(connection: Connection) -> list[Pin]:
    """All pins that have not expired, by owner."""
    sql = f"SELECT owner, snapshot, digest FROM pins WHERE {_IS_VALID} ORDER BY owner"
    return [Pin(*row) for row in connection.execute(sql, _times())]


def dangling(connection: Connection) -> list[Pin]:
    """The pins that have not expired on snapshots that are gone, by owner."""
    sql = f"""
        SELECT owner, snapshot, digest FROM pins
        WHERE snapshot IS NOT NULL AND snapshot NOT IN (SELECT id FROM snapshots) AND {_IS_VALID} ORDER BY owner
    """
    return [Pin(*row) for row in connection.execute(sql, _times())]


def without_runs(connection: Connection) -> list[Pin]:
    """The pins that last, by owner, but for those of running programs (:mod:`onlap.catalog.runs`)."""
    sql = "SELECT owner, snapshot, digest FROM pins WHERE expires_ns IS NULL AND owner NOT LIKE '%run ____________)'"
    return [Pin(*row) for row in connection.execute(sql + " ORDER BY owner, snapshot, digest")]


def holders(connection: Connection, *, snapshot: int | None = None, digest: str | None = None) -> list[str]:
    """The owners of the pins on a snapshot or a blob that have not expired."""
    column, value = ("snapshot", snapshot) if snapshot is not None else ("digest", digest)
    rows = connection.execute(
        f"SELECT owner FROM pins WHERE {column} = ? AND {_IS_VALID} ORDER BY owner", (value, *_times())
    )
    return [row[0] for row in rows]


def _times() -> tuple[int, int]:
    now = time.time_ns()
    return now, now + _LONGEST_NS


def check_unpinned(connection: Connection, record: Record) -> None:
    """Raise FailedPrecondition if the snapshot is pinned."""
    owners = holders(connection, snapshot=record.id)
    if owners:
        raise errors.FailedPrecondition(
            f"cannot remove snapshot {shown(record.name)}: it is kept by {shown(', '.join(owners))}",
            key=record.name,
            hint="remove that first",
        )
