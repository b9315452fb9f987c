"""Numbers that are never given twice, pins, owners, and the staging directories of a process."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Connection

import pytest

import onlap
from onlap import errors
from onlap.catalog import pins, records
from onlap.catalog.disk.staging import Staging
from onlap.locks import Flock
from onlap.store import SnapshotterKind, Store, open_snapshotter

PATIENCE = 30.0


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        store.snapshotter.catalog._janitor.stop()
        yield store


def number(store: Store, key: str) -> int:
    return store.snapshotter.record(key).id


# Numbers


def test_a_removed_snapshots_number_is_not_given_again(root: Path, store: Store) -> None:
    given = set()
    for index in range(3):
        store.prepare(f"key-{index}")
        given.add(number(store, f"key-{index}"))
        store.remove(f"key-{index}")
        store.cleanup()
    store.close()
    with onlap.open(root) as store:
        store.prepare("key")
        assert number(store, "key") > max(given)


def test_a_number_whose_transaction_failed_is_not_given_while_its_tree_is_there(store: Store) -> None:
    catalog = store.snapshotter.catalog
    staged = catalog.staging.new()
    os.mkdir(f"{staged}/fs")

    class Failure(Exception):
        pass

    # As create() does it; then the transaction fails with the tree renamed already.
    def operation(connection: Connection) -> None:
        identifier = records.next_id(connection)
        records.insert(connection, identifier, "", "lost", None, "active", {})
        os.rename(staged, catalog.layout.snapshot(identifier))
        raise Failure

    with pytest.raises(Failure):
        catalog.database.write(operation)
    orphan = os.listdir(catalog.layout.snapshots)
    assert orphan == ["1"]
    assert list(store.walk()) == []
    # AUTOINCREMENT alone would give 1 again.
    store.prepare("key")
    assert number(store, "key") == 2
    assert os.listdir(catalog.layout.trash) == ["1"]
    store.cleanup()
    assert os.listdir(catalog.layout.snapshots) == ["2"]


@pytest.mark.parametrize("where", ["snapshots", "trash"])
def test_a_number_that_a_tree_on_the_disk_has_is_not_given(root: Path, where: str) -> None:
    onlap.open(root, snapshotter="overlay").close()
    for name in ("1", "2", "4"):
        (root / where / name / "fs").mkdir(parents=True)
    with onlap.open(root) as store:
        store.prepare("key")
        store.prepare("another")
        assert (number(store, "key"), number(store, "another")) == (3, 5)


def test_a_tree_in_the_trash_under_the_same_number_is_no_obstacle(store: Store) -> None:
    store.prepare("key")
    identifier = number(store, "key")
    layout = store.snapshotter.catalog.layout
    os.makedirs(f"{layout.trash}/{identifier}/fs")
    store.remove("key")
    assert sorted(os.listdir(layout.trash)) == [str(identifier), f"{identifier}.1"]
    store.cleanup()
    assert os.listdir(layout.trash) == []


# Pins


def pinned(store: Store, key: str) -> None:
    identifier = number(store, key)
    store.snapshotter.catalog.database.write(lambda c: pins.pin(c, "image debian:13", snapshot=identifier))


def expires(store: Store, seconds: float) -> None:
    """Let all pins expire by the clock, as those of older releases do."""
    at = time.time_ns() + int(seconds * 1e9)
    store.snapshotter.catalog.database.write(lambda c: c.execute("UPDATE pins SET expires_ns = ?", (at,)))


def test_a_pinned_snapshot_is_kept_and_the_owner_of_the_pin_is_named(store: Store) -> None:
    store.prepare("key")
    pinned(store, "key")
    with pytest.raises(errors.FailedPrecondition, match="kept by image debian:13"):
        store.remove("key")
    assert "key" in store
    identifier = number(store, "key")
    store.snapshotter.catalog.database.write(lambda c: pins.unpin(c, "image debian:13", snapshot=identifier))
    store.remove("key")


def test_a_pin_that_expired_keeps_nothing(store: Store) -> None:
    store.prepare("key")
    pinned(store, "key")
    expires(store, 3600)
    with pytest.raises(errors.FailedPrecondition, match="kept by"):
        store.remove("key")
    expires(store, -1)
    store.remove("key")


def test_a_pin_that_was_set_while_the_clock_was_far_ahead_keeps_nothing(store: Store) -> None:
    store.prepare("key")
    pinned(store, "key")
    expires(store, 400 * 24 * 3600)
    store.remove("key")


def test_what_a_dead_process_left_in_the_trash_is_no_number_of_a_snapshot(root: Path) -> None:
    with onlap.open(root, snapshotter="native") as store:
        (root / "trash" / "4711-0123abcd").mkdir()
        (root / "trash" / "1").mkdir()
        with onlap.open(root) as another:
            another.prepare("key")
            assert number(another, "key") == 2
        store.remove("key")


def test_a_pin_that_is_set_again_does_not_expire(store: Store) -> None:
    store.prepare("key")
    pinned(store, "key")
    expires(store, -1)
    pinned(store, "key")
    with pytest.raises(errors.FailedPrecondition, match="kept by"):
        store.remove("key")


def test_a_pin_outlives_the_commit(store: Store) -> None:
    store.prepare("key")
    pinned(store, "key")
    store.commit("name", "key")
    with pytest.raises(errors.FailedPrecondition, match="kept by"):
        store.remove("name")


def test_a_snapshot_that_others_stand_on_is_kept_and_they_are_named(store: Store) -> None:
    store.prepare("key")
    store.commit("base", "key")
    store.view("view", "base")
    with pytest.raises(errors.FailedPrecondition, match="view is based on it"):
        store.remove("base")
    store.remove("view")
    store.remove("base")


# Owners


def test_owners_do_not_see_each_others_snapshots(root: Path, store: Store) -> None:
    with open_snapshotter(root, owner="server") as other:
        store.prepare("key", labels={"of": "library"})
        other.prepare("key", labels={"of": "server"})
        assert [info.labels for info in store.walk()] == [{"of": "library"}]
        assert [info.labels for info in other.walk()] == [{"of": "server"}]
        other.commit("base", "key")
        with pytest.raises(errors.NotFound):
            store.prepare("mine", "base")
        store.remove("key")
        assert [info.name for info in other.walk()] == ["base"]
        other.cleanup()
        store.cleanup()
        assert other.stat("base").kind == "committed"


# Staging


def test_threads_of_one_process_share_one_directory(root: Path) -> None:
    onlap.open(root, snapshotter="overlay").close()
    subject = Staging(f"{root}/staging")
    subject.discard(subject.new())
    start = threading.Barrier(8)
    paths: list[str] = []

    def build() -> None:
        start.wait(PATIENCE)
        paths.append(subject.new())

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(set(paths)) == 8
    assert len(os.listdir(root / "staging")) == 1
    for path in paths:
        subject.discard(path)
    subject.close()
    assert os.listdir(root / "staging") == []


def test_threads_that_come_first_at_once_share_one_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onlap.open(root, snapshotter="overlay").close()
    subject = Staging(f"{root}/staging")
    both = threading.Barrier(2)
    name = secrets.token_hex

    def meet(length: int) -> str:
        try:
            both.wait(1)
        except threading.BrokenBarrierError:
            pass  # one at a time, as it should be
        return name(length)

    monkeypatch.setattr(secrets, "token_hex", meet)
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(subject.new())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    monkeypatch.undo()
    for path in paths:
        subject.discard(path)
    subject.close()
    assert os.listdir(root / "staging") == []


@pytest.mark.parametrize("moment", ["before it is open", "before it is locked"])
def test_a_cleanup_between_mkdir_and_lock_is_survived(root: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        subject = store.snapshotter.catalog.staging
        times = iter([True])
        name = "__init__" if moment == "before it is open" else "lock"
        real = getattr(Flock, name)

        def after_a_cleanup(self: Flock, *arguments: object) -> object:
            if next(times, False):
                monkeypatch.setattr(Flock, name, real)
                os.rmdir(next((root / "staging").iterdir()))
            return real(self, *arguments)

        monkeypatch.setattr(Flock, name, after_a_cleanup)
        path = subject.new()
        assert os.path.isdir(path)
        subject.discard(path)
        store.prepare("key")
        assert os.path.isdir(store.snapshotter.catalog.layout.tree(number(store, "key")))


def test_a_failed_prepare_leaves_nothing_in_staging(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.prepare("key")

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store.snapshotter, "_inherit", fails)
    with pytest.raises(errors.DataLoss):
        store.prepare("other")
    monkeypatch.undo()
    with pytest.raises(errors.AlreadyExists):
        store.prepare("key")
    own = store.snapshotter.catalog.staging._own
    assert own is not None
    assert os.listdir(own) == []


@pytest.mark.parametrize("kind", ["overlay", "native"])
def test_a_key_removed_between_two_transactions_poisons_no_chain(root: Path, kind: SnapshotterKind) -> None:
    """The chain is kept by the parent: what was found for a key that had gone must not be taken for its parent's."""
    with onlap.open(root, snapshotter=kind, sync="none") as store:
        for number, parent in enumerate((None, "name-0", "name-1")):
            store.prepare(f"key-{number}", parent)
            store.commit(f"name-{number}", f"key-{number}")
        store.prepare("key", "name-2")
    with onlap.open(root, sync="none") as store, onlap.open(root, sync="none") as other:
        snapshotter = store.snapshotter
        record = snapshotter.record("key")
        other.remove("key")
        assert snapshotter.ancestors(record) == (3, 2, 1)
        assert snapshotter.ancestors(snapshotter.record("name-2")) == (2, 1)
        store.prepare("next", "name-2")
        assert snapshotter.ancestors(snapshotter.record("next")) == (3, 2, 1)
        gone = snapshotter.record("next")
        for key in ("next", "name-2"):
            other.remove(key)
    with onlap.open(root, sync="none") as store:
        for _ in range(2):
            with pytest.raises(errors.NotFound):  # both have gone: no chain, rather than an empty one
                store.snapshotter.ancestors(gone)
        assert len(store.snapshotter.ancestors(store.snapshotter.record("name-1"))) == 1
