"""Small bbolt databases, written by hand: ``tests/stores/test_bolt.py`` has bbolt itself check them.

The pages of a bucket come before those of the bucket that it is in: leaves, then each level of branches. The last one
is the root.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Union

from onlap.check.stores.bolt import Bucket, Database

Tree = Mapping[bytes, Union[bytes, "Tree"]]
# A bucket as a test compares it: its sequence, and its keys in order.
Found = tuple[int, list[tuple[bytes, object]]]

META, FREE, LEAF, BRANCH = 4, 16, 2, 1
HEAD = ELEMENT = 16


def checksum(data: bytes | bytearray) -> int:
    """FNV-1a of 64 bits."""
    value = 14695981039346656037
    for byte in data:
        value = ((value ^ byte) * 1099511628211) % 2**64
    return value


def meta(
    number: int, *, root: int, pages: int, txid: int, page_size: int, magic: int = 0xED0CDAED, version: int = 2
) -> bytes:
    """A meta page with its checksum; ``root`` is the page of the root bucket."""
    fields = struct.pack("=4I5Q", magic, version, page_size, 0, root, 0, 2, pages, txid)
    page = struct.pack("=QHHI", number, META, 0, 0) + fields + struct.pack("=Q", checksum(fields))
    return page.ljust(page_size, b"\0")


class Writer:
    """The pages of one database; ``per_page`` elements are on each page of a tree."""

    def __init__(self, page_size: int = 4096, per_page: int = 4) -> None:
        self.page_size = page_size
        self.per_page = per_page
        self.data = bytearray(2 * page_size)
        self._add(FREE, 0, b"")

    def database(self, tree: Tree, txid: int = 7) -> bytes:
        """The file; its other meta page is of the transaction before, and has the same content."""
        root = self._pages(tree)
        size, pages = self.page_size, len(self.data) // self.page_size
        for id in (txid - 1, txid):
            place = id % 2 * size
            self.data[place : place + size] = meta(id % 2, root=root, pages=pages, txid=id, page_size=size)
        return bytes(self.data)

    def _bucket(self, tree: Tree) -> bytes:
        """The value of a bucket; its sequence is the number of its keys."""
        if all(isinstance(value, bytes) for value in tree.values()):
            leaves = self._leaves(tree)
            if HEAD + sum(ELEMENT + len(own) for _, _, own in leaves) <= self.page_size // 4:
                return struct.pack("=QQQHHI", 0, len(tree), 0, LEAF, len(tree), 0) + self._body(leaves)
        return struct.pack("=QQ", self._pages(tree), len(tree))

    def _leaves(self, tree: Tree) -> list[tuple[bytes, bytes, bytes]]:
        """For each element: what it has before and after the position of its data, and that."""
        found = []
        for key, value in sorted(tree.items()):
            flags, data = (0, value) if isinstance(value, bytes) else (1, self._bucket(value))
            found.append((struct.pack("=I", flags), struct.pack("=II", len(key), len(data)), key + data))
        return found

    def _body(self, elements: list[tuple[bytes, bytes, bytes]]) -> bytes:
        heads, data = b"", b""
        for index, (before, after, own) in enumerate(elements):
            position = (len(elements) - index) * ELEMENT + len(data)
            heads += before + struct.pack("=I", position) + after
            data += own
        return heads + data

    def _pages(self, tree: Tree) -> int:
        """The number of the root page of what is in a bucket."""
        elements, kind = self._leaves(tree), LEAF
        keys = sorted(tree)
        while True:
            step = self.per_page
            parts = [elements[i : i + step] for i in range(0, len(elements), step)] or [[]]
            numbers = [self._add(kind, len(part), self._body(part)) for part in parts]
            keys = keys[::step]
            if len(numbers) == 1:
                return numbers[0]
            kind = BRANCH
            elements = [
                (b"", struct.pack("=IQ", len(key), number), key) for key, number in zip(keys, numbers, strict=True)
            ]

    def _add(self, kind: int, count: int, body: bytes) -> int:
        number = len(self.data) // self.page_size
        overflow = (HEAD + len(body) - 1) // self.page_size
        page = struct.pack("=QHHI", number, kind, count, overflow) + body
        self.data += page.ljust((overflow + 1) * self.page_size, b"\0")
        return number


def found(top: Database) -> Found:
    """All that is in a database; without recursion, which its depth could exhaust."""
    result: Found = (top.sequence, [])
    unread: list[tuple[Bucket, list[tuple[bytes, object]]]] = [(top, result[1])]
    while unread:
        bucket, into = unread.pop()
        for key, value in bucket.items():
            if isinstance(value, bytes):
                into.append((key, value))
            else:
                inner: Found = (value.sequence, [])
                into.append((key, inner))
                unread.append((value, inner[1]))
    return result


def expected(tree: Tree, *, is_root: bool = True) -> Found:
    """What :func:`found` should find in what was made of ``tree``."""
    keys: list[tuple[bytes, object]] = [
        (key, value if isinstance(value, bytes) else expected(value, is_root=False))
        for key, value in sorted(tree.items())
    ]
    return (0 if is_root else len(tree), keys)


def size(contents: Found) -> int:
    """The bytes of all keys and values."""
    total = 0
    unread = [contents]
    while unread:
        for key, value in unread.pop()[1]:
            total += len(key)
            if isinstance(value, bytes):
                total += len(value)
            else:
                assert isinstance(value, tuple)
                unread.append(value)
    return total
