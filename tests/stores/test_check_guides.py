"""The guides for the time after a power cut, command by command, on real stores that are damaged as the pages say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from peer_stores import making as stores
from peer_stores.damages import same_times
from peer_stores.making import Podman, Raw
from peers import images
from peers.daemons import eventually
from peers.graphdrivers import GraphDockerd
from peers.registries import registry

pytestmark = pytest.mark.needs(*stores.NEEDS, "peer:runc", "peer:docker-registry")
PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"
LIBRARY = b"a library of the app\n" * 100


class Step(NamedTuple):
    """A command of a page, and what the page shows of its output."""

    words: list[str]
    shown: list[str]


def steps(page: str) -> list[Step]:
    text = (PAGES / page).read_text()
    found: list[Step] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# "):
                found.append(Step(shlex.split(line.removeprefix("# ")), []))
            else:
                found[-1].shown.append(line)
    assert found
    return found


def masked(line: str, root: Path) -> str:
    """A line without what differs from machine to machine."""
    line = line.replace(str(root), "STORE")
    line = re.sub(r"STORE|/var/lib/(docker|containerd|containers/storage)", "STORE", line)
    line = re.sub(r"127\.0\.0\.1:[0-9]+|localhost|registry\.example", "HOST", line)
    line = re.sub(r"[0-9a-f]{64}|[0-9a-f]{4}\.\.\.([0-9a-f]{4})?", "ID", line)
    line = re.sub(r"it has [0-9,]+ bytes?, not [0-9,]+", "it has SIZES", line)
    return re.sub(r"(?<=: )[0-9]+ layers?, [0-9,]+ files?, [0-9.]+ [KM]?i?B", "AMOUNTS", line)


def follow(page: str, root: Path, place: Path, *more: str) -> None:
    """Run the commands of a page; the last one leaves nothing damaged.

    Args:
        page: its name.
        root: the store.
        place: where archives are.
        more: options of a repair which this machine needs.
    """
    command = stores.command(place)
    command.directory = place
    every = steps(page)
    told_before: set[str] = set()
    for number, step in enumerate(every):
        program, *words = step.words
        assert program == "onlap"
        words = [re.sub(r"^/var/lib/(docker|containerd|containers/storage)$", str(root), word) for word in words]
        assert str(root) in words
        done = command.run(*words, *(more if "--repair" in words else ()))
        assert done.stderr == ""
        assert done.returncode == (0 if number == len(every) - 1 else 1), done.stdout
        told = [masked(line, root) for line in done.stdout.splitlines()]
        rest = iter(told)
        for line in step.shown:
            assert masked(line, root) in rest, (line, done.stdout)
        if step.shown:
            others = set(told) - {masked(line, root) for line in step.shown} - told_before
            assert all(each.startswith("to repair it: ") for each in others), others
        told_before |= set(told)
    assert command.run("check", "--store", root).returncode == 0


def app(place: Path, tool: Path, name: str) -> images.Image:
    layer = Raw().directory(b"bin").add(b"bin/tool", tool.read_bytes(), mode=0o755)
    layer.directory(b"usr").directory(b"usr/lib").add(b"usr/lib/libapp.so", LIBRARY)
    upper = Raw().directory(b"etc").add(b"etc/app", b"configured")
    return images.write(place / "image.tar", name, (layer.done(), upper.done()), ("gzip", "gzip"))


def tree_with(root: Path, name: str) -> Path:
    (tree,) = {Path(each.tree) for each in stores.opened(root).layers() if (Path(each.tree) / name).exists()}
    return tree


def keep_time(path: Path, change: bytes | None) -> None:
    """Change a file, or remove it, and leave all times as they are, as a power cut does."""
    with same_times(path.parents[1]):
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change)


def test_docker(place: Path, tool: Path) -> None:
    """While it runs."""
    where = place / "docker"
    where.mkdir()
    root = where / "data"
    with GraphDockerd(where, "overlay2", root) as dockerd:
        dockerd.docker("load", "--input", stores.as_docker_archive(app(where, tool, "app:1")))
        dockerd.docker("create", "--name", "web", "--network", "none", "app:1", "/bin/tool", "cat", "/etc/app")
        dockerd.docker("save", "--output", where / "app.tar", "app:1")
        path = tree_with(root, "bin/tool") / "bin/tool"
        keep_time(path, bytes(path.stat().st_size))
        follow("power-cut-docker.md", root, where)
        assert dockerd.docker("start", "--attach", "web") == "configured"
        dockerd.docker("rm", "web")


def test_containerd(place: Path, tool: Path) -> None:
    """While it runs, with the namespace of Kubernetes."""
    where = place / "containerd"
    where.mkdir()
    root, name = where / "root", "registry.example/app:1"
    with stores.plain_containerd(where) as containerd:
        kubernetes = ("--namespace", "k8s.io")
        image = app(where, tool, name)
        containerd.ctr(*kubernetes, "images", "import", "--snapshotter", "overlayfs", image.archive)
        path = tree_with(root, "bin/tool") / "bin/tool"
        keep_time(path, path.read_bytes()[:4096])
        follow("power-cut-containerd.md", root, where)
        words = ("run", "--rm", "--snapshotter", "overlayfs", name, "c", "/bin/tool", "cat", "/etc/app")
        assert containerd.ctr(*kubernetes, *words) == "configured"
        eventually(lambda: not stores.looked(root).findings, "the container's snapshot is collected")


def test_podman(place: Path, tool: Path) -> None:
    """With the registry that the image came from."""
    where = place / "podman"
    where.mkdir()
    tools = Podman(where / "storage", where)
    with registry(where / "registry") as host:
        name = f"{host}/app:1"
        image = app(where, tool, name)
        tools.podman("load", "-i", image.archive)
        tools.podman("push", "--tls-verify=false", name)
        tools.podman("rmi", name)
        tools.podman("pull", "--tls-verify=false", name)
        path = tree_with(tools.root, "usr/lib/libapp.so") / "usr/lib/libapp.so"
        keep_time(path, None)
        follow("power-cut-podman.md", tools.root, where, "--plain-http")
    assert path.read_bytes() == LIBRARY
    tools.podman("save", "--format=oci-archive", "-o", where / "saved.tar", name)
