"""Pins that last as long as the work that needs them, whatever the clock says: until it or its process ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from sqlite3 import Connection

from onlap import errors
from onlap.catalog import pins
from onlap.catalog.catalog import Catalog
from onlap.catalog.log import warn
from onlap.catalog.runs import Run, forget
from onlap.forks import unless_forked


class Lease:
    """A context manager in which blobs and snapshots can be pinned; the pins are a run's (:mod:`onlap.catalog.runs`).

    Args:
        catalog: the root's.
        purpose: what for, in a word or two that an error can show, as ``"pull debian:13"``.
        resumed: whether another attempt resumes this one when it fails or is killed: then its blobs stay for
            :data:`onlap.catalog.runs.RESUMED`, unless :meth:`end` was called. Else all pins go, however the block ends.

    Attributes:
        run: the run.
        owner: of its pins.
        digests: of the blobs that it pinned.
        over: whether its pins are gone, since a transaction that removed them (:meth:`end_within`) succeeded.

    Raises:
        OnlapError: the filesystem refuses.
    """

    def __init__(self, catalog: Catalog, purpose: str, *, resumed: bool = False) -> None:
        self._catalog = catalog
        self.run = Run(catalog.layout.root)
        self.owner = self.run.owner(purpose, resumed=resumed)
        self.digests: set[str] = set()
        self.over = False
        self._leave = unless_forked(self._left)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        self._leave(error)

    def _left(self, error: BaseException | None) -> None:
        try:
            if self.over:
                return
            if error is None:
                try:
                    self.end()
                except errors.OnlapError as failure:
                    # Its work is done; a sweep removes the pins of a run that is over.
                    warn(f"pins of {self.owner} stay for now: {failure}")
                return
            # The first error is the one to report; a sweep removes the pins.
            with contextlib.suppress(errors.OnlapError):
                forget(self._catalog, self.run.id)
        finally:
            self.run.close()

    def pin(self, *digests: str, snapshot: int | None = None) -> None:
        """Keep blobs, present or still to come, and a snapshot, by its id, in one transaction."""
        fresh = [digest for digest in digests if digest not in self.digests]
        if fresh or snapshot is not None:

            def operation(connection: Connection) -> None:
                for digest in fresh:
                    pins.pin(connection, self.owner, digest=digest)
                if snapshot is not None:
                    pins.pin(connection, self.owner, snapshot=snapshot)

            self._write(operation)
            self.digests.update(fresh)

    def unpin_snapshot(self, identifier: int) -> None:
        """Remove the pin of a snapshot."""
        self._write(lambda c: pins.unpin(c, self.owner, snapshot=identifier))

    def end(self) -> None:
        """Remove all pins."""
        self._write(self.end_within)

    def end_within(self, connection: Connection) -> None:
        """The same inside a write transaction."""
        pins.unpin_all(connection, self.owner)

    def _write(self, operation: Callable[[Connection], None]) -> None:
        self._catalog.database.write(operation)
