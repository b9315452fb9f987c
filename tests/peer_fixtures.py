"""Fixtures of all tests with real peers: a place for their state, the log of a daemon beside a failure, a program."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import capabilities
from peers import daemons, gobuild, images
from peers.daemons import Containerd, Onlap


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
def tool() -> Path:
    """The static program that is all the userland of the containers."""
    return gobuild.build(Path(__file__).parent / "peers" / "go" / "tool")


@pytest.fixture(scope="module")
def onlap(place: Path, request: pytest.FixtureRequest) -> Iterator[Onlap]:
    """Onlap's server on a fresh overlay root; a differ as well in modules with ``DIFFER = True``."""
    with Onlap(place, "--sync", "none", differ=getattr(request.module, "DIFFER", False)) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def containerd(place: Path, onlap: Onlap) -> Iterator[Containerd]:
    """A containerd that has ``onlap`` as a snapshotter."""
    with Containerd(place, onlap) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def image(place: Path, tool: Path) -> images.Image:
    """The three-layer image, as an archive."""
    return images.three_layers(place / "image.tar", tool)
