"""ACLs: what is copied or applied has those of its source and no others, whatever the directories around would add."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import onlap
from kernel.layer_oracle import archive, directory, entry
from onlap.graphdrivers import open_driver
from onlap.store import SnapshotterKind
from onlap.testing import assert_same_tree

pytestmark = pytest.mark.needs("mount", "overlay")

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"


def acl(user: int) -> bytes:
    """User 4711 may do ``user``. linux/posix_acl_xattr.h: version 2, then tag, permissions, id."""
    nobody = 0xFFFFFFFF
    entries = [(0x01, 7, nobody), (0x02, user, 4711), (0x04, 5, nobody), (0x10, 7, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def acls(top: Path) -> dict[str, list[str]]:
    """The files that have ACLs, the top one as ``.``."""
    found = {}
    for path in [top, *top.rglob("*")]:
        names = [name for name in os.listxattr(path, follow_symlinks=False) if "acl" in name.lower()]
        if names:
            found[str(path.relative_to(top))] = sorted(names)
    return found


@pytest.fixture(params=[("ext4", 64), ("xfs", 320), ("btrfs", 128)], ids=lambda kind: kind[0])
def below(request: pytest.FixtureRequest, loop_fs: Callable[[str, int], Path]) -> Path:
    """A directory whose ACL everything that is made in it inherits."""
    place = loop_fs(*request.param) / "below"
    place.mkdir()
    os.setxattr(place, DEFAULT, acl(7))
    (place / "proof").mkdir()
    assert DEFAULT in os.listxattr(place / "proof")
    assert ACCESS in os.listxattr(place / "proof")
    return place


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree without ACLs."""
    top = tmp_path / "source"
    (top / "d" / "e").mkdir(parents=True)
    (top / "d" / "file").write_bytes(b"x")
    (top / "d" / "e" / "fifo").touch()
    (top / "link").symlink_to("d")
    os.mkfifo(top / "pipe")
    for path in (top, top / "d", top / "d" / "e"):
        path.chmod(0o755)
    return top


@pytest.mark.parametrize("snapshotter", ["overlay", "native"])
def test_a_root_below_such_a_directory(below: Path, source: Path, snapshotter: SnapshotterKind) -> None:
    layer = archive([directory("a"), entry("a/f", data=b"y"), entry("implicit/f")])
    with onlap.open(below / "root", snapshotter=snapshotter) as store:
        store.import_(source, "base")
        store.prepare("work", "base")
        store.apply("work", io.BytesIO(layer))
        with store.mounted("work") as tree:
            (tree / "d" / "new").mkdir()
            (tree / "d" / "file").write_bytes(b"changed")
        store.commit("top", "work")
        with store.scratch("top") as tree:
            assert acls(tree) == {}
            assert tree.stat().st_mode & 0o777 == 0o755
        with store.build("built") as tree:
            (tree / "f").touch()
        assert acls(below / "root" / "snapshots") == {}
        store.export("top", below / "out")
        assert acls(below / "out") == {}
        store.export("base", below / "base")
        assert_same_tree(source, below / "base")


def test_an_import_over_a_tree_with_such_directories(below: Path, source: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked"
    (marked / "d").mkdir(parents=True)
    for path in (marked, marked / "d"):
        os.setxattr(path, DEFAULT, acl(7))
    for snapshotter in ("overlay", "native"):
        with onlap.open(below / snapshotter, snapshotter=snapshotter) as store:
            store.import_(marked, "parent")
            store.export("parent", tmp_path / snapshotter / "parent")
            assert acls(tmp_path / snapshotter / "parent") == {".": [DEFAULT], "d": [DEFAULT]}
            store.import_(source, "child", parent="parent")
            store.export("child", tmp_path / snapshotter / "child")
            assert_same_tree(source, tmp_path / snapshotter / "child")


def test_a_graph_driver_below_such_a_directory(below: Path) -> None:
    for name in ("overlay2", "overlay"):
        driver = open_driver(name, str(below / name))
        driver.create("base")
        driver.apply_diff("base", "", io.BytesIO(archive([entry("d/f")])))
        driver.create("top", "base")
        driver.apply_diff("top", "base", io.BytesIO(archive([entry("d/g")])))
        tree = driver.get("top")
        assert acls(Path(tree)) == {}
        driver.put("top")
        driver.close()


def test_acls_are_carried_once(below: Path, tmp_path: Path) -> None:
    """xfs shows root each ACL twice; the other name is its own and goes nowhere."""
    marked = below.parent / "marked"
    (marked / "d").mkdir(parents=True)
    (marked / "f").touch()
    os.setxattr(marked / "f", ACCESS, acl(4))
    os.setxattr(marked / "d", DEFAULT, acl(5))
    with onlap.open(tmp_path / "root") as elsewhere, onlap.open(below.parent / "root") as store:
        digests = set()
        for each in (elsewhere, store):
            assert not each.import_(marked, "base").skipped
            out = io.BytesIO()
            digests.add(each.write_diff("base", out).diff_id)
            assert b"SGI_ACL" not in out.getvalue()
            assert out.getvalue().count(b"posix_acl") == 2
            each.prepare("again")
            assert not each.apply("again", io.BytesIO(out.getvalue())).skipped
            with each.mounted("again") as tree:
                assert os.getxattr(tree / "f", ACCESS) == acl(4)
                assert os.getxattr(tree / "d", DEFAULT) == acl(5)
        assert len(digests) == 1
