"""Applying a layer into a directory: everything is kept, whoever does it."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kernel.layer_oracle import (
    TIME,
    apply_to,
    archive,
    directory,
    entry,
    hardlink,
    look,
    symlink,
)
from kernel.layer_stacks import (
    CAPABILITY,
)
from onlap.layers.format import tar
from onlap.overlayfs.markers import Markers, is_whiteout
from onlap.syscalls import files
from onlap.trees.meta import OVERRIDE_XATTR

privileged = pytest.mark.needs("mount")
overlay = pytest.mark.needs("overlay", "mount")

# What is kept


@privileged
def test_everything_is_kept(layer: Path) -> None:
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, number)
        for tag, permissions, number in [
            (1, 6, -1 & 0xFFFFFFFF),
            (2, 4, 7),
            (4, 4, 2**32 - 1),
            (16, 4, 2**32 - 1),
            (32, 4, 2**32 - 1),
        ]
    )
    apply_to(
        layer,
        archive(
            [
                directory("./", mode=0o1711, uid=3, gid=4, mtime_ns=TIME + 5, xattrs={"user.top": b"t"}),
                directory("d/", mode=0o2750, uid=5, gid=6, mtime_ns=TIME + 7, xattrs={"user.d": b"\0"}),
                entry("d/suid", data=b"x", mode=0o6755, uid=8, gid=9, mtime_ns=TIME + 10),
                entry("d/readonly", mode=0, mtime_ns=TIME + 11, xattrs={"user.x": b"y", "user.empty": b""}),
                entry("d/capable", xattrs={"security.capability": CAPABILITY}),
                entry("d/acl", mode=0o644, xattrs={"system.posix_acl_access": acl}),
                symlink("d/link", "/some\nwhere", uid=11, gid=12),
                hardlink("d/hard", "./d/suid"),
                entry("fifo", tar.FIFO, mode=0o622, uid=13, mtime_ns=TIME - 1),
                entry("null", tar.CHAR, mode=0o666, devmajor=1, devminor=3),
                entry("disk", tar.BLOCK_DEVICE, mode=0o660, devmajor=4095, devminor=2**20 - 1),
                entry(os.fsdecode(b"\xff\xfe")),
            ]
        ),
    )
    seen = look(layer)
    assert seen["."][:4] == (stat.S_IFDIR, 0o1711, (3, 4), None)
    assert (seen["."].mtime_ns, seen["."].xattrs) == (TIME + 5, (("user.top", b"t"),))
    assert seen["d"][:3] == (stat.S_IFDIR, 0o2750, (5, 6))
    assert (seen["d"].mtime_ns, seen["d"].xattrs) == (TIME + 7, (("user.d", b"\0"),))
    assert seen["d/suid"][:5] == (stat.S_IFREG, 0o6755, (8, 9), b"x", TIME + 10)
    assert seen["d/readonly"].mode == 0
    assert seen["d/readonly"].xattrs == (("user.empty", b""), ("user.x", b"y"))
    assert seen["d/readonly"].owner == (0, 0), "not the group of the set-group-ID directory"
    assert seen["d/capable"].xattrs == (("security.capability", CAPABILITY),)
    assert dict(seen["d/acl"].xattrs)["system.posix_acl_access"] == acl
    assert seen["d/link"][:5] == (stat.S_IFLNK, 0o777, (11, 12), "/some\nwhere", TIME + 1)
    assert os.path.samefile(layer / "d/hard", layer / "d/suid")
    assert seen["fifo"][:5] == (stat.S_IFIFO, 0o622, (13, 0), None, TIME - 1)
    assert seen["null"][:4] == (stat.S_IFCHR, 0o666, (0, 0), os.makedev(1, 3))
    assert seen["disk"].content == os.makedev(4095, 2**20 - 1)
    assert os.fsdecode(b"\xff\xfe") in seen


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_modes_whatever_the_umask(layer: Path, umask: int) -> None:
    modes = [0, 0o644, 0o755, 0o777, 0o4711, 0o2755, 0o1777]
    old = os.umask(umask)
    try:
        apply_to(
            layer,
            archive(
                item
                for mode in modes
                for item in (
                    entry(f"f{mode:o}", mode=mode, uid=os.getuid(), gid=os.getgid()),
                    directory(f"d{mode:o}/", mode=mode, uid=os.getuid(), gid=os.getgid()),
                    entry(f"d{mode:o}/x", tar.FIFO, mode=mode, uid=os.getuid(), gid=os.getgid()),
                )
            ),
            markers=Markers("user"),
        )
    finally:
        os.umask(old)
    for mode in modes:
        for name in (f"f{mode:o}", f"d{mode:o}"):
            assert stat.S_IMODE((layer / name).stat().st_mode) == mode, name
        if os.getuid() == 0:
            assert stat.S_IMODE((layer / f"d{mode:o}" / "x").stat().st_mode) == mode


def test_times_of_directories_in_any_order(layer: Path) -> None:
    many = [directory(f"many{number}/", mtime_ns=TIME + number) for number in range(200)]
    late = [entry(f"many{number}/late") for number in range(200)]
    apply_to(
        layer,
        archive(
            [
                entry("after/file"),
                directory("after/", mtime_ns=TIME + 1),
                directory("before/", mtime_ns=TIME + 2),
                *many,
                entry("before/file"),
                *late,
                hardlink("before/hard", "after/file"),
                directory("./", mtime_ns=TIME + 3),
            ]
        ),
    )
    assert (layer / "after").stat().st_mtime_ns == TIME + 1
    assert (layer / "before").stat().st_mtime_ns == TIME + 2
    assert layer.stat().st_mtime_ns == TIME + 3
    assert all((layer / f"many{n}").stat().st_mtime_ns == TIME + n for n in range(200))


def test_a_directory_with_more_directories_than_are_open_at_a_time(layer: Path) -> None:
    names = [f"d/d{number}" for number in range(200)]
    apply_to(layer, archive([directory("d/", mtime_ns=TIME), *[directory(f"{name}/") for name in names], entry("d/f")]))
    assert set(look(layer)) == {".", "d", "d/f", *names}
    assert (layer / "d").stat().st_mtime_ns == TIME


def test_default_acls_are_kept_and_not_inherited(layer: Path) -> None:
    everyone = 2**32 - 1
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, 7, number)
        for tag, number in [(1, everyone), (2, 7), (4, everyone), (16, everyone), (32, everyone)]
    )
    name = "system.posix_acl_default"
    apply_to(
        layer,
        archive(
            [
                directory("d/", xattrs={name: acl}),
                entry("d/file"),
                directory("d/below/"),
                *[directory(f"other{number}/") for number in range(100)],
                entry("d/late"),
            ]
        ),
    )
    assert os.getxattr(layer / "d", name) == acl
    assert os.listxattr(layer / "d/file") == os.listxattr(layer / "d/below") == os.listxattr(layer / "d/late") == []
    assert stat.S_IMODE((layer / "d/file").stat().st_mode) == 0o644


def test_a_layer_below_a_default_acl(layer: Path) -> None:
    everyone = 2**32 - 1
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, 7, number) for tag, number in [(1, everyone), (4, everyone), (32, everyone)]
    )
    os.setxattr(layer, "system.posix_acl_default", acl)
    apply_to(layer, archive([directory("d/"), entry("d/file"), entry("file", mode=0o600)]))
    assert stat.S_IMODE((layer / "file").stat().st_mode) == 0o600
    assert os.listxattr(layer / "d") == []
    assert os.getxattr(layer, "system.posix_acl_default") == acl


def test_holes_stay_holes(layer: Path) -> None:
    size, offset = 64 << 20, 32 << 20
    data = os.urandom(8192)
    records = [
        tar.format_record("GNU.sparse.major", b"1"),
        tar.format_record("GNU.sparse.minor", b"0"),
        tar.format_record("GNU.sparse.realsize", b"%d" % size),
    ]
    map_ = b"1\n%d\n%d\n" % (offset, len(data))
    stored = map_.ljust(512, b"\0") + data
    pax = b"".join(records)
    made = _block("x", len(pax)) + pax.ljust(512, b"\0") + _block("0", len(stored)) + stored + bytes(1024)
    apply_to(layer, made)
    status = (layer / "file").stat()
    assert status.st_size == size
    assert status.st_blocks * 512 < 1 << 20
    with (layer / "file").open("rb") as file:
        file.seek(offset)
        assert file.read(len(data)) == data
        assert file.read(10) == bytes(10)


def _block(type: str, size: int) -> bytes:
    from onlap.layers.format.writer import encode

    block = bytearray(encode(tar.Entry("file", tar.FILE, size=size)))
    block[156:157] = type.encode()
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# Without privilege

_AS_USER = """
import json, os, sys
from onlap.layers.apply.archive import apply
from onlap.overlayfs.markers import Markers
lowers = [f"/proc/self/fd/{fd}/." for fd in sys.argv[2:]]
applied = apply(sys.stdin.buffer, int(sys.argv[1]), lowers=lowers, markers=Markers("user"))
print(json.dumps([applied.entries, dict(applied.skipped)]))
"""


def _as_user(layer: Path, data: bytes, lowers: Sequence[Path] = ()) -> tuple[int, dict[str, int]]:
    """Apply as an ordinary user, who owns the layer."""
    privileged = os.geteuid() == 0
    if privileged:
        os.chown(layer, 65534, 65534)
    fds = [os.open(path, os.O_RDONLY) for path in (layer, *lowers)]
    try:
        command = [sys.executable, "-c", _AS_USER, *map(str, fds)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command,
            input=data,
            capture_output=True,
            pass_fds=fds,
            env=environment,
            cwd="/",
            user=65534 if privileged else None,
            group=65534 if privileged else None,
            extra_groups=[] if privileged else None,
        )
    finally:
        for fd in fds:
            os.close(fd)
    if b"ModuleNotFoundError" in done.stderr:
        pytest.skip("an ordinary user cannot read the sources here")
    assert done.returncode == 0, done.stderr.decode()
    entries, skipped = json.loads(done.stdout)
    return entries, skipped


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user_records_owners(layer: Path) -> None:
    entries, skipped = _as_user(
        layer,
        archive(
            [
                directory("d/", mode=0o555, uid=0, gid=0),
                entry(
                    "d/f",
                    data=b"x",
                    mode=0o4444,
                    uid=5,
                    gid=6,
                    xattrs={"user.a": b"b", "security.capability": CAPABILITY},
                ),
                directory("closed/", mode=0),
                entry("closed/f"),
                symlink("s", "t", uid=9),
                entry("null", tar.CHAR, devmajor=1, devminor=3),
                entry("fifo", tar.FIFO),
                hardlink("hard", "closed/f"),
            ]
        ),
    )
    assert entries == 8
    assert skipped == {"owner": 6, "xattr": 1, "device": 1}
    assert os.getxattr(layer / "d", OVERRIDE_XATTR) == b"0:0:0555"
    assert os.getxattr(layer / "d/f", OVERRIDE_XATTR) == b"5:6:04444"
    assert os.getxattr(layer / "d/f", "user.a") == b"b"
    assert stat.S_IMODE((layer / "d/f").stat().st_mode) == 0o4444
    assert stat.S_IMODE((layer / "d").stat().st_mode) == 0o555
    assert stat.S_IMODE((layer / "closed").stat().st_mode) == 0
    assert not (layer / "null").exists()
    assert (layer / "closed").stat().st_mtime_ns == TIME + 1


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user_has_whiteouts_too(root: Path) -> None:
    lower, upper = root / "lower", root / "upper"
    lower.mkdir()
    upper.mkdir()
    _as_user(lower, archive([entry("a"), directory("d/", mode=0o500), entry("d/old"), symlink("s", "d")]))
    _as_user(upper, archive([entry(".wh.a"), entry("d/new"), entry("s/more"), entry("d/.wh..wh..opq")]), [lower])
    assert is_whiteout((upper / "a").lstat())
    assert os.getxattr(upper / "d", "user.overlay.opaque") == b"y"
    assert sorted(os.listdir(upper / "d")) == ["more", "new"]
    assert stat.S_IMODE((upper / "d").stat().st_mode) == 0o500


@pytest.mark.needs("peer:tar")
@privileged
def test_it_is_what_gnu_tar_extracts(root: Path) -> None:
    tree, ours, theirs = root / "tree", root / "ours", root / "theirs"
    for path in (tree, ours, theirs):
        path.mkdir()
    (tree / "d/e").mkdir(parents=True)
    (tree / "d/e" / ("name" * 40)).write_bytes(os.urandom(70_000))
    (tree / "d/suid").write_bytes(b"x")
    os.chown(tree / "d/suid", 5, 6)
    (tree / "d/suid").chmod(0o6711)
    os.link(tree / "d/suid", tree / "hard")
    (tree / "link").symlink_to("d" * 200)
    os.mkfifo(tree / "fifo")
    with (tree / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
        file.truncate(3 << 20)
    os.setxattr(tree / "d", "user.a", b"b")
    os.utime(tree / "d", ns=(TIME, TIME + 3))
    for options in (["--format=gnu"], ["--format=pax", "--xattrs"]):
        command = ["tar", "-c", "-S", "--numeric-owner", *options, "-C", str(tree), "."]
        data = subprocess.run(command, check=True, capture_output=True).stdout
        for path in (ours, theirs):
            for name in os.listdir(path):
                subprocess.run(["rm", "-rf", str(path / name)], check=True)
        apply_to(ours, data)
        extract = ["tar", "-x", "-p", "--xattrs", "--numeric-owner", "-C", str(theirs)]
        subprocess.run(extract, input=data, check=True)
        assert look(ours) == look(theirs)
        assert os.path.samefile(ours / "hard", ours / "d/suid")
        assert (ours / "sparse").stat().st_blocks == (theirs / "sparse").stat().st_blocks


def test_before_openat2(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 5.5 and older: the same, one name after the other."""

    def missing(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files, "openat2", missing)
    (layer / "a/b").mkdir(parents=True)
    (layer / "out").symlink_to("/")
    apply_to(layer, archive([entry("a/b/c/f"), entry("out/x"), entry("a/b/c/g")]), markers=None)
    assert {name for name, seen in look(layer).items() if seen.kind == stat.S_IFREG} == {"a/b/c/f", "a/b/c/g", "x"}


