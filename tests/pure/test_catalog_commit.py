"""Group commit: each operation answers for itself, a failed COMMIT for its batch, and no interrupt stops the rest."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from sqlite3 import Connection

import pytest

import onlap
from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.db.database import Database
from onlap.store import Store

PATIENCE = 30.0


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        yield store


@pytest.fixture
def database(store: Store) -> Database:
    return store.snapshotter.catalog.database


def together(database: Database, *operations: Callable[[Connection], object]) -> list[object]:
    """Run the operations in one batch: they queue up behind one that waits for them. Results, or what was raised."""
    inside, go = threading.Event(), threading.Event()
    outcomes: list[object] = [None] * len(operations)

    def hold(_: Connection) -> None:
        inside.set()
        assert go.wait(PATIENCE)

    def run(index: int) -> None:
        try:
            outcomes[index] = database.write(operations[index])
        except Exception as error:  # noqa: BLE001 - the outcome, to be looked at
            outcomes[index] = error

    first = threading.Thread(target=database.write, args=(hold,))
    first.start()
    assert inside.wait(PATIENCE)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(operations))]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda count=count: database._writer._helper.jobs.qsize() == count)  # type: ignore[misc]
    go.set()
    for thread in (first, *threads):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return outcomes


def wait_until(condition: Callable[[], bool]) -> None:
    """For what has no event to wait for."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def put(key: str) -> Callable[[Connection], str]:
    def operation(connection: Connection) -> str:
        records.put_setting(connection, key, "1")
        return key

    return operation


def settings(database: Database) -> set[str]:
    return {row[0] for row in database.read(lambda c: c.execute("SELECT key FROM settings").fetchall())}


def test_waiting_operations_share_one_commit(database: Database) -> None:
    statements: list[str] = []
    database.write(lambda c: c.set_trace_callback(statements.append))
    del statements[:]
    assert together(database, *map(put, "abcd")) == list("abcd")
    database.write(lambda c: c.set_trace_callback(None))
    # The one that held the others back; those; and the last, which took the trace away.
    assert statements.count("COMMIT") == 2
    assert statements.count("BEGIN IMMEDIATE") == 3
    assert {*"abcd"} <= settings(database)


def test_an_operation_that_fails_takes_none_of_its_batch_along(database: Database) -> None:
    def fails(connection: Connection) -> None:
        records.put_setting(connection, "half", "1")
        raise errors.NotFound("not here")

    one, failure, two = together(database, put("one"), fails, put("two"))
    assert isinstance(failure, errors.NotFound)
    assert (one, two) == ("one", "two")
    assert {"one", "two"} <= settings(database)
    assert "half" not in settings(database)


def test_an_operation_that_fails_alone_leaves_nothing(database: Database) -> None:
    def fails(connection: Connection) -> None:
        records.put_setting(connection, "half", "1")
        raise errors.NotFound("not here")

    with pytest.raises(errors.NotFound):
        database.write(fails)
    database.write(put("after"))
    assert "half" not in settings(database)
    assert "after" in settings(database)


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param(lambda c: pins.pin(c, "me"), id="constraint"),
        pytest.param(lambda c: records.put_setting(c, "key", object()), id="binding"),  # type: ignore[arg-type]
    ],
)
def test_what_sqlite_refuses_of_one_operation_fails_that_one_alone(
    database: Database, fails: Callable[[Connection], object]
) -> None:
    one, failure, two = together(database, put("one"), fails, put("two"))
    assert isinstance(failure, Exception)
    assert (one, two) == ("one", "two")
    assert {"one", "two"} <= settings(database)


def test_a_failed_commit_fails_its_batch_and_the_next_works(database: Database) -> None:
    def poison(connection: Connection) -> None:
        # An authorizer that says no to COMMIT: what makes it fail on a healthy disk.
        connection.set_authorizer(
            lambda action, what, *_: (
                sqlite3.SQLITE_DENY if (action, what) == (sqlite3.SQLITE_TRANSACTION, "COMMIT") else sqlite3.SQLITE_OK
            )
        )

    outcomes = together(database, put("one"), poison, put("two"))
    assert all(isinstance(outcome, errors.OnlapError) for outcome in outcomes), outcomes
    assert not {"one", "two"} & settings(database)
    assert database.write(put("next")) == "next"
    assert "next" in settings(database)


