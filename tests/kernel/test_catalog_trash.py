"""Removed trees that somebody still mounts or reads: they wait in the trash, and nothing is deleted through a mount."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.catalog.disk.staging import Staging
from onlap.locks import Flock
from onlap.mounts import kernel
from onlap.mounts.unmount import unmount
from onlap.store import Store

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        yield store


def trash(store: Store) -> list[str]:
    return sorted(os.listdir(store.snapshotter.catalog.layout.trash))


def number(store: Store, key: str) -> int:
    return store.snapshotter.record(key).id


@contextmanager
def elsewhere(*script: str) -> Iterator[None]:
    """A process in a mount namespace of its own that runs a shell script there and stays."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join((*script, "echo ready", "read _"))],
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


def quoted(path: object) -> str:
    import shlex

    return shlex.quote(str(path))


def by_mount(plan: onlap.Mount, target: Path) -> str:
    return f"mount -t {plan.type} -o {quoted(','.join(plan.options))} {quoted(plan.source)} {quoted(target)}"


def test_a_removed_tree_is_deleted(store: Store) -> None:
    store.prepare("key", "base")
    store.remove("key")
    store.cleanup()
    assert trash(store) == []
    assert os.listdir(store.snapshotter.catalog.layout.snapshots) == [str(number(store, "base"))]


