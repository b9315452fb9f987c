"""SQLite under many threads, many processes and forks: group commit behind one lock.

Facts that force this (sqlite.org/wal.html, sqlite.org/howtocorrupt.html):

- SQLite 3.7.0 to 3.51.2 can corrupt a write-ahead log when one process writes while another checkpoints
  ("WAL-reset bug"). So all writes and all checkpoints, also the one of the last close, run under ``catalog.lock``.
- No connection may cross a fork: a child that opens a new one while the parent holds one loses acknowledged commits.
  So all are closed before a fork and opened again after it, on both sides.
- Closing *any* descriptor of the file drops the process's POSIX locks on it. So only SQLite opens it.
"""

from __future__ import annotations

import atexit
import os
import sqlite3
import sys
import time
import weakref
from collections.abc import Callable
from sqlite3 import Connection
from typing import TYPE_CHECKING, TypeVar

from onlap import errors
from onlap.catalog.db import readonly, schema
from onlap.catalog.db.space import check_space
from onlap.catalog.db.writer import (
    COMMITS_TO_GROW,
    POLL,
    Operation,
    Writer,
    closed,
    forks,
    is_of_files,
    is_readonly,
    other_version,
    translated,
)
from onlap.catalog.helper import Job
from onlap.catalog.log import warn
from onlap.syscalls.files import exists

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Connection", "Database"]

T = TypeVar("T")

# A commit appends about six pages of 4 KiB to the write-ahead log. In a growing file, its fdatasync has to write the
# new size too, and takes twice as long (467 us against 220 us). So the log is enlarged once, and emptied by a
# checkpoint before it would outgrow that size; SQLite then reuses it from the start.
LOG_SIZE = 8 << 20


