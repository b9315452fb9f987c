"""The records of snapshots: their values, and the SQL for them.

Every function takes a connection, so that several can share one transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from sqlite3 import Connection
from typing import Final, Literal, NamedTuple

from onlap import errors
from onlap.arguments import check_text
from onlap.errors import shown

Kind = Literal["active", "view", "committed"]
VIEW: Final = "view"
ACTIVE: Final = "active"
COMMITTED: Final = "committed"

# The owner of the snapshots of workspaces.
WORKSPACES: Final = "workspaces"

# Rows per page of a walk, as in containerd's proxy; no transaction is open between two pages.
PAGE = 100


class Info(NamedTuple):
    """A snapshot, as callers see it.

    Attributes:
        name: the key of an active snapshot or view, the name of a committed one.
        parent: the name of its parent, None if it has none.
        kind: ``"active"``, ``"view"`` or ``"committed"``.
        labels: its labels.
        created_ns: nanoseconds since the epoch; a commit sets it anew.
        updated_ns: when its labels last changed, likewise.
        owner: empty for the library and the command, otherwise the server that created it.
    """

    name: str
    parent: str | None
    kind: Kind
    labels: Mapping[str, str]
    created_ns: int
    updated_ns: int
    owner: str = ""


class Record(NamedTuple):
    """A row: the fields of :class:`Info`, and internal ones."""

    id: int
    owner: str
    name: str
    parent_id: int | None
    parent: str | None
    kind: Kind
    created_ns: int
    updated_ns: int
    inodes: int | None
    size: int | None
    empty: bool
    labels: Mapping[str, str]

    @property
    def info(self) -> Info:
        """The public part."""
        return Info(self.name, self.parent, self.kind, self.labels, self.created_ns, self.updated_ns, self.owner)


_SELECT = """
SELECT s.id, s.owner, s.name, s.parent, p.name, s.kind, s.created_ns, s.updated_ns, s.inodes, s.size, s.empty,
       (SELECT json_group_object(key, value) FROM labels WHERE snapshot = s.id)
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent
"""


def _record(row: tuple[object, ...]) -> Record:
    *columns, empty, labels = row
    return Record(*columns, bool(empty), _labels(labels) if labels != "{}" else {})  # type: ignore[arg-type, call-arg]


def _labels(text: object) -> dict[str, str]:
    import json

    found: dict[str, str] = json.loads(text)  # type: ignore[arg-type]
    return found


def find(connection: Connection, owner: str, name: str) -> Record | None:
    """The record of a key or name."""
    if not is_text(name):
        return None
    row = connection.execute(_SELECT + "WHERE s.owner = ? AND s.name = ?", (owner, name)).fetchone()
    return _record(row) if row is not None else None


def get(connection: Connection, owner: str, name: str) -> Record:
    """The same, or NotFound."""
    record = find(connection, owner, name)
    if record is None:
        raise not_found(name)
    return record


def of_any_owner(connection: Connection, name: str) -> list[Record]:
    """The records of a key or name, one per owner who has it."""
    owners = "SELECT owner FROM settled UNION SELECT owner FROM snapshots WHERE due"
    found = [find(connection, owner, name) for (owner,) in connection.execute(owners).fetchall()]
    return [record for record in found if record is not None]


def is_text(name: str) -> bool:
    """Whether SQLite can store it, whose text is UTF-8; InvalidArgument if it is not a str."""
    check_text(name, "key or name of a snapshot")
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def exists(connection: Connection, owner: str, name: str) -> bool:
    """Whether a key or name is taken."""
    if not is_text(name):
        return False
    row = connection.execute("SELECT 1 FROM snapshots WHERE owner = ? AND name = ?", (owner, name)).fetchone()
    return row is not None


def by_id(connection: Connection, identifier: int) -> Record | None:
    """The record of an id."""
    row = connection.execute(_SELECT + "WHERE s.id = ?", (identifier,)).fetchone()
    return _record(row) if row is not None else None


def not_found(name: str) -> errors.NotFound:
    """The error for an unknown key."""
    return errors.NotFound(f"there is no snapshot {shown(name)}", key=name, hint="see the names with: onlap ls")


def chain(connection: Connection, identifier: int) -> list[int]:
    """The ids of a committed snapshot and its ancestors, itself first; none if it is gone."""
    rows = connection.execute(
        """
        WITH RECURSIVE chain (id, parent, depth) AS (
            SELECT id, parent, 0 FROM snapshots WHERE id = ?
            UNION ALL
            SELECT s.id, s.parent, depth + 1 FROM chain c JOIN snapshots s ON s.id = c.parent
        )
        SELECT id FROM chain ORDER BY depth
        """,
        (identifier,),
    )
    return [row[0] for row in rows]


class Condition(NamedTuple):
    """A restriction of a walk, as SQL on ``s`` (snapshots) and ``p`` (their parents)."""

    sql: str
    parameters: tuple[str | int | None, ...]


# A condition on a label's key and value.
HAS_LABEL = "EXISTS (SELECT 1 FROM labels l WHERE l.snapshot = s.id AND l.key = ? AND l.value = ?)"


def page(connection: Connection, owner: str | None, after: int, condition: Condition | None) -> list[Record]:
    """The next records after an id, in the order of their ids; of every owner when ``owner`` is None."""
    sql, parameters = "WHERE s.id > ?", [after]  # type: tuple[str, list[object]]
    if owner is not None:
        # "+" keeps SQLite from the index on owner and name, with which it would sort all rows of the owner for each
        # page; with a name as well, the index is right.
        named = condition is not None and "s.name" in condition.sql
        sql += " AND s.owner = ?" if named else " AND +s.owner = ?"
        parameters.append(owner)
    if condition is not None:
        sql += f" AND ({condition.sql})"
        parameters += condition.parameters
    rows = connection.execute(_SELECT + sql + f" ORDER BY s.id LIMIT {PAGE}", parameters)
    return [_record(row) for row in rows]


def walk(
    read: Callable[[Callable[[Connection], list[Record]]], list[Record]],
    owner: str | None = None,
    condition: Condition | None = None,
) -> Iterator[Record]:
    """Records in the order of their creation, by :meth:`Database.read`: one transaction per page, none between two."""
    after = 0
    while True:
        start = after
        rows = read(lambda c: page(c, owner, start, condition))  # noqa: B023 - run at once
        yield from rows
        if len(rows) < PAGE:
            return
        after = rows[-1].id


# No snapshot gets such a number: SQLite would have none left for the next one.
HIGHEST = 1 << 62


def next_id(connection: Connection) -> int:
    """An id that no snapshot ever had; a tree whose transaction never committed may have it."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").fetchone()
    return (int(row[0]) if row else 0) + 1


