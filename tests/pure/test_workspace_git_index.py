"""Refreshing git's index: of real ones, and of what is none."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gits import git, repository
from onlap.workspaces.capture.git_index import Copy, Stats, refreshed, without_stats

pytestmark = pytest.mark.needs("peer:git")

COPY = Copy(inode=(1 << 40) + 77, ctime_ns=1_700_000_000_000_000_001, uid=12, gid=34)
LATER = 1 << 62


def stats(path: Path) -> Stats:
    status = os.lstat(path)
    return Stats(status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def refresh(at: Path, data: bytes, mtime_ns: int = LATER) -> bytes | None:
    def look(path: bytes):  # type: ignore[no-untyped-def]
        where = at / os.fsdecode(path)
        return (stats(where), lambda: COPY) if os.path.lexists(where) else None

    return refreshed(data, mtime_ns, look)


def listed(at: Path) -> list[tuple[str, dict[str, str]]]:
    """What git itself reads in an index."""
    found: list[tuple[str, dict[str, str]]] = []
    for record in git(at, "ls-files", "--debug", "-z").split("\0"):
        lines = record.split("\n")
        fields = dict(
            word.strip().split(": ") for line in lines[:6] for word in line.strip().split("\t") if ": " in word
        )
        if found:
            found[-1][1].update(fields)
        found.append(("\n".join(lines[5:]) if found else record, {}))
    return found[:-1]


KINDS: dict[str, dict[str, str]] = {
    "version 2": {},
    "version 4": {"index.version": "4"},
    "many files": {"feature.manyFiles": "true"},  # version 4, no digest
    "no digest": {"index.skipHash": "true"},
    "threads": {"index.version": "4", "index.threads": "2"},
}


@pytest.mark.parametrize("sha256", [False, True], ids=["sha1", "sha256"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_git_reads_the_stats_of_the_copies(tmp_path: Path, settings: dict[str, str], sha256: bool) -> None:
    at = repository(tmp_path / "r", settings, sha256=sha256)
    index = at / ".git/index"
    data = index.read_bytes()
    before = listed(at)
    new = refresh(at, data)
    assert new is not None
    assert len(new) == len(data)
    assert without_stats(new) == without_stats(data)
    index.write_bytes(new)
    after = listed(at)
    assert [path for path, _ in after] == [path for path, _ in before]
    assert len(after) == 10
    for (_, old), (_, now) in zip(before, after, strict=True):
        assert now == {**old, "ctime": "1700000000:1", "ino": "77", "uid": "12", "gid": "34"}
    git(at, "fsck", "--strict")


def test_extended_flags_are_version_3(tmp_path: Path) -> None:
    at = repository(tmp_path / "r")
    (at / "new").write_text("new")
    git(at, "add", "--intent-to-add", "new")
    git(at, "update-index", "--skip-worktree", "d/h")
    data = (at / ".git/index").read_bytes()
    assert data[7] == 3
    new = refresh(at, data)
    assert new is not None
    (at / ".git/index").write_bytes(new)
    assert sum(fields["ino"] == "77" for _, fields in listed(at)) == 10


def test_only_what_git_takes_for_unchanged(tmp_path: Path) -> None:
    at = repository(tmp_path / "r")
    data = (at / ".git/index").read_bytes()
    (at / "a").write_text("changed")
    os.utime(at / "d/h")
    (at / "run").unlink()
    new = refresh(at, data)
    assert new is not None
    (at / ".git/index").write_bytes(new)
    assert [path for path, fields in listed(at) if fields["ino"] != "77"] == ["a", "d/h", "run"]


def test_racy_entries_stay(tmp_path: Path) -> None:
    at = repository(tmp_path / "r")
    data = (at / ".git/index").read_bytes()
    assert refresh(at, data, os.stat(at / "a").st_mtime_ns) is None
    assert refresh(at, data, os.stat(at / "a").st_mtime_ns + 1) is not None


def test_a_split_index_stays(tmp_path: Path) -> None:
    at = repository(tmp_path / "r")
    git(at, "update-index", "--split-index")
    assert refresh(at, (at / ".git/index").read_bytes()) is None


def test_a_wrong_digest(tmp_path: Path) -> None:
    at = repository(tmp_path / "r")
    data = (at / ".git/index").read_bytes()
    assert refresh(at, data[:-1] + bytes([data[-1] ^ 1])) is None


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    top = tmp_path_factory.mktemp("indexes")
    kinds: list[dict[str, str]] = [{}, {"index.version": "4"}, {"index.skipHash": "true"}]
    return [(repository(top / str(number), kind) / ".git/index").read_bytes() for number, kind in enumerate(kinds)]


@given(
    kind=st.integers(0, 2),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=4),
    cut=st.floats(0, 1) | st.none(),
    digest=st.booleans(),
)
def test_nothing_is_raised_by_what_is_none(
    indexes: list[bytes], kind: int, edits: list[tuple[float, bytes]], cut: float | None, digest: bool
) -> None:
    data = bytearray(indexes[kind][:-20])
    for where, new in edits:
        at = int(where * len(data))
        data[at : at + len(new)] = new
    if cut is not None:
        del data[int(cut * len(data)) :]
    whole = bytes(data) + (hashlib.sha1(data).digest() if digest else bytes(20))

    def look(path: bytes):  # type: ignore[no-untyped-def]
        return Stats(0o100644, 1, 2, 3, 4), lambda: COPY

    new_index = refreshed(whole, LATER, look)
    assert new_index is None or len(new_index) == len(whole)


@given(st.binary(max_size=300))
def test_nothing_is_raised_by_any_bytes(data: bytes) -> None:
    refreshed(data, LATER, lambda _path: None)
    refreshed(b"DIRC" + data, LATER, lambda _path: None)
    assert without_stats(data) == data
