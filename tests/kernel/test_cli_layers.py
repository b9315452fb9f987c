"""The verbs that read and write archives: apply, squash, diff --tar, export and import."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

import capabilities
from commandline import Command
from onlap.testing import Tree, assert_same_tree

pytestmark = [pytest.mark.needs("overlay", "mount")]

TIME = 1_600_000_000_123_456_789

BASE = (
    Tree()
    .directory("d", mode=0o1777, mtime_ns=TIME)
    .file("d/changed", b"1", mtime_ns=TIME)
    .file("d/gone", b"1")
    .file("kept", b"kept", mode=0o4755, uid=1000, gid=7, mtime_ns=TIME, xattrs={"user.note": b"\0x"})
    .link("linked", "kept")
    .symlink("sym", "d/gone", mtime_ns=TIME)
    .fifo("fifo", mtime_ns=TIME)
    .directory("replaced")
    .file("replaced/old", b"1")
    .file(b"odd \xff\n", b"odd", mtime_ns=TIME)
)
CHANGE = (
    Tree()
    .write("d/changed", b"22")
    .remove("d/gone")
    .remove("replaced")
    .directory("replaced", mode=0o700)
    .file("replaced/new", b"3" * 400_000)
    .chmod("kept", 0o600)
    .link("d/link", "d/changed")
)


def tree_of(onlap: Command, key: str, target: Path) -> Path:
    """A copy of a snapshot's tree."""
    onlap("export", key, target)
    return target


@pytest.fixture
def onlap(root: Path, tmp_path: Path) -> Command:
    """A root with ``base``, and the active ``work`` on it with changes."""
    directory = tmp_path / "directory"
    directory.mkdir()
    onlap = Command(root / "store", bare=False, directory=directory)  # isal and zstd are there
    onlap("init", "--snapshotter", "overlay")
    source = tmp_path / "source"
    source.mkdir()
    BASE.apply(source)
    onlap("import", source, "base")
    onlap("prepare", "work", "base")
    merged = tmp_path / "merged"
    merged.mkdir()
    onlap("mount", "work", merged)
    CHANGE.apply(merged)
    onlap("umount", merged)
    return onlap


@pytest.fixture
def layer(onlap: Command) -> Path:
    """The change as an archive."""
    path = onlap.directory / "layer.tar"
    onlap("diff", "work", "--tar", path)
    return path