def set_highest_id(connection: Connection, highest: int) -> None:
    """Let the ids of new snapshots be higher than this one, since none is ever used again."""
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'snapshots'")
    connection.execute("INSERT INTO sqlite_sequence VALUES ('snapshots', ?)", (highest,))


def all_where(connection: Connection, owner: str, condition: Condition) -> list[Record]:
    """All records of an owner that meet a condition, inside one transaction."""
    rows = connection.execute(f"{_SELECT} WHERE s.owner = ? AND ({condition.sql})", (owner, *condition.parameters))
    return [_record(row) for row in rows]


def names_between(connection: Connection, owner: str, first: str, last: str) -> list[str]:
    """An owner's keys and names in a range."""
    sql = "SELECT name FROM snapshots WHERE owner = ? AND name BETWEEN ? AND ? ORDER BY name"
    return [row[0] for row in connection.execute(sql, (owner, first, last))]


def labelled(connection: Connection, owner: str, key: str) -> dict[int, str]:
    """The ids of an owner's snapshots with a label, and its values."""
    sql = "SELECT s.id, l.value FROM labels l JOIN snapshots s ON s.id = l.snapshot WHERE l.key = ? AND s.owner = ?"
    return dict(connection.execute(sql, (key, owner)))


def is_committed(connection: Connection, record: Record) -> bool:
    """Whether a record that was committed when it was read is unchanged; looked up by its id, which is quick."""
    row = connection.execute("SELECT owner, name, kind FROM snapshots WHERE id = ?", (record.id,)).fetchone()
    return bool(row == (record.owner, record.name, COMMITTED))


