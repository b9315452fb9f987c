"""Archives that peers write, applied by us, and ours, applied by peers: GNU tar, bsdtar, umoci and containerd."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from kernel.layer_oracle import TRUSTED, apply_to
from onlap import errors
from onlap.layers.diff.write import Encoding, write_layer
from onlap.layers.stream.compression import Compression
from onlap.testing import Tree, assert_same_tree, differences
from peers import gobuild
from pure.tar_makers import END, header, pax

containerd = pytest.mark.needs("mount", "gopkg:github.com/containerd/containerd")
umoci = pytest.mark.needs("mount", "peer:umoci")

SECOND = 10**9
TIME = 1_600_000_000 * SECOND

# linux/capability.h: struct vfs_cap_data, version 2 with the effective bit; CAP_NET_BIND_SERVICE
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)

LONG = "long-" * 24

BASE = (
    Tree()
    .directory("d", mode=0o1777, mtime_ns=TIME + 1)
    .file("d/changed", b"1", mtime_ns=TIME + 2)
    .file("d/same-size", b"1", mtime_ns=TIME + 3)
    .file("d/gone", b"1")
    .file("suid", b"kept", mode=0o4755, uid=1000, gid=7, mtime_ns=TIME + 123_456_789)
    .file("capable", b"x", mode=0o755, mtime_ns=TIME, xattrs={"security.capability": CAPABILITY})
    .link("linked", "suid")
    .symlink("sym", "d/gone", uid=5, gid=6, mtime_ns=TIME + 4)
    .fifo("fifo", mode=0o600, mtime_ns=TIME)
    .device("null", 1, 3, mode=0o666, mtime_ns=TIME)
    .device("block", 240, 300, block=True, mtime_ns=TIME)
    .directory("again", mode=0o700, uid=9)
    .file("again/old", b"1")
    .directory("again/below")
    .file("again/below/f", b"1")
    .directory("removed")
    .file("removed/f", b"1")
    .file("to-directory")
    .directory("to-file")
    .file("to-file/f")
    .directory(LONG)
    .file(f"{LONG}/{LONG}", b"long", mtime_ns=TIME)
    .symlink("long", "x" * 200, mtime_ns=TIME)
    .file("héllo wörld", b"utf-8", mtime_ns=TIME)
    .file("empty", mtime_ns=TIME)
    .file("big", bytes(range(256)) * 5000, mtime_ns=TIME)
)
CHANGE = (
    Tree()
    .write("d/changed", b"22")
    .remove("d/gone")
    .chmod("suid", 0o600)
    .remove("again")
    .directory("again", mode=0o750, mtime_ns=TIME + 5)
    .file("again/new", b"3", mtime_ns=TIME)
    .directory("again/below", mtime_ns=TIME)
    .file("again/below/g", b"3", mtime_ns=TIME)
    .remove("removed")
    .remove("to-directory")
    .directory("to-directory")
    .file("to-directory/f", b"4")
    .remove("to-file")
    .file("to-file", b"4")
    .remove("sym")
    .directory("sym", mtime_ns=TIME)
    .file("sym/f", b"5", mtime_ns=TIME)
    .rename("héllo wörld", "hallo welt")
    .link("d/link", "d/changed")
    .append("big", b"more")
)


class Place:
    """Two trees, before and after the change, and room for more."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = self.empty("base")
        BASE.apply(self.base)
        self.changed = self.copy(self.base, "changed")
        CHANGE.apply(self.changed)

    def empty(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir()
        path.chmod(0o755)
        return path

    def copy(self, tree: Path, name: str) -> Path:
        target = self.directory / name
        _run("cp", "-a", tree, target)
        return target

    def ours(self, name: str, before: Sequence[Path], after: Sequence[Path], compression: Compression = "none") -> Path:
        """Our archive of a difference."""
        path = self.directory / name
        with path.open("wb", buffering=0) as out:
            write_layer([*map(str, before)], [*map(str, after)], TRUSTED, out, Encoding(compression))
        return path

    def applied(self, name: str, archives: Sequence[Path], onto: Path | None = None) -> Path:
        """What we make of archives, one upon the other."""
        target = self.empty(name) if onto is None else self.copy(onto, name)
        for archive in archives:
            apply_to(target, archive.read_bytes(), markers=None)
        return target


def _run(*command: str | Path, cwd: Path | None = None) -> bytes:
    done = subprocess.run(command, capture_output=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


@pytest.fixture
def here(root: Path) -> Place:
    return Place(root)


# tar(1)

GNU = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "--same-permissions", "--same-owner")


@pytest.mark.needs("mount", "peer:tar")
@pytest.mark.parametrize(
    "options",
    [
        ["--format=pax"],
        ["--format=pax", "--pax-option=delete=atime,delete=ctime"],
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=pax", "--sparse", "--sparse-version=0.0"],
        ["--format=pax", "--sparse", "--sparse-version=0.1"],
        ["--format=pax", "--sparse", "--sparse-version=1.0"],
        ["--format=gnu", "--sparse"],
        ["--format=gnu", "--gzip"],
        ["--format=pax", "--bzip2"],
        ["--format=pax", "--xz"],
        ["--format=gnu", "--blocking-factor=200"],
    ],
    ids=" ".join,
)
def test_gnu_tar(here: Place, options: list[str]) -> None:
    with open(here.base / "holes", "wb") as file:
        file.truncate(10_000_000)
        for offset in (1_000_000, 5_000_000):
            file.seek(offset)
            file.write(b"data")
    archive, extracted = here.directory / "a.tar", here.empty("extracted")
    # Its own formats hold no xattrs.
    plain = [word for word in GNU if "xattrs" not in word and word != "--acls"]
    _run(*(GNU if "--format=pax" in options else plain), *options, "-cf", archive, "-C", here.base, ".")
    _run(*GNU, "-xf", archive, "-C", extracted)
    ours = here.applied("ours", [archive])
    assert_same_tree(extracted, ours)
    if "--sparse" in options:
        assert os.stat(ours / "holes").st_blocks < 1000


@pytest.mark.needs("mount", "peer:bsdtar")
@pytest.mark.parametrize("options", [["--format=pax"], ["--format=gnutar"], ["--format=pax", "--zstd"]], ids=" ".join)
def test_bsdtar(here: Place, options: list[str]) -> None:
    if options != ["--format=gnutar"]:
        os.setxattr(here.base / "suid", "user.note", b"\0x=")
    archive, extracted = here.directory / "a.tar", here.empty("extracted")
    _run("bsdtar", *options, "--numeric-owner", "-cf", archive, "-C", here.base, ".")
    _run("bsdtar", "--numeric-owner", "-xpf", archive, "-C", extracted)
    # It leaves the top directory the time of its last entry.
    _same_below(extracted, here.applied("ours", [archive]))


@pytest.mark.needs("mount", "peer:tar", "peer:bsdtar")
@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_both_read_ours(here: Place, program: str) -> None:
    os.setxattr(here.base / "suid", "user.note", b"\0x=")
    archive, extracted = here.ours("ours.tar", [], [here.base]), here.empty("extracted")
    _run(*(GNU if program == "tar" else ("bsdtar", "--numeric-owner", "-p")), "-xf", archive, "-C", extracted)
    _same_below(here.base, extracted)


# containerd


@pytest.fixture(scope="session")
def peer() -> Path:
    return gobuild.build(Path(__file__).parent / "go" / "layers")


@containerd
def test_containerd_applies_ours(here: Place, peer: Path) -> None:
    for compression in ("none", "gzip", "zstd"):
        base = here.ours(f"base.{compression}", [], [here.base], compression)
        change = here.ours(f"change.{compression}", [here.base], [here.changed], compression)
        tree = here.empty(f"theirs-{compression}")
        _run(peer, "apply", tree, base)
        # The entry of the top is ignored (archive/tar.go, applyNaive): its attributes are lost.
        _same_below(here.base, tree)
        _run(peer, "apply", tree, change)
        _same_below(here.changed, tree)


@containerd
def test_containerd_applies_ours_to_an_upper(here: Place, peer: Path) -> None:
    """The same through the differ, straight into an overlay's upperdir; our opaque directories are whiteouts there."""
    apply = gobuild.build(Path(__file__).parent / "go" / "apply")
    upper, work = here.empty("upper"), here.empty("work")
    change = here.ours("change.tar.gz", [here.base], [here.changed], "gzip")
    options = [f"lowerdir={here.base}", f"upperdir={upper}", f"workdir={work}"]
    plan = json.dumps([{"type": "overlay", "source": "overlay", "options": options}]).encode()
    subprocess.run([apply, change], input=plan, check=True, capture_output=True)
    ours = here.empty("ours")
    apply_to(ours, change.read_bytes(), [here.base])
    lines = differences(upper, ours, ignore={"times"})
    # containerd leaves out the top, and what a directory holds that no layer below has needs no whiteout.
    assert [line for line in lines if not line.startswith("b'.'")] == []


@containerd
def test_we_apply_containerds(here: Place, peer: Path) -> None:
    archives = []
    for name, before, after in (("base", here.empty("nothing"), here.base), ("change", here.base, here.changed)):
        path = here.directory / f"{name}.tar"
        path.write_bytes(_run(peer, "diff", before, after))
        archives.append(path)
    tree = here.empty("theirs")
    for archive in archives:
        _run(peer, "apply", tree, archive)
    ours = here.applied("ours", archives)
    _same_below(tree, ours)
    # Its own loss: fractions of a second.
    assert {line.split(": ")[1].split()[0] for line in _below(here.changed, ours)} == {"times"}


_HIDDEN = header(b"hidden", mode=b"0004755\0") + END

DOUBTFUL = {
    "a file whose name ends in a slash": header(b"f/", size=len(_HIDDEN), mtime=b"00000000001\0") + _HIDDEN,
    "global records": pax(("path", b"p"), ("uid", b"7"), ("SCHILY.xattr.user.a", b"b"), flag=b"g") + header(b"f"),
    "records before a global header": pax(("path", b"p")) + pax(("uid", b"7"), flag=b"g") + header(b"f"),
    "a device of v7": header(b"null", flag=b"4", magic=bytes(8), devices=b"0000001\0" * 2),
    "another version of ustar": header(b"f", magic=b"ustar\000xx", prefix=b"d"),
    "no end": header(b"f"),
    "no padding": header(b"f", size=3) + b"abc",
}


@containerd
@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubtful_layers_are_applied_as_containerd_applies_them(here: Place, peer: Path, name: str) -> None:
    data = DOUBTFUL[name]
    layer = here.directory / "layer.tar"
    layer.write_bytes(data)
    theirs, ours = here.empty("theirs"), here.empty("ours")
    _run(peer, "apply", theirs, layer)
    apply_to(ours, data, markers=None, digest=f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert os.listdir(ours)
    for tree in (theirs, ours):
        for path in tree.rglob("*"):
            if path.is_dir():  # that no entry named
                os.utime(path, (1, 1))
    _same_below(theirs, ours)


def _below(one: Path, other: Path) -> list[str]:
    return [line for line in differences(one, other) if not line.startswith("b'.': ")]


def _same_below(one: Path, other: Path) -> None:
    assert _below(one, other) == []


@containerd
def test_containerd_loses_what_we_keep(here: Place, peer: Path) -> None:
    """User xattrs, fractions of seconds, and an edit that put size and time back."""
    os.setxattr(here.changed / "capable", "user.note", b"x")
    before = os.stat(here.changed / "d/same-size")
    (here.changed / "d/same-size").write_bytes(b"2")
    os.utime(here.changed / "d/same-size", ns=(before.st_atime_ns, before.st_mtime_ns))
    theirs = _archive(_run(peer, "diff", here.base, here.changed))
    out = io.BytesIO()
    write_layer([str(here.base)], [str(here.changed)], TRUSTED, out, Encoding(content=True))
    ours = _archive(out.getvalue())
    assert "d/same-size" in ours
    assert "d/same-size" not in theirs
    assert "SCHILY.xattr.user.note" in ours["capable"].pax_headers
    assert "SCHILY.xattr.user.note" not in theirs.get("capable", tarfile.TarInfo()).pax_headers
    assert {name for name in ours if ".wh." in name} == {name for name in theirs if ".wh." in name}
    assert set(theirs) - set(ours) == set(), "else the same entries"


def _archive(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {entry.name.strip("/"): entry for entry in archive}


@containerd
@pytest.mark.needs("peer:tar")
def test_containerd_refuses_the_old_sparse_format(here: Place, peer: Path) -> None:
    with open(here.base / "holes", "wb") as file:
        file.truncate(10_000_000)
        file.write(b"data")
    archive, tree = here.directory / "sparse.tar", here.empty("theirs")
    _run("tar", "--format=gnu", "--sparse", "-cf", archive, "-C", here.base, "holes")
    done = subprocess.run([peer, "apply", tree, archive], capture_output=True, text=True, check=False)
    assert "unhandled tar header type 83" in done.stderr
    assert (here.applied("ours", [archive]) / "holes").stat().st_size == 10_000_000


@containerd
def test_a_link_out_of_the_tree_is_refused_by_both(here: Place, peer: Path) -> None:
    archive = here.directory / "bad.tar"
    with tarfile.open(archive, "w") as out:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.LNKTYPE, "../../../etc/passwd"
        out.addfile(link)
    with pytest.raises(errors.InvalidArgument):
        here.applied("ours", [archive])
    done = subprocess.run([peer, "apply", here.empty("theirs"), archive], capture_output=True, check=False)
    assert done.returncode == 1


# Holes


def _with_holes(here: Place) -> tuple[Path, Path]:
    """A tree with a file of 16 MiB that has data at both ends, and its archive without the hole."""
    tree = here.empty("with-holes")
    (tree / "d").mkdir()
    with (tree / "d" / "fïle").open("wb") as file:
        file.write(b"begin")
        file.seek((16 << 20) - 3)
        file.write(b"end")
    archive = here.directory / "sparse.tar"
    with archive.open("wb", buffering=0) as out:
        write_layer([], [str(tree)], TRUSTED, out, Encoding(sparse=True))
    assert archive.stat().st_size < 1 << 20
    return tree, archive


@containerd
def test_containerd_reads_what_has_no_holes(here: Place, peer: Path) -> None:
    tree, archive = _with_holes(here)
    _run(peer, "apply", here.empty("theirs"), archive)
    _same_below(tree, here.directory / "theirs")


@umoci
def test_umoci_reads_what_has_no_holes(here: Place) -> None:
    tree, archive = _with_holes(here)
    image = _umoci_image(here)
    _run("umoci", "raw", "add-layer", "--image", f"{image}:base", archive)
    _run("umoci", "raw", "unpack", "--image", f"{image}:base", here.directory / "rootfs")
    assert_same_tree(tree, here.directory / "rootfs")


@pytest.mark.needs("mount")
@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=pytest.mark.needs(f"peer:{name}")) for name in ("tar", "bsdtar")]
)
def test_programs_make_holes_again(here: Place, program: str) -> None:
    tree, archive = _with_holes(here)
    theirs = here.empty("theirs")
    _run(program, "-xpf", archive, "-C", theirs)
    _same_below(tree, theirs)  # bsdtar gives the top another time
    assert (theirs / "d" / "fïle").stat().st_blocks * 512 < 1 << 20


