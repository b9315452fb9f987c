"""All work under catalog.lock, in one thread: transactions for all waiting callers, checkpoints, closes.

That thread is a :class:`~onlap.catalog.helper.Helper`: no interrupt comes between taking the lock and releasing it, or
between a COMMIT and its report to the waiting callers. It waits for other processes as long as that takes; a caller
gives up after its timeout, and then its job is not done.
"""

from __future__ import annotations

import ctypes
import os
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
# Added to that number during a commit. Where it is found afterwards, the commit failed, or its process died.
_COMMITTING = 1 << 62
# A process with fewer commits is a short command, for which enlarging the log does not pay.
COMMITS_TO_GROW = 10
# What is read and written at once.
_PIECE = 1 << 20


class _Forks:
    """The forks of this process, one at a time.

    Attributes:
        lock: held during a fork, by hooks that are single calls in C: whatever interrupts the fork, the threads that
            wait for its end continue afterwards.
        number: how many there have been.
    """

    def __init__(self) -> None:
        self.lock = allocate_lock()
        self.number = 0


forks = _Forks()
# Seconds between two checks for the end of what does not announce it: a fork, another thread's reading.
POLL = 0.0005


class Operation(Job[T]):
    """A job that is part of a transaction; its argument is the connection.

    Attributes:
        readonly: whether it failed since SQLite has one of its files open for reading only.
    """

    __slots__ = ("readonly",)

    def __init__(self, action: Callable[..., T]) -> None:
        super().__init__(action)
        self.readonly = False


