"""Healthy stores of all kinds, made by the daemons themselves: nothing is found, and all is compared that can be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from peer_stores import making as stores
from peer_stores.damages import damage_all
from peer_stores.making import NAME, Made, Podman, Raw, assert_healthy, assert_same_layers, check
from peers import images
from peers.daemons import Containerd, Dockerd
from peers.graphdriver_story import OFFLINE, base_layer, tell
from peers.graphdrivers import GraphDockerd
from peers.registries import registry

pytestmark = pytest.mark.needs(*stores.NEEDS, "peer:runc", "peer:buildah", "gopkg:github.com/containerd/containerd")
# The fixture `containerd` reads this, and unpacks with Onlap's differ.
DIFFER = True


@pytest.mark.skipif(
    not Path("/usr/libexec/docker/cli-plugins/docker-buildx").exists(), reason="no docker-buildx: make peers"
)
def test_docker(place: Path, tool: Path) -> None:
    """Imported, built in both ways, committed, saved and loaded; with a container that runs, and without a daemon."""
    where = place / "docker"
    where.mkdir()
    with GraphDockerd(where, "overlay2", where / "data") as dockerd:
        tell(dockerd, where, tool)
        for image in (stores.awkward(where, tool), stores.sparse(where)):
            dockerd.docker("load", "--input", stores.as_docker_archive(image))
        dockerd.docker("run", "--detach", *OFFLINE, "--name", "running", NAME, "/bin/tool", "wait")
        dockerd.docker("exec", "running", "/bin/tool", "write", "/d/truncated", "a container may")
        # tar-split has the data of a sparse file with its holes, and no way back.
        found = assert_healthy(where / "data", unlisted=1)
        assert found.snapshots > 20
        dockerd.docker("rm", "--force", "running")
    assert_healthy(where / "data", unlisted=1)


@pytest.fixture(scope="module")
def archives(place: Path, tool: Path) -> list[Path]:
    """The images for containerd."""
    where = place / "images"
    where.mkdir()
    return [stores.awkward(where, tool, twice=True).archive, stores.sparse(where).archive]


def test_containerd_with_our_differ(containerd: Containerd, archives: list[Path]) -> None:
    """While it runs; both of its snapshotters, and a container."""
    for snapshotter in ("overlayfs", "native"):
        for archive in archives:
            containerd.ctr("images", "import", "--snapshotter", snapshotter, archive)
    containerd.ctr("run", "--detach", "--null-io", "--snapshotter", "overlayfs", NAME, "c")
    root = containerd.place / "root"
    try:
        found = assert_healthy(root)
        assert found.snapshots == 10
    finally:
        containerd.ctr("tasks", "kill", "--signal", "SIGKILL", "c")
        containerd.ctr("tasks", "delete", "--force", "c")
        containerd.ctr("containers", "rm", "c")


def test_docker_on_containerd(place: Path, containerd: Containerd, tool: Path) -> None:
    """Docker with the containerd image store."""
    where = place / "dc"
    where.mkdir()
    layer = where / "base.tar"
    layer.write_bytes(base_layer(tool))
    with Dockerd(where, containerd.socket, "overlayfs") as dockerd:
        dockerd.docker("load", "--input", stores.as_docker_archive(stores.sparse(where)))
        dockerd.docker("import", layer, "base:1")
        dockerd.docker("run", "--detach", *OFFLINE, "--name", "box", "base:1", "/bin/tool", "wait")
        dockerd.docker("exec", "box", "/bin/tool", "write", "/d/new", "new")
        try:
            # Not compared: the snapshot in which Docker makes the container's /etc/hosts and the like.
            found = assert_healthy(containerd.place / "root", unlisted=1)
            known = {name for each in stores.opened(containerd.place / "root").layers() for name in each.users}
            assert {"docker.io/library/base:1"} < known
            assert found.snapshots >= 2
            dockerd.docker("commit", "box", "committed:1")
            assert_healthy(containerd.place / "root", unlisted=1)
        finally:
            dockerd.docker("rm", "--force", "box")


def test_containerd_with_its_own_differ(place: Path, archives: list[Path]) -> None:
    """In two namespaces; also after it was stopped."""
    where = place / "plain"
    where.mkdir()
    with stores.plain_containerd(where) as containerd:
        for archive in archives:
            containerd.ctr("images", "import", "--snapshotter", "native", archive)
            containerd.ctr("--namespace", "other", "images", "import", "--snapshotter", "overlayfs", archive)
        assert assert_healthy(where / "root").snapshots == 10
    assert_healthy(where / "root")


def test_podman_and_buildah(place: Path, tool: Path) -> None:
    """Loaded in both formats, imported, committed by Buildah, and a container that is mounted."""
    where = place / "podman"
    where.mkdir()
    tools = Podman(where / "storage", where)
    image, sparse = stores.awkward(where, tool), stores.sparse(where)
    tools.podman("load", "-i", image.archive)
    tools.podman("load", "-i", stores.as_docker_archive(sparse))
    (where / "base.tar").write_bytes(base_layer(tool))
    tools.podman("import", where / "base.tar", "localhost/base:1")
    container = tools.buildah("from", "--pull-never", "localhost/base:1")
    tree = Path(tools.buildah("mount", container))
    (tree / "d/a").unlink()
    shutil.rmtree(tree / "d/sub")
    (tree / "d/sub").mkdir()
    (tree / "d/sub/new").write_text("new")
    tools.buildah("commit", "--rm=false", container, "localhost/committed:1")
    (tree / "d/b").unlink()
    try:
        assert assert_healthy(tools.root, unlisted=1).snapshots == 7
    finally:
        tools.buildah("rm", container)
    assert_healthy(tools.root, unlisted=1)


@pytest.mark.needs("loop")
@pytest.mark.parametrize("filesystem", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("xfs", "btrfs")])
def test_other_filesystems(
    loop_fs: Callable[..., Path], filesystem: str, made: Mapping[str, Made], tmp_path: Path
) -> None:
    """Also what is damaged there comes back as it was."""
    image = made["podman"].image
    root = loop_fs(filesystem, 400) / "storage"
    tools = Podman(root, tmp_path / "work")
    tools.podman("load", "-i", image.archive)
    assert assert_healthy(root).snapshots == 4
    store = stores.made(root, image, image.archive, (NAME,))
    damage_all([root / each for each in store.trees], store.names)
    told = check(root, "--repair", "--from-archive", image.archive)
    assert told.status == 0, told
    assert_healthy(root)
    assert_same_layers(store, root)


@pytest.mark.needs("peer:docker-registry")
@pytest.mark.parametrize(
    "form, options",
    [
        ("zstd:chunked", {"enable_partial_images": "true", "use_hard_links": "true"}),
        ("gzip", {"enable_partial_images": "true", "convert_images": "true"}),
    ],
    ids=["of parts, with hard links", "converted"],
)
def test_podman_that_pulls_otherwise(place: Path, tool: Path, form: str, options: Mapping[str, str]) -> None:
    """It gives directories and symlinks no time, makes no FIFOs, and shares files of equal content between layers."""
    where = place / f"podman-{form.replace(':', '-')}"
    where.mkdir()
    source, tools = Podman(where / "source", where / "s"), Podman(where / "storage", where / "t")
    lines = "".join(f'{key} = "{value}"\n' for key, value in {"convert_images": "false", **options}.items())
    settings = where / "storage.conf"
    settings.write_text(f'[storage]\ndriver = "overlay"\n[storage.options.pull_options]\n{lines}')
    base = base_layer(tool)
    large, small = b"x" * 200_000, b"1"
    later, earlier = (
        Raw().directory(b"d").add(b"d/large", large, mtime=time).add(b"d/small", small, mtime=time).done()
        for time in (1_700_000_005, 1_700_000_009)
    )
    words = ("--tls-verify=false",)
    with registry(where / "registry") as host, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(settings))
        for number, layers in enumerate(((base, later), (base, earlier))):
            name = f"localhost/onlap/pulled-{number}:1"
            archive = images.write(where / f"{number}.tar", name, layers, ("gzip", "gzip")).archive
            source.podman("load", "-i", archive)
            source.podman(
                "push", *words, f"--compression-format={form}", "--force-compression", name, f"{host}/{number}:1"
            )
        for number in range(2):
            tools.podman("pull", *words, f"{host}/{number}:1")
    assert assert_healthy(where / "storage").snapshots == 3
