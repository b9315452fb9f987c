"""Archives that attack, that are broken, or that are only odd: none reaches anything outside of its layer.

Every one is applied to a fresh layer and to a whole tree which has a symlink that leads out of it. What lies outside
must stay as it is; a refusal names the entry, and leaves a fresh layer empty; what was made can be removed.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlap import errors
from onlap.errors import shown
from onlap.layers.apply.applier import Applier
from onlap.layers.apply.archive import Applied, Limits, apply
from onlap.layers.format import tar
from onlap.layers.format.tar import Entry
from onlap.overlayfs.markers import Markers
from onlap.trees.remove import remove
from pure.tar_makers import END, gnu_long, header, padded, pax, read

BAD = errors.InvalidArgument
LOST = errors.DataLoss
FULL = errors.ResourceExhausted


class Case(NamedTuple):
    """An archive; ``error`` is what must come of it, None when it is only odd; ``named`` is in the message."""

    data: bytes
    error: type[errors.OnlapError] | None = BAD
    named: str = ""
    limits: Limits | None = None


def _file(name: bytes, data: bytes = b"evil", **fields: bytes) -> bytes:
    return header(name, size=len(data), **fields) + padded(data)


def _dir(name: bytes, mode: bytes = b"0000755\0") -> bytes:
    return header(name, flag=b"5", mode=mode)


def _symlink(name: bytes, target: bytes) -> bytes:
    return (
        pax(("linkpath", target)) + header(name, flag=b"2")
        if len(target) > 100
        else header(name, flag=b"2", link=target)
    )


def _hardlink(name: bytes, target: bytes) -> bytes:
    return header(name, flag=b"1", link=target, mode=b"0000777\0")


def _device(flag: bytes, major: bytes, minor: bytes) -> bytes:
    return header(b"device", flag=flag, devices=major + minor)


def _xattr(name: str, value: bytes) -> bytes:
    return pax((f"SCHILY.xattr.{name}", value)) + _file(b"f")


def _raw_pax(data: bytes) -> bytes:
    return header(b"pax", flag=b"x", size=len(data)) + padded(data) + _file(b"f")


def _number(value: int, width: int) -> bytes:
    return (value & ((1 << (8 * width)) - 1) | 1 << (8 * width - 1)).to_bytes(width, "big")


def _sparse(pieces: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    records = [
        ("GNU.sparse.size", b"%d" % size),
        ("GNU.sparse.numblocks", b"%d" % len(pieces)),
        ("GNU.sparse.map", b",".join(b"%d,%d" % piece for piece in pieces)),
    ]
    return pax(*records) + _file(b"sparse", data)


def _chain(length: int) -> bytes:
    links = b"".join(_symlink(b"l%d" % n, b"l%d" % (n + 1)) for n in range(length))
    return links + _dir(b"l%d" % length) + _file(b"l0/x")


_LONG = b"d/" * 2047
_OUT = b"@OUTSIDE@"  # replaced by the path of a directory outside; as long as that, see _placed

CASES: dict[str, Case] = {
    # Names that lead out
    "name-up": Case(_file(b"../escape"), named="../escape"),
    "name-down-up": Case(_file(b"a/../../escape"), named="a/../../escape"),
    "name-absolute-up": Case(_file(b"/../escape"), named="/../escape"),
    "name-dot-up": Case(_file(b"./../escape"), named="./../escape"),
    "name-up-twice": Case(_file(b"../../outside/secret"), named="secret"),
    "name-is-up": Case(_dir(b".."), named=".."),
    "name-is-up-slash": Case(_dir(b"../"), named="../"),
    "name-pax-up": Case(pax(("path", b"../escape")) + _file(b"f"), named="../escape"),
    "name-gnu-up": Case(gnu_long(b"L", b"../escape") + _file(b"f"), named="../escape"),
    "name-prefix-up": Case(_file(b"escape", prefix=b".."), named="../escape"),
    "name-sparse-up": Case(
        pax(
            ("GNU.sparse.map", b"0,4"),
            ("GNU.sparse.numblocks", b"1"),
            ("GNU.sparse.size", b"4"),
            ("GNU.sparse.name", b"../escape"),
        )
        + _file(b"f"),
        named="../escape",
    ),
    "name-global-up": Case(pax(("path", b"../escape"), flag=b"g") + _file(b"f"), None),
    "name-absolute": Case(_file(b"/etc/passwd"), None),
    "name-slashes": Case(_file(b"//a///b"), None),
    "name-dots": Case(_file(b"a/./b/../c"), None),
    "name-back-to-top": Case(_dir(b"a/.."), None),
    "name-outside-path": Case(_file(_OUT + b"/secret"), None),
    # Names that cannot be
    "name-empty": Case(_file(b"")),
    "name-empty-directory": Case(_dir(b"")),
    "name-top-file": Case(_file(b".")),
    "name-slash-symlink": Case(_symlink(b"/", b"x")),
    "name-top-device": Case(header(b"./", flag=b"3")),
    "name-nul": Case(pax(("path", b"a\0b")) + _file(b"f"), named="a\\0b"),
    "name-escape-sequence": Case(_file(b"../\x1b[31m"), named="../\\e[31m"),
    "name-component-255": Case(pax(("path", b"n" * 255)) + _file(b"f"), None),
    "name-component-256": Case(pax(("path", b"n" * 256)) + _file(b"f"), named="nnn"),
    "name-4095": Case(pax(("path", _LONG + b"f")) + _file(b"f"), None),
    "name-4096": Case(pax(("path", _LONG + b"ff")) + _file(b"f"), None),
    "name-65535": Case(pax(("path", b"%s/" % (b"n" * 254) * 256 + b"n" * 254 + b"f")) + _file(b"f"), None),
    "name-65536": Case(pax(("path", b"%s/" % (b"n" * 254) * 257 + b"f")) + _file(b"f"), named="nnn"),
    "name-100000-levels": Case(pax(("path", b"d/" * 100_000)) + _file(b"f"), named="d/d/"),
    "name-deep-by-symlink": Case(
        pax(("path", _LONG))
        + _dir(b"d")
        + pax(("linkpath", _LONG[:2000]))
        + header(b"l", flag=b"2")
        # Each step through the link goes a thousand levels down.
        + pax(("path", b"l/" + b"e/" * 32_000 + b"f"))
        + _file(b"f"),
        named="l/e/e",
    ),
    "name-of-a-file-with-a-slash": Case(_file(b"f/", header(b"../escape")), None),
    "name-not-utf8": Case(_file(b"\xff\xfe"), None),
    # Through symlinks
    "symlink-up": Case(_symlink(b"evil", b"../outside") + _file(b"evil/secret"), None),
    "symlink-absolute": Case(_symlink(b"evil", _OUT) + _file(b"evil/secret"), None),
    "symlink-to-symlink": Case(_symlink(b"a", b"b") + _symlink(b"b", b"../../outside") + _file(b"a/secret"), None),
    "symlink-in-directory": Case(_dir(b"d/") + _symlink(b"d/up", b"../../outside") + _file(b"d/up/secret"), None),
    "symlink-then-directory": Case(_symlink(b"evil", _OUT) + _dir(b"evil/", b"0000000\0"), None),
    "symlink-then-file": Case(_symlink(b"evil", _OUT + b"/secret") + _file(b"evil"), None),
    "symlink-then-fifo": Case(_symlink(b"evil", _OUT + b"/secret") + header(b"evil", flag=b"6"), None),
    "symlink-then-implicit": Case(_symlink(b"evil", _OUT) + _file(b"evil/a/b/c"), None),
    "symlink-dangling": Case(_symlink(b"a", b"b/c/d") + _file(b"a/x"), None),
    "symlink-to-whiteout-name": Case(_symlink(b"a", b".wh.b") + _file(b"a/x"), named="a/x"),
    "symlink-loop": Case(_symlink(b"a", b"b") + _symlink(b"b", b"a") + _file(b"a/x"), named="a/x"),
    "symlink-to-itself": Case(_symlink(b"a", b"a") + _file(b"a/x"), named="a/x"),
    "symlink-chain-40": Case(_chain(40), None),
    "symlink-chain-41": Case(_chain(41), named="l0/x"),
    "symlink-to-nothing": Case(_symlink(b"a", b""), named="a"),
    "symlink-target-5000": Case(_symlink(b"a", b"t" * 5000), named="a"),
    "symlink-existing": Case(_file(b"leads-out/secret"), None),
    "symlink-existing-whiteout": Case(_file(b"leads-out/.wh.secret"), None),
    "symlink-existing-opaque": Case(_file(b"leads-out/.wh..wh..opq"), None),
    "symlink-existing-chmod": Case(_dir(b"leads-out/", b"0000000\0"), None),
    "symlink-existing-link": Case(_hardlink(b"h", b"leads-out/secret"), named="h"),
    # Hard links
    "hardlink-up": Case(_hardlink(b"h", b"../outside/secret"), named="h"),
    "hardlink-absolute": Case(_hardlink(b"h", _OUT + b"/secret"), named="h"),
    "hardlink-pax-up": Case(pax(("linkpath", b"../outside/secret")) + _hardlink(b"h", b"x"), named="h"),
    "hardlink-through-symlink": Case(_symlink(b"evil", _OUT) + _hardlink(b"h", b"evil/secret"), named="h"),
    "hardlink-to-symlink-then-write": Case(
        _symlink(b"s", _OUT + b"/secret") + _hardlink(b"h", b"s") + _file(b"h"), None
    ),
    "hardlink-to-symlink": Case(_symlink(b"s", _OUT + b"/secret") + _hardlink(b"h", b"s"), None),
    "hardlink-to-nothing": Case(_hardlink(b"h", b""), named="h"),
    "hardlink-to-missing": Case(_hardlink(b"h", b"missing"), named="h"),
    "hardlink-to-top": Case(_hardlink(b"h", b"./"), named="h"),
    "hardlink-to-directory": Case(_dir(b"d/") + _hardlink(b"h", b"d"), named="h"),
    "hardlink-to-itself": Case(_file(b"f") + _hardlink(b"f", b"./f"), None),
    "hardlink-to-itself-missing": Case(_hardlink(b"new", b"new"), named="new"),
    "hardlink-over-its-directory": Case(_file(b"d/x") + _hardlink(b"d", b"d/x"), named="d"),
    "hardlink-to-whiteout": Case(_hardlink(b"h", b".wh.x"), named="h"),
    "hardlink-then-rewrite": Case(_file(b"f") + _hardlink(b"g", b"f") + _file(b"g", b"new"), None),
    # Whiteouts
    "whiteout-empty": Case(_file(b".wh."), named=".wh."),
    "whiteout-dot": Case(_file(b".wh.."), named=".wh.."),
    "whiteout-up": Case(_file(b".wh..."), named=".wh..."),
    "whiteout-below-empty": Case(_file(b"a/.wh."), named="a/.wh."),
    "whiteout-outside": Case(_file(b"../.wh.outside"), named="../.wh.outside"),
    "whiteout-directory": Case(_file(b".wh.a/b"), named=".wh.a/b"),
    "whiteout-as-directory": Case(_dir(b".wh.a/"), None),
    "whiteout-of-nothing": Case(_file(b".wh.missing") + _file(b"no/such/.wh.x"), None),
    "whiteout-opaque-nowhere": Case(_file(b"no/.wh..wh..opq"), None),
    "whiteout-twice": Case(_file(b".wh.a") * 2, None),
    "whiteout-aufs": Case(_file(b".wh..wh.aufs") + _dir(b".wh..wh.plnk/") + _file(b".wh..wh.plnk/1.2"), None),
    "whiteout-in-overlay-form": Case(_device(b"3", b"0000000\0", b"0000000\0"), None),
    # Types and numbers
    "device-major": Case(_device(b"3", b"0010000\0", b"0000001\0"), named="device"),
    "device-minor": Case(_device(b"4", b"0000001\0", b"4000000\0"), named="device"),
    "device-huge": Case(_device(b"3", _number(1 << 40, 8), b"0000001\0"), named="device"),
    "device-negative": Case(_device(b"3", b"\xff" * 8, b"0000001\0"), named="device"),
    "device-text": Case(_device(b"3", b"abcdefg\0", b"0000001\0"), named="device"),
    "type-unknown": Case(header(b"f", flag=b"Z"), named="f"),
    "type-multivolume": Case(header(b"f", flag=b"M"), named="f"),
    "size-negative": Case(header(b"f", size=b"\xff" * 12), named="f"),
    "size-huge": Case(header(b"f", size=b"\xbf" + b"\xff" * 11), named="f"),
    "size-terabytes": Case(header(b"f", size=b"\x80" + (1 << 42).to_bytes(11, "big")), LOST, "f"),
    "size-text": Case(header(b"f", size=b"0x0000000001"), named="f"),
    "size-signed": Case(header(b"f", size=b"-00000000001"), named="f"),
    "owner-negative": Case(_file(b"f", uid=b"\xff" * 8), named="f"),
    "owner-minus-one": Case(_file(b"f", uid=_number(0xFFFFFFFF, 8)), named="f"),
    "owner-huge": Case(_file(b"f", gid=_number(1 << 40, 8)), named="f"),
    "mode-text": Case(_file(b"f", mode=b"rwxrwxr\0"), named="f"),
    "time-huge": Case(_file(b"f", mtime=_number(1 << 90, 12)), named="f"),
    "time-first-of-all": Case(_file(b"f", mtime=_number(-(1 << 63), 12)), None),
    "time-last-of-all": Case(_file(b"f", mtime=_number((1 << 63) - 1, 12)), None),
    "time-first-of-all-pax": Case(pax(("mtime", b"-9223372036854775807.9")) + _file(b"f"), None),
    "time-before-the-epoch": Case(_file(b"f", mtime=b"\xff" * 12), None),
    "mode-file-type-bits": Case(_file(b"f", mode=b"0177777\0"), None),
    # pax
    "pax-length-beyond": Case(_raw_pax(b"99 path=x\n")),
    "pax-length-short": Case(_raw_pax(b"5 path=x\n")),
    "pax-length-zero": Case(_raw_pax(b"0 path=x\n")),
    "pax-length-text": Case(_raw_pax(b"-9 path=x\n")),
    "pax-length-huge": Case(_raw_pax(b"9" * 30 + b" path=x\n")),
    "pax-no-newline": Case(_raw_pax(b"9 path=xx")),
    "pax-no-key": Case(_raw_pax(b"5 =x\n")),
    "pax-no-equals": Case(_raw_pax(b"7 path\n")),
    "pax-nul-in-key": Case(_raw_pax(b"10 pa\0th=x\n")),
    "pax-terabytes": Case(header(b"p", flag=b"x", size=b"\x80" + (1 << 42).to_bytes(11, "big"))),
    "pax-two-megabytes": Case(header(b"p", flag=b"x", size=2 << 20) + bytes(2 << 20)),
    "pax-long-name-terabytes": Case(header(b"p", flag=b"L", size=b"\x80" + (1 << 42).to_bytes(11, "big"))),
    "pax-size-negative": Case(pax(("size", b"-1")) + _file(b"f"), named="f"),
    "pax-size-float": Case(pax(("size", b"1e3")) + _file(b"f"), named="f"),
    "pax-size-huge": Case(pax(("size", b"9" * 20)) + _file(b"f"), named="f"),
    "pax-uid-minus-one": Case(pax(("uid", b"4294967295")) + _file(b"f"), named="f"),
    "pax-time-text": Case(pax(("mtime", b"nan")) + _file(b"f"), named="f"),
    "pax-time-huge": Case(pax(("mtime", b"9" * 19)) + _file(b"f"), named="f"),
    "pax-without-entry": Case(pax(("path", b"x")), LOST),
    "pax-many": Case(pax(("comment", b"x")) * 500 + _file(b"f"), None),
    "pax-twice": Case(pax(("path", b"one"), ("path", b"two")) + _file(b"f"), None),
    "pax-global-garbage": Case(header(b"g", flag=b"g", size=9) + padded(b"9 path=xx") + _file(b"f")),
    "pax-global-odd": Case(pax(("uid", b"x"), ("GNU.sparse.major", b"7"), flag=b"g") + _file(b"f"), None),
    # xattrs
    "xattr-no-name": Case(_xattr("", b"x"), named="f"),
    "xattr-long-name": Case(_xattr("user." + "n" * 300, b"x"), named="f"),
    "xattr-large": Case(_xattr("user.x", bytes(70_000)), named="f"),
    "xattr-acl-garbage": Case(_xattr("system.posix_acl_access", b"\2\0\0\0" + b"\xff" * 8), named="f"),
    "xattr-namespace-alone": Case(_xattr("user.", b"x"), named="f"),
    "xattr-unknown-namespace": Case(_xattr("other.x", b"x"), None),
    "xattr-overlay": Case(_xattr("trusted.overlay.opaque", b"y") + _xattr("user.overlay.redirect", b"/"), None),
    "xattr-record-of-owners": Case(_xattr("user.containers.override_stat", b"0:0:04755"), None),
    # Sparse files
    "sparse-overlap": Case(_sparse([(0, 2), (1, 2)], 100, b"evil"), named="sparse"),
    "sparse-backwards": Case(_sparse([(50, 2), (0, 2)], 100, b"evil"), named="sparse"),
    "sparse-beyond": Case(_sparse([(98, 4)], 100, b"evil"), named="sparse"),
    "sparse-odd-map": Case(
        pax(("GNU.sparse.map", b"0,4,5"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.size", b"9")) + _file(b"sparse"),
        named="sparse",
    ),
    "sparse-directory": Case(
        pax(("GNU.sparse.map", b"0,4"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.size", b"9")) + _dir(b"sparse"),
        named="sparse",
    ),
    "sparse-unknown-version": Case(pax(("GNU.sparse.major", b"2")) + _file(b"sparse"), named="sparse"),
    "sparse-exabytes": Case(_sparse([((1 << 63) - 5, 4)], (1 << 63) - 1, b"evil"), FULL, "sparse"),
    "sparse-terabyte-limited": Case(
        _sparse([((1 << 40) - 4, 4)], 1 << 40, b"evil"), FULL, "sparse", Limits(bytes=1 << 30)
    ),
    # Repeats
    "two-tops": Case(_dir(b"./", b"0000700\0") + _dir(b"./", b"0000755\0"), None),
    "file-below-file": Case(_file(b"f") + _file(b"f/x"), named="f/x"),
    "file-below-fifo": Case(header(b"f", flag=b"6") + _file(b"f/x/y"), named="f/x/y"),
    "file-over-directory": Case(_file(b"d/x") + _file(b"d"), None),
    "directory-over-file": Case(_file(b"d") + _dir(b"d/") + _file(b"d/x"), None),
    "file-over-fifo": Case(header(b"f", flag=b"6") + _file(b"f"), None),
    "file-many-times": Case(_file(b"f") * 100, None),
    "directory-without-rights": Case(_dir(b"d/", b"0000000\0") + _file(b"d/a/b"), None),
    # Damage
    "not-an-archive": Case(b"hello" * 1000),
    "checksum-wrong": Case(_file(b"a") + header(b"f", checksum=b"000001\0 ")),
    "checksum-text": Case(_file(b"a") + header(b"f", checksum=b"abcdefg\0")),
    "half-an-end": Case(_file(b"a") + bytes(512) + _file(b"f")),
    "cut-in-header": Case(_file(b"a") + header(b"f")[:100], LOST),
    "cut-in-data": Case(header(b"f", size=1000) + bytes(600), LOST, "f"),
    "cut-in-padding": Case(header(b"f", size=1) + b"x", None),
    "cut-in-pax": Case(pax(("path", b"x" * 600))[:1000], LOST),
    "gzip-cut": Case(gzip.compress(_file(b"f", os.urandom(9000)) + END)[:-20], LOST),
    "gzip-garbage-behind": Case(gzip.compress(_file(b"f") + END) + b"garbage"),
    "bomb-ratio": Case(gzip.compress(header(b"f", size=8 << 20) + bytes(8 << 20) + END), FULL, "f", Limits(ratio=100)),
    "bomb-bytes": Case(
        gzip.compress(header(b"f", size=8 << 20) + bytes(8 << 20) + END), FULL, "f", Limits(bytes=1 << 20)
    ),
    "bomb-entries": Case(_file(b"f") * 20, FULL, "f", Limits(entries=10)),
}

# These are cut on purpose.
_NO_END = ("cut-", "gzip-", "bomb-bytes", "bomb-ratio", "pax-without-entry")


def test_there_are_enough() -> None:
    assert len(CASES) >= 60


def _placed(case: Case, outside: Path) -> bytes:
    """The archive with the real path of the outside; headers are made anew where it is in one."""
    if _OUT not in case.data:
        return case.data
    path = os.fsencode(outside)
    blocks = []
    for at in range(0, len(case.data), 512):
        block = case.data[at : at + 512]
        if _OUT in block[:257]:
            fields = [block[:100], block[157:257]]
            name, link = (field.rstrip(b"\0").replace(_OUT, path) for field in fields)
            block = pax(("path", name), ("linkpath", link)) + block
        blocks.append(block)
    return b"".join(blocks)


class _Place:
    """A layer with something outside of it that must not be touched."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.outside = base / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(b"secret")
        (self.outside / "secret").chmod(0o640)
        self.layer = base / "parent" / "layer"
        self.layer.mkdir(parents=True)
        self._before = self._state()

    def _state(self) -> list[tuple[str, int, int, int, int, bytes]]:
        found = []
        for top in (self.outside, self.base, self.layer.parent):
            for path in [top, *sorted(top.iterdir())]:
                if path == self.layer or (top != self.outside and path.is_dir()):
                    continue
                status = path.lstat()
                content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
                found.append((str(path), status.st_mode, status.st_ino, status.st_mtime_ns, status.st_nlink, content))
        names = sorted(os.listdir(self.base)) + sorted(os.listdir(self.layer.parent))
        found.append((" ".join(names), 0, 0, 0, 0, b""))
        return found

    def check(self) -> None:
        assert self._state() == self._before

    def apply(self, data: bytes, markers: Markers | None, limits: Limits | None = None) -> Applied:
        fd = os.open(self.layer, os.O_RDONLY)
        try:
            return apply(io.BytesIO(data), fd, markers=markers, limits=limits)
        finally:
            os.close(fd)

    def remove(self) -> None:
        parent = os.open(self.layer.parent, os.O_RDONLY)
        try:
            remove(parent, self.layer.name)
        finally:
            os.close(parent)
        assert not self.layer.exists()


