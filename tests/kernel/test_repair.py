"""check --repair: what has a source comes back bit for bit, beside readers; what has none stays, and is named."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onlap
from kernel.damage import (
    BIG,
    MADE,
    beside,
    content,
    copied,
    deleted,
    die_at,
    flip,
    forget,
    kept,
    layer,
    new_tree,
    onlap_command,
    records,
    root,
    small_disk,
    sql,
    store,
    template,
    to_directory,
    to_file,
    to_link,
    tree,
)
from onlap import errors
from onlap.images import Access, Credentials
from onlap.locks import Flock
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.store import Store, open_snapshotter
from pure.conftest import everybodys, ordinary
from pure.image_makers import Faulty

__all__ = ["everybodys", "root", "small_disk", "store", "template"]

Damage = Callable[[Path], object]


# What is done to the lower layer of the image.
LAYERS: dict[str, Damage] = {
    "a bit": lambda top: flip(top / "d" / "f"),
    "zeroed": lambda top: (top / "d" / "f").write_bytes(bytes(len(BIG))),
    "zero length": lambda top: os.truncate(top / "d" / "f", 0),
    "one name gone": lambda top: (top / "d" / "f2").unlink(),
    "all names gone": lambda top: deleted(top / "d" / "f", top / "d" / "f2"),
    "a link": lambda top: copied(top / "d" / "f2"),
    "a mode": lambda top: (top / "su").chmod(0o755),
    "a time": lambda top: os.utime(top / "d"),
    "an xattr": lambda top: os.setxattr(top / "d" / "f", "user.x", b"z"),
    "another xattr": lambda top: os.setxattr(top / "d" / "e", "user.new", b"z"),
    "a directory": lambda top: shutil.rmtree(top / "d"),
    "a file for a directory": lambda top: to_file(top / "d" / "e"),
    "a directory for a file": lambda top: to_directory(top / "su"),
    "a symlink": lambda top: (top / "link").unlink(),
    "another target": lambda top: to_link(top / "link"),
    "a fifo": lambda top: (top / "fifo").unlink(),
    "new": lambda top: (top / "d" / "new").write_text("x"),
    "a new tree": lambda top: new_tree(top / "n" / "m"),
    "a new name": lambda top: os.link(top / "su", top / "d" / "su2"),
    "much": lambda top: deleted(*top.iterdir()),
    "all": lambda top: shutil.rmtree(top),
}


def test_what_an_image_has(store: Store) -> None:
    """Each damage in turn: a repair brings back what there was, so that the next one begins with a whole root."""
    before = content(store)
    lowest = layer(store, 0)
    for name, damage in LAYERS.items():
        damage(tree(store, lowest))
        done = store.check(deep=True, repair=True)
        found = [each for each in done.findings if each.severity != "note"]  # what the repair before left in the trash
        assert found, name
        assert done.ok, (name, done)
        assert set(found) <= set(done.repaired), (name, done)
        assert content(store) == before, name
    store.cleanup()
    assert store.check(deep=True).findings == ()
    # What was damaged, or nobody knows, is kept.
    assert {"d/f", "d/new", "n/m/f", "su/inside", "d/e"} <= set(kept(store, lowest))


def test_what_another_layer_has(store: Store) -> None:
    before = content(store)
    flip(tree(store, "base") / "d" / "same")
    flip(tree(store, "base") / "own")
    done = store.check(deep=True, repair=True)
    assert [each.path for each in done.repaired] == ["d/same", "name"]
    assert [each.path for each in done.findings if each not in done.repaired] == ["own"]
    assert not done.ok
    # Nothing was lost: it is as it was found.
    damaged = content(store)["base"]
    assert [each for each in damaged if each not in before["base"]] == [each for each in damaged if each.path == "own"]
    assert kept(store, "base") == ["d", "d/same", "name"]


def test_what_nothing_brings_back_is_set_aside(store: Store) -> None:
    store.prepare("above", "base")
    before = content(store)
    whole = (tree(store, "base") / "own").read_text()
    flip(tree(store, "base") / "own")
    done = store.check(deep=True, repair=True, quarantine=True)
    assert {"tree-quarantined"} == {each.kind for each in done.findings if each not in done.repaired}
    for key in ("base", "view", *(["above"] if isinstance(store.snapshotter, OverlaySnapshotter) else [])):
        with pytest.raises(errors.DataLoss, match=r"base.* lost") as caught, store.mounted(key):
            pass
        assert "onlap check --repair" in str(caught.value)
    # As long as there is no source, it stays there.
    assert store.check(deep=True, repair=True).ok is False
    with onlap.open(store.root.parent / "elsewhere", snapshotter="native", sync="none") as other:
        assert other.check(repair=True).ok
    place = store.root.parent / "again"
    place.mkdir()
    (place / "own").write_text(whole)
    store.import_(place, "again")
    store.cleanup(manifests=True)
    done = store.check(deep=True, repair=True)
    assert (done.ok, [each.kind for each in done.repaired]) == (True, ["tree-quarantined"])
    assert content(store)["base"] == before["base"]


STRUCTURE: dict[str, Callable[[Store], object]] = {
    "pin-missing": lambda store: sql(store, "DELETE FROM pins WHERE owner LIKE 'image %' AND digest IS NOT NULL"),
    "pin-dangling": lambda store: sql(store, "INSERT INTO pins VALUES ('somebody', 4711, NULL, NULL)"),
    "sidecar-missing": lambda store: (beside(store, "base") / "about" / "record").unlink(),
    "sidecar-damaged": lambda store: flip(beside(store, "base") / "about" / "record"),
    "manifest-missing": lambda store: (beside(store, "base") / "about" / "manifest").unlink(),
    "manifest-damaged": lambda store: flip(beside(store, "base") / "about" / "manifest"),
    "open-to-others": lambda store: (store.root / "snapshots").chmod(0o777),
    "open-to-others ": lambda store: beside(store, "base").chmod(0o777),
    "tree-unknown": lambda store: forget(store, "copy"),
    "tree-missing": lambda store: deleted(tree(store, "empty")),
    "parent-missing": lambda store: forget(store, "base"),
}


def test_the_structure(store: Store) -> None:
    before, rows = content(store), records(store)
    for kind, damage in STRUCTURE.items():
        damage(store)
        done = store.check(deep=True, repair=True)
        assert kind.strip() in {each.kind for each in done.repaired}, (kind, done)
        assert done.ok, (kind, done)
        assert content(store) == before, kind
        assert records(store) == rows, kind
    assert store.check(deep=True).ok


@pytest.mark.needs("overlay")
def test_a_workdir(root: Path) -> None:
    with onlap.open(root, sync="none") as store:
        if not isinstance(store.snapshotter, OverlaySnapshotter):
            return
        (beside(store, "work") / "work").rmdir()
        assert store.check(repair=True).ok
        with store.mounted("work") as top:
            assert (top / "su").read_bytes() == b"root"


def test_a_directory_of_a_layer(store: Store) -> None:
    """With its manifest gone, too, the layer is unpacked again."""
    before = content(store)[layer(store, 1)]
    deleted(beside(store, layer(store, 1)), beside(store, "empty"))
    done = store.check(deep=True, repair=True)
    assert done.ok, done
    after = content(store)[layer(store, 1)]
    assert [each._replace(mtime_ns=0) for each in after] == [each._replace(mtime_ns=0) for each in before]
    store.cleanup(manifests=True)
    assert store.check(deep=True).findings == ()


def test_what_stays(store: Store) -> None:
    """What has no source is left, named, with the commands that bring it back."""
    (store.root / "snapshots" / "x").touch()
    (store.root / "snapshots" / "4711" / "fs").mkdir(parents=True)
    deleted(tree(store, "base"), tree(store, "work"))
    shutil.rmtree(store.root / "snapshots" / str(store.snapshotter.record("copy").id))
    store.close()
    done = onlap_command(store.root, "--json", "check", "--repair")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, {(line["left"]["kind"], line["left"]["thing"]) for line in lines if "left" in line}) == (
        1,
        {
            ("tree-unknown", "snapshots/x"),
            ("tree-unknown", "snapshots/4711"),
            *(("tree-missing", name) for name in ("base", "work", "copy")),
        },
    )
    assert any("onlap rm view base" in each for each in lines[-1]["remedies"])


@pytest.fixture
def registry() -> Iterator[Faulty]:
    with Faulty(MADE).running() as faulty:
        yield faulty


def test_what_the_registry_has(root: Path, registry: Faulty) -> None:
    access = Access(plain_http=True, credentials=Credentials())
    with onlap.open(root, sync="none") as store:
        before = content(store)
        image = store.images.get("x:1")
        store.images.tag("x:1", f"{registry.host}/some/image:1")
        store.images.remove("x:1")
        lowest = image.chain_ids[0]
        deleted(tree(store, lowest) / "d")
        flip(Path(store.content.path(image.layers[0].digest)))
        flip(Path(store.content.path(image.config_digest)))
        os.unlink(store.content.path(image.layers[1].digest))
        done = store.check(deep=True, repair=True)
        assert "blob-damaged" in {each.kind for each in done.repaired}
        assert "d/e/g" not in {each.path for each in done.repaired}
        assert not done.ok
        assert len(list((store.root / "content" / "damaged").iterdir())) == 2
        store.check(deep=True, repair=True, from_registry=access)
        store.close()
        options = ["--deep", "--repair", "--from-registry", "--plain-http"]
        command = onlap_command(root, "check", *options)
        assert command.returncode == 0, command
    with onlap.open(root, sync="none") as store:
        assert content(store) == before
        store.cleanup()
        assert store.check(deep=True).findings == ()
        assert {each.name for each in store.images} == {f"{registry.host}/some/image:1"}


@pytest.mark.needs("overlay", "mount")
def test_beside_a_program_that_reads(store: Store) -> None:
    """Its mount stays; a name that it has not looked up yet, or a new mount, shows the file that was restored."""
    if not isinstance(store.snapshotter, OverlaySnapshotter):
        return  # there a program works in a copy
    lowest = layer(store, 0)
    before = content(store)
    shutil.rmtree(tree(store, lowest) / "d" / "e")
    (tree(store, lowest) / "su").write_bytes(b"rxxt")
    with store.mounted("work") as top, (top / "su").open("rb") as file:
        assert file.read() == b"rxxt"
        (top / "written").write_text("by the program")
        done = store.check(deep=True, repair=True)
        assert [each.path for each in done.findings if each not in done.repaired and each.severity != "note"] == []
        assert file.seek(0) == 0
        assert file.read() == b"rxxt"  # it was not changed under a program that has it open
        assert (top / "written").read_text() == "by the program"
    with store.mounted("work") as top:
        assert (top / "su").read_bytes() == b"root"
        assert (top / "d" / "e" / "empty").exists()
    assert content(store) == before


def test_owners_with_a_snapshot_of_one_name(root: Path, tmp_path: Path) -> None:
    with open_snapshotter(root, owner="other", sync="none") as snapshotter:
        for key in ("own", "base"):  # the first has other content than ours has
            snapshotter.prepare(f"{key} key")
            record = snapshotter.record(f"{key} key")
            Path(snapshotter.catalog.layout.tree(record.id), "own").write_text(key)
            snapshotter.commit(key, f"{key} key")
    with onlap.open(root, sync="none") as store:
        store.cleanup(manifests=True)
        flip(tree(store, "base") / "own")
        done = store.check(deep=True, repair=True)
        assert [each.path for each in done.findings if each not in done.repaired] == ["own"]
        assert not done.ok


def test_the_command(root: Path) -> None:
    with onlap.open(root, sync="none") as store:
        flip(tree(store, "base") / "d" / "same")
        flip(tree(store, "base") / "own")
    done = onlap_command(root, "check", "--deep", "--repair")
    assert done.returncode == 1
    assert "\nrepair: file-changed: base: /d/same: refilled from the layer" in done.stdout
    assert "\nrepair: file-changed: base: /own: not repaired: its bytes are nowhere else\n" in done.stdout
    assert "\nrepaired 2, left 1\nleft: file-changed: base: /own:" in done.stdout
    assert done.stdout.endswith("to repair it: remove it, leaf first, and make or pull it again: onlap rm view base\n")
    for options in (["--quarantine"], ["--from-registry"]):
        assert onlap_command(root, "check", *options).returncode == 2


@pytest.mark.needs("overlay", "mount")
def test_not_in_an_upper_layer_that_is_mounted(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "root", snapshotter="overlay", sync="none") as store:
        store.import_(Path(__file__).parent, "below", exclude=["*"])
        with onlap.mounted(store.prepare("work", "below")) as top:
            (top / "f").write_text("x")
            store.commit("early", "work", allow_mounted=True)
            store.cleanup(manifests=True)
            (top / "f").write_text("y")
            assert not store.check(deep=True, repair=True).ok
            assert (top / "f").read_text() == "y"
        assert not store.check(deep=True, repair=True).ok


def test_not_beside_a_removal(store: Store) -> None:
    flip(tree(store, "copy") / "d" / "same")
    store.snapshotter.catalog.timeout = 0.0
    with Flock(tree(store, "copy")) as held:
        assert held.lock()
        assert not store.check(deep=True, repair=True).ok
    assert store.check(deep=True, repair=True).ok


def test_killed_and_repaired_again(root: Path) -> None:
    """Killed before each step in turn that changes names."""
    for number in itertools.count(1, 7):
        with onlap.open(root, sync="none") as store:
            before, lowest = content(store), layer(store, 0)
            top = tree(store, lowest)
            deleted(top / "d" / "f2", top / "d" / "e", top / "link")
            flip(top / "d" / "f")
            (top / "new").write_text("x")
        pid = os.fork()
        if not pid:
            die_at(number)
            with onlap.open(root, sync="none") as store:
                store.check(deep=True, repair=True)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        with onlap.open(root, sync="none") as store:
            store.cleanup()  # of what any program leaves that is killed
            done = store.check(deep=True, repair=True)
            assert done.ok, (number, done)
            assert content(store) == before, number
            assert "new" in kept(store, lowest)
            store.cleanup()
            assert store.check(deep=True).findings == (), number
        if not killed:
            assert number > 10
            return


@pytest.mark.needs("mount")
def test_on_a_full_disk(template: Path, small_disk: Path) -> None:
    disk = small_disk
    root = disk / "root"
    subprocess.run(["cp", "-a", template, root], check=True)
    with onlap.open(root, sync="none") as store:
        before, lowest = content(store), layer(store, 0)
        os.truncate(tree(store, lowest) / "d" / "f", 0)
        flip(tree(store, lowest) / "su")
        damaged = content(store)
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        store.check(deep=True, repair=True)
        # What little there is may be enough for one of the two.
        assert [each for each in content(store)[lowest] if each not in [*damaged[lowest], *before[lowest]]] == []
        (disk / "filler").unlink()
        assert store.check(deep=True, repair=True).ok
        assert content(store) == before


def test_an_ordinary_user(everybodys: Path) -> None:
    if os.geteuid() == 0:
        os.chown(everybodys, 65534, -1)
    with ordinary(), onlap.open(everybodys / "root", snapshotter="native", sync="none") as store:
        store.images.import_(MADE.write_layout(everybodys / "layout"), name="x:1", platform="linux/amd64")
        store.cleanup(manifests=True)
        before, lowest = content(store), layer(store, 0)
        (tree(store, lowest) / "d" / "e").chmod(0o500)
        os.truncate(tree(store, lowest) / "d" / "f", 3)
        (tree(store, lowest) / "d" / "f").chmod(0)
        (tree(store, lowest) / "new").touch()
        done = store.check(deep=True, repair=True)
        assert done.ok, done
        assert content(store) == before