def _names(data: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return set(archive.getnames())


def _content_of(archive: Path) -> int:
    """Where the last content in an archive ends, before its padding."""
    with tarfile.open(archive) as tar:
        return max(member.offset_data + member.size for member in tar if member.isreg())


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


CHANGED = {
    ".",
    "d",
    "d/changed",
    "d/.wh.gone",
    "d/link",
    "kept",
    "replaced",
    "replaced/.wh.old",
    "replaced/new",
}


# diff --tar


def test_diff_writes_a_layer(onlap: Command) -> None:
    said = onlap("diff", "work", "--tar", "layer.tar").splitlines()
    data = (onlap.directory / "layer.tar").read_bytes()
    assert _names(data) == CHANGED
    assert said == ["layer.tar: 9 entries, 404.5 KiB", f"digest   {_sha256(data)}", f"diff ID  {_sha256(data)}"]
    assert os.listdir(onlap.directory) == ["layer.tar"]
    assert onlap.raw("diff", "work", "--tar", "-") == data


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_diff_compresses(onlap: Command, layer: Path, compression: str) -> None:
    plain = layer.read_bytes()
    said = onlap.json("diff", "work", "--tar", "packed", "--compress", compression)[0]
    packed = (onlap.directory / "packed").read_bytes()
    assert said == {
        "file": str(onlap.directory / "packed"),
        "digest": _sha256(packed),
        "diff_id": _sha256(plain),
        "size": len(packed),
        "uncompressed": len(plain),
        "entries": 9,
        "skipped": {},
    }
    if compression == "gzip":
        assert gzip.decompress(packed) == plain
    elif capabilities.find_program("zstd"):
        unpacked = subprocess.run(["zstd", "-dc", onlap.directory / "packed"], capture_output=True, check=True)
        assert unpacked.stdout == plain
    assert onlap.raw("diff", "work", "--tar", "-", "--compress", compression) == packed
    other = onlap.raw("diff", "work", "--tar", "-", "--compress", compression, "--level", "1")
    assert len(other) < len(plain)


def test_diff_between_two_snapshots(onlap: Command, tmp_path: Path) -> None:
    onlap("commit", "top", "work")
    data = onlap.raw("diff", "base", "--base", "top", "--tar", "-")
    onlap("prepare", "back", "top")
    onlap("apply", "back", "-", input=data)
    # Names in a layer that both have are skipped: a hard link between one of them and a changed one becomes two files.
    one, other = tree_of(onlap, "base", tmp_path / "one"), tree_of(onlap, "back", tmp_path / "other")
    assert_same_tree(one, other, ignore={"links"})


def test_source_date_epoch(onlap: Command) -> None:
    early, late = (onlap.raw("diff", "work", "--tar", "-", SOURCE_DATE_EPOCH=text) for text in ("1000", "4000000000"))
    with tarfile.open(fileobj=io.BytesIO(early)) as archive:
        times = {entry.name: entry.mtime for entry in archive}
    assert set(times.values()) == {0, 1000}
    assert {name for name, time in times.items() if time == 0} == {"d/.wh.gone", "replaced/.wh.old"}
    assert late == onlap.raw("diff", "work", "--tar", "-") != early
    assert onlap.raw("export", "work", "-", SOURCE_DATE_EPOCH="1000") != onlap.raw("export", "work", "-")
    for wrong in ("yesterday", "-5", "1e9"):
        said = onlap.fails(6, "diff", "work", "--tar", "x.tar", SOURCE_DATE_EPOCH=wrong)
        assert said == f"SOURCE_DATE_EPOCH is {wrong}; it must be a number of seconds"


def test_a_skipped_socket_is_a_warning(onlap: Command, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    source = tmp_path / "with-socket"
    source.mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{fd}/with-socket/s")
    os.close(fd)
    done = onlap.run("import", source, "s")
    assert done.returncode == 0
    onlap("prepare", "s-work", "s")
    merged = tmp_path / "merged"
    onlap("mount", "s-work", merged)
    with socket.socket(socket.AF_UNIX) as made:
        fd = os.open(merged, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{fd}/t")
        os.close(fd)
    onlap("umount", merged)
    done = onlap.run("diff", "s-work", "--tar", "s.tar")
    assert (done.returncode, done.stderr) == (0, "onlap: warning: not kept: 1 socket\n")


@pytest.mark.parametrize(
    "status,arguments,said",
    [
        (3, ["diff", "nothing", "--tar", "x"], "nothing"),
        (3, ["diff", "work", "--base", "nothing", "--tar", "x"], "nothing"),
        (3, ["export", "nothing", "x.tar"], "nothing"),
        (3, ["diff", "work", "--tar", "no/where/x"], "no/where/x"),
        (6, ["diff", "work", "--tar", "x", "--compress", "zstd", "--level", "99"], "no level 99"),
        (2, ["diff", "work", "--tar", "x", "--compress", "lz4"], "lz4"),
        (2, ["diff", "work", "--tar", "x", "--level", "much"], "much"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_written(onlap: Command, status: int, arguments: list[str], said: str) -> None:
    assert said in onlap.fails(status, *arguments)


def test_a_directory_is_not_overwritten_by_an_archive(onlap: Command) -> None:
    (onlap.directory / "x").mkdir()
    assert "x" in onlap.fails(6, "diff", "work", "--tar", "x")


def test_an_old_file_stays_until_the_new_one_is_complete(onlap: Command, tmp_path: Path) -> None:
    target = onlap.directory / "layer.tar"
    target.write_text("old")
    onlap.fails(3, "diff", "nothing", "--tar", "layer.tar")
    assert target.read_text() == "old"
    (onlap.directory / "link").symlink_to("layer.tar")
    onlap("diff", "work", "--tar", "link")
    assert (onlap.directory / "link").is_symlink()
    assert _names(target.read_bytes()) == CHANGED


def test_a_signal_leaves_no_partial_file(onlap: Command) -> None:
    onlap("prepare", "big")
    with open(onlap.json("info", "big")[0]["layers"][0] + "/zeros", "wb") as file:
        file.truncate(1 << 40)  # takes minutes to write
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            onlap.line("diff", "big", "--tar", "big.tar"), cwd=onlap.directory, env=onlap.environment()
        ) as child:
            while sum(partial.stat().st_size for partial in onlap.directory.glob(".onlap-*.partial")) < 10_000_000:
                assert child.poll() is None
            child.send_signal(number)
            assert child.wait(30) == 128 + number
        assert os.listdir(onlap.directory) == []


def test_pipes_and_devices_are_written_to(onlap: Command, layer: Path) -> None:
    """A pipe, as from a shell's process substitution, and a device: neither is replaced."""
    expected = layer.read_bytes()
    os.mkfifo(onlap.directory / "pipe")
    with (onlap.directory / "copy").open("wb") as copy:
        reader = subprocess.Popen(["cat", onlap.directory / "pipe"], stdout=copy)
        onlap("diff", "work", "--tar", "pipe")
        assert reader.wait(30) == 0
    assert (onlap.directory / "copy").read_bytes() == expected
    assert (onlap.directory / "pipe").is_fifo()
    null = onlap.directory / "null"
    os.mknod(null, 0o020666, os.makedev(1, 3))
    onlap("diff", "work", "--tar", "null")
    assert null.is_char_device()


def test_a_reader_that_leaves_is_not_an_error(onlap: Command) -> None:
    with subprocess.Popen(
        onlap.line("export", "work", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=onlap.environment()
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1000)
        child.stdout.close()
        assert child.wait(30) == 128 + signal.SIGPIPE
        assert child.stderr.read() == b""


def test_a_full_disk(onlap: Command) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("there is no /dev/full")
    said = onlap.fails(8, "diff", "work", "--tar", "/dev/full")
    assert "No space left" in said


# apply


def test_apply_gives_the_tree_back(onlap: Command, layer: Path, tmp_path: Path) -> None:
    onlap("prepare", "again", "base")
    digest = _sha256(layer.read_bytes())
    said = onlap("apply", "again", "layer.tar", "--digest", digest, "--diff-id", digest).splitlines()
    assert said == ["again: 9 entries, 404.5 KiB", f"digest   {digest}", f"diff ID  {digest}"]
    assert_same_tree(tree_of(onlap, "work", tmp_path / "one"), tree_of(onlap, "again", tmp_path / "other"))
    assert onlap("diff", "again") == onlap("diff", "work")
    assert onlap.raw("diff", "again", "--tar", "-") == layer.read_bytes()


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_apply_from_standard_input(onlap: Command, compression: str, tmp_path: Path) -> None:
    data = onlap.raw("diff", "work", "--tar", "-", "--compress", compression)
    onlap("prepare", "again", "base")
    said = onlap.json("apply", "again", "-", input=data)[0]
    assert (said["key"], said["digest"], said["size"], said["entries"]) == ("again", _sha256(data), len(data), 9)
    assert_same_tree(tree_of(onlap, "work", tmp_path / "one"), tree_of(onlap, "again", tmp_path / "other"))


def test_apply_refuses_and_leaves_the_snapshot_as_it_was(onlap: Command, layer: Path, tmp_path: Path) -> None:
    onlap("prepare", "again", "base")
    data = layer.read_bytes()
    wrong = "sha256:" + "0" * 64
    assert f"is {_sha256(data)}, not {wrong}" in onlap.fails(11, "apply", "again", "layer.tar", "--digest", wrong)
    assert "not a sha256 digest: what" in onlap.fails(6, "apply", "again", "layer.tar", "--diff-id", "what")
    assert "ends" in onlap.fails(11, "apply", "again", "-", input=data[:100_000])
    assert "not a tar archive" in onlap.fails(6, "apply", "again", "-", input=b"x" * 1024)
    assert "no/file" in onlap.fails(3, "apply", "again", "no/file")
    assert "more than 3 entries" in onlap.fails(8, "apply", "again", "layer.tar", "--max-entries", "3")
    assert "more than 1000 bytes" in onlap.fails(8, "apply", "again", "layer.tar", "--max-bytes", "1000")
    assert "nothing" in onlap.fails(3, "apply", "nothing", "layer.tar")
    assert "is committed" in onlap.fails(5, "apply", "base", "layer.tar")
    assert onlap("diff", "again") == ""
    merged = tmp_path / "merged"
    onlap("mount", "again", merged)
    assert "mounted" in onlap.fails(5, "apply", "again", "layer.tar")
    onlap("umount", merged)
    onlap("apply", "again", "layer.tar")


def test_an_attack_is_named(onlap: Command) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../escape"))
    onlap("prepare", "again", "base")
    assert "../escape" in onlap.fails(6, "apply", "again", "-", input=out.getvalue())
    assert onlap("diff", "again") == ""


# squash


def test_squash(onlap: Command, tmp_path: Path) -> None:
    onlap("commit", "one", "work")
    onlap("prepare", "next", "one")
    merged = tmp_path / "merged"
    onlap("mount", "next", merged)
    Tree().remove("replaced").file("d/gone", b"again").remove("sym").apply(merged)
    onlap("umount", merged)
    onlap("squash", "next", "flat")
    said = onlap.json("squash", "next", "upper", "--base", "base")[0]
    assert (said["name"], said["parent"], said["kind"]) == ("upper", "base", "committed")
    trees = [tree_of(onlap, key, tmp_path / key) for key in ("next", "flat", "upper")]
    assert_same_tree(trees[0], trees[1])
    assert_same_tree(trees[0], trees[2])
    assert onlap("diff", "upper", "--base", "next") == ""
    assert "flat is not based on base" in onlap.fails(6, "squash", "flat", "new", "--base", "base")
    assert "flat" in onlap.fails(4, "squash", "next", "flat")
    assert "nothing" in onlap.fails(3, "squash", "nothing", "new")


# export and import


def test_export_and_import_of_an_archive(onlap: Command, tmp_path: Path) -> None:
    onlap("export", "work", "all.tar")
    names = _names((onlap.directory / "all.tar").read_bytes())
    assert not [name for name in names if ".wh." in name]
    said = onlap("import", "all.tar", "imported")
    assert said.startswith(f"imported: {len(names)} entries, ")
    onlap("import", "-", "from-stdin", input=onlap.raw("export", "work", "-", "--compress", "gzip"))
    one = tree_of(onlap, "work", tmp_path / "one")
    for key in ("imported", "from-stdin"):
        assert_same_tree(one, tree_of(onlap, key, tmp_path / key))


def test_import_over_a_parent(onlap: Command, layer: Path, tmp_path: Path) -> None:
    onlap("import", layer, "over", "--parent", "base")
    assert_same_tree(tree_of(onlap, "work", tmp_path / "one"), tree_of(onlap, "over", tmp_path / "other"))


def test_import_refuses(onlap: Command, layer: Path) -> None:
    assert "base" in onlap.fails(4, "import", "layer.tar", "base")
    cut = _content_of(layer)  # an archive that ends after an entry is taken, as Go's reader takes it
    assert "ends" in onlap.fails(11, "import", "-", "new", input=layer.read_bytes()[: cut - 1])
    assert "nothing can be excluded from an archive" in onlap.fails(6, "import", "layer.tar", "new", "--exclude", "x")
    assert "not a tar archive" in onlap.fails(6, "import", "-", "new", input=b"no archive" * 100)
    names = {json.loads(line)["name"] for line in onlap("--json", "ls").splitlines()}
    assert names == {"base", "work"}


def test_round_trips_through_gnu_tar(onlap: Command, tmp_path: Path) -> None:
    """tar unpacks an exported tree, and what tar packs is imported."""
    unpacked, packed = tmp_path / "unpacked", tmp_path / "packed.tar"
    unpacked.mkdir()
    tar = ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-permissions"]
    data = onlap.raw("export", "work", "-", "--compress", "zstd")
    subprocess.run([*tar, "--zstd", "-xf", "-", "-C", unpacked], input=data, check=True)
    one = tree_of(onlap, "work", tmp_path / "one")
    assert_same_tree(one, unpacked)
    # The GNU format has whole seconds and no xattrs.
    dialects = {"pax": tar, "gnu": ["tar", "--numeric-owner", "--format=gnu"]}
    for dialect, command in dialects.items():
        subprocess.run([*command, "-cf", packed, "-C", unpacked, "."], check=True)
        onlap("import", packed, dialect)
        found = tree_of(onlap, dialect, tmp_path / dialect)
        assert_same_tree(one, found, ignore=() if dialect == "pax" else ("times", "xattrs"))
