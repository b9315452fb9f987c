"""What does not depend on how many snapshots there are: calls, and SQLite's steps, are counted with few and many."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.catalog import records
from onlap.catalog.background import sidecars
from onlap.catalog.catalog import Catalog, New
from onlap.catalog.db.database import Connection
from onlap.catalog.records import Record
from onlap.store import Store
from onlap.workspaces.workspace import Workspace

FEW, MANY = 20, 220

# Both counts vary from run to run: a cache is filled, a list grows, a log is checked. To read a row takes
# several steps, so that what reads each of them cannot stay below this.
SLACK = MANY - FEW


def fill(root: Path, count: int) -> None:
    """Make committed snapshots, of which each has a label, all settled."""
    with onlap.open(root, snapshotter="native", sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        staged = [catalog.staging.new() for _ in range(count)]
        for each in staged:
            os.makedirs(f"{each}/fs")
            os.mkdir(f"{each}/about")

        def operation(connection: Connection) -> list[Record]:
            made = [
                catalog.insert(connection, "", New(f"key-{number}", "active", None, {"n": "1"}, each))
                for number, each in enumerate(staged)
            ]
            for record in made:
                records.make_committed(connection, record, f"name-{record.id}", None, {"n": "1"}, True)
            return [record._replace(kind="committed") for record in made]

        catalog.change(operation)
        store.cleanup(manifests=True)
        catalog._background(lambda: False)


class Steps:
    """Counts the calls of this thread, and the steps of SQLite on the connections that a catalog has."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> int:
        self.count += 1
        return 0

    def of(self, work: Callable[[], object], catalog: Catalog | None = None) -> int:
        """How many steps a piece of work takes."""
        connections = catalog.database._writer.open if catalog is not None else []
        for connection in connections:
            connection.set_progress_handler(self.step, 1)

        def called(_frame: FrameType, event: str, _: Any) -> None:
            self.count += event in ("call", "c_call")

        self.count = 0
        before = sys.getprofile()
        sys.setprofile(called)
        try:
            work()
        finally:
            sys.setprofile(before)
            for connection in connections:
                connection.set_progress_handler(None, 1)
        return self.count


def work_in(store: Store) -> dict[str, Callable[[], object]]:
    """What must cost the same, in an order in which it can be done."""
    metrics = pytest.importorskip("onlap.serve.metrics")
    catalog = store.snapshotter.catalog
    state = metrics._State(store.snapshotter)
    return {
        "stat": lambda: store.stat("name-7"),
        "usage": lambda: store.usage("name-7"),
        "prepare": lambda: store.prepare("new", "name-7"),
        "mounts": lambda: store.mounts("new"),
        "label": lambda: store.label("new", {"a": "b"}),
        "commit": lambda: store.commit("done", "new"),
        "background": lambda: catalog._background(lambda: False),
        "metrics": lambda: list(state.collect()),
        "remove": lambda: store.remove("done"),
        "sweep": lambda: catalog._background(lambda: False),
    }


