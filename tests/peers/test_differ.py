"""Onlap as the differ of a real containerd, beside a containerd that unpacks and diffs by itself."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from onlap.serve.containerd.protocol.diff_pb2 import Descriptor
from onlap.testing import read_tree
from onlap.testing.same import Listing
from peers import gobuild, images
from peers.daemons import Containerd, Onlap, eventually, output, run
from peers.differs import Site, ingest, site
from peers.images import Image, Layer
from peers.remote import NAMESPACE, RemoteDiffer, status_of

pytestmark = pytest.mark.needs(
    "overlay", "peer:containerd", "peer:ctr", "peer:tar", "gopkg:github.com/containerd/containerd"
)

# Of every entry of a test's layers.
LAYER_TIME = 1_700_000_000 * 10**9

SNAPSHOTTERS = ("onlap", "overlayfs", "native")
DIFFER = True


@pytest.fixture(scope="module")
def walking(place: Path) -> Iterator[Containerd]:
    """Another containerd, which has no differ but its own."""
    other = place / "w"
    other.mkdir()
    with Onlap(other, "--sync", "none") as snapshotter, Containerd(other, snapshotter) as daemon:
        yield daemon


# ------------------------------------------------------------------------------------------------ the same images


def sparse(place: Path) -> bytes:
    """A layer with a file with holes, by GNU tar."""
    top = place / "sparse"
    (top / "holes").mkdir(parents=True)
    with (top / "holes/file").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 5000)
        file.truncate(5 << 20)
    return output("tar", "--sparse", "--format=pax", "--mtime=@1700000000", "-C", top, "-c", "holes")


ODD = (
    Layer()
    .device("null", 1, 3)
    .fifo("pipe")
    .file("with-xattrs", b"x", one="1", two="2")
    .file("name-\udcff\udc80", b"not UTF-8")
    .directory("dir-\udcfe")
    .file("dir-\udcfe/file", b"not UTF-8")
    .whiteout("d/kept")
    .whiteout("d/changed")
    .file("d/changed", b"beside its own whiteout")
    .directory("d/odd")
    .file("d/odd/f", b"1")
    .file("opaque/of-a-directory-that-it-does-not-name", b"1")
    .whiteout("no-such")
)


@pytest.fixture(scope="module")
def odd(place: Path, tool: Path) -> Image:
    """The three layers, and two more with what is rare, in every compression."""
    layers = (*images.three_layers(place / "three.tar", tool).layers, ODD.done(), sparse(place))
    return images.write(place / "odd.tar", "localhost/onlap/odd:1", layers, ("", "gzip", "zstd", "gzip", "zstd"))


def listed(containerd: Containerd, snapshotter: str) -> dict[str, tuple[str, str]]:
    """Parent and kind of every snapshot by key."""
    found = {}
    for line in containerd.snapshots("ls", snapshotter=snapshotter).splitlines()[1:]:
        words = line.split()
        found[words[0]] = (words[1] if len(words) == 3 else "", words[-1])
    return found


def top_layer(containerd: Containerd, snapshotter: str) -> str:
    """The committed snapshot that has no children."""
    found = {key: parent for key, (parent, kind) in listed(containerd, snapshotter).items() if kind == "Committed"}
    (top,) = found.keys() - set(found.values())
    return top


@contextmanager
def prepared(containerd: Containerd, snapshotter: str, parent: str, target: Path, key: str = "look") -> Iterator[Path]:
    """A writable snapshot, mounted by the command that ``ctr`` prints; gone in the end."""
    target.mkdir(exist_ok=True)
    command = containerd.snapshots("prepare", "--target", target, key, parent, snapshotter=snapshotter)
    try:
        run("sh", "-ec", command, environment={"LIBMOUNT_FORCE_MOUNT2": "always"})
        try:
            yield target
        finally:
            run("umount", target)
    finally:
        containerd.snapshots("rm", key, snapshotter=snapshotter)


def assert_same(ours: Listing, theirs: Listing) -> None:
    """Equal trees, but for the times of directories to which containerd gave the time of the unpacking.

    Onlap keeps the lower layer's time there, as an archive's order of entries shall not show.
    """
    fresh = {path for path, node in theirs.items() if node.type == "directory" and node.times > LAYER_TIME}
    ours, theirs = (
        {path: node._replace(times=0) if path in fresh else node for path, node in tree.items()}
        for tree in (ours, theirs)
    )
    assert ours == theirs


@pytest.mark.parametrize("snapshotter", SNAPSHOTTERS)
def test_an_image_is_as_the_walking_differ_unpacks_it(
    snapshotter: str, containerd: Containerd, walking: Containerd, onlap: Onlap, odd: Image, tmp_path: Path
) -> None:
    """The same tree, under the same chain IDs, each layer by one call that is answered with success."""
    before = len(onlap.answers("Apply"))
    for daemon in (containerd, walking):
        daemon.ctr("images", "import", "--snapshotter", snapshotter, odd.archive)
    assert onlap.answers("Apply")[before:] == ["0"] * len(odd.layers)
    try:
        assert listed(containerd, snapshotter) == listed(walking, snapshotter)
        trees = []
        for daemon in (containerd, walking):
            top = top_layer(daemon, snapshotter)
            with prepared(daemon, snapshotter, top, tmp_path / "look") as path:
                trees.append(read_tree(path))
        assert_same(*trees)
        assert {b"name-\xff\x80", b"dir-\xfe/file", b"d/odd/f", b"pipe", b"holes/file"} <= trees[0].keys()
        assert not {b"d/kept", b"d/gone", b"opaque/hidden"} & trees[0].keys()
        assert trees[0][b"d/changed"].content[1] == b"beside its own whiteout"
        assert trees[0][b"null"].rdev == (1, 3)
    finally:
        for daemon in (containerd, walking):
            daemon.ctr("images", "rm", "--sync", odd.reference)
    eventually(lambda: not listed(containerd, snapshotter), "garbage collection has removed its snapshots")


# ------------------------------------------------------------------------------------------------- layers by layer


BASE = (
    Layer()
    .directory("d", mode=0o1777, uid=5)
    .file("d/one", b"1", uid=7, note="x")
    .file("d/two", b"2")
    .directory("d/sub")
    .file("d/sub/f", b"3")
    .directory("o", mode=0o700)
    .file("o/hidden", b"1")
    .file("file", b"1")
    .symlink("up", "..")
    .symlink("to-d", "d")
)

HOSTILE = {
    "link to a lower file": Layer().link("d/new", "d/one"),
    "link to a lower file that it removes": Layer().link("d/new", "d/one").whiteout("d/one"),
    "whiteout": Layer().whiteout("d/one").whiteout("d/sub"),
    "whiteout before its own entry": Layer().whiteout("d/one").file("d/one", b"new"),
    "whiteout after its own entry": Layer().file("d/one", b"new").whiteout("d/one"),
    "whiteout beside its own directory": Layer().whiteout("d/sub").directory("d/sub").file("d/sub/g", b"1"),
    "whiteout of nothing": Layer().whiteout("d/none").whiteout("none"),
    "opaque": Layer().directory("o").opaque("o").file("o/new", b"1"),
    "opaque after its entries": Layer().directory("o").file("o/new", b"1").opaque("o"),
    "opaque top": Layer().file("new", b"1")._add(".wh..wh..opq", tarfile.REGTYPE),
    "of aufs": Layer()._add(".wh..wh.plnk", tarfile.DIRTYPE, mode=0o700)._add(".wh..wh.aufs", tarfile.REGTYPE),
    "whiteout without a name": Layer()._add(".wh.", tarfile.REGTYPE),
    "whiteout of dot": Layer()._add("d/.wh..", tarfile.REGTYPE),
    "whiteout of dots": Layer()._add("d/.wh...", tarfile.REGTYPE),
    "above the top": Layer().file("../evil", b"1"),
    "above the top, inside": Layer().file("d/../../evil", b"1"),
    "absolute": Layer().file("/d/absolute", b"1"),
    "through a link": Layer().file("to-d/new", b"1"),
    "through a link above the top": Layer().file("up/up/new", b"1"),
    "through its own link": Layer().symlink("out", "/tmp").file("out/onlap-evil", b"1"),
    "hard link above the top": Layer().link("d/new", "../../etc/passwd"),
    "hard link through a link": Layer().link("d/new", "to-d/one"),
    "hard link to nothing": Layer().link("d/new", "d/none"),
    "hard link to itself": Layer().link("d/one", "d/one"),
    "directory over file": Layer().directory("file").file("file/f", b"1"),
    "file over directory": Layer().file("d", b"1"),
    "file in a file": Layer().file("file/f", b"1"),
    "the same twice": Layer().file("d/one", b"first").file("d/one", b"second").directory("d", mode=0o700),
    "the parent afterwards": Layer().file("n/m/f", b"1").directory("n", mode=0o711, uid=3),
    "in a directory that it does not name": Layer().file("d/sub/new", b"1").file("o/new", b"2"),
    "device": Layer().device("d/null", 1, 3).fifo("d/fifo"),
    "a marker of OverlayFS": Layer().device("d/marker", 0, 0),
    "name that is not UTF-8": Layer().file("d/\udcff", b"1").symlink("l\udcfe", "t\udcfd"),
    "top described": Layer().directory("./", mode=0o711, uid=9),
    "empty": Layer(),
}
# What containerd's applier takes and Onlap refuses, or both refuse.
REFUSED = {
    "whiteout without a name": "a whiteout of nothing",
    "whiteout of dot": "a whiteout of nothing",
    "whiteout of dots": "a whiteout of nothing",
    "above the top": "leads out of the tree",
    "above the top, inside": "leads out of the tree",
    "hard link above the top": "leads out of the tree",
    "hard link to nothing": "d/none does not exist",
}

# What containerd's applier does not take, or gets wrong in an overlay or in a directory: whiteouts act on lower layers
# only, whatever their order (OCI image specification, layer.md), and the layer is what it would be in the merged tree.
# Here is what there is in the end, and what is not.
RIGHT = {
    "link to a lower file": ({b"d/new", b"d/one"}, set()),
    "link to a lower file that it removes": ({b"d/new"}, {b"d/one"}),
    "whiteout after its own entry": ({b"d/one"}, set()),
    "whiteout beside its own directory": ({b"d/sub/g"}, {b"d/sub/f"}),
    "opaque top": ({b"new"}, {b"d", b"file", b"o"}),
    "through a link": ({b"d/new"}, {b"to-d/new"}),
    "through a link above the top": ({b"new"}, {b"up/up"}),
    "hard link through a link": ({b"d/new", b"d/one"}, set()),
    "hard link to itself": ({b"d/one"}, set()),
    "file in a file": ({b"file/f"}, set()),
    "a marker of OverlayFS": ({b"d/one"}, {b"d/marker"}),
    "top described": ({b"d/one"}, set()),
}


class Outcome(NamedTuple):
    """What became of a layer: the error that says why not, or the tree."""

    error: str
    tree: Listing


@pytest.fixture(scope="module")
def hostile(containerd: Containerd, walking: Containerd) -> dict[str, Descriptor]:
    """The layers, in both content stores."""
    layers = [layer.done() for layer in HOSTILE.values()]
    ingest(walking, *layers)
    return dict(zip(HOSTILE, ingest(containerd, *layers), strict=True))


@pytest.fixture(scope="module")
def base(place: Path, walking: Containerd) -> Path:
    """A lower layer, unpacked by the walking differ."""
    made = site(place / "base")
    with RemoteDiffer(walking.socket, NAMESPACE) as client:
        client.apply(ingest(walking, BASE.done())[0], made.mounts)
    return made.upper


def outcome(daemon: Containerd, layer: Descriptor, target: Site) -> Outcome:
    error = ""
    with RemoteDiffer(daemon.socket, NAMESPACE) as client:
        try:
            client.applying(layer, target.mounts).result()
        except grpc.RpcError as raised:
            _, error = status_of(raised)
    return Outcome(error, target.tree())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_odd_layer(
    name: str, hostile: dict[str, Descriptor], containerd: Containerd, walking: Containerd, base: Path, root: Path
) -> None:
    """In an overlay and in a directory, the same as containerd's, or an error, or what is right; nothing outside."""
    made = {}
    for kind in ("overlay", "directory"):
        for daemon in (containerd, walking):
            place = site(root / f"{kind}-{daemon.place.name}", base, overlay=kind == "overlay")
            made[kind, daemon] = outcome(daemon, hostile[name], place)
    ours, also_ours = made["overlay", containerd], made["directory", containerd]
    for kind in ("overlay", "directory"):
        found, theirs = made[kind, containerd], made[kind, walking]
        if name in REFUSED:
            assert REFUSED[name] in found.error
        else:
            assert found.error == ""
            if name in RIGHT:
                there, gone = RIGHT[name]
                assert there <= found.tree.keys()
                assert not gone & found.tree.keys()
            else:
                assert theirs.error == ""
                assert_same(found.tree, theirs.tree)
    if name not in REFUSED:
        assert_same(ours.tree, also_ours.tree)
    if name.startswith("link to a lower file"):
        assert (ours.tree[b"d/new"].links == (b"d/one",)) == (b"d/one" in ours.tree)
    if name == "top described":
        assert (ours.tree[b"."].mode, ours.tree[b"."].owner) == ("0o711", (9, 9))


