"""check --repair and rebuild, where other programs have put things into the root: nothing outside it is changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.damage import BIG, content, layer, root, small_disk, store, template, tree
from onlap import errors
from onlap.check.rebuild import rebuild
from onlap.store import Store

__all__ = ["root", "small_disk", "store", "template"]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Files that look much like those of a layer; they must stay as they are."""
    top = tmp_path / "outside"
    (top / "e").mkdir(parents=True)
    for name, data in (("empty", b""), ("e/empty", b""), ("e/g", b"gone above"), ("su", b"root"), ("f", BIG)):
        (top / name).write_bytes(data)
        (top / name).chmod(0o600)
    before = state(top)
    yield top
    assert state(top) == before


def state(top: Path) -> list[tuple[str, int, int, int, bytes]]:
    found = []
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found.append((str(path), status.st_mode, status.st_uid, status.st_mtime_ns, data))
    return found


def linked(path: Path, target: Path) -> None:
    path.unlink()
    os.link(target, path)


def pointed(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(target)


# What is done to a tree, with what lies outside.
REPLACED: dict[str, Callable[[Path, Path], object]] = {
    "a hard link to an empty file": lambda top, out: linked(top / "d" / "e" / "empty", out / "empty"),
    "a hard link": lambda top, out: linked(top / "su", out / "su"),
    "a hard link of several": lambda top, out: linked(top / "d" / "f2", out / "f"),
    "a symlink": lambda top, out: pointed(top / "su", out / "su"),
    "a symlink to a directory": lambda top, out: pointed(top / "d" / "e", out / "e"),
    "a symlink for the tree": pointed,
    "a symlink for its directory": lambda top, out: pointed(top.parent, out),
}


def test_what_was_replaced_by_something_outside(store: Store, outside: Path) -> None:
    before = content(store)
    for name, damage in REPLACED.items():
        top = tree(store, layer(store, 0))
        damage(top, outside)
        done = store.check(deep=True, repair=True)
        assert done.ok, (name, done)
        after = content(store)
        if name == "a symlink for its directory":  # its manifest was in there
            assert [each.path for each in after.pop(layer(store, 0))] == [
                each.path for each in before.pop(layer(store, 0))
            ]
        assert after == before, name


@pytest.mark.needs("mount")
@pytest.mark.parametrize("place, source", [("d/e", "e"), ("d/e/empty", "empty"), ("su", "su"), (".", ".")])
def test_what_something_is_mounted_on(store: Store, outside: Path, place: str, source: str) -> None:
    before = content(store)
    target = tree(store, layer(store, 0)) / place
    subprocess.run(["mount", "--bind", outside / source, target], check=True)
    try:
        assert not store.check(deep=True, repair=True).ok
    finally:
        subprocess.run(["umount", target], check=True)
    assert store.check(deep=True, repair=True).ok
    assert content(store) == before


def test_a_file_for_a_tree_is_kept(store: Store) -> None:
    before = content(store)
    top = tree(store, "copy")
    shutil.rmtree(top)
    top.write_text("precious")
    assert store.check(deep=True, repair=True).ok
    assert content(store) == before
    assert [each.read_text() for each in top.parent.glob("*/damaged/*/fs")] == ["precious"]


def record_of(store: Store, name: str) -> Path:
    return Path(store.snapshotter.catalog.layout.record(store.snapshotter.record(name).id))


def sealed(found: object) -> str:
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return json.dumps({"format": 1, "sha256": digest, "content": found})


def changed(path: Path, **members: Any) -> None:
    found = json.loads(path.read_text())["content"]
    path.write_text(sealed({**found, **members}))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def highest(path: Path) -> None:
    """A snapshot with the highest number that SQLite knows."""
    other = path.parents[2] / str((1 << 63) - 1)
    (other / "fs").mkdir(parents=True)
    shutil.copytree(path.parent, other / path.parent.name)
    changed(other / path.parent.name / path.name, id=(1 << 63) - 1, name="high")


def images(path: Path, *more: dict[str, Any], times: int = 1) -> None:
    """Other names of images."""
    names = path.parents[3] / "content" / "images.json"
    (found,) = json.loads(names.read_text())["content"]
    names.write_text(sealed([found] * times + [{**found, "name": f"other{len(each)}", **each} for each in more]))


# What is done to the record of a snapshot, or beside it.
RECORDS: dict[str, Callable[[Path], object]] = {
    "a directory": lambda path: replaced(path, Path.mkdir),
    "a symlink to itself": lambda path: replaced(path, lambda path: path.symlink_to("record")),
    "a fifo": lambda path: replaced(path, os.mkfifo),
    "half a character": lambda path: changed(path, labels={"x": "\ud800"}),
    "half a character for a name": lambda path: changed(path, name="\udfff"),
    "the highest number": highest,
    "a number too large": lambda path: (path.parents[2] / str(10**30)).mkdir(),
    "a number too large in the trash": lambda path: (path.parents[3] / "trash" / str(10**30)).mkdir(),
    "a file": lambda path: (path.parents[2] / "4711").write_text("x"),
    "an image twice": lambda path: images(path, times=2),
    "images that cannot be": lambda path: images(path, {"name": "\ud800"}, {"size": 1 << 70}, {"digest": "../x"}),
}


@pytest.mark.parametrize("what", RECORDS)
def test_rebuilt_from_bad_records(root: Path, what: str) -> None:
    with onlap.open(root, sync="none") as store:
        before = content(store)
        path = record_of(store, "copy")
    RECORDS[what](path)
    for each in root.glob("catalog.db*"):
        each.unlink()
    rebuild(root)
    with onlap.open(root, sync="none") as store:
        store.cleanup()
        after = content(store)
        assert before.keys() - after.keys() <= {"copy"}
        assert {name: after[name] for name in before if name in after} == {
            name: before[name] for name in before if name in after
        }
        assert len(list(store.images)) == 1
        store.prepare("new", "base")
        store.commit("more", "new")
        assert store.check(deep=True).ok or what == "a number too large in the trash"
    assert "copy" in after or list((root / "unrecorded").glob("*/fs/d/same"))


@pytest.mark.needs("mount")
def test_rebuilt_on_a_full_disk(template: Path, small_disk: Path) -> None:
    root = small_disk / "root"
    subprocess.run(["cp", "-a", template, root], check=True)
    (root / "catalog.db").write_bytes(b"damaged")
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(errors.ResourceExhausted, match="free some space"):
        rebuild(root)
    assert (root / "catalog.db").read_bytes() == b"damaged"
    (small_disk / "filler").unlink()
    assert rebuild(root).unrecorded == ()


def test_not_aside_through_a_symlink(root: Path, tmp_path: Path) -> None:
    with onlap.open(root, sync="none") as store:
        path, top = record_of(store, "copy"), tree(store, "copy").parent
    path.unlink()
    (tmp_path / "elsewhere").mkdir()
    (root / "unrecorded").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.FailedPrecondition, match="unrecorded is no directory; move it away"):
        rebuild(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with contextlib.suppress(FileNotFoundError):
        (root / "unrecorded").unlink()
    assert rebuild(root).unrecorded == (f"unrecorded/{top.name}",)
