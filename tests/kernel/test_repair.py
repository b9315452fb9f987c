"""check --repair: what has a source comes back bit for bit, beside readers; what has none stays, and is named."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.catalog.records import next_id
from onlap.check.rebuild import rebuild
from onlap.images import Access, Credentials
from onlap.locks import Flock
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.store import Store, open_snapshotter
from onlap.trees import manifest
from onlap.trees.walk import opened
from pure.conftest import everybodys, ordinary
from pure.image_makers import Faulty, Made

__all__ = ["everybodys"]
BIG = bytes(range(256)) * 500 + bytes(300_000) + b"end"


def archive(*entries: tuple[str, bytes | str | None, dict[str, Any]]) -> bytes:
    """A layer: names with content, with the target of a hard link, or with other members of an entry."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, members in entries:
            entry = tarfile.TarInfo(name)
            entry.mtime = 1_500_000_000.25
            for key, value in members.items():
                setattr(entry, key, value)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.LNKTYPE, content
            data = content if isinstance(content, bytes) else b""
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o750}
LOWER = archive(
    ("d", None, {**DIRECTORY, "uid": 7 * (os.geteuid() == 0)}),
    ("d/f", BIG, {"mode": 0o640, "pax_headers": {"SCHILY.xattr.user.x": "y"}}),
    ("d/f2", "d/f", {}),
    ("d/e", None, DIRECTORY),
    ("d/e/g", b"gone above", {}),
    ("d/e/empty", b"", {}),
    ("o", None, DIRECTORY),
    ("o/hidden", b"hidden", {}),
    ("su", b"root", {"mode": 0o4755}),
    ("link", None, {"type": tarfile.SYMTYPE, "linkname": "d/f"}),
    ("fifo", None, {"type": tarfile.FIFOTYPE}),
    ("o\xff\n", b"odd", {}),
)
UPPER = archive(
    ("d", None, DIRECTORY),
    ("d/.wh.f", b"", {}),
    ("d/e", None, DIRECTORY),
    ("d/e/.wh.g", b"", {}),
    ("o", None, DIRECTORY),
    ("o/.wh..wh..opq", b"", {}),
    ("o/new", b"new", {}),
)
MADE = Made(LOWER, UPPER)
KINDS = [pytest.param("overlay", marks=pytest.mark.needs("overlay")), "native"]


@pytest.fixture(scope="module", params=KINDS)
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an image of two layers, a snapshot of which there is another copy, and one of which there is none."""
    top = tmp_path_factory.mktemp("template")
    source = top / "source"
    (source / "d").mkdir(parents=True)
    (source / "d" / "same").write_bytes(b"same" * 30_000)
    with onlap.open(top / "root", snapshotter=request.param, sync="none") as store:
        store.images.import_(MADE.write_layout(top / "layout"), name="x:1", platform="linux/amd64")
        store.import_(source, "copy")
        os.link(source / "d" / "same", source / "name")
        (source / "own").write_text("only here")
        store.import_(source, "base")
        store.prepare("work", store.images.get("x:1").chain_ids[-1])
        store.prepare("nothing")
        store.commit("empty", "nothing")
        store.view("view", "base")
        store.cleanup(manifests=True)
        assert store.check(deep=True).findings == ()
    return top / "root"


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-a", template, tmp_path / "root"], check=True)
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, sync="none") as store:
        yield store


def layer(store: Store, number: int) -> str:
    """The name of the snapshot of a layer."""
    return store.images.get("x:1").chain_ids[number]


def tree(store: Store, name: str) -> Path:
    return Path(store.snapshotter.catalog.layout.tree(store.snapshotter.record(name).id))


def content(store: Store) -> dict[str, list[manifest.Entry]]:
    """What all committed snapshots hold, without what was set aside."""
    found = {}
    for info in store.walk("kind==committed"):
        with opened(str(tree(store, info.name))) as fd:
            listed = list(manifest.entries(fd))
        # A file may share its inode with what was set aside, or with a workdir: only names in the tree count.
        names = Counter(entry.link for entry in listed)
        found[info.name] = [entry if names[entry.link] > 1 else entry._replace(link=0) for entry in listed]
    return found


def flip(path: Path) -> None:
    """Change a byte, and nothing that stat shows."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def copied(path: Path) -> None:
    os.replace(shutil.copy2(path, path.with_name("copy")), path)


def deleted(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("kept")


def to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def to_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("x")


def new_tree(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "f").write_text("x")


def kept(store: Store, name: str) -> list[str]:
    """What was taken out of a tree."""
    top = tree(store, name).parent / "about" / "damaged"
    return sorted(str(path.relative_to(top)).partition("/fs/")[2] for path in top.rglob("*") if "/fs/" in str(path))


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


def beside(store: Store, name: str) -> Path:
    return tree(store, name).parent


def sql(store: Store, *statements: str) -> None:
    store.snapshotter.catalog.database.write(lambda c: [c.execute(each) for each in statements])


def forget(store: Store, name: str) -> None:
    """Delete a record, not its tree."""
    identifier = store.snapshotter.record(name).id
    tables = [f"DELETE FROM {table} WHERE snapshot = {identifier}" for table in ("labels", "manifests", "pins")]
    sql(store, *tables, f"DELETE FROM snapshots WHERE id = {identifier}")


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


def records(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """All rows, without what is measured."""
    queries = {
        "snapshots": "SELECT id, owner, name, parent, kind, created_ns, updated_ns, empty FROM snapshots",
        "settings": "SELECT * FROM settings WHERE key NOT IN ('epoch', 'lost_up_to')",
        **{table: f"SELECT * FROM {table}" for table in ("labels", "images", "manifests", "pins")},
    }
    read = store.snapshotter.catalog.database.read
    return {table: sorted(read(lambda c: c.execute(sql).fetchall()), key=str) for table, sql in queries.items()}  # noqa: B023


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
            _die_at(number)
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


def _die_at(number: int) -> None:
    left = itertools.count(number - 1, -1)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return wrapped

    for name in ("rename", "link", "mkdir", "symlink", "utime"):
        setattr(os, name, dying(getattr(os, name)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


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
        highest = store.snapshotter.catalog.database.read(lambda c: next_id(c, 0))
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
            _die_at(number)
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


def onlap_command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onlap", "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)