# ------------------------------------------------------------------------------------------------------- new layers


def changed(tree: Path) -> None:
    """Every kind of change that a layer can hold, in the tree of the image."""
    (tree / "d/changed").write_bytes(b"changed")
    os.chmod(tree / "bin/tool", 0o700)
    os.setxattr(tree / "etc/passwd", "user.new", b"1")
    (tree / "d/kept").unlink()
    shutil.rmtree(tree / "opaque")
    (tree / "opaque").mkdir()
    (tree / "opaque/again").write_bytes(b"x" * 100_000)
    (tree / "becomes-directory/f").unlink()
    (tree / "becomes-directory").rmdir()
    (tree / "becomes-directory").symlink_to("d")
    os.link(tree / "one", tree / "linked")
    os.mkfifo(tree / "new-fifo")
    os.mknod(tree / "new-null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (tree / os.fsdecode(b"new-\xff")).write_bytes(b"")
    with (tree / "new-holes").open("wb") as file:
        file.truncate(1 << 20)
    for path in tree.rglob("*"):
        os.utime(path, ns=(LAYER_TIME, LAYER_TIME), follow_symlinks=False)


@pytest.mark.parametrize("snapshotter", SNAPSHOTTERS)
def test_the_diff_of_a_snapshot(
    snapshotter: str, containerd: Containerd, onlap: Onlap, image: Image, tmp_path: Path
) -> None:
    """Applied again, by containerd's applier, it gives the tree; the same every time, and garbage collection spares it.

    Its blob has the label of what it is without its compression.
    """
    before = len(onlap.answers("Diff"))
    applier = gobuild.build(Path(__file__).parent / "go" / "apply")
    ctr = ["ctr", "--address", str(containerd.socket)]
    diff = [*ctr, "snapshots", "--snapshotter", snapshotter, "diff"]
    containerd.ctr("images", "import", "--snapshotter", snapshotter, image.archive)
    top = top_layer(containerd, snapshotter)
    with prepared(containerd, snapshotter, top, tmp_path / "changed", "changed") as tree:
        changed(tree)
        wanted = read_tree(tree)
        run("umount", tree)  # so that all of it is in the directories
        try:
            blob = output(*diff, "--keep", "changed")
            assert output(*diff, "changed") == blob
            assert output(*diff, top, "changed") == blob
        finally:
            run("sh", "-ec", containerd.snapshots("mounts", tree, "changed", snapshotter=snapshotter))
    with prepared(containerd, snapshotter, top, tmp_path / "again", "again") as tree:
        (tmp_path / "layer").write_bytes(blob)
        mounts = [{"type": "bind", "source": str(tree), "options": ["rbind", "rw"]}]
        run(applier, tmp_path / "layer", text=json.dumps(mounts))
        assert_same(wanted, read_tree(tree))
        assert output(*diff, top) == output(*diff, top), "of a committed one and its parent"
    assert onlap.answers("Diff")[before:] == ["0"] * 5

    containerd.ctr("images", "rm", "--sync", image.reference)
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    plain = hashlib.sha256(gzip.decompress(blob)).hexdigest()
    (line,) = [line for line in containerd.ctr("content", "ls").splitlines() if digest in line]
    assert f"containerd.io/uncompressed=sha256:{plain}" in line
    containerd.ctr("content", "rm", digest)


def test_a_layer_is_in_small_where_the_change_is(containerd: Containerd, image: Image, tmp_path: Path) -> None:
    """One changed file is one entry below its directory, whatever else the image has."""
    containerd.ctr("images", "import", "--snapshotter", "onlap", image.archive)
    with prepared(containerd, "onlap", top_layer(containerd, "onlap"), tmp_path / "tree", "one") as tree:
        (tree / "d/sub/again").write_bytes(b"changed")
        ctr = ["ctr", "--address", str(containerd.socket), "snapshots", "--snapshotter", "onlap"]
        blob = output(*ctr, "diff", "one")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        assert tar.getnames() == ["d", "d/sub", "d/sub/again"]
    containerd.ctr("images", "rm", "--sync", image.reference)
