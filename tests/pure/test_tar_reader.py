"""The tar reader against archives of other writers: Python's tarfile, GNU tar, bsdtar, and blocks made by hand."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from onlap import errors
from onlap.layers.format import tar
from pure.tar_makers import END, facts, gnu_long, header, padded, pax, read, record

LONG = "directory/" * 30 + "name"


def _tarfile(format: int, **attributes: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        info = tarfile.TarInfo("file")
        for name, value in attributes.items():
            setattr(info, name, value)
        archive.addfile(info, io.BytesIO(b"x" * info.size))
    return out.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("chunk", [1, 7, 512, 1000, 1 << 18])
def test_what_tarfile_writes_in_every_dialect(format: int, chunk: int) -> None:
    data = _tarfile(format, name="a/b", size=1000, mode=0o4751, uid=1000, gid=7, mtime=1_600_000_000)
    [(entry, content)] = read(data, chunk)
    assert (entry.name, entry.type, entry.mode, entry.uid, entry.gid) == ("a/b", tar.FILE, 0o4751, 1000, 7)
    assert entry.mtime_ns == 1_600_000_000 * 10**9
    assert content == b"x" * 1000


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(format: int) -> None:
    [(entry, _)] = read(_tarfile(format, name=LONG, type=tarfile.SYMTYPE, linkname=LONG + "x"))
    assert (entry.name, entry.linkname) == (LONG, LONG + "x")


@pytest.mark.parametrize("length", [1, 99, 100, 101, 155, 156, 255, 256, 257, 1000, 4095])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length(format: int, length: int) -> None:
    name = ("d/" * length)[: length - 1] + "f"
    [(entry, _)] = read(_tarfile(format, name=name))
    assert entry.name == name


def test_the_prefix_of_ustar() -> None:
    name = "d" * 150 + "/" + "f" * 100
    [(entry, _)] = read(_tarfile(tarfile.USTAR_FORMAT, name=name))
    assert entry.name == name


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_numbers_that_octal_does_not_hold(format: int) -> None:
    [(entry, _)] = read(_tarfile(format, uid=2**31, gid=2**32 - 2, mtime=-7))
    assert (entry.uid, entry.gid, entry.mtime_ns) == (2**31, 2**32 - 2, -7 * 10**9)


def test_a_size_beyond_eight_gigabytes_is_read_in_both_forms() -> None:
    size = 9 << 30
    for data in (
        header(size=b"\x80" + size.to_bytes(11, "big"), magic=b"ustar  \0"),
        pax(("size", b"%d" % size)) + header(),
    ):
        with pytest.raises(errors.DataLoss):
            read(data)


def test_nanoseconds_of_pax_times() -> None:
    for text, expected in (
        (b"1.5", 1_500_000_000),
        (b"1.123456789", 1_123_456_789),
        (b"1.1234567899", 1_123_456_789),
        (b"-1.5", -1_500_000_000),
        (b"7", 7_000_000_000),
        (b"7.", 7_000_000_000),
    ):
        [(entry, _)] = read(pax(("mtime", text), ("atime", text)) + header() + END)
        assert (entry.mtime_ns, entry.atime_ns) == (expected, expected)


def test_global_headers_are_for_nobody() -> None:
    """As in Go's archive/tar: it gives them out as entries, and what came before them is theirs."""
    everything = (("path", b"x"), ("size", b"512"), ("uid", b"7"), ("SCHILY.xattr.user.a", b"b"), ("mtime", b"nan"))
    data = (
        pax(*everything, flag=b"g")
        + header(b"one", size=4)
        + padded(b"data")
        + pax(("path", b"lost"))
        + gnu_long(b"K", b"lost")
        + pax(("comment", b"x"), flag=b"g")
        + header(b"two", flag=b"2", link=b"target")
        + pax(flag=b"g")
        + END
    )
    [(one, content), (two, _)] = read(data)
    assert (one.name, one.uid, one.mtime_ns, one.xattrs, content) == ("one", 0, 0, None, b"data")
    assert (two.name, two.linkname) == ("two", "target")


def test_global_records_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = tar.parse_records

    def counted(data: bytes) -> dict[str, bytes]:
        parsed.append(len(data))
        return parse(data)

    monkeypatch.setattr(tar, "parse_records", counted)
    data = pax(("comment", b"c" * 500_000), flag=b"g") + header() * 100 + END
    assert len(read(data)) == 100
    assert len(parsed) == 1


def test_xattrs() -> None:
    data = (
        pax(
            ("SCHILY.xattr.user.a", b"\0=\n"),
            ("SCHILY.xattr.user.empty", b""),
            # bsdtar writes both forms, and Go's archive/tar knows the other one.
            ("LIBARCHIVE.xattr.user.a", b"d3Jvbmc"),
            ("LIBARCHIVE.xattr.security.capability", b"Yg"),
        )
        + header()
        + END
    )
    [(entry, _)] = read(data)
    assert entry.xattrs == {"user.a": b"\0=\n", "user.empty": b""}


