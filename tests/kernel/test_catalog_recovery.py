"""What is recreated after a power cut: whole or not at all, and nothing else is harmed by it."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onlap
from onlap import errors
from onlap.catalog import records
from onlap.store import SnapshotterKind, Store


def layout_of(store: Store, key: str) -> Path:
    return Path(store.snapshotter.catalog.layout.snapshot(store.snapshotter.record(key).id))


def after_a_power_cut(root: Path, *lost: Path) -> None:
    """The next open finds another epoch, and these directories gone."""
    with onlap.open(root) as store:
        store.snapshotter.catalog.database.write(lambda c: records.put_setting(c, "epoch", "before"))
    for path in lost:
        shutil.rmtree(path)


class Cut(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def copies(root: Path) -> tuple[Path, Path]:
    """A native root, with a copy of ten files whose tree is lost."""
    with onlap.open(root, snapshotter="native") as store:
        with store.build("base") as tree:
            for number in range(10):
                (tree / str(number)).write_text("x")
        store.prepare("key", "base")
        place = layout_of(store, "key")
    after_a_power_cut(root, place)
    return root, place


def test_a_copy_that_is_being_made_again_is_not_taken_for_the_whole(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, place = copies
    from onlap.trees.copy import Copier

    seen: list[object] = []
    tree = Copier.tree

    def cut(self: Copier, one: int, other: int) -> object:
        tree(self, one, other)
        for number in range(3, 10):
            os.unlink(str(number), dir_fd=other)
        seen.append(place.exists())
        raise Cut

    monkeypatch.setattr(Copier, "tree", cut)
    with pytest.raises(Cut):
        onlap.open(root)
    monkeypatch.undo()
    assert seen == [False]
    assert not place.exists()
    with onlap.open(root) as store, store.mounted("key") as found:
        assert len(os.listdir(found)) == 10


def test_of_two_that_make_one_again_each_finds_it_whole(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = copies
    from onlap.trees.copy import Copier

    tree = Copier.tree

    def beside(self: Copier, one: int, other: int) -> object:
        monkeypatch.undo()
        with onlap.open(root) as store, store.mounted("key") as found:
            assert len(os.listdir(found)) == 10
            (found / "written").touch()
        return tree(self, one, other)

    monkeypatch.setattr(Copier, "tree", beside)
    with onlap.open(root) as store, store.mounted("key") as found:
        assert len(os.listdir(found)) == 11
        store.cleanup()
    assert not os.listdir(root / "staging")


@pytest.mark.parametrize("kind", ["key", "base"])
@pytest.mark.parametrize("snapshotter", ["native", "overlay"])
def test_a_removal_beside_recovery_is_no_loss(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshotter: SnapshotterKind,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with onlap.open(root, snapshotter=snapshotter) as store:
        store.prepare("first")
        source = Path(store.snapshotter.layers(store.snapshotter.record("first"))[0])
        (source / "file").touch()
        store.commit("base", "first")
        store.prepare("key", "base")
    after_a_power_cut(root)
    from onlap.catalog.catalog import Catalog

    walk = Catalog.walk

    def beside(self: Catalog, *args: object) -> object:
        monkeypatch.setattr(Catalog, "walk", walk)
        found = list(walk(self, *args))  # type: ignore[arg-type]
        for name in ("key", "base") if kind == "base" else ("key",):
            self.remove("", name, wait=False)
        return iter(found)

    monkeypatch.setattr(Catalog, "walk", beside)
    with onlap.open(root) as store:
        assert store.snapshotter.catalog.lost == []
        assert not (root / "snapshots" / "2").exists()
        assert [info.name for info in store.walk()] == (["base"] if kind == "key" else [])
    assert "lost its tree" not in caplog.text


def test_what_cannot_be_made_again_keeps_nothing_else_from_working(
    copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from onlap.trees.copy import Copier

    root, _ = copies

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Copier, "tree", full)
    with onlap.open(root) as store:
        assert "No space left" in caplog.text
        assert [record.name for record in store.snapshotter.catalog.lost] == ["key"]
        store.prepare("other")
        store.remove("other")
    monkeypatch.undo()
    with onlap.open(root) as store, store.mounted("key") as found:
        assert len(os.listdir(found)) == 10


def top(**attributes: object) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("./")
        entry.type = tarfile.DIRTYPE
        entry.mode = 0o755
        entry.mtime = 1_000_000_000
        for name, value in attributes.items():
            setattr(entry, name, value)
        tar.addfile(entry)
    out.seek(0)
    return out


@pytest.mark.parametrize("snapshotter", ["native", "overlay"])
@pytest.mark.parametrize("parent", [None, "base"])
@pytest.mark.parametrize(
    "attributes", [{"mode": 0o700}, {"mtime": 5}, {"pax_headers": {"SCHILY.xattr.user.a": "b"}}], ids=str
)
def test_a_layer_of_its_top_alone_is_kept(
    root: Path, snapshotter: SnapshotterKind, parent: str | None, attributes: dict[str, object]
) -> None:
    with onlap.open(root, snapshotter=snapshotter) as store:
        store.prepare("first")
        store.commit("base", "first")
        store.prepare("key", parent)
        store.apply("key", top(**attributes))
        tree = layout_of(store, "key") / "fs"
        before = tree.stat()
        store.commit("name", "key")
        assert not store.snapshotter.record("name").empty
    # As a power cut would have it, if the layer were not on the disk: named, not recreated as something else.
    after_a_power_cut(root)
    with onlap.open(root) as store:
        assert store.snapshotter.catalog.lost == []
        assert (tree.stat().st_mode, tree.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@pytest.mark.parametrize("snapshotter", ["native", "overlay"])
def test_what_was_never_touched_is_as_made(root: Path, snapshotter: SnapshotterKind) -> None:
    with onlap.open(root, snapshotter=snapshotter) as store:
        store.prepare("first")
        store.commit("base", "first")
        assert store.snapshotter.record("base").empty
        if snapshotter == "overlay":
            store.prepare("second", "base")
            store.commit("top", "second")
            assert store.snapshotter.record("top").empty


# What an edit may hide


@pytest.mark.parametrize("ns", [1_000_000_000 * 10**9, 1_000_000_000 * 10**9 + 123], ids=["whole seconds", "ns"])
def test_an_edit_that_puts_size_and_time_back_is_found(root: Path, ns: int) -> None:
    with onlap.open(root, snapshotter="native") as store:
        with store.build("base") as tree:
            for name in ("edited", "same"):
                (tree / name).write_text("one")
                os.utime(tree / name, ns=(ns, ns))
        for key in ("key", "sibling"):
            store.prepare(key, "base")
        with store.mounted("key") as tree:
            (tree / "edited").write_text("two")
            os.utime(tree / "edited", ns=(ns, ns))
        wanted = [("C", "edited", {"content"})]

        def changes(key: str, base: str | None = None) -> list[tuple[str, str, set[str]]]:
            return [(change.kind, change.path, set(change.what)) for change in store.diff(key, base=base)]

        assert changes("key") == wanted
        assert changes("key", "base") == wanted
        assert changes("base", "key") == wanted
        assert changes("sibling", "key") == wanted
        assert changes("key", "sibling") == wanted
        layer = io.BytesIO()
        store.write_diff("key", layer)
        layer.seek(0)
        with tarfile.open(fileobj=layer) as tar:
            assert [entry.name for entry in tar if not entry.isdir()] == ["edited"]
        # By way of a commit, and of another copy.
        store.commit("next", "key")
        store.prepare("last", "next")
        assert changes("last") == []
        assert changes("last", "base") == wanted
        assert changes("next") == wanted


def test_only_what_may_have_been_edited_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    from onlap.layers.diff import changes
    from onlap.trees.compare import same_content as same

    def counted(one: int, other: int) -> bool:
        read.append(one)
        return same(one, other)

    monkeypatch.setattr(changes, "same_content", counted)
    with onlap.open(root, snapshotter="native") as store:
        with store.build("base") as tree:
            # So many that to copy them takes several ticks of the kernel's clock, of up to 10 ms each.
            for number in range(2000):
                (tree / str(number)).write_text("x")
                os.utime(tree / str(number), ns=(123, 123))
        store.prepare("key", "base")
        with store.mounted("key") as tree:
            os.utime(tree / "7", ns=(123, 123))
        list(store.diff("key"))
        # The one that was touched, and those of the copy's last tick of the clock.
        assert 1 <= len(read) < 2000


# A catalog that is none


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 99, b"SQLite format 3\0"], ids=len)
def test_a_catalog_cut_short_is_no_new_one(root: Path, content: bytes) -> None:
    with onlap.open(root, snapshotter="native") as store:
        store.prepare("key")
        file = layout_of(store, "key") / "fs" / "file"
        file.write_text("precious")
    (root / "catalog.db").write_bytes(content)
    (root / "catalog.db-wal").write_bytes(b"the log")
    for _ in range(2):
        with pytest.raises(errors.DataLoss, match="trees and no catalog of them"):
            onlap.open(root, snapshotter="native")
    assert (root / "catalog.db").read_bytes() == content
    assert (root / "catalog.db-wal").read_bytes() == b"the log"
    assert file.read_text() == "precious"


def test_a_catalog_of_format_0_is_no_new_one(root: Path) -> None:
    """A database all right, but another one."""
    import sqlite3

    with onlap.open(root, snapshotter="native") as store:
        store.prepare("key")
        file = layout_of(store, "key") / "fs" / "file"
        file.write_text("precious")
    for name in ("catalog.db", "catalog.db-wal", "catalog.db-shm"):
        (root / name).unlink(missing_ok=True)
    connection = sqlite3.connect(root / "catalog.db")
    connection.execute("CREATE TABLE other (x)")
    connection.commit()
    connection.close()
    with pytest.raises(errors.DataLoss, match="trees and no catalog of them"):
        onlap.open(root, snapshotter="native")
    assert file.read_text() == "precious"


def _link(path: Path) -> None:
    path.symlink_to("/etc")


_STRANGERS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("x"),
    "link": _link,
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("where", ["trash", "staging", "snapshots"])
@pytest.mark.parametrize("kind", _STRANGERS)
@pytest.mark.parametrize("name", ["7", "1"])
def test_what_is_no_directory_is_deleted_as_garbage(root: Path, where: str, kind: str, name: str) -> None:
    with onlap.open(root, snapshotter="native") as store:
        store.prepare("key")
        if not (where == "snapshots" and name == "1"):
            _STRANGERS[kind](root / where / name)
        store.remove("key")
        store.cleanup()
        assert os.listdir(root / "trash") == []
        assert os.listdir(root / "snapshots") == []
        assert name not in os.listdir(root / "staging")
        assert os.listdir("/etc")


# What a failure leaves open


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue  # that of the listing
    return found


@pytest.mark.parametrize("function", ["open", "listdir", "mkdir", "stat", "lstat"])
def test_an_open_that_fails_late_leaves_nothing_open(
    root: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    with onlap.open(root, snapshotter="overlay") as first:
        first.prepare("key")
        first.remove("key")
    before = descriptors()
    for at in itertools.count(1):
        failing = _Failing(getattr(os, function), at)
        store: Store | None = None
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            with contextlib.suppress(errors.OnlapError):
                store = onlap.open(root, snapshotter="overlay")
        if store is not None:
            store.close()
        if failing.calls < at:
            break
        assert descriptors() == before, at


def test_a_squash_that_cannot_begin_leaves_nothing_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    with onlap.open(root, snapshotter="native") as store:
        store.prepare("first")
        store.commit("base", "first")
        store.snapshotter.catalog._janitor.stop()
        before = descriptors()

        def refuse(*_: object) -> None:
            raise errors.NotFound("it was removed meanwhile")

        with monkeypatch.context() as patch:
            # The copies that squash makes hold nothing when it begins.
            patch.setattr(store.snapshotter.catalog, "hold", refuse)
            with pytest.raises(errors.NotFound):
                store.squash("base", "name")
        assert descriptors() == before

        def no_thread(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(errors.ResourceExhausted):
                store.squash("base", "name")
        assert descriptors() == before


def _layer() -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("new"))
    out.seek(0)
    return out


def _mount(store: Store, key: str) -> None:
    with store.mounted(key):
        pass


_CALLS: dict[str, Callable[[Store, str, Path], object]] = {
    "apply": lambda store, key, _: store.apply(key, _layer()),
    "mount": lambda store, key, _: _mount(store, key),
    "mount a committed one": lambda store, *_: _mount(store, "top"),
    "diff": lambda store, *_: list(store.diff("top")),
    "write": lambda store, *_: store.write_diff("top", io.BytesIO()),
    "squash": lambda store, key, _: store.squash("top", f"{key}-s"),
    "import": lambda store, key, place: store.import_(place / "source", f"{key}-i"),
    "export": lambda store, key, place: store.export("top", place / key),
    "export an archive": lambda store, *_: store.export("top", io.BytesIO()),
    "commit": lambda store, key, _: store.commit(f"{key}-c", key),
    "remove": lambda store, key, _: store.remove(key),
}


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("call", _CALLS)
def test_a_call_that_fails_leaves_nothing_open(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every open, every listing and every look at a file in it fails once."""
    (tmp_path / "source" / "d").mkdir(parents=True)
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        store.snapshotter.catalog._janitor.stop()
        with store.build("base") as tree:
            (tree / "d").mkdir()
            (tree / "d" / "f").touch()
        with store.build("top", "base") as tree:
            (tree / "d" / "g").touch()
        for function in ("open", "scandir", "stat"):
            for at in itertools.count(1):
                key = f"key-{function}-{at}"
                store.prepare(key, "base")
                before = _open_in(root)
                with monkeypatch.context() as patch:
                    failing = _Failing(getattr(os, function), at)
                    patch.setattr(os, function, failing)
                    with contextlib.suppress(errors.OnlapError):
                        _CALLS[call](store, key, tmp_path)
                if _open_in(root) != before:
                    gc.collect()  # a generator that was given up
                assert _open_in(root) == before, (function, at)
                if failing.calls < at:
                    break


class _Failing:
    """A function whose call number ``at`` fails."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self._function = function
        self._at = at
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self._at:
            raise OSError(24, "Too many open files")
        return self._function(*args, **options)


def _open_in(root: Path) -> set[str]:
    """What is open below the root, the catalog's own files aside, which its helper opens and closes."""
    return {name for name in descriptors() if f"{root}/" in name and "/catalog." not in name and "/staging" not in name}
