"""backup and restore: all of it comes back, whoever works meanwhile, whatever ends them, whatever the archive is."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.helpers import NOBODY, output, python
from onlap import errors
from onlap.catalog import pins
from onlap.catalog.disk.layout import Layout
from onlap.progress import Progress
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


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_all_of_it_comes_back(store: Store, root: Path, ending: str) -> None:
    archive = root / f"backup{ending}"
    done = store.backup(archive)
    assert (done.snapshots, done.images, done.blobs) == (6, 1, 4)
    assert done.size == archive.stat().st_size
    again = onlap.restore(archive, root / "again")
    assert again == done
    assert stat.S_IMODE((root / "again").stat().st_mode) == 0o700
    check_same(store, root / "again")
    assert rows(store.root, set())["pins"] == rows(root / "again", set())["pins"]


def test_with_what_is_active(store: Store, root: Path) -> None:
    with store.mounted("work") as top:
        (top / "d" / "mine").write_text("mine")
        os.link(top / "d" / "mine", top / "too")
        (top / "sockets").mkdir()
        bind_socket(top / "sockets")
    store.cleanup()
    done = store.backup(root / "backup.tar", active=True)
    assert (done.snapshots, done.skipped) == (8, {"socket": 1})
    onlap.restore(root / "backup.tar", root / "again")
    one, other = (trees(where, committed(store, active=True)) for where in (store.root, root / "again"))
    del one[f"snapshots/{store.snapshotter.record('work').id}/fs/sockets/socket"]
    assert one == other
    with onlap.open(root / "again") as again:
        assert again.check().findings == ()
        with again.mounted("work") as top:
            assert (top / "too").read_text() == "mine"
            (top / "more").touch()
        again.commit("done", "work")


def test_the_archive_is_a_tar_for_everyone(store: Store, root: Path) -> None:
    archive = root / "backup.tar"
    store.backup(archive)
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, check=True)
    assert [line for line in listed.stderr.splitlines() if b"hdrcharset" not in line] == []  # POSIX's, unknown to GNU
    (root / "out").mkdir()
    options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "-S"]
    subprocess.run(["tar", *options, "-xf", archive, "-C", root / "out"], check=True)
    ids = committed(store)
    expected = trees(store.root, ids)
    found = trees(root / "out", ids)
    if ROOT:
        for path in [path for path, what in expected.items() if stat.S_ISSOCK(what[0])]:  # type: ignore[index]
            del expected[path]  # no archive can hold it
        del expected["content/blobs/sha256"], found["content/blobs/sha256"]
        assert {path: what[:5] for path, what in found.items()} == {path: what[:5] for path, what in expected.items()}  # type: ignore[index]
    for digest in (root / "out" / "content" / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(digest.read_bytes()).hexdigest() == digest.name
    for each in ids:
        record = json.loads((root / "out" / "snapshots" / str(each) / "record").read_bytes())
        assert record["content"]["id"] == each


def test_what_no_tar_can_hold(root: Path) -> None:
    """Hard links of sockets, and xattrs with a "=" in their names, are in the manifest."""

    def filled(top: Path) -> None:
        bind_socket(top)
        (top / "z").mkdir()
        os.link(top / "socket", top / "z" / "too")
        os.setxattr(top / "z", "user.a=b", b"1")
        (top / "f").touch()
        for name in ("user.=", "user.x"):
            os.setxattr(top / "f", name, b"2")

    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            filled(top)
        done = store.backup(root / "backup.tar")
        assert done.skipped == {}
        assert onlap.restore(root / "backup.tar", root / "again") == done
        assert trees(root / "again", {1}) == trees(root / "root", {1})
        store.prepare("active")
        with store.mounted("active") as top:
            filled(top)
        assert store.backup(root / "active.tar", active=True).skipped == {"socket": 2, "xattr": 2}
    with onlap.open(root / "again", sync="none") as again:
        assert again.check(deep=True).findings == ()


def test_progress(store: Store, root: Path) -> None:
    reports: list[Progress] = []
    store.backup(root / "backup.tar", progress=reports.append)
    onlap.restore(root / "backup.tar", root / "again", progress=reports.append)
    for stage in ("backup", "restore"):
        of_it = [report for report in reports if report.stage == stage]
        assert of_it[-1].done == of_it[-1].total
        assert of_it[-1].done > 300_000
        assert all(report.total == of_it[-1].total and report.done <= of_it[-1].done for report in of_it)


def test_a_root_with_nothing_in_it(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="native") as store:
        store.prepare("x")
        store.remove("x")
        store.backup(root / "backup.tar")
    onlap.restore(root / "backup.tar", root / "again")
    with onlap.open(root / "again") as store:
        store.prepare("y")
        assert store.snapshotter.record("y").id == 2
        assert store.check().ok


# Beside others


def test_beside_writers_and_removers(root: Path) -> None:
    stop = threading.Event()
    with onlap.open(root / "root", snapshotter="native", sync="none") as store, ThreadPoolExecutor(3) as pool:

        def work(number: int) -> None:
            kept: list[str] = []
            turn = 0
            while not stop.is_set():
                turn += 1
                name = f"{number}-{turn}"
                with store.build(name, kept[-1] if kept else None, {"turn": str(turn)}) as top:
                    (top / name).write_bytes(name.encode() * turn)
                kept.append(name)
                while len(kept) > 3:
                    with contextlib.suppress(errors.FailedPrecondition):  # it is kept by the backup
                        store.remove(kept[-1])
                    kept.pop()
                    kept = kept[:-1] if turn % 7 == 0 else kept

        running = [pool.submit(work, number) for number in range(3)]
        try:
            for number in range(6):
                done = store.backup(root / f"{number}.tar")
                again = root / f"again-{number}"
                assert onlap.restore(root / f"{number}.tar", again) == done
                with onlap.open(again) as other:
                    assert other.check(deep=True).findings == ()
                    assert len(list(other.walk())) == done.snapshots
        finally:
            stop.set()
        for each in running:
            each.result()
        assert store.snapshotter.catalog.database.read(pins.valid) == []


def test_nothing_of_it_can_be_removed_meanwhile(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            (top / "f").write_bytes(bytes(1_000_000))
        said: list[str] = []

        class Out(io.BytesIO):
            def write(self, data: Any) -> int:
                if not said:
                    with pytest.raises(errors.FailedPrecondition, match="kept by backup") as caught:
                        store.remove("base")
                    said.append(caught.value.message)
                    store.prepare("new")
                    store.commit("later", "new")
                return super().write(data)

        out = Out()
        assert store.backup(out).snapshots == 1
        assert said
        store.remove("base")
        out.seek(0)
        onlap.restore(out, root / "again")
        with onlap.open(root / "again") as again:
            assert [info.name for info in again.walk()] == ["base"]


# What ends it

_BACK_UP = "import onlap, sys; s = onlap.open(sys.argv[1]); print(flush=True); s.backup(sys.argv[2])"
_RESTORE = "import onlap, sys; print(flush=True); onlap.restore(sys.argv[2], sys.argv[1])"


def big(root: Path, size: int = 4 << 20) -> Path:
    """A root whose backup takes a moment."""
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            for number in range(300):
                (top / str(number)).write_bytes(os.urandom(100) * 50)
            (top / "large").write_bytes(os.urandom(size))
        store.cleanup(manifests=True)
    return root / "root"


def ended(code: str, *arguments: Path, number: int, after: float) -> None:
    """Run Python, and send it a signal so many seconds after it says that it begins."""
    with python(code, *arguments) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_backup_that_is_ended(root: Path, number: int) -> None:
    made = big(root)
    archive = root / "out" / "backup.tar"
    archive.parent.mkdir()
    rng = random.Random(number)
    for _ in range(3):
        ended(_BACK_UP, made, archive, number=number, after=rng.uniform(0, 0.2))
        if archive.exists():
            onlap.restore(archive, root / "again")
            subprocess.run(["rm", "-r", root / "again", archive], check=True)
        with onlap.open(made) as store:
            store.cleanup()
            assert store.snapshotter.catalog.database.read(pins.valid) == []
            assert store.check().findings == ()
        assert list(archive.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("existing", [False, True])
def test_a_restore_that_is_ended(root: Path, number: int, existing: bool) -> None:
    made = big(root)
    with onlap.open(made) as store:
        store.backup(root / "backup.tar")
    again = root / "again"
    rng = random.Random(number)
    for _ in range(3):
        if existing:
            again.mkdir(exist_ok=True)
        ended(_RESTORE, again, root / "backup.tar", number=number, after=rng.uniform(0, 0.4))
        if not (again / "catalog.db").exists():
            assert number == signal.SIGKILL or existing == again.exists()
            if (again / "restore.partial").exists():
                with pytest.raises(errors.FailedPrecondition, match="being restored"):
                    onlap.open(again)
            onlap.restore(root / "backup.tar", again)
        with onlap.open(again) as store:
            store.cleanup()
            assert store.check(deep=True).findings == ()
        assert not (again / "restore.partial").exists()
        subprocess.run(["rm", "-r", again], check=True)


_DIE = """
import os, signal, sys, onlap
rename, left = os.rename, int(sys.argv[3])
def deadly(one, other, **more):
    global left
    if ".partial" in str(one):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return rename(one, other, **more)
