"""Read a catalog where SQLite cannot create its files: on a read-only filesystem, or one without space for them.

When a connection opens, SQLite creates ``catalog.db-wal`` and ``catalog.db-shm`` if they are missing, and maps the
latter; the last connection deletes both. So opening a root that no process has open takes disk space.
But all writes and checkpoints run under ``catalog.lock``: its holder may read the files as they are.

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
    """Run ``query`` on its own connection, which creates and locks nothing; the caller holds ``catalog.lock``.

    Raises:
        sqlite3.Error: it cannot be read this way either.
    """
    uri = "file:" + "".join(f"%{byte:02x}" for byte in os.fsencode(path))
    if _is_empty(path + "-wal"):
        connection = sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
    else:
        # The log of a killed process, or from before a power cut. Here its index is kept in memory. SQLite would
        # lock the file exclusively, which requires write access; unix-none does not, and catalog.lock replaces it.
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
