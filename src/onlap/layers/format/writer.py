"""Writing tar archives as a stream: ustar, with a pax header for what does not fit.

The same entries give the same bytes. Owners are numbers without names. Pax headers hold the same as in Go's archive/tar
(names that are long or not ASCII, large numbers, fractions of seconds, xattrs), so containerd and Docker read
everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from onlap import errors
from onlap.errors import shown
from onlap.layers.format import sparse_files, tar
from onlap.layers.format.tar import BLOCK, ZERO_BLOCK, Entry, format_number, format_record

_USTAR = b"ustar\00000" + bytes(64)  # and no names of owners
_NO_CHECKSUM = bytes(8)
_END = bytes(12)
_NOT_ASCII = bytes(range(0x80, 0x100))
_MAX_OCTAL_OWNER = 0o7777777
_MAX_OCTAL = 0o77777777777


class TarWriter:
    """Writes one archive.

    ::

        writer.begin(entry)
        writer.write(data)  # as often as needed, entry.stored bytes in total
        writer.end()

    Args:
        write: writes all of the bytes that it is given.

    Attributes:
        position: bytes written so far.
    """

    def __init__(self, write: Callable[[bytes | memoryview], object]) -> None:
        self._write = write
        self._left = 0
        self._padding = 0
        self._name = ""
        self.position = 0

    def begin(self, entry: Entry) -> None:
        """Start an entry; the data of the previous one must be complete.

        The data of a sparse file is its pieces, one after the other.

        Raises:
            InvalidArgument: the entry has a value that no tar archive can hold.
        """
        self._finish()
        header = encode(entry)
        self._write(header)
        self.position += len(header)
        size = entry.stored if entry.type == tar.FILE else 0
        self._left = size
        self._padding = -size % BLOCK
        self._name = entry.name

    def write(self, data: bytes | memoryview) -> None:
        """Add data to the current entry.

        Raises:
            Internal: it exceeds the entry's size.
        """
        size = len(data)
        if size > self._left:
            raise errors.Internal(f"entry {shown(self._name)} gets more data than its size says")
        self._left -= size
        self._write(data)
        self.position += size

    def end(self) -> None:
        """Write the end marker: two blocks of zeros, as in Go's archive/tar."""
        self._finish()
        self._write(ZERO_BLOCK + ZERO_BLOCK)
        self.position += 2 * BLOCK

    def _finish(self) -> None:
        if self._left:
            raise errors.Internal(f"entry {shown(self._name)} lacks {self._left} bytes of its data")
        if self._padding:
            self._write(ZERO_BLOCK[: self._padding])
            self.position += self._padding
            self._padding = 0


def encode(entry: Entry) -> bytes:
    """The pax header of an entry, if it needs one, and its header; for a sparse file also the map.

    Raises:
        InvalidArgument: the entry has a value that no tar archive can hold.
    """
    records: dict[str, bytes] = {}
    for text in (entry.name, entry.linkname):
        if "\0" in text:
            raise errors.InvalidArgument(f"a name in a tar archive cannot hold a NUL: {shown(text)}", key=entry.name)
    size = entry.size if entry.type == tar.FILE else 0
    sparse_map = b""
    if entry.sparse is None:
        name, prefix = _name(entry, records)
    else:
        name, prefix = _sparse_name(entry, records), b""
        sparse_map = sparse_files.format_1_0(entry.sparse, size)
        size = len(sparse_map) + entry.stored
    link = os.fsencode(entry.linkname) if entry.linkname else b""
    if len(link) > 100 or not link.isascii():
        records["linkpath"] = link
        link = _ascii(link)[:100]
    uid, gid = entry.uid, entry.gid
    if 0 <= uid <= _MAX_OCTAL_OWNER and 0 <= gid <= _MAX_OCTAL_OWNER and 0 <= size <= _MAX_OCTAL:
        numbers = b"%07o\0%07o\0%07o\0%011o\0" % (entry.mode & 0o7777, uid, gid, size)
    else:
        numbers = (
            b"%07o\0" % (entry.mode & 0o7777)
            + _octal(uid, 8, "uid", records)
            + _octal(gid, 8, "gid", records)
            + _octal(size, 12, "size", records)
        )
    numbers += _time(entry, records)
    devices = b"\0" * 16
    if entry.type in (tar.CHAR, tar.BLOCK_DEVICE):
        # Go reads no pax record for them; the kernel's numbers, of 12 and 20 bits, fit.
        devices = _octal(entry.devmajor, 8, "major", None) + _octal(entry.devminor, 8, "minor", None)
    for xattr, value in (entry.xattrs or {}).items():
        if not tar.holds_xattr(xattr):
            raise errors.InvalidArgument(
                f"{shown(entry.name)} has an xattr whose name no tar archive can hold: {shown(xattr)}",
                key=entry.name,
            )
        records[tar.XATTR_PREFIX + xattr] = value
    header = _block(name, numbers, entry.type.encode(), link, devices, prefix)
    return _pax(entry, records) + header + sparse_map if records else header


