"""The tar format: blocks, numbers and extended records, as shared by the reader and the writer.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar Format" and
"Storing Sparse Files"; FreeBSD's tar(5). Doubtful headers are read as by Go's archive/tar, since containerd and Docker
read layers with it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from zlib import adler32

from onlap import errors
from onlap.errors import shown

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

# Type flags.
FILE = "0"
HARDLINK = "1"
SYMLINK = "2"
CHAR = "3"
BLOCK_DEVICE = "4"
DIRECTORY = "5"
FIFO = "6"
# By the type of a file, as in st_mode; an archive holds no sockets.
TYPES = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHAR,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
}

XATTR_PREFIX = "SCHILY.xattr."

# Go's archive/tar refuses values of these records that hold a NUL (validPAXRecord).
_TEXTS = ("path", "linkpath", "uname", "gname")
_SPARSE_PAIR = ("GNU.sparse.offset", "GNU.sparse.numbytes")
SPARSE_MAP = "GNU.sparse.map"

# The limit for the metadata of one entry (a long name, the records of a pax header), which is read into memory; as in
# Go's archive/tar (maxSpecialFileSize).
MAX_META = 1 << 20

# A tree may be deeper than any path that the kernel takes at once (4095 bytes). But a few bytes of an archive must not
# make hundreds of thousands of nested directories. The limit is the same for reading and writing.
MAX_PATH = (1 << 16) - 1

# chown(2): an id of -1 means "unchanged", so the largest 32-bit number is not an id.
MAX_ID = 0xFFFFFFFE

# The largest size of a file and the largest number of seconds, in the kernel and in Go's archive/tar.
MAX_INT64 = (1 << 63) - 1

_SPACES = b"\0 "


class Entry:
    """One entry of an archive.

    Attributes:
        name: as the archive has it, decoded with :func:`os.fsdecode`.
        type: one of the type flags above; an old-style file is :data:`FILE`.
        mode: permission bits, with set-user-ID and the like (``0o7777``).
        uid: numeric owner.
        gid: numeric group.
        size: bytes of the file, holes included; 0 for all but files.
        stored: bytes in the archive: less than ``size`` for a sparse file.
        mtime_ns: nanoseconds since the epoch.
        atime_ns: likewise; None if the archive does not have it.
        linkname: the target of a hard link or symlink.
        devmajor: of a device.
        devminor: of a device.
        xattrs: extended attributes by name.
        sparse: where a sparse file has data, as ``(offset, length)``, ascending; None for any other file.
        skipped: the kinds of attributes that the archive has in an unsupported form.
        offset: where the entry starts in the archive, in bytes.
    """

    __slots__ = (
        "atime_ns",
        "devmajor",
        "devminor",
        "gid",
        "linkname",
        "mode",
        "mtime_ns",
        "name",
        "offset",
        "size",
        "skipped",
        "sparse",
        "stored",
        "type",
        "uid",
        "xattrs",
    )

    def __init__(
        self,
        name: str,
        type: str = FILE,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        size: int = 0,
        mtime_ns: int = 0,
        linkname: str = "",
        devmajor: int = 0,
        devminor: int = 0,
        xattrs: Mapping[str, bytes] | None = None,
        offset: int = 0,
    ) -> None:
        self.name = name
        self.type = type
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = self.stored = size
        self.mtime_ns = mtime_ns
        self.atime_ns: int | None = None
        self.linkname = linkname
        self.devmajor = devmajor
        self.devminor = devminor
        self.xattrs = xattrs
        self.sparse: list[tuple[int, int]] | None = None
        self.skipped: tuple[str, ...] = ()
        self.offset = offset

    def __repr__(self) -> str:
        return f"<Entry {self.type} {shown(self.name)} mode={self.mode:o} size={self.size} offset={self.offset}>"


def bad(message: str, name: str | None, offset: int) -> errors.InvalidArgument:
    """The error for a malformed entry."""
    where = f"entry {shown(name)} at byte {offset}" if name is not None else f"the header at byte {offset}"
    return errors.InvalidArgument(f"bad archive: {where}: {message}", key=name)


def checksum(header: memoryview) -> int:
    """The sum of a header's bytes, with the checksum itself counted as spaces."""
    # Adler-32's low half is 1 plus the sum of the bytes modulo 65521: exact for 256 bytes (at most 65280), and many
    # times faster than sum().
    return (
        (adler32(header[:256]) & 0xFFFF)
        + (adler32(header[256:512]) & 0xFFFF)
        - (adler32(header[148:156]) & 0xFFFF)
        - 1
        + 8 * 0x20
    )


def signed_checksum(header: memoryview) -> int:
    """The same with signed bytes, as old archivers on some machines summed them (GNU tar accepts both)."""
    high = sum(byte >> 7 for byte in header[:148]) + sum(byte >> 7 for byte in header[156:512])
    return checksum(header) - 256 * high