# umoci


def _umoci_layers(image: Path, tag: str) -> list[Path]:
    index = json.loads((image / "index.json").read_text())
    name = "org.opencontainers.image.ref.name"
    (found,) = [each for each in index["manifests"] if each["annotations"][name] == tag]
    manifest = json.loads(_blob(image, found["digest"]).read_text())
    return [_blob(image, layer["digest"]) for layer in manifest["layers"]]


def _blob(image: Path, digest: str) -> Path:
    return image / "blobs" / Path(*digest.split(":"))


def _umoci_image(here: Place) -> Path:
    image = here.directory / "image"
    _run("umoci", "init", "--layout", image)
    _run("umoci", "new", "--image", f"{image}:base")
    return image


@umoci
def test_umoci_unpacks_ours(here: Place) -> None:
    os.setxattr(here.base / "suid", "user.note", b"\0x=")
    os.setxattr(here.changed / "suid", "user.note", b"\0x=")
    image = _umoci_image(here)
    for before, after in (([], here.base), ([here.base], here.changed)):
        archive = here.ours("layer.tar", before, [after])
        _run("umoci", "raw", "add-layer", "--image", f"{image}:base", archive)
    rootfs = here.directory / "rootfs"
    _run("umoci", "raw", "unpack", "--image", f"{image}:base", rootfs)
    assert_same_tree(here.changed, rootfs)