@pytest.mark.parametrize("way", ["fd", "proc", "string"])
def test_an_overlay_mounted_here_keeps_its_trees(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "string" or kernel.layers_by() != kernel.LAYERS_BY_STRING:
        monkeypatch.setattr(kernel, "_layers_by", way)
    plan = store.prepare("key", "base")
    identifier = number(store, "key")
    with onlap.mounted(plan) as tree:
        (tree / "new").write_text("new")
        store.remove("key", force=True)
        store.remove("base", force=True)
        store.cleanup()
        assert str(identifier) in trash(store)
        assert (tree / "new").read_text() == "new"
        assert (tree / "file").read_text() == "base"
        (tree / "more").write_text("more")
    store.cleanup()
    assert trash(store) == []


def test_an_overlay_mounted_in_another_namespace_keeps_its_trees(store: Store, tmp_path: Path) -> None:
    plan = store.prepare("key", "base")[0]
    target = tmp_path / "target"
    target.mkdir()
    with elsewhere(by_mount(plan, target)):
        store.remove("key", force=True)
        store.remove("base", force=True)
        store.cleanup()
        assert len(trash(store)) == 2
    store.cleanup()
    assert trash(store) == []


def test_a_view_keeps_all_its_layers(store: Store) -> None:
    store.prepare("second", "base")
    store.commit("top", "second")
    plan = store.view("view", "top")
    with onlap.mounted(plan) as tree:
        for key in ("view", "top", "base"):
            store.remove(key, force=True)
        store.cleanup()
        # Nothing of the view itself is mounted, but both of its layers are.
        assert len(trash(store)) == 2
        assert (tree / "file").read_text() == "base"
    store.cleanup()
    assert trash(store) == []


@pytest.mark.parametrize("here", [True, False], ids=["here", "in another namespace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bind_mount_keeps_its_tree(store: Store, tmp_path: Path, here: bool, when: str) -> None:
    """A bind shows where its directory is now: in snapshots/ or in trash/."""
    store.prepare("key")
    layout = store.snapshotter.catalog.layout
    identifier = number(store, "key")
    source, target = layout.tree(identifier), tmp_path / "target"
    Path(source, "file").write_text("mine")
    target.mkdir()
    if when == "after":
        store.remove("key", force=True)
        source = f"{layout.trash}/{identifier}/fs"
        # A reader keeps the background away until it is mounted.
    with ExitStack() as stack:
        if when == "after" and not os.path.isdir(source):
            pytest.fail("the background was faster than 250 ms")
        if here:
            subprocess.run(["mount", "--bind", source, target], check=True)
            stack.callback(lambda: subprocess.run(["umount", target], check=True))
        else:
            stack.enter_context(elsewhere(f"mount --bind {quoted(source)} {quoted(target)}"))
        if when == "before":
            store.remove("key", force=True)
        store.cleanup()
        assert trash(store) == [str(identifier)]
        assert Path(layout.trash, str(identifier), "fs", "file").read_text() == "mine"
    store.cleanup()
    assert trash(store) == []


def test_a_reader_keeps_its_tree(store: Store) -> None:
    store.prepare("key")
    identifier = number(store, "key")
    catalog = store.snapshotter.catalog
    with catalog.hold([identifier]):
        store.remove("key", force=True)
        store.cleanup()
        assert trash(store) == [str(identifier)]
    store.cleanup()
    assert trash(store) == []
    with pytest.raises(errors.NotFound), catalog.hold([identifier]):
        pass


def test_a_detached_mount_keeps_its_trees(store: Store) -> None:
    store.prepare("key", "base")
    with store.mounted("key", detached=True) as tree:
        (tree / "new").write_text("new")
        store.remove("key", force=True)
        store.remove("base", force=True)
        store.cleanup()
        assert len(trash(store)) == 2
        assert (tree / "file").read_text() == "base"
    store.cleanup()
    assert trash(store) == []


@pytest.mark.parametrize("kind", ["directory of the same filesystem", "tmpfs", "file"])
def test_nothing_is_deleted_through_a_mount_inside(store: Store, tmp_path: Path, kind: str) -> None:
    """As somebody's container left it: a foreign mount inside the removed tree, in this namespace."""
    store.prepare("key")
    layout = store.snapshotter.catalog.layout
    identifier = number(store, "key")
    tree = Path(layout.tree(identifier))
    # On the filesystem of the root itself: st_dev does not differ there.
    foreign = Path(layout.root, "content", "foreign")
    foreign.mkdir(parents=True)
    (foreign / "precious").write_text("precious")
    (tree / "a").mkdir()
    inside = tree / "a" / "inside"
    if kind == "file":
        inside.touch()
        subprocess.run(["mount", "--bind", foreign / "precious", inside], check=True)
    else:
        inside.mkdir()
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inside], check=True)
            (inside / "precious").write_text("precious")
        else:
            subprocess.run(["mount", "--bind", foreign, inside], check=True)
    (tree / "z").write_text("deleted")
    store.remove("key")
    moved = Path(layout.trash, str(identifier), "fs", "a", "inside")
    try:
        store.cleanup()
        assert trash(store) == [str(identifier)]
        assert (foreign / "precious").read_text() == "precious"
        assert (moved if kind == "file" else moved / "precious").read_text() == "precious"
    finally:
        subprocess.run(["umount", moved], check=True)
    store.cleanup()
    assert trash(store) == []
    assert (foreign / "precious").read_text() == "precious"


def test_a_root_below_a_symlink_keeps_mounted_trees(tmp_path: Path, root: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    (root / "store").mkdir(mode=0o700)
    with onlap.open(link / "store", snapshotter="overlay", sync="none") as store:
        store.prepare("first")
        store.commit("base", "first")
        plan = store.prepare("key", "base")
        identifier = number(store, "key")
        with onlap.mounted(plan) as tree:
            (tree / "new").write_text("new")
            store.remove("key", force=True)
            store.cleanup()
            assert trash(store) == [str(identifier)]
            assert (tree / "new").read_text() == "new"


def test_a_root_that_is_bound_elsewhere_keeps_mounted_trees(tmp_path: Path, root: Path) -> None:
    """One disk, two mount points: a container runtime that sees the root at another path."""
    alias = tmp_path / "alias"
    alias.mkdir()
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        store.prepare("first")
        store.commit("base", "first")
        subprocess.run(["mount", "--bind", root, alias], check=True)
        try:
            with onlap.open(alias, sync="none") as other:
                plan = other.prepare("key", "base")
                identifier = number(other, "key")
                with onlap.mounted(plan) as tree:
                    (tree / "new").write_text("new")
                    store.remove("key", force=True)
                    store.cleanup()
                    assert trash(store) == [str(identifier)]
                    assert (tree / "new").read_text() == "new"
        finally:
            # Lazily: SQLite keeps files of a database open while this process has locks on it through another path.
            unmount(str(alias), lazy=True)


@pytest.mark.parametrize(
    "way, name",
    [
        *[("fd", name) for name in ("a b", "a:b", "a,b", "a\\b", "a\nb", "a=b", "a#b", "a\\040b", "\udcff")],
        *[("string", name) for name in ("a b", "a\nb", "a=b", "a#b", "\udcff")],
        *[("string", name) for name in ("a:b", "a,b", "a\\b", "a\\040b")],
    ],
)
def test_a_root_of_any_name_keeps_mounted_trees(
    root: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    if way == "string" or kernel.layers_by() != kernel.LAYERS_BY_STRING:
        monkeypatch.setattr(kernel, "_layers_by", way)
    with onlap.open(root / name, snapshotter="overlay", sync="none") as store:
        store.prepare("first")
        store.commit("base", "first")
        with onlap.mounted(store.prepare("key", "base")) as tree:
            (tree / "new").write_text("new")
            store.remove("key", force=True)
            store.remove("base", force=True)
            store.cleanup()
            assert len(trash(store)) == 2
            assert (tree / "new").read_text() == "new"
        store.cleanup()
        assert trash(store) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files immutable")
def test_one_tree_that_cannot_be_deleted_does_not_keep_the_others(store: Store) -> None:
    layout = store.snapshotter.catalog.layout
    immutable = []
    for index in range(6):
        store.prepare(f"key-{index}")
        file = Path(layout.tree(number(store, f"key-{index}")), "file")
        file.touch()
        if index % 3 == 0:
            moved = Path(layout.trash, str(number(store, f"key-{index}")), "fs", "file")
            if subprocess.run(["chattr", "+i", file], stderr=subprocess.DEVNULL).returncode:
                pytest.skip("this filesystem has no immutable files")
            immutable.append(moved)
    try:
        for index in range(6):
            store.remove(f"key-{index}", force=True)
        with pytest.raises(errors.PermissionDenied):
            store.cleanup()
        assert len(trash(store)) == len(immutable)
    finally:
        for file in immutable:
            subprocess.run(["chattr", "-i", file], check=True)
    store.cleanup()
    assert trash(store) == []


# Staging


def test_cleanup_waits_for_who_deletes_already(store: Store) -> None:
    """The background takes its time; whoever asks for the space is not to be told that it is free."""
    catalog = store.snapshotter.catalog
    catalog._janitor.stop()
    with store.build("large") as tree:
        for name in range(500):
            (tree / str(name)).touch()
    identifier = number(store, "large")
    store.remove("large")
    waits = Path(catalog.layout.trash, str(identifier), "fs")
    background = threading.Thread(target=catalog.trash.sweep, kwargs={"rate": 500.0})
    background.start()
    while len(os.listdir(waits)) == 500:
        assert background.is_alive()
    store.cleanup()
    assert trash(store) == []
    background.join()


def test_cleanup_does_not_wait_for_ever_for_who_holds_a_tree(root: Path, store: Store) -> None:
    """Any program may lock it, or be stopped as it deletes."""
    store.prepare("key")
    tree = store.snapshotter.catalog.layout.snapshot(store.snapshotter.record("key").id)
    store.close()
    with onlap.open(root, snapshotter="overlay", sync="none", timeout=0.05) as impatient, Flock(tree) as held:
        held.lock()
        impatient.remove("key", force=True)
        assert impatient.snapshotter.catalog.garbage.cleanup() == 0
        assert len(impatient.snapshotter.catalog.trash.names()) == 1


def test_cleanup_leaves_what_a_living_process_builds(root: Path, store: Store) -> None:
    layout = store.snapshotter.catalog.layout
    living, dead = Staging(layout.staging), Path(layout.staging, "4711-dead", "1")
    path = Path(living.new())
    (path / "fs").mkdir()
    (dead / "fs").mkdir(parents=True)
    (dead / "fs" / "file").touch()
    store.cleanup()
    assert (path / "fs").is_dir()
    assert not dead.parent.exists()
    living.discard(str(path))
    living.close()
    assert not path.parent.exists()


def test_cleanup_takes_orphans_and_leaves_records(store: Store) -> None:
    layout = store.snapshotter.catalog.layout
    store.prepare("key")
    orphan = Path(layout.snapshot(number(store, "key") + 7), "fs")
    orphan.mkdir(parents=True)
    store.cleanup()
    assert not orphan.parent.exists()
    assert os.path.isdir(layout.tree(number(store, "key")))
    assert os.path.isdir(layout.tree(number(store, "base")))
