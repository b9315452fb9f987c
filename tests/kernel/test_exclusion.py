"""Who mounts, writes, commits and removes at the same time: what was looked at holds until the end."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.locks import Flock
from onlap.mounts import temporary
from onlap.snapshots import exclusion
from onlap.store import Store

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="layer", timeout=10) as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        yield store


def layer(name: str = "new") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def test_a_tree_that_another_program_has_locked_is_not_lost(store: Store) -> None:
    """Whoever removes one deletes its record first, so that a lock is no sign of that."""
    place = store.snapshotter.catalog.layout.snapshot(store.snapshotter.record("base").id)
    with Flock(place) as held:
        assert held.lock()
        with pytest.raises(errors.Unavailable, match="locked by another program"):
            list(store.diff("base"))
    list(store.diff("base"))


class Outcome(threading.Thread):
    """What became of a call in another thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def ended(self) -> BaseException | None:
        self.join(30)
        assert not self.is_alive()
        return self.error


@contextmanager
def during_sync(store: Store, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> Iterator[list[Outcome]]:
    """Start a call in the middle of a commit, which goes on once the call waits for it."""
    outcomes: list[Outcome] = []
    catalog = store.snapshotter.catalog
    sync, waits = catalog.sync, threading.Event()

    def sync_slowly() -> None:
        outcomes.append(Outcome(call))
        # As the loop for the lock has it: its first rest says that the call has come to the lock, and did not get it;
        # who has only a plan does not wait.
        while not waits.wait(0.01) and outcomes[0].is_alive():
            pass
        sync()

    monkeypatch.setattr(catalog, "sync", sync_slowly)
    monkeypatch.setattr("onlap.mounts.unmount.time.sleep", lambda _seconds: waits.set())
    yield outcomes
    waits.set()


def mount_and_write(store: Store) -> None:
    with store.mounted("key") as tree:
        (tree / "late").write_text("late")


@pytest.mark.parametrize("parent", ["base", None], ids=["overlay", "bind"])
@pytest.mark.parametrize("how", ["mounted", "plan", "detached", "apply", "import", "remove"])
def test_nothing_begins_in_the_middle_of_a_commit(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str | None, how: str
) -> None:
    from onlap.snapshots.transfer import directories

    (tmp_path / "late").touch()

    def detached() -> None:
        with store.mounted("key", detached=True) as tree:
            (tree / "late").touch()

    plan = store.prepare("key", parent)

    def mount_the_plan() -> None:
        with onlap.mounted(plan) as tree:
            (tree / "late").touch()

    calls: dict[str, Callable[[], object]] = {
        "mounted": lambda: mount_and_write(store),
        "plan": mount_the_plan,
        "detached": detached,
        "apply": lambda: store.apply("key", io.BytesIO(layer("late"))),
        "import": lambda: directories.copy_in(store.snapshotter, "key", str(tmp_path), ["root", "ext4*"]),
        "remove": lambda: store.remove("key"),
    }
    mount_and_write(store) if how != "mounted" else store.apply("key", io.BytesIO(layer("early")))
    tree = Path(store.snapshotter.catalog.layout.tree(store.snapshotter.record("key").id))
    before = sorted(os.listdir(tree))
    with during_sync(store, monkeypatch, calls[how]) as outcomes:
        store.commit("name", "key")
    error = outcomes[0].ended()
    assert isinstance(error, (errors.NotFound, errors.FailedPrecondition)), error
    assert store.stat("name").kind == "committed"
    assert sorted(os.listdir(tree)) == before


def test_a_commit_waits_for_an_apply_that_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.prepare("key", "base")
    waits = threading.Event()
    monkeypatch.setattr("onlap.mounts.unmount.time.sleep", lambda _seconds: waits.set())
    read, write = os.pipe()
    begun = threading.Event()

    class Source(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            begun.set()
            return super().readinto(buffer)

        def read(self, size: int | None = -1) -> Any:
            begun.set()
            return super().read(-1 if size is None else size)

    with Source(read, "rb") as source:
        applying = Outcome(lambda: store.apply("key", source))
        assert begun.wait(10)
        committing = Outcome(lambda: store.commit("name", "key"))
        assert waits.wait(10)
        with open(write, "wb") as out:
            out.write(layer())
        assert applying.ended() is None
        assert committing.ended() is None
    with store.mounted("name") as tree:
        assert sorted(os.listdir(tree)) == ["file", "new"]


def test_a_commit_beside_an_apply_that_does_not_end_is_busy(root: Path, store: Store) -> None:
    store.prepare("key", "base")
    read, write = os.pipe()
    with open(read, "rb") as source, open(write, "wb") as out, onlap.open(root, timeout=0.05) as other:
        with store.mounted("key"):
            pass
        begun = threading.Event()
        applying = Outcome(lambda: store.apply("key", source, progress=lambda _: begun.set()))
        out.write(layer("one")[:1024])
        out.flush()
        tree = store.snapshotter.catalog.layout.tree(store.snapshotter.record("key").id)
        fd = os.open(tree, os.O_RDONLY)
        try:
            while not exclusion._lock_holders(fd, b"WRITE"):
                assert applying.is_alive()
        finally:
            os.close(fd)
        calls: list[Callable[[], object]] = [
            lambda: other.commit("name", "key"),
            lambda: other.remove("key"),
            lambda: mount_and_write(other),
        ]
        for call in calls:
            with pytest.raises(errors.Busy) as caught:
                call()
            assert caught.value.holders[0].startswith(f"pid {os.getpid()} (")
        out.write(layer("one")[1024:])
        out.close()
        assert applying.ended() is None


def test_of_two_who_mount_at_once_one_does(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the other's mount when it looks."""
    store.prepare("key", "base")
    mounted = temporary.mounted
    errors_seen: list[BaseException] = []

    def meanwhile(*args: object, **options: object) -> object:
        monkeypatch.setattr(temporary, "mounted", mounted)
        try:
            mount_and_write(store)
        except errors.OnlapError as error:
            errors_seen.append(error)
        return mounted(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(temporary, "mounted", meanwhile)
    mount_and_write(store)
    assert [type(error) for error in errors_seen] == [errors.Busy]


@pytest.mark.parametrize("parent", ["base", None], ids=["overlay", "bind"])
@pytest.mark.parametrize("opened", [True, False])
def test_an_old_plan_is_not_mounted(store: Store, parent: str | None, opened: bool) -> None:
    plans = {key: store.prepare(key, parent) for key in ("committed", "removed")}
    store.commit("name", "committed")
    store.remove("removed")
    if not opened:
        store.close()
    with pytest.raises(errors.FailedPrecondition, match="was committed as name"), onlap.mounted(plans["committed"]):
        pass
    with pytest.raises(errors.NotFound), onlap.mounted(plans["removed"]):
        pass


def test_a_forked_child_keeps_no_lock(store: Store) -> None:
    """It has the lock's open file, too: a plain close in the parent would leave that locked."""
    store.prepare("key", "base")
    reader, writer = os.pipe()
    with store.mounted("key"):
        child = os.fork()
        if not child:
            os.read(reader, 1)
            os._exit(0)
    try:
        store.commit("name", "key")
        assert store.stat("name").kind == "committed"
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_forked_child_that_leaves_the_block_gives_nothing_back(store: Store) -> None:
    store.prepare("key")
    record = store.snapshotter.record("key")
    block = exclusion.mounting(store.snapshotter, record)
    with block:
        child = os.fork()
        if not child:
            try:
                block.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(errors.Busy):
            store.commit("name", "key")


# Removal


_HOLDER = """
import os, sys
import onlap
with onlap.open(sys.argv[1]) as store, store.mounted(sys.argv[2], detached=sys.argv[3] == "detached"):
    os.write(1, b"ready\\n")
    sys.stdin.readline()
"""


@contextmanager
def another_process(root: Path, key: str, how: str) -> Iterator[None]:
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", _HOLDER, str(root), key, how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.communicate("\n")


@pytest.mark.parametrize(
    "where, kind",
    [
        *[(where, kind) for where in ("here", "detached") for kind in ("overlay", "bind", "view", "view of two")],
        *[("by the store", kind) for kind in ("overlay", "view")],
        ("elsewhere", "overlay"),
        ("elsewhere", "view of two"),
        ("detached elsewhere", "bind"),
    ],
)
def test_what_is_mounted_is_removed_only_by_force(store: Store, where: str, kind: str) -> None:
    with store.build("top", "base") as tree:
        (tree / "more").touch()
    make = {
        "overlay": lambda: store.prepare("key", "base"),
        "bind": lambda: store.prepare("key"),
        "view": lambda: store.view("key", "base"),
        "view of two": lambda: store.view("key", "top"),
    }
    plan = make[kind]()
    mounts: dict[str, Callable[[], object]] = {
        "here": lambda: onlap.mounted(plan),
        "by the store": lambda: store.mounted("key"),
        "detached": lambda: store.mounted("key", detached=True),
        "elsewhere": lambda: another_process(store.root, "key", "attached"),
        "detached elsewhere": lambda: another_process(store.root, "key", "detached"),
    }
    with ExitStack() as stack:
        stack.enter_context(mounts[where]())  # type: ignore[arg-type]
        with pytest.raises(errors.Busy, match="is mounted") as caught:
            store.remove("key")
        assert caught.value.holders
        assert "key" in store
        store.remove("key", force=True)
        assert "key" not in store
        make[kind]()
    store.remove("key")


def test_another_views_mount_is_no_hindrance(store: Store) -> None:
    store.view("one", "base")
    plan = store.view("other", "base")
    with onlap.mounted(plan):
        store.remove("one")
        with pytest.raises(errors.Busy):
            store.remove("other")


def test_what_was_never_mounted_costs_no_look_at_the_mounts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("onlap.mounts.mountinfo.parse", refuse)
    store.prepare("key", "base")
    store.commit("name", "key")
    store.remove("name")
    store.prepare("key", "base")
    store.remove("key")
    assert {info.name for info in store.walk()} == {"base"}


def test_what_lost_its_tree_can_be_removed(store: Store) -> None:
    store.prepare("key", "base")
    layout = store.snapshotter.catalog.layout
    os.rename(layout.snapshot(store.snapshotter.record("key").id), f"{layout.trash}/lost")
    store.remove("key")
    assert "key" not in store


def test_the_command_refuses_too(store: Store) -> None:
    with onlap.mounted(store.prepare("key", "base")) as tree:

        def rm(*options: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "onlap", "--root", str(store.root), "rm", "key", *options],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                capture_output=True,
                text=True,
            )

        done = rm()
        assert done.returncode == 5
        assert str(tree) in done.stderr
        assert "--force" in done.stderr
        assert rm("--force").returncode == 0
    assert "key" not in store


def test_who_holds_a_tree_is_told_though_its_name_is_gone(store: Store) -> None:
    """Of many that remove one snapshot, the fastest moves its tree away while the others ask who is in the way."""
    store.prepare("key")
    layout = store.snapshotter.catalog.layout
    identifier = store.snapshotter.record("key").id
    with Flock(layout.tree(identifier)) as held:
        assert held.lock(shared=True)
        os.rename(layout.snapshot(identifier), f"{layout.trash}/{identifier}")
        assert any(f"pid {os.getpid()} " in line for line in exclusion._lock_holders(held.fd, b"READ"))
