"""Read a catalog where SQLite cannot make its files: on a read-only filesystem, or one without room for them.

As a connection opens, SQLite makes ``catalog.db-wal`` and ``catalog.db-shm`` unless they are there, and maps the
latter; the last one that closes deletes both. So a root that nobody has open can be opened only where there is room.
But all writes and checkpoints run under ``catalog.lock``: who holds it may read the files as they are.

Sources: sqlite.org/uri.html, sqlite.org/wal.html ("Read-Only Databases", "Use of WAL Without Shared-Memory").
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from sqlite3 import Connection
from typing import TypeVar

T = TypeVar("T")


def read(path: str, query: Callable[[Connection], T]) -> T:
    """Run ``query`` on a connection of its own, which makes and locks nothing; the caller holds ``catalog.lock``.

    Raises:
        sqlite3.Error: it cannot be read even so.
    """
    uri = "file:" + "".join(f"%{byte:02x}" for byte in os.fsencode(path))
    if _is_empty(path + "-wal"):
        connection = sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
    else:
        # A log that a killed process, or a power cut, has left. Its index is kept in memory in this mode, which would
        # lock the file exclusively, for which it would have to be open for writing; the lock that is held does instead.
        connection = sqlite3.connect(f"{uri}?mode=ro&vfs=unix-none", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        return query(connection)
    finally:
        connection.close()


def _is_empty(path: str) -> bool:
    try:
        return os.stat(path).st_size == 0
    except FileNotFoundError:
        return True
