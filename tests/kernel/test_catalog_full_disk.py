"""A full or read-only disk: what cannot be done leaves nothing behind, and removing still works."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.catalog import records
from onlap.catalog.layout import RESERVE_SIZE
from onlap.store import Store

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


def _label_for_ever(store: Store) -> None:
    for number in range(100_000):
        store.label("key-0", {"n": f"{number}" * 1000})


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
                _label_for_ever(store)
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
@pytest.mark.parametrize("made", [True, False], ids=["an old root", "a new one"])
def test_a_readonly_filesystem_is_a_clear_error(small: Filesystems, made: bool) -> None:
    disk = small("tmpfs")
    if made:
        onlap.open(disk / "root", snapshotter="overlay").close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises((errors.FailedPrecondition, errors.PermissionDenied), match="read-only"):
        onlap.open(disk / "root", snapshotter="overlay")