@umoci
def test_we_unpack_umocis(here: Place) -> None:
    image = _umoci_image(here)
    _run("umoci", "raw", "add-layer", "--image", f"{image}:base", here.ours("base.tar", [], [here.base]))
    bundle = here.directory / "bundle"
    _run("umoci", "unpack", "--image", f"{image}:base", bundle)
    CHANGE.apply(bundle / "rootfs")
    _run("umoci", "repack", "--image", f"{image}:changed", bundle)
    rootfs = here.directory / "rootfs"
    _run("umoci", "raw", "unpack", "--image", f"{image}:changed", rootfs)
    ours = here.applied("ours", _umoci_layers(image, "changed"))
    assert_same_tree(rootfs, ours)
    shutil.rmtree(bundle)


@umoci
def test_what_umoci_inserts(here: Place) -> None:
    """Its writer is not closed: the layer ends where the file does, without padding and without an end marker."""
    image = _umoci_image(here)
    (here.directory / "file").write_bytes(b"abc")
    _run("umoci", "insert", "--image", f"{image}:base", here.directory / "file", "/file")
    [layer] = _umoci_layers(image, "base")
    assert len(gzip.decompress(layer.read_bytes())) % 512 == 3
    ours = here.applied("ours", [layer])
    assert (ours / "file").read_bytes() == b"abc"
