"""A real containerd with Onlap as its snapshotter."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onlap.testing import read_tree
from peers.daemons import Containerd, Onlap, eventually, run
from peers.images import Image, three_layers

pytestmark = pytest.mark.needs(
    "overlay", "peer:containerd", "peer:ctr", "peer:runc", "gopkg:github.com/containerd/containerd"
)

# What a container does to the image's tree: every kind of change that a layer can hold.
CHANGES = (
    *("write", "/new", "new", "--"),
    *("write", "/d/changed", "changed", "--"),
    *("rm", "/d/kept", "--"),
    *("rm", "/opaque", "--"),
    *("mkdir", "/opaque", "--"),
    *("write", "/opaque/again", "x", "--"),
    *("mv", "/one", "/moved"),
)

# Added by runc for its mounts, whatever the snapshotter is, at the time of the run.
RUNTIME = {b"proc", b"dev", b"sys", b"run", b"etc"}


@pytest.fixture
def imported(containerd: Containerd, onlap: Onlap, image: Image) -> Iterator[str]:
    """The image, in both snapshotters; gone with all of its snapshots in the end."""
    for snapshotter in ("onlap", "overlayfs"):
        containerd.ctr("images", "import", "--snapshotter", snapshotter, image.archive)
    yield image.reference
    containerd.ctr("images", "rm", "--sync", image.reference)
    eventually(onlap.is_bare, "the root is bare after the image's removal")


@contextmanager
def mounted(containerd: Containerd, snapshotter: str, key: str, target: Path) -> Iterator[Path]:
    """A snapshot of containerd's, mounted by the command that ``ctr snapshots mounts`` prints."""
    target.mkdir()
    run("sh", "-ec", containerd.snapshots("mounts", target, key, snapshotter=snapshotter))
    try:
        yield target
    finally:
        run("umount", target)
        target.rmdir()


def tree(containerd: Containerd, snapshotter: str, key: str, target: Path) -> dict[bytes, object]:
    """What a snapshot shows, to compare; but for the time of the top directory.

    Onlap gives a new layer the time of its parent's top directory, containerd does not.
    """
    with mounted(containerd, snapshotter, key, target) as path:
        listing = dict(read_tree(path))
    listing[b"."] = listing[b"."]._replace(times=0)
    return dict(listing)


def kinds(containerd: Containerd) -> dict[str, str]:
    """The kind of every snapshot, by key, as ``ctr snapshots ls`` has them."""
    lines = containerd.snapshots("ls").splitlines()[1:]
    return {line.split()[0]: line.split()[-1] for line in lines}


def test_an_image_looks_as_in_containerds_own(containerd: Containerd, imported: str, tmp_path: Path) -> None:
    (top,) = [name for name, children in parents(containerd).items() if not children]
    for snapshotter in ("onlap", "overlayfs"):
        containerd.snapshots("prepare", "look", top, snapshotter=snapshotter)
    ours, theirs = (tree(containerd, each, "look", tmp_path / each) for each in ("onlap", "overlayfs"))
    assert ours == theirs
    names = set(ours)
    assert {b"d/sub/again", b"opaque/newer", b"becomes-directory/f", b"becomes-link", b"fifo"} <= names
    assert not names & {b"d/gone", b"d/sub/gone", b"opaque/hidden", b"opaque/new", b"removed", b"two"}
    for snapshotter in ("onlap", "overlayfs"):
        containerd.snapshots("rm", "look", snapshotter=snapshotter)


def parents(containerd: Containerd) -> dict[str, list[str]]:
    """The committed snapshots, and who stands on them."""
    lines = [line.split() for line in containerd.snapshots("ls").splitlines()[1:]]
    committed = [words[0] for words in lines if words[-1] == "Committed"]
    return {name: [words[0] for words in lines if words[1:-1] == [name]] for name in committed}


def test_a_container_changes_its_tree_as_in_containerds_own(
    containerd: Containerd, imported: str, tmp_path: Path
) -> None:
    listings = []
    for snapshotter in ("onlap", "overlayfs"):
        containerd.ctr("run", "--snapshotter", snapshotter, imported, f"changer-{snapshotter}", "/bin/tool", *CHANGES)
        listings.append(tree(containerd, snapshotter, f"changer-{snapshotter}", tmp_path / snapshotter))
    ours, theirs = ({path: node for path, node in each.items()} for each in listings)
    assert set(ours) == set(theirs)
    # The two containers ran one after the other: what they wrote, and the directories around it, have times of now.
    now = [path for path in ours if ours[path] != theirs[path]]
    assert {path: _timeless(ours[path]) for path in now} == {path: _timeless(theirs[path]) for path in now}
    assert b"moved" in ours
    assert not {b"one", b"d/kept", b"opaque/newer"} & set(ours)

    diff = containerd.snapshots("diff", "--keep", "changer-onlap")
    assert diff is not None
    for snapshotter in ("onlap", "overlayfs"):
        containerd.ctr("containers", "rm", f"changer-{snapshotter}")
        containerd.snapshots("rm", f"changer-{snapshotter}", snapshotter=snapshotter)


def _timeless(node: object) -> object:
    return node._replace(times=0)  # type: ignore[attr-defined]
