"""What the tests of backups share: roots, archives of them, and whether two are the same."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.catalog import pins
from onlap.store import Store, open_snapshotter
from onlap.trees.meta import ACCESS_ACL, DEFAULT_ACL
from pure.image_makers import Made, layer

ROOT = os.geteuid() == 0


IMAGE = "docker.io/library/x:1"


# acl(5), linux/posix_acl_xattr.h: the owner, user 1000, the group, the mask, others.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 7, 2**32 - 1), (2, 5, 1000), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1))
)


def bind_socket(top: Path) -> None:
    here = os.getcwd()
    os.chdir(top)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)


def fill(top: Path) -> None:
    """Everything that a layer can hold."""
    (top / "d" / "e").mkdir(parents=True)
    (top / "d" / "f").write_bytes(os.urandom(300_000))
    (top / "d.x").write_text("sorts between d and d/")
    os.link(top / "d" / "f", top / "other name")
    os.link(top / "d" / "f", top / "d" / "e" / "third")
    (top / "empty").touch()
    (top / os.fsdecode(b"\xff\n=\\")).write_text("odd")
    (top / ("n" * 255)).write_text("long")
    (top / "link").symlink_to(os.fsdecode(b"\xff to/" + b"x" * 200))
    os.mkfifo(top / "fifo")
    bind_socket(top)
    os.link(top / "socket", top / "d" / "socket too")
    with (top / "holes").open("wb") as file:
        for offset in (4 << 20, 9 << 20):
            file.seek(offset)
            file.write(b"data")
        file.truncate(16 << 20)
    os.setxattr(top / "d", "user.x", b"\0\xff value")
    os.setxattr(top / "d", DEFAULT_ACL, ACL)
    os.setxattr(top / "d.x", ACCESS_ACL, ACL)
    deep = top
    for number in range(260):  # more than a walk keeps open
        deep = deep / f"{number % 10}"
        deep.mkdir()
    if ROOT:
        os.chown(top / "d" / "f", 1000, 2000)
        os.chown(top / "link", 1, 2, follow_symlinks=False)
        os.mknod(top / "device", stat.S_IFBLK | 0o640, os.makedev(7, 300))
        os.setxattr(top / "empty", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
        os.setxattr(top / "link", "trusted.of-a-link", b"1", follow_symlinks=False)
    (top / "empty").chmod(0o4755)
    (top / "d" / "e").chmod(0o2711)
    for name in ("fifo", "link", "d"):
        os.utime(top / name, ns=(1, -1_500_000_001), follow_symlinks=False)


@pytest.fixture(params=[pytest.param("overlay", marks=pytest.mark.needs("overlay", "mount")), "native"])
def store(request: pytest.FixtureRequest, root: Path) -> Iterator[Store]:
    """A root with a chain, whiteouts, an image, an active snapshot, a view and snapshots of a server."""
    with onlap.open(root / "root", snapshotter=request.param, sync="none") as store:
        with store.build("base", labels={"a": "ä", "b": "2"}) as top:
            fill(top)
        with store.build("next", "base") as top:
            (top / "d" / "e" / "third").unlink()
            (top / "d" / "e").rmdir()
            for name in ("d.x", "empty", "link"):
                (top / name).unlink()
            (top / "d" / "e").mkdir()
            (top / "d" / "e" / "new").write_text("in an opaque directory")
            (top / "d" / "f").chmod(0o600)
        store.prepare("gone")
        store.remove("gone")
        store.prepare("nothing")
        store.commit("nothing committed", "nothing")
        store.prepare("work", "next", labels={"c": "3"})
        store.view("view", "next")
        with open_snapshotter(store.root, owner="server") as server:
            server.prepare("x")
            server.commit("base", "x")
        made = Made(layer(a="1"), layer(b="2"))
        store.images.import_(made.write_layout(root / "layout"), name="x:1", platform="linux/amd64")
        catalog = store.snapshotter.catalog
        catalog.database.write(lambda c: pins.pin(c, "somebody", snapshot=store.snapshotter.record("base").id))
        store.cleanup()
        yield store


def rows(root: Path, ids: set[int]) -> dict[str, list[Any]]:
    connection = sqlite3.connect(f"file:{root}/catalog.db?mode=ro", uri=True)
    try:
        columns = "id, owner, name, parent, kind, created_ns, updated_ns, empty"
        found = {
            "snapshots": connection.execute(f"SELECT {columns} FROM snapshots ORDER BY id").fetchall(),
            "settings": connection.execute("SELECT * FROM settings WHERE key <> 'epoch'").fetchall(),
            "sequence": connection.execute("SELECT * FROM sqlite_sequence").fetchall(),
            **{
                table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
                for table in ("labels", "images", "manifests", "pins")
            },
        }
    finally:
        connection.close()
    found["snapshots"] = [row for row in found["snapshots"] if row[0] in ids]
    found["labels"] = [row for row in found["labels"] if row[0] in ids]
    return found


def trees(root: Path, ids: set[int]) -> dict[str, object]:
    """What the kernel says of every file of these snapshots, and of all blobs."""
    found: dict[str, object] = {}
    links: dict[int, str] = {}
    tops = [root / "snapshots" / str(each) / "fs" for each in sorted(ids)]
    for top in [*tops, root / "content" / "blobs" / "sha256"]:
        for directory, dirs, names in os.walk(top):
            for path in [directory, *(f"{directory}/{name}" for name in names + dirs)]:
                status = os.lstat(path)
                kind = stat.S_IFMT(status.st_mode)
                content: object = None
                if kind == stat.S_IFREG:
                    data = Path(path).read_bytes()
                    content = (hashlib.sha256(data).hexdigest(), len(data), status.st_blocks * 512 < 4 << 20)
                elif kind == stat.S_IFLNK:
                    content = os.readlink(path)
                first = links.setdefault(status.st_ino, os.path.relpath(path, root))
                xattrs = os.listxattr(path, follow_symlinks=False)
                found[os.path.relpath(path, root)] = (
                    status.st_mode, status.st_uid, status.st_gid, status.st_rdev, content,
                    first if kind != stat.S_IFDIR else None,
                    status.st_mtime_ns if top in tops else None,
                    {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(xattrs)},
                )  # fmt: skip
            dirs[:] = [name for name in dirs if not os.path.islink(f"{directory}/{name}")]
    return found


def committed(store: Store, *, active: bool = False) -> set[int]:
    return {r.id for r in store.snapshotter.catalog.walk(None) if active or r.kind == "committed"}


def layers_of(store: Store) -> dict[str, str]:
    return {
        info.name: store.export(info.name, io.BytesIO()).archive.diff_id  # type: ignore[union-attr]
        for info in store.walk("kind==committed")
    }


def check_same(store: Store, again: Path, *, active: bool = False) -> None:
    ids = committed(store, active=active)
    assert trees(again, ids) == trees(store.root, ids)
    expected = rows(store.root, ids)
    assert rows(again, ids) == expected
    with onlap.open(again, sync="none") as other:
        assert committed(other, active=True) == ids
        assert other.check(deep=True).findings == ()
        assert layers_of(other) == layers_of(store)
        assert other.images.get("x:1") == store.images.get("x:1")
        with pytest.raises(errors.FailedPrecondition):  # "next" is based on it, and it is pinned
            other.remove("base")
        other.prepare("new", "next")
        assert other.snapshotter.record("new").id > expected["sequence"][0][1]
        assert other.check().ok


@pytest.fixture
def archive(root: Path) -> bytes:
    """A small backup."""
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base", labels={"key": "value"}) as top:
            (top / "d").mkdir()
            (top / "d" / "f").write_text("the words")
            os.link(top / "d" / "f", top / "g")
            (top / "a").symlink_to("/etc")
        with store.build("next", "base") as top:
            (top / "more").write_text("more")
        made = Made(layer(a="1"))
        store.images.import_(made.write_layout(root / "layout"), name="x:1", platform="linux/amd64")
        out = io.BytesIO()
        store.backup(out)
    return out.getvalue()


# The command


def onlap_command(root: Path, *words: str | Path, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "onlap", "--root", root, *words]
    return subprocess.run(command, input=data, capture_output=True, check=False)