def insert(
    connection: Connection,
    identifier: int,
    owner: str,
    name: str,
    parent: Record | None,
    kind: Kind,
    labels: Mapping[str, str],
) -> Record:
    """A new active snapshot or view; AlreadyExists when the name is taken."""
    now = time.time_ns()
    above = parent.id if parent is not None else None
    try:
        connection.execute(
            """
            INSERT INTO snapshots (id, owner, name, parent, kind, created_ns, updated_ns)
            VALUES (?, ?, ?, ?, ?, ?, ?)
            """,
            (identifier, owner, name, above, kind, now, now),
        )
    except sqlite3.IntegrityError as error:
        raise already_exists(name) from error
    kept = {key: value for key, value in labels.items() if value}
    _put_labels(connection, identifier, kept)
    parent_name = parent.name if parent is not None else None
    return Record(identifier, owner, name, above, parent_name, kind, now, now, None, None, False, kept)


def already_exists(name: str) -> errors.AlreadyExists:
    """The error for a taken name."""
    return errors.AlreadyExists(
        f"snapshot {shown(name)} already exists", key=name, hint="choose another name, or remove it first"
    )


def make_committed(
    connection: Connection,
    record: Record,
    name: str,
    parent: int | None,
    labels: Mapping[str, str],
    empty: bool,
) -> bool:
    """Turn an active snapshot into a committed one under another name; its labels are replaced.

    Returns:
        Whether the snapshot still was as in ``record``; otherwise nothing was changed.
    """
    now = time.time_ns()
    try:
        changed = connection.execute(
            """
            UPDATE snapshots
            SET name = ?, kind = 'committed', parent = ?, created_ns = ?, updated_ns = ?, empty = ?, due = 1
            WHERE id = ? AND owner = ? AND name = ? AND kind = 'active' AND parent IS ?
            """,
            (name, parent, now, now, empty, record.id, record.owner, record.name, record.parent_id),
        ).rowcount
    except sqlite3.IntegrityError as error:
        raise already_exists(name) from error
    if changed:
        write_labels(connection, record.id, labels)
        if not empty:
            check_kept(connection, record)
    return bool(changed)


# The highest id when the write-back of some file failed; the kernel does not say which, and reports it once.
_LOST_UP_TO = "lost_up_to"


def note_loss(connection: Connection) -> None:
    """Record that what was written to any active snapshot may not be on the disk, and never will be."""
    put_setting(connection, _LOST_UP_TO, str(next_id(connection) - 1))


def lost_up_to(connection: Connection) -> int:
    """The id of the last snapshot whose content may not be on the disk, since its write-back failed; 0 without any."""
    return int(setting(connection, _LOST_UP_TO) or 0)


def check_kept(connection: Connection, record: Record) -> None:
    """Raise DataLoss if what was written to an active snapshot may not be on the disk."""
    if record.id <= lost_up_to(connection):
        hint = "remove the snapshot, prepare another, and write or apply the content again"
        if record.owner == WORKSPACES:
            hint = "go back to a checkpoint: onlap ws rollback"
        which = shown(subject(record.owner, record.name))
        raise errors.DataLoss(
            f"{which} may lack content: it was active when writes to the disk failed",
            key=record.name,
            hint=f"see dmesg; then {hint}",
        )


def write_labels(connection: Connection, identifier: int, labels: Mapping[str, str]) -> None:
    """Write the labels of a record that is made anew, with its times."""
    connection.execute("DELETE FROM labels WHERE snapshot = ?", (identifier,))
    _put_labels(connection, identifier, labels)


