"""check --repair: what has a source comes back bit for bit, beside readers; what has none stays, and is named."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.store import Store
from onlap.trees import manifest
from onlap.trees.walk import opened
from pure.image_makers import Made

IMAGE = "docker.io/library/x:1"
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
            found[info.name] = list(manifest.entries(fd))
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
    top = tree(store, name).parent / "damaged"
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


def records(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows, without what is measured or noted behind a commit."""
    connection = sqlite3.connect(root / "catalog.db")
    try:
        return {
            "snapshots": connection.execute(
                "SELECT id, owner, name, parent, kind, created_ns, updated_ns, empty FROM snapshots ORDER BY id"
            ).fetchall(),
            "settings": connection.execute(
                "SELECT * FROM settings WHERE key NOT IN ('epoch', 'lost_up_to') ORDER BY key"
            ).fetchall(),
            **{
                table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall())
                for table in ("labels", "images", "manifests")
            },
            "pins": sorted(connection.execute("SELECT * FROM pins").fetchall(), key=str),
        }
    finally:
        connection.close()


def test_a_catalog_is_rebuilt(root: Path) -> None:
    before = records(root)
    assert before["pins"]
    assert before["images"]
    (root / "catalog.db").write_bytes(b"not a database" * 100)
    with pytest.raises(errors.DataLoss, match="onlap check --repair"):
        onlap.open(root)
    done = onlap_command(root, "check", "--deep", "--repair")
    assert (done.returncode, "rebuilt the catalog: 7 snapshots, 1 image" in done.stdout) == (0, True), done
    assert records(root) == before
    assert len(list(root.glob("catalog.db.damaged-*"))) == 1
    with onlap.open(root) as store:
        assert store.check(deep=True).findings == ()


def onlap_command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onlap", "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)
