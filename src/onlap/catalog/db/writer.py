"""All that happens under catalog.lock, in one thread: transactions for all who wait, checkpoints, closes.

That thread is a :class:`~onlap.catalog.helper.Helper`: no interrupt comes between the taking of the lock and its
release, or between a COMMIT and the news of it to those who wait. It waits for other processes as long as that takes;
a caller gives up after its timeout, and its job is not done then.
"""

from __future__ import annotations

import ctypes
import sqlite3
import time
from _thread import TIMEOUT_MAX, allocate_lock
from collections.abc import Callable
from sqlite3 import Connection
from typing import TypeVar

from onlap import errors
from onlap.catalog.db import schema
from onlap.catalog.db.space import check_space, try_files
from onlap.catalog.helper import Helper, Job
from onlap.catalog.log import warn
from onlap.locks import FileLock

T = TypeVar("T")

# Commits since the last checkpoint are counted in the lock's file, since those of many short commands add up.
COMMITS_TO_CHECKPOINT = 300
# A process that writes less than this is a short command, which would only pay for a large log.
COMMITS_TO_GROW = 10


class _Forks:
    """The forks of this process, one at a time.

    Attributes:
        lock: held during a fork, by hooks that are calls in C alone: whatever interrupts the fork, those that wait for
            its end go on afterwards.
        number: of the latest one, counted.
    """

    def __init__(self) -> None:
        self.lock = allocate_lock()
        self.number = 0


forks = _Forks()
# Seconds between two looks at what announces its end to nobody: a fork, another thread's reading.
POLL = 0.0005


class Operation(Job[T]):
    """A job that is part of a transaction; its argument is the connection."""

    __slots__ = ()


