"""Fixtures of the tests that mount."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import capabilities
from kernel.helpers import NOBODY
from onlap.probing.probe import probe


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