class Writer:
    """One database's writing end.

    Args:
        path: catalog.db.
        lock_path: catalog.lock.
        timeout: how many seconds to wait for other processes.

    Attributes:
        timeout: the same, within the range that a lock accepts.
        open: all open connections, those of readers included.
        commits: how many transactions there have been.
        upkeep_due: whether enough has been committed to check the size of the log.
        shut: whether everything is closed for good.
    """

    def __init__(self, path: str, lock_path: str, timeout: float) -> None:
        self._path = path
        self._lock_path = lock_path
        self.timeout = min(max(timeout, POLL), TIMEOUT_MAX)
        self._lock = FileLock(lock_path)
        self._helper = Helper(self._serve)  # never refers to the Database, which could not be collected otherwise
        self._connection: Connection | None = None
        self._queues = False
        self._frozen_for = 0
        self.open: list[Connection] = []
        self.commits = 0
        self.upkeep_due = False
        self.shut = False

    # For callers

    def do(self, job: Job[T]) -> T:
        """Have a job done under the lock, and return its result.

        Raises:
            Unavailable: another process held the lock too long.
            OnlapError: what the job raises, or an error of SQLite or the filesystem; an operation is rolled back.
        """
        given_up = False
        try:
            if not self._helper.do_here(job, self._may_begin):
                self._helper.put(job)
            while not job.wait(self.timeout):
                # Only waiting for other processes is given up: what is slow in this one (the disk) is waited for.
                if self._queues and job.give_up():
                    given_up = True
                    break
        except BaseException:
            # A signal (KeyboardInterrupt). The caller that cleans up after an operation must know how it ended.
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

    def _may_begin(self) -> bool:
        try:
            return not forks.lock.locked() and self._lock.acquire(wait=False)
        except OSError:
            return False  # the helper's thread tells it

    def discard(self, connection: Connection) -> None:
        """Close a connection soon, under the lock: the last close checkpoints."""
        self._helper.put(Job(lambda: self.close_now(connection)))

    def freeze(self, readers: list[Connection], is_reading: Callable[[], bool]) -> Job[bool]:
        """Queue a job that closes all connections, after which no other is done until the fork is over."""
        number = forks.number
        job = _Freeze(lambda: self._freeze(number, readers, is_reading))
        self._helper.put(job)
        return job

    def close(self, readers: list[Connection], is_reading: Callable[[], bool]) -> Job[None]:
        """Queue a job that closes all connections for good."""
        job = Job(lambda: self._shut(readers, is_reading))
        self._helper.put(job)
        return job

    def leak(self) -> None:
        """Keep connections that could not be closed from being collected, which would close them without the lock.

        The kernel closes the files when the process ends, without a checkpoint.
        """
        for connection in list(self.open):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))

    def connect(self) -> Connection:
        """A new connection, listed in :attr:`open`; for any thread.

        Raises:
            sqlite3.Error: from SQLite.
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

    # In the helper's thread

    def _serve(self, first: Job[object], in_caller: bool) -> None:
        done: list[Job[object]] = []
        try:
            refusal = self._take_lock(in_caller)
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
            self._release_lock()
            for job in done:
                job.finish()

    def _take_lock(self, in_caller: bool) -> errors.OnlapError | None:
        while self._frozen_for == forks.number and forks.lock.locked():
            time.sleep(POLL)
        if self.shut:
            return closed(self._path)
        try:
            if not self._lock.acquire(wait=False):
                if in_caller:
                    return self._unavailable()
                self._queues = True
                self._lock.acquire(wait=True)
        except OSError as error:
            return errors.from_oserror(error, doing="lock the catalog", key=self._lock_path)
        finally:
            self._queues = False
        return None

    def _release_lock(self) -> None:
        if self.shut:
            self._lock.close()
        else:
            self._lock.release()

    def _unavailable(self) -> errors.Unavailable:
        return errors.Unavailable(
            f"another process has held {self._lock_path} for {self.timeout:g} s",
            hint="find out which with: fuser -v, then try again",
        )

    def _perform(self, jobs: list[Job[object]], done: list[Job[object]]) -> list[Job[object]]:
        """Do jobs in order, consecutive operations in one transaction; returns those that have to wait for a fork."""
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
        except Exception as error:  # noqa: BLE001 - each job of the batch gets it
            # BEGIN or COMMIT failed: nothing of the batch is kept. The state of the connection's transaction is
            # unknown: SQLite may have rolled it back.
            for job in batch:
                job.error = translated(error, self._path) if isinstance(error, sqlite3.Error) else error
                job.readonly = is_readonly(error)
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
        self._mend_log()
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
        self._set_number(self._lock.number | _COMMITTING)
        writer.execute("COMMIT")
        return True

    def _count(self) -> None:
        # After the COMMIT: a failure here is not one of the operations.
        self.commits += 1
        since_checkpoint = (self._lock.number & ~_COMMITTING) + 1
        self._set_number(since_checkpoint)
        if self.commits == COMMITS_TO_GROW or since_checkpoint % COMMITS_TO_CHECKPOINT == 0:
            self.upkeep_due = True

    def _set_number(self, value: int) -> None:
        try:
            self._lock.number = value
        except OSError as error:
            # A full disk, on which records can still be removed.
            warn(f"cannot count commits in {self._lock_path}: {error}")

    def _mend_log(self) -> None:
        """After a commit that did not end: write the log to the disk again; under the lock.

        When the kernel could not write a page it reports that once, and keeps the page as if it were written
        (Documentation/core-api/errseq.rst). Whoever recovers the log next reads that page, and goes on behind it. But
        after a power cut the log ends where it is not on the disk, and what was acknowledged behind it is lost.
        """
        number = self._lock.number
        if not number & _COMMITTING:
            return
        try:
            _write_again(self._path + "-wal")
        except OSError as error:
            raise errors.from_oserror(error, doing="write the catalog's log again", key=self._path) from error
        self._set_number(number & ~_COMMITTING)

    def checkpoint_if_due(self) -> None:
        """Empty the log after a number of commits; under the lock.

        Raises:
            OSError, sqlite3.Error: from the filesystem or SQLite; the log keeps everything then.
        """
        if self._lock.number >= COMMITS_TO_CHECKPOINT:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Empty the log; under the lock.

        Raises:
            OSError, sqlite3.Error: from the filesystem or SQLite; the log keeps everything then.
        """
        self._mend_log()
        connection = self.connect()
        try:
            # PASSIVE does not wait for readers; what it cannot copy now is left to the next one. Not TRUNCATE: the log
            # is to keep its size.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._lock.number = 0
        finally:
            self.close_now(connection)

    def close_now(self, connection: Connection) -> None:
        """Close a connection, under the lock; without disk space it stays open until all are closed."""
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
        return self.close_all(readers, is_reading)

    def close_all(self, readers: list[Connection], is_reading: Callable[[], bool]) -> bool:
        """Close every connection as soon as no thread reads; False after a timeout."""
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
                # A short command ends before its background work would do it.
                self.checkpoint_if_due()
        except (OSError, sqlite3.Error) as error:
            # A failed fdatasync loses nothing here: the log is emptied only after the database is on the disk.
            warn(f"cannot empty the log of {self._path}: {error}")
        if not self.close_all(readers, is_reading):
            self.leak()
        self.shut = True


