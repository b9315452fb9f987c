"""A real containerd with Onlap as its snapshotter."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onlap.catalog import records
from onlap.mounts.temporary import mounted as onlap_mounted
from onlap.snapshots.contract import Info
from onlap.store import open_snapshotter
from onlap.testing import read_tree
from onlap.testing.same import Node
from peers import gobuild
from peers.daemons import Containerd, Onlap, eventually, output, run, shims
from peers.images import Image, Layer, three_layers
from peers.remote import RemoteSnapshotter

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

BOTH = ("onlap", "overlayfs")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "containerd.md"


@pytest.fixture
def imported(containerd: Containerd, onlap: Onlap, image: Image) -> Iterator[str]:
    """The image, in Onlap and in containerd's own snapshotter; gone with all of its snapshots in the end."""
    for snapshotter in BOTH:
        containerd.ctr("images", "import", "--snapshotter", snapshotter, image.archive)
    yield image.reference
    remove_image(containerd, onlap, image.reference)


def remove_image(containerd: Containerd, onlap: Onlap, reference: str) -> None:
    """Remove it; containerd's garbage collection and Onlap's deleting leave nothing."""
    containerd.ctr("images", "rm", "--sync", reference)
    eventually(onlap.is_bare, "the root is bare after the image's removal")


@contextmanager
def mounted(containerd: Containerd, snapshotter: str, key: str, target: Path) -> Iterator[Path]:
    """A snapshot, mounted by the command that ``ctr snapshots mounts`` prints."""
    target.mkdir(exist_ok=True)
    run("sh", "-ec", containerd.snapshots("mounts", target, key, snapshotter=snapshotter))
    try:
        yield target
    finally:
        run("umount", target)
        target.rmdir()


def tree(containerd: Containerd, snapshotter: str, key: str, target: Path) -> dict[bytes, Node]:
    """What a snapshot shows.

    Without the time of the top directory: Onlap gives a new layer that of its parent, containerd does not.
    """
    with mounted(containerd, snapshotter, key, target) as path:
        listing = dict(read_tree(path))
    listing[b"."] = listing[b"."]._replace(times=0)
    return listing


def listed(containerd: Containerd) -> dict[str, tuple[str, str]]:
    """Parent and kind of every snapshot by key, as ``ctr snapshots ls`` shows them."""
    found = {}
    for line in containerd.snapshots("ls").splitlines()[1:]:
        words = line.split()
        found[words[0]] = (words[1] if len(words) == 3 else "", words[-1])
    return found


def top_layer(containerd: Containerd) -> str:
    """The committed snapshot that has no children."""
    found = listed(containerd)
    (top,) = found.keys() - {parent for parent, _ in found.values()}
    return top


def owned(onlap: Onlap, owner: str) -> list[Info]:
    """What another process sees of an owner's snapshots."""
    return [info for info in onlap.all() if info.owner == owner]


def test_an_image_looks_as_in_containerds_own(containerd: Containerd, imported: str, tmp_path: Path) -> None:
    top = top_layer(containerd)
    for snapshotter in BOTH:
        containerd.snapshots("prepare", "look", top, snapshotter=snapshotter)
    ours, theirs = (tree(containerd, snapshotter, "look", tmp_path / snapshotter) for snapshotter in BOTH)
    assert ours == theirs
    assert {b"d/sub/again", b"opaque/newer", b"becomes-directory/f", b"becomes-link", b"fifo"} <= ours.keys()
    assert not ours.keys() & {b"d/gone", b"d/sub/gone", b"opaque/hidden", b"opaque/new", b"removed", b"two"}
    for snapshotter in BOTH:
        containerd.snapshots("rm", "look", snapshotter=snapshotter)


