"""Fixtures of the tests that mount."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import capabilities
from kernel.helpers import NOBODY
from kernel.layer_stacks import Layers, Stack
from onlap.probing.probe import probe
from onlap.store import Store
from onlap.store import open as open_store


@pytest.fixture
def ordinary() -> Iterator[Path]:
    """A directory of user 65534, who may be ourselves."""
    directory, _ = capabilities.overlay_directory()
    with tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory) as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        if not probe(name).features["unprivileged"].ok:
            pytest.skip(probe(name).features["unprivileged"].reason)
        yield Path(name)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.needs("userns", "ordinary_user"))])
def who(request: pytest.FixtureRequest) -> bool:
    """Whether to be an ordinary user: the test runs as that, and as whoever runs the tests."""
    return bool(request.param)


@pytest.fixture
def place(who: bool, root: Path, request: pytest.FixtureRequest) -> Path:
    """A directory of the user that `who` says."""
    found: Path = request.getfixturevalue("ordinary") if who else root
    return found


@pytest.fixture
def layers(root: Path) -> Layers:
    """A stack that is made by writing through mounts."""
    return Layers(root)


@pytest.fixture
def stack(root: Path) -> Stack:
    """A stack that is made by applying archives."""
    return Stack(root)


@pytest.fixture
def layer(root: Path) -> Path:
    """An empty directory to apply into."""
    path = root / "layer"
    path.mkdir()
    return path


@pytest.fixture
def stores(root: Path) -> Iterator[tuple[Store, Store]]:
    """An overlay store and one of copies."""
    with (
        open_store(root / "overlay", snapshotter="overlay", sync="none") as one,
        open_store(root / "native", snapshotter="native", sync="none") as other,
    ):
        yield one, other
