"""What a repair of a store of others leaves alone, where its data comes from, and what is when it is cut short."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from onlap.check.stores.repairing.use import is_mounted
from onlap.graphdrivers import layout
from onlap.syscalls import files
from onlap.testing.same import assert_same_tree, read_tree
from peer_stores import making as stores
from peer_stores.damages import TREES, damage_all, inflict
from peer_stores.making import NAME, Made, Podman, assert_healthy, assert_same_layers, check, looked
from peers import images
from peers.daemons import eventually, run
from peers.graphdrivers import GraphDockerd

pytestmark = pytest.mark.needs(*stores.NEEDS, "peer:runc", "peer:buildah")
Copy = Callable[[Made], Path]
STAGING = ".onlap-repair"

# The command, killed when it is about to change the filesystem for the given time.
KILLED = """
import os, signal, sys
left = int(sys.argv[1])

def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for name in ("rename", "link", "symlink", "mkdir", "mknod", "unlink", "rmdir", "ftruncate", "fsync", "chmod", "chown",
             "setxattr", "removexattr", "utime"):
    setattr(os, name, counted(getattr(os, name)))
from onlap.cli import main
sys.exit(main(sys.argv[2:]))
"""


def trees_of(store: Made, root: Path) -> list[Path]:
    return [root / each for each in store.trees]


def facts(root: Path) -> set[tuple[str, str, str | None]]:
    return {(each.kind, each.thing, each.path) for each in looked(root).findings}


def test_a_repair_that_is_killed(made: Mapping[str, Made], place_of: Copy) -> None:
    """Again and again, each time later; what is found in between is what was damaged, and less and less of it."""
    store = made["podman"]
    root = place_of(store)
    damage_all(trees_of(store, root), store.names)
    known = facts(root)
    # The times of directories in which files were replaced are set back in the end.
    times = {
        ("file-changed", name, os.fsdecode(path))
        for name, listing in zip(store.names, store.listings, strict=True)
        for path, node in listing.items()
        if node.type == "directory"
    }
    line = stores.command(root).line("check", "--store", root, "--repair", "--from-archive", store.archive)
    arguments = [os.fsdecode(word) for word in line[line.index("onlap") + 1 :]]
    environment = stores.command(root).environment()
    killed = 0
    for allowed in (0, 1, 2, 5, 12, 25, 40, 70, 110, 160, 230, 320, 1000):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(allowed), *arguments], capture_output=True, text=True, env=environment
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        found = facts(root)
        assert found - times - {each for each in found if each[0] == "staging-left"} <= known
        known = found
    assert killed > 5
    assert_healthy(root)
    assert_same_layers(store, root)
    assert not list(root.rglob(STAGING))


@pytest.mark.parametrize("kind", stores.MAKERS)
def test_what_a_killed_repair_left_in_a_whole_layer(made: Mapping[str, Made], place_of: Copy, kind: str) -> None:
    store = made[kind]
    root = place_of(store)
    left = trees_of(store, root)[0].parent / STAGING
    left.mkdir()
    (left / "data-0").write_bytes(b"half of it")
    *_, summary = stores.command(root).json("check", "--store", root, "--repair")
    assert (summary["ok"], summary["repaired"], summary["left"]) == (True, 1, 0)
    assert not left.exists()


def test_two_repairs_at_once(made: Mapping[str, Made], place_of: Copy) -> None:
    store = made["docker"]
    root = place_of(store)
    damage_all(trees_of(store, root), store.names)
    command = stores.command(root)
    line = command.line("check", "--store", root, "--repair", "--from-archive", store.archive)
    both = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=command.environment())
        for _ in range(2)
    ]
    for each in both:
        _, told = each.communicate()
        assert each.returncode in (0, 1), told
        assert "Traceback" not in told
    assert_healthy(root)
    assert_same_layers(store, root)
    assert not list(root.rglob(STAGING))


# ------------------------------------------------------------------------------------------------------- in use


@contextmanager
def used_by_docker(root: Path) -> Iterator[Path]:
    """A container that runs; gives its own layer."""
    with GraphDockerd(root.parent, "overlay2", root) as dockerd:
        dockerd.docker("run", "--detach", "--network", "none", "--name", "running", NAME, "/bin/tool", "wait")
        dockerd.docker("exec", "running", "/bin/tool", "write", "/own", "its own")
        try:
            yield Path(dockerd.docker("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", "running").strip())
        finally:
            dockerd.docker("rm", "--force", "running")


@contextmanager
def used_by_containerd(root: Path) -> Iterator[Path]:
    with stores.plain_containerd(root.parent) as containerd:
        containerd.ctr("run", "--detach", "--null-io", "--snapshotter", "overlayfs", NAME, "running")
        words = ("--exec-id", "e", "running", "/bin/tool", "write", "/own", "its own")
        containerd.ctr("tasks", "exec", *words)
        mounts = containerd.snapshots("mounts", "/x", "running", snapshotter="overlayfs")
        try:
            yield Path(mounts.partition("upperdir=")[2].partition(",")[0])
        finally:
            containerd.ctr("tasks", "kill", "--signal", "SIGKILL", "running")
            containerd.ctr("tasks", "delete", "--force", "running")
            containerd.ctr("containers", "rm", "running")
        eventually(lambda: "layer-unused" not in {kind for kind, *_ in facts(root)}, "its snapshot is collected")


@contextmanager
def used_by_buildah(root: Path) -> Iterator[Path]:
    tools = Podman(root, root.parent)
    container = tools.buildah("from", "--pull-never", NAME)
    merged = Path(tools.buildah("mount", container))
    (merged / "own").write_text("its own")
    try:
        yield merged.parent / "diff"
    finally:
        tools.buildah("rm", container)


USES = {"docker": used_by_docker, "containerd": used_by_containerd, "podman": used_by_buildah}


@pytest.mark.parametrize("kind", USES)
def test_a_layer_below_a_running_container(made: Mapping[str, Made], place_of: Copy, kind: str) -> None:
    """What can still be read stays as it is, what is gone comes back; the container's own layer is not looked at."""
    store = made[kind]
    root = place_of(store)
    tree = root / store.trees[0]
    with USES[kind](root) as own:
        for what in ("truncated", "mode", "extra", "missing", "a hard link missing"):
            inflict(TREES[what], tree)
        (own / "own").write_bytes(bytes(7))
        os.chmod(own / "own", 0o777)
        kept, before = read_tree(own), read_tree(tree)
        words = ("--repair", "--from-archive", store.archive)
        for options in (*words, "--dry-run"), words:
            told = check(root, *options)
            assert told.status == 1
            refused = "a container uses the layer, and this file can still be read: stop the container first"
            lines = [each.partition("; used by ")[0] for each in told.lines if each.startswith("cannot: ")]
            assert lines == [
                f"cannot: file-changed: {store.names[0]}: /d/mode: {refused}",
                # To link it again, a new file would take the place of its other name.
                f"cannot: file-missing: {store.names[0]}: /d/second0: {refused}",
                f"cannot: file-changed: {store.names[0]}: /d/truncated: {refused}",
                f"cannot: file-unknown: {store.names[0]}: /more: {refused}",
            ]
        assert "repaired 1, left 4" in told.lines
        assert_same_tree(kept, own)
        now = read_tree(tree)
        changed = {path for path, node in now.items() if node != before.get(path)}
        assert changed == {b"d/gone"}
        assert not before.keys() - now.keys()
    layers = [each for each in stores.opened(root).layers() if each.name == store.names[0]]
    eventually(lambda: not any(map(is_mounted, layers)), "the container's mount namespace is gone")
    told = check(root, *words)
    assert "repaired 4, left 0" in told.lines
    assert_same_layers(store, root)


