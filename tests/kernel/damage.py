"""What the tests of repairs share: a root to damage, ways to damage it, and what is left of it."""

from __future__ import annotations

import io
import itertools
import os
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
from onlap.store import Store
from onlap.trees import manifest
from onlap.trees.walk import opened
from pure.image_makers import Made

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


def beside(store: Store, name: str) -> Path:
    return tree(store, name).parent


def sql(store: Store, *statements: str) -> None:
    store.snapshotter.catalog.database.write(lambda c: [c.execute(each) for each in statements])


def forget(store: Store, name: str) -> None:
    """Delete a record, not its tree."""
    identifier = store.snapshotter.record(name).id
    tables = [f"DELETE FROM {table} WHERE snapshot = {identifier}" for table in ("labels", "manifests", "pins")]
    sql(store, *tables, f"DELETE FROM snapshots WHERE id = {identifier}")


def records(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """All rows, without what is measured."""
    queries = {
        "snapshots": "SELECT id, owner, name, parent, kind, created_ns, updated_ns, empty FROM snapshots",
        "settings": "SELECT * FROM settings WHERE key NOT IN ('epoch', 'lost_up_to')",
        **{table: f"SELECT * FROM {table}" for table in ("labels", "images", "manifests", "pins")},
    }
    read = store.snapshotter.catalog.database.read
    return {table: sorted(read(lambda c: c.execute(sql).fetchall()), key=str) for table, sql in queries.items()}  # noqa: B023


def die_at(number: int) -> None:
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


def onlap_command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onlap", "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)
