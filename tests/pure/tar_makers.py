"""Archives for tests, made by hand or by Python's own tarfile, which shares no code with ours."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable

from onlap.layers.format import tar
from onlap.layers.format.reader import TarReader
from onlap.layers.format.tar import Entry
from onlap.layers.format.writer import TarWriter

END = bytes(1024)


def header(
    name: bytes = b"file",
    *,
    flag: bytes = b"0",
    size: int | bytes = 0,
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    gid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    link: bytes = b"",
    magic: bytes = b"ustar\00000",
    devices: bytes = bytes(16),
    prefix: bytes = b"",
    rest: bytes | None = None,
    checksum: bytes | None = None,
) -> bytes:
    """One header block, with the right checksum unless another is given; ``rest`` replaces the bytes from 345 on."""
    sized = b"%011o\0" % size if isinstance(size, int) else size
    start = name.ljust(100, b"\0") + mode + uid + gid + sized + mtime
    end = flag + link.ljust(100, b"\0") + magic + bytes(64) + devices
    end += (prefix if rest is None else rest).ljust(167, b"\0")
    total = sum(start) + sum(end) + 8 * 32
    return start + (b"%06o\0 " % total if checksum is None else checksum) + end


def padded(data: bytes) -> bytes:
    """``data`` up to the next block."""
    return data + bytes(-len(data) % 512)


def record(key: str, value: bytes) -> bytes:
    """A pax record; the length is found by trying."""
    for length in range(len(value), 4 * len(key) + len(value) + 30):
        made = b"%d %s=%s\n" % (length, os.fsencode(key), value)
        if len(made) == length:
            return made
    raise AssertionError


def pax(*records: tuple[str, bytes], flag: bytes = b"x") -> bytes:
    """A pax header with its records."""
    data = b"".join(record(key, value) for key, value in records)
    return header(b"pax", flag=flag, size=len(data)) + padded(data)


def gnu_long(flag: bytes, name: bytes) -> bytes:
    """A GNU header for a long name (L) or link (K)."""
    return header(b"././@LongLink", flag=flag, size=len(name) + 1, magic=b"ustar  \0") + padded(name + b"\0")


def read(data: bytes, chunk: int = 1 << 18) -> list[tuple[Entry, bytes]]:
    """All entries with their stored data."""
    stream = io.BytesIO(data)
    reader = TarReader(lambda: stream.read(chunk))
    found = []
    for entry in reader:
        content = b""
        while piece := reader.piece():
            content += piece
        found.append((entry, content))
    reader.drain()
    return found


def write(entries: Iterable[tuple[Entry, bytes]]) -> bytes:
    """An archive by our writer."""
    out = bytearray()
    writer = TarWriter(out.extend)
    for entry, data in entries:
        writer.begin(entry)
        writer.write(data)
    writer.end()
    return bytes(out)


def facts(entry: Entry) -> tuple[object, ...]:
    """What of an entry a round trip must keep."""
    device = entry.type in (tar.CHAR, tar.BLOCK_DEVICE)
    return (
        entry.name,
        entry.type,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.size,
        entry.mtime_ns,
        entry.linkname,
        (entry.devmajor, entry.devminor) if device else None,
        dict(entry.xattrs or {}),
    )