def test_a_container_from_its_run_to_its_commit(
    containerd: Containerd, onlap: Onlap, imported: str, tmp_path: Path
) -> None:
    """What it wrote is as with containerd's own; its diff is a layer; its commit is a snapshot that stays."""
    trees = []
    for snapshotter in BOTH:
        containerd.ctr("run", "--snapshotter", snapshotter, imported, f"on-{snapshotter}", "/bin/tool", *CHANGES)
        trees.append(tree(containerd, snapshotter, f"on-{snapshotter}", tmp_path / snapshotter))
    ours, theirs = trees
    # The two ran one after the other: what they wrote, and the directories around it, have times of then.
    differing = [path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)]
    assert {path: ours[path]._replace(times=0) for path in differing} == {
        path: theirs[path]._replace(times=0) for path in differing
    }
    assert {b"moved", b"new", b"opaque/again"} <= ours.keys()
    assert not {b"one", b"d/kept", b"opaque/newer"} & ours.keys()

    layer = output(*ctr_snapshots(containerd), "diff", "on-onlap")
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        names = set(tar.getnames())
    assert {"new", "d/changed", "d/.wh.kept", ".wh.one", "moved", "opaque/again"} <= names
    assert not {"bin/tool", "fifo", "d/kept"} & names

    assert re.search(r"^on-onlap\s+\d", containerd.snapshots("usage", "on-onlap"), re.MULTILINE)
    assert listed(containerd)["on-onlap"][1] == "Active"
    assert "on-onlap" in containerd.snapshots("tree")
    info = json.loads(containerd.snapshots("info", "on-onlap"))
    assert (info["Kind"], info["Name"]) == ("Active", "on-onlap")
    assert "cannot remove" in containerd.snapshots("rm", info["Parent"], ok=False)

    containerd.snapshots("commit", "derived", "on-onlap")
    for snapshotter in BOTH:
        containerd.ctr("containers", "rm", "--keep-snapshot", f"on-{snapshotter}")
    assert listed(containerd)["derived"] == (info["Parent"], "Committed")
    containerd.snapshots("prepare", "on-derived", "derived")
    assert tree(containerd, "onlap", "on-derived", tmp_path / "derived") == ours
    for key in ("on-derived", "derived"):
        containerd.snapshots("rm", key)


def test_a_view_of_an_image(containerd: Containerd, imported: str, tmp_path: Path) -> None:
    """Read-only, by containerd's own mounting. (What ``ctr snapshots view`` makes, garbage collection may take.)"""
    containerd.ctr("images", "mount", "--snapshotter", "onlap", imported, tmp_path)
    try:
        assert (tmp_path / "d/sub/again").read_bytes() == b"3"
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "d/sub/again").unlink()
        assert listed(containerd)[str(tmp_path)][1] == "View"
    finally:
        containerd.ctr("images", "unmount", "--snapshotter", "onlap", "--rm", tmp_path)


def ctr_snapshots(containerd: Containerd) -> list[str]:
    """The command, for output that is no text."""
    return ["ctr", "--address", str(containerd.socket), "snapshots", "--snapshotter", "onlap"]


def test_what_others_own_survives_containerd(
    containerd: Containerd, onlap: Onlap, image: Image, tmp_path: Path
) -> None:
    """Snapshots of library and command, while containerd imports, removes and collects garbage on the same root."""
    (tmp_path / "f").write_bytes(b"mine")
    onlap.onlap("import", str(tmp_path), "by-the-command")
    with open_snapshotter(onlap.store, create=False) as library:
        library.prepare("by-the-library", "by-the-command")
    before = owned(onlap, "")
    assert len(before) == 2

    containerd.ctr("images", "import", "--snapshotter", "onlap", image.archive)
    assert len(owned(onlap, "containerd")) == len(image.layers)
    assert listed(containerd).keys().isdisjoint({"by-the-command", "by-the-library"})
    containerd.ctr("images", "rm", "--sync", image.reference)
    eventually(lambda: not owned(onlap, "containerd"), "containerd's garbage collection has removed its snapshots")
    assert owned(onlap, "") == before

    with open_snapshotter(onlap.store, create=False) as library:
        with onlap_mounted(library.mounts("by-the-library")) as path:
            assert (path / "f").read_bytes() == b"mine"
        library.remove("by-the-library")
        library.remove("by-the-command")
    eventually(onlap.is_bare, "the root is bare")


