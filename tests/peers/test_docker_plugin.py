"""A real dockerd on Onlap's graph drivers, beside the same dockerd on its own overlay2."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from onlap.check.stores.docker.data_root import open_root
from onlap.check.stores.docker.store import Docker
from onlap.check.stores.doctor import Doctor
from onlap.graphdrivers import open_driver
from onlap.mounts import mountinfo
from onlap.testing.same import assert_same_tree
from peers.daemons import eventually
from peers.graphdriver_story import OFFLINE, Seen, base_layer, exported, tell, tree
from peers.graphdrivers import GraphDockerd, Plugin, plugin_directory

pytestmark = [
    pytest.mark.needs(
        "overlay",
        "peer:dockerd",
        "peer:docker",
        "peer:containerd",
        "peer:runc",
        "gopkg:github.com/containerd/containerd",
    ),
    pytest.mark.skipif(
        not Path("/usr/libexec/docker/cli-plugins/docker-buildx").exists(), reason="no docker-buildx: make peers"
    ),
]

DRIVERS = ("overlay", "overlay2")


class Peer(NamedTuple):
    """dockerd's own driver: what its script saw, what ``docker export`` gave, and the data root that it left."""

    seen: Seen
    exported: dict[str, tuple[object, ...]]
    data: Path


@pytest.fixture(scope="module")
def sockets(place: Path) -> Iterator[Path]:
    with plugin_directory(place) as directory:
        yield directory


@pytest.fixture(scope="module")
def peer(place: Path, tool: Path) -> Peer:
    """What is seen on dockerd's own overlay2."""
    where = place / "peer"
    where.mkdir()
    with GraphDockerd(where, "overlay2", where / "data") as dockerd:
        seen = tell(dockerd, where, tool)
        return Peer(seen, exported(dockerd, "base:1"), where / "data")


def mounts_below(directory: Path) -> list[bytes]:
    return mountinfo.below(os.fsencode(directory))


def layers_in(home: Path) -> list[str]:
    """The layers that a driver holds."""
    return [name for name in os.listdir(home) if name != "l" and not name.startswith(".")]


def forget_everything(dockerd: GraphDockerd) -> None:
    dockerd.docker("rmi", "--force", "base:1", "built:1", "built:2", "committed:1")
    dockerd.docker("system", "prune", "--all", "--force")


@pytest.mark.parametrize("driver", DRIVERS)
def test_docker_shows_the_same_as_on_its_own_driver(
    driver: str, place: Path, sockets: Path, peer: Peer, tool: Path
) -> None:
    """The whole script, then a restart of dockerd and of the plugin, then everything goes."""
    where = place / driver
    where.mkdir()
    home = where / "data" / f"onlap-{driver}"
    with ExitStack() as stack:
        plugin = stack.enter_context(Plugin(where, f"onlap-{driver}", driver, sockets))
        dockerd = stack.enter_context(GraphDockerd(where, f"onlap-{driver}", where / "data"))
        info = json.loads(dockerd.docker("info", "--format", "{{json .}}"))
        assert info["Driver"] == f"onlap-{driver}"
        assert ["Onlap", driver] in info["DriverStatus"]

        seen = tell(dockerd, where, tool)
        assert seen.keys() == peer.seen.keys()
        for what, value in seen.items():
            assert value == peer.seen[what], what

        # Kept over restarts of both; the plugin's, under a dockerd that goes on, is one that it is not told of.
        assert dockerd.stop() == 0
        plugin.restart()
        dockerd.start()
        assert tree(dockerd, "built:1") == peer.seen["built"]
        assert not mounts_below(home)
        dockerd.docker("run", "--detach", *OFFLINE, "--name", "running", "base:1", "/bin/tool", "wait")
        assert len(mounts_below(home)) == 1
        plugin.kill()
        plugin.start()
        dockerd.docker("exec", "running", "/bin/tool", "write", "/d/late", "1")
        assert dockerd.docker("diff", "running").splitlines() == ["C /d", "A /d/late"]
        dockerd.docker("rm", "--force", "running")
        assert not mounts_below(home)
        assert tree(dockerd, "committed:1") == peer.seen["committed"]

        forget_everything(dockerd)
        eventually(lambda: not layers_in(home), "no layer is left after docker system prune")
        assert driver == "overlay" or not os.listdir(home / "l")

        # Last, for what it leaves.
        dockerd.docker("import", where / "base.tar", "base:1")
        assert exported(dockerd, "base:1") == peer.exported
        if driver == "overlay2":
            found = open_root(str(where / "data"))
            assert sorted(layer.kind for layer in found.layers.values()) == ["image", "unused", "unused"]
            assert found.find("base:1").kind == "image"
            checked = list(Doctor(Docker(str(where / "data"))).findings())
            assert [finding.kind for finding in checked] == ["layer-unused", "layer-unused"]
    assert not mounts_below(where)


