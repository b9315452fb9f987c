"""The bytes of a layer that is written: digests, times, compression; and what ends the writing."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from pathlib import Path

import pytest

from kernel.layer_oracle import TIME, TRUSTED
from kernel.layer_stacks import (
    Layers,
    entries,
    run_python,
)
from onlap import errors
from onlap.layers.diff.write import Encoding, write_layer
from onlap.layers.stream.compression import Inflater
from onlap.progress import Progress
from onlap.testing import Tree

pytestmark = [pytest.mark.needs("overlay", "mount")]

# The bytes


def test_source_date_epoch_is_the_latest_time(layers: Layers) -> None:
    layers.add(Tree().file("old", mtime_ns=5_000_000_001).file("new").directory("d").symlink("s", "x"))
    found = entries(layers.write(epoch=1000)[0])
    later = {"d": 1000, "new": 1000, "s": 1000}
    assert {name: entry.mtime for name, entry in found.items()} == {**later, "old": pytest.approx(5.000000001)}
    assert layers.write(epoch=1000)[0] == layers.write(epoch=1000)[0] != layers.write(epoch=1001)[0]


def test_whiteouts_have_no_time_and_no_owner(layers: Layers) -> None:
    layers.add(Tree().file("f", uid=3))
    layers.add(Tree().remove("f"))
    entry = layers.entries()[".wh.f"]
    assert (entry.mtime, entry.uid, entry.gid, entry.mode, entry.size, entry.pax_headers) == (0, 0, 0, 0, 0, {})


def test_owners_are_numbers_and_pax_is_only_where_it_is_needed(layers: Layers) -> None:
    layers.add(Tree().file("f", b"1", mtime_ns=TIME, uid=1000, gid=2**31).file("g", mtime_ns=TIME, uid=33, gid=33))
    found = layers.entries()
    assert (found["f"].uid, found["f"].gid, found["f"].uname, found["f"].gname) == (1000, 2**31, "", "")
    assert set(found["f"].pax_headers) == {"gid"}
    assert found["g"].pax_headers == {}


def test_a_long_directory_needs_no_pax_header(layers: Layers) -> None:
    """Its own slash stays in the name, so that the prefix ends at another one."""
    long = f"{'x' * 60}/{'y' * 39}"
    layers.add(Tree().directory("x" * 60, mtime_ns=TIME).directory(long, mtime_ns=TIME))
    assert layers.entries()[long].pax_headers == {}
    layers.check()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("size", [0, 100, 3_000_000])
def test_both_digests_and_sizes(layers: Layers, compression: str, size: int) -> None:
    layers.add(Tree().file("f", os.urandom(size // 2) + bytes(size // 2), mtime_ns=TIME))
    plain, one = layers.write()
    packed, done = layers.write(compression=compression)
    assert (done.digest, done.size) == ("sha256:" + hashlib.sha256(packed).hexdigest(), len(packed))
    assert (done.diff_id, done.uncompressed, done.entries) == (one.diff_id, len(plain), one.entries)
    if compression == "gzip":
        assert gzip.decompress(packed) == plain
    else:
        stream = io.BytesIO(packed)
        inflater = Inflater(stream.read, "zstd")
        assert b"".join(iter(inflater.chunk, b"")) == plain
    assert layers.write(compression=compression)[0] == packed


def test_levels(layers: Layers) -> None:
    layers.add(Tree().file("f", b"".join(b"%d" % number for number in range(200_000))))
    sizes = [layers.write(compression="zstd", level=level)[1].size for level in (1, 19)]
    assert sizes[0] > sizes[1]
    with pytest.raises(errors.InvalidArgument, match="no level 23"):
        layers.write(compression="zstd", level=23)
    with pytest.raises(errors.InvalidArgument, match="'lz4'"):
        layers.write(compression="lz4")


# Failures


class _Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: memoryview) -> int:
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        took = min(len(data), self.room, 4096)
        self.room -= took
        return took


@pytest.mark.parametrize("room", [0, 1000, 300_000, 2_000_000])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_disk_that_is_full_ends_it(layers: Layers, room: int, compression: str) -> None:
    layers.add(Tree().file("f", os.urandom(6_000_000)))
    with pytest.raises(OSError, match="No space"):
        write_layer([], [str(layers.stack[0])], TRUSTED, _Full(room), Encoding(compression))  # type: ignore[arg-type]


def test_a_writer_that_takes_little_at_once_gets_all(layers: Layers) -> None:
    layers.add(Tree().file("f", os.urandom(600_000)))
    expected, _ = layers.write()
    took = bytearray()

    class Pipe:
        def write(self, data: memoryview) -> int:
            took.extend(data[:1000])
            return min(len(data), 1000)

    write_layer([], [str(layers.stack[0])], TRUSTED, Pipe())  # type: ignore[arg-type]
    assert took == expected


def test_a_file_that_becomes_shorter_is_no_archive(layers: Layers) -> None:
    layers.add(Tree().file("f", b"x" * 30_000_000))

    class Shortening:
        """Only some blocks are read ahead of what is written."""

        def write(self, data: memoryview) -> int:
            os.truncate(layers.stack[0] / "f", 10)
            return len(data)

    with pytest.raises(errors.FailedPrecondition, match="f became shorter"):
        write_layer([], [str(layers.stack[0])], TRUSTED, Shortening())  # type: ignore[arg-type]


def test_progress_ends_it_when_it_raises(layers: Layers) -> None:
    layers.add(Tree().file("f", b"x" * 3_000_000))

    def stop(_: Progress) -> None:
        raise errors.Canceled("stop")

    with pytest.raises(errors.Canceled):
        layers.write(progress=stop)
    seen: list[Progress] = []
    _, done = layers.write(progress=seen.append)
    assert (seen[-1].stage, seen[-1].done, seen[-1].unit) == ("diff", done.uncompressed, "bytes")


# Memory


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_memory_is_flat(root: Path, compression: str) -> None:
    """300 MB and 1 MB, each in a process of its own: what is in memory does not depend on the size."""
    script = (
        "import os, sys\n"
        "from onlap.layers.diff.write import Encoding, write_layer\n"
        "from onlap.overlayfs.markers import Markers\n"
        "with open(os.devnull, 'wb', buffering=0) as out:\n"
        "    write_layer([], [sys.argv[1]], Markers('trusted'), out, Encoding(sys.argv[2]))\n"
        # Not ru_maxrss, which a child inherits from the process that started it.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    peaks = []
    for name, size in (("small", 1_000_000), ("big", 300_000_000)):
        directory = root / name
        directory.mkdir()
        with open(directory / "f", "wb") as file:
            file.truncate(size)
        peaks.append(int(run_python(script, directory, compression).stdout) / 1024)
    assert peaks[1] < peaks[0] + 24, peaks
    assert peaks[1] < 80, peaks
