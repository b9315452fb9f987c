"""The tar writer: what it writes, others read; the same entries give the same bytes."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlap import errors
from onlap.layers.format import sparse_files, tar
from onlap.layers.format.tar import Entry
from onlap.layers.format.writer import TarWriter
from pure.tar_makers import facts, read, record, write

_BYTES = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name and not name.endswith(b"/"))
_NAMES = _BYTES.map(os.fsdecode)
_IDS = st.one_of(st.integers(0, 10), st.integers(0, 2**32 - 2))
_XATTRS = st.dictionaries(st.sampled_from(["user.a", "user.é", "security.capability"]), st.binary(max_size=50))


@st.composite
def _entries(draw: st.DrawFn) -> tuple[Entry, bytes]:
    type = draw(st.sampled_from("0123456"))
    data = draw(st.binary(max_size=1500)) if type == tar.FILE else b""
    link = draw(_NAMES) if type in (tar.HARDLINK, tar.SYMLINK) else ""
    entry = Entry(
        draw(_NAMES),
        type,
        draw(st.integers(0, 0o7777)),
        draw(_IDS),
        draw(_IDS),
        len(data),
        draw(st.integers(-(10**19), 10**20)),
        link,
        draw(st.integers(0, 2**12 - 1)),
        draw(st.integers(0, 2**20 - 1)),
        draw(_XATTRS),
    )
    return entry, data


@given(st.lists(_entries(), max_size=5), st.sampled_from([1, 100, 512, 1 << 18]))
def test_what_is_written_is_read(entries: list[tuple[Entry, bytes]], chunk: int) -> None:
    data = write(entries)
    found = read(data, chunk)
    assert [(facts(entry), content) for entry, content in found] == [
        (facts(entry), content) for entry, content in entries
    ]
    assert write(entries) == data


@given(st.lists(_entries(), max_size=5))
def test_what_is_written_tarfile_reads(entries: list[tuple[Entry, bytes]]) -> None:
    with tarfile.open(fileobj=io.BytesIO(write(entries)), errors="surrogateescape") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [_as_tarfile_has_it(entry) for entry, _ in entries]
        for member, (entry, data) in zip(members, entries, strict=True):
            assert (member.type.decode(), member.mode, member.uid, member.gid) == (
                entry.type,
                entry.mode,
                entry.uid,
                entry.gid,
            )
            if entry.type == tar.FILE:
                file = archive.extractfile(member)
                assert file is not None
                assert file.read() == data


def _as_tarfile_has_it(entry: Entry) -> str:
    return os.fsencode(entry.name).decode("utf-8", "surrogateescape").rstrip("/")


@given(
    st.text(min_size=1, max_size=20).filter(lambda key: "=" not in key and "\0" not in key), st.binary(max_size=1100)
)
def test_the_length_of_a_record_counts_itself(key: str, value: bytes) -> None:
    try:
        os.fsencode(key)
    except UnicodeEncodeError:
        return
    assert tar.format_record(key, value) == record(key, value)
    assert tar.parse_records(tar.format_record(key, value)) == {key: value}


@given(st.integers(-(10**19), 10**19))
def test_times_survive(nanoseconds: int) -> None:
    assert tar.parse_time(tar.format_time(nanoseconds)) == nanoseconds


@pytest.mark.parametrize(
    "entry, pax",
    [
        (Entry("plain"), False),
        (Entry("n" * 100), False),
        (Entry("n" * 101), True),
        (Entry("p" * 155 + "/" + "n" * 100), False),
        (Entry("p" * 156 + "/" + "n" * 100), True),
        (Entry("é"), True),
        (Entry("x", uid=0o7777777), False),
        (Entry("x", uid=0o7777777 + 1), True),
        (Entry("x", mtime_ns=10**9), False),
        (Entry("x", mtime_ns=10**9 + 1), True),
        (Entry("x", mtime_ns=-(10**9)), True),
        (Entry("x", tar.SYMLINK, linkname="l" * 100), False),
        (Entry("x", tar.SYMLINK, linkname="l" * 101), True),
        (Entry("x", xattrs={"user.a": b"1"}), True),
        (Entry("x", size=8**11 - 1), False),
        (Entry("x", size=8**11), True),
    ],
)
def test_pax_only_where_it_is_needed(entry: Entry, pax: bool) -> None:
    out = bytearray()
    TarWriter(out.extend).begin(entry)
    assert (out[156:157] == b"x") is pax
    assert len(out) == (3 * 512 if pax and len(out) < 2000 else len(out))


@pytest.mark.parametrize(
    "entry",
    [
        Entry("nul\0"),
        Entry("x", tar.SYMLINK, linkname="nul\0"),
        Entry("x", xattrs={"": b""}),
        Entry("x", xattrs={"user.a=b": b""}),
        Entry("x", xattrs={"user.a": bytes(1 << 20)}),
        Entry("x", uid=-1),
    ],
)
def test_what_no_archive_can_hold(entry: Entry) -> None:
    with pytest.raises(errors.InvalidArgument):
        write([(entry, b"")])


def test_data_of_another_size_than_said() -> None:
    writer = TarWriter(lambda data: None)
    writer.begin(Entry("x", size=5))
    with pytest.raises(errors.Internal):
        writer.write(b"123456")
    writer.write(b"1234")
    with pytest.raises(errors.Internal):
        writer.end()


_TREE = [
    (Entry("dir/", tar.DIRECTORY, 0o755, mtime_ns=1_600_000_000 * 10**9), b""),
    (Entry("dir/" + "n" * 120, size=5, mtime_ns=1_600_000_000_123_456_789), b"hello"),
    (Entry("dir/é", size=600, mode=0o600), b"x" * 600),
    (Entry("link", tar.SYMLINK, linkname="t" * 150), b""),
    (Entry("hard", tar.HARDLINK, linkname="dir/é"), b""),
]


@pytest.mark.needs("peer:tar")
@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_programs_extract_it(tmp_path: Path, program: str, request: pytest.FixtureRequest) -> None:
    if program == "bsdtar":
        from conftest import require

        require("peer:bsdtar")
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(
        [program, "-xf", "-", "-C", tmp_path], input=write(_TREE), check=True, env=environment, capture_output=True
    )
    long = tmp_path / "dir" / ("n" * 120)
    assert long.read_bytes() == b"hello"
    assert long.stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert os.readlink(tmp_path / "link") == "t" * 150
    assert os.path.samefile(tmp_path / "hard", tmp_path / "dir" / "é")


# Sparse files


def test_pieces_are_of_whole_blocks() -> None:
    assert sparse_files.pieces_of([], 10) == []
    assert sparse_files.pieces_of([(0, 10)], 10) == [(0, 10)]
    assert sparse_files.pieces_of([(700, 800), (1000, 1100), (5000, 5001)], 5001) == [(512, 1024), (4608, 393)]


def _sparse(name: str, pieces: list[tuple[int, int]], size: int) -> tuple[Entry, bytes, bytes]:
    """An entry, what is stored of it, and the whole content."""
    entry = Entry(name, size=size, mtime_ns=10**18)
    entry.sparse = pieces
    entry.stored = sum(length for _, length in pieces)
    stored = os.urandom(entry.stored)
    content = bytearray(size)
    at = 0
    for offset, length in pieces:
        content[offset : offset + length] = stored[at : at + length]
        at += length
    return entry, stored, bytes(content)


_SPARSE = {
    "all hole": ([], 1 << 20),
    "hole at the end": ([(0, 5)], 1 << 20),
    "hole at the beginning": ([((1 << 20) - 5, 5)], 1 << 20),
    "many": ([(number * 8192, 1024) for number in range(128)], 1 << 20),
}
_SPARSE_NAMES = ("d/file", "d/" * 60 + "n" * 120, "é\udcff/ü")


@pytest.mark.parametrize("name", _SPARSE_NAMES, ids=["short", "long", "not utf-8"])
@pytest.mark.parametrize("case", _SPARSE)
def test_sparse_files_are_read_here_and_by_tarfile(case: str, name: str) -> None:
    pieces, size = _SPARSE[case]
    entry, stored, content = _sparse(name, pieces, size)
    data = write([(entry, stored), (Entry("behind", size=3), b"abc")])
    assert len(data) < 200_000
    [(found, found_data), (behind, _)] = read(data, 700)
    assert (found.name, found.size, found.sparse, found_data) == (name, size, pieces, stored)
    assert behind.name == "behind"
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        first, second = archive.getmembers()
        assert (_bytes(first.name), first.size, second.name) == (os.fsencode(name), size, "behind")
        file = archive.extractfile(first)
        assert file is not None
        assert file.read() == content


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=pytest.mark.needs(f"peer:{name}")) for name in ("tar", "bsdtar")]
)
def test_sparse_files_are_made_by_programs(tmp_path: Path, program: str) -> None:
    items = [_sparse(f"{case}/{name}", *_SPARSE[case]) for case in _SPARSE for name in _SPARSE_NAMES[:2]]
    archive = tmp_path / "archive.tar"
    archive.write_bytes(write([(entry, stored) for entry, stored, _ in items]))
    subprocess.run([program, "-xf", archive, "-C", tmp_path], check=True, capture_output=True)
    for entry, _, content in items:
        assert (tmp_path / entry.name).read_bytes() == content