_FLAT = """
import os, resource, sys
from onlap.layers.stream import compression
from onlap.layers.apply.archive import apply
from onlap.layers.format.tar import Entry
from onlap.layers.format.writer import encode

SIZE = 400_000_000


class Source:
    def __init__(self, kind):
        self.kind = kind
        self.data = self.make()
        self.rest = b""

    def make(self):
        compress = flush = bytes
        if self.kind != compression.NONE:
            made = compression.compressor(self.kind, 1)
            compress, flush = made.compress, made.flush
        yield compress(encode(Entry("f", size=SIZE)))
        for _ in range(SIZE // 1_000_000):
            yield compress(os.urandom(100_000) * 10)
        yield compress(bytes(-SIZE % 512 + 1024)) + flush()

    def read(self, count):
        while not self.rest:
            try:
                self.rest = next(self.data)
            except StopIteration:
                return b""
        out, self.rest = self.rest[:count], self.rest[count:]
        return out


before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
applied = apply(Source(sys.argv[2]), int(sys.argv[1]), markers=None)
print(applied.uncompressed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["none", "gzip", "zstd"])
def test_memory_is_flat(layer: Path, kind: str) -> None:
    """A file of 400 MB goes through in a tenth of it."""
    fd = os.open(layer, os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _FLAT, str(fd), kind],
            capture_output=True,
            pass_fds=[fd],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr.decode()
    uncompressed, kilobytes = map(int, done.stdout.split())
    assert uncompressed > 400_000_000
    assert kilobytes < 40_000
