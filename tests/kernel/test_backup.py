"""backup and restore: all of it comes back, whoever works meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.backups import ROOT, archive, bind_socket, check_same, committed, onlap_command, rows, store, trees
from kernel.helpers import NOBODY, output
from onlap import errors
from onlap.catalog import pins
from onlap.progress import Progress
from onlap.store import Store

__all__ = ["archive", "store"]


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