def parse_octal(field: bytes) -> int:
    """An octal field: digits between spaces and NULs; empty for 0.

    Raises:
        ValueError: it is anything else.
    """
    text = field.strip(_SPACES).partition(b"\0")[0]
    if not text:
        return 0
    if not text.isdigit():  # int() would accept signs, spaces, underscores and "0o"
        raise ValueError("not an octal number")
    return int(text, 8)


def parse_number(field: bytes) -> int:
    """A numeric field: octal, or GNU's base-256, which may be negative.

    Raises:
        ValueError: it is neither, or does not fit in 64 bits.
    """
    first = field[0]
    if not first & 0x80:
        return parse_octal(field)
    # GNU: the lowest bits of a two's complement number whose top bit marks the form.
    value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    if first & 0x40:
        value -= 1 << (8 * len(field) - 1)
    if not -MAX_INT64 - 1 <= value <= MAX_INT64:
        raise ValueError("a number of more than 64 bits")
    return value


def parse_size(field: bytes, name: str | None, offset: int) -> int:
    """A size in bytes.

    Args:
        field: a numeric field.
        name: the entry's name, for the error.
        offset: the entry's offset in the archive, for the error.

    Raises:
        InvalidArgument: it is not a size.
    """
    try:
        size = parse_number(field)
    except ValueError:
        raise bad("its size is not a number", name, offset) from None
    if size < 0 or size > MAX_INT64:
        raise bad(f"its size {size} is impossible", name, offset)
    return size


def format_number(value: int, width: int) -> bytes | None:
    """``value`` in octal with a closing NUL; None if it does not fit in ``width``."""
    if value < 0:
        return None
    text = b"%0*o" % (width - 1, value)
    return text + b"\0" if len(text) < width else None


def cut(field: bytes) -> bytes:
    """A text field up to its NUL."""
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def parse_records(data: bytes) -> dict[str, bytes]:
    """The records of a pax header: ``"LENGTH KEY=VALUE\\n"``; of a repeated key, the last.

    The map of a sparse file in the form 0.0, with a record per number, becomes that of 0.1 (Go's archive/tar,
    parsePAX).

    Raises:
        ValueError: they are malformed; the text says how.
    """
    records: dict[str, bytes] = {}
    sparse: list[bytes] = []
    position = 0
    end = len(data)
    while position < end:
        space = data.find(b" ", position, position + 9)
        digits = data[position:space] if space >= 0 else b""
        if not digits.isdigit():
            raise ValueError("a pax record does not start with its length")
        after = position + int(digits)
        # The shortest record is "5 k=\n"; its length counts its own digits.
        if after > end or after < space + 4:
            raise ValueError(f"a pax record has the wrong length {int(digits)}")
        if data[after - 1] != 0x0A:
            raise ValueError("a pax record does not end with a newline")
        raw_key, equals, value = data[space + 1 : after - 1].partition(b"=")
        if not equals or not raw_key:
            raise ValueError("a pax record has no key")
        if b"\0" in raw_key:
            raise ValueError("a key of a pax record contains a NUL")
        key = os.fsdecode(raw_key)
        if b"\0" in value and key in _TEXTS:
            raise ValueError(f"the pax record {key} {shown(value)} contains a NUL")
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(sparse) % 2] or b"," in value:
                raise ValueError("the offsets and lengths of a sparse map do not alternate")
            sparse.append(value)
        else:
            records[key] = value
        position = after
    if sparse:
        records[SPARSE_MAP] = b",".join(sparse)
    return records


def format_record(key: str, value: bytes) -> bytes:
    """One record of a pax header."""
    rest = b" " + os.fsencode(key) + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest)))
    # The length counts its own digits, which may add one more.
    if len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def holds_xattr(name: str) -> bool:
    """Whether a pax record can hold an extended attribute: its key ends at the first "="."""
    return bool(name) and "=" not in name and "\0" not in name


def parse_time(text: bytes) -> int:
    """A pax time, ``"[-]SECONDS[.FRACTION]"``, as nanoseconds; digits beyond the ninth are dropped.

    Raises:
        ValueError: it is anything else, or its seconds do not fit in 64 bits.
    """
    negative = text.startswith(b"-")
    seconds, _, fraction = text[negative:].partition(b".")
    if not seconds.isdigit() or (fraction and not fraction.isdigit()) or len(seconds) > 19:
        raise ValueError("not a time")
    if int(seconds) > MAX_INT64:
        raise ValueError("a time out of range")
    total = int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -total if negative else total


def format_time(nanoseconds: int) -> bytes:
    """A pax time with as few digits as possible."""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    text = b"%d.%09d" % (seconds, fraction) if fraction else b"%d" % seconds
    return (b"-" if nanoseconds < 0 else b"") + (text.rstrip(b"0") if fraction else text)


def parse_decimal(text: bytes) -> int:
    """A pax number.

    Raises:
        ValueError: it is negative, not a number, or does not fit in 64 bits.
    """
    if not text.isdigit() or len(text) > 20 or (value := int(text)) > MAX_INT64:
        raise ValueError("not a number")
    return value