def test_many_threads_lose_nothing(store: Store) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(16)

    def cycles(number: int) -> None:
        try:
            start.wait(PATIENCE)
            for index in range(12):
                key = f"{number}-{index}"
                store.prepare(key)
                store.label(key, {"n": str(index)})
                store.commit(f"done-{key}", key, {"kept": "yes"})
        except BaseException as error:  # noqa: BLE001 - told to the thread that asserts
            failures.append(error)

    threads = [threading.Thread(target=cycles, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures
    infos = list(store.walk())
    assert {info.name for info in infos} == {f"done-{n}-{i}" for n in range(16) for i in range(12)}
    assert all(info.labels == {"kept": "yes"} for info in infos)
    identifiers = [record.id for record in store.snapshotter.catalog.walk(None)]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda store: "nothing" in store, id="stat"),
        pytest.param(lambda store: store.mounts("nothing"), id="mounts"),
        pytest.param(lambda store: store.prepare("key", "nothing"), id="prepare"),
        pytest.param(lambda store: store.commit("name", "nothing"), id="commit"),
    ],
)
def test_a_query_that_finds_nothing_keeps_its_connection(store: Store, call: Callable[[Store], object]) -> None:
    # Dropped, it is closed by the garbage collector: a last close checkpoints, and that without the lock; and what the
    # traceback of the error keeps alive would cross a fork.
    database = store.snapshotter.catalog.database
    store.prepare("something")
    before = list(database._readers)
    assert before
    try:
        call(store)
    except errors.NotFound:
        pass
    assert database._readers == before


def test_a_closed_store_says_so(root: Path) -> None:
    store = onlap.open(root, snapshotter="overlay")
    store.close()
    store.close()
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        store.stat("key")
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        store.prepare("key")


# Interrupts: in a process of its own, since KeyboardInterrupt is raised in the main thread alone, and since a defect
# here is a process that hangs.

_COMMON = """
import fcntl, os, signal, sys, threading, time
import onlap
from onlap.catalog import records
root = sys.argv[1]
store = onlap.open(root, snapshotter="overlay", sync="none", timeout=5)
database = store.snapshotter.catalog.database
main = threading.main_thread().ident

def put(key):
    return lambda c: records.put_setting(c, key, "1")

def wait_until(condition):
    while not condition():
        time.sleep(0.001)
"""

_WAITER = (
    _COMMON
    + """
inside, go = threading.Event(), threading.Event()
def hold(c):
    inside.set()
    go.wait()
leader = threading.Thread(target=database.write, args=(hold,))
leader.start()
inside.wait()
def interrupt():
    wait_until(lambda: database._writer._helper.jobs.qsize() == 1)
    signal.pthread_kill(main, signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    database.write(put("interrupted"))
except KeyboardInterrupt:
    print("interrupted")
others = [threading.Thread(target=database.write, args=(put(f"other-{n}"),)) for n in range(3)]
for other in others:
    other.start()
go.set()
for thread in (leader, *others):
    thread.join()
database.write(put("after"))
store.close()
print("done")
"""
)

_LEADER = (
    _COMMON
    + """
def hold(c):
    signal.pthread_kill(main, signal.SIGINT)
    time.sleep(0.05)
    put("interrupted")(c)
try:
    database.write(hold)
except KeyboardInterrupt:
    # It was being done: who cleans up behind it is to find it done.
    assert database.read(lambda c: records.setting(c, "interrupted"))
    print("interrupted")
database.write(put("after"))
store.close()
print("done")
"""
)

_QUEUED = (
    _COMMON
    + """
other = os.open(root + "/catalog.lock", os.O_RDWR)
fcntl.flock(other, fcntl.LOCK_EX)
def interrupt():
    wait_until(lambda: database._writer._queues)
    signal.pthread_kill(main, signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    database.write(put("interrupted"))
except KeyboardInterrupt:
    print("interrupted")
os.close(other)
database.write(put("after"))
assert not database.read(lambda c: records.setting(c, "interrupted"))  # given up is given up
store.close()
print("done")
"""
)

_STORM = (
    _COMMON
    + """
import random
random.seed(7)
stop = threading.Event()
counts = [0] * 4
def work(n):
    while not stop.is_set():
        database.write(put(f"{n}-{counts[n]}"))
        counts[n] += 1
threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
for thread in threads:
    thread.start()
armed = threading.Event()
def shoot():
    for _ in range(150):
        armed.wait()
        armed.clear()
        time.sleep(random.random() * 0.003)
        signal.pthread_kill(main, signal.SIGINT)
threading.Thread(target=shoot, daemon=True).start()
seen = acknowledged = 0
while seen < 150:
    try:
        armed.set()
        while True:
            database.write(put(f"main-{acknowledged}"))
            acknowledged += 1
    except KeyboardInterrupt:
        seen += 1
print("interrupted")
stop.set()
for thread in threads:
    thread.join()
found = {r[0] for r in database.read(lambda c: c.execute("SELECT key FROM settings").fetchall())}
expected = {f"{n}-{i}" for n in range(4) for i in range(counts[n])} | {f"main-{i}" for i in range(acknowledged)}
assert expected <= found, expected - found
store.close()
print("done")
"""
)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(_WAITER, id="who waits for the leader"),
        pytest.param(_LEADER, id="the leader in an operation"),
        pytest.param(_QUEUED, id="the leader in the queue for the lock"),
        pytest.param(_STORM, id="a hundred at any moment", marks=pytest.mark.long),
    ],
)
def test_an_interrupt_leaves_no_deadlock(root: Path, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=8,
    )
    assert done.stdout.split() == ["interrupted", "done"], done.stderr
    assert done.returncode == 0, done.stderr
