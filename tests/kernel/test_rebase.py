"""A layer that was unpacked before its parent was there: what its applier had to invent becomes the parent's."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onlap import OverlaySnapshotter, mounted

pytestmark = pytest.mark.needs("overlay")

THEN = 1_700_000_000


@pytest.fixture
def snapshotter(tmp_path: Path) -> Iterator[OverlaySnapshotter]:
    with OverlaySnapshotter(tmp_path / "root") as snapshotter:
        yield snapshotter


def attributes(path: Path) -> tuple[int, int, int, int, dict[str, bytes]]:
    """Mode, owner, group, time in ns and xattrs."""
    status = path.lstat()
    xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    xattrs.pop("security.selinux", None)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, xattrs


def directory(path: Path, mode: int = 0o1777, owner: int = 5) -> None:
    path.mkdir(exist_ok=True)
    os.chown(path, owner, owner + 1)
    path.chmod(mode)
    os.setxattr(path, "user.note", b"x")
    os.utime(path, (THEN, THEN))


def base(tree: Path) -> None:
    (tree / "plain").write_text("1")
    for name in ("d/tmp", "d/set", "opaque/in"):
        (tree / name).mkdir(parents=True)
        directory(tree / name, 0o2750)
    directory(tree / "d")
    directory(tree / "opaque", 0o700)
    directory(tree, 0o711)


def commit(snapshotter: OverlaySnapshotter, name: str, parent: str | None, make: Callable[[Path], None]) -> None:
    """A snapshot that was made without a parent, and put on one at its commit."""
    with mounted(snapshotter.prepare("work")) as tree:
        make(tree)
    snapshotter.commit(name, "work", parent=parent)


def merged(snapshotter: OverlaySnapshotter, name: str, *paths: str) -> dict[str, tuple[int, int, int, int, object]]:
    with mounted(snapshotter.view("look", name)) as tree:
        found: dict[str, tuple[int, int, int, int, object]] = {path: attributes(tree / path) for path in paths}
    snapshotter.remove("look")
    return found


def test_implicit_directories_are_as_in_the_parent(snapshotter: OverlaySnapshotter) -> None:
    """The top, directories on the way, also over two layers; a new one below them stays as it was made."""
    commit(snapshotter, "base", None, base)

    def one(tree: Path) -> None:
        (tree / "d/tmp").mkdir(parents=True)
        (tree / "d/tmp/f").touch()

    def two(tree: Path) -> None:
        (tree / "d/tmp/new").mkdir(parents=True)
        (tree / "d/set").mkdir()
        (tree / "plain").mkdir()  # a file below

    commit(snapshotter, "one", "base", one)
    commit(snapshotter, "two", "one", two)
    was = merged(snapshotter, "base", ".", "d", "d/tmp", "d/set")
    assert merged(snapshotter, "two", ".", "d", "d/tmp", "d/set") == was
    assert was["d"] == (0o1777, 5, 6, THEN * 10**9, {"user.note": b"x"})
    for each in merged(snapshotter, "two", "d/tmp/new", "plain").values():
        assert (*each[:3], each[4]) == (0o755, 0, 0, {})


def test_what_was_described_stays(snapshotter: OverlaySnapshotter) -> None:
    """By a mode, an owner, an xattr; and one of root's with 0755 that has the time of an archive."""
    commit(snapshotter, "base", None, base)

    def make(tree: Path) -> None:
        (tree / "d/tmp").mkdir(parents=True)
        (tree / "d/set").mkdir()
        os.setxattr(tree / "d/set", "user.other", b"x")
        os.chown(tree / "d/tmp", 9, 9)
        (tree / "opaque").mkdir(mode=0o755)
        os.utime(tree / "opaque", (THEN, THEN))
        (tree / "d").chmod(0o750)

    commit(snapshotter, "on", "base", make)
    found = merged(snapshotter, "on", "d", "d/tmp", "d/set", "opaque")
    assert [each[:3] for each in found.values()] == [(0o750, 0, 0), (0o755, 9, 9), (0o755, 0, 0), (0o755, 0, 0)]
    assert [each[4] for each in found.values()] == [{}, {}, {"user.other": b"x"}, {}]


def test_an_opaque_directory_is_the_parents_and_what_is_in_it_is_not(snapshotter: OverlaySnapshotter) -> None:
    commit(snapshotter, "base", None, base)

    def make(tree: Path) -> None:
        (tree / "opaque/in").mkdir(parents=True)
        # Through the mount the kernel keeps its own xattrs from us.
        os.setxattr(Path(snapshotter.mounts("work")[0].source, "opaque"), "trusted.overlay.opaque", b"y")

    commit(snapshotter, "on", "base", make)
    found = merged(snapshotter, "on", "opaque", "opaque/in")
    assert found["opaque"][:3] == (0o700, 5, 6)
    assert (*found["opaque/in"][:3], found["opaque/in"][4]) == (0o755, 0, 0, {})


def test_a_commit_that_was_broken_off_can_be_repeated(snapshotter: OverlaySnapshotter) -> None:
    """Between two of a directory's attributes: the owner was set, the rest was not."""
    commit(snapshotter, "base", None, base)

    def make(tree: Path) -> None:
        (tree / "d").mkdir()
        os.chown(tree / "d", 5, 6)

    commit(snapshotter, "on", "base", make)
    assert merged(snapshotter, "on", "d") == merged(snapshotter, "base", "d")


def test_no_name_leads_out_of_the_layer(snapshotter: OverlaySnapshotter, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    before = attributes(outside)
    commit(snapshotter, "base", None, base)
    commit(snapshotter, "on", "base", lambda tree: (tree / "d").symlink_to(outside))
    assert attributes(outside) == before


def test_the_top_of_an_empty_layer_is_the_parents(
    snapshotter: OverlaySnapshotter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the filesystem's clock moves on between the directories of a new snapshot."""
    real = os.mkdir

    def mkdir(path: str, mode: int = 0o777) -> None:
        real(path, mode)
        if path.endswith("/fs"):
            while True:
                (tmp_path / "now").touch()
                if (tmp_path / "now").stat().st_mtime_ns > os.stat(path).st_mtime_ns:
                    return

    commit(snapshotter, "base", None, base)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        snapshotter.prepare("work")
    snapshotter.commit("on", "work", parent="base")
    assert merged(snapshotter, "on", ".") == merged(snapshotter, "base", ".")
