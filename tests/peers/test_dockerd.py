"""A real dockerd with the containerd image store, on a containerd whose snapshotter and differ is Onlap."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.daemons import Containerd, Dockerd, Onlap, eventually
from peers.images import Image

pytestmark = pytest.mark.needs(
    "overlay",
    "peer:dockerd",
    "peer:docker",
    "peer:containerd",
    "peer:runc",
    "gopkg:github.com/containerd/containerd",
)

OFFLINE = ("--network", "none")

DOCKERFILE = """\
FROM base:1
COPY f /copied
RUN ["/bin/tool", "rm", "/d/kept", "--", "write", "/built", "by a container"]
RUN ["/bin/tool", "rm", "/opaque", "--", "mkdir", "/opaque", "--", "write", "/opaque/new", "1"]
CMD ["/bin/tool", "cat", "/copied", "--", "cat", "/built"]
"""


@pytest.fixture(scope="module")
def onlap(place: Path) -> Iterator[Onlap]:
    """Onlap's server, which unpacks and makes the layers as well."""
    with Onlap(place, "--sync", "none", differ=True) as daemon:
        yield daemon
        assert {*daemon.answers("Apply"), *daemon.answers("Diff")} <= {"0"}, "nothing was left to another differ"


@pytest.fixture(autouse=True)
def driver(dockerd: Dockerd) -> None:
    """The storage driver is Onlap's, whatever dockerd would have taken by itself."""
    assert dockerd.docker("info", "--format", "{{.Driver}}").strip() == "onlap"


@pytest.fixture
def base(dockerd: Dockerd, image: Image, place: Path) -> str:
    """The image ``base:1``, from ``docker import``."""
    layer = place / "base.tar"
    layer.write_bytes(image.layers[0])
    dockerd.docker("import", layer, "base:1")
    return "base:1"


def forget(dockerd: Dockerd, onlap: Onlap, *images: str) -> None:
    """Remove images and the builder's cache; nothing is left in the root."""
    dockerd.docker("rmi", *images)
    dockerd.docker("builder", "prune", "--all", "--force")
    eventually(onlap.is_bare, "the root is bare after docker rmi")


def test_import_run_diff_commit(dockerd: Dockerd, onlap: Onlap, base: str) -> None:
    changes = ["write", "/d/changed", "x", "--", "rm", "/one", "--", "mkdir", "/new", "--", "write", "/new/f", "y"]
    dockerd.docker("run", *OFFLINE, "--name", "changer", base, "/bin/tool", *changes)
    diff = set(dockerd.docker("diff", "changer").splitlines())
    assert diff == {"C /d", "C /d/changed", "D /one", "A /new", "A /new/f"}
    dockerd.docker("commit", "changer", "derived:1")
    run = ["run", "--rm", *OFFLINE, "derived:1", "/bin/tool"]
    assert dockerd.docker(*run, "cat", "/new/f", "--", "cat", "/d/changed", "--", "cat", "/two") == "yxlinked"
    assert "no such file" in dockerd.docker(*run, "cat", "/one", ok=False)
    assert "is using" in dockerd.docker("rmi", base, ok=False)
    dockerd.docker("rm", "changer")
    assert onlap.answers("Apply"), "the import and the commit were unpacked by Onlap"
    assert onlap.answers("Diff"), "the commit was made by Onlap"
    forget(dockerd, onlap, "derived:1", base)


def test_an_image_with_whiteouts(dockerd: Dockerd, onlap: Onlap, image: Image) -> None:
    dockerd.docker("load", "--input", image.archive)
    run = ["run", "--rm", *OFFLINE, image.reference, "/bin/tool"]
    assert dockerd.docker(*run, "cat", "/becomes-link/newer", "--", "cat", "/d/changed") == "322"
    for gone in ("/d/gone", "/d/sub/gone", "/opaque/hidden", "/removed", "/two"):
        assert "no such file" in dockerd.docker(*run, "cat", gone, ok=False)
    forget(dockerd, onlap, image.reference)


@pytest.mark.parametrize("builder", ["classic", "buildx"])
def test_build(builder: str, dockerd: Dockerd, onlap: Onlap, base: str, tmp_path: Path) -> None:
    before = len(onlap.answers("Diff"))
    if builder == "buildx" and not Path("/usr/libexec/docker/cli-plugins/docker-buildx").exists():
        pytest.skip("docker-buildx is not installed: make peers")
    (tmp_path / "f").write_text("copied, ")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    command = ["build"] if builder == "classic" else ["buildx", "build"]
    buildkit = "0" if builder == "classic" else "1"
    dockerd.docker(*command, *OFFLINE, "--tag", "built:1", tmp_path, DOCKER_BUILDKIT=buildkit)
    assert dockerd.docker("run", "--rm", *OFFLINE, "built:1") == "copied, by a container"
    run = ["run", "--rm", *OFFLINE, "built:1", "/bin/tool", "cat"]
    assert "no such file" in dockerd.docker(*run, "/d/kept", ok=False)
    assert "no such file" in dockerd.docker(*run, "/opaque/hidden", ok=False)
    assert dockerd.docker(*run, "/opaque/new") == "1"
    # BuildKit makes the layers of an overlay by itself (util/overlay, WriteUpperdir).
    assert builder == "buildx" or len(onlap.answers("Diff")) - before >= 3, "a layer for each step that writes"
    forget(dockerd, onlap, "built:1", base)


def test_a_container_goes_on_running_while_all_restart(
    dockerd: Dockerd, containerd: Containerd, onlap: Onlap, base: str
) -> None:
    dockerd.docker("run", "--detach", *OFFLINE, "--name", "running", base, "/bin/tool", "wait")

    def state() -> tuple[str, int]:
        (found,) = json.loads(dockerd.docker("inspect", "running"))
        return found["State"]["Status"], found["State"]["Pid"]

    before = state()
    assert before[0] == "running"
    onlap.restart()
    containerd.restart()
    dockerd.restart()
    assert state() == before
    dockerd.docker("exec", "running", "/bin/tool", "write", "/written", "after all restarts")
    assert Path(f"/proc/{before[1]}/root/written").read_text() == "after all restarts"
    assert re.fullmatch(r"A /written\s*", dockerd.docker("diff", "running"))
    dockerd.docker("stop", "--time", "5", "running")
    dockerd.docker("start", "running")
    assert dockerd.docker("exec", "running", "/bin/tool", "cat", "/written") == "after all restarts"
    dockerd.docker("rm", "--force", "running")
    forget(dockerd, onlap, base)