def test_a_directory_of_dockers_own_driver(peer: Peer, place: Path, sockets: Path) -> None:
    """Every layer is found, shown, and gives a difference from which the same layer can be made; dockerd goes on."""
    data = place / "copy" / "data"
    shutil.copytree(peer.data / "image", data / "image", symlinks=True)
    home = data / "overlay2"
    home.mkdir(parents=True)
    # cp keeps hard links, xattrs and whiteouts.
    assert os.spawnlp(os.P_WAIT, "cp", "cp", "-a", f"{peer.data}/overlay2/.", str(home)) == 0
    chains = cache_ids(data, "overlay2")
    assert len(chains) >= 10
    driver = open_driver("overlay2", str(home), sync="none")
    try:
        for id, parent in chains.items():
            assert driver.exists(id)
            out = io.BytesIO()
            driver.diff(id, parent, out)
            driver.create("again", parent)
            driver.apply_diff("again", parent, io.BytesIO(out.getvalue()))
            assert driver.changes(id, "again") == []
            assert_same_tree(driver.get(id), driver.get("again"))
            for each in (id, "again"):
                driver.put(each)
            driver.remove("again")
    finally:
        driver.cleanup()
        driver.close()
    home.rename(data / "onlap-c")
    (data / "image" / "overlay2").rename(data / "image" / "onlap-c")
    with (
        Plugin(place / "copy", "onlap-c", "overlay2", sockets),
        GraphDockerd(place / "copy", "onlap-c", data) as dockerd,
    ):
        assert tree(dockerd, "built:1") == peer.seen["built"]
        assert tree(dockerd, "committed:1") == peer.seen["committed"]


def cache_ids(data: Path, driver: str) -> dict[str, str]:
    """Every image layer's id in the driver, with its parent's or nothing (layer/filestore.go)."""
    layers = data / "image" / driver / "layerdb" / "sha256"
    ids = {layer.name: (layer / "cache-id").read_text() for layer in layers.iterdir()}
    found = {}
    for layer in layers.iterdir():
        parent = layer / "parent"
        found[ids[layer.name]] = ids[parent.read_text().removeprefix("sha256:")] if parent.exists() else ""
    return found


def test_dockers_own_driver_runs_what_was_built_on_ours(place: Path, sockets: Path, peer: Peer, tool: Path) -> None:
    where = place / "handed-over"
    where.mkdir()
    data = where / "data"
    with Plugin(where, "onlap-h", "overlay2", sockets), GraphDockerd(where, "onlap-h", data) as dockerd:
        archive = where / "base.tar"
        archive.write_bytes(base_layer(tool))
        dockerd.docker("import", archive, "base:1")
        dockerd.docker("load", "--input", place / "peer" / "saved.tar")
    (data / "onlap-h").rename(data / "overlay2")
    (data / "image" / "onlap-h").rename(data / "image" / "overlay2")
    with GraphDockerd(where, "overlay2", data) as dockerd:
        assert tree(dockerd, "built:1") == peer.seen["built"]
        assert tree(dockerd, "committed:1") == peer.seen["committed"]
        assert dockerd.docker("run", "--rm", *OFFLINE, "committed:1", "/bin/tool", "cat", "/added/f") == "added"
        saved = where / "saved.tar"
        dockerd.docker("save", "--output", saved, "built:1")  # dockerd compares every layer with its digest
        dockerd.docker("rmi", "base:1", "built:1", "committed:1")
        # The container of "docker run --rm" goes after its command has ended.
        eventually(lambda: not layers_in(data / "overlay2"), "no layer is left after docker rmi")