def test_of_a_key_that_comes_again_the_last_value_counts() -> None:
    data = pax(("path", b"one"), ("path", b""), ("uid", b"1"), ("uid", b"2")) + header(b"file") + END
    [(entry, _)] = read(data)
    assert (entry.name, entry.uid) == ("file", 2)


def test_a_slash_makes_no_directory_of_a_file() -> None:
    """Its data, read as headers, would be a second reading of the same bytes."""
    hidden = header(b"hidden", mode=b"0004755\0")
    [(entry, content)] = read(header(b"dir/", size=len(hidden)) + hidden + END)
    assert (entry.type, content) == (tar.FILE, hidden)
    data = pax(("path", b"dir/")) + header(b"x", flag=b"\0", size=len(hidden)) + hidden + END
    assert [(entry.name, entry.type) for entry, _ in read(data)] == [
        ("dir/", tar.DIRECTORY),
        ("hidden", tar.FILE),
    ]


@pytest.mark.parametrize("flag", [b"7", b"D", b"X", b"A", b"M", b"N"])
def test_types_that_go_does_not_know_are_refused(flag: bytes) -> None:
    with pytest.raises(errors.InvalidArgument, match="not supported"):
        read(header(flag=flag) + END)


def test_only_headers_with_a_magic_have_devices_and_a_prefix() -> None:
    devices = b"0000010\0" * 2
    for magic, expected in (
        (b"ustar\00000", ("p/f", 8)),
        (b"ustar\000xx", ("p/f", 8)),
        (b"ustar   ", ("f", 0)),
        (bytes(8), ("f", 0)),
    ):
        [(entry, _)] = read(header(b"f", flag=b"3", magic=magic, devices=devices, prefix=b"p") + END)
        assert (entry.name, entry.devmajor) == expected
    for prefix, expected_name in (
        (b"00000000001\0", "f"),  # GNU tar has times there
        (b"prefix", "prefix/f"),  # as Go before 1.8 wrote it
        (b"caf\xe9", "f"),
    ):
        [(entry, _)] = read(header(b"f", magic=b"ustar  \0", prefix=prefix) + END)
        assert entry.name == expected_name


def test_attributes_in_a_form_that_cannot_be_used_are_said() -> None:
    data = pax(("SCHILY.acl.access", b"user::rwx"), ("RHT.security.selinux", b"x")) + header() + END
    [(entry, _)] = read(data)
    assert entry.skipped == ("acl", "xattr")


def test_names_that_are_not_utf8() -> None:
    name = b"\xff\xfe/\xe9"
    for data in (header(name), pax(("path", name)) + header(), gnu_long(b"L", name) + header()):
        [(entry, _)] = read(data + END)
        assert os.fsencode(entry.name) == name


def test_old_headers() -> None:
    data = header(b"dir/", flag=b"\0", magic=bytes(8), prefix=b"no prefix")
    data += header(b"f", flag=b"\0", size=3, magic=bytes(8)) + padded(b"abc")
    assert [(entry.name, entry.type, data) for entry, data in read(data + END)] == [
        ("dir/", tar.DIRECTORY, b""),
        ("f", tar.FILE, b"abc"),
    ]


def test_the_prefix_of_star_is_shorter() -> None:
    rest = b"p".ljust(131, b"\0") + b"00000000001 00000000002 ".ljust(24, b"\0") + bytes(8) + b"tar\0"
    [(entry, _)] = read(header(b"name", rest=rest) + END)
    assert entry.name == "p/name"


def test_sums_of_signed_bytes_are_taken() -> None:
    block = header(b"\xe9\xe9")
    unsigned = int(block[148:154], 8)
    signed = b"%06o\0 " % (unsigned - 512)
    [(entry, _)] = read(block[:148] + signed + block[156:] + END)
    assert os.fsencode(entry.name) == b"\xe9\xe9"


def test_types_without_data_ignore_their_size() -> None:
    data = header(b"dir/", flag=b"5", size=4096) + header(b"link", flag=b"2", size=10, link=b"x") + END
    assert [entry.name for entry, _ in read(data)] == ["dir/", "link"]


def test_a_volume_label_is_passed_over() -> None:
    label = pax(("path", b"l")) + header(b"label", flag=b"V", size=512) + header(b"data")
    assert [entry.name for entry, _ in read(label + header(b"f") + END)] == ["f"]


