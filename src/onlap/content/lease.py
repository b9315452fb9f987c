"""Pins that live as long as the work that needs them: renewed while it goes on, expired when it was killed."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType

from onlap import errors
from onlap.catalog import pins
from onlap.catalog.catalog import Catalog
from onlap.catalog.database import Connection

# Seconds. What an interrupted pull has fetched stays for so long, to go on with.
LIFE = 3600.0
_RENEWAL = LIFE / 4


class Lease:
    """A context manager; inside, what was pinned stays.

    When the block ends well, the pins go. When it ends by an error, they stay until they expire: the next attempt goes
    on with what is there (:meth:`end` takes them at once).

    Args:
        catalog: the root's.
        purpose: what for, in a word or two that an error can show, as ``"pull debian:13"``.

    Attributes:
        owner: of its pins.
        digests: what it pinned.
        over: whether its pins are gone, by a transaction that took them (:meth:`end_within`) and succeeded.
    """

    def __init__(self, catalog: Catalog, purpose: str) -> None:
        self._catalog = catalog
        self.owner = f"{purpose} ({secrets.token_hex(4)})"
        self.digests: set[str] = set()
        self.over = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if error is None and not self.over:
            self.end()

    def pin(self, *digests: str, snapshot: int | None = None) -> None:
        """Keep blobs, whether they are there already or come later; and a snapshot, by its id, in the same go."""
        fresh = [digest for digest in digests if digest not in self.digests]
        if fresh or snapshot is not None:

            def operation(connection: Connection) -> None:
                for digest in fresh:
                    pins.pin(connection, self.owner, digest=digest, seconds=LIFE)
                if snapshot is not None:
                    pins.pin(connection, self.owner, snapshot=snapshot, seconds=LIFE)

            self._write(operation)
            self.digests.update(fresh)

    def pin_snapshot(self, identifier: int) -> None:
        """Keep a snapshot, by its id."""
        self.pin(snapshot=identifier)

    def unpin_snapshot(self, identifier: int) -> None:
        """Let a snapshot go."""
        self._catalog.database.write(lambda c: pins.unpin(c, self.owner, snapshot=identifier))

    def end(self) -> None:
        """Take all pins away."""
        self._catalog.database.write(self.end_within)

    def end_within(self, connection: Connection) -> None:
        """The same inside a write transaction."""
        pins.unpin_all(connection, self.owner)

    def _write(self, operation: Callable[[Connection], None]) -> None:
        self._catalog.database.write(operation)
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="onlap-lease", daemon=True)
            self._thread.start()

    def _renew(self) -> None:
        while not self._stop.wait(_RENEWAL):
            try:
                self._catalog.database.write(self._postpone)
            except errors.Unavailable:
                continue  # the lock is taken; three more attempts come before the pins expire

    def _postpone(self, connection: Connection) -> None:
        expires = time.time_ns() + int(LIFE * 1e9)
        connection.execute("UPDATE pins SET expires_ns = ? WHERE owner = ?", (expires, self.owner))
