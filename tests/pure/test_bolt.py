"""The reader of bbolt's databases: what it finds, which transaction it takes, and what it does with damage."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from onlap import errors
from onlap.check.stores import bolt
from pure.bolt_makers import HEAD, Found, Tree, Writer, checksum, expected, found, meta, size

SIZES = (1024, 4096, 16384, 65536)

# With 1 KiB pages and two elements on each: the leaves of "a" are the pages 3 to 6, its branches 7 and 8, and 9 above
# them; "c" is inline; the leaf of "d", with one overflow page, is 10; the leaves of the root bucket are 12 (with "a"
# and "c") and 13 (with "d"), and 14 is above them.
SMALL: Tree = {
    b"a": {b"k%d" % i: b"the value of %d, which is not short" % i for i in range(8)},
    b"c": {b"x": b"y", b"z": b""},
    b"d": {b"long": bytes(1500)},
}
SMALL_DATA = Writer(1024, 2).database(SMALL)
D_LEAF, UPPER_LEAF, ROOT = 10, 12, 14


def _tree(seed: int) -> Tree:
    rng = random.Random(seed)

    def bucket(depth: int) -> Tree:
        keys = {rng.randbytes(rng.choice((1, 2, 8, 40, 300))) for _ in range(rng.choice((0, 1, 3, 30, 200)))}
        return {
            key: bucket(depth - 1) if depth and rng.random() < 0.2 else rng.randbytes(rng.choice((0, 5, 64, 500, 9000)))
            for key in sorted(keys)
        }

    return {b"one": bucket(2), b"two": bucket(1), b"three": {}, b"four": bucket(0)}


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def _read(path: str) -> Found:
    with bolt.opened(path) as database:
        return found(database)


def _put(data: bytes, page: int, offset: int, form: str, value: int | bytes, page_size: int = 1024) -> bytes:
    changed = bytearray(data)
    struct.pack_into("=" + form, changed, page * page_size + offset, value)
    return bytes(changed)


# What is in it


@pytest.mark.parametrize("page_size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_all_that_was_written_is_found(tmp_path: Path, page_size: int, seed: int) -> None:
    tree = _tree(seed)
    path = _write(tmp_path / "db", Writer(page_size, per_page=3 + seed * 5).database(tree))
    with bolt.opened(path) as database:
        assert found(database) == expected(tree)
        assert (database.path, database.txid, database.page_size) == (path, 7, page_size)
        assert database.invalid_meta is None


@pytest.mark.parametrize("seed", range(4))
def test_each_key_is_found_by_itself_and_no_other(tmp_path: Path, seed: int) -> None:
    tree = _tree(seed)[b"one"]
    assert not isinstance(tree, bytes)
    path = _write(tmp_path / "db", Writer(1024, per_page=3).database({b"one": tree}))
    with bolt.opened(path) as database:
        bucket = database.bucket(b"one")
        assert bucket is not None
        assert bucket.names == (b"one",)
        for key, value in tree.items():
            if isinstance(value, bytes):
                assert bucket.get(key) == value
                assert bucket.bucket(key) is None
                assert bucket.bucket(key, key) is None
            else:
                assert bucket.get(key) is None
                inner = bucket.bucket(key)
                assert inner is not None
                assert inner.names == (b"one", key)
                assert [name for name, _ in inner.items()] == sorted(value)
            for other in (key + b"\0", key[:-1], b"\0", b"\xff" * 301):
                assert (bucket.get(other) is None) == (not isinstance(tree.get(other), bytes))


def test_buckets_in_buckets_by_their_names(tmp_path: Path) -> None:
    tree = {b"v1": {b"default": {b"images": {b"name": b"target"}, b"labels": {}}}}
    with bolt.opened(_write(tmp_path / "db", Writer().database(tree))) as database:
        images = database.bucket(b"v1", b"default", b"images")
        assert images is not None
        assert images.get(b"name") == b"target"
        assert images.sequence == 1
        assert repr(images) == "<Bucket v1/default/images>"
        assert database.bucket() is database
        assert database.bucket(b"v1", b"none", b"images") is None
        assert database.bucket(b"v1", b"default", b"images", b"name") is None


def test_nothing_is_read_after_the_block(tmp_path: Path) -> None:
    path = _write(tmp_path / "db", SMALL_DATA)
    with bolt.opened(path) as database:
        inline = database.bucket(b"c")
        assert inline is not None
    for bucket in (database, inline):
        with pytest.raises(errors.FailedPrecondition, match="no longer open"):
            list(bucket.items())
        with pytest.raises(errors.FailedPrecondition, match="no longer open"):
            bucket.get(b"x")


# Which transaction


def _two_states(page_size: int = 1024, newer: int = 7) -> bytes:
    """A database of transaction 6 with a bucket "old", and of transaction 7 with a bucket "new"."""
    writer = Writer(page_size)
    writer.database({b"old": {}}, txid=6)
    old = len(writer.data) // page_size - 1
    data = bytearray(writer.database({b"new": {}}, txid=newer))
    data[:page_size] = meta(0, root=old, pages=old + 1, txid=6, page_size=page_size)
    return bytes(data)


def _names(path: str) -> tuple[list[bytes], int, int | None]:
    with bolt.opened(path) as database:
        return [name for name, _ in database.items()], database.txid, database.invalid_meta


def test_the_newer_of_two_transactions(tmp_path: Path) -> None:
    assert _names(_write(tmp_path / "db", _two_states())) == ([b"new"], 7, None)
    assert _names(_write(tmp_path / "older", _two_states(newer=5))) == ([b"old"], 6, None)


@pytest.mark.parametrize("page_size", [1024 << shift for shift in range(8)])
@pytest.mark.parametrize("offset", [HEAD, HEAD + 4, HEAD + 32, HEAD + 56], ids=["magic", "version", "root", "checksum"])
def test_the_other_transaction_if_a_meta_page_is_not_valid(tmp_path: Path, page_size: int, offset: int) -> None:
    data = _two_states(page_size)
    assert _names(_write(tmp_path / "1", _put(data, 1, offset, "B", 0x55, page_size))) == ([b"old"], 6, 1)
    assert _names(_write(tmp_path / "0", _put(data, 0, offset, "B", 0x55, page_size))) == ([b"new"], 7, 0)
    neither = _put(_put(data, 0, offset, "B", 0x55, page_size), 1, offset, "B", 0x55, page_size)
    with pytest.raises(errors.DataLoss, match="db"):
        _read(_write(tmp_path / "db", neither))


def test_a_meta_page_of_another_page_size_is_not_valid(tmp_path: Path) -> None:
    data = bytearray(_two_states())
    data[1024:2048] = meta(1, root=3, pages=9, txid=7, page_size=2048)[:1024]
    assert _names(_write(tmp_path / "db", bytes(data))) == ([b"old"], 6, 1)


def test_the_end_of_the_file_that_no_transaction_uses_may_be_gone_or_long(tmp_path: Path) -> None:
    path = _write(tmp_path / "db", SMALL_DATA)
    os.truncate(path, 1 << 40)
    assert _read(path) == expected(SMALL)
    data = bytearray(SMALL_DATA)
    pages = len(data) // 1024
    data[1024:2048] = meta(1, root=ROOT, pages=pages + 50, txid=7, page_size=1024)
    assert _read(_write(tmp_path / "short", bytes(data))) == expected(SMALL)


# Written to meanwhile


def _commit_during(monkeypatch: pytest.MonkeyPatch, times: int, commit: Callable[[], None]) -> list[int]:
    """Let ``commit`` run within the first reads of the pages; returns the sizes of what was read."""
    real = os.pread
    reads: list[int] = []

    def pread(fd: int, count: int, offset: int) -> bytes:
        data = real(fd, count, offset)
        if count > 80:
            reads.append(count)
            if len(reads) <= times:
                commit()
        return data

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return reads


def test_a_commit_while_it_is_read_makes_it_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "db"
    states = [Writer().database({b"tx %d" % txid: {}}, txid=txid) for txid in range(7, 20)]

    def commit() -> None:
        path.write_bytes(states.pop(0))

    commit()
    reads = _commit_during(monkeypatch, 12, commit)
    assert _names(str(path)) == ([b"tx 19"], 19, None)
    assert len(reads) == 13


def test_a_writer_that_never_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "db"
    txids = iter(range(7, 10**6))

    def commit() -> None:
        path.write_bytes(Writer(1024, 2).database(SMALL, txid=next(txids)))

    commit()
    reads = _commit_during(monkeypatch, 10**6, commit)
    with pytest.raises(errors.Unavailable, match=r"db was written to.*; try again"):
        _read(str(path))
    assert len(reads) == 30


# What is no database


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "is empty: it is not a bbolt database"),
        (b"x", "too short"),
        (SMALL_DATA[:79], "too short"),
        (bytes(1 << 20), "is not a bbolt database, or its beginning was overwritten"),
        (b"SQLite format 3\0" * 1000, "is not a bbolt database"),
        (meta(0, root=3, pages=4, txid=1, page_size=4096, version=1), "of version 1; only version 2"),
        (meta(0, root=3, pages=4, txid=1, page_size=4096, magic=0xEDDA0CED), "the other byte order"),
        (meta(0, root=3, pages=4, txid=1, page_size=4096, magic=0xEDDA0CEE), "is not a bbolt database"),
        (meta(0, root=3, pages=4, txid=1, page_size=1000), "pages of 1000 bytes"),
        (_put(meta(0, root=3, pages=4, txid=1, page_size=4096), 0, 40, "Q", 9), "neither of its meta pages is valid"),
    ],
)
def test_files_that_are_no_databases(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(errors.DataLoss, match=what) as raised:
        _read(_write(tmp_path / "db", data))
    assert raised.value.key == str(tmp_path / "db")
    assert str(tmp_path / "db") in str(raised.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(errors.DataLoss, match="it is not a file"):
            _read(str(path))
    with pytest.raises(errors.NotFound, match="nothing"):
        _read(str(tmp_path / "nothing"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(errors.InvalidArgument, match="loop"):
        _read(str(tmp_path / "loop"))


def test_a_symlink_is_followed_as_the_daemon_does(tmp_path: Path) -> None:
    _write(tmp_path / "db", SMALL_DATA)
    (tmp_path / "link").symlink_to("db")
    assert _read(str(tmp_path / "link")) == expected(SMALL)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = _write(tmp_path / "db", SMALL_DATA)
    with (
        pytest.raises(errors.ResourceExhausted, match=f"has {len(SMALL_DATA)} bytes"),
        bolt.opened(path, limit=len(SMALL_DATA) - 1),
    ):
        pass
    with bolt.opened(path, limit=len(SMALL_DATA)) as database:
        assert found(database) == expected(SMALL)


# Damage

NUMBER, KIND, COUNT, OVERFLOW = 0, 8, 10, 12
# Of the first element of a leaf, and of the first of a branch.
FLAGS, POSITION, KEY_SIZE, VALUE_SIZE = 16, 20, 24, 28
B_POSITION, B_KEY_SIZE, CHILD = 16, 20, 24
_FIRST_KEY = 16 + 2 * 16  # of two elements


@pytest.mark.parametrize(
    "page, offset, form, value, where, what",
    [
        (3, NUMBER, "Q", 99, 3, "it has the number 99"),
        (3, KIND, "H", 0x10, 3, "it is a list of free pages"),
        (3, KIND, "H", 0x04, 3, "it is a meta page"),
        (3, KIND, "H", 3, 3, "the unknown kind 0x3"),
        (3, KIND, "H", 1, 3, "element 0 is not within it"),
        (7, KIND, "H", 2, 7, "element 0"),
        (3, COUNT, "H", 100, 3, "its 100 elements do not fit into 1024 bytes"),
        (3, COUNT, "H", 0xFFFF, 3, "its 65535 elements"),
        (7, COUNT, "H", 0, 7, "without children"),
        (3, OVERFLOW, "I", 0xFFFFFFFF, 3, "4294967295 overflow pages are more"),
        (3, OVERFLOW, "I", 1, 4, "it is used twice, by pages 7 and 7"),
        (D_LEAF, OVERFLOW, "I", 0, D_LEAF, "element 0 is not within it"),
        (3, FLAGS, "I", 2, 3, "unknown flags 0x2"),
        (3, FLAGS, "I", 1, 3, "it refers to page [0-9]{19}, but"),
        (UPPER_LEAF, VALUE_SIZE + 16, "I", 15, UPPER_LEAF, "the bucket c has 15 bytes, too few for its header"),
        (UPPER_LEAF, VALUE_SIZE + 16, "I", 31, UPPER_LEAF, "an inline bucket has 15 bytes, too few for its page"),
        (3, POSITION, "I", 0, 3, "element 0 is not within it, or lies over another"),
        (3, POSITION, "I", 0xFFFFFFFF, 3, "element 0 is not within it"),
        (3, POSITION + 16, "I", 16, 3, "element 1 is not within it, or lies over another"),
        (3, KEY_SIZE, "I", 0, 3, "element 0"),
        (3, KEY_SIZE, "I", 0xFFFFFFFF, 3, "element 0"),
        (3, VALUE_SIZE, "I", 0xFFFFFFFF, 3, "element 0"),
        (3, VALUE_SIZE, "I", 60, 3, "element 1 is not within it, or lies over another"),
        (3, _FIRST_KEY, "2s", b"k1", 3, "the key of its element 1 is out of order"),
        (3, _FIRST_KEY, "2s", b"j9", 3, "the key of its element 0 is out of order"),
        (4, _FIRST_KEY, "2s", b"k4", 4, "the key of its element 0 is out of order"),
        (8, _FIRST_KEY, "2s", b"k7", 8, "the key of its element 1 is out of order"),
        (7, B_POSITION, "I", 0xFFFFFFF0, 7, "element 0"),
        (7, B_KEY_SIZE, "I", 0, 7, "element 0"),
        (7, B_POSITION + 16, "I", 16, 7, "element 1 is not within it, or lies over another"),
        (8, _FIRST_KEY, "2s", b"k1", 8, "the key of its element 0 is out of order"),
        (7, CHILD, "Q", 0, 7, "it refers to page 0, but pages are 2 to 14"),
        (7, CHILD, "Q", 1, 7, "it refers to page 1,"),
        (7, CHILD, "Q", 15, 7, "it refers to page 15,"),
        (7, CHILD, "Q", 2**64 - 1, 7, "it refers to page 18446744073709551615,"),
        (7, CHILD, "Q", 2, 2, "it is a list of free pages"),
        (7, CHILD, "Q", 7, 7, "it is used twice, by pages 9 and 7"),
        (7, CHILD, "Q", 9, 9, "it is used twice, by pages 12 and 7"),
        (7, CHILD, "Q", 4, 4, "the key of its element 0 is out of order"),
    ],
)
def test_damage_of_every_field(
    tmp_path: Path, page: int, offset: int, form: str, value: int | bytes, where: int, what: str
) -> None:
    path = _write(tmp_path / "db", _put(SMALL_DATA, page, offset, form, value))
    with pytest.raises(errors.DataLoss, match=f"db is damaged: page {where}: .*({what})"):
        _read(path)


def _value_of(name: bytes) -> int:
    """Where the value of the bucket of that name is."""
    return SMALL_DATA.index(name, UPPER_LEAF * 1024 + HEAD + 2 * 16) + len(name)


@pytest.mark.parametrize(
    "name, offset, form, value, what",
    [
        (b"a", 0, "Q", 0, "too few for its page"),
        (b"a", 0, "Q", 1, "it refers to page 1"),
        (b"a", 0, "Q", UPPER_LEAF, "it is used twice, by pages 14 and 12"),
        (b"a", 0, "Q", D_LEAF, "it is used twice, by pages 13 and 12"),
        (b"c", 16 + KIND, "H", 1, "an inline bucket is of the kind 0x1"),
        (b"c", 16 + COUNT, "H", 9, "its 9 elements do not fit"),
        (b"c", 16 + VALUE_SIZE, "I", 60, "element 0 is not within it"),
    ],
)
def test_damage_of_buckets(tmp_path: Path, name: bytes, offset: int, form: str, value: int, what: str) -> None:
    path = _write(tmp_path / "db", _put(SMALL_DATA, 0, _value_of(name) + offset, form, value))
    with pytest.raises(errors.DataLoss, match=f"db is damaged: page [0-9]+: .*{what}"):
        _read(path)


def test_pages_that_are_cut_off(tmp_path: Path) -> None:
    for length in range(2048, len(SMALL_DATA), 512):
        with pytest.raises(errors.DataLoss, match=f"the file ends .* at byte {length}"):
            _read(_write(tmp_path / "db", SMALL_DATA[:length]))


def test_buckets_that_are_too_deep(tmp_path: Path) -> None:
    tree: Tree = {}
    for _ in range(64):
        tree = {b"b": tree}
    path = _write(tmp_path / "db", Writer().database(tree))
    assert _read(path) == expected(tree)
    with pytest.raises(errors.DataLoss, match="more than 64 buckets deep"):
        _read(_write(tmp_path / "deep", Writer().database({b"b": tree})))


def test_branches_that_are_too_deep(tmp_path: Path) -> None:
    for levels, is_taken in ((64, True), (65, False)):
        data = bytearray(Writer(1024).database({b"b": {}}))
        root = len(data) // 1024 - 1
        for _ in range(levels):
            number = len(data) // 1024
            page = struct.pack("=QHHIIIQ", number, 1, 1, 0, 16, 1, root) + b"b"
            data += page.ljust(1024, b"\0")
            root = number
        data[1024:2048] = meta(1, root=root, pages=root + 1, txid=7, page_size=1024)
        path = _write(tmp_path / "db", bytes(data))
        if is_taken:
            assert _read(path) == (0, [(b"b", (0, []))])
            continue
        with bolt.opened(path) as database:
            with pytest.raises(errors.DataLoss, match="more than 64 branch pages deep"):
                list(database.items())
            with pytest.raises(errors.DataLoss, match="more than 64 branch pages deep"):
                database.get(b"b")


def test_a_walk_that_meets_damage_has_given_what_is_before_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "db", _put(SMALL_DATA, 5, NUMBER, "Q", 99))
    with bolt.opened(path) as database:
        bucket = database.bucket(b"a")
        assert bucket is not None
        items = bucket.items()
        assert [next(items)[0] for _ in range(4)] == [b"k0", b"k1", b"k2", b"k3"]
        with pytest.raises(errors.DataLoss, match="page 5"):
            next(items)
        assert bucket.get(b"k7") == b"the value of 7, which is not short"
        with pytest.raises(errors.DataLoss, match="page 5"):
            bucket.get(b"k4")


# Whatever is done to it

_LARGE = Writer(1024, 5).database(
    {
        b"v1": {
            b"default": {
                b"images": {b"image %d" % i: {b"target": {b"digest": b"sha256:%d" % i}} for i in range(30)},
                b"content": {b"blob": {b"sha256:%d" % i: {b"size": b"%d" % i} for i in range(20)}},
                b"long": {b"l%d" % i: bytes(700 * i) for i in range(5)},
            }
        }
    }
)
_NUMBERS = (0, 1, 2, 3, 16, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63, 2**64 - 1)


def mutate(data: bytes, rng: random.Random, page_size: int) -> bytes:
    """``data`` with one to four changes; its meta pages have right checksums again, but for one in four times."""
    changed = bytearray(data)
    pages = len(data) // page_size
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(8)
        # Mostly where the structures are: at the beginnings of pages.
        at = rng.randrange(pages) * page_size + rng.choice((rng.randrange(page_size), rng.randrange(0, 96, 2)))
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind in (1, 2, 3):
            form = rng.choice("BHIQ")
            value = rng.choice((*_NUMBERS, rng.randrange(pages + 2), rng.randrange(2 * page_size)))
            if at + 8 <= len(changed):
                struct.pack_into("=" + form, changed, at, value % 256 ** struct.calcsize("=" + form))
        elif kind == 4:  # all that follows is elsewhere
            del changed[at : at + rng.randrange(1, 200)]
        elif kind == 5:
            length = rng.randrange(1, 2 * page_size)
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == 6:
            source, target = (rng.randrange(pages) * page_size for _ in range(2))
            if target + page_size <= len(changed):
                changed[target : target + page_size] = changed[source : source + page_size].ljust(page_size, b"\0")
        else:
            del changed[rng.randrange(len(changed)) :]
            changed += b"\0" * (100 - len(changed))
    if rng.randrange(4):
        for start in (16, page_size + 16):
            if start + 64 <= len(changed):
                struct.pack_into("=Q", changed, start + 56, checksum(changed[start : start + 56]))
    return bytes(changed)


def test_whatever_is_done_to_it_only_our_errors_come_of_it(tmp_path: Path) -> None:
    rng = random.Random(1)
    outcomes = {"read": 0, "damaged": 0}
    for _ in range(3000):
        data = mutate(_LARGE, rng, 1024)
        path = _write(tmp_path / "db", data)
        try:
            contents = _read(path)
            outcomes["read"] += 1
            # Each byte is in one key or value at most: time and memory depend on the size of the file alone.
            assert size(contents) <= len(data)
        except errors.DataLoss:
            outcomes["damaged"] += 1
        _look_up(path)
    assert min(outcomes.values()) > 300, outcomes


def _look_up(path: str) -> None:
    try:
        with bolt.opened(path) as database:
            images = database.bucket(b"v1", b"default", b"images")
            if images is not None:
                for i in range(0, 30, 7):
                    images.get(b"image %d" % i)
                    images.bucket(b"image %d" % i, b"target")
    except errors.DataLoss:
        pass