def _name(entry: Entry, records: dict[str, bytes]) -> tuple[bytes, bytes]:
    """The name and the prefix fields."""
    name = os.fsencode(entry.name)
    if name.isascii():
        if len(name) <= 100:
            return name, b""
        # The prefix ends at a slash, which is not stored; a directory's trailing slash stays in the name.
        cut = name.rfind(b"/", 0, min(156, len(name) - 1)) if len(name) <= 256 else -1
        if cut > 0 and 0 < len(name) - cut - 1 <= 100:
            return name[cut + 1 :], name[:cut]
    records["path"] = name
    return _ascii(name)[:100], b""


def _sparse_name(entry: Entry, records: dict[str, bytes]) -> bytes:
    """The name field of a sparse file, as in GNU tar: readers without support for it extract the map as content.

    Format 1.0 is read by GNU tar, libarchive, Python's tarfile and Go's archive/tar, as used by containerd and Docker.
    """
    records["GNU.sparse.major"], records["GNU.sparse.minor"] = b"1", b"0"
    records["GNU.sparse.realsize"] = b"%d" % entry.size
    records["GNU.sparse.name"] = os.fsencode(entry.name)
    return _beside(entry, b"GNUSparseFile.0")


def _beside(entry: Entry, directory: bytes) -> bytes:
    """A name in a directory beside the entry, truncated to the name field."""
    parent, _, base = _ascii(os.fsencode(entry.name)).rstrip(b"/").rpartition(b"/")
    return b"/".join(part for part in (parent, directory, base) if part)[:100]


def _ascii(text: bytes) -> bytes:
    return text.translate(None, delete=_NOT_ASCII)


def _octal(value: int, width: int, key: str, records: dict[str, bytes] | None) -> bytes:
    field = format_number(value, width)
    if field is not None:
        return field
    if records is None or value < 0:
        raise errors.InvalidArgument(f"no tar archive can hold the {key} {value}")
    records[key] = b"%d" % value
    return b"%0*o\0" % (width - 1, 0)


def _time(entry: Entry, records: dict[str, bytes]) -> bytes:
    seconds, fraction = divmod(entry.mtime_ns, 1_000_000_000)
    if fraction or not 0 <= seconds <= _MAX_OCTAL:
        records["mtime"] = tar.format_time(entry.mtime_ns)
    return b"%011o\0" % min(max(seconds, 0), _MAX_OCTAL)


def _block(name: bytes, numbers: bytes, flag: bytes, link: bytes, devices: bytes, prefix: bytes) -> bytes:
    start = name.ljust(100, b"\0") + numbers
    rest = b"%b%b%b%b%b%b" % (flag, link.ljust(100, b"\0"), _USTAR, devices, prefix.ljust(155, b"\0"), _END)
    checksum = tar.checksum(memoryview(start + _NO_CHECKSUM + rest))
    return start + b"%06o\0 " % checksum + rest


def _pax(entry: Entry, records: dict[str, bytes]) -> bytes:
    """The pax header of an entry, with its records sorted by key."""
    texts = [value for key, value in records.items() if key in ("path", "linkpath", "GNU.sparse.name")]
    if any(not _is_utf8(text) for text in texts):
        # POSIX: pax headers are UTF-8 by default.
        records["hdrcharset"] = b"BINARY"
    # The character set must come before the names.
    order = sorted(records, key=lambda key: (key != "hdrcharset", os.fsencode(key)))
    data = b"".join(format_record(key, records[key]) for key in order)
    if len(data) > tar.MAX_META:
        raise errors.InvalidArgument(
            f"{shown(entry.name)} has more than {tar.MAX_META} bytes of names and xattrs, too much for a tar archive",
            key=entry.name,
        )
    numbers = b"0000000\0" * 3 + b"%011o\0" % len(data) + b"00000000000\0"
    header = _block(_beside(entry, b"PaxHeaders.0"), numbers, b"x", b"", b"\0" * 16, b"")
    return header + data + bytes(-len(data) % BLOCK)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
