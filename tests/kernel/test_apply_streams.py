"""Streams that are applied: digests, ends, failures, and what a refused archive leaves."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import capabilities
from kernel.layer_oracle import (
    TRUSTED,
    apply_to,
    archive,
    directory,
    entry,
    hardlink,
    look,
)
from onlap import errors
from onlap.layers.apply.archive import Limits, apply
from onlap.progress import Progress
from onlap.store import open as open_store

privileged = pytest.mark.needs("mount")
overlay = pytest.mark.needs("overlay", "mount")

# Streams


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _zstd(data: bytes) -> bytes:
    from onlap.layers.stream import compression

    made = compression.compressor(compression.ZSTD)
    return made.compress(data) + made.flush()


_SMALL = archive([entry("f", data=b"small")]) + b"\0" * 3000
_LARGE = archive([entry(f"f{number}", data=os.urandom(300_000)) for number in range(8)]) + b"trailing" * 1000


@pytest.mark.parametrize("data", [_SMALL, _LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, _zstd, bz2.compress, lzma.compress], ids=["none", "gzip", "zstd", "bzip2", "xz"]
)
def test_digests_of_all_that_is_read(layer: Path, data: bytes, compress: type[bytes]) -> None:
    packed = compress(data)
    applied = apply_to(layer, packed, digest=_digest(packed), diff_id=_digest(data))
    assert (applied.digest, applied.diff_id) == (_digest(packed), _digest(data))
    assert (applied.size, applied.uncompressed) == (len(packed), len(data))


@pytest.mark.parametrize("data", [_SMALL, _LARGE], ids=["small", "large"])
@pytest.mark.parametrize("what", ["digest", "diff_id"])
def test_another_digest_leaves_nothing(layer: Path, data: bytes, what: str) -> None:
    packed = gzip.compress(data)
    other = _digest(b"other")
    with pytest.raises(errors.DigestMismatch):
        apply_to(
            layer, packed, digest=other if what == "digest" else None, diff_id=other if what == "diff_id" else None
        )
    assert os.listdir(layer) == []


@pytest.mark.parametrize("digest", ["sha512:" + "0" * 128, "sha256:xyz", "", "sha256:" + "A" * 64])
def test_digests_of_another_form(layer: Path, digest: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        apply_to(layer, _SMALL, digest=digest)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_truncated_stream_leaves_nothing(layer: Path, compress: type[bytes]) -> None:
    packed = compress(_LARGE)
    with pytest.raises(errors.DataLoss):
        apply_to(layer, packed[: len(packed) // 2])
    assert os.listdir(layer) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "onlap-layer"]


@pytest.mark.parametrize("size", [2048, 1536, 1024, 1023, 515])
def test_an_archive_without_its_end(layer: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Go's archive/tar takes it, and umoci's insert writes it, without the last padding too."""
    cut = archive([entry("f", data=b"abc", mtime_ns=0)])[:size]
    for digest, warnings in ((_digest(cut), 0), (None, size < 1536)):
        apply_to(layer, cut, digest=digest)
        assert (layer / "f").read_bytes() == b"abc"
        assert len(caplog.records) == warnings


@pytest.mark.parametrize("size", [514, 512, 511, 0])
def test_an_archive_cut_before_its_end(layer: Path, size: int) -> None:
    cut = archive([entry("f", data=b"abc", mtime_ns=0)])[:size]
    with pytest.raises(errors.DataLoss):
        apply_to(layer, cut)
    assert os.listdir(layer) == []


def test_an_archive_from_a_path_and_its_progress(layer: Path, tmp_path: Path) -> None:
    source = tmp_path / "layer.tar"
    data = _LARGE + os.urandom(6 << 20)  # more than all buffers hold
    source.write_bytes(data)
    reports: list[Progress] = []
    fd = os.open(layer, os.O_RDONLY)
    try:
        applied = apply(source, fd, markers=TRUSTED, progress=reports.append)
        with source.open("rb") as file:
            assert apply(file, fd, markers=TRUSTED) == applied
    finally:
        os.close(fd)
    assert applied.digest == applied.diff_id == _digest(data)
    assert reports[-1][:4] == ("apply", len(data), len(data), "bytes")
    assert reports[0].total == len(data)
    assert not [thread for thread in threading.enumerate() if thread.name == "onlap-layer"]


class _Stop(Exception):
    pass


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_exception_from_progress_cancels(layer: Path, compress: type[bytes]) -> None:
    def stop(_: Progress) -> None:
        raise _Stop

    fd = os.open(layer, os.O_RDONLY)
    try:
        with pytest.raises(_Stop):
            apply(io.BytesIO(compress(_LARGE)), fd, markers=TRUSTED, progress=stop)
    finally:
        os.close(fd)
    assert os.listdir(layer) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "onlap-layer"]


