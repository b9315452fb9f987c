"""Manifests: what a tree holds, written and read again, and where a tree is not what its manifest says."""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from onlap import errors
from onlap.trees import manifest
from onlap.trees.manifest import Deviation, Entry
from onlap.trees.walk import opened

# Bytes that mtree(5) gives a meaning to, that are not UTF-8, or that a terminal would take.
NAMES = [b"plain", b"a b", b"a\\040b", b"new\nline", b"#mtree", b"=", b"\xff\xfe", b"*?[", b"\x1b[31m", b"x" * 255]


def listed(tree: Path) -> list[Entry]:
    with opened(os.fspath(tree)) as top:
        return list(manifest.entries(top))


def deviations(expected: list[Entry], tree: Path) -> dict[str, set[str] | str]:
    with opened(os.fspath(tree)) as top:
        return {each.path: _said(each) for each in manifest.deviations(expected, top)}


def _said(each: Deviation) -> set[str] | str:
    if each.what:
        return set(each.what)
    return "extra" if each.expected is None else "missing"


def written(entries: list[Entry]) -> tuple[bytes, str]:
    out = io.BytesIO()
    digest = manifest.write(entries, out)
    return out.getvalue(), digest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    for number, name in enumerate(NAMES):
        (top / os.fsdecode(name)).write_bytes(name * number)
    (top / "d" / "e").mkdir(parents=True)
    (top / "d" / "f").write_text("content")
    (top / "d.x").write_text("sorts between d and d/")
    os.link(top / "d" / "f", top / "one more")
    os.link(top / "d" / "f", top / "d" / "e" / "another")
    (top / "link").symlink_to(os.fsdecode(b"\xff to\nhere"))
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(top)  # the address of a socket is short
        server.bind("socket")
        os.chdir(here)
    os.setxattr(top / "plain", "user.x\n=", b"\0\xff value")
    os.utime(top / "d", ns=(1, -1_500_000_000))
    return top


def test_what_is_written_is_read(tree: Path) -> None:
    entries = listed(tree)
    data, digest = written(entries)
    assert manifest.read(io.BytesIO(data), digest) == entries
    assert written(entries) == (data, digest)
    assert deviations(entries, tree) == {}
    assert [entry.path for entry in entries][:3] == [".", "\x1b[31m", "#mtree"]


@pytest.mark.needs("peer:bsdtar")
def test_the_attributes_of_a_file_are_as_long_as_they_may_be() -> None:
    """Xfs limits their names to 64 KiB in all, and each value to 64 KiB."""
    entry = Entry("f", stat.S_IFREG | 0o644, 0, 0, 0, xattrs={f"user.{n}": bytes(1 << 16) for n in range(300)})
    out = io.BytesIO()
    digest = manifest.write([entry], out)
    assert manifest.read(io.BytesIO(out.getvalue()), digest) == [entry]


def test_bsdtar_reads_it(tree: Path, tmp_path: Path) -> None:
    # libarchive knows neither xattrs nor sockets there, and says so.
    os.removexattr(tree / "plain", "user.x\n=")
    (tree / "socket").unlink()
    data, _ = written(listed(tree))
    (tmp_path / "manifest.gz").write_bytes(data)
    told = subprocess.run(["bsdtar", "-tf", tmp_path / "manifest.gz"], capture_output=True, check=False, cwd=tmp_path)
    assert (told.returncode, told.stderr) == (0, b"")
    assert len(told.stdout.splitlines()) == len(listed(tree))


EDITS: dict[str, tuple[Callable[[Path], object], dict[str, set[str] | str]]] = {
    "content": (lambda top: _edit(top / "d.x", "SORTS between d and d/"), {"d.x": {"content"}}),
    "size": (lambda top: _edit(top / "d.x", "short"), {"d.x": {"size"}}),
    "zero": (lambda top: _edit(top / "d.x", ""), {"d.x": {"size"}}),
    "mode": (lambda top: (top / "d.x").chmod(0o4711), {"d.x": {"mode"}}),
    "mtime": (lambda top: os.utime(top / "d.x", ns=(0, 0)), {"d.x": {"mtime"}}),
    "xattr": (lambda top: os.removexattr(top / "plain", "user.x\n="), {"plain": {"xattrs"}}),
    "missing": (lambda top: (top / "d.x").unlink(), {"d.x": "missing"}),
    "missing directory": (
        lambda top: shutil.rmtree(top / "d" / "e"),
        {"d/e": "missing", "d/e/another": "missing"},
    ),
    "extra": (lambda top: (top / "d" / "e" / "new").touch(), {"d/e/new": "extra"}),
    "target": (lambda top: _point(top / "link", "elsewhere"), {"link": {"target"}}),
    "type": (lambda top: _point(top / "plain", "elsewhere"), {"plain": {"type"}}),
    "a link that is lost": (lambda top: _copy(top / "one more"), {"one more": {"links"}}),
    "a link that is new": (
        lambda top: _link(top / "d.x", top / "plain"),
        {"plain": {"size", "links", "xattrs", "mtime"}},
    ),
    "a link outside of the tree": (lambda top: os.link(top / "plain", top.parent / "outside"), {}),
}


def _edit(path: Path, text: str) -> None:
    status = path.stat()
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _point(path: Path, target: str) -> None:
    status = path.lstat()
    path.unlink()
    path.symlink_to(target)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _copy(path: Path) -> None:
    other = path.with_name("copied")
    shutil.copy2(path, other)
    other.rename(path)


def _link(source: Path, path: Path) -> None:
    path.unlink()
    os.link(source, path)


@pytest.mark.parametrize("name", EDITS)
def test_what_deviates(tree: Path, name: str) -> None:
    edit, expected = EDITS[name]
    entries = listed(tree)
    edit(tree)
    found = deviations(entries, tree)
    # The directories that hold it were written to.
    directories = {entry.path for entry in entries if stat.S_ISDIR(entry.mode)}
    assert {path: what for path, what in found.items() if path not in directories or what != {"mtime"}} == expected


def test_two_files_that_became_one(tmp_path: Path) -> None:
    """Each of them still has two names."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "ab":
        (tree / name).write_text("same")
        os.link(tree / name, tree / f"{name}2")
        os.utime(tree / name, ns=(0, 0))
    entries = listed(tree)
    for name in ("b", "b2"):
        (tree / name).unlink()
        os.link(tree / "a", tree / name)
    os.utime(tree, ns=(0, entries[0].mtime_ns))
    assert deviations(entries, tree) == {"b": {"links"}, "b2": {"links"}}


def test_damage_is_found(tree: Path) -> None:
    data, digest = written(listed(tree))
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        try:
            # Some bits of a header of gzip say nothing, such as its operating system.
            assert manifest.read(io.BytesIO(damaged), digest) == listed(tree)
        except errors.DataLoss:
            continue
        assert position < 10
    for size in (0, 5, len(data) // 2, len(data) - 1):
        with pytest.raises(errors.DataLoss):
            manifest.read(io.BytesIO(data[:size]), digest)