class _Freeze(Job[bool]):
    """The job of :meth:`Writer.freeze`."""

    __slots__ = ()


def _run(job: Operation[object], connection: Connection) -> bool:
    """Run one operation. Its errors stay with it, unless the database itself failed, and with it the whole batch."""
    job.perform(connection)
    error = job.error
    # SQLite rolls back the whole transaction after some errors (sqlite.org/lang_transaction.html): a full disk, no
    # memory. After others, as a violated constraint, only the statement is undone.
    if isinstance(error, sqlite3.Error) and (not connection.in_transaction or _primary_code(error) in _OF_THE_DATABASE):
        raise error
    return error is None


def _write_again(path: str) -> None:
    try:
        # It has no POSIX locks of SQLite's, which a close would drop.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for offset in range(0, os.fstat(fd).st_size, _PIECE):
            data = os.pread(fd, _PIECE, offset)
            # Else ext4 takes a block that it has allocated and failed to write for one that holds data (6.18; it reads
            # as zeroes after the next mount).
            os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)
            os.pwrite(fd, data, offset)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def closed(path: str) -> errors.FailedPrecondition:
    """The error for a store that is closed."""
    return errors.FailedPrecondition("the store is closed", key=path, hint="open it again")


def other_version(found: int, path: str) -> errors.FailedPrecondition:
    """The error for a catalog of another format than ours."""
    return errors.FailedPrecondition(
        f"the catalog has format {found}, this Onlap writes format {schema.VERSION}",
        key=path,
        hint="upgrade Onlap" if found > schema.VERSION else "open the store again",
    )


# sqlite.org/rescode.html; the lower 8 bits of an extended code are its primary one.
_SQLITE_FULL = 13
_SQLITE_PROTOCOL = 15
_REBUILD = "rebuild it from the records beside the trees: onlap check --repair"
_BY_CODE: dict[int, tuple[type[errors.OnlapError], str]] = {
    sqlite3.SQLITE_BUSY: (errors.Unavailable, "another process holds it; try again"),
    sqlite3.SQLITE_LOCKED: (errors.Unavailable, "try again"),
    _SQLITE_PROTOCOL: (errors.Unavailable, "its locks cannot be taken; try again"),
    _SQLITE_FULL: (errors.ResourceExhausted, "free some space there"),
    sqlite3.SQLITE_CORRUPT: (errors.DataLoss, _REBUILD),
    sqlite3.SQLITE_NOTADB: (errors.DataLoss, _REBUILD),
    sqlite3.SQLITE_IOERR: (errors.DataLoss, "see the kernel's log (dmesg)"),
    sqlite3.SQLITE_CANTOPEN: (errors.PermissionDenied, "check that it exists and is yours"),
    sqlite3.SQLITE_READONLY: (errors.PermissionDenied, "the filesystem or the file is read-only"),
    sqlite3.SQLITE_PERM: (errors.PermissionDenied, "check that it is yours"),
}


_OF_THE_DATABASE = frozenset(_BY_CODE)

# SQLite does not report the errno when it cannot create, open or enlarge its log and its shared memory.
_OF_ITS_FILES = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_readonly(error: BaseException | None) -> bool:
    """Whether SQLite has one of its files open for reading only."""
    return isinstance(error, sqlite3.Error) and _primary_code(error) == sqlite3.SQLITE_READONLY


def is_of_files(error: sqlite3.Error) -> bool:
    """Whether SQLite could not create or open its other files, for whatever reason."""
    return _primary_code(error) in _OF_ITS_FILES


def translated(error: sqlite3.Error, path: str) -> errors.OnlapError:
    """An error of SQLite as one of ours."""
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