def test_data_that_nobody_takes_is_passed_over() -> None:
    data = header(b"a", size=1000) + padded(b"x" * 1000) + header(b"b") + END
    from onlap.layers.format.reader import TarReader

    for chunk in (1, 300, 4096):
        stream = io.BytesIO(data)
        reader = TarReader(lambda stream=stream, chunk=chunk: stream.read(chunk))  # type: ignore[misc]
        assert [entry.name for entry in reader] == ["a", "b"]


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), END + b"anything at all"])
def test_ends_that_are_taken(end: bytes) -> None:
    assert len(read(header() + end)) == 1


@pytest.mark.parametrize("chunk", [1, 512, 1 << 18])
@pytest.mark.parametrize("padding", [0, 1, 508, 509])
def test_the_last_padding_may_be_missing(padding: int, chunk: int) -> None:
    """umoci's insert writes such layers; Go's archive/tar ends where the archive does."""
    [(_, content)] = read(header(size=3) + b"abc" + bytes(padding), chunk)
    assert content == b"abc"
    with pytest.raises(errors.DataLoss):
        read(header(size=3) + b"ab", chunk)
    # A header of what does not come is no end.
    with pytest.raises(errors.DataLoss):
        read(pax(("path", b"x"))[: 1024 - padding], chunk)


def _outcome(data: bytes, chunk: int) -> object:
    try:
        return [(facts(entry), entry.offset, content) for entry, content in read(data, chunk)]
    except errors.OnlapError as error:
        return type(error), str(error)


@pytest.mark.parametrize("repaired", [True, False], ids=["sum right", "sum wrong"])
@pytest.mark.parametrize(
    "second",
    [
        header(b"d/file", size=3, uid=b"0001750\0"),
        header(b"d/", flag=b"5", size=3),
        header(b"n" * 100, size=3, prefix=b"p" * 155),
        header(b"file", size=3, magic=b"ustar  \0"),
    ],
    ids=["file", "directory", "prefix", "GNU"],
)
def test_a_header_that_resembles_the_one_before_is_read_as_any_other(second: bytes, repaired: bool) -> None:
    content = b"" if second[156:157] == b"5" else padded(b"abc")
    for place in range(512):
        for value in b"\0 1789x+_\x80\xff":
            block = bytearray(second)
            block[place] = value
            if repaired and not 148 <= place < 156:
                block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
            archive = second + content + bytes(block) + content + header(b"last") + END
            # A chunk that is smaller than a header never has the second one whole.
            assert _outcome(archive, 1 << 18) == _outcome(archive, 511), (place, value)


# Sparse files: 4 KiB at 1 MiB, of 2 MiB

_MAP = [(1 << 20, 4096)]
_DATA = b"s" * 4096
_SIZE = 2 << 20


