"""Fixtures for tests without privilege: a store, and a registry that does what it is told."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onlap
from commandline import Command
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


@pytest.fixture(name="onlap")
def native_command(tmp_path: Path) -> Command:
    """The command, with a root of native copies."""
    command = Command(tmp_path / "root")
    command("init", "--snapshotter", "native")
    return command


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A directory that ordinary users reach, as pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="onlap-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def ordinary() -> Iterator[None]:
    """What is done inside is done as an ordinary user does it."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
