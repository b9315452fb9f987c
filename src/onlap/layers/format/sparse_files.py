"""The maps of sparse files in tar archives: where their data belongs, in all of GNU tar's formats.

Sources: GNU tar's manual, "Storing Sparse Files": the old GNU format, and pax 0.0, 0.1 and 1.0; where the manual leaves
a choice, Go's archive/tar, reader.go (1.24).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from onlap.layers.format import tar
from onlap.layers.format.tar import Entry, bad, parse_decimal
from onlap.trees.copy import data_ranges, has_holes

# GNU tar, src/tar.h: struct oldgnu_header and struct sparse_header.
_OLD_MAP = 386
_OLD_ENTRIES = 4
_OLD_EXTENDED = 482
_OLD_REALSIZE = slice(483, 495)
_EXTENSION_ENTRIES = 21
_EXTENSION_EXTENDED = 504

# A map of this many pieces takes about 30 MB of memory. A file with more is refused on reading, and written whole.
MAX_PIECES = 1 << 18

# The pax formats with their version in the records.
_VERSIONS = ((b"0", b"0"), (b"0", b"1"), (b"1", b"0"))

Pieces = list[tuple[int, int]]


def read_old(entry: Entry, header: memoryview, block: Callable[[], bytes]) -> None:
    """Read the map of an old GNU sparse file from its header and the blocks after it.

    Args:
        entry: its ``size`` and ``sparse`` are set.
        header: the entry's header.
        block: returns the next block of the archive.

    Raises:
        InvalidArgument: the map is malformed.
    """
    entry.size = tar.parse_size(header[_OLD_REALSIZE].tobytes(), entry.name, entry.offset)
    pieces = _old_pieces(entry, header[_OLD_MAP:], _OLD_ENTRIES)
    extended = header[_OLD_EXTENDED]
    while extended:
        extension = memoryview(block())
        pieces += _old_pieces(entry, extension, _EXTENSION_ENTRIES)
        extended = extension[_EXTENSION_EXTENDED]
        if len(pieces) > MAX_PIECES:
            raise bad(f"a sparse map of more than {MAX_PIECES} pieces", entry.name, entry.offset)
    entry.sparse = pieces


def _old_pieces(entry: Entry, block: memoryview, count: int) -> Pieces:
    pieces = []
    for at in range(0, count * 24, 24):
        raw = block[at : at + 24].tobytes()
        if not raw[0]:
            break  # unused
        offset = tar.parse_size(raw[:12], entry.name, entry.offset)
        pieces.append((offset, tar.parse_size(raw[12:], entry.name, entry.offset)))
    return pieces


def is_pax(records: Mapping[str, bytes]) -> bool:
    """Whether the pax records of an entry make it a sparse file.

    Raises:
        ValueError: they do, but the format is unknown. Go's archive/tar treats such a file as not sparse.
    """
    version = records.get("GNU.sparse.major", b""), records.get("GNU.sparse.minor", b"")
    if version in _VERSIONS:
        return True
    if any(version):
        raise ValueError("its version of the sparse format is unknown")
    # GNU tar writes no version for 0.0 and 0.1.
    return bool(records.get(tar.SPARSE_MAP))


def read_pax(entry: Entry, records: Mapping[str, bytes], block: Callable[[], bytes]) -> None:
    """Read the map of a sparse file from its pax records, or in format 1.0, from the start of its data.

    Args:
        entry: its ``name``, ``size`` and ``sparse`` are set.
        records: the entry's records, for which :func:`is_pax` is true.
        block: returns the next block of the entry's data; raises ValueError at its end.

    Raises:
        ValueError: the map is malformed.
    """
    if records.get("GNU.sparse.name"):
        entry.name = os.fsdecode(records["GNU.sparse.name"])
    size = records.get("GNU.sparse.size") or records.get("GNU.sparse.realsize")
    if not size:
        raise ValueError("the size of the file is missing")
    entry.size = parse_decimal(size)
    if records.get("GNU.sparse.major") == b"1":
        entry.sparse = _read_1_0(block)
        return
    count = parse_decimal(records.get("GNU.sparse.numblocks", b""))
    text = records.get(tar.SPARSE_MAP)
    numbers = [parse_decimal(number) for number in text.split(b",")] if text else []
    if len(numbers) != 2 * count:
        raise ValueError(f"it has {len(numbers)} numbers for {count} pieces")
    entry.sparse = _pairs(numbers)


def _read_1_0(block: Callable[[], bytes]) -> Pieces:
    """The map at the start of the data: decimal numbers, one per line, first the number of pieces."""
    text = b""
    numbers: list[int] = []
    wanted = 1
    while len(numbers) < wanted:
        end = text.find(b"\n")
        if end < 0:
            if len(text) > 20:
                raise ValueError("not a number")
            text += block()
            continue
        # Block by block, so that a long map is not searched repeatedly.
        lines = text.split(b"\n")
        text = lines.pop()
        for line in lines:
            numbers.append(parse_decimal(line))
            if len(numbers) == 1:
                wanted = 1 + 2 * numbers[0]
                if numbers[0] > MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES} pieces")
            if len(numbers) == wanted:
                break
    return _pairs(numbers[1:wanted])


def pieces_of(ranges: Iterable[tuple[int, int]], size: int) -> Pieces:
    """The pieces to store of a file with data in these ranges, ``(start, end)``, ascending.

    GNU tar reads and writes each piece in whole blocks (sparse.c, sparse_extract_region), so only the last piece may
    end within a block, at the end of the file.
    """
    pieces: Pieces = []
    for start, end in ranges:
        start -= start % tar.BLOCK
        end = min(end + -end % tar.BLOCK, size)
        if pieces and sum(pieces[-1]) >= start:
            start = pieces.pop()[0]
        pieces.append((start, end - start))
    return pieces


def leave_out_holes(entry: Entry, fd: int) -> Pieces:
    """The pieces to store of an open file; if it has holes, its entry becomes that of a sparse file.

    Args:
        entry: has the file's size.
        fd: the file.

    Raises:
        OSError: the filesystem cannot tell where they are.
    """
    pieces = [(0, entry.size)]
    if has_holes(os.fstat(fd)):
        found = pieces_of(data_ranges(fd, entry.size), entry.size)
        if found != pieces and len(found) < MAX_PIECES:
            entry.sparse = pieces = found
            entry.stored = sum(length for _, length in found)
    return pieces


def format_1_0(pieces: Pieces, size: int) -> bytes:
    """The map of a file in format 1.0, padded to whole blocks, for the start of its data."""
    if not pieces or sum(pieces[-1]) < size:
        pieces = [*pieces, (size, 0)]  # GNU tar takes the file's size from the last piece
    text = b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % piece for piece in pieces)
    return text + bytes(-len(text) % tar.BLOCK)


def check(entry: Entry) -> None:
    """Check the map of a sparse file against its size and its stored data; remove empty pieces.

    Raises:
        InvalidArgument: it does not fit.
    """
    pieces = entry.sparse or []
    end = total = 0
    for offset, length in pieces:
        if offset < end:
            raise bad("its sparse map overlaps or is not ascending", entry.name, entry.offset)
        end = offset + length
        total += length
    if end > entry.size or entry.size > tar.MAX_INT64:
        raise bad("its sparse map reaches beyond the end of the file", entry.name, entry.offset)
    if total != entry.stored:
        raise bad(f"its sparse map has {total} bytes, its data {entry.stored}", entry.name, entry.offset)
    entry.sparse = [(offset, length) for offset, length in pieces if length]


def _pairs(numbers: list[int]) -> Pieces:
    if len(numbers) > 2 * MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} pieces")
    return list(zip(numbers[::2], numbers[1::2], strict=True))
