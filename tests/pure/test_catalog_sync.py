"""One syncfs for all who wait together, and none for who came while it ran."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.catalog import records
from onlap.catalog.disk import sync
from onlap.catalog.disk.sync import Syncer
from onlap.snapshots.recorded import Sync
from onlap.store import Store

PATIENCE = 30.0


class Disk:
    """A syncfs that takes as long as the test wants."""

    def __init__(self) -> None:
        self.runs: list[threading.Event] = []
        self.failures: dict[int, OSError] = {}
        self._changed = threading.Condition()

    def __call__(self, _: int) -> None:
        with self._changed:
            number = len(self.runs)
            finish = threading.Event()
            self.runs.append(finish)
            self._changed.notify_all()
        assert finish.wait(PATIENCE)
        if number in self.failures:
            raise self.failures[number]

    def await_run(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.runs) >= count, PATIENCE)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(sync, "syncfs", disk)
    return disk


@pytest.fixture
def syncer(tmp_path: Path) -> Iterator[Syncer]:
    syncer = Syncer(str(tmp_path))
    yield syncer
    syncer.close()


class Caller(threading.Thread):
    def __init__(self, syncer: Syncer) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._syncer = syncer
        self.start()

    def run(self) -> None:
        try:
            self._syncer.sync()
        except OSError as error:
            self.error = error

    def done(self) -> bool:
        self.join(PATIENCE)
        return not self.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(syncer: Syncer, count: int) -> None:
    wait_until(lambda: syncer._helper.jobs.qsize() == count)


def test_who_comes_while_one_runs_gets_the_next_and_shares_it(disk: Disk, syncer: Syncer) -> None:
    first = Caller(syncer)
    disk.await_run(1)
    late = [Caller(syncer) for _ in range(3)]
    waiting(syncer, 3)
    disk.runs[0].set()
    assert first.done()
    disk.await_run(2)
    # Their pages may have been written after the first had passed them.
    assert all(caller.is_alive() for caller in late)
    later = Caller(syncer)
    waiting(syncer, 1)  # the one who must not share the second
    disk.runs[1].set()
    assert all(caller.done() for caller in late)
    disk.await_run(3)
    assert later.is_alive()
    disk.runs[2].set()
    assert later.done()
    assert len(disk.runs) == 3


def test_a_failure_is_everybodys_who_shared_it_and_nobody_elses(disk: Disk, syncer: Syncer) -> None:
    disk.failures[1] = OSError(28, "No space left on device")
    first = Caller(syncer)
    disk.await_run(1)
    sharing = [Caller(syncer) for _ in range(3)]
    waiting(syncer, 3)
    disk.runs[0].set()
    disk.await_run(2)
    disk.runs[1].set()
    assert first.done()
    assert all(caller.done() for caller in sharing)
    assert first.error is None
    assert [caller.error and caller.error.errno for caller in sharing] == [28, 28, 28]
    after = Caller(syncer)
    disk.await_run(3)
    disk.runs[2].set()
    assert after.done()
    assert after.error is None


def fails(_: int) -> None:
    raise OSError(5, "Input/output error")


def write(store: Store, key: str) -> None:
    Path(store.prepare(key)[0].source, "file").touch()


def test_a_layer_whose_sync_failed_is_never_committed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says once that pages are lost, and they count as clean then: a retry succeeds without them."""
    with onlap.open(root, snapshotter="overlay", sync="layer") as store:
        write(store, "key")
        write(store, "bystander")  # whose file it was nobody knows
        store.prepare("empty")
        monkeypatch.setattr(sync, "syncfs", fails)
        with pytest.raises(errors.DataLoss, match="write the layer to the disk"):
            store.commit("name", "key")
        monkeypatch.undo()
        for _ in range(2):
            with pytest.raises(errors.DataLoss, match="may lack content"):
                store.commit("name", "key")
        assert store.stat("key").kind == "active"
        store.commit("nothing", "empty")
        # Written anew it can be trusted.
        store.remove("key")
        write(store, "key")
        store.commit("name", "key")
    for choice in ("layer", "none"):  # another process
        with onlap.open(root, sync=choice) as store, pytest.raises(errors.DataLoss, match="may lack content"):
            store.commit("other", "bystander")


def test_a_failed_sync_is_remembered_until_it_can_be_noted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with onlap.open(root, snapshotter="overlay", sync="layer") as store:
        write(store, "key")
        monkeypatch.setattr(sync, "syncfs", fails)

        def full(_: object) -> None:
            raise errors.ResourceExhausted("no space")

        monkeypatch.setattr(records, "note_loss", full)
        with pytest.raises(errors.DataLoss, match="write the layer to the disk"):
            store.commit("name", "key")
        monkeypatch.setattr(sync, "syncfs", lambda _: None)
        with pytest.raises(errors.ResourceExhausted):
            store.commit("name", "key")
        monkeypatch.undo()
        with pytest.raises(errors.DataLoss, match="may lack content"):
            store.commit("name", "key")


def test_who_waits_for_the_next_run_does_not_hear_of_an_older_or_a_newer_one(disk: Disk, syncer: Syncer) -> None:
    disk.failures[1] = OSError(5, "Input/output error")
    first = Caller(syncer)
    disk.await_run(1)
    second = Caller(syncer)
    waiting(syncer, 1)
    disk.runs[0].set()
    disk.await_run(2)
    third = Caller(syncer)
    waiting(syncer, 1)
    disk.runs[1].set()
    disk.await_run(3)
    disk.runs[2].set()
    for caller in (first, second, third):
        assert caller.done()
    assert [caller.error and caller.error.errno for caller in (first, second, third)] == [None, 5, None]
    assert syncer.failures == 1


def test_what_was_written_before_a_failure_is_not_synced_by_a_later_run(
    syncer: Syncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = syncer.failures  # somebody begins to write
    monkeypatch.setattr(sync, "syncfs", fails)
    with pytest.raises(OSError, match="Input/output error"):
        syncer.sync()
    monkeypatch.setattr(sync, "syncfs", lambda _: None)
    syncer.sync()
    with pytest.raises(OSError, match="may be lost"):
        syncer.sync(since)


@pytest.mark.parametrize("choice, runs", [("layer", 1), ("none", 0), (None, 1)])
def test_what_is_synced(root: Path, monkeypatch: pytest.MonkeyPatch, choice: Sync | None, runs: int) -> None:
    calls: list[int] = []
    monkeypatch.setattr(sync, "syncfs", calls.append)
    with onlap.open(root, snapshotter="overlay", sync=choice) as store:
        plan = store.prepare("key")[0]
        Path(plan.source, "file").touch()
        store.commit("name", "key")
    assert len(calls) == runs


def test_another_word_for_sync_is_refused(root: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match='"layer" or "none"'):
        onlap.open(root, snapshotter="overlay", sync="always")  # type: ignore[arg-type]


# Walks


def test_a_walk_holds_no_transaction_while_it_calls_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PAGE", 3)
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        for number in range(10):
            store.prepare(f"key-{number}")
        database = store.snapshotter.catalog.database
        seen = []
        for info in store.walk():
            seen.append(info.name)
            # A reader in a transaction would keep the log from being emptied, and answer busy = 1.
            database.write(lambda c: records.put_setting(c, "x", "y"))
            busy, *_ = database.read(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
            assert busy == 0
            store.remove(info.name)
        assert seen == [f"key-{number}" for number in range(10)]
        assert list(store.walk()) == []
