"""Tar-split: what a store keeps of a layer's archive, to make it again from the tree, bit for bit.

It is a gzip file with one JSON object per line: the raw bytes of headers and padding (type 2), and in their places the
data of files (type 1), of which it has the size and a checksum, and which is read from the tree.

Source: github.com/vbatts/tar-split v0.11, tar/storage/entry.go, tar/asm/assemble.go, tar/storage/getter.go.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import BinaryIO

from onlap import errors
from onlap.errors import shown
from onlap.layers.format.reader import TarReader
from onlap.layers.stream.digests import PREFIX
from onlap.layers.stream.pipeline import Pipeline
from onlap.syscalls.files import open_file

_DATA = 1
_RAW = 2
_CHUNK = 256 << 10
# The longest that is written is 1 MiB of padding (disassemble.go, paddingChunkSize), in base64. Headers that follow one
# another have 1 MiB of records each.
_MAX_LINE = 16 << 20
_CRC_SIZE = 8
_decode = json.JSONDecoder().raw_decode  # a third of the time of json.loads(), which finds out the encoding
# Bytes of headers and padding in one line.
_SEGMENT = 1 << 20


class Split:
    """The archive of a layer, made again from its tar-split metadata and the files of its tree. A context manager.

    Args:
        path: the metadata.
        spend: called with the size of each chunk that is read from a file of the tree.

    Attributes:
        complete: whether all data was there, with the right checksums, so that the digest says something.

    Raises:
        DataLoss: the metadata is missing, or not a file.
    """

    def __init__(self, path: str, spend: Callable[[int], object]) -> None:
        self._path = path
        self._spend = spend
        self._hash = hashlib.sha256()
        self._data: tuple[int, bytes] | None = None
        self.complete = True
        self._stack = ExitStack()
        try:
            file = self._stack.enter_context(open_file(path))
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        self._lines = self._stack.enter_context(gzip.GzipFile(fileobj=file, mode="rb"))

    def __enter__(self) -> Split:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def chunk(self) -> bytes:
        """The next raw bytes, up to the data of the next file, which :meth:`data` is to take; none at the end.

        Raises:
            DataLoss: the metadata is damaged.
        """
        while self._data is None and (line := self._line()):
            kind, size, payload = self._parse(line)
            if kind == _RAW and payload:
                self._hash.update(payload)
                return payload
            if kind == _DATA and size:
                self._data = size, payload
        return b""

    @property
    def at_data(self) -> bool:
        """Whether the data of a file comes next."""
        return self._data is not None

    def data(self, fd: int | None, size: int) -> bool:
        """Take the data of a file from the tree; return whether it is what it was.

        Args:
            fd: the file, at its start; None if it is not there.
            size: what the header says, in bytes; not 0.

        Raises:
            DataLoss: the metadata is damaged.
            OSError: the file cannot be read.
        """
        if self._data is None and (self.chunk() or self._data is None):
            raise self._damaged("the data of a file is not where its header says")
        (expected_size, checksum), self._data = self._data, None
        if expected_size != size or len(checksum) != _CRC_SIZE:
            raise self._damaged("a file is not what its header says")
        same = False
        try:
            same = fd is not None and self._read(fd, size, int.from_bytes(checksum))
        finally:
            self.complete = self.complete and same
        return same

    def digest(self) -> str:
        """The digest of the archive; only behind its end."""
        return PREFIX + self._hash.hexdigest()

    def _read(self, fd: int, size: int, expected: int) -> bool:
        if os.fstat(fd).st_size != size:
            return False
        crc = 0
        while size:
            data = os.read(fd, min(size, _CHUNK))
            if not data:
                return False
            size -= len(data)
            self._spend(len(data))
            self._hash.update(data)
            crc = crc64(data, crc)
        return crc == expected

    def _line(self) -> bytes:
        try:
            line = self._lines.readline(_MAX_LINE)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        if len(line) == _MAX_LINE:
            raise self._damaged("a line of it is too long")
        return line

    def _parse(self, line: bytes) -> tuple[int, int, bytes]:
        try:
            record, _ = _decode(line.decode())
            payload = record.get("payload")
            found = record["type"], record.get("size", 0), base64.b64decode(payload, validate=True) if payload else b""
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error) as error:
            raise self._damaged("a line of it is not what it should be") from error
        kind, size, _ = found
        if not (type(kind) is int and type(size) is int and size >= 0):
            raise self._damaged("a line of it is not what it should be")
        return found

    def _damaged(self, why: str) -> errors.DataLoss:
        return errors.DataLoss(f"{shown(self._path)} is damaged: {why}", key=self._path)


def is_whole(path: str) -> bool:
    """Whether metadata is what the checksum at its end says (RFC 1952, CRC32); raises OSError."""
    with open_file(path) as file, gzip.GzipFile(fileobj=file, mode="rb") as lines:
        try:
            while lines.read(_SEGMENT):
                pass
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return False
    return True


def write(source: str, out: BinaryIO) -> str:
    """Write the tar-split metadata of an archive.

    Args:
        source: the path of the archive, which may be compressed.
        out: where to.

    Returns:
        The digest of the archive without compression.

    Raises:
        Unimplemented: it has sparse files, which tar-split does not give back as they are.
        OnlapError: it is damaged.
        OSError: it cannot be read, or the metadata cannot be written.
    """
    with Pipeline(source) as pipeline, gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as packed:
        raw = bytearray()  # what was read and not written yet
        start = number = 0  # where that is in the archive

        def chunk() -> memoryview:
            data = pipeline.chunk()
            raw.extend(data)
            return memoryview(bytes(data))

        def put(**record: object) -> None:
            nonlocal number
            packed.write(json.dumps({**record, "position": number}).encode() + b"\n")
            number += 1

        def put_raw(end: int) -> None:
            nonlocal start
            for at in range(0, end - start, _SEGMENT):
                part = bytes(raw[at : min(at + _SEGMENT, end - start)])
                put(type=_RAW, payload=base64.b64encode(part).decode())
            del raw[: end - start]
            start = end

        reader = TarReader(chunk)
        for entry in reader:
            if entry.sparse is not None:
                raise errors.Unimplemented(f"{shown(source)} has sparse files", key=source)
            put_raw(reader.position)
            crc = 0
            while piece := bytes(reader.piece()):
                crc = crc64(piece, crc)
                del raw[: reader.position - start]
                start = reader.position
            checksum = base64.b64encode(crc.to_bytes(_CRC_SIZE)).decode() if entry.size else None
            put(type=_DATA, **_named(entry.name), **({"size": entry.size} if entry.size else {}), payload=checksum)
        reader.drain()
        put_raw(start + len(raw))
    return pipeline.digests().diff_id


def _named(name: str) -> dict[str, str]:
    """A name as Go has it in JSON: as text, or in base64 if it is not UTF-8 (storage/entry.go, SetName)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return {"name_raw": base64.b64encode(os.fsencode(name)).decode()}
    return {"name": name}


def _loaded() -> Callable[[bytes, int], int]:
    try:
        from fastcrc import crc64 as found
    except ImportError:
        return _slow_crc64
    return found.go_iso


def crc64(data: bytes, before: int = 0) -> int:
    """The checksum of tar-split, CRC-64 of ISO 3309 as in Go's hash/crc64; ``before``: that of what comes before."""
    global _crc64
    if _crc64 is None:
        _crc64 = _loaded()
    return _crc64(data, before)


_crc64: Callable[[bytes, int], int] | None = None
_ALL = (1 << 64) - 1


def _slow_crc64(data: bytes, before: int) -> int:
    """The same where fastcrc is not installed, at some 10 MB/s."""
    crc = ~before & _ALL
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return ~crc & _ALL


def _table() -> tuple[int, ...]:
    # The polynomial x^64 + x^4 + x^3 + x + 1, its bits reversed.
    found = []
    for number in range(256):
        value = number
        for _ in range(8):
            value = (value >> 1) ^ (0xD800000000000000 if value & 1 else 0)
        found.append(value)
    return tuple(found)


_TABLE = _table()