def replace_labels(connection: Connection, identifier: int, labels: Mapping[str, str]) -> None:
    """Give a snapshot these labels and no others, and record that it was updated now."""
    write_labels(connection, identifier, labels)
    _touch(connection, identifier)


def set_labels(connection: Connection, identifier: int, changes: Mapping[str, str | None]) -> None:
    """Set some labels, and record that the snapshot was updated now.

    None or an empty value removes a label, as in containerd (boltutil.writeMap).
    """
    gone = [(identifier, key) for key, value in changes.items() if not value]
    connection.executemany("DELETE FROM labels WHERE snapshot = ? AND key = ?", gone)
    _put_labels(connection, identifier, {key: value for key, value in changes.items() if value})
    _touch(connection, identifier)


def _put_labels(connection: Connection, identifier: int, labels: Mapping[str, str]) -> None:
    rows = [(identifier, key, value) for key, value in labels.items() if value]
    if rows:
        connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", rows)


def _touch(connection: Connection, identifier: int) -> None:
    # Its sidecar is told from an older one by this time alone, and is looked at only where something is due.
    connection.execute("UPDATE snapshots SET updated_ns = ?, due = 1 WHERE id = ?", (time.time_ns(), identifier))


class Removable(NamedTuple):
    """What must be known to remove a snapshot."""

    id: int
    has_children: bool
    is_pinned: bool


def removable(connection: Connection, owner: str, name: str) -> Removable:
    """What must be known to remove a snapshot, in one query; NotFound if it does not exist. Expired pins count."""
    if not is_text(name):
        raise not_found(name)
    row = connection.execute(
        """
        SELECT id, EXISTS (SELECT 1 FROM snapshots c WHERE c.parent = s.id),
               EXISTS (SELECT 1 FROM pins WHERE snapshot = s.id)
        FROM snapshots s WHERE owner = ? AND name = ?
        """,
        (owner, name),
    ).fetchone()
    if row is None:
        raise not_found(name)
    return Removable(row[0], bool(row[1]), bool(row[2]))


def children(connection: Connection, identifier: int) -> list[str]:
    """The names of up to three children; of workspaces, what their users know."""
    rows = connection.execute("SELECT owner, name FROM snapshots WHERE parent = ? LIMIT 3", (identifier,))
    return [name if owner != WORKSPACES else subject(owner, name) for owner, name in rows]


def subject(owner: str, name: str) -> str:
    """What an error calls a snapshot: the writable layer of a workspace is the workspace, to its users."""
    kind, slash, rest = name.partition("/")
    if owner == WORKSPACES and slash:
        return {"top": "workspace ", "node": "checkpoint "}.get(kind, f"{kind} ") + rest
    return f"snapshot {name}"


def count_views(connection: Connection, parent: int | None, but: int) -> int:
    """How many views of a parent there are, except the one with the id ``but``."""
    row = connection.execute(
        "SELECT count(*) FROM snapshots WHERE parent = ? AND kind = 'view' AND id <> ?", (parent, but)
    ).fetchone()
    return int(row[0])


def delete(connection: Connection, identifier: int) -> None:
    """Delete a snapshot's row, with its labels and expired pins."""
    connection.execute("DELETE FROM labels WHERE snapshot = ?", (identifier,))
    connection.execute("DELETE FROM pins WHERE snapshot = ?", (identifier,))
    connection.execute("DELETE FROM manifests WHERE snapshot = ?", (identifier,))
    connection.execute("DELETE FROM snapshots WHERE id = ?", (identifier,))


def delete_all(connection: Connection) -> None:
    """Delete every row but the settings."""
    for table in ("labels", "pins", "manifests", "images", "snapshots"):
        connection.execute(f"DELETE FROM {table}")


def unmeasured(connection: Connection) -> list[int]:
    """Committed snapshots whose usage has not been measured."""
    sql = "SELECT id FROM snapshots WHERE due AND kind = 'committed' AND size IS NULL"
    return [row[0] for row in connection.execute(sql)]


