"""Reading /proc/<pid>/mountinfo: what another user put into it stops nobody."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlap.mounts import mountinfo
from onlap.mounts.mountinfo import Place, Table

# fs/proc_namespace.c, mangle(): what is written as an octal escape, and nothing else is.
_ESCAPED = b" \t\n\\#"


def mangle(name: bytes) -> bytes:
    return b"".join(b"\\%03o" % byte if byte in _ESCAPED else bytes((byte,)) for byte in name)


def line(
    number: int, parent: int, mountpoint: bytes, root: bytes = b"/", device: bytes = b"8:1", fstype: bytes = b"ext4"
) -> bytes:
    where = b"%d %d %s %s %s" % (number, parent, device, mangle(root), mangle(mountpoint))
    return where + b" rw,relatime shared:1 - " + fstype + b" /dev/x rw\n"


_NAMES = st.binary(max_size=20).filter(lambda name: b"\0" not in name).map(lambda name: b"/" + name)


@given(st.lists(st.tuples(_NAMES, _NAMES)))
def test_every_name_is_read_as_it_is(names: list[tuple[bytes, bytes]]) -> None:
    text = b"".join(line(index, 1, *both) for index, both in enumerate(names, 2))
    assert [(entry.mountpoint, entry.root) for entry in mountinfo.parse(text)] == names


@pytest.mark.parametrize("cut", ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_what_is_the_end_of_a_line_elsewhere(cut: str) -> None:
    name = os.fsencode(f"/a{cut}b")
    assert [entry.mountpoint for entry in mountinfo.parse(line(2, 1, name) + line(3, 1, b"/c"))] == [name, b"/c"]


@given(st.binary(), st.binary())
def test_what_is_malformed_is_passed_over(before: bytes, after: bytes) -> None:
    text = before + b"\n" + line(2, 1, b"/here") + after
    assert b"/here" in [entry.mountpoint for entry in mountinfo.parse(text)]


@given(
    st.lists(st.sampled_from([b"1", b"22", b" ", b"-", b" - ", b"/", b"\\", b"\\777", b"\\04", b"0:1", b"\n", b"\r"]))
)
def test_pieces_of_lines(pieces: list[bytes]) -> None:
    text = b"".join(pieces)
    table = Table(text)
    for entry in mountinfo.parse(text):
        table.place(entry.mountpoint)


def test_only_the_lines_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    entry = mountinfo.Entry

    def counted(*fields: object) -> mountinfo.Entry:
        made.append(fields)
        return entry(*fields)  # type: ignore[arg-type]

    monkeypatch.setattr(mountinfo, "Entry", counted)
    text = b"".join(line(index, 1, b"/mnt/%d" % index) for index in range(2, 5000))
    assert [found.id for found in mountinfo.parse(text, b"/mnt/77 ", b"/mnt/4711 ")] == [77, 4711]
    assert len(made) == 2


@pytest.mark.parametrize(
    "path, place",
    [
        (b"/", Place(b"8:1", b"/@")),
        (b"/srv", Place(b"8:1", b"/@/srv")),
        (b"/srv2/x", Place(b"8:1", b"/@/srv2/x")),
        (b"/mnt/x", Place(b"8:2", b"/x")),
        (b"/mnt/alias/7/fs", Place(b"8:1", b"/@/srv/snapshots/7/fs")),
        (b"/over", Place(b"8:4", b"/")),
        # On the disk that was covered later, and so is seen no more.
        (b"/over/inner/x", Place(b"8:4", b"/inner/x")),
    ],
)
def test_where_a_path_lies(path: bytes, place: Place) -> None:
    text = (
        line(20, 1, b"/", b"/@")
        + line(21, 20, b"/mnt", device=b"8:2")
        + line(22, 21, b"/mnt/alias", b"/@/srv/snapshots")
        + line(23, 20, b"/over", device=b"8:3")
        + line(24, 23, b"/over/inner", device=b"8:3")
        + line(25, 23, b"/over", device=b"8:4")
    )
    assert Table(text).place(path) == place


def test_a_table_without_a_root() -> None:
    """Of a process that changed its root to a directory that is no mount point."""
    table = Table(line(30, 20, b"/proc", device=b"0:5") + line(31, 30, b"/proc/x", device=b"0:6"))
    assert table.place(b"/proc/1") == Place(b"0:5", b"/1")
    assert table.place(b"/proc/x/1") == Place(b"0:6", b"/1")
    assert table.place(b"/elsewhere") is None


def test_where_we_are_ourselves() -> None:
    place = mountinfo.place_of(os.path.realpath("/proc/self/ns"))
    assert place is not None
    assert place.path.startswith(b"/")
    assert place.path.endswith(b"/ns")
    with pytest.raises(FileNotFoundError):
        mountinfo.place_of("/proc/self/nothing")
