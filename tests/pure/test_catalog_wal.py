"""The write-ahead log: checkpoints under the lock alone, and a log that does not grow for ever."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.catalog import records
from onlap.catalog.background import janitor
from onlap.catalog.background.janitor import Janitor
from onlap.catalog.db import writer as module
from onlap.catalog.db.database import Database
from onlap.catalog.helper import Job
from onlap.store import Store

PATIENCE = 30.0


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none", timeout=0.3) as store:
        yield store


@pytest.fixture
def database(store: Store) -> Database:
    return store.snapshotter.catalog.database


def pragma(database: Database, name: str) -> list[object]:
    of_writer = database.write(lambda c: c.execute(f"PRAGMA {name}").fetchone()[0])
    of_reader = database.read(lambda c: c.execute(f"PRAGMA {name}").fetchone()[0])
    return [of_writer, of_reader]


def test_every_connection_is_set_up_the_same(database: Database) -> None:
    # With synchronous = NORMAL (1) a power cut takes the last acknowledged commits of a write-ahead log.
    assert pragma(database, "wal_autocheckpoint") == [0, 0]
    assert pragma(database, "journal_mode") == ["wal", "wal"]
    assert pragma(database, "synchronous") == [2, 2]


class Lock:
    """Another process's hold on catalog.lock."""

    def __init__(self, root: Path) -> None:
        self._fd = os.open(root / "catalog.lock", os.O_RDWR)

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def checkpoint(database: Database) -> None:
    database._writer.do(Job(database._writer.checkpoint))


def test_nobody_writes_without_the_lock(root: Path, store: Store) -> None:
    with Lock(root), pytest.raises(errors.Unavailable, match=r"another process has held .*catalog.lock for 0.3 s"):
        store.prepare("key")
    store.prepare("key")


def test_readers_need_no_lock(root: Path, store: Store) -> None:
    store.prepare("key")
    with Lock(root):
        assert store.stat("key").name == "key"
        assert [info.name for info in store.walk()] == ["key"]
        assert store.mounts("key")


def test_no_checkpoint_without_the_lock(root: Path, store: Store, database: Database) -> None:
    store.prepare("key")
    size = (root / "catalog.db").stat().st_size
    with Lock(root), pytest.raises(errors.Unavailable):
        checkpoint(database)
    assert (root / "catalog.db").stat().st_size == size


def test_a_checkpoint_moves_the_log_into_the_database(
    root: Path, store: Store, database: Database, tmp_path: Path
) -> None:
    def without_log() -> list[str]:
        # A copy, since only SQLite may open the file itself: a close would drop its locks.
        copy = tmp_path / "copy.db"
        subprocess.run(["cp", root / "catalog.db", copy], check=True)
        connection = sqlite3.connect(copy)
        try:
            return [row[0] for row in connection.execute("SELECT name FROM snapshots")]
        finally:
            connection.close()

    store.prepare("key")
    assert without_log() == []
    checkpoint(database)
    assert without_log() == ["key"]


@pytest.mark.parametrize("verb", ["label", "prepare", "remove"])
def test_a_checkpoint_comes_with_every_kind_of_write(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    happened = threading.Event()
    checkpoint = database._writer.checkpoint

    def seen() -> None:
        checkpoint()
        happened.set()

    monkeypatch.setattr(database._writer, "checkpoint", seen)
    monkeypatch.setattr(module, "COMMITS_TO_CHECKPOINT", 10)
    store.prepare("key")
    for number in range(11):
        if verb == "label":
            store.label("key", {"n": str(number)})
        elif verb == "prepare":
            store.prepare(f"key-{number}")
        else:
            store.prepare(f"gone-{number}")
            store.remove(f"gone-{number}")
    assert happened.wait(PATIENCE)


def test_a_checkpoint_does_not_wait_for_quiet(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = threading.Event()
    monkeypatch.setattr(database._writer, "checkpoint", happened.set)
    monkeypatch.setattr(module, "COMMITS_TO_CHECKPOINT", 10)
    monkeypatch.setattr(janitor, "_LONGEST_BURST", PATIENCE * 10)
    store.prepare("key")
    number = 0
    while not happened.is_set():
        store.label("key", {"n": str(number)})
        number += 1
        assert number < 20_000


def test_short_commands_do_not_let_the_log_grow(
    root: Path, store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMITS_TO_CHECKPOINT", 20)
    log = root / "catalog.db-wal"

    def command(number: int) -> None:
        # The store of this test stays open all the time, and so no close is the last one.
        with onlap.open(root, sync="none") as other:
            for index in range(5):
                records_of = other.snapshotter.catalog.database
                records_of.write(lambda c: records.put_setting(c, f"{number}-{index}", "1"))  # noqa: B023 - run at once

    for number in range(4):
        command(number)
    before = log.stat().st_size
    for number in range(4, 64):
        command(number)
    # 20 commits lie in the log by now, and then 320.
    assert log.stat().st_size < before * 4


def test_the_last_close_checkpoints_under_the_lock(root: Path) -> None:
    store = onlap.open(root, snapshotter="overlay", sync="none")
    store.prepare("key")
    assert (root / "catalog.db-wal").exists()
    with Lock(root):
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        assert (root / "catalog.db-wal").exists()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert not (root / "catalog.db-wal").exists()


_CLOSE = """
import fcntl, os, sys
import onlap
from onlap import errors
root = sys.argv[1]
store = onlap.open(root, snapshotter="overlay", sync="none", timeout=0.2)
store.prepare("key")
lock = os.open(root + "/catalog.lock", os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
try:
    store.close()
except errors.Unavailable:
    print("unavailable")
os.close(lock)
if sys.argv[2] == "fork":
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
elif sys.argv[2] == "use":
    try:
        store.stat("key")
    except errors.FailedPrecondition:
        pass
else:
    store.close()
    with onlap.open(root) as other:
        assert "key" in other
print("done")
"""


@pytest.mark.parametrize("then", ["fork", "use"])
def test_a_close_that_fails_blocks_nobody(root: Path, then: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CLOSE, str(root), then],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=5,
    )
    assert done.stdout.split()[-1:] == ["done"], done.stderr


# The janitor


def test_a_burst_that_does_not_end_does_not_put_the_work_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "_QUIET", 0.05)
    monkeypatch.setattr(janitor, "_LONGEST_BURST", 0.2)
    happened = threading.Event()

    def work(_: object) -> bool:
        happened.set()
        return False

    subject = Janitor(lambda: None, work)
    try:
        for _ in range(3000):
            subject.wake()
            if happened.wait(0.01):
                break
        assert happened.is_set()
    finally:
        subject.stop()


def test_work_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(janitor, "_QUIET", 0.01)
    monkeypatch.setattr(janitor, "_RETRY", 0.01)
    again = threading.Event()
    calls: list[int] = []

    def work(_: object) -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(5, "no luck")
        again.set()
        return False

    subject = Janitor(lambda: None, work)
    try:
        subject.wake()
        assert again.wait(PATIENCE)
    finally:
        subject.stop()
    assert "no luck" in caplog.text


def test_a_layer_that_cannot_be_measured_does_not_keep_the_trash(
    root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> None:
        raise OSError(24, "Too many open files")  # what a very deep tree gives

    monkeypatch.setattr("onlap.catalog.background.usages.usage", fails)
    catalog = store.snapshotter.catalog
    store.prepare("bad")
    store.commit("unmeasured", "bad")
    store.prepare("key")
    store.remove("key")
    catalog._background(lambda: False)
    assert not os.listdir(root / "trash")
