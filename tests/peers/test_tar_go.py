"""The tar reader beside Go's archive/tar, with which containerd, Docker and scanners read layers.

What is taken here is read there without an error and to the same entries; what is refused here and taken there is
refused for one of a few reasons.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.layers.format import tar
from peers import gobuild
from pure.tar_makers import END, gnu_long, header, padded, pax, read

pytestmark = pytest.mark.needs("peer:go", "gopkg:github.com/containerd/containerd")

# As tests/peers/go/tarlist: what is longer is not read.
LONGEST = 1 << 22

# What Go's reader takes and we refuse, on purpose.
STRICTER = (
    "is not supported",  # types that containerd and Docker refuse, too
    "its owner .* is out of range",  # chown(2) has no such owner
    "its size -?[0-9]+ is impossible",  # of what has no data
    "contains a NUL",  # in GNU.sparse.name
    "a pax record does not start with its length",  # Go takes a sign and any number of zeros
    "its pax record .*: (not a number|not a time)",  # Go takes a plus sign
    "its sparse map has",  # in a file that is too long to be read there
    "sparse map: (not a number|.*pieces|its version .*|the size of the file is missing)",
    "the archive ends at byte",  # after a header of the next entry
)


class Go:
    """The program that reads archives for us."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def read(self, archives: Sequence[bytes]) -> Iterator[tuple[list[Any], str]]:
        """The entries of each archive, and the error after them, if any."""
        given = b"".join(struct.pack(">I", len(data)) + data for data in archives)
        done = subprocess.run([self._program], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        lines = done.stdout.splitlines()
        assert len(lines) == len(archives)
        for line in lines:
            listing = json.loads(line)
            # Global headers and labels are entries there.
            found = [_theirs(entry) for entry in listing["Entries"] or [] if entry["Type"] not in "gV"]
            yield found, listing["Error"]


@pytest.fixture(scope="module")
def go() -> Go:
    return Go(gobuild.build(Path(__file__).parent / "go" / "tarlist"))


def _theirs(entry: dict[str, Any]) -> tuple[object, ...]:
    type = "0" if entry["Type"] == "S" else entry["Type"]
    device = (entry["Major"], entry["Minor"]) if type in "34" else None
    xattrs = {bytes.fromhex(name): bytes.fromhex(value) for name, value in entry["Xattrs"].items()}
    return (
        bytes.fromhex(entry["Name"]),
        type,
        entry["Mode"],
        (entry["Uid"], entry["Gid"]),
        entry["Seconds"] * 10**9 + entry["Nanos"],
        bytes.fromhex(entry["Link"]),
        device,
        xattrs,
        entry["Size"] if type == "0" else None,
        entry["Content"] if type == "0" and entry["Size"] <= LONGEST else None,
    )


def _ours(data: bytes, chunk: int) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for entry, stored in read(data, chunk):
        content = stored
        if entry.sparse is not None and entry.size <= LONGEST:
            whole = bytearray(entry.size)
            for offset, length in entry.sparse:
                whole[offset : offset + length], stored = stored[:length], stored[length:]
            content = bytes(whole)
        found.append(
            (
                os.fsencode(entry.name),
                entry.type,
                entry.mode,
                (entry.uid, entry.gid),
                entry.mtime_ns,
                os.fsencode(entry.linkname),
                (entry.devmajor, entry.devminor) if entry.type in (tar.CHAR, tar.BLOCK_DEVICE) else None,
                {os.fsencode(name): value for name, value in (entry.xattrs or {}).items()},
                entry.size if entry.type == tar.FILE else None,
                hashlib.sha256(content).hexdigest() if entry.type == tar.FILE and entry.size <= LONGEST else None,
            )
        )
    return found


def _read(data: bytes, chunk: int) -> tuple[list[tuple[object, ...]], str]:
    try:
        return _ours(data, chunk), ""
    except (errors.InvalidArgument, errors.DataLoss) as error:
        return [], str(error)


def compare(go: Go, archives: Sequence[bytes], chunk: int = 1 << 18) -> tuple[int, int]:
    """How many archives both read, to the same, and how many we refuse alone."""
    same = stricter = 0
    for data, (theirs, failure) in zip(archives, go.read(archives), strict=True):
        ours, refusal = _read(data, chunk)
        if refusal:
            if not failure:
                assert any(re.search(reason, refusal) for reason in STRICTER), (refusal, theirs, data.hex())
                stricter += 1
        else:
            assert (ours, "") == (theirs, failure), data.hex()
            same += 1
    return same, stricter


# Archives of what is right, what is odd and what is wrong, by a generator of random numbers

Make = Callable[[random.Random], bytes]

_NAMES = (b"a", b"d/", b"d/f", b"d//", b"./", b"x" * 100, b"y" * 99 + b"/", b"\xff", b"", b".wh.a")
_PATHS = (*_NAMES, b"p" * 300, b"p/" * 80, b"a\0b")
_TYPES = (b"0",) * 20 + tuple(bytes([flag]) for flag in b"\0\0\0\x30111223445556667SVXDA")
_OCTALS = (
    b"0000644\0",
    b" 644 \0\0\0",
    b"0104755\0",
    b"644\0    ",
    b"644 \0 1\0",
    b"\0" * 8,
    b"+000644\0",
    b"0x00644\0",
)
_BINARY = (b"\x80\0\0\0\0\0\1\0", b"\xff" * 8, b"\x80" + b"\xff" * 7, b"\xbf" + b"\xff" * 7, b"\xc0" + bytes(7))
_SIZES = (
    *(0, 5, 512, 513) * 6,
    b"5          \0",
    b"\x80" + bytes(10) + b"\5",
    b"\xff" * 12,
    b"\0" * 12,
    b"-0000000005\0",
)
_TIMES = (b"00000000001\0", b"\xff" * 12, b"\x80" + bytes(10) + b"\5", b"\x80\1" + bytes(10), b"x" * 12)
_MAGICS = (b"ustar\00000",) * 4 + (b"ustar\0\0\0", b"ustar  \0", b"ustar  \0", b"ustar   ", b"ustar\000 \0", bytes(8))
_NUMBERS = (
    *(b"0", b"5", b"7") * 8,
    b"",
    b"512",
    b"-1",
    b"+5",
    b"05",
    b"1e3",
    b"99999999999999999999",
    b"2147483648",
    b" 5",
)
_SPARSE = ("major", "minor", "size", "realsize", "name", "map", "numblocks", "offset", "numbytes")
_KEYS = (
    "path",
    "linkpath",
    "size",
    "uid",
    "gid",
    "mtime",
    "atime",
    "ctime",
    "uname",
    "comment",
    "hdrcharset",
    "SCHILY.xattr.user.a",
    "SCHILY.xattr.security.capability",
    "SCHILY.xattr.",
    "SCHILY.devmajor",
    "SCHILY.acl.access",
    "LIBARCHIVE.xattr.user.b",
    *(f"GNU.sparse.{name}" for name in _SPARSE),
)


def _rarely(rng: random.Random, odd: Sequence[Any], plain: Any) -> Any:
    return rng.choice(odd) if rng.random() < 0.04 else plain


def _random_header(rng: random.Random, flag: bytes, size: int | bytes) -> bytes:
    rest = None
    if rng.random() < 0.1:
        rest = rng.choice(
            (
                b"p".ljust(131, b"\0") + b"00000000001 00000000002 ".ljust(24, b"\0") + bytes(8) + b"tar\0",
                b"p".ljust(131, b"q") + b"00000000001 x0000000002 ".ljust(24, b"\0") + bytes(8) + b"tar\0",
                b"00000000001\0" * 2,
                b"not a number",
                b"caf\xe9",
            )
        )
    return header(
        _rarely(rng, _NAMES, b"f%d" % rng.randrange(5)),
        flag=flag,
        size=size,
        mode=_rarely(rng, _OCTALS + _BINARY, b"0000755\0"),
        uid=_rarely(rng, _OCTALS + _BINARY, b"0000007\0"),
        gid=_rarely(rng, _OCTALS + _BINARY, b"0000000\0"),
        mtime=_rarely(rng, _TIMES, b"00000000007\0"),
        link=_rarely(rng, _NAMES, b"target" if flag in b"12" else b""),
        magic=_rarely(rng, _MAGICS, b"ustar\00000"),
        devices=_rarely(rng, (b"0000001\0" * 2, b"x" * 16, b"\x80" + bytes(14) + b"\1"), bytes(16)),
        prefix=_rarely(rng, (b"prefix", b"d/", b"\xff"), b""),
        rest=rest,
    )


def _random_value(rng: random.Random, key: str) -> bytes:
    if key in ("path", "linkpath", "uname", "GNU.sparse.name"):
        return rng.choice(_PATHS)
    if "time" in key:
        return rng.choice(
            (b"1", b"1.5", b"-1.5", b"-0.5", b"7.", b".5", b"1.x", b"9" * 19, b"nan", b"", b"1.1234567899")
        )
    if key == "GNU.sparse.map":
        return rng.choice((b"0,5", b"0,2,7,3", b"", b"0", b"5,0,0,5", b"0,-5", b"0,5,", b"3,2,4,3"))
    if key.startswith("SCHILY.xattr") or key == "comment":
        return rng.choice((b"", b"v", b"\0\1=\n"))
    return rng.choice(_NUMBERS)


def _random_records(rng: random.Random) -> bytes:
    return pax(*((key, _random_value(rng, key)) for key in rng.choices(_KEYS, k=rng.randrange(4))), flag=b"x")


def _sparse_entry(rng: random.Random) -> bytes:
    """A sparse file in one of the pax forms, with something wrong in most."""
    pieces = rng.choice(([], *[[(0, 5)], [(0, 5), (700, 2)], [(3, 2), (900, 512)]] * 4, [(0, 2), (1, 2)]))
    data = b"d" * rng.choice((sum(length for _, length in pieces),) * 12 + (1,))
    size = rng.choice((*(1412,) * 9, 0, 5, 1 << 60))
    numbers = [number for piece in pieces for number in piece]
    form = rng.choice(("0.0", "0.1", "1.0"))
    count = b"%d" % rng.choice((len(pieces),) * 5 + (1,))
    records = [(rng.choice(("GNU.sparse.size", "GNU.sparse.realsize")), b"%d" % size), ("GNU.sparse.numblocks", count)]
    if form == "0.0":
        for offset, length in pieces:
            records += [("GNU.sparse.offset", b"%d" % offset), ("GNU.sparse.numbytes", b"%d" % length)]
    elif form == "0.1":
        records.append(("GNU.sparse.map", b",".join(b"%d" % number for number in numbers)))
    else:
        data = padded(b"".join(b"%d\n" % number for number in [int(count), *numbers])) + data
    if form == "1.0" or rng.random() < 0.2:
        records += [("GNU.sparse.major", form[:1].encode()), ("GNU.sparse.minor", form[2:].encode())]
    if rng.random() < 0.3:
        records.append(("GNU.sparse.name", rng.choice(_NAMES)))
    if rng.random() < 0.3:
        key = rng.choice(_KEYS)
        records.insert(rng.randrange(len(records) + 1), (key, _random_value(rng, key)))
    return pax(*records) + _random_header(rng, rng.choice((*(b"0",) * 12, b"\0", b"5", b"1")), len(data)) + padded(data)


def _old_sparse_entry(rng: random.Random) -> bytes:
    pieces = rng.choice(([], [(0, 5)], [(0, 5), (700, 2)], [(7, 0), (9, 3)]))
    data = b"d" * sum(length for _, length in pieces)
    table = b"".join(b"%011o\0%011o\0" % piece for piece in pieces)
    if rng.random() < 0.2:
        table = table[:-24] + bytes(12) + table[-12:]
    rest = bytes(41) + table.ljust(96, b"\0") + rng.choice((b"\0", b"\0", b"\1")) + b"%011o\0" % 1412
    magic = rng.choice((b"ustar  \0",) * 5 + (b"ustar\00000",))
    extension = bytes(512) if rest[137] else b""
    return header(b"old", flag=b"S", size=len(data), magic=magic, rest=rest) + extension + padded(data)


def _entry(rng: random.Random) -> bytes:
    flag = rng.choice(_TYPES)
    size = rng.choice(_SIZES)
    hidden = _random_header(rng, b"0", 0) + padded(b"hidden")
    data = (hidden * 2)[:size] if isinstance(size, int) else b"12345"
    return _random_header(rng, flag, size) + (padded(data) if flag in b"\x000S" or rng.random() < 0.3 else b"")


def _meta(rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind < 3:
        return _random_records(rng)
    if kind == 3:
        return pax(*((key, _random_value(rng, key)) for key in rng.choices(_KEYS, k=rng.randrange(4))), flag=b"g")
    return gnu_long(rng.choice((b"L", b"K")), rng.choice(_PATHS))


_ENDS = (*(END,) * 12, b"", bytes(512), bytes(700), END + b"behind", bytes(512) + b"x" * 512)


def archive(rng: random.Random) -> bytes:
    """An archive; sometimes with a few of its bytes replaced, or cut."""
    makers: tuple[Make, ...] = (_entry, _entry, _entry, _meta, _meta, _sparse_entry, _old_sparse_entry)
    entries = b"".join(rng.choice(makers)(rng) for _ in range(rng.randrange(4)))
    data = bytearray(entries + _entry(rng) + rng.choice(_ENDS))
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b"\0 0159/x\x80\xff")
        _mend_sums(data)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def _mend_sums(data: bytearray) -> None:
    for at in range(0, len(data) - 511, 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)


def _archives(seed: int, count: int) -> list[bytes]:
    rng = random.Random(seed)
    return [archive(rng) for _ in range(count)]


def test_random_archives_are_read_as_go_reads_them(go: Go) -> None:
    same, stricter = compare(go, _archives(1, 6000))
    # Else the archives are too odd to say much.
    assert same > 1500
    assert stricter < 1200


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_more_random_archives(go: Go, seed: int) -> None:
    compare(go, _archives(seed, 30_000), chunk=700)