def _old_sparse(pieces: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    def piece(offset: int, length: int) -> bytes:
        return b"%011o\0%011o\0" % (offset, length)

    first, more = pieces[:4], pieces[4:]
    rest = bytes(41) + b"".join(piece(*p) for p in first).ljust(96, b"\0")
    rest += (b"\1" if more else b"\0") + b"%011o\0" % size
    blocks = header(b"sparse", flag=b"S", size=len(data), magic=b"ustar  \0", rest=rest)
    while more:
        now, more = more[:21], more[21:]
        block = b"".join(piece(*p) for p in now).ljust(504, b"\0")
        blocks += (block + (b"\1" if more else b"\0")).ljust(512, b"\0")
    return blocks + padded(data) + END


def _pax_sparse(version: str, pieces: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    numbers = [number for piece in pieces for number in piece]
    if version == "0.0":
        records = [("GNU.sparse.size", b"%d" % size), ("GNU.sparse.numblocks", b"%d" % len(pieces))]
        for offset, length in pieces:
            records += [("GNU.sparse.offset", b"%d" % offset), ("GNU.sparse.numbytes", b"%d" % length)]
        return pax(*records) + header(b"sparse", size=len(data)) + padded(data) + END
    if version == "0.1":
        records = [
            ("GNU.sparse.size", b"%d" % size),
            ("GNU.sparse.numblocks", b"%d" % len(pieces)),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.map", b",".join(b"%d" % number for number in numbers)),
        ]
        return pax(*records) + header(b"GNUSparseFile.0/sparse", size=len(data)) + padded(data) + END
    text = padded(b"".join(b"%d\n" % number for number in [len(pieces), *numbers]))
    records = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", b"%d" % size),
    ]
    return pax(*records) + header(b"x", size=len(text) + len(data)) + padded(text + data) + END


def _sparse(version: str, pieces: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    return _old_sparse(pieces, size, data) if version == "old" else _pax_sparse(version, pieces, size, data)


# Without a version, 0.0 and 0.1 say nothing of a file that is all hole.
@pytest.mark.parametrize(
    "version, count",
    [("old", 0), ("1.0", 0)]
    + [(version, count) for version in ("old", "0.0", "0.1", "1.0") for count in (1, 4, 5, 25, 26, 300)],
)
def test_sparse_files_of_every_form(version: str, count: int) -> None:
    pieces = [(number * 8192, 1024) for number in range(count)]
    data = os.urandom(1024 * count)
    for chunk in (500, 1 << 18):
        [(entry, stored)] = read(_sparse(version, pieces, _SIZE * 2, data), chunk)
        assert (entry.name, entry.size, entry.stored) == ("sparse", _SIZE * 2, len(data))
        assert (entry.sparse, stored) == (pieces, data)


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize(
    "pieces, size",
    [
        ([(0, 4096), (100, 0)], _SIZE),
        ([(0, 2048), (1024, 2048)], _SIZE),
        ([(8192, 2048), (0, 2048)], _SIZE),
        ([(_SIZE, 4096)], _SIZE),
        ([(0, 4096)], 100),
        ([(0, 1000)], _SIZE),
        ([(0, 8000)], _SIZE),
        ([(8**11 - 1, 4096)], _SIZE),
    ],
)
def test_sparse_maps_that_cannot_be(version: str, pieces: list[tuple[int, int]], size: int) -> None:
    with pytest.raises(errors.InvalidArgument, match="sparse map"):
        read(_sparse(version, pieces, size, _DATA))


def test_sparse_maps_without_end() -> None:
    block = (b"%011o\0%011o\0" % (0, 0) * 21).ljust(504, b"\0") + b"\1".ljust(8, b"\0")
    head = header(b"s", flag=b"S", magic=b"ustar  \0", rest=bytes(41) + bytes(96) + b"\1" + b"%011o\0" % 0)
    with pytest.raises(errors.InvalidArgument, match="pieces"):
        read(head + block * 13000)
    huge = padded(b"999999999\n")
    records = [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"5")]
    with pytest.raises(errors.InvalidArgument, match="pieces"):
        read(pax(*records) + header(size=len(huge)) + huge)


# Programs


def _make_tree(top: Path) -> None:
    (top / "dir").mkdir()
    (top / "dir" / ("long" * 40)).write_bytes(b"content")
    (top / "link").symlink_to("x" * 150)
    os.link(top / "dir" / ("long" * 40), top / "hard")
    with (top / "sparse").open("wb") as file:
        for number in range(9):
            file.seek((2 * number + 1) << 16)
            file.write(b"data")
        file.truncate(2 << 20)
    os.utime(top / "sparse", ns=(0, 1_600_000_000_123_456_789))


@pytest.mark.needs("peer:tar")
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu", "--sparse"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
        ["--format=gnu"],
        ["--format=posix"],
    ],
    ids=" ".join,
)
def test_what_gnu_tar_writes(tmp_path: Path, options: list[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    _make_tree(tree)
    data = subprocess.run(["tar", "-c", *options, "-C", tree, "."], check=True, capture_output=True).stdout
    found = {entry.name: (entry, content) for entry, content in read(data)}
    assert set(found) == {"./", "./dir/", f"./dir/{'long' * 40}", "./link", "./hard", "./sparse"}
    assert found["./link"][0].linkname == "x" * 150
    entry, content = found["./sparse"]
    assert _spread(entry.sparse, content, entry.size) == (tree / "sparse").read_bytes()
    precision = 1 if "pax" in options[0] or "posix" in options[0] else 10**9
    assert entry.mtime_ns // precision == 1_600_000_000_123_456_789 // precision
    kinds = {found["./hard"][0].type, found[f"./dir/{'long' * 40}"][0].type}
    assert kinds == {tar.FILE, tar.HARDLINK}


@pytest.mark.needs("peer:bsdtar")
@pytest.mark.parametrize("format", ["ustar", "pax", "gnutar", "v7"])
def test_what_bsdtar_writes(tmp_path: Path, format: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    _make_tree(tree)
    if format in ("ustar", "v7"):
        (tree / "link").unlink()
    if format == "v7":
        (tree / "dir" / ("long" * 40)).rename(tree / "short")
    command = ["bsdtar", "-c", "--format", format, "-f", "-", "-C", str(tree), "."]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    found = {os.path.normpath(entry.name): (entry, content) for entry, content in read(data)}
    entry, content = found["sparse"]
    assert _spread(entry.sparse, content, entry.size) == (tree / "sparse").read_bytes()
    assert found["dir"][0].type == tar.DIRECTORY


def _spread(pieces: list[tuple[int, int]] | None, content: bytes, size: int) -> bytes:
    if pieces is None:
        return content
    out = bytearray(size)
    for offset, length in pieces:
        out[offset : offset + length], content = content[:length], content[length:]
    return bytes(out)


def test_records_are_made_right_by_this_file() -> None:
    assert record("k", b"v") == b"6 k=v\n"