def set_usages(connection: Connection, measured: list[tuple[int, int, int]]) -> None:
    """Record inodes and bytes of committed snapshots, each with its id behind them."""
    connection.executemany("UPDATE snapshots SET inodes = ?, size = ? WHERE id = ? AND kind = 'committed'", measured)


# A restriction of a walk: those for which background work may be left.
DUE = Condition("s.due", ())


def set_due(connection: Connection, identifiers: Iterable[int]) -> None:
    """Note that background work may be left for these snapshots."""
    connection.executemany("UPDATE snapshots SET due = 1 WHERE id = ? AND NOT due", ((each,) for each in identifiers))


def is_due(connection: Connection, identifier: int) -> bool:
    """Whether background work may be left for a snapshot."""
    return connection.execute("SELECT 1 FROM snapshots WHERE id = ? AND due", (identifier,)).fetchone() is not None


def clear_due(connection: Connection, done: Iterable[tuple[int, int, str | None]]) -> None:
    """Note for which of these snapshots no background work is left; the others stay due.

    Args:
        connection: in a write transaction.
        done: the id of each, and what its sidecar has: ``updated_ns`` of the record, and the digest of the manifest.
    """
    connection.executemany(
        """
        UPDATE snapshots SET due = 0
        WHERE id = ? AND updated_ns = ? AND due AND (
            kind <> 'committed'
            OR (size IS NOT NULL AND ? = (SELECT digest FROM manifests WHERE snapshot = snapshots.id))
        )
        """,
        done,
    )


def totals(connection: Connection) -> list[tuple[str, str, int, int, int]]:
    """By kind and owner: how many snapshots there are, and the inodes and bytes of the measured ones."""
    return connection.execute(
        """
        SELECT kind, owner, sum(count), sum(inodes), sum(size) FROM (
            SELECT * FROM settled
            UNION ALL
            SELECT owner, kind, 1, ifnull(inodes, 0), ifnull(size, 0) FROM snapshots WHERE due
        ) GROUP BY kind, owner
        """
    ).fetchall()


def ids(connection: Connection) -> set[int]:
    """Every id."""
    return {row[0] for row in connection.execute("SELECT id FROM snapshots")}


def setting(connection: Connection, key: str) -> str | None:
    """A property of the root, None if it is not set."""
    row = connection.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
    return str(row[0]) if row is not None else None


def put_setting(connection: Connection, key: str, value: str) -> None:
    """Set a property of the root."""
    connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))


def settings(connection: Connection) -> dict[str, str]:
    """All properties of the root."""
    return dict(connection.execute("SELECT key, value FROM settings"))


def without_manifest(connection: Connection) -> list[int]:
    """Committed snapshots without a manifest."""
    sql = """
        SELECT id FROM snapshots
        WHERE due AND kind = 'committed' AND NOT EXISTS (SELECT 1 FROM manifests WHERE snapshot = snapshots.id)
    """
    return [row[0] for row in connection.execute(sql)]


def manifest(connection: Connection, identifier: int) -> str | None:
    """The digest of a snapshot's manifest."""
    row = connection.execute("SELECT digest FROM manifests WHERE snapshot = ?", (identifier,)).fetchone()
    return str(row[0]) if row is not None else None


def set_manifest(connection: Connection, identifier: int, digest: str) -> None:
    """Note the digest of the manifest of a committed snapshot, unless it is gone."""
    connection.execute(
        "INSERT OR REPLACE INTO manifests SELECT id, ? FROM snapshots WHERE id = ? AND kind = 'committed'",
        (digest, identifier),
    )


def drop_manifest(connection: Connection, identifier: int) -> None:
    """Forget the digest of a snapshot's manifest, so that another is made."""
    set_due(connection, [identifier])
    connection.execute("DELETE FROM manifests WHERE snapshot = ?", (identifier,))