def test_onlap_is_killed_in_the_middle_of_an_import(
    containerd: Containerd, onlap: Onlap, place: Path, tool: Path
) -> None:
    """The import fails; after a restart the same one, run again, succeeds, and nothing of the first is left."""
    image = three_layers(place / "slow.tar", tool, "localhost/onlap/slow:1", files=6_000)

    def unpacking() -> bool:
        """Whether the second layer, which takes its time, is being unpacked."""
        found = owned(onlap, "containerd")
        return any(info.kind == "committed" for info in found) and any(info.kind == "active" for info in found)

    words = ["ctr", "--address", str(containerd.socket), "images", "import", "--snapshotter", "onlap"]
    importing = subprocess.Popen([*words, image.archive], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        eventually(lambda: unpacking() or importing.poll() is not None, "the second layer is being unpacked")
        onlap.kill()
        said, _ = importing.communicate(timeout=30)
    finally:
        importing.kill()
        importing.wait()
    assert importing.returncode != 0, said
    assert "unavailable" in said.lower()

    onlap.start()  # over the stale socket

    def imports() -> bool:
        # containerd's connection to a proxy comes back by itself, after at most three seconds.
        done = subprocess.run([*words, image.archive], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "unavailable" in done.stderr.lower(), done.stderr
        return done.returncode == 0

    eventually(imports, "the import succeeds")
    containerd.ctr("run", "--rm", "--snapshotter", "onlap", image.reference, "again", "/bin/tool", "cat", "/many/5999")
    containerd.ctr("images", "rm", "--sync", image.reference)
    onlap.onlap("cleanup")
    eventually(onlap.is_bare, "the root is bare")
    staged = {path.name for path in (onlap.store / "staging").iterdir() if not path.name.startswith("server-")}
    assert len(staged) <= 1, "but for the running server's own, staging directories of the dead are gone"


def test_a_container_goes_on_running_while_its_daemons_restart(
    containerd: Containerd, onlap: Onlap, imported: str
) -> None:
    containerd.ctr("run", "--detach", "--null-io", "--snapshotter", "onlap", imported, "running")
    (pid,) = re.findall(r"^running\s+(\d+)\s+RUNNING", containerd.ctr("tasks", "ls"), re.MULTILINE)
    onlap.restart()
    containerd.restart()
    onlap.restart()
    assert re.search(rf"^running\s+{pid}\s+RUNNING", containerd.ctr("tasks", "ls"), re.MULTILINE)
    containerd.ctr("tasks", "exec", "--exec-id", "e", "running", "/bin/tool", "write", "/written", "after")
    assert Path(f"/proc/{pid}/root/written").read_bytes() == b"after"
    containerd.ctr("tasks", "kill", "running")
    eventually(lambda: "STOPPED" in containerd.ctr("tasks", "ls"), "the container has stopped")
    containerd.ctr("tasks", "rm", "running")
    containerd.ctr("containers", "rm", "running")
    eventually(lambda: not shims(containerd.socket), "its shim has gone")


def test_the_remedy_for_a_lost_layer(containerd: Containerd, onlap: Onlap, image: Image, tmp_path: Path) -> None:
    """As its how-to guide has it: removed leaf first, then pulled again; containerd by itself would not heal it."""
    containerd.ctr("images", "import", "--snapshotter", "onlap", image.archive)
    top = top_layer(containerd)
    middle = listed(containerd)[top][0]
    onlap.stop()
    with open_snapshotter(onlap.store, create=False, owner="containerd") as snapshotter:
        (name,) = [info.name for info in snapshotter.walk() if info.name.endswith(middle)]
        tree_of_it = snapshotter.catalog.layout.snapshot(snapshotter.record(name).id)
        snapshotter.catalog.database.write(lambda c: records.put_setting(c, "epoch", "of another boot"))
    shutil.rmtree(tree_of_it)
    onlap.start()
    assert f"name={name}" in onlap.tail()

    eventually(lambda: containerd.snapshots("ls"), "containerd is connected again")

    def shown() -> dict[bytes, Node]:
        containerd.snapshots("prepare", "look", top)
        try:
            return tree(containerd, "onlap", "look", tmp_path / "look")
        finally:
            containerd.snapshots("rm", "look")

    with pytest.raises(AssertionError):
        shown()
    containerd.ctr("images", "import", "--snapshotter", "onlap", image.archive)
    # containerd has a record of its own, and believes that the layer is there.
    with pytest.raises(AssertionError):
        shown()
    containerd.snapshots("rm", top)
    # With --sync its garbage collection has been by then: else it might take what the next import is based on.
    remove_image(containerd, onlap, image.reference)
    containerd.ctr("images", "import", "--snapshotter", "onlap", image.archive)
    assert b"d/sub/again" in shown()
    remove_image(containerd, onlap, image.reference)


def test_the_configuration_in_the_document(place: Path) -> None:
    """containerd 1.7 takes what its how-to guide shows for it; the others are at least what they say they are."""
    text = DOCUMENT.read_text()
    ours, newer, differ = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (place / "document.toml").write_text(ours + differ)
    taken = tomllib.loads(run("containerd", "--config", place / "document.toml", "config", "dump"))
    assert taken["proxy_plugins"]["onlap"]["exports"]["root"] == "/var/lib/onlap"
    assert taken["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["snapshotter"] == "onlap"
    assert taken["plugins"]["io.containerd.service.v1.diff-service"]["default"] == ["onlap-differ", "walking"]
    newest = tomllib.loads(newer)
    assert newest["version"] == 3
    # The list replaces the default one, and without the number of unpacks "rebase" does nothing.
    transfer = newest["plugins"]["io.containerd.transfer.v1.local"]
    assert {each["snapshotter"] for each in transfer["unpack_config"]} == {"onlap", "overlayfs"}
    assert transfer["max_concurrent_unpacks"] > 1
    assert newest["proxy_plugins"]["onlap"]["capabilities"] == ["rebase"]
    (daemon,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads(daemon) == {"features": {"containerd-snapshotter": True}, "storage-driver": "onlap"}


# ------------------------------------------------------------------------------------------------------ rebase


LOWER = (
    Layer()
    .directory("d", mode=0o700)
    .file("d/gone", b"1")
    .file("d/kept", b"1")
    .directory("o")
    .file("o/hidden", b"1")
    .directory("tmp", mode=0o1777, uid=5)
)
UPPER = Layer().directory("d").whiteout("d/gone").directory("o").opaque("o").file("o/new", b"2").file("tmp/new", b"3")


@pytest.mark.parametrize("kept", [True, False])
def test_a_layer_unpacked_without_its_parent(kept: bool, onlap: Onlap, tmp_path: Path) -> None:
    """As containerd 2.2 unpacks in parallel: prepared without a parent, applied, and committed on one ("rebase").

    containerd's own applier keeps the whiteouts where the plan is an overlay, which it is for the keys of an unpack;
    through a bind it loses them, which is why. The directory that it had to invent is the lower layer's in the end, and
    the one that the layer names is as named.
    """
    applier = gobuild.build(Path(__file__).parent / "go" / "apply")
    layers = {name: tmp_path / name for name in ("lower", "upper")}
    layers["lower"].write_bytes(LOWER.done())
    layers["upper"].write_bytes(UPPER.done())
    prefix = "rebased/1/extract-1-abc sha256" if kept else "rebased/1/other"
    with RemoteSnapshotter(onlap.socket) as snapshotter:
        for name in layers:  # both before any is committed
            snapshotter.prepare(f"{prefix}:{name}")
        for name, layer in layers.items():
            plan = snapshotter.mounts(f"{prefix}:{name}")
            assert [mount.type for mount in plan] == ["overlay" if kept else "bind"]
            mounts = [{"type": m.type, "source": m.source, "options": m.options} for m in plan]
            run(applier, layer, text=json.dumps(mounts))
        snapshotter.commit("rebased/lower", f"{prefix}:lower")
        snapshotter.commit("rebased/upper", f"{prefix}:upper", parent="rebased/lower")
        assert snapshotter.stat("rebased/upper").parent == "rebased/lower"
        with onlap_mounted(snapshotter.prepare("rebased/look", "rebased/upper")) as path:
            found = dict(read_tree(path))
        assert (found[b"tmp"].mode, found[b"tmp"].owner) == ("0o1777", (5, 5))
        assert found[b"d"].mode == "0o755"
        names = {name.decode() for name in found}
        assert names == {".", "d", "d/kept", "o", "o/new", "tmp", "tmp/new"} | (
            set() if kept else {"d/gone", "o/hidden"}
        )
        for name in ("rebased/look", "rebased/upper", "rebased/lower"):
            snapshotter.remove(name)
