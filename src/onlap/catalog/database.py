"""SQLite under many threads, many processes and forks: group commit behind one lock.

Facts that force this (sqlite.org/wal.html, sqlite.org/howtocorrupt.html):

- SQLite 3.7.0 to 3.51.2 can corrupt a write-ahead log when one process writes while another checkpoints
  ("WAL-reset bug"). So all writes and all checkpoints, also the one of the last close, run under ``catalog.lock``.
- No connection may cross a fork: a child that opens a new one while the parent holds one loses acknowledged commits.
  So all are closed before a fork and opened again after it, on both sides.
- Closing *any* descriptor of the file drops the process's POSIX locks on it. So nothing but SQLite opens it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from onlap import errors
from onlap.catalog import schema
from onlap.catalog.locks import BriefLock, FileLock

T = TypeVar("T")
Connection = sqlite3.Connection

# A commit appends about six pages of 4 KiB to the write-ahead log. In a file that grows, its fdatasync has to write the
# file's new size too, and takes twice as long (467 us against 220 us). So the log is made large once, and emptied by a
# checkpoint before it would outgrow that size; SQLite then begins it anew. Commits since the last checkpoint are
# counted in the lock's file, since those of many short commands add up.
LOG_SIZE = 8 << 20
COMMITS_TO_CHECKPOINT = 300
# A process that writes less than this is a short command, which would only pay for a large log.
COMMITS_TO_GROW = 10


# One fork at a time, which thaws what it froze; and none while a database is being opened.
_fork = threading.Lock()


class _Ticket(Generic[T]):
    """One operation that waits for its transaction."""

    __slots__ = ("_wake", "error", "finished", "operation", "result")

    def __init__(self, operation: Callable[[Connection], T]) -> None:
        self.operation = operation
        self.result: T
        self.error: BaseException | None = None
        self.finished = False
        # A plain lock is the cheapest thing in Python that one thread can wait on until another says go.
        self._wake = threading.Lock()
        self._wake.acquire()

    def wait(self) -> None:
        self._wake.acquire()

    def wake(self) -> None:
        self._wake.release()


class Database:
    """The catalog's connections: any number of readers, and one writer that commits for all who wait.

    The first thread that wants to write leads: it takes the lock, begins, runs what has queued up meanwhile, each
    operation in a savepoint, commits once, and wakes the others; whoever came later is led by the first of them.

    Args:
        path: catalog.db.
        lock_path: catalog.lock.
        timeout: how many seconds to wait for other processes.
        upkeep_due: called, by a thread that has just written, when :meth:`upkeep` has something to do.
    """

    def __init__(self, path: str, lock_path: str, timeout: float, upkeep_due: Callable[[], None]) -> None:
        self._path = path
        self._lock_path = lock_path
        self._timeout = timeout
        self._upkeep_due = upkeep_due
        with _fork:  # not in the middle of a fork, which would not know of it
            self._fresh()
            _databases.add(self)

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._lock = FileLock(self._lock_path, self._timeout)
        self._mutex = threading.Lock()
        self._queue: list[_Ticket[object]] = []
        self._led = False
        self._successor: _Ticket[object] | None = None
        self._writer: Connection | None = None
        self._commits = 0
        self._grown = False
        self._readers: list[Connection] = []
        self._open: list[Connection] = []
        # For one that is forgotten rather than closed. Not __del__, which runs also for those that were closed, at any
        # moment, and in which Python drops what a signal's handler raises.
        self._forgotten = weakref.finalize(self, close_connections, self._open, self._lock_path, self._timeout)
        self._forgotten.atexit = False  # see _close_all
        self._gate = threading.Condition(threading.Lock())
        self._inside = 0
        self._frozen = False
        self._closed = False

    def set_up(self, may_migrate: Callable[[int], None]) -> None:
        """Make the tables, or bring them to our format.

        Args:
            may_migrate: raises when a catalog of the format that it is given must not be changed now; 0 is a new one.

        Raises:
            FailedPrecondition: a newer Onlap wrote it.
            OnlapError: what ``may_migrate`` raises, or what SQLite says.
        """
        if os.path.lexists(self._path) and self.read(schema.version) == schema.VERSION:
            return  # as it mostly is: without the lock, so that opening waits for nobody
        self._enter()
        try:
            with self._lock_of_own():
                self._bring_up(may_migrate)
        except sqlite3.Error as error:
            raise translated(error, self._path) from error
        finally:
            self._leave()

    def _bring_up(self, may_migrate: Callable[[int], None]) -> None:
        connection = self._connect()
        try:
            found = schema.version(connection)
            if found > schema.VERSION:
                raise other_version(found, self._path)
            if found < schema.VERSION:
                may_migrate(found)
                connection.execute("BEGIN IMMEDIATE")
                schema.migrate(connection, found)
                connection.execute("COMMIT")
        finally:
            connection.close()

    # The ways in

    def read(self, query: Callable[[Connection], T]) -> T:
        """Run ``query`` on a connection of its own; several statements see several states unless it begins.

        Raises:
            OnlapError: what SQLite says.
        """
        self._enter()
        try:
            with self._mutex:
                connection = self._readers.pop() if self._readers else None
            try:
                if connection is None:
                    connection = self._connect()
                    self._open.append(connection)
                return query(connection)
            except sqlite3.Error as error:
                if connection is not None:
                    self._close([connection])
                    connection = None
                raise translated(error, self._path) from error
            finally:
                if connection is not None:
                    with self._mutex:
                        self._readers.append(connection)
        finally:
            self._leave()

    def write(self, operation: Callable[[Connection], T]) -> T:
        """Run ``operation`` in a transaction and return when it is durable.

        It may run together with others, and must not take long: every process waits for it.

        Raises:
            Unavailable: another process held the lock too long.
            OnlapError: what the operation raises, or what SQLite says; nothing of it is kept then.
        """
        self._enter()
        try:
            ticket = _Ticket(operation)
            with self._mutex:
                self._queue.append(ticket)  # type: ignore[arg-type]
                leads = not self._led
                self._led = True
            if not leads:
                self._await(ticket)
            if not ticket.finished:
                self._lead(ticket)
        finally:
            self._leave()
        if isinstance(ticket.error, sqlite3.Error):
            raise translated(ticket.error, self._path) from ticket.error
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    def upkeep(self) -> None:
        """Make the write-ahead log large once, and empty it after a number of commits; under the lock.

        Raises:
            OnlapError: what SQLite or the filesystem says.
        """
        self._enter()
        try:
            if self._commits >= COMMITS_TO_GROW and not self._grown:
                self._grow_log()
            if self._lock.number >= COMMITS_TO_CHECKPOINT:
                self._checkpoint()
        finally:
            self._leave()

    def _grow_log(self) -> None:
        self._grown = True
        try:
            # Not the database itself, whose POSIX locks a close would drop; the log has none. What lies behind its
            # last frame means nothing to SQLite (sqlite.org/fileformat2.html, "The Write-Ahead Log").
            fd = os.open(self._path + "-wal", os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            with self._lock_of_own():
                size = os.fstat(fd).st_size
                # Written, not only allocated: to write into an unwritten extent changes metadata as well.
                os.pwrite(fd, bytes(max(0, LOG_SIZE - size)), size)
            os.fdatasync(fd)
        except OSError as error:
            raise errors.from_oserror(error, doing="make room in the catalog's log", key=self._path) from error
        finally:
            os.close(fd)

    def _checkpoint(self) -> None:
        lock = self._lock_of_own()
        with lock:
            connection = self._connect()
            try:
                # PASSIVE waits for no reader; what it cannot take now, the next one does. Not TRUNCATE: the log
                # shall stay large.
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                lock.number = 0
            except sqlite3.Error as error:
                raise translated(error, self._path) from error
            finally:
                connection.close()

    def close(self) -> None:
        """Close every connection; later calls fail."""
        if self._closed or self._pid != os.getpid():
            return
        if self._commits and self._lock.number >= COMMITS_TO_CHECKPOINT:
            # Short commands have no background that would do it.
            with contextlib.suppress(errors.OnlapError):
                self._checkpoint()
        self._freeze()
        self._closed = True
        self._forgotten.detach()
        self._lock.close()
        self._thaw()
        _databases.discard(self)

    # Group commit

    def _await(self, ticket: _Ticket[T]) -> None:
        """Wait until the operation was done, or its thread is to lead."""
        try:
            ticket.wait()
        except BaseException:
            # A signal (KeyboardInterrupt) ended the wait. The others must not be left without a leader.
            with self._mutex:
                if ticket in self._queue:
                    self._queue.remove(ticket)  # type: ignore[arg-type]
                to_lead = self._successor is ticket
            if to_lead:
                self._lead(None)
            raise

    def _lead(self, own: _Ticket[T] | None) -> None:
        """Commit what has queued up; then hand the lead to the first who came meanwhile."""
        batch: list[_Ticket[object]] = []
        try:
            with self._lock:
                batch = self._take()
                if batch:
                    self._commit(batch)
        except BaseException as error:
            # The lock, BEGIN or COMMIT failed: nothing of the batch is kept, and each gets the error as its own. A
            # signal may have come between the taking of the lock and the block that gives it back.
            self._lock.release()
            batch = batch or self._take()
            self._fail(batch, error)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._mutex:
                self._successor = self._queue[0] if self._queue else None
                self._led = self._successor is not None
                successor = self._successor
            for ticket in batch:
                ticket.finished = True
                if ticket is not own:
                    ticket.wake()
            if successor is not None:
                successor.wake()

    def _fail(self, batch: list[_Ticket[object]], error: BaseException) -> None:
        if isinstance(error, sqlite3.Error):
            error = translated(error, self._path)
        elif not isinstance(error, Exception):
            error = errors.Unavailable("the thread that was to commit it was interrupted", hint="try again")
        for ticket in batch:
            ticket.error = error
        # After a failed statement nothing is sure of the connection's transaction: SQLite may have rolled it back.
        if not isinstance(error, errors.Unavailable) or (self._writer is not None and self._writer.in_transaction):
            writer, self._writer = self._writer, None
            if writer is not None:
                self._close([writer])

    def _take(self) -> list[_Ticket[object]]:
        with self._mutex:
            batch, self._queue = self._queue, []
        return batch

    def _commit(self, batch: list[_Ticket[object]]) -> None:
        writer = self._writer
        if writer is None:
            writer = self._writer = self._connect()
            self._open.append(writer)
        writer.execute("BEGIN IMMEDIATE")
        found = schema.version(writer)
        if found != schema.VERSION:
            writer.execute("ROLLBACK")
            raise other_version(found, self._path)
        if len(batch) == 1:
            if not _run(batch[0], writer):
                writer.execute("ROLLBACK")
                return
        else:
            for ticket in batch:
                writer.execute("SAVEPOINT operation")
                if not _run(ticket, writer):
                    writer.execute("ROLLBACK TO operation")
                writer.execute("RELEASE operation")
        writer.execute("COMMIT")
        self._commits += 1
        since_checkpoint = self._lock.number + 1
        self._lock.number = since_checkpoint
        if self._commits == COMMITS_TO_GROW or since_checkpoint % COMMITS_TO_CHECKPOINT == 0:
            self._upkeep_due()

    # Connections

    def _connect(self) -> Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        try:
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",  # WAL with NORMAL would lose the last acknowledged commits in a power cut
                "wal_autocheckpoint = 0",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _close(self, connections: list[Connection]) -> bool:
        closed = close_connections(connections, self._lock_path, self._timeout)
        for connection in connections:
            self._open.remove(connection)
        return closed

    def _lock_of_own(self) -> BriefLock:
        return BriefLock(self._lock_path, self._timeout)

    # Forks

    def _enter(self) -> None:
        if self._pid != os.getpid():
            raise errors.FailedPrecondition(
                "this process was forked behind Python's back, with SQLite connections open",
                key=self._path,
                hint="fork with os.fork or multiprocessing, or open the store in the new process",
            )
        with self._gate:
            while self._frozen:
                self._gate.wait()
            if self._closed:
                raise errors.FailedPrecondition("the store is closed", key=self._path, hint="open it again")
            self._inside += 1

    def _leave(self) -> None:
        with self._gate:
            self._inside -= 1
            if self._frozen:
                self._gate.notify_all()

    def _freeze(self) -> bool:
        """Wait until nobody is inside, keep everybody out, and close every connection; whether all are closed."""
        with self._gate:
            while self._frozen:
                self._gate.wait()
            self._frozen = True
            while self._inside:
                self._gate.wait()
        self._readers, self._writer = [], None
        return self._close(list(self._open))

    def _thaw(self) -> None:
        with self._gate:
            self._frozen = False
            self._gate.notify_all()

    def _after_fork_in_child(self, all_closed: bool) -> None:
        if self._closed:
            return
        self._forgotten.detach()
        self._fresh()
        if not all_closed:
            self._pid = _NOT_OURS


# A process id that nobody has.
_NOT_OURS = -1

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_frozen_for_fork: list[tuple[Database, bool]] = []


def _before_fork() -> None:
    _fork.acquire()
    _frozen_for_fork[:] = [(database, database._freeze()) for database in list(_databases)]


def _after_fork_in_parent() -> None:
    for database, _ in _frozen_for_fork:
        database._thaw()
    _frozen_for_fork.clear()
    _fork.release()


def _after_fork_in_child() -> None:
    for database, all_closed in _frozen_for_fork:
        database._after_fork_in_child(all_closed)
    _frozen_for_fork.clear()
    _fork.release()


def _close_all() -> None:
    # A connection that the interpreter closes as it ends would checkpoint without the lock.
    for database in list(_databases):
        database.close()


atexit.register(_close_all)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def close_connections(connections: list[Connection], lock_path: str, timeout: float) -> bool:
    """Close connections under the lock; False when it is not to be had, and they stay open for ever.

    The last connection of all processes checkpoints as it closes, which has to happen under the lock as every
    checkpoint does. Without it the kernel may close the files when the process ends, which checkpoints nothing.
    """
    if not connections:
        return True
    try:
        with BriefLock(lock_path, timeout):
            for connection in connections:
                connection.close()
    except errors.Unavailable:
        for connection in connections:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        return False
    return True


def _run(ticket: _Ticket[object], connection: Connection) -> bool:
    """Run one operation; what it raises is its own, unless the database itself failed, and the batch with it."""
    try:
        ticket.result = ticket.operation(connection)
    except sqlite3.Error as error:
        # SQLite ends the whole transaction after some errors (sqlite.org/lang_transaction.html): a full disk, no
        # memory. After others only the statement is undone: it was refused for what it said.
        if not connection.in_transaction or _primary_code(error) in _OF_THE_DATABASE:
            raise
        ticket.error = error
        return False
    except Exception as error:  # noqa: BLE001 - handed to the thread that waits for it, whatever it is
        ticket.error = error
        return False
    return True


def other_version(found: int, path: str) -> errors.FailedPrecondition:
    """The error for a catalog of another format than ours."""
    newer = "newer" if found > schema.VERSION else "older"
    return errors.FailedPrecondition(
        f"the catalog has format {found}, this Onlap writes format {schema.VERSION}",
        key=path,
        hint=f"it is a {newer} one: " + ("upgrade Onlap" if newer == "newer" else "open the store again"),
    )


# sqlite.org/rescode.html; the lower 8 bits of an extended code are its primary one.
_SQLITE_FULL = 13
_BY_CODE: dict[int, tuple[type[errors.OnlapError], str]] = {
    sqlite3.SQLITE_BUSY: (errors.Unavailable, "another process holds it; try again"),
    sqlite3.SQLITE_LOCKED: (errors.Unavailable, "try again"),
    _SQLITE_FULL: (errors.ResourceExhausted, "free some space there"),
    sqlite3.SQLITE_CORRUPT: (errors.DataLoss, "restore a backup"),
    sqlite3.SQLITE_NOTADB: (errors.DataLoss, "restore a backup"),
    sqlite3.SQLITE_IOERR: (errors.DataLoss, "look into the kernel's log (dmesg)"),
    sqlite3.SQLITE_CANTOPEN: (errors.PermissionDenied, "see that it exists and is yours"),
    sqlite3.SQLITE_READONLY: (errors.PermissionDenied, "the filesystem or the file is read-only"),
    sqlite3.SQLITE_PERM: (errors.PermissionDenied, "see that it is yours"),
}


_OF_THE_DATABASE = frozenset(_BY_CODE)

# SQLite keeps the errno to itself when it cannot make or open its log and its shared memory, or make them larger.
_OF_ITS_FILES = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)
# What its shared memory takes at first (sqlite.org/walformat.html).
_SHARED_MEMORY = 32768


def _try_files(directory: str) -> None:
    """Make a file as SQLite makes its own, and remove it; the OSError of that says what ails the disk."""
    import tempfile

    fd, path = tempfile.mkstemp(prefix="catalog.try-", dir=directory)
    try:
        os.unlink(path)
        os.posix_fallocate(fd, 0, _SHARED_MEMORY)
    finally:
        os.close(fd)


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def translated(error: sqlite3.Error, path: str) -> errors.OnlapError:
    """What SQLite says, as one of our errors."""
    code = _primary_code(error)
    cls, hint = _BY_CODE.get(code, (errors.Internal, ""))
    if code in _OF_ITS_FILES:
        try:
            _try_files(os.path.dirname(path))
        except OSError as reason:
            return errors.from_oserror(reason, doing="use the catalog", key=path)
    return cls(f"the catalog {path}: {error}", key=path, hint=hint or None)
