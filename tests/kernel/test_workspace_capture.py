"""Captures: a directory as a committed snapshot, whole and onto an earlier capture."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from kernel.helpers import output, python
from onlap import errors
from onlap.store import Store
from onlap.testing import Tree
from onlap.testing.same import assert_same_tree, read_tree
from onlap.workspaces.capture import clock
from onlap.workspaces.capture.capture import MOST_LAYERS, take

pytestmark = pytest.mark.needs("overlay")

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices, and gives files away")


@pytest.fixture
def source(root: Path) -> Path:
    path = root / "source"
    path.mkdir()
    return path


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "overlay", snapshotter="overlay", sync="none") as opened:
        yield opened


def assert_captured(store: Store, name: str, source: Path) -> None:
    with store.mounted(name) as tree:
        assert_same_tree(source, tree)


def layer(store: Store, name: str) -> Path:
    return Path(store.snapshotter.layers(store.snapshotter.record(name))[0])


def held(store: Store, name: str) -> list[str]:
    """What the layer of a capture holds."""
    return sorted(str(path.relative_to(layer(store, name))) for path in layer(store, name).rglob("*"))


FULL = (
    Tree()
    .directory("d", mode=0o700, mtime_ns=123_456_789)
    .directory("d/empty", mode=0o1777)
    .file("d/f", b"content", mode=0o4755, mtime_ns=1_000_000_000_123_456_789, xattrs={"user.a": b"b"})
    .file(b"d/\xff name\n", b"bytes")
    .symlink("d/s", "../nowhere")
    .fifo("p")
    .file("one", b"1")
    .link("d/two", "one")
)


def test_all_that_a_directory_holds(stores: tuple[Store, Store], source: Path) -> None:
    FULL.apply(source)
    os.truncate(source / "one", 1 << 20)
    for store in stores:
        info = store.capture(source, "base", labels={"a": "b"})
        assert (info.kind, info.parent, info.labels["a"]) == ("committed", None, "b")
        assert_captured(store, "base", source)
    assert os.stat(layer(stores[0], "base") / "one").st_blocks < 64  # the hole is one


CHANGES = {
    "content": Tree().write("d/f", b"other"),
    "attributes": Tree().chmod("d/f", 0o600).xattr("d/f", "user.a", None).xattr("d", "user.c", b"d"),
    "a directory's xattr goes": Tree().xattr("d", "user.c", None),
    "one name of a file": Tree().append("one", b"2"),
    "a file becomes a directory": Tree().remove("d/f").directory("d/f").file("d/f/g", b"g"),
    "a directory becomes a file": Tree().remove("d").file("d", b"d"),
    "a directory made anew": Tree().remove("d").directory("d").file("d/other", b"o"),
    "a directory moved": Tree().rename("d", "e"),
    "and another in its place": Tree().rename("d", "e").directory("d").file("d/f", b"content"),
    "a name goes, and its file stays": Tree().remove("one"),
    "a name comes": Tree().link("three", "one"),
    "everything goes": Tree().remove("d").remove("p").remove("one"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_onto_an_earlier_capture(stores: tuple[Store, Store], source: Path, change: Tree) -> None:
    (FULL + Tree().xattr("d", "user.c", b"c")).apply(source)
    for store in stores:
        store.capture(source, "base")
    before = read_tree(source)
    change.apply(source)
    for store in stores:
        assert store.capture(source, "next", onto="base").parent == "base"
        assert_captured(store, "next", source)
        with store.mounted("base") as tree:
            assert_same_tree(before, tree)


def test_only_what_changed_is_in_the_layer(store: Store, source: Path) -> None:
    FULL.apply(source)
    store.capture(source, "base")
    (source / "d/f").write_text("other")
    (source / "one").unlink()
    store.capture(source, "next", onto="base")
    assert held(store, "next") == ["d", "d/f", "d/two", "one"]  # two: its ctime is that of the name that is gone
    assert stat.S_ISCHR(os.lstat(layer(store, "next") / "one").st_mode)


def test_nothing_changed(stores: tuple[Store, Store], source: Path) -> None:
    FULL.apply(source)
    for store in stores:
        store.capture(source, "base")
        assert not list(store.diff(store.capture(source, "same", onto="base").name))
        last = store.snapshotter.record("same")
        assert take(store.snapshotter, source, last, "more", reuse=True).record == last
        assert "more" not in store
        (source / "d/f").write_text("other")
        made = take(store.snapshotter, source, last, "more", reuse=True).record
        assert (made.name, made.parent) == ("more", "same")
        assert_captured(store, "more", source)


def test_captures_without_end_do_not_make_a_chain_without_end(stores: tuple[Store, Store], source: Path) -> None:
    FULL.apply(source)
    for store in stores:
        last = take(store.snapshotter, source, None, "first", reuse=True).record
        for number in range(2 * MOST_LAYERS):
            (source / f"new{number}").write_text("")
            (source / f"new{number - 3}").unlink(missing_ok=True)
            last = take(store.snapshotter, source, last, f"n{number}", reuse=True).record
            assert last.name == f"n{number}"
            assert len(store.snapshotter.ancestors(last)) < MOST_LAYERS
            assert take(store.snapshotter, source, last, "same", reuse=True).record == last
        assert_captured(store, last.name, source)


def test_an_edit_that_restores_size_and_time(store: Store, source: Path) -> None:
    FULL.apply(source)
    store.capture(source, "base")
    before = os.stat(source / "d/f")
    (source / "d/f").write_text("CONTENT")
    os.utime(source / "d/f", ns=(before.st_atime_ns, before.st_mtime_ns))
    store.capture(source, "next", onto="base")
    assert_captured(store, "next", source)


NAMES = [f"{one}{two}" for one in ("", "a/", "a/b/", "c/") for two in "abcde"]


def change_at_random(source: Path, chance: random.Random) -> None:
    """One step of a program; it may fail."""
    path, other = (source / chance.choice(NAMES) for _ in range(2))
    match chance.randrange(9):
        case 0 | 1:
            path.write_bytes(chance.randbytes(5))
        case 2 | 3:
            path.mkdir()
        case 4:
            os.rename(path, other)
        case 5:
            os.link(path, other, follow_symlinks=False)
        case 6:
            path.symlink_to("a")
        case 7:
            path.chmod(chance.choice([0o700, 0o755, 0o777]))
        case _:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("seed", range(4))
def test_random_programs(stores: tuple[Store, Store], source: Path, seed: int) -> None:
    chance = random.Random(seed)
    last: dict[Store, str | None] = dict.fromkeys(stores)
    for number in range(8):
        for _ in range(chance.choice([3, 40])):
            try:
                change_at_random(source, chance)
            except (OSError, shutil.Error):
                pass  # as for a program
        for store in stores:
            last[store] = store.capture(source, f"n{number}", onto=last[store]).name
            assert_captured(store, f"n{number}", source)


def test_what_is_left_out(store: Store, source: Path) -> None:
    (Tree().file("a.pyc").directory("d").file("d/keep").file("d/x.pyc").directory("d/.cache").file("d/.cache/x")).apply(
        source
    )
    (source / ".repo.onlap-merge").mkdir()
    store.capture(source, "base", exclude=["*.pyc", "d/.cache"])
    assert held(store, "base") == ["d", "d/keep"]
    store.capture(source, "all", onto="base")
    assert held(store, "all") == ["a.pyc", "d", "d/.cache", "d/.cache/x", "d/x.pyc"]
    store.capture(source, "less", onto="all", exclude=["d"])
    with store.mounted("less") as tree:
        assert os.listdir(tree) == ["a.pyc"]


def test_the_stores_own_root_is_left_out(root: Path) -> None:
    (root / "kept").write_text("")
    with onlap.open(root / "overlay", sync="none") as store:
        store.capture(root, "base")
        assert held(store, "base") == ["kept"]
        with pytest.raises(errors.InvalidArgument, match="inside the root"):
            store.capture(root / "overlay/snapshots", "other")


def test_sockets_are_skipped_and_counted(store: Store, source: Path) -> None:
    (source / "s").write_text("")
    store.capture(source, "base")
    (source / "s").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "s"))
        done = take(store.snapshotter, source, store.snapshotter.record("base"), "next")
    assert done.skipped == {"socket": 1}
    with store.mounted("next") as tree:
        assert os.listdir(tree) == []


@AS_ROOT
def test_devices_and_other_owners(store: Store, source: Path) -> None:
    Tree().device("null", 1, 3).device("white", 0, 0).file("of", uid=1234, gid=4321).apply(source)
    done = take(store.snapshotter, source, None, "base")
    assert done.skipped == {"device": 1}  # in a layer it would be a whiteout
    expected = {path: node for path, node in read_tree(source).items() if path != b"white"}
    with store.mounted("base") as tree:
        assert_same_tree(expected, tree)


def test_what_is_mounted_in_it_is_not_entered(store: Store, source: Path, root: Path) -> None:
    (source / "here").mkdir()
    (source / "here/below").write_text("")
    store.capture(source, "base")
    other = root / "other"
    other.mkdir()
    (other / "secret").write_text("")
    with onlap.mounted(onlap.Mount("bind", str(other), flags=("rbind",)), source / "here"):
        done = take(store.snapshotter, source, store.snapshotter.record("base"), "next")
        assert done.skipped == {"mountpoint": 1}
        assert take(store.snapshotter, source, done.record, "same", reuse=True).record == done.record
    with store.mounted("next") as tree:
        assert os.listdir(tree / "here") == []
    store.capture(source, "again", onto="next")
    assert_captured(store, "again", source)


def test_more_directories_in_each_other_than_descriptors(store: Store, source: Path) -> None:
    below = source.joinpath(*["d"] * 400)
    below.mkdir(parents=True)
    store.capture(source, "base")
    (below / "f").write_text("")
    store.capture(source, "next", onto="base")
    assert_captured(store, "next", source)


def test_onto_what_is_no_capture(store: Store, source: Path) -> None:
    store.import_(source, "base")
    with pytest.raises(errors.InvalidArgument, match="not a capture"):
        store.capture(source, "next", onto="base")
    with pytest.raises(errors.NotFound):
        store.capture(source, "next", onto="nobody")
    with pytest.raises(errors.AlreadyExists):
        store.capture(source, "base")


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_fingerprint_is_as_none(store: Store, source: Path, damage: str) -> None:
    FULL.apply(source)
    store.capture(source, "base")
    path = Path(store.snapshotter.catalog.layout.captured(store.snapshotter.record("base").id))
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "changed": data[:-9] + b"\0" + data[-8:], "empty": b""}[damage])
    (source / "one").unlink()
    assert store.capture(source, "next", onto="base").parent is None
    assert_captured(store, "next", source)


class SlowClock:
    """The module time, 1000 seconds ago."""

    @staticmethod
    def time_ns() -> int:
        return time.time_ns() - 10**12

    @staticmethod
    def clock_gettime_ns(clock_id: int) -> int:
        return time.clock_gettime_ns(clock_id) - 10**12


def test_a_clock_that_went_backwards(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FULL.apply(source)
    monkeypatch.setattr(clock, "time", SlowClock)
    store.capture(source, "base")  # all files are from the future, and it does come to rest
    assert_captured(store, "base", source)
    last = store.snapshotter.record("base")
    for name, back, certain in [
        ("none of them is", False, False),
        ("all are", False, True),
        ("the time of the reading is from the future", True, False),
    ]:
        if back:
            monkeypatch.setattr(clock, "time", SlowClock)
        else:
            monkeypatch.setattr(clock, "time", time)
        done = take(store.snapshotter, source, last, name)
        assert (done.written == 0) == certain, name
        assert_captured(store, name, source)
        last = done.record


def test_check_backup_and_rebuild_do_not_mind(store: Store, source: Path, root: Path) -> None:
    FULL.apply(source)
    store.capture(source, "base")
    (source / "one").unlink()
    store.capture(source, "next", onto="base")
    store.cleanup(manifests=True)
    assert store.check(deep=True).findings == ()
    store.backup(root / "backup.tar")
    onlap.restore(root / "backup.tar", root / "restored")
    with onlap.open(root / "restored", sync="none") as other:
        assert_captured(other, "next", source)


KILLED = """
import os, signal, sys
import onlap
from onlap.workspaces.capture.layer import Layer
put = Layer.put
def killed(*arguments):
    put(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
Layer.put = killed
with onlap.open(sys.argv[1], sync="none") as store:
    store.capture(sys.argv[2], "next", onto="base")
"""


def test_a_killed_capture_leaves_nothing(store: Store, source: Path) -> None:
    FULL.apply(source)
    store.capture(source, "base")
    (source / "new").write_text("")
    with python(KILLED, store.root, source) as child:
        child.communicate(timeout=50)
    assert child.returncode == -signal.SIGKILL
    assert [info.kind for info in store.walk()] == ["committed", "active"]
    store.cleanup()
    assert [info.name for info in store.walk()] == ["base"]
    store.capture(source, "next", onto="base")
    assert_captured(store, "next", source)


def test_a_callback_may_cancel(store: Store, source: Path) -> None:
    FULL.apply(source)

    def cancel(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.capture(source, "base", progress=cancel)
    assert list(store.walk()) == []
    seen: list[onlap.Progress] = []
    store.capture(source, "base", progress=seen.append)
    assert (seen[-1].stage, seen[-1].done, seen[-1].unit) == ("capture", 8, "files")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(store: Store, source: Path) -> None:
    (source / "d").mkdir()
    (source / "d/secret").touch(0)
    with pytest.raises(errors.PermissionDenied, match="d/secret"):
        store.capture(source, "base")


AS_USER = """
import os, sys
from pathlib import Path
import onlap
from onlap import errors
from onlap.testing.same import assert_same_tree
here = Path(sys.argv[1])
source = here / "source"
(source / "d").mkdir(parents=True)
(source / "d/f").write_text("1")
(source / "closed").mkdir()
(source / "closed/f").write_text("1")
(source / "closed").chmod(0o500)
os.link(source / "d/f", source / "l")
with onlap.open(here / "root", snapshotter="overlay", sync="none") as store:
    store.capture(source, "base")
    (source / "d/f").write_text("2")
    (source / "closed/f").write_text("2")
    store.capture(source, "next", onto="base")
    (source / "closed").chmod(0o700)
    (source / "closed/f").unlink()
    store.capture(source, "last", onto="next")
    with store.mounted("last") as tree:
        assert_same_tree(source, tree)
    (source / "d/secret").touch(0)
    try:
        store.capture(source, "none")
    except errors.PermissionDenied as error:
        print(error)
"""


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user(ordinary: Path) -> None:
    assert "d/secret" in output(AS_USER, ordinary, ordinary=True)
