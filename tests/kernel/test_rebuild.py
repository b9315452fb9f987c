"""The catalog, rebuilt from the records beside the trees; and what a damaged root still serves."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from pathlib import Path

import pytest

import onlap
from kernel.damage import (
    KINDS,
    LOWER,
    UPPER,
    beside,
    deleted,
    die_at,
    flip,
    onlap_command,
    records,
    root,
    small_disk,
    sql,
    store,
    template,
    tree,
)
from onlap import errors
from onlap.catalog.records import next_id
from onlap.check.rebuild import rebuild
from onlap.store import open_snapshotter
from pure.image_makers import Made

__all__ = ["root", "small_disk", "store", "template"]


def test_a_catalog_is_rebuilt(root: Path) -> None:
    with onlap.open(root) as store:
        before = records(store)
    assert before["pins"]
    assert before["images"]
    (root / "catalog.db").write_bytes(b"not a database" * 100)
    with pytest.raises(errors.DataLoss, match="onlap check --repair"):
        onlap.open(root)
    done = onlap_command(root, "check", "--deep", "--repair")
    assert (done.returncode, "rebuilt the catalog: 7 snapshots, 1 image" in done.stdout) == (0, True), done
    assert len(list(root.glob("catalog.db.damaged-*"))) == 1
    with onlap.open(root) as store:
        assert records(store) == before
        assert store.check(deep=True).findings == ()


def fill(root: Path, chance: random.Random, kind: str) -> None:
    """A store of several owners."""
    for owner in ("", "containerd", "\u00e9\n"):
        with open_snapshotter(root, snapshotter=kind, owner=owner, sync="none") as snapshotter:  # type: ignore[arg-type]
            names: list[str | None] = [None]
            for number in range(chance.randrange(4, 14)):
                parent, labels = chance.choice(names), {f"l{chance.random()}": "v", "same": owner or "x"}
                key = f"{owner}/{number}"
                if chance.random() < 0.2:
                    snapshotter.view(key, parent, labels)
                    continue
                rebased = kind == "overlay" and parent is not None and chance.random() < 0.4
                snapshotter.prepare(key, None if rebased else parent, labels)
                if chance.random() < 0.7:
                    below = parent if rebased else None
                    snapshotter.commit(f"c{number}", key, {"onlap.io/x": "y"} if number % 2 else None, parent=below)
                    names.append(f"c{number}")
            for info in list(snapshotter.walk()):
                if chance.random() < 0.3:
                    with contextlib.suppress(errors.FailedPrecondition):
                        snapshotter.remove(info.name)
                elif chance.random() < 0.3:
                    snapshotter.label(info.name, {"late": str(chance.random())})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_any_catalog_is_rebuilt(tmp_path: Path, seed: int, kind: str) -> None:
    root = tmp_path / "root"
    fill(root, random.Random(seed), kind)
    with onlap.open(root, sync="none") as store:
        made = Made(*[LOWER, UPPER][: seed % 2 + 1])
        store.images.import_(made.write_layout(tmp_path / "layout"), name="x:1", platform="linux/amd64")
        store.images.tag("x:1", "y:2")
        store.cleanup(manifests=True)
        before = records(store)
        highest = store.snapshotter.catalog.database.read(next_id)
        if seed == 3:  # while it is open
            with pytest.raises(errors.FailedPrecondition, match="open"):
                rebuild(root)
    for path in root.glob("catalog.db*"):
        if path.name != "catalog.lock":
            path.unlink()
    with pytest.raises(errors.DataLoss, match="onlap check --repair"):
        onlap.open(root, create=seed % 2 == 0)
    done = rebuild(root)
    assert (done.snapshots, done.images, done.unrecorded, done.kept) == (len(before["snapshots"]), 2, (), ())
    with onlap.open(root, sync="none") as store:
        assert records(store) == before
        assert store.check(deep=True).findings == ()
        present = [int(name) for name in os.listdir(root / "snapshots")]
        store.prepare("next")
        assert max(present) < store.snapshotter.record("next").id <= highest
        store.cleanup()
        assert store.check(deep=True).findings == ()


def test_a_tree_without_a_usable_record(root: Path) -> None:
    """It is kept where no cleanup comes, with what is based on it; and comes back with its record."""
    with onlap.open(root, sync="none") as store:
        before = records(store)
        base = beside(store, "base")
        view, copy = beside(store, "view").name, beside(store, "copy").name
    record = (base / "about" / "record").read_bytes()
    times = os.stat(base / "about" / "record")
    (base / "about" / "record").write_text("{}")
    flip(root / "snapshots" / copy / "about" / "record")
    (root / "catalog.db").unlink()
    done = onlap_command(root, "check", "--repair")
    assert f"left without a record: unrecorded/{base.name}" in done.stdout, done
    kept = {base.name, view, copy}
    with onlap.open(root, sync="none") as store:
        store.cleanup()
        assert set(os.listdir(root / "unrecorded")) == kept
        assert store.check(deep=True).ok
        for name in (base.name, view):
            (root / "unrecorded" / name).rename(root / "snapshots" / name)
        (base / "about" / "record").write_bytes(record)
        os.utime(base / "about" / "record", ns=(times.st_atime_ns, times.st_mtime_ns))
        found = store.check(deep=True, repair=True)
        assert found.ok, found
        assert [row for row in before["snapshots"] if str(row[0]) != copy] == records(store)["snapshots"]


def test_a_rebuild_that_is_killed(root: Path) -> None:
    with onlap.open(root, sync="none") as store:
        before, kept = records(store), beside(store, "copy").name
        flip(beside(store, "copy") / "about" / "record")
    for number in itertools.count(1):
        (root / "catalog.db").unlink(missing_ok=True)
        (root / "catalog.db").write_bytes(b"damaged" * 1000)
        pid = os.fork()
        if not pid:
            die_at(number)
            rebuild(root)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert rebuild(root).unrecorded == (f"unrecorded/{kept}",)
        with onlap.open(root, sync="none") as store:
            left = [row for row in before["snapshots"] if str(row[0]) != kept]
            assert (records(store)["snapshots"], records(store)["pins"]) == (left, before["pins"])
            assert store.check().findings == ()
        if not killed:
            assert number > 3
            return


def test_a_root_without_any_record(root: Path) -> None:
    for each in (root / "snapshots").iterdir():
        (each / "about" / "record").unlink()
    (root / "catalog.db").unlink()
    with pytest.raises(errors.DataLoss, match="no tree of the root"):
        rebuild(root)
    assert not (root / "unrecorded").exists()


def test_what_is_whole_is_served(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is damaged beside it; also at the first opening after a start of the machine."""
    with onlap.open(root, sync="none") as store:
        sql(store, "DELETE FROM settings WHERE key = 'epoch'")
        flip(beside(store, "work") / "about" / "record")
        flip(beside(store, "copy") / "about" / "manifest")
        (store.root / "snapshots" / "x").touch()
        (store.root / "content" / "images.json").write_text("{")
        (store.root / "snapshots" / "4711").mkdir()
        flip(Path(store.content.path(store.images.get("x:1").digest)))
        deleted(tree(store, "base"))
    with onlap.open(root, sync="none") as store:
        assert caplog.text.count("has lost its tree") == 1
        assert "base has lost its tree; see: onlap check --repair" in caplog.text
        for key in ("copy", "work", "empty"):
            with store.mounted(key) as top:
                assert key == "empty" or os.listdir(top)
        store.prepare("new", "copy")
        with pytest.raises(errors.DataLoss, match="base is lost"), store.mounted("base"):
            pass
        assert len(list(store.walk())) == 8