@pytest.fixture
def place(tmp_path: Path) -> _Place:
    return _Place(tmp_path)


def _whole(name: str, data: bytes) -> bytes:
    return data if name.startswith(_NO_END) else data + END


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_layer(name: str, place: _Place) -> None:
    case = CASES[name]
    data = _whole(name, _placed(case, place.outside))
    if case.error is None:
        place.apply(data, Markers("user"), case.limits)
    else:
        with pytest.raises(case.error) as caught:
            place.apply(data, Markers("user"), case.limits)
        assert case.named in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert os.listdir(place.layer) == []
    place.check()
    place.remove()


@pytest.mark.parametrize("name", CASES)
def test_a_whole_tree_with_a_symlink_that_leads_out(name: str, place: _Place) -> None:
    case = CASES[name]
    (place.layer / "leads-out").symlink_to(place.outside)
    (place.layer / "f").symlink_to(place.outside / "secret")
    data = _whole(name, _placed(case, place.outside))
    if case.error is None:
        place.apply(data, None, case.limits)
    else:
        with pytest.raises(case.error):
            place.apply(data, None, case.limits)
    place.check()
    place.remove()


def _entries(*names: str) -> bytes:
    return b"".join(_file(name.encode()) for name in names) + END


@pytest.mark.parametrize("forget", [False, True], ids=["open", "not open"])
def test_directories_that_somebody_renames_meanwhile(
    place: _Place, monkeypatch: pytest.MonkeyPatch, forget: bool
) -> None:
    """While the archive is applied, its directory becomes a symlink that leads out."""
    original = Applier.entry

    def attacked(self: Applier, entry: Entry) -> None:
        if entry.name == "d/second":
            (place.layer / "d").rename(place.layer / "renamed")
            (place.layer / "d").symlink_to(place.outside)
            if forget:
                self.upper.directories.close_below("d")
                self._above = None
        original(self, entry)

    monkeypatch.setattr(Applier, "entry", attacked)
    place.apply(_entries("d/first", "d/second", "d/secret", "d/e/third"), Markers("user"))
    place.check()
    assert (place.layer / "renamed" / "first").exists()


