"""The maps of sparse files in tar archives: where their data belongs, in all the forms that GNU tar has written.

Source: GNU tar's manual, "Storing Sparse Files": the old GNU format, and pax 0.0, 0.1 and 1.0.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from onlap.layers import tarformat as tar
from onlap.layers.tarformat import Entry, bad, parse_decimal

# GNU tar, src/tar.h: struct oldgnu_header and struct sparse_header.
_OLD_MAP = 386
_OLD_ENTRIES = 4
_OLD_EXTENDED = 482
_OLD_REALSIZE = slice(483, 495)
_EXTENSION_ENTRIES = 21
_EXTENSION_EXTENDED = 504

# A map of this many pieces is about 30 MB in memory. A file in more pieces than that is refused.
_MAX_PIECES = 1 << 18

Pieces = list[tuple[int, int]]


def read_old(entry: Entry, header: memoryview, block: Callable[[], bytes]) -> None:
    """Take the map of an old GNU sparse file from its header, and from the blocks that follow it.

    Args:
        entry: gets its ``size`` and ``sparse``.
        header: of the entry.
        block: gives the next block of the archive.

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
        if len(pieces) > _MAX_PIECES:
            raise bad(f"a sparse map of more than {_MAX_PIECES} pieces", entry.name, entry.offset)
    entry.sparse = pieces


def _old_pieces(entry: Entry, block: memoryview, count: int) -> Pieces:
    pieces = []
    for at in range(0, count * 24, 24):
        raw = block[at : at + 24].tobytes()
        if not raw[0] and not raw[12]:
            break  # unused
        offset = tar.parse_size(raw[:12], entry.name, entry.offset)
        pieces.append((offset, tar.parse_size(raw[12:], entry.name, entry.offset)))
    return pieces


def read_pax(entry: Entry, records: list[tuple[str, bytes]], block: Callable[[], bytes]) -> None:
    """Take the map of a sparse file from its pax records, or from the start of its data where they say so.

    Args:
        entry: gets its ``name``, ``size`` and ``sparse`` if it is a sparse file.
        records: those of the entry.
        block: gives the next block of the entry's data; raises ValueError where that ends.

    Raises:
        InvalidArgument: the map is malformed.
    """
    values = {key: value for key, value in records if key.startswith("GNU.sparse.")}
    if not values:
        return
    try:
        pieces = _pax_pieces(values, records, block)
        if pieces is None:
            return
        size = values.get("GNU.sparse.realsize", values.get("GNU.sparse.size"))
        if size is None:
            raise ValueError("the size of the file is missing")
        entry.size = parse_decimal(size)
    except ValueError as error:
        raise bad(f"its sparse map: {error}", entry.name, entry.offset) from None
    if len(pieces) > _MAX_PIECES:
        raise bad(f"a sparse map of more than {_MAX_PIECES} pieces", entry.name, entry.offset)
    if values.get("GNU.sparse.name"):
        entry.name = os.fsdecode(values["GNU.sparse.name"])
    entry.sparse = pieces


def _pax_pieces(
    values: dict[str, bytes], records: list[tuple[str, bytes]], block: Callable[[], bytes]
) -> Pieces | None:
    """The map; None where there is none. Raises ValueError."""
    if values.get("GNU.sparse.major") == b"1":
        if values.get("GNU.sparse.minor") != b"0":
            raise ValueError("a version of the sparse format that nobody knows")
        return _read_1_0(block)
    if "GNU.sparse.map" in values:
        return _pairs([parse_decimal(number) for number in values["GNU.sparse.map"].split(b",")])
    if "GNU.sparse.offset" in values:
        wanted = ("GNU.sparse.offset", "GNU.sparse.numbytes")
        ordered = [(key, value) for key, value in records if key in wanted]
        if any(key != wanted[index % 2] for index, (key, _) in enumerate(ordered)):
            raise ValueError("offsets and lengths do not alternate")
        return _pairs([parse_decimal(value) for _, value in ordered])
    return None


def _read_1_0(block: Callable[[], bytes]) -> Pieces:
    """The map at the start of the data: decimal numbers, a line each, the count of pieces first."""
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
        # A block at a time, so that no line is looked for twice in a long map.
        lines = text.split(b"\n")
        text = lines.pop()
        for line in lines:
            numbers.append(parse_decimal(line))
            if len(numbers) == 1:
                wanted = 1 + 2 * numbers[0]
                if numbers[0] > _MAX_PIECES:
                    raise ValueError(f"more than {_MAX_PIECES} pieces")
            if len(numbers) == wanted:
                break
    return _pairs(numbers[1:wanted])


def check(entry: Entry) -> None:
    """Check the map of a sparse file against its size and against what is stored of it; empty pieces are left out.

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
    if end > entry.size or entry.size > tar.MAX_SECONDS:
        raise bad("its sparse map reaches beyond the end of the file", entry.name, entry.offset)
    if total != entry.stored:
        raise bad(f"its sparse map is of {total} bytes, its data of {entry.stored}", entry.name, entry.offset)
    entry.sparse = [(offset, length) for offset, length in pieces if length]


def _pairs(numbers: list[int]) -> Pieces:
    if len(numbers) % 2:
        raise ValueError("an offset without a length")
    return list(zip(numbers[::2], numbers[1::2], strict=True))
