"""Fixtures of the tests with real peers: one daemon a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from peer_fixtures import containerd, image, onlap, place, pytest_runtest_makereport, tool
from peers.daemons import Containerd, Dockerd, Onlap
from peers.remote import NAMESPACE, RemoteDiffer

__all__ = ["containerd", "image", "onlap", "place", "pytest_runtest_makereport", "tool"]


@pytest.fixture
def differ(onlap: Onlap, containerd: Containerd) -> Iterator[RemoteDiffer]:
    """Onlap's own socket, as a client of the namespace ``default``."""
    with RemoteDiffer(onlap.socket, NAMESPACE) as client:
        yield client


@pytest.fixture(scope="module")
def dockerd(place: Path, containerd: Containerd) -> Iterator[Dockerd]:
    """A dockerd on it, with the containerd image store."""
    with Dockerd(place, containerd.socket) as daemon:
        yield daemon
