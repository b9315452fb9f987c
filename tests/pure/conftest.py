"""Fixtures for tests without privilege: a store, and a registry that does what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from onlap.store import Store
from pure.image_makers import Faulty, Made, layer


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts at a registry it is waited no longer than it must."""
    monkeypatch.setattr("onlap.images.registry.session._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("onlap.images.registry.session._LONGEST_PAUSE", 0.01)


@pytest.fixture
def made() -> Made:
    """An image of two layers, one of 3 MB."""
    return Made(layer(a="1", big="x" * 3_000_000), layer(b="2"))


@pytest.fixture
def registry(made: Made) -> Iterator[Faulty]:
    with Faulty(made).running() as faulty:
        yield faulty


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with onlap.open(tmp_path / "root", snapshotter="native", sync="none") as store:
        yield store