def counts(root: Path, count: int) -> dict[str, int]:
    fill(root, count)
    steps = Steps()
    opened: list[Store] = []
    found = {"open": steps.of(lambda: opened.append(onlap.open(root, sync="none")))}
    with opened[0] as store:
        catalog = store.snapshotter.catalog
        # The janitor would work at the same time; here its work is called.
        catalog._janitor.stop()
        for work in work_in(store).values():  # once before, so that all caches are full and all connections open
            work()
        for name, work in work_in(store).items():
            found[name] = steps.of(work, catalog)
    # The first pass of a process looks for what others have left.
    with onlap.open(root, sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        store.stat("name-7")
        found["first pass"] = steps.of(lambda: catalog._background(lambda: False), catalog)
    return found


def test_with_many_snapshots_nothing_but_a_listing_takes_more_steps(tmp_path: Path) -> None:
    few, many = counts(tmp_path / "few", FEW), counts(tmp_path / "many", MANY)
    assert {name: (few[name], many[name]) for name in few if many[name] > few[name] + SLACK} == {}


def totals(store: Store) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The totals, and what they should be."""
    exact = "SELECT kind, owner, count(*), total(inodes), total(size) FROM snapshots GROUP BY kind, owner"

    def both(connection: sqlite3.Connection) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        found = [row for row in records.totals(connection) if row[2]]
        return sorted(found), sorted(connection.execute(exact))

    return store.snapshotter.catalog.database.read(both)


def due(store: Store) -> int:
    sql = "SELECT count(*) FROM snapshots WHERE due"
    return int(store.snapshotter.catalog.database.read(lambda c: c.execute(sql).fetchone()[0]))


def test_the_totals_are_exact_whatever_is_settled_and_changed(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()

        def settled(left: int) -> None:
            catalog._background(lambda: False)
            assert due(store) == left

        store.prepare("one")
        store.view("look")
        found, exact = totals(store)
        assert found == exact
        settled(0)
        found, exact = totals(store)
        assert found == exact == [("active", "", 1, 0, 0), ("view", "", 1, 0, 0)]
        store.commit("base", "one")
        assert due(store) == 1
        found, exact = totals(store)
        assert found == exact
        settled(0)
        found, exact = totals(store)
        assert found == exact
        assert [row[3] > 0 for row in found if row[0] == "committed"] == [True]
        store.prepare("above", "base")
        store.label("base", {"a": "b"})
        assert due(store) == 2
        found, exact = totals(store)
        assert found == exact
        settled(0)
        store.remove("above")
        store.remove("base")
        store.remove("look")
        assert totals(store) == ([], [])


def test_what_a_killed_process_left_is_found_by_the_next(tmp_path: Path) -> None:
    root = tmp_path / "root"
    onlap.open(root, snapshotter="native", sync="none").close()
    pid = os.fork()
    if pid == 0:
        store = onlap.open(root, sync="none")
        store.prepare("key")
        store.commit("name", "key")
        store.prepare("key", "name")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with onlap.open(root, sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        records_ = list(catalog.walk(""))
        assert [catalog.sidecars.is_current(record) for record in records_] == [False, False]
        catalog._background(lambda: False)
        records_ = list(catalog.walk(""))
        assert [catalog.sidecars.is_current(record) for record in records_] == [True, True]
        assert records_[0].size is not None
        assert catalog.manifests.entries(records_[0]) is not None
        assert due(store) == 0


def test_a_copy_of_a_record_that_a_power_cut_emptied_is_written_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(root, 3)
    with onlap.open(root, sync="none") as store:
        catalog = store.snapshotter.catalog
        assert due(store) == 0
        record = catalog.get("", "name-2")
        path = catalog.layout.record(record.id)
        size = os.stat(path).st_size
        with open(path, "wb") as file:  # as with delayed allocation: the name, the length and the time
            file.truncate(size)
        os.utime(path, ns=(record.updated_ns, record.updated_ns))
        catalog.database.write(lambda c: records.put_setting(c, "epoch", "of another boot"))
    with onlap.open(root, sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        assert due(store) == 1
        catalog._background(lambda: False)
        assert catalog.sidecars.is_current(catalog.get("", "name-2"))
        assert due(store) == 0


def commit(store: Store, *names: str) -> list[Record]:
    """Make committed snapshots, with the janitor stopped."""
    catalog = store.snapshotter.catalog
    catalog._janitor.stop()
    for name in names:
        store.prepare(f"key of {name}")
        store.commit(name, f"key of {name}")
    return [catalog.get("", name) for name in names]


def stop_at_manifests(catalog: Catalog) -> Callable[[], bool]:
    """What says that the work has to stop, from the moment at which all manifests are made."""
    return lambda: bool(catalog.manifests._looked and not catalog.manifests._unlisted)


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_sidecar_gets_the_digest_of_a_manifest_that_was_made_just_before_the_end(tmp_path: Path, end: str) -> None:
    """Of a process that is killed before it writes the digest, and of one that stops with more than it writes then."""
    root = tmp_path / "root"
    with onlap.open(root, snapshotter="native", sync="none") as store:
        made = commit(store, "one", "two")
        catalog = store.snapshotter.catalog
        if end == "killed":
            catalog.sidecars.write(lambda: False)
            catalog.manifests.make(lambda: False)
            # As the next process begins, since it sees what this one would have written at its end.
            catalog.sidecars._unwritten.clear()
            catalog.sidecars._written.clear()
        else:
            catalog._background(stop_at_manifests(catalog))
            catalog.sidecars._unwritten.clear()
        assert due(store) == 2
    with onlap.open(root, sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        assert [catalog.sidecars.is_current(each) for each in made] == [False, False]
        catalog._background(lambda: False)
        for each in made:
            digest = catalog.database.read(lambda c: records.manifest(c, each.id))  # noqa: B023 - run at once
            assert digest is not None
            assert sidecars.read(catalog.layout.record(each.id)).manifest == digest
        assert due(store) == 0


def test_a_sidecar_that_lacks_a_digest_is_a_finding_unless_it_is_yet_to_be_written(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        (made,) = commit(store, "one")
        catalog = store.snapshotter.catalog
        catalog.sidecars.write(lambda: False)
        catalog.usages.measure(lambda: False)
        catalog.manifests.make(lambda: False)
        assert store.check().findings == ()
        catalog.database.write(lambda c: c.execute("UPDATE snapshots SET due = 0"))
        assert [(finding.kind, finding.thing) for finding in store.check().findings] == [("sidecar-damaged", "one")]
        store.cleanup()
        assert store.check().findings == ()
        assert catalog.sidecars.is_current(made)


def test_another_process_that_lists_a_layer_does_not_end_what_is_left_to_do_for_it(tmp_path: Path) -> None:
    """Its sidecar, which this process has written, has no digest yet."""
    root = tmp_path / "root"
    with onlap.open(root, snapshotter="native", sync="none") as store, onlap.open(root, sync="none") as other:
        (made,) = commit(store, "one")
        other.snapshotter.catalog._janitor.stop()
        catalog = store.snapshotter.catalog
        catalog.usages.measure(lambda: False)
        catalog.sidecars.write(lambda: False)
        other.snapshotter.catalog.manifests.ensure(made)
        catalog.sidecars.clear_due()
        assert due(store) == 1


def test_a_commit_beside_the_first_look_at_what_is_left_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        made: list[Record] = []

        def beside(look: Callable[[Connection], list[int]]) -> Callable[[Connection], list[int]]:
            def looked(connection: Connection) -> list[int]:
                found = look(connection)
                if not made:
                    made.extend(commit(store, "one"))
                return found

            return looked

        monkeypatch.setattr(records, "unmeasured", beside(records.unmeasured))
        catalog.usages.measure(lambda: False)
        assert catalog.get("", "one").size is not None


@pytest.mark.parametrize("refusal", [errors.ResourceExhausted, errors.FailedPrecondition])
def test_a_disk_that_takes_no_sizes_does_not_end_the_rest_of_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: type[errors.OnlapError]
) -> None:
    def refused(*_: object) -> None:
        raise refusal("the disk is full, or read-only")

    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        catalog = store.snapshotter.catalog
        (made,) = commit(store, "one")
        with monkeypatch.context() as patch:
            patch.setattr(records, "set_usages", refused)
            catalog._background(lambda: False)
        assert catalog.sidecars.is_current(made)
        assert due(store) == 1
        assert store.usage("one").inodes > 0


def test_sizes_that_cannot_be_noted_now_are_noted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise errors.Unavailable("another process has the lock")

    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        catalog = store.snapshotter.catalog
        commit(store, "one")
        with monkeypatch.context() as patch:
            patch.setattr(records, "set_usages", locked)
            with pytest.raises(errors.Unavailable):
                catalog._background(lambda: False)
        catalog._background(lambda: False)
        assert due(store) == 0


@pytest.mark.parametrize("look", ["unmeasured", "without_manifest", "walk"])
def test_a_look_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    """Else what other processes left would wait for the next process."""
    root = tmp_path / "root"

    def locked(*_: object, **__: object) -> None:
        raise errors.Unavailable("another process has the lock")

    with onlap.open(root, snapshotter="native", sync="none") as other, onlap.open(root, sync="none") as store:
        commit(other, "one")
        catalog = store.snapshotter.catalog
        catalog._janitor.stop()
        with monkeypatch.context() as patch:
            patch.setattr(records, look, locked)
            with pytest.raises(errors.Unavailable):
                catalog._background(lambda: False)
        catalog._background(lambda: False)
        assert due(store) == 0


def settle(catalog: Catalog) -> None:
    """Do all background work."""
    catalog._janitor.stop()
    for _ in range(2):
        catalog._background(lambda: False)
    assert catalog.database.read(lambda c: c.execute("SELECT count(*) FROM snapshots WHERE due").fetchone()) == (0,)


def durable(store: Store, ws: Workspace) -> None:
    """A checkpoint that is written to the disk after its sidecar was written."""
    catalog = store.snapshotter.catalog
    synced = catalog.sync

    def sync(since: int | None = None) -> None:
        settle(catalog)
        synced(since)

    setattr(catalog, "sync", sync)  # noqa: B010 - for mypy, a method is not to be assigned
    ws.checkpoint("third", durable=True)


CHANGES: dict[str, Callable[[Store, Workspace], object]] = {
    "a label": lambda store, _: store.label("base", {"a": "b"}),
    "a durable checkpoint": durable,
    "a forgotten checkpoint": lambda _, ws: ws.forget("first"),
    "the labels of a row": lambda store, _: store.snapshotter.catalog.database.write(
        lambda c: records.set_labels(c, 1, {"a": "b"})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_labels_that_a_killed_process_changed_come_into_the_sidecars(tmp_path: Path, change: str) -> None:
    root = tmp_path / "root"
    with onlap.open(root, snapshotter="native", sync="none") as store:
        commit(store, "base")
        ws = store.workspaces.create("w", "base")
        catalog = store.snapshotter.catalog
        for content in ("first", "second", "third"):
            top = store.snapshotter.for_owner(records.WORKSPACES).record("top/w")
            Path(catalog.layout.tree(top.id), "file").write_text(content)
            if content != "third":
                ws.checkpoint(content, durable=True)
        settle(catalog)
        CHANGES[change](store, ws)
        # What a process knows that is killed here ends with it.
        catalog._janitor.stop()
        catalog.sidecars._unwritten.clear()
        catalog.sidecars._written.clear()
    with onlap.open(root, sync="none") as store:
        catalog = store.snapshotter.catalog
        settle(catalog)
        for record in catalog.walk(None):
            assert sidecars.read(catalog.layout.record(record.id)).labels == record.labels
        assert store.check().findings == ()
