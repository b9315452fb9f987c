"""Fixtures of the tests of other programs' stores, which their real daemons make."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import capabilities
from peer_fixtures import containerd, image, onlap, place, pytest_runtest_makereport, tool
from peer_stores import making
from peer_stores.making import Made

__all__ = ["containerd", "image", "onlap", "place", "pytest_runtest_makereport", "tool"]


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
