"""``onlap check --store --repair`` on stores with all damages at once, and the daemons on what was repaired."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from peer_stores import making as stores
from peer_stores.damages import damage_all
from peer_stores.making import NAME, TEXT, Made, Podman, assert_same_layers, check, looked
from peers.daemons import eventually, output, run
from peers.graphdrivers import GraphDockerd

pytestmark = pytest.mark.needs(*stores.NEEDS, "peer:runc", "peer:buildah")
KINDS = tuple(stores.MAKERS)
# What containers print of the repaired files.
PRINTED = ("d/truncated", "d/zeroed", "d/gone", "d/second0", "d/lost/f", "implied/deep/f", "opaque/new")
OFFLINE = ("--network", "none")


def named(path: str | dict[str, str]) -> str:
    """A path in JSON, which has those that are not UTF-8 in base64."""
    return path if isinstance(path, str) else os.fsdecode(base64.b64decode(path["bytes"]))


def printed(store: Made) -> bytes:
    """What the words of :func:`words` print."""
    assert {os.fsencode(each) for each in PRINTED} <= {path for listing in store.listings for path in listing}
    contents = [f"{each.removeprefix('d/')}: ".encode() + TEXT for each in PRINTED[:3]]
    return b"".join((*contents, TEXT + b"0", TEXT, TEXT, TEXT))


def words() -> list[str]:
    return " -- ".join(f"cat /{each}" for each in PRINTED).split()


def run_docker(store: Made, root: Path) -> None:
    with GraphDockerd(root.parent, "overlay2", root) as dockerd:
        docker = ["docker", "--host", f"unix://{dockerd.socket}"]
        assert output(*docker, "run", "--rm", *OFFLINE, NAME, "/bin/tool", *words()) == printed(store)
        assert dockerd.docker("start", "box").strip() == "box"
        dockerd.docker("rm", "--force", "box")
        # It makes each layer's archive from tree and tar-split, and it has the digests of before.
        dockerd.docker("save", "--output", root.parent / "saved.tar", NAME)
    listed = run("skopeo", "inspect", "--config", f"docker-archive:{root.parent / 'saved.tar'}")
    assert all(stores.digest(each) in listed for each in store.image.layers)


def run_containerd(store: Made, root: Path) -> None:
    with stores.plain_containerd(root.parent) as containerd:
        command = [
            "ctr",
            "--address",
            str(containerd.socket),
            "run",
            "--rm",
            "--snapshotter",
            "overlayfs",
            NAME,
            "proof",
        ]
        assert output(*command, "/bin/tool", *words()) == printed(store)
        containerd.ctr("containers", "rm", "box")
        eventually(lambda: not looked(root).findings, "the snapshots of the containers are collected")


def run_podman(store: Made, root: Path) -> None:
    tools = Podman(root, root.parent)
    container = tools.buildah("from", "--pull-never", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", NAME)
    told = output("buildah", *tools.options, "run", "--isolation", "chroot", container, "/bin/tool", *words())
    assert told == printed(store)
    tools.buildah("rm", container)
    (root / "db.sql").unlink()  # which says where the root was
    tools.podman("save", "--format=oci-archive", "-o", root.parent / "saved.tar", NAME)
    listed = run("skopeo", "inspect", "--config", f"oci-archive:{root.parent / 'saved.tar'}")
    assert all(stores.digest(each) in listed for each in store.image.layers)


def assert_kept(store: Made, root: Path) -> None:
    """What was in the way is beside the tree, in a directory for each repair."""
    (kept,) = ((root / store.trees[0]).parent / "onlap-damaged").iterdir()
    assert (kept / "fs/d/truncated").stat().st_size == 5
    assert not (kept / "fs/d/zeroed").read_bytes().strip(b"\0")
    for name in ("more/in", "d/swapped/in"):
        assert (kept / "fs" / name).read_bytes() == b"in it"
    assert (kept / "fs/d/file-now").read_bytes() == b"a file"
    assert not (kept / "fs/d/gone").exists()


RUNS = {"docker": run_docker, "containerd": run_containerd, "podman": run_podman}


@pytest.mark.parametrize("kind", KINDS)
def test_all_damages_at_once(made: Mapping[str, Made], place_of: Callable[[Made], Path], kind: str) -> None:
    """The command finds all of them, plans, and repairs; the daemon's containers have what they had."""
    store = made[kind]
    root = place_of(store)
    expected = sorted(damage_all([root / each for each in store.trees], store.names))
    checked = check(root)
    assert checked.status == 1
    assert checked.errors == ""
    *shown, summary, remedy = checked.lines
    assert len(shown) == len(expected) > 40
    users = ", ".join(sorted(store.users) if kind == "docker" else store.users)
    assert (
        f"error: file-changed: {store.names[0]}: /d/truncated: a file of a committed layer is not what was committed "
        f"(size: it has 5 bytes, not 1,851); used by {users}"
    ) in shown
    assert f"warning: file-unknown: {store.names[0]}: /more: a committed layer has a file that was not committed" in (
        line.partition(";")[0] for line in shown
    )
    assert all(line.endswith(f"; used by {users}") for line in shown)
    assert summary.startswith("checked ")
    assert remedy.startswith(f"to repair it: onlap check --store {root} --repair, with a source: ")
    json = check(root, json=True)
    assert json.status == 1
    *found, last = json.items
    told = [(each["kind"], each["thing"], named(each["path"]), each["detail"]) for each in found]
    assert sorted((*others, detail.partition(":")[0]) for *others, detail in told) == expected
    assert last["ok"] is False

    before = stores.everything(root)
    planned = check(root, "--repair", "--from-archive", store.archive, "--dry-run")
    assert planned.status == 1
    assert sum(each.startswith("plan: ") for each in planned.lines) == len(expected), planned.lines
    assert stores.everything(root) == before

    repaired = check(root, "--repair", "--from-archive", store.archive)
    assert f"repaired {len(expected)}, left 0" in repaired.lines, repaired.lines
    assert repaired.status == 0
    assert_same_layers(store, root)
    assert_kept(store, root)
    again = check(root)
    assert (again.status, again.lines[0].rpartition(": ")[2]) == (0, "nothing found")
    RUNS[kind](store, root)
    stores.assert_healthy(root)