class Database:
    """The catalog's connections: any number of readers, and one writer that commits for all waiting callers.

    Args:
        path: catalog.db.
        lock_path: catalog.lock.
        timeout: how many seconds to wait for other processes.
        upkeep_due: called by a thread that has just written, when :meth:`upkeep` has something to do; never fails.
        after_fork: called in a forked child, before it can use the database.
    """

    def __init__(
        self,
        path: str,
        lock_path: str,
        timeout: float,
        upkeep_due: Callable[[], None],
        after_fork: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._lock_path = lock_path
        self._timeout = timeout
        self._upkeep_due = upkeep_due
        self._after_fork = after_fork
        self._fresh()
        _databases.add(self)

    def _fresh(self) -> None:
        self._closed = False
        self._grown = False
        self._readers: list[Connection] = []
        self._writer = Writer(self._path, self._lock_path, self._timeout)
        # For one that is dropped without being closed. Not __del__, which also runs for closed ones, at any moment, and
        # in which Python drops what a signal handler raises.
        self._forgotten = weakref.finalize(self, self._writer.close, self._readers, lambda: False)
        self._forgotten.atexit = False  # see _close_all
        # The last step: a child in which an interrupt ended this halfway still has its parent's pid here.
        self._pid = os.getpid()

    def version(self) -> int:
        """The format of the tables, 0 if there are none yet. This waits for nobody: it takes no lock.

        Raises:
            OnlapError: an error of SQLite.
        """
        return self.read(schema.version) if exists(self._path) else 0

    def set_up(self, check_migration: Callable[[int], None]) -> None:
        """Create the tables, or migrate them to our format.

        Args:
            check_migration: raises if a catalog of the given format cannot be migrated now; a new one has format 0.

        Raises:
            FailedPrecondition: a newer Onlap wrote it, or an older one and it cannot be written.
            OnlapError: what ``check_migration`` raises, or an error of SQLite.
        """
        found = self.version()
        self._check()
        try:
            self._writer.do(Job(lambda: self._migrate(check_migration)))
        except errors.OnlapError as error:
            if 0 < found < schema.VERSION and os.statvfs(self._path).f_flag & os.ST_RDONLY:
                raise errors.FailedPrecondition(
                    f"the catalog has format {found}, and its filesystem is read-only: "
                    f"it cannot be migrated to format {schema.VERSION}, which this Onlap reads",
                    key=self._path,
                    hint="open the root once where it can be written, or with the Onlap that wrote it",
                ) from error
            if not is_readonly(error.__cause__):
                raise
            self._close_connections()
            self._writer.do(Job(lambda: self._migrate(check_migration)))

    def _migrate(self, check_migration: Callable[[int], None]) -> None:
        connection = self._writer.connect()
        try:
            found = schema.version(connection)
            if found > schema.VERSION:
                raise other_version(found, self._path)
            if found < schema.VERSION:
                check_migration(found)
                connection.execute("BEGIN IMMEDIATE")
                schema.migrate(connection, found)
                connection.execute("COMMIT")
        finally:
            self._writer.close_now(connection)

    # Reading and writing

    def read(self, query: Callable[[Connection], T]) -> T:
        """Run ``query`` on its own connection; its statements may see different states, unless it begins a transaction.

        Raises:
            OnlapError: an error of SQLite, or one that ``query`` raises.
        """
        while True:
            self._check()
            try:
                return self._query(query)
            except _ForkInProgress:
                time.sleep(POLL)
            except sqlite3.Error as error:
                if not is_of_files(error):
                    raise translated(error, self._path) from error
                return self._read_readonly(query, error)

    def _query(self, query: Callable[[Connection], T]) -> T:
        # Closing the connections waits for the threads whose stacks show this function (_is_any_reading): an interrupt
        # could leave a count of them wrong. A thread that enters after that check finds one of these set.
        if self._closed or forks.lock.locked():
            raise _ForkInProgress
        check_space(self._path)
        connection = self._readers.pop() if self._readers else self._writer.connect()
        try:
            result = query(connection)
        except errors.OnlapError:
            self._readers.append(connection)
            raise
        except BaseException:
            self._writer.discard(connection)
            raise
        self._readers.append(connection)
        return result

    def _read_readonly(self, query: Callable[[Connection], T], error: sqlite3.Error) -> T:
        """Read without the files that SQLite could not create; raises ``error``, translated, if that fails too."""

        def read() -> T:
            if any(d._writer.open for d in list(_databases) if (d._path, d._pid) == (self._path, self._pid)):
                # Closing the file would drop the POSIX locks of the other connections on it.
                raise _Unreadable
            try:
                return readonly.read(self._path, query)
            except (sqlite3.Error, OSError) as failure:
                raise _Unreadable from failure

        try:
            return self._writer.do(Job(read))
        except _Unreadable:
            raise translated(error, self._path) from error

    def write(self, operation: Callable[[Connection], T]) -> T:
        """Run ``operation`` in a transaction and return when it is durable.

        It runs in another thread, possibly in one transaction with others, and must be quick: every process waits.

        Raises:
            Unavailable: another process held the lock too long.
            OnlapError: what the operation raises, or an error of SQLite; its changes are rolled back.
        """
        self._check()
        job = Operation(operation)
        try:
            result = self._writer.do(job)
        except errors.OnlapError:
            if not job.readonly:
                raise
            self._close_connections()
            result = self._writer.do(Operation(operation))
        if self._writer.upkeep_due:
            self._writer.upkeep_due = False
            self._upkeep_due()
        return result

    def _close_connections(self) -> None:
        # SQLite opens a file for reading where it cannot for writing, perhaps only at that moment (EMFILE), and keeps
        # it so for as long as any connection of the process is open.
        self._writer.do(Job(lambda: self._writer.close_all(self._readers, _is_any_reading)))

    def upkeep(self) -> None:
        """Enlarge the write-ahead log once, and empty it after a number of commits.

        A failed fdatasync loses no commit here: each commit has synced its part of the log, and a checkpoint empties
        the log only after the database is on the disk.

        Raises:
            OnlapError: an error of SQLite or the filesystem.
        """
        self._check()
        if self._writer.commits >= COMMITS_TO_GROW and not self._grown:
            self._grow_log()
        with errors.translated("empty the catalog's log", key=self._path):
            self._writer.do(Job(self._writer.checkpoint_if_due))

    def _grow_log(self) -> None:
        self._grown = True

        def grow() -> None:
            size = os.fstat(fd).st_size
            # Written, not only allocated: writing into an unwritten extent changes metadata as well.
            os.pwrite(fd, bytes(max(0, LOG_SIZE - size)), size)

        with errors.translated("enlarge the catalog's log", key=self._path):
            try:
                # Not the database itself, whose POSIX locks a close would drop; the log has none. SQLite ignores what
                # follows the log's last frame (sqlite.org/fileformat2.html, "The Write-Ahead Log").
                fd = os.open(self._path + "-wal", os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            try:
                self._writer.do(Job(grow))
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close every connection; later calls fail."""
        if self._writer.shut or self._pid != os.getpid():
            return
        self._closed = True
        self._forgotten.detach()
        for _ in range(2):  # a moment ago, the kernel may have had no memory for the lock
            job = self._writer.close(self._readers, _is_any_reading)
            if not job.wait(self._writer.timeout):
                self._writer.leak()  # another process holds the lock
                return
            if job.error is None:
                return
        self._writer.leak()
        warn(f"cannot close {self._path}: {job.error}")

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise errors.FailedPrecondition(
                "this process was forked with SQLite connections open, behind Python's back or by an interrupted fork",
                key=self._path,
                hint="fork with os.fork or multiprocessing, or open the store in the new process",
            )
        if self._closed:
            raise closed(self._path)


class _Unreadable(Exception):
    """The catalog cannot be read without SQLite's other files either."""


class _ForkInProgress(Exception):
    """A fork is in progress."""


def _is_any_reading() -> bool:
    """Whether a thread is inside :meth:`Database._query`, of any database."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code is Database._query.__code__:
                return True
            frame = frame.f_back
    return False


# Forks

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
# Those whose connections are all closed, so that a child can use them.
_frozen: list[Database] = []


def _before_fork() -> None:
    try:
        _freeze_all()
    except BaseException:
        # A signal, whose exception Python prints before it forks all the same.
        _freeze_all()
        raise


def _freeze_all() -> None:
    # A second attempt counts as another fork: the threads wait for the end of the fork whose number they have.
    forks.number += 1
    _frozen.clear()
    ours = [database for database in list(_databases) if database._pid == os.getpid() and not database._closed]
    jobs = [(database, database._writer.freeze(database._readers, _is_any_reading)) for database in ours]
    for database, job in jobs:
        if not job.wait(database._writer.timeout) and not job.give_up():
            job.wait()
        if job.finished and job.error is None and job.result:
            _frozen.append(database)


def _after_fork_in_child() -> None:
    for database in list(_databases):
        database._forgotten.detach()
        if database in _frozen:
            database._after_fork()
            database._fresh()
        else:
            database._writer.leak()
    _frozen.clear()


def _close_all() -> None:
    # A connection that the interpreter closes at its end would checkpoint without the lock.
    for database in list(_databases):
        database.close()


atexit.register(_close_all)
os.register_at_fork(before=_before_fork, after_in_parent=_frozen.clear, after_in_child=_after_fork_in_child)
# Hooks before a fork run in the reverse order of their registration, so this one is first. One fork at a time.
os.register_at_fork(before=forks.lock.acquire, after_in_parent=forks.lock.release, after_in_child=forks.lock.release)