class _Failing(io.BytesIO):
    """Breaks in the middle, as a connection does."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 1_500_000:
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().read(size)


def test_a_source_that_fails(layer: Path) -> None:
    fd = os.open(layer, os.O_RDONLY)
    try:
        with pytest.raises(errors.OnlapError, match="read the archive"):
            apply(_Failing(_LARGE), fd, markers=TRUSTED)
    finally:
        os.close(fd)
    assert os.listdir(layer) == []


def test_limits_that_are_kept(layer: Path) -> None:
    apply_to(layer, _SMALL, limits=Limits(bytes=len(_SMALL), entries=1, ratio=10))
    assert os.listdir(layer) == ["f"]


def test_a_whole_tree_has_nothing_below(layer: Path) -> None:
    with pytest.raises(errors.InvalidArgument):
        apply_to(layer, _SMALL, [layer], markers=None)


@privileged
def test_a_full_disk(loop_ext4: object, tmp_path: Path) -> None:
    target = loop_ext4(16)  # type: ignore[operator]
    layer = target / "layer"
    layer.mkdir()
    with pytest.raises(errors.ResourceExhausted, match="big"):
        apply_to(layer, archive([entry("small", data=b"x"), entry("big", data=bytes(20 << 20))]))
    assert os.listdir(layer) == []


# Btrfs shows a descriptor only the names that were there when it was opened or last rewound


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_nothing_of_a_refused_archive_stays(loop_fs: Callable[[str, int], Path], kind: str) -> None:
    layer = loop_fs(kind, capabilities.FILESYSTEMS[kind]) / "layer"
    layer.mkdir()
    with pytest.raises(errors.InvalidArgument, match="does not exist"):
        apply_to(layer, archive([directory("d/"), entry("d/evil"), entry("evil"), hardlink("x", "nothing")]))
    assert os.listdir(layer) == []
    apply_to(layer, archive([entry("good")]))
    assert os.listdir(layer) == ["good"]


@privileged
@pytest.mark.parametrize("written", [False, True])
def test_the_attributes_of_what_was_there_outlive_a_refused_archive(layer: Path, written: bool) -> None:
    everyone = 2**32 - 1
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 7, everyone) for tag in (1, 4, 32))
    top = [layer / "d", layer][not written]
    top.mkdir(exist_ok=True)
    top.chmod(0o750)
    for name, value in (("user.note", b"1"), ("security.note", b"2"), ("system.posix_acl_default", acl)):
        os.setxattr(top, name, value)
    before = look(layer)
    items = [entry("d/f") if written else directory("./", mode=0o700, uid=7, xattrs={"security.other": b"3"})]
    with pytest.raises(errors.InvalidArgument, match="does not exist"):
        apply_to(layer, archive([*items, entry("f"), hardlink("x", "nothing")]))
    after = look(layer)
    assert after["d" if written else "."] == before["d" if written else "."]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_an_archive_made_and_replaces_goes_whole(loop_fs: Callable[[str, int], Path], kind: str) -> None:
    layer = loop_fs(kind, capabilities.FILESYSTEMS[kind]) / "layer"
    layer.mkdir()
    deep = [directory("/".join("d" * depth) + "/") for depth in range(1, 300)]
    apply_to(layer, archive([entry("a/b/f"), *deep, entry("a/b/g"), entry("a"), entry("d")]))
    assert {name: seen.content for name, seen in look(layer).items()} == {".": None, "a": b"", "d": b""}


# The top directory


@overlay
@pytest.mark.parametrize("written", [True, False])
def test_the_top_of_a_snapshot_stays_as_it_is_unless_the_archive_names_it(root: Path, written: bool) -> None:
    with open_store(root / "store", snapshotter="overlay", sync="none") as store:
        with store.build("base") as tree:
            (tree / "f").touch()
        store.prepare("work", "base")
        with store.mounted("work") as tree:
            if written:
                (tree / "there").touch()
            tree.chmod(0o1750)
            os.chown(tree, 5, 6)
            os.setxattr(tree, "user.note", b"1")
        store.apply("work", io.BytesIO(archive([entry("g")])))
        with store.mounted("work") as tree:
            seen = look(tree)["."]
            assert (seen.mode, seen.owner, seen.xattrs) == (0o1750, (5, 6), (("user.note", b"1"),))
        store.apply("work", io.BytesIO(archive([directory("./", mode=0o711)])))
        with store.mounted("work") as tree:
            assert look(tree)["."].mode == 0o711
