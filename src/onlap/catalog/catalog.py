"""The catalog: records and the directories that belong to them, changed together.

The order of steps makes a crash at any point lose nothing that was acknowledged, and leave at most garbage:

- *create*: the tree is built in staging; the write transaction inserts the row, renames the tree to its place and
  commits. A directory already at that place has no record, since we hold the lock: it is moved to the trash.
- *remove*: the row is deleted and durable first, then the tree is renamed to the trash.
- No walk, copy, delete, sync or mkdir inside the write transaction.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from onlap import errors
from onlap.arguments import check_number
from onlap.catalog import pins, records
from onlap.catalog.background.janitor import Janitor
from onlap.catalog.background.manifests import Manifests
from onlap.catalog.background.sidecars import Sidecars
from onlap.catalog.background.usages import Usages
from onlap.catalog.checks import check_commit, check_rebase, lost, no_parent
from onlap.catalog.db import schema
from onlap.catalog.db.database import Connection, Database
from onlap.catalog.disk.layout import Layout
from onlap.catalog.disk.staging import Staging
from onlap.catalog.disk.sync import Syncer
from onlap.catalog.disk.trash import Trash
from onlap.catalog.garbage import Garbage
from onlap.catalog.log import warn
from onlap.catalog.records import Condition, Kind, Record
from onlap.errors import shown
from onlap.locks import Flock, claim_directory, lock_directory
from onlap.syscalls.files import exists

# Seconds in which others that are just opening a root come to see that it has an older format, as we do.
_OPENING = 1.0
# Seconds between two attempts to lock it.
_POLL = 0.005


class _OpenElsewhere(Exception):
    """Other processes have a root open whose format is to change."""


class New(NamedTuple):
    """A snapshot to be recorded.

    Attributes:
        name: its key or name.
        kind: of the snapshot.
        parent: its parent, of any owner.
        labels: its labels.
        staged: its tree in staging.
    """

    name: str
    kind: Kind
    parent: Record | None
    labels: Mapping[str, str]
    staged: str


class Catalog:
    """An open root.

    Args:
        root: its path.
        create: create it if it does not exist.
        timeout: how many seconds to wait for other processes.

    Attributes:
        layout: the paths below the root.
        database: the records.
        staging: where trees are built.
        trash: where removed trees wait for deletion.
        garbage: finds what belongs to no snapshot, and frees space.
        usages: the disk usage of committed snapshots.
        manifests: what committed snapshots hold.
        sidecars: copies of the records beside the trees.
        lost: snapshots whose trees were lost in a power cut (:mod:`onlap.catalog.recovery`).

    Raises:
        NotFound, FailedPrecondition, Unavailable, DataLoss: see :meth:`Layout.prepare` and :meth:`Database.set_up`.
    """

    def __init__(self, root: str | os.PathLike[str], *, create: bool, timeout: float) -> None:
        check_number(timeout, "timeout")
        self.layout = Layout(root)
        self.timeout = timeout
        self.layout.prepare(create=create)
        self._janitor = Janitor(lambda: self.database.upkeep(), self._background)
        self.staging = Staging(self.layout.staging)
        self.trash = Trash(self.layout.root, self.layout.trash)
        self.lost: list[Record] = []
        self._loss_to_note = False
        with contextlib.ExitStack() as on_error:
            with errors.translated("open the root", key=self.layout.root):
                self._format_lock = self._lock_format()
                on_error.callback(self._format_lock.release)
                self._syncer = Syncer(self.layout.snapshots, self._write_failed)
                on_error.callback(self._syncer.close)
                self.database = Database(
                    self.layout.database,
                    self.layout.lock,
                    timeout,
                    upkeep_due=lambda: self._janitor.wake(urgent=True),
                    after_fork=self._after_fork_in_child,
                )
                on_error.callback(self.database.close)
                self.garbage = Garbage(
                    self.layout, self.database, self.staging, self.trash, self._janitor.wake, timeout
                )
                self.usages = Usages(self.layout, self.database)
                self.sidecars = Sidecars(self.layout, self.staging, self.database)
                self.manifests = Manifests(self.layout, self.staging, self.database, self.sidecars.changed)
                self._set_up()
                has_trash = not self.trash.is_empty()
            on_error.pop_all()
        _opened.add(self)
        if has_trash:
            self._janitor.wake()

    def close(self) -> None:
        """Stop the background work and close everything; idempotent, also after an interrupted call."""
        _opened.discard(self)
        with contextlib.ExitStack() as always:
            for each in (self._format_lock.release, self._syncer.close, self.database.close, self.staging.close):
                always.callback(each)
            try:
                self._janitor.stop()
                self.sidecars.finish()
            except BaseException:
                self._janitor.stop()  # what it uses is closed next
                raise

    def _background(self, stop: Callable[[], bool]) -> bool:
        again = self.garbage.work(stop)
        self.usages.measure(stop)
        self.sidecars.write(stop)
        if self.manifests.make(stop):
            self.sidecars.write(stop)
        self.sidecars.clear_due()
        return again

    def _lock_format(self) -> Flock:
        # Every process that has the root open holds its staging directory shared; a migration needs it exclusively.
        held = Flock(self.layout.staging)
        with contextlib.ExitStack() as on_error:
            on_error.callback(held.release)
            self._share(held)
            on_error.pop_all()
        return held

    def _share(self, held: Flock) -> None:
        until = time.monotonic() + self.timeout
        while not held.lock(shared=True):
            if time.monotonic() >= until:
                raise errors.Unavailable(
                    f"the root {shown(self.layout.root)} is being migrated to a newer format",
                    key=self.layout.root,
                    hint="try again in a moment",
                )
            time.sleep(_POLL)

    def _set_up(self) -> None:
        """Create the tables, or migrate them; raises as :meth:`Database.set_up`."""
        until = time.monotonic() + min(self.timeout, _OPENING)
        while (found := self.garbage.with_space(self.database.version)) != schema.VERSION:
            if found:
                # Others that open it now want to migrate it as well: none of them keeps another from it.
                self._format_lock.unlock()
            try:
                self.garbage.with_space(lambda: self.database.set_up(self._check_migration))
            except _OpenElsewhere as error:
                if time.monotonic() >= until:
                    raise errors.Unavailable(
                        f"the root {shown(self.layout.root)} has an older format, and other processes have it open",
                        key=self.layout.root,
                        hint="end them, then open it again to migrate it to this Onlap's format",
                    ) from error
                time.sleep(_POLL)
            self._share(self._format_lock)

    def _check_migration(self, found: int) -> None:
        """Raise when a catalog of an older format cannot be migrated to ours now; a new one has format 0."""
        if not found:
            self.layout.check_new()
            return
        if not self._format_lock.lock():
            raise _OpenElsewhere
        self._format_lock.lock(shared=True)

    def _after_fork_in_child(self) -> None:
        self.staging.after_fork()
        self._janitor.after_fork()

    # Reading

    def get(self, owner: str, name: str) -> Record:
        """The record of a key or name; NotFound if it does not exist."""
        return self.database.read(lambda c: records.get(c, owner, name))

    def by_id(self, identifier: int) -> Record | None:
        """The record of an id; None if it does not exist."""
        return self.database.read(lambda c: records.by_id(c, identifier))

    def walk(self, owner: str | None, condition: Condition | None = None) -> Iterator[Record]:
        """Records in the order of their creation, one transaction per page; none is open between two pages."""
        return records.walk(self.database.read, owner, condition)

    @contextlib.contextmanager
    def hold(self, identifiers: list[int]) -> Iterator[None]:
        """Keep trees from being deleted while they are read.

        Raises:
            NotFound: one of them has been removed in the meantime.
            DataLoss: one of them is lost.
            Unavailable: another program has locked one of them.
            ResourceExhausted: there are not enough descriptors for all of them.
        """
        with contextlib.ExitStack() as stack:
            for identifier in identifiers:
                path = self.layout.snapshot(identifier)
                try:
                    held = lock_directory(path, shared=True)
                except (FileNotFoundError, NotADirectoryError) as error:
                    raise self._gone(identifier) from error
                except OSError as error:
                    raise errors.from_oserror(error, doing="hold a snapshot's tree", key=path) from error
                if held is None:
                    raise self._gone(identifier, locked=True)
                stack.enter_context(held)
            yield

    def _gone(self, identifier: int, *, locked: bool = False) -> errors.OnlapError:
        record = self.by_id(identifier)
        if record is not None and locked:  # not to delete it: its record would be gone by then
            return errors.Unavailable(
                f"the tree of snapshot {shown(record.name)} is locked by another program",
                key=record.name,
                hint=f"it holds flock(2) on {shown(self.layout.snapshot(identifier))}; end it, or try again",
            )
        if record is not None:
            return lost(record)
        return errors.NotFound("the snapshot has been removed in the meantime", hint="see the names with: onlap ls")

    @contextlib.contextmanager
    def serve(self, owner: str) -> Iterator[None]:
        """Be the only server of an owner's snapshots.

        Raises:
            FailedPrecondition: another server runs.
        """
        # A locked directory in staging: a dead server leaves the same there as any dead process, and cleanup takes it.
        path = f"{self.layout.staging}/server-{owner.encode().hex()}"
        held = claim_directory(path)
        if held is None:
            raise errors.FailedPrecondition(
                f"another server serves the snapshots of {shown(owner)} in this root",
                key=owner,
                hint="stop it first, or give another --owner",
            )
        try:
            yield
        finally:
            if held.fd >= 0:  # else this is a forked child, and its parent is the server
                with contextlib.suppress(OSError):  # cleanup takes it
                    os.rmdir(path)
                held.release()

    # Changing

    def create(
        self,
        owner: str,
        name: str,
        kind: Kind,
        parent: Record | None,
        labels: Mapping[str, str],
        staged: str,
    ) -> Record:
        """Record an active snapshot or view, and move its tree from staging to its place.

        Raises:
            NotFound: the parent does not exist.
            InvalidArgument: the parent is not committed.
            AlreadyExists: the name is taken.
        """
        return self.change(lambda c: [self.insert(c, owner, New(name, kind, parent, labels, staged))])[0]

    def change(self, operation: Callable[[Connection], list[Record]], removed: Iterable[Record] = ()) -> list[Record]:
        """Run a transaction that makes or changes snapshots, and deletes the records of others.

        Args:
            operation: inside the transaction; composed of :meth:`insert` and the functions of
                :mod:`onlap.catalog.records`. It returns the records that it made or changed.
            removed: those that it deletes; their trees go to the trash.
        """
        changed = self.database.write(operation)
        for record in changed:
            if record.kind == records.COMMITTED:
                self.usages.committed(record.id)
                self.manifests.committed(record.id)
            self.sidecars.changed(record.id)
        for record in removed:
            self._discard(record.id, record.name, wait=False)
        if any(record.kind == records.COMMITTED for record in changed):
            self._janitor.wake()
        return changed

    def insert(self, connection: Connection, owner: str, new: New) -> Record:
        """In a write transaction: record a snapshot, and move its tree from staging to its place.

        Raises:
            NotFound, InvalidArgument, AlreadyExists: see :meth:`create`.
        """
        if new.parent is not None and not records.is_committed(connection, new.parent):
            raise no_parent(new.parent.name)
        identifier = records.next_id(connection)
        while True:
            if exists(self.layout.snapshot(identifier)):
                # Its transaction never committed. Its number is not used again: the tree keeps it in the trash.
                self.trash.put(self.layout.snapshot(identifier))
            elif not self.trash.holds(identifier):
                break
            identifier += 1
        record = records.insert(connection, identifier, owner, new.name, new.parent, new.kind, new.labels)
        os.rename(new.staged, self.layout.snapshot(identifier))
        return record

    def commit(
        self,
        owner: str,
        name: str,
        record: Record,
        parent: str | None,
        labels: Mapping[str, str],
        empty: bool,
    ) -> None:
        """Turn an active snapshot into a committed one; the caller has synced its tree.

        Raises:
            NotFound: it is gone or has been replaced, or the parent does not exist.
            AlreadyExists: the name is taken.
            FailedPrecondition: it is not active, or the parent is not committed.
            InvalidArgument: it already has another parent.
        """

        def operation(connection: Connection) -> list[Record]:
            above = check_rebase(connection, owner, parent) if parent else None
            under = above.id if above else record.parent_id
            if not records.make_committed(connection, record, name, under, labels, empty):
                # It has changed since it was read.
                check_commit(connection, owner, name, record.name, parent)
                raise records.not_found(record.name)
            return [record._replace(kind=records.COMMITTED)]

        self.change(operation)

    def remove(self, owner: str, name: str, *, wait: bool, only: int | None = None) -> None:
        """Remove a snapshot, and delete its tree.

        Args:
            owner: whose it is.
            name: its key or name.
            wait: delete the tree now; otherwise in the background.
            only: the id that it must have.

        Raises:
            NotFound: it does not exist, or has another id.
            FailedPrecondition: it has children, or is pinned.
        """

        def operation(connection: Connection) -> int:
            found = records.removable(connection, owner, name)
            if only not in (None, found.id):
                raise records.not_found(name)
            if found.has_children:
                above = records.children(connection, found.id)
                are, them = ("is", "that") if len(above) == 1 else ("are", "them")
                raise errors.FailedPrecondition(
                    f"cannot remove snapshot {shown(name)}: {shown(', '.join(above))} {are} based on it",
                    key=name,
                    hint=f"remove {them} first",
                )
            if found.is_pinned:
                pins.check_unpinned(connection, records.get(connection, owner, name))
            records.delete(connection, found.id)
            return found.id

        identifier = self.garbage.with_space(lambda: self.database.write(operation))
        self._discard(identifier, name, wait=wait)

    def _discard(self, identifier: int, name: str, *, wait: bool) -> None:
        """Delete the tree of a snapshot whose record is gone."""
        self.sidecars.removed(identifier)
        self.manifests.removed(identifier)
        self.usages.removed(identifier)
        # The snapshot is removed: a failure from here on only delays the release of its space.
        try:
            self.trash.put(self.layout.snapshot(identifier))
            if wait:
                self.garbage.sweep()
        except (OSError, errors.OnlapError) as error:
            warn(f"cannot delete the tree of the removed snapshot {shown(name)} now: {error}")
        if not wait:
            self._janitor.wake()

    def update(self, owner: str, name: str, change: Callable[[Connection, Record], None]) -> Record:
        """Change a snapshot's labels in one transaction; returns the new record."""

        def operation(connection: Connection) -> Record:
            record = records.get(connection, owner, name)
            change(connection, record)
            return records.get(connection, owner, name)

        record = self.database.write(operation)
        self.sidecars.changed(record.id)
        return record

    @property
    def failed_syncs(self) -> int:
        """How many syncs have failed in this process: for :meth:`sync`, to be read before anything is written."""
        return self._syncer.failures

    def sync(self, since: int | None = None) -> None:
        """Return when every file written so far is on the disk; shared with other callers.

        After a failure, snapshots that were active then can no longer be committed, by any process: the kernel reports
        lost pages once, and the next sync succeeds without them.

        Args:
            since: the value of :attr:`failed_syncs` when the caller began to write what has no record yet.

        Raises:
            OnlapError: the write-back failed.
        """
        with errors.translated("write the layer to the disk"):
            self._syncer.sync(since)
        if self._loss_to_note:
            self._note_loss()

    def _write_failed(self) -> None:
        # In the syncer's thread, which nothing interrupts.
        self._loss_to_note = True
        try:
            self._note_loss()
        except errors.OnlapError as error:
            warn(f"cannot record that writes to the disk failed: {error}")

    def _note_loss(self) -> None:
        # Until this is recorded, no sync of this process succeeds.
        self.database.write(records.note_loss)
        self._loss_to_note = False


_opened: weakref.WeakSet[Catalog] = weakref.WeakSet()


def look_up(root: str, identifier: int) -> Record | None:
    """The record of an id, for callers without a catalog of the root; a catalog that this process has open is used.

    Raises:
        OnlapError: the root cannot be opened.
    """
    for catalog in list(_opened):
        if catalog.layout.root == root:
            return catalog.by_id(identifier)
    catalog = Catalog(root, create=False, timeout=30.0)
    try:
        return catalog.by_id(identifier)
    finally:
        catalog.close()
