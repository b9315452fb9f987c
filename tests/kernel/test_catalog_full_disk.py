"""A full or read-only disk: what cannot be done leaves nothing behind, and removing still works."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection

import pytest

import onlap
from onlap import errors
from onlap.catalog import records
from onlap.catalog.disk.layout import RESERVE_SIZE
from onlap.store import SnapshotterKind, Store

Filesystems = Callable[[str], Path]


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Filesystems]:
    """`small(kind)`: a filesystem of 24 MiB, mounted."""
    mounted: list[Path] = []

    def make(kind: str) -> Path:
        if kind == "ext4":
            return request.getfixturevalue("loop_ext4")(24)  # type: ignore[no-any-return]
        target = tmp_path / "tmpfs"
        target.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", target], check=True)
        mounted.append(target)
        return target

    yield make
    for target in mounted:
        subprocess.run(["umount", target], check=True)


def fill(directory: Path) -> Path:
    """Take every block that is left, and every inode with it on a filesystem that has blocks for those."""
    path = directory / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return path


@contextmanager
def quiet(store: Store) -> Iterator[None]:
    """Without the background, whose files come and go."""
    store.snapshotter.catalog._janitor.stop()
    yield


def listing(store: Store) -> dict[str, set[str]]:
    layout = store.snapshotter.catalog.layout
    staging = {
        f"{process}/{name}"
        for process in os.listdir(layout.staging)
        for name in os.listdir(f"{layout.staging}/{process}")
    }
    return {"snapshots": set(os.listdir(layout.snapshots)), "staging": staging}


def _label_for_ever(store: Store, key: str) -> None:
    for number in range(100_000):
        store.label(key, {"n": f"{number}" * 1000})


def _make_files_for_ever(directory: Path) -> None:
    for number in range(1_000_000):
        (directory / str(number)).touch()


KINDS = [
    pytest.param("ext4", marks=pytest.mark.needs("ext4")),
    pytest.param("tmpfs", marks=pytest.mark.needs("mount")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_finds_no_room_leaves_nothing(small: Filesystems, kind: str) -> None:
    disk = small(kind)
    with onlap.open(disk / "root", snapshotter="overlay", sync="none") as store:
        store.prepare("first")
        store.commit("base", "first", {"a": "b"})
        with quiet(store):
            before = listing(store), list(store.walk())
            filler = fill(disk)
            failures, said = 0, set[str | None]()
            for number in range(200):
                try:
                    store.prepare(f"key-{number}", "base", {"n": "x" * 3000})
                except errors.ResourceExhausted as error:
                    said.add(error.hint)
                    failures += 1
                    if failures == 3:
                        break
                else:
                    # What room the log still had; the disk is full in earnest after it.
                    before = listing(store), list(store.walk())
            assert failures == 3
            assert all(hint and hint.startswith("free some space") for hint in said), said
            assert list(store.walk()) == before[1]
            with pytest.raises(errors.ResourceExhausted):
                store.label("base", {"long": "y" * 100_000})
            assert store.stat("base").labels == {"a": "b"}
            filler.unlink()
            store.cleanup()
            assert listing(store) == before[0]
            store.prepare("after", "base")


@pytest.mark.parametrize("kind", KINDS)
def test_remove_works_on_a_full_disk(small: Filesystems, kind: str) -> None:
    disk = small(kind)
    with onlap.open(disk / "root", snapshotter="overlay", sync="none") as store:
        for number in range(20):
            plan = store.prepare(f"key-{number}")[0]
            Path(plan.source, "file").write_bytes(b"x" * 200_000)
        reserve = Path(store.snapshotter.catalog.layout.reserve)
        assert reserve.stat().st_blocks * 512 >= RESERVE_SIZE
        with quiet(store):
            fill(disk)
            # So many changes that the log is full, too.
            with pytest.raises(errors.ResourceExhausted):
                _label_for_ever(store, "key-0")
            for number in range(20):
                store.remove(f"key-{number}")
            assert list(store.walk()) == []
            assert not reserve.exists()
            # Its trees are still in the trash, and so the space is not free yet.
            store.cleanup()
            assert os.listdir(store.snapshotter.catalog.layout.trash) == []
            assert reserve.stat().st_blocks * 512 >= RESERVE_SIZE
            store.prepare("new")


@pytest.mark.parametrize("kind", KINDS)
def test_a_workspace_on_a_full_disk_goes_back_and_forgets(small: Filesystems, kind: str) -> None:
    disk = small(kind)
    with onlap.open(disk / "root", snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        ws = store.workspaces.create("w", "base")
        made = []
        for text in ("one", "two"):
            with ws.mounted() as tree:
                (tree / "file").write_text(text)
            made.append(ws.checkpoint())
        with ws.mounted() as tree:
            (tree / "large").write_bytes(b"x" * 1_000_000)
        with quiet(store):
            fill(disk)
            with pytest.raises(errors.ResourceExhausted):
                _label_for_ever(store, "base")
            ws.rollback(made[0])
            with ws.mounted() as tree:
                assert (tree / "file").read_text() == "one"
                assert not (tree / "large").exists()
            fill(disk)
            ws.forget(made[1])
            assert [each.id for each in ws.log()] == ["base", made[0].id]
            ws.remove()
            assert list(store.workspaces) == []
            store.cleanup()
            assert store.workspaces.create("w", "base").log()[0].id == "base"


@pytest.mark.parametrize("kind", KINDS)
def test_a_reserve_that_finds_no_room_is_no_error(small: Filesystems, kind: str) -> None:
    disk = small(kind)
    with onlap.open(disk / "root", snapshotter="overlay") as store, quiet(store):
        layout = store.snapshotter.catalog.layout
        layout.drop_reserve()
        filler = fill(disk)
        layout.make_reserve()
        assert not os.path.exists(layout.reserve)
        filler.unlink()
        store.cleanup()
        assert os.stat(layout.reserve).st_blocks * 512 >= RESERVE_SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_can_be_opened_to_remove_something(small: Filesystems, kind: str) -> None:
    """As the command does it: each is a process of its own."""
    disk = small(kind)
    with onlap.open(disk / "root", snapshotter="overlay", sync="none") as store:
        plan = store.prepare("key")[0]
        Path(plan.source, "file").write_bytes(b"x" * 1_000_000)
    fill(disk)
    with onlap.open(disk / "root") as store:
        store.remove("key")
        store.cleanup()
        assert list(store.walk()) == []
    with onlap.open(disk / "root") as store:
        store.prepare("new")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_commit_on_a_full_disk_is_followed_by_one_that_works(small: Filesystems, kind: str) -> None:
    disk = small(kind)
    with onlap.open(disk / "root", snapshotter="overlay", sync="none") as store, quiet(store):
        database = store.snapshotter.catalog.database
        database.write(lambda c: records.put_setting(c, "before", "1"))
        filler = fill(disk)
        with pytest.raises(errors.ResourceExhausted):
            database.write(lambda c: records.put_setting(c, "large", "x" * 2_000_000))
        filler.unlink()
        database.write(lambda c: records.put_setting(c, "after", "1"))
        keys = {row[0] for row in database.read(lambda c: c.execute("SELECT key FROM settings").fetchall())}
        assert {"before", "after"} <= keys
        assert "large" not in keys


@pytest.mark.needs("ext4")
def test_no_inodes_left(loop_ext4: Callable[[int], Path]) -> None:
    disk = loop_ext4(24)
    with onlap.open(disk / "root", snapshotter="overlay", sync="none") as store, quiet(store):
        store.prepare("key")
        (disk / "many").mkdir()
        with pytest.raises(OSError, match="No space left"):
            _make_files_for_ever(disk / "many")
        with pytest.raises(errors.ResourceExhausted, match="inodes"):
            store.prepare("other")
        assert [info.name for info in store.walk()] == ["key"]
        store.remove("key")
        store.cleanup()
        store.prepare("other")


# A filesystem that is read-only


@pytest.mark.needs("mount")
def test_a_new_root_on_a_readonly_filesystem_is_a_clear_error(small: Filesystems) -> None:
    disk = small("tmpfs")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises((errors.FailedPrecondition, errors.PermissionDenied), match="read-only"):
        onlap.open(disk / "root", snapshotter="overlay")


# A disk that has nothing left at all: each call opens the root anew, as the command does.


def exhaust(disk: Path, *, inodes: bool) -> None:
    """Take every block, or every inode."""
    (disk / "many").mkdir()
    (disk / "filler").touch()
    if not inodes:
        # At once where that goes, and the rest byte by byte.
        left = os.statvfs(disk)
        subprocess.run(["fallocate", "-l", str(left.f_bavail * left.f_frsize - (4 << 20)), disk / "large"], check=True)
        fill(disk)
    with pytest.raises(OSError, match="No space left"):
        _make_files_for_ever(disk / "many")


@pytest.mark.parametrize(
    "kind, inodes",
    [
        pytest.param("ext4", True, marks=pytest.mark.needs("ext4")),
        pytest.param("ext4", False, marks=pytest.mark.needs("ext4")),
        pytest.param("xfs", False, marks=pytest.mark.needs("xfs")),
    ],
)
def test_an_exhausted_disk_can_be_looked_at_and_emptied(
    loop_fs: Callable[..., Path], tmp_path: Path, kind: str, inodes: bool
) -> None:
    disk = loop_fs("ext4", 24, "-N", "256") if kind == "ext4" else loop_fs(kind, 320)
    root = disk / "root"
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_bytes(b"x" * 500_000)
        store.prepare("one", "base")
        store.prepare("two", "base")
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "file").touch()
        store.images.import_(tmp_path / "source", name="image:1", unpack=False)
        there = {info.name for info in store.walk()}
    exhaust(disk, inodes=inodes)
    with onlap.open(root, timeout=5) as store:
        assert {info.name for info in store.walk()} == there
        store.images.export("image:1", tmp_path / "image.tar")
        assert store.usage("base").inodes == 2
        assert list(store.diff("one")) == []
        with pytest.raises(errors.ResourceExhausted):
            store.prepare("three", "base")
    with onlap.open(root, timeout=5) as store:
        store.export("base", tmp_path / "saved")
        assert (tmp_path / "saved" / "file").stat().st_size == 500_000
    with onlap.open(root, timeout=5) as store:
        store.remove("one")
        assert "one" not in store
    with onlap.open(root, timeout=5) as store:
        store.cleanup()
        assert {info.name for info in store.walk()} == there - {"one"}
        assert os.listdir(root / "trash") == []
        # What was freed is reserved first.
        assert (root / "reserve.4").exists()


def test_the_trash_is_emptied_before_a_removal_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with onlap.open(root, snapshotter="overlay", sync="none") as store, quiet(store):
        catalog = store.snapshotter.catalog
        for key in ("one", "two"):
            store.prepare(key)
        store.remove("one")
        assert os.listdir(catalog.layout.trash) == ["1"]
        write = catalog.database.write

        def full_while_trash_waits(operation: Callable[[Connection], object]) -> object:
            if os.listdir(catalog.layout.trash):
                raise errors.ResourceExhausted("no space left")
            return write(operation)

        monkeypatch.setattr(catalog.database, "write", full_while_trash_waits)
        store.remove("two")
        assert list(store.walk()) == []
        assert not os.path.exists(catalog.layout.reserve)  # it was tried first


@pytest.mark.needs("mount")
@pytest.mark.parametrize("left", ["nothing", "log", "log without index"])
@pytest.mark.parametrize("snapshotter", ["overlay", "native"])
def test_a_readonly_filesystem(root: Path, tmp_path: Path, left: str, snapshotter: SnapshotterKind) -> None:
    (root / "store").mkdir(mode=0o700)
    with onlap.open(root / "store", snapshotter=snapshotter, sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        store.prepare("key", "base")
        with store.mounted("key") as tree:
            (tree / "new").write_text("new")
        store.view("view", "base")
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "file").touch()
        store.images.import_(tmp_path / "source", name="image:1")
    if left != "nothing":
        child = os.fork()
        if not child:
            with onlap.open(root / "store") as store:
                store.label("base", {"a": "b"})
                os._exit(0)
        os.waitpid(child, 0)
        assert (root / "store" / "catalog.db-wal").stat().st_size
    if left == "log without index":
        (root / "store" / "catalog.db-shm").unlink()
    subprocess.run(["mount", "--bind", root, root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
        with onlap.open(root / "store", timeout=5) as store:
            image = store.images.get("image:1")
            assert {info.name for info in store.walk()} == {"base", "key", "view", *image.chain_ids}
            store.images.export("image:1", tmp_path / "image.tar")
            assert store.images.unpack("image:1") == image.chain_ids[-1]
            assert store.stat("base").labels == ({} if left == "nothing" else {"a": "b"})
            assert store.usage("base").inodes == 2
            assert [change.path for change in store.diff("key")] == ["new"]
            for name, files in {"base": ["file"], "key": ["file", "new"], "view": ["file"]}.items():
                store.export(name, tmp_path / name)
                assert sorted(os.listdir(tmp_path / name)) == files
                with (tmp_path / f"{name}.tar").open("wb") as out:
                    store.export(name, out)
                with store.mounted(name) as tree:
                    assert sorted(os.listdir(tree)) == files
            calls: list[Callable[[], object]] = [
                lambda: store.remove("view"),
                lambda: store.prepare("other"),
                lambda: store.label("key", {}),
            ]
            for call in calls:
                with pytest.raises(errors.FailedPrecondition, match="read-only"):
                    call()
            store.cleanup()
    finally:
        subprocess.run(["umount", root], check=True)
    with onlap.open(root / "store") as store:
        store.remove("view")


@pytest.mark.long
@pytest.mark.needs("btrfs")
def test_btrfs_without_room_for_what_it_knows_of_files(loop_fs: Callable[..., Path]) -> None:
    """Its metadata have a place of their own, without which nothing can be made or renamed; data have room enough."""
    disk = loop_fs("btrfs", 128)
    root = disk / "root"
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        for key in ("one", "two", "three"):
            Path(store.prepare(key)[0].source, "file").write_bytes(b"x" * 5000)
    for size in (15_000, 1):
        for number in range(1000):
            try:
                (disk / f"many-{size}-{number}").touch()
                for name in range(1000):
                    os.setxattr(disk / f"many-{size}-{number}", f"user.{name}", bytes(size))
            except OSError:  # ENOSPC
                break
        os.sync()
    with pytest.raises(OSError, match="No space left"):
        (disk / "other").mkdir()
    for key in ("one", "two", "three"):
        with onlap.open(root, timeout=5) as store:
            store.remove(key)
            assert key not in store
    with onlap.open(root, timeout=5) as store:
        store.cleanup()
        assert os.listdir(root / "snapshots") == os.listdir(root / "trash") == []


def test_what_cannot_be_renamed_is_deleted_where_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with onlap.open(root, snapshotter="overlay", sync="none") as store, quiet(store):
        layout = store.snapshotter.catalog.layout
        for key in ("one", "two"):
            store.prepare(key)
        left = Path(layout.staging, "left")
        (left / "tree").mkdir(parents=True)
        rename = os.rename

        def full(source: str, target: str) -> None:
            if target.startswith(layout.trash):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rename(source, target)

        monkeypatch.setattr(os, "rename", full)
        store.remove("one")
        with store.snapshotter.catalog.hold([2]):
            store.remove("two", force=True)
            assert os.listdir(layout.snapshots) == ["2"]  # as somebody reads it
        store.cleanup()
        assert os.listdir(layout.snapshots) == []
        assert not left.exists()


@pytest.mark.needs("btrfs")
def test_a_program_with_the_root_open_outlives_a_full_btrfs(loop_fs: Callable[..., Path]) -> None:
    """A page of SQLite's shared memory that finds no room would be SIGBUS."""
    disk = loop_fs("btrfs", 128)
    program = """
import os, sys
from pathlib import Path
import onlap
from onlap import errors
disk = Path(sys.argv[1])
store = onlap.open(disk / "root", snapshotter="overlay", sync="none", timeout=5)
for key in ("one", "two"):
    store.prepare(key)
store.snapshotter.catalog._janitor.stop()
os.sync()
for name in ("first", "second"):
    with (disk / name).open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError:
                pass
    os.sync()
try:
    store.label("one", {"a": "b" * 3000})
except errors.ResourceExhausted as error:
    print(error.hint)
store.remove("one")
assert "one" not in store
store.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, disk],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "free some space or inodes there\n"), done