# ------------------------------------------------------------------------------------------------------ sources


def test_without_a_source(made: Mapping[str, Made], place_of: Copy) -> None:
    """A layer whose data is all there proves its headers, and is repaired; one with lost data is left as it is."""
    store = made["docker"]
    root = place_of(store)
    for what in ("mode", "whiteout missing", "truncated"):
        inflict(TREES[what], root / store.trees[TREES[what].layer])
    told = check(root, "--repair")
    assert told.status == 1
    assert "repaired 1, left 2" in told.lines, "\n".join(told.lines)
    planned = [each.partition("; used by ")[0] for each in told.lines if each.startswith(("plan: ", "cannot: "))]
    assert sorted(planned) == [
        *(
            f"cannot: file-changed: {store.names[0]}: /d/{name}: without all data of the layer, nothing proves what it "
            "held; give --from-registry, --from-content or --from-archive"
            for name in ("mode", "truncated")
        ),
        f"plan: file-missing: {store.names[1]}: /hidden: to be restored",
    ]
    assert (root / store.trees[0] / "d/truncated").stat().st_size == 5
    assert check(root, "--repair", "--from-archive", store.archive).status == 0
    assert_same_layers(store, root)


@pytest.mark.parametrize("is_lying", [False, True])
def test_an_archive_that_does_not_have_the_layer(
    made: Mapping[str, Made], place_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lying: bool
) -> None:
    """As of an image that was built again, also if it says that it has it: its files are not taken."""
    store = made["podman"]
    root = place_of(store)
    inflict(TREES["truncated"], root / store.trees[0])
    layer = stores.Raw().directory(b"d").add(b"d/truncated", b"another file").done()
    if is_lying:
        monkeypatch.setattr(images, "compressed", lambda _layer, _how: gzip.compress(layer))
    named = store.image.layers if is_lying else (layer,)
    other = images.write(tmp_path / "other.tar", NAME, named, ["gzip"] * len(named))
    before = stores.everything(root)
    told = check(root, "--repair", "--from-archive", other.archive)
    assert told.status == 1
    assert "repaired 0, left 1" in told.lines
    trees = {path: value for path, value in before.items() if b"/diff" in path}
    now = stores.everything(root)
    assert trees == {path: value for path, value in now.items() if b"/diff" in path}


