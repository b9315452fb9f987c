"""The tables of catalog.db, and the migration of older formats.

The operations themselves keep the references between tables consistent, since they check for children and pins anyway;
SQLite does not check them again at each commit (7 % of a cycle), but knows them, for ``PRAGMA foreign_key_check``.
"""

from __future__ import annotations

import sqlite3
from sqlite3 import Connection

# "Onlp", by which file(1) tells a catalog from another database.
APPLICATION_ID = 0x4F6E6C70

_VERSION_1 = """
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- AUTOINCREMENT: the id of a removed snapshot is never used again, since its tree may still be in the trash or mounted.
CREATE TABLE snapshots (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    owner      TEXT NOT NULL,
    name       TEXT NOT NULL,
    parent     INTEGER REFERENCES snapshots (id),
    kind       TEXT NOT NULL CHECK (kind IN ('view', 'active', 'committed')),
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    inodes     INTEGER,          -- NULL: not measured yet
    size       INTEGER,          -- bytes, likewise
    empty      INTEGER NOT NULL DEFAULT 0,  -- committed with nothing in it: can be recreated after a crash
    UNIQUE (owner, name)
);
CREATE INDEX snapshots_by_parent ON snapshots (parent) WHERE parent IS NOT NULL;

CREATE TABLE labels (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id),
    key      TEXT NOT NULL,
    value    TEXT NOT NULL,
    PRIMARY KEY (snapshot, key)
) WITHOUT ROWID;
CREATE INDEX labels_by_value ON labels (key, value);

-- What protects a snapshot or a blob from removal.
CREATE TABLE pins (
    owner      TEXT NOT NULL,
    snapshot   INTEGER REFERENCES snapshots (id),
    digest     TEXT,
    expires_ns INTEGER,          -- NULL: never
    CHECK ((snapshot IS NULL) <> (digest IS NULL))
);
CREATE UNIQUE INDEX pins_by_snapshot ON pins (snapshot, owner) WHERE snapshot IS NOT NULL;
CREATE UNIQUE INDEX pins_by_digest ON pins (digest, owner) WHERE digest IS NOT NULL;

-- An image: a name for a manifest. The owner "image NAME" pins what it needs.
CREATE TABLE images (
    name       TEXT PRIMARY KEY,
    digest     TEXT NOT NULL,    -- of the manifest
    media_type TEXT NOT NULL,
    size       INTEGER NOT NULL, -- bytes of the manifest
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL
) WITHOUT ROWID;
"""

_VERSION_2 = """
-- The digest of what a committed snapshot holds (ROOT/snapshots/<id>/about/manifest).
CREATE TABLE manifests (
    snapshot INTEGER PRIMARY KEY REFERENCES snapshots (id),
    digest   TEXT NOT NULL
);
"""

_VERSION_3 = """
-- Whether background work may be left: measuring it, listing what it holds, copying the record beside its tree. So a
-- process finds what others left without reading every row. For what is made, committed and removed in a burst, only
-- this index is kept in addition, and the sums below are not touched. What a process itself has left of each kind of
-- work it calls unmeasured, unlisted and unwritten.
ALTER TABLE snapshots ADD COLUMN due INTEGER NOT NULL DEFAULT 1;
CREATE INDEX snapshots_due ON snapshots (id) WHERE due;

-- Sums over the rows that are not due: how many there are, their inodes and bytes.
CREATE TABLE settled (
    owner  TEXT NOT NULL,
    kind   TEXT NOT NULL,
    count  INTEGER NOT NULL,
    inodes INTEGER NOT NULL,
    size   INTEGER NOT NULL,
    PRIMARY KEY (owner, kind)
) WITHOUT ROWID;
CREATE TRIGGER settled_less AFTER UPDATE OF owner, kind, inodes, size, due ON snapshots WHEN NOT old.due BEGIN
    UPDATE settled SET count = count - 1, inodes = inodes - ifnull(old.inodes, 0), size = size - ifnull(old.size, 0)
    WHERE owner = old.owner AND kind = old.kind;
END;
CREATE TRIGGER settled_more AFTER UPDATE OF owner, kind, inodes, size, due ON snapshots WHEN NOT new.due BEGIN
    INSERT INTO settled VALUES (new.owner, new.kind, 1, ifnull(new.inodes, 0), ifnull(new.size, 0))
    ON CONFLICT DO UPDATE SET
        count = count + 1, inodes = inodes + excluded.inodes, size = size + excluded.size;
END;
CREATE TRIGGER settled_gone AFTER DELETE ON snapshots WHEN NOT old.due BEGIN
    UPDATE settled SET count = count - 1, inodes = inodes - ifnull(old.inodes, 0), size = size - ifnull(old.size, 0)
    WHERE owner = old.owner AND kind = old.kind;
END;
"""

# The step at index N takes a catalog from format N to N + 1.
_STEPS = (_VERSION_1, _VERSION_2, _VERSION_3)
VERSION = len(_STEPS)


def version(connection: Connection) -> int:
    """The format of a catalog; 0 for a new file."""
    row = connection.execute("PRAGMA user_version").fetchone()
    return int(row[0])


def migrate(connection: Connection, current: int) -> None:
    """Migrate a catalog from format ``current`` to the newest, inside the caller's transaction."""
    for step in _STEPS[current:]:
        # Not executescript(), which would commit the caller's transaction first.
        for statement in _statements(step):
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _statements(script: str) -> list[str]:
    statements = []
    text = ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            statements.append(text)
            text = ""
    return statements
