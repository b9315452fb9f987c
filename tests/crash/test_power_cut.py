"""A power cut, as FS_IOC_SHUTDOWN makes one: what was acknowledged is there, and what could not be kept is named.

With a journal in steady state a durable row of the catalog does not make the fresh directory durable that it belongs
to: 20 of 20 acknowledged rows survive NOLOGFLUSH, and 20 of 20 directories do not.
"""

from __future__ import annotations

import fcntl
import gc
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import capabilities
import onlap
from crash.children import in_child
from onlap import errors
from onlap.catalog.records import Record
from onlap.store import Store

pytestmark = pytest.mark.needs("ext4", "overlay")

# include/uapi/linux/fs.h and fs/ext4/ext4.h
FS_IOC_SHUTDOWN = 0x8004587D
FLAGS = {"default": 0, "logflush": 1, "nologflush": 2}
COUNT = 20

T = TypeVar("T")


class Machine:
    """A filesystem whose power can be cut, and a root on it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.root = target / "root"
        self._device = subprocess.run(
            ["findmnt", "-no", "SOURCE", target], check=True, capture_output=True, text=True
        ).stdout.strip()

    def open(self, **options: object) -> Store:
        return onlap.open(self.root, **options)  # type: ignore[arg-type]

    def cut(self, flag: str) -> None:
        """From now on nothing reaches the disk."""
        fd = os.open(self.target, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", FLAGS[flag]))
        finally:
            os.close(fd)

    def reboot(self) -> None:
        """Mount the filesystem again, which replays its journal."""
        mount, umount = capabilities.find_program("mount"), capabilities.find_program("umount")
        assert mount is not None
        assert umount is not None
        subprocess.run([umount, self.target], check=True)
        subprocess.run([mount, "-t", "ext4", self._device, self.target], check=True)


@pytest.fixture
def machine(loop_ext4: Callable[[int], Path]) -> Iterator[Machine]:
    yield Machine(loop_ext4(128))
    gc.collect()  # connections that a failed query dropped (tests/pure/test_catalog_commit.py) keep it busy


def steady(store: Store) -> None:
    """The catalog's log has its size, and the journal is written: now a commit's fdatasync takes nothing along.

    A log that still grows would: the file's new size goes through the journal, and so does all that was before it.
    """
    for number in range(3):
        store.prepare(f"steady-{number}")
        store.remove(f"steady-{number}")
    store.snapshotter.catalog.database._grow_log()
    os.sync()


def die(machine: Machine, flag: str, life: Callable[[], T]) -> T:
    """Run `life` in a process whose machine loses power right after it, and boot again. What `life` returned.

    A process of its own, since nothing that it has open on a dead filesystem could be closed in order.
    """
    answer = in_child(life, lambda: machine.cut(flag))
    machine.reboot()
    return answer


@pytest.mark.parametrize(
    "snapshotter, flag",
    [
        *[("overlay", flag) for flag in FLAGS],
        ("native", "default"),
        ("native", "logflush"),
        ("native", "nologflush"),
    ],
)
def test_every_acknowledged_record_is_there_and_usable(machine: Machine, snapshotter: str, flag: str) -> None:
    def life() -> dict[str, onlap.Info]:
        store = machine.open(snapshotter=snapshotter, sync="layer")
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        store.prepare("empty-key")
        store.commit("empty", "empty-key")
        steady(store)
        for number in range(COUNT):
            store.prepare(f"active-{number}", "base" if number % 2 else None, {"n": str(number)})
            store.prepare(f"key-{number}", "empty")
            store.commit(f"empty-{number}", f"key-{number}", {"n": str(number)})
        store.view("view", "base")
        return {info.name: info for info in store.walk()}

    expected = die(machine, flag, life)
    with machine.open() as store:
        assert {info.name: info for info in store.walk()} == expected
        assert store.snapshotter.catalog.lost == []
        for number in range(COUNT):
            with store.mounted(f"active-{number}") as tree:
                (tree / "written").write_text("after")
                if number % 2:
                    assert (tree / "file").read_text() == "base"
            store.commit(f"after-{number}", f"active-{number}")
            with store.mounted(f"empty-{number}") as tree:
                assert os.listdir(tree) == []
            assert store.usage(f"empty-{number}").inodes == 1
        with store.mounted("view") as tree:
            assert (tree / "file").read_text() == "base"
        with store.build("new", "base") as tree:
            (tree / "new").touch()


def test_a_fresh_directory_is_lost_while_its_row_is_kept(machine: Machine) -> None:
    """The fact that all of this is for; without it the other tests of this file would prove nothing."""

    def life() -> list[str]:
        store = machine.open(snapshotter="overlay", sync="layer")
        steady(store)
        for number in range(COUNT):
            store.prepare(f"key-{number}")
        return [store.snapshotter.catalog.layout.tree(store.snapshotter.record(f"key-{n}").id) for n in range(COUNT)]

    trees = die(machine, "nologflush", life)
    assert sum(map(os.path.isdir, trees)) < COUNT // 2
    with machine.open() as store:
        assert sum(map(os.path.isdir, trees)) == COUNT
        assert len(list(store.walk())) == COUNT


@pytest.mark.parametrize("flag", FLAGS)
def test_a_synced_layer_is_whole(machine: Machine, flag: str) -> None:
    def life() -> bool:
        store = machine.open(snapshotter="overlay", sync="layer")
        with store.build("base") as tree:
            (tree / "below").write_text("below")
        steady(store)
        for number in range(COUNT):
            with store.build(f"layer-{number}", "base") as tree:
                (tree / "file").write_text(f"content {number}" * 1000)
                (tree / "directory").mkdir(0o751)
                (tree / "below").unlink()
        return True

    die(machine, flag, life)
    with machine.open() as store:
        assert store.snapshotter.catalog.lost == []
        survived = 0
        for number in range(COUNT):
            with store.mounted(f"layer-{number}") as tree:
                survived += (tree / "file").read_text() == f"content {number}" * 1000
                assert (tree / "directory").stat().st_mode & 0o7777 == 0o751
                assert not (tree / "below").exists()
        assert survived == COUNT


def test_a_synced_layer_that_changed_only_its_top_directory_is_whole(machine: Machine) -> None:
    def life() -> bool:
        store = machine.open(snapshotter="overlay", sync="layer")
        steady(store)
        with store.build("base") as tree:
            tree.chmod(0o1777)
            os.setxattr(tree, "user.note", b"kept")
        return True

    die(machine, "nologflush", life)
    with machine.open() as store, store.mounted("base") as tree:
        assert tree.stat().st_mode & 0o7777 == 0o1777
        assert os.getxattr(tree, "user.note") == b"kept"


def test_an_active_native_snapshot_has_its_parents_content(machine: Machine) -> None:
    def life() -> bool:
        store = machine.open(snapshotter="native", sync="layer")
        with store.build("base") as tree:
            for number in range(COUNT):
                (tree / f"file-{number}").write_text("base" * 5000)
        steady(store)
        store.prepare("active", "base")
        return True

    # The journal is written every five seconds, file content after thirty.
    die(machine, "logflush", life)
    with machine.open() as store, store.mounted("active") as tree:
        assert all((tree / f"file-{n}").read_text() == "base" * 5000 for n in range(COUNT))


def lose(machine: Machine) -> Store:
    """A store that has lost the tree of the committed snapshot "lost", with "child", "grandchild" and "view" on it."""

    def life() -> bool:
        store = machine.open(snapshotter="overlay", sync="layer")
        with store.build("whole") as tree:
            (tree / "file").write_text("whole")
        store.close()
        store = machine.open(sync="none")
        steady(store)
        # Prepared and written through its own directory: an unmount of an overlay syncs the filesystem.
        store.prepare("key", "whole")
        Path(store.snapshotter.catalog.layout.tree(store.snapshotter.record("key").id), "new").write_text("new")
        store.commit("lost", "key")
        store.prepare("active", "lost")
        store.view("view", "lost")
        return True

    die(machine, "nologflush", life)
    store = machine.open()
    assert not os.path.isdir(store.snapshotter.catalog.layout.tree(store.snapshotter.record("lost").id))
    return store


def test_an_unsynced_layer_that_is_lost_is_named(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    with lose(machine) as store:
        assert [record.name for record in store.snapshotter.catalog.lost] == ["lost"]
        assert "lost has lost its tree" in caplog.text
        assert {info.name for info in store.walk()} == {"whole", "lost", "active", "view"}
        # The rest works.
        with store.mounted("whole") as tree:
            assert (tree / "file").read_text() == "whole"
        with store.build("other", "whole") as tree:
            (tree / "other").touch()
        store.cleanup()
        for key in ("active", "view", "lost"):
            store.remove(key)
        store.cleanup()
        assert os.listdir(machine.root / "trash") == []
        assert {info.name for info in store.walk()} == {"whole", "other"}


_USES: dict[str, Callable[[Store], object]] = {
    "usage": lambda store: store.usage("lost"),
    "diff": lambda store: list(store.diff("lost")),
    "compare": lambda store: list(store.diff("lost", base="whole")),
    "prepare": lambda store: store.prepare("new", "lost"),
    "mount": lambda store: store.mounted("lost").__enter__(),
    "mount of a child": lambda store: store.mounted("active").__enter__(),
    "diff of a child": lambda store: list(store.diff("active")),
}


def test_every_use_of_a_lost_layer_is_data_loss(machine: Machine) -> None:
    with lose(machine) as store:
        for use in _USES.values():
            with pytest.raises(errors.DataLoss, match="snapshot lost is lost"):
                use(store)
        with pytest.raises(errors.FailedPrecondition, match="is committed and has no mounts"):
            store.mounts("lost")


def test_a_lost_layer_is_named_to_everybody_who_opens_the_root(machine: Machine) -> None:
    lose(machine).close()
    with machine.open() as store:
        assert [record.name for record in store.snapshotter.catalog.lost] == ["lost"]


def test_removed_snapshots_stay_removed_and_ids_are_not_given_again(machine: Machine) -> None:
    def life() -> int:
        store = machine.open(snapshotter="overlay", sync="none")
        for number in range(COUNT):
            store.prepare(f"key-{number}")
        steady(store)
        highest = max(record.id for record in store.snapshotter.catalog.walk(None))
        for number in range(COUNT):
            store.remove(f"key-{number}")
        return highest

    highest = die(machine, "nologflush", life)
    with machine.open() as store:
        assert list(store.walk()) == []
        # The directories are back, since their renames were lost: they have no records, and are garbage.
        store.prepare("new")
        assert store.snapshotter.record("new").id > highest
        store.cleanup()
        assert os.listdir(machine.root / "snapshots") == [str(store.snapshotter.record("new").id)]
        assert os.listdir(machine.root / "trash") == []


def test_a_reopened_root_is_looked_through_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.open(snapshotter="overlay").close()
    looks: list[str] = []
    whole = onlap.OverlaySnapshotter.recreate

    def look(self: onlap.OverlaySnapshotter, record: Record) -> bool:
        looks.append(record.name)
        return whole(self, record)

    monkeypatch.setattr(onlap.OverlaySnapshotter, "recreate", look)
    with machine.open() as store:
        store.prepare("key")
    machine.open().close()
    assert looks == []
    machine.reboot()
    machine.open().close()
    assert looks == ["key"]
