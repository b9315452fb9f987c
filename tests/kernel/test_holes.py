"""Holes: they stay holes on every way from one snapshot to another, and where they cannot, the content is right."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import onlap
from onlap.store import SnapshotterKind
from onlap.trees.copy import data_ranges

pytestmark = pytest.mark.needs("mount", "overlay")

SIZE = 1 << 30
# A filesystem's blocks, and those that lead to them.
SLACK = 1 << 20


@pytest.fixture(params=[("ext4", 64), ("xfs", 320), ("btrfs", 128)], ids=lambda kind: kind[0])
def place(request: pytest.FixtureRequest, loop_fs: Callable[[str, int], Path]) -> Path:
    """A filesystem that is much smaller than the files on it."""
    return loop_fs(*request.param)


def _make(tree: Path) -> None:
    for name, pieces in {
        "hole": {},
        "begin": {0: b"begin"},
        "middle": {SIZE // 3: b"middle" * 5000, SIZE // 2: b"x"},
        "end": {SIZE - 3: b"end"},
        "näme " + "long" * 50: {70_000: b"n"},
    }.items():
        with (tree / name).open("wb") as file:
            for offset, data in pieces.items():
                file.seek(offset)
                file.write(data)
            file.truncate(SIZE)
    os.link(tree / "middle", tree / "link")
    (tree / "dense").write_bytes(os.urandom(100_000))


def _look(tree: Path) -> dict[str, object]:
    """What each file holds, by its data alone; it must not take more room than that."""
    found: dict[str, object] = {}
    for path in sorted(tree.iterdir()):
        status = path.stat()
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for start, end in data_ranges(file.fileno(), status.st_size):
                data = os.pread(file.fileno(), end - start, start)
                digest.update(data.rstrip(b"\0"))
            assert status.st_blocks * 512 < SLACK, path
        found[path.name] = (status.st_size, status.st_nlink, digest.hexdigest())
    return found


@pytest.mark.parametrize("snapshotter", ["overlay", "native"])
def test_holes_stay_between_our_own_verbs(place: Path, snapshotter: SnapshotterKind, tmp_path: Path) -> None:
    (place / "source").mkdir()
    _make(place / "source")
    expected = _look(place / "source")
    with onlap.open(place / "root", snapshotter=snapshotter) as store:
        store.import_(place / "source", "base")
        store.squash("base", "squashed")
        layer = io.BytesIO()
        written = store.write_diff("base", layer, sparse=True)
        assert written.uncompressed < SLACK
        store.prepare("applied")
        store.apply("applied", io.BytesIO(layer.getvalue()), digest=written.digest)
        store.export("squashed", place / "exported")
        assert _look(place / "exported") == expected
        for key in ("base", "squashed", "applied"):
            whole = store.export(key, io.BytesIO(), sparse=True)
            assert whole.archive is not None
            assert whole.archive.uncompressed == written.uncompressed
            with store.mounted(key) as tree:
                assert _look(tree) == expected
        # A native snapshot is a copy of its parent; an overlay's file is copied up by a link to it.
        store.prepare("child", "base")
        with store.mounted("child") as tree:
            assert _look(tree) == expected


def test_an_archive_for_others_has_no_holes(place: Path) -> None:
    """Its bytes depend on the content alone."""
    size = 3 << 20
    digests = set()
    with onlap.open(place / "root") as store:
        for name in ("sparse", "dense"):
            with store.build(name) as tree:
                with (tree / "f").open("wb") as file:
                    if name == "dense":
                        file.write(bytes(size))
                    file.truncate(size)
                os.utime(tree / "f", (1, 1))
                os.utime(tree, (1, 1))
            digests.add(store.write_diff(name, io.BytesIO()).diff_id)
            whole = store.export(name, io.BytesIO())
            assert whole.archive is not None
            digests.add(whole.archive.diff_id)
    assert len(digests) == 1


def test_holes_of_a_file_with_as_many_blocks_as_bytes(loop_ext4: Callable[[int], Path]) -> None:
    """Blocks behind the end of a file stand for those that it lacks."""
    place = loop_ext4(128)
    (place / "source").mkdir()
    size = 32 << 20
    with (place / "source" / "f").open("wb") as file:
        file.write(b"begin")
        file.truncate(size)
        _allocate_behind(file.fileno(), size)
        assert os.fstat(file.fileno()).st_blocks * 512 > size
    with onlap.open(place / "root") as store:
        store.import_(place / "source", "base")
        assert store.write_diff("base", io.BytesIO(), sparse=True).uncompressed < SLACK
        with store.scratch("base") as tree:
            status = (tree / "f").stat()
            assert (status.st_size, (tree / "f").read_bytes()[:6]) == (size, b"begin\0")
            assert status.st_blocks * 512 < SLACK


def _allocate_behind(fd: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # fallocate(2): FALLOC_FL_KEEP_SIZE
    arguments = (ctypes.c_int(fd), ctypes.c_int(1), ctypes.c_int64(size), ctypes.c_int64(size + SLACK))
    assert libc.fallocate64(*arguments) == 0, os.strerror(ctypes.get_errno())