os.rename = deadly
onlap.restore(sys.argv[2], sys.argv[1])
"""


def test_a_kill_between_any_two_renames(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            (top / "f").write_text("x")
        store.backup(root / "backup.tar")
    again = root / "again"
    for count in range(40):
        with python(_DIE, again, root / "backup.tar", str(count)) as process:
            pass
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert not (again / "catalog.db").exists()
        with pytest.raises(errors.FailedPrecondition, match="being restored"):
            onlap.open(again, create=False)
    assert 8 < count < 39
    with onlap.open(again) as store:
        assert store.check(deep=True).findings == ()
    assert not (again / "restore.partial").exists()


def test_where_a_restore_was_killed_at_its_end(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="native") as store:
        Path(Layout(store.root).partial).mkdir()
        store.cleanup()
        assert not Path(Layout(store.root).partial).exists()


@pytest.mark.needs("loop")
def test_a_full_disk(root: Path, loop_ext4: Callable[[int], Path]) -> None:
    small = loop_ext4(16)
    made = big(root, size=20 << 20)
    with onlap.open(made) as store:
        with pytest.raises(errors.ResourceExhausted):
            store.backup(small / "backup.tar")
        assert sorted(os.listdir(small)) == ["lost+found"]
        assert store.snapshotter.catalog.database.read(pins.valid) == []
        store.backup(root / "backup.tar")
    with pytest.raises(errors.ResourceExhausted):
        onlap.restore(root / "backup.tar", small)
    assert sorted(os.listdir(small)) == ["lost+found"]
    with onlap.open(root / "less", snapshotter="native") as store:
        store.prepare("x")
        store.commit("y", "x")
        store.backup(root / "less.tar")
    onlap.restore(root / "less.tar", small)  # a mount point
    with onlap.open(small) as store:
        assert store.check().findings == ()


# Damage and attacks


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


def refused(data: bytes, root: Path) -> errors.OnlapError:
    before = sorted(os.listdir(root))
    with pytest.raises((errors.InvalidArgument, errors.DataLoss, errors.FailedPrecondition)) as caught:
        onlap.restore(io.BytesIO(data), root / "again")
    assert sorted(os.listdir(root)) == before
    return caught.value


def test_an_archive_that_is_cut(root: Path, archive: bytes) -> None:
    rng = random.Random(1)
    packed = gzip.compress(archive, 1)
    for whole in (archive, packed):
        end = len(whole.rstrip(b"\0")) if whole is archive else len(whole)
        for size in [0, 1, 512, end // 512 * 512, *(rng.randrange(end) for _ in range(12))]:
            refused(whole[:size], root)


def test_an_archive_with_a_flipped_bit(root: Path, archive: bytes) -> None:
    """Wherever it is: it is found, or it is in what a tar ignores and all is as it was."""
    rng = random.Random(2)
    unnoticed = 0
    for position in rng.sample(range(len(archive)), 60):
        data = bytearray(archive)
        data[position] ^= 1 << rng.randrange(8)
        try:
            onlap.restore(io.BytesIO(data), root / "again")
        except (errors.DataLoss, errors.InvalidArgument, errors.FailedPrecondition):
            assert not (root / "again").exists()
        else:
            unnoticed += 1
            ids = {1, 2}
            assert trees(root / "again", ids) == trees(root / "root", ids)
            assert rows(root / "again", ids)["labels"] == rows(root / "root", ids)["labels"]
            subprocess.run(["rm", "-r", root / "again"], check=True)
    assert unnoticed < 40  # padding


def rewritten(
    archive: bytes, change: Callable[[tarfile.TarInfo, bytes], Iterator[tuple[tarfile.TarInfo, bytes]]]
) -> bytes:
    """The archive with other entries; the digest at its end is no longer right."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old:
            content = old.extractfile(member) if member.isreg() else None
            for entry, data in change(member, content.read() if content else b""):
                if entry.isreg():
                    entry.size = len(data)
                new.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _json(
    change: Callable[[dict[str, Any]], object],
) -> Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]:
    def apply(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        found = json.loads(data)
        change(found)
        return entry, json.dumps(found).encode()

    return apply


Change = Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]]