def test_an_error_says_where(place: _Place) -> None:
    with pytest.raises(BAD) as caught:
        place.apply(_file(b"fine") + _file(b"../x\ny") + END, Markers("user"))
    assert str(caught.value) == "bad archive: entry ../x\\ny at byte 1024: it leads out of the tree"
    assert caught.value.key == "../x\ny"


def test_the_attributes_of_the_top_come_back_after_an_error(place: _Place) -> None:
    place.layer.chmod(0o711)
    before = place.layer.stat()
    with pytest.raises(BAD):
        place.apply(_dir(b"./", b"0000700\0") + _file(b"a") + _file(b"../x") + END, Markers("user"))
    after = place.layer.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_names_in_errors_are_fit_for_a_terminal() -> None:
    assert shown("\x1b[31m\udcff") == "\\e[31m\\xff"


_VALID = [
    _file(b"f", b"x" * 700),
    pax(("path", b"long" * 50), ("SCHILY.xattr.user.a", b"b")) + _file(b"f"),
    gnu_long(b"L", b"n" * 200) + _symlink(b"l", b"target"),
    _sparse([(0, 2), (50, 2)], 100, b"evil"),
]


@given(
    st.sampled_from(_VALID), st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=12)), max_size=4)
)
def test_any_bytes_in_headers_end_in_entries_or_in_our_errors(valid: bytes, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(valid + END)
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    for at in range(0, len(data) - 511, 512):
        block = data[at : at + 512]
        if any(block[257:262]) and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    _read_or_refuse(bytes(data))


@given(st.binary(min_size=512, max_size=512))
def test_any_block_with_the_right_sum(block: bytes) -> None:
    made = bytearray(block)
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    _read_or_refuse(bytes(made) + END)


def _read_or_refuse(data: bytes) -> None:
    try:
        found = read(data, 1000)
    except (errors.InvalidArgument, errors.DataLoss):
        return
    for entry, content in found:
        assert entry.type in "0123456"
        assert 0 <= entry.uid <= tar.MAX_ID
        assert len(content) == entry.stored <= len(data)
