"""Fixtures of the tests with real peers: one daemon a module, its log beside the failure."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import capabilities
from peer_stores import making
from peer_stores.making import Made
from peers import daemons, gobuild, images
from peers.daemons import Containerd, Dockerd, Onlap
from peers.remote import NAMESPACE, RemoteDiffer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for daemon in daemons.running:
            report.sections.append((f"the log of {daemon.name}", daemon.tail()))
    return report  # type: ignore[return-value]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory where OverlayFS takes an upper layer; short, since the address of a socket has 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="onlap-", dir=capabilities.overlay_directory()[0]))
    yield path
    # A mount that is left fails the removal: it is a defect, and nothing is deleted through it.
    assert os.fsencode(path) not in Path("/proc/self/mountinfo").read_bytes()
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def made(tool: Path) -> Iterator[Mapping[str, Made]]:
    """Healthy stores of :data:`peer_stores.making.MAKERS` with one image, by kind; made when they are asked for."""
    top = Path(tempfile.mkdtemp(prefix="onlap-", dir=capabilities.overlay_directory()[0]))

    class Stores(dict[str, Made]):
        def __missing__(self, kind: str) -> Made:
            where = top / kind
            where.mkdir()
            # Docker and containers/storage do not take two entries for one path.
            image = making.awkward(where, tool, twice=kind == "containerd")
            self[kind] = making.MAKERS[kind](where, image)
            return self[kind]

    yield Stores()
    shutil.rmtree(top)


@pytest.fixture
def place_of(place: Path) -> Iterator[Callable[[Made], Path]]:
    """Gives a copy of a store in a place of its own, to be damaged, where a daemon finds it."""
    made: list[Path] = []

    def copy(store: Made) -> Path:
        # Short: the daemons' sockets are beside it.
        where = place / f"r{len(made)}"
        where.mkdir()
        made.append(where)
        return making.copied(store.root, where / store.root.name)

    yield copy
    for each in made:
        shutil.rmtree(each)


@pytest.fixture(scope="module")
def onlap(place: Path, request: pytest.FixtureRequest) -> Iterator[Onlap]:
    """Onlap's server on a fresh overlay root; a differ as well in modules with ``DIFFER = True``."""
    with Onlap(place, "--sync", "none", differ=getattr(request.module, "DIFFER", False)) as daemon:
        yield daemon


@pytest.fixture
def differ(onlap: Onlap, containerd: Containerd) -> Iterator[RemoteDiffer]:
    """Onlap's own socket, as a client of the namespace ``default``."""
    with RemoteDiffer(onlap.socket, NAMESPACE) as client:
        yield client


@pytest.fixture(scope="module")
def containerd(place: Path, onlap: Onlap) -> Iterator[Containerd]:
    """A containerd that has ``onlap`` as a snapshotter."""
    with Containerd(place, onlap) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def dockerd(place: Path, containerd: Containerd) -> Iterator[Dockerd]:
    """A dockerd on it, with the containerd image store."""
    with Dockerd(place, containerd.socket) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def tool() -> Path:
    """The static program that is all the userland of the containers."""
    return gobuild.build(Path(__file__).parent / "go" / "tool")


@pytest.fixture(scope="module")
def image(place: Path, tool: Path) -> images.Image:
    """The three-layer image, as an archive."""
    return images.three_layers(place / "image.tar", tool)