def _record(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change to a record, whose own digest is right."""

    def apply(found: dict[str, Any]) -> None:
        change(found["content"])
        found["sha256"] = hashlib.sha256(json.dumps(found["content"], sort_keys=True).encode()).hexdigest()

    return _json(apply)


def _renamed(name: str) -> Change:
    def apply(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        entry.name = name
        return entry, data

    return apply


def _as(kind: bytes, link: str = "") -> Change:
    def apply(entry: tarfile.TarInfo, _data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        entry.type, entry.linkname, entry.size = kind, link, 0
        return entry, b""

    return apply


OVERLAY = {"snapshotter": "overlay", "flavour": "trusted"}
HEAD, RECORD, FILE = "backup.json", "snapshots/2/record", "snapshots/1/fs/d/f"
ATTACKS: dict[str, tuple[str, Change]] = {
    "a path upwards": (FILE, _renamed("snapshots/1/fs/../../../../evil")),
    "an absolute path": (FILE, _renamed("/tmp/evil")),
    "a path through a symlink": (FILE, _renamed("snapshots/1/fs/a/evil")),
    "another tree": (FILE, _renamed("snapshots/2/fs/evil")),
    "a symlink in place of a directory": ("snapshots/1/fs/d", _as(tarfile.SYMTYPE, "/tmp")),
    "a symlink in place of the top": ("snapshots/1/fs", _as(tarfile.SYMTYPE, "/tmp")),
    "a link to elsewhere": ("snapshots/1/fs/g", _as(tarfile.LNKTYPE, "/etc/passwd")),
    "a link upwards": ("snapshots/1/fs/g", _as(tarfile.LNKTYPE, "snapshots/1/fs/../record")),
    "a link through a symlink": ("snapshots/1/fs/g", _as(tarfile.LNKTYPE, "snapshots/1/fs/a/passwd")),
    "a record in place of another": (RECORD, _renamed("snapshots/1/record")),
    "a record as a link": (RECORD, _as(tarfile.SYMTYPE, "/etc/passwd")),
    "a cycle": (RECORD, _record(lambda r: r.update(parent_id=2))),
    "an unknown parent": (RECORD, _record(lambda r: r.update(parent_id=77))),
    "an id of another": (RECORD, _record(lambda r: r.update(id=1))),
    "an id that is a word": (RECORD, _record(lambda r: r.update(id="../x"))),
    "a name twice": (RECORD, _record(lambda r: r.update(name="base"))),
    "a name that is no text": (RECORD, _record(lambda r: r.update(name=7))),
    "a name that is no UTF-8": (RECORD, _record(lambda r: r.update(name="\ud800"))),
    "an active one with a manifest": (RECORD, _record(lambda r: r.update(kind="active"))),
    "a time out of range": (RECORD, _record(lambda r: r.update(created_ns=1 << 70))),
    "another manifest": (RECORD, _record(lambda r: r.update(manifest="sha256:" + "0" * 64))),
    "no JSON": (RECORD, lambda entry, _data: (entry, b"[[")),
    "another label": (RECORD, _record(lambda r: r["labels"].update(key="other"))),
    "an id of 0": (HEAD, _json(lambda h: h.update(snapshots=[0]))),
    "an id that is too large": (HEAD, _json(lambda h: h.update(snapshots=[1 << 64]))),
    "an id above the sequence": (HEAD, _json(lambda h: h.update(sequence=0))),
    "a sequence at its end": (HEAD, _json(lambda h: h.update(sequence=(1 << 63) - 1))),
    "an id twice": (HEAD, _json(lambda h: h.update(snapshots=[1, 1]))),
    "ids that are none": (HEAD, _json(lambda h: h.update(snapshots=["../../x"]))),
    "fewer snapshots": (HEAD, _json(lambda h: h["snapshots"].pop())),
    "a newer format": (HEAD, _json(lambda h: h.update(format=99))),
    "another user": (HEAD, _json(lambda h: h.update(user=os.geteuid() + 1))),
    "an unknown setting": (HEAD, _json(lambda h: h["settings"].update(x="y"))),
    "another snapshotter": (HEAD, _json(lambda h: h["settings"].update(snapshotter="memory"))),
    "an overlay without a property": (HEAD, _json(lambda h: h.update(settings=OVERLAY))),
    "an overlay's property in another": (HEAD, _json(lambda h: h["settings"].update(redirect_dir="on"))),
    "a root of another kind": (HEAD, _json(lambda h: h.update(settings={**OVERLAY, "redirect_dir": "off"}))),
    "a loss to come": (HEAD, _json(lambda h: h["settings"].update(lost_up_to="999"))),
    "no settings": (HEAD, _json(lambda h: h.pop("settings"))),
    "a pin of nothing": (HEAD, _json(lambda h: h["pins"].append({"owner": "x", "snapshot": 9, "digest": None}))),
    "a blob that leads out": (
        HEAD, _json(lambda h: h["pins"].append({"owner": "x", "snapshot": None, "digest": "sha256:../../x"})),
    ),
    "a blob that is missing": (
        HEAD, _json(lambda h: h["pins"].append({"owner": "x", "snapshot": None, "digest": "sha256:" + "f" * 64})),
    ),
    "an image that leads out": (HEAD, _json(lambda h: h["images"][0].update(digest="sha256:../../x"))),
    "an image that is none": (HEAD, _json(lambda h: h["images"].append({"name": "x"}))),
    "a fake end": (FILE, _renamed("end.json")),
    "another time": (HEAD, _json(lambda h: h.update(created_ns=1))),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack(root: Path, archive: bytes, name: str) -> None:
    where, change = ATTACKS[name]
    tried = []

    def apply(entry: tarfile.TarInfo, data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        if entry.name == where:
            tried.append(entry)
            yield change(entry, data)
        else:
            yield entry, data

    refused(rewritten(archive, apply), root)
    assert tried
    assert not os.path.lexists("/tmp/evil")


@pytest.mark.parametrize("where", [HEAD, RECORD, FILE, "snapshots/1/manifest", "snapshots/1/fs", "end.json"])
def test_an_entry_twice_or_never(root: Path, archive: bytes, where: str) -> None:
    for times in (0, 2):

        def apply(entry: tarfile.TarInfo, data: bytes, times: int = times) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
            for _ in range(times if entry.name == where else 1):
                yield entry, data

        refused(rewritten(archive, apply), root)


def test_a_file_that_is_not_what_its_manifest_says(root: Path, archive: bytes) -> None:
    changed = archive.replace(b"the words", b"THE WORDS")
    error = refused(changed, root)
    assert isinstance(error, errors.DataLoss)
    assert "/d/f of snapshot base" in error.message


def test_what_is_no_backup(root: Path, archive: bytes) -> None:
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    for data in (b"", b"x" * 2000, other.getvalue(), bytes(10240)):
        refused(data, root)
    with pytest.raises(errors.NotFound):
        onlap.restore(root / "nothing", root / "again")
    for taken in ("root", "layout"):
        with pytest.raises(errors.FailedPrecondition, match="not empty"):
            onlap.restore(io.BytesIO(archive), root / taken)


def test_a_damaged_root_is_not_backed_up(root: Path, archive: bytes) -> None:
    with onlap.open(root / "root") as store:
        file = root / "root" / FILE
        status = file.stat()
        file.write_bytes(b"THE WORDS")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(errors.DataLoss, match="/d/f of snapshot base is not what was committed"):
            store.backup(root / "backup.tar")
        file.unlink()
        with pytest.raises(errors.DataLoss):
            store.backup(root / "backup.tar")
        assert not (root / "backup.tar").exists()


# Other users, other places


@pytest.mark.skipif(not ROOT, reason="only root can be two users")
def test_an_ordinary_user(ordinary: Path) -> None:
    """His root comes back to him, with recorded owners; one of root's is refused to him, and his to root."""
    code = """
import io, sys, tarfile, onlap
top, kind = sys.argv[1:]
layer = io.BytesIO()
with tarfile.open(fileobj=layer, mode="w") as tar:
    for name, uid in (("a", 0), ("b", 1000)):
        entry = tarfile.TarInfo(name)
        entry.uid, entry.gid, entry.mode = uid, uid, 0o4711
        tar.addfile(entry)
layer.seek(0)
with onlap.open(f"{top}/{kind}", snapshotter=kind, sync="none") as store:
    store.prepare("x")
    store.apply("x", layer)
    store.commit("base", "x")
    store.backup(f"{top}/{kind}.tar")
    expected = store.export("base", io.BytesIO()).archive.diff_id
onlap.restore(f"{top}/{kind}.tar", f"{top}/{kind}.again")
with onlap.open(f"{top}/{kind}.again") as store:
    assert store.check(deep=True).findings == ()
    assert store.export("base", io.BytesIO()).archive.diff_id == expected
print("done")
"""
    for kind in ("overlay", "native"):
        assert output(code, ordinary, kind, ordinary=True).strip() == "done"
        with pytest.raises(errors.FailedPrecondition, match=f"of a root of user {NOBODY}"):
            onlap.restore(ordinary / f"{kind}.tar", ordinary / "by-root")
    with onlap.open(ordinary / "roots", snapshotter="native") as store:
        store.backup(ordinary / "roots.tar")
    os.chmod(ordinary / "roots.tar", 0o644)
    code = """
import onlap, sys
try: onlap.restore(sys.argv[1], sys.argv[2])
except onlap.FailedPrecondition as error: print(error)
"""
    said = output(code, ordinary / "roots.tar", ordinary / "his", ordinary=True)
    assert said.startswith("the backup is of a root of user 0, and this is user")
    assert not (ordinary / "his").exists()


@pytest.mark.needs("overlay", "mount")
@pytest.mark.skipif(not ROOT, reason="only root may mount a filesystem")
def test_a_filesystem_without_overlays(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="overlay") as store:
        store.backup(root / "backup.tar")
    for each in ("lower", "upper", "work", "merged"):
        (root / each).mkdir()
    # The kernel takes no overlay as the upper layer of another.
    options = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", root / "merged"], check=True)
    try:
        with pytest.raises(errors.FailedPrecondition, match="overlays with trusted xattrs"):
            onlap.restore(root / "backup.tar", root / "merged" / "again")
        assert os.listdir(root / "merged") == []
    finally:
        subprocess.run(["umount", root / "merged"], check=True)


# The command


def onlap_command(root: Path, *words: str | Path, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "onlap", "--root", root, *words]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def test_the_command(root: Path, archive: bytes) -> None:
    done = onlap_command(root / "root", "backup", root / "b.tar.gz")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith(f"{root}/b.tar.gz: 3 snapshots, 1 image, 3 blobs, ")
    done = onlap_command(root / "again", "--json", "restore", root / "b.tar.gz")
    found = json.loads(done.stdout)
    assert (found["root"], found["snapshots"], found["images"]) == (str(root / "again"), 3, 1)
    done = onlap_command(root / "again", "restore", root / "b.tar.gz")
    assert (done.returncode, b"is not empty" in done.stderr) == (5, True)
    piped = onlap_command(root / "again", "backup", "-")
    assert (piped.returncode, piped.stderr) == (0, b"")
    done = onlap_command(root / "third", "restore", "-", data=piped.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert onlap_command(root / "third", "check", "--deep").returncode == 0
    assert trees(root / "third", {1, 2, 3}) == trees(root / "root", {1, 2, 3})
    damaged = piped.stdout.replace(b"the words", b"THE WORDS")
    done = onlap_command(root / "fourth", "--json", "restore", "-", data=damaged)
    assert json.loads(done.stderr)["error"]["kind"] == "DataLoss"
    assert not (root / "fourth").exists()
