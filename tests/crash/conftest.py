"""What the tests of crashes share: the disk whose power is cut, and counts that are shown at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crash import powerdisk


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk's program, compiled."""
    return powerdisk.build(tmp_path_factory.mktemp("powerdisk"))


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """`counted(text)`: show how much was tried when all tests have run."""
    return lambda text: record_property("counted", text)