def test_a_containerd_root_as_a_source(made: Mapping[str, Made], place_of: Copy) -> None:
    """The blobs of the same layers, which are compressed there, for Docker; and its own, for containerd."""
    docker, containerd = made["docker"], made["containerd"]
    root = place_of(docker)
    inflict(TREES["an opaque directory missing"], root / docker.trees[1])
    told = check(root, "--repair", "--from-content", containerd.root)
    assert told.status == 0, told
    assert any(f"refilled from the blob in {containerd.root}" in each for each in told.lines)
    assert_same_layers(docker, root)

    root = place_of(containerd)
    damage_all(trees_of(containerd, root), containerd.names)
    told = check(root, "--repair", "--from-content")
    assert told.status == 0, told
    assert any("refilled from its blob in the store" in each for each in told.lines)
    assert_same_layers(containerd, root)


# --------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("kind", stores.MAKERS)
def test_the_parts_of_a_check_find_what_the_whole_does(made: Mapping[str, Made], place_of: Copy, kind: str) -> None:
    store = made[kind]
    root = place_of(store)
    damage_all(trees_of(store, root), store.names)
    (root / store.trees[2]).parent.joinpath("work").exists()
    whole = check(root, json=True)
    found, last = whole.items[:-1], whole.items[-1]["checked"]
    assert last["after"] is None
    parts: list[dict[str, object]] = []
    after: list[str] = []
    counted = {"snapshots": 0, "files": 0, "size": 0}
    calls = 0
    while True:
        *more, summary = check(root, "--max-duration", "0.000001", "--rate", "500M", *after, json=True).items
        parts += more
        calls += 1
        assert calls <= len(store.names)
        counted = {name: value + summary["checked"][name] for name, value in counted.items()}
        if summary["checked"]["after"] is None:
            break
        after = ["--after", summary["checked"]["after"]]
    assert calls == len(store.names)
    assert parts == found
    assert counted == {name: last[name] for name in counted}


@pytest.mark.needs("ext4", "loop", "peer:debugfs", "peer:e2fsck")
def test_files_that_the_kernel_cannot_look_at(made: Mapping[str, Made], loop_fs: Callable[..., Path]) -> None:
    """As after a power cut: they are named, with what else is wrong; behind fsck, which drops them, they come back."""
    store = made["podman"]
    mounted = loop_fs("ext4", 100)
    root = stores.copied(store.root, mounted / "storage")
    inflict(TREES["zeroed"], root / store.trees[0])
    device = run("findmnt", "--noheadings", "--output", "SOURCE", mounted).strip()
    run("umount", mounted)
    for name in ("d/truncated", "opaque"):
        run("debugfs", "-w", "-R", f"set_inode_field /storage/{store.trees[0]}/{name} block[0] 0", device)
    run("mount", device, mounted)
    users = frozenset(store.users)
    unreadable = ["d/truncated", "opaque", "opaque/below", "opaque/below/f", "opaque/hidden"]
    words = ("--repair", "--from-archive", store.archive)
    for repaired in False, True:
        found = looked(root)
        assert sorted((each.kind, each.path or "", each.detail) for each in found.findings) == [
            *([] if repaired else [("file-changed", "d/zeroed", "content")]),
            *(("file-unreadable", path, "Structure needs cleaning") for path in unreadable),
        ]
        assert {each.thing for each in found.findings} == {store.names[0]}
        assert {frozenset(each.users) for each in found.findings} == {users}
        told = check(root, *words)
        assert f"repaired {0 if repaired else 1}, left 5" in told.lines
    run("umount", mounted)
    subprocess.run(["e2fsck", "-fy", device], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    run("mount", device, mounted)
    told = check(root, *words)
    assert told.status == 0, told
    assert_healthy(root)
    assert_same_layers(store, root)


def test_a_source_that_is_damaged_itself(made: Mapping[str, Made], place: Path, place_of: Copy) -> None:
    """The list of a layer is made of the next source that has the layer."""
    store, broken = made["docker"], place / "broken"
    root = place_of(store)
    stores.copied(made["containerd"].root, broken)
    for blob in (broken / "io.containerd.content.v1.content" / "blobs" / "sha256").iterdir():
        os.truncate(blob, blob.stat().st_size - min(blob.stat().st_size, 300))
    (layer,) = (each for each in stores.opened(root).layers() if each.name == store.names[1])
    assert layer.split is not None
    os.truncate(layer.split, 100)
    done = check(root, "--repair", "--from-content", broken, "--from-content", made["containerd"].root)
    assert done.status == 0, (done.lines, done.errors)
    assert_healthy(root)


@pytest.mark.parametrize("name", ["lower", "link"])
def test_a_file_that_the_disk_does_not_give(
    made: Mapping[str, Made], place_of: Copy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is like one that is lost: the check goes on."""
    store = made["docker"]
    root = place_of(store)
    path = trees_of(store, root)[1].parent / name

    def open_file(opened: str) -> BinaryIO:
        if Path(opened) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), opened)
        return files.open_file(opened)

    monkeypatch.setattr(layout, "open_file", open_file)
    assert {(each.kind, each.thing) for each in looked(root).findings} == {
        ("lower-wrong" if name == "lower" else "link-missing", store.names[1])
    }