class Writer:
    """One database's writing end.

    Args:
        path: catalog.db.
        lock_path: catalog.lock.
        timeout: how many seconds to wait for other processes.

    Attributes:
        timeout: the same, within the range that a lock takes.
        open: every connection that is open, readers' too.
        commits: transactions so far.
        upkeep_due: whether enough has been committed for a look at the log's size.
        shut: whether all is closed for good.
    """

    def __init__(self, path: str, lock_path: str, timeout: float) -> None:
        self._path = path
        self._lock_path = lock_path
        self.timeout = min(max(timeout, POLL), TIMEOUT_MAX)
        self._lock = FileLock(lock_path)
        self._helper = Helper(self._serve)  # never refers to the Database, which could not be collected else
        self._connection: Connection | None = None
        self._queues = False
        self._frozen_for = 0
        self.open: list[Connection] = []
        self.commits = 0
        self.upkeep_due = False
        self.shut = False

    # The caller's side

    def do(self, job: Job[T]) -> T:
        """Have a job done under the lock, and return what it returned.

        Raises:
            Unavailable: another process held the lock too long.
            OnlapError: what the job raises, or what SQLite or the filesystem says; nothing of an operation is kept.
        """
        given_up = False
        try:
            self._helper.put(job)
            while not job.wait(self.timeout):
                # Only other processes are given up on: what is slow in this one (the disk) is waited for.
                if self._queues and job.give_up():
                    given_up = True
                    break
        except BaseException:
            # A signal (KeyboardInterrupt). Who cleans up behind an operation must know how it ended.
            if not job.give_up():
                job.wait()
            raise
        if given_up:
            raise self._unavailable()
        try:
            job.check()
        except sqlite3.Error as error:
            raise translated(error, self._path) from error
        return job.result

    def discard(self, connection: Connection) -> None:
        """Close a connection soon, under the lock: the last close of all checkpoints."""
        self._helper.put(Job(lambda: self.close_now(connection)))

    def freeze(self, readers: list[Connection], is_reading: Callable[[], bool]) -> Job[bool]:
        """Put a job that closes all connections, and after which no other is done until the fork is over."""
        number = forks.number
        job = _Freeze(lambda: self._freeze(number, readers, is_reading))
        self._helper.put(job)
        return job

    def close(self, readers: list[Connection], is_reading: Callable[[], bool]) -> Job[None]:
        """Put a job that closes all connections for good."""
        job = Job(lambda: self._shut(readers, is_reading))
        self._helper.put(job)
        return job

    def leak(self) -> None:
        """Keep connections that could not be closed from the garbage collector, which would do it without the lock.

        The kernel closes the files when the process ends, which checkpoints nothing.
        """
        for connection in list(self.open):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))

    def connect(self) -> Connection:
        """A new connection, which :attr:`open` knows; for any thread.

        Raises:
            sqlite3.Error: what SQLite says.
        """
        check_space(self._path, fresh=not self.open)
        connection = sqlite3.connect(
            self._path,
            timeout=self.timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        self.open.append(connection)
        try:
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",  # WAL with NORMAL would lose the last acknowledged commits in a power cut
                "wal_autocheckpoint = 0",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()
        except BaseException:
            self.discard(connection)
            raise
        return connection

    # The thread's side

    def _serve(self, first: Job[object], alone: bool) -> None:
        done: list[Job[object]] = []
        try:
            refusal = self._take_lock(alone)
            jobs = [first, *self._helper.waiting()]
            if refusal is None:
                jobs = self._perform(jobs, done)
            for job in jobs:
                if refusal is None:
                    self._helper.jobs.put(job)  # after the fork
                elif job.begin():
                    job.error = refusal
                    done.append(job)
        finally:
            self._give_lock_back()
            for job in done:
                job.finish()

    def _take_lock(self, alone: bool) -> errors.OnlapError | None:
        while self._frozen_for == forks.number and forks.lock.locked():
            time.sleep(POLL)
        if self.shut:
            return closed(self._path)
        try:
            if not self._lock.acquire(wait=False):
                if alone:
                    return self._unavailable()
                self._queues = True
                self._lock.acquire(wait=True)
        except OSError as error:
            return errors.from_oserror(error, doing="lock the catalog", key=self._lock_path)
        finally:
            self._queues = False
        return None

    def _give_lock_back(self) -> None:
        if self.shut:
            self._lock.close()
        else:
            self._lock.release()

    def _unavailable(self) -> errors.Unavailable:
        return errors.Unavailable(
            f"another process has held {self._lock_path} for {self.timeout:g} s",
            hint="see who with: fuser -v, then try again",
        )

    def _perform(self, jobs: list[Job[object]], done: list[Job[object]]) -> list[Job[object]]:
        """Do jobs in their order, operations that follow each other in one transaction; what is left for later."""
        batch: list[Operation[object]] = []
        for index, job in enumerate(jobs):
            if not job.begin():
                continue
            done.append(job)
            if isinstance(job, Operation):
                batch.append(job)
                continue
            self._transact(batch)
            batch = []
            job.perform()
            if isinstance(job, _Freeze):
                return jobs[index + 1 :]
        self._transact(batch)
        return []

    def _transact(self, batch: list[Operation[object]]) -> None:
        if not batch:
            return
        try:
            if self.shut:
                raise closed(self._path)
            committed = self._commit(batch)
        except Exception as error:  # noqa: BLE001 - each of the batch gets it
            # BEGIN or COMMIT failed: nothing of the batch is kept. And nothing is sure of the connection's transaction:
            # SQLite may have rolled it back.
            for job in batch:
                job.error = translated(error, self._path) if isinstance(error, sqlite3.Error) else error
            if self._connection is not None:
                self.close_now(self._connection)
            return
        if committed:
            self._count()

    def _commit(self, batch: list[Operation[object]]) -> bool:
        check_space(self._path)
        if self._connection is None:
            self._connection = self.connect()
        writer = self._connection
        writer.execute("BEGIN IMMEDIATE")
        found = schema.version(writer)
        if found != schema.VERSION:
            writer.execute("ROLLBACK")
            raise other_version(found, self._path)
        if len(batch) == 1:
            if not _run(batch[0], writer):
                writer.execute("ROLLBACK")
                return False
        else:
            for job in batch:
                writer.execute("SAVEPOINT operation")
                if not _run(job, writer):
                    writer.execute("ROLLBACK TO operation")
                writer.execute("RELEASE operation")
        writer.execute("COMMIT")
        return True

    def _count(self) -> None:
        # After the COMMIT: what goes wrong here is no failure of those who asked for it.
        self.commits += 1
        try:
            since_checkpoint = self._lock.number + 1
            self._lock.number = since_checkpoint
        except OSError as error:
            warn(f"cannot count commits in {self._lock_path}: {error}")
            return
        if self.commits == COMMITS_TO_GROW or since_checkpoint % COMMITS_TO_CHECKPOINT == 0:
            self.upkeep_due = True

    def checkpoint_if_due(self) -> None:
        """Empty the log after a number of commits; under the lock.

        Raises:
            OSError, sqlite3.Error: what the filesystem or SQLite says; the log keeps all then.
        """
        if self._lock.number >= COMMITS_TO_CHECKPOINT:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Empty the log; under the lock.

        Raises:
            OSError, sqlite3.Error: what the filesystem or SQLite says; the log keeps all then.
        """
        connection = self.connect()
        try:
            # PASSIVE waits for no reader; what it cannot take now, the next one does. Not TRUNCATE: the log shall stay
            # large.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._lock.number = 0
        finally:
            self.close_now(connection)

    def close_now(self, connection: Connection) -> None:
        """Close a connection, under the lock; without room it stays open until all are closed."""
        if self._lacks_space():
            return
        if connection is self._connection:
            self._connection = None
        try:
            connection.close()
        except sqlite3.Error as error:
            warn(f"cannot close {self._path}: {error}")
        if connection in self.open:
            self.open.remove(connection)

    def _freeze(self, number: int, readers: list[Connection], is_reading: Callable[[], bool]) -> bool:
        self._frozen_for = number
        return self._close_all(readers, is_reading)

    def _close_all(self, readers: list[Connection], is_reading: Callable[[], bool]) -> bool:
        """Close every connection as soon as nobody reads; whether that came in time."""
        deadline = time.monotonic() + self.timeout
        while is_reading():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        if self._lacks_space():
            return False
        readers.clear()
        for connection in list(self.open):
            self.close_now(connection)
        return True

    def _lacks_space(self) -> bool:
        try:
            check_space(self._path)
        except sqlite3.Error:
            return True
        return False

    def _shut(self, readers: list[Connection], is_reading: Callable[[], bool]) -> None:
        if self.shut:
            return
        try:
            if self.commits:
                # Short commands have no background that would do it.
                self.checkpoint_if_due()
        except (OSError, sqlite3.Error) as error:
            # A failed fdatasync among them loses nothing: the log is emptied only after the database is on the disk.
            warn(f"cannot empty the log of {self._path}: {error}")
        if not self._close_all(readers, is_reading):
            self.leak()
        self.shut = True


class _Freeze(Job[bool]):
    """The job of :meth:`Writer.freeze`."""

    __slots__ = ()


def _run(job: Operation[object], connection: Connection) -> bool:
    """Run one operation; what it raises is its own, unless the database itself failed, and the batch with it."""
    job.perform(connection)
    error = job.error
    # SQLite ends the whole transaction after some errors (sqlite.org/lang_transaction.html): a full disk, no memory.
    # After others only the statement is undone: it was refused for what it said.
    if isinstance(error, sqlite3.Error) and (not connection.in_transaction or _primary_code(error) in _OF_THE_DATABASE):
        raise error
    return error is None


def closed(path: str) -> errors.FailedPrecondition:
    """The error for a store that is closed."""
    return errors.FailedPrecondition("the store is closed", key=path, hint="open it again")


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


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_of_files(error: sqlite3.Error) -> bool:
    """Whether SQLite could not make its other files, or open them, for whatever reason."""
    return _primary_code(error) in _OF_ITS_FILES


def translated(error: sqlite3.Error, path: str) -> errors.OnlapError:
    """What SQLite says, as one of our errors."""
    code = _primary_code(error)
    cls, hint = _BY_CODE.get(code, (errors.Internal, ""))
    if is_of_files(error):
        try:
            try_files(path)
            if isinstance(error.__cause__, OSError):
                raise error.__cause__
        except OSError as reason:
            return errors.from_oserror(reason, doing="use the catalog", key=path)
    return cls(f"the catalog {path}: {error}", key=path, hint=hint or None)
