"""The conformance suite over Docker's graph drivers, each also behind the plugin's socket and with the naive differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graphdriver_suite.cases import (
    DriverCase,
    DriverFactory,
    NaiveFactory,
    OpenDriver,
    PluginFactory,
    graphdriver_cases,
)

pytestmark = pytest.mark.needs("overlay")

ALL = {"graphtest", "layers", "counting", "differences", "archives"}
DIFFERENCES = {"differences", "archives"}

DRIVERS: dict[str, tuple[OpenDriver, set[str], set[str]]] = {
    "overlay": (DriverFactory("overlay"), {"counts", "linked", "undone"}, ALL),
    "overlay2": (DriverFactory("overlay2"), {"counts", "limited", "undone"}, ALL),
    "overlay2-durable": (DriverFactory("overlay2", sync="layer"), {"undone"}, {"archives"}),
    "overlay-plugin": (PluginFactory("overlay"), {"linked", "undone"}, ALL),
    "overlay2-plugin": (PluginFactory("overlay2"), {"limited", "undone"}, ALL),
    "overlay-naive": (NaiveFactory("overlay"), set(), DIFFERENCES),
    "overlay2-naive": (NaiveFactory("overlay2"), set(), DIFFERENCES),
}


def parameters() -> Iterator[object]:
    for name, (factory, has, rooms) in DRIVERS.items():
        for case in graphdriver_cases(has):
            if case.room in rooms:
                yield pytest.param(factory, case, id=f"{name}-{case}")


@pytest.fixture(autouse=True)
def no_mounts_left() -> Iterator[None]:
    before = Path("/proc/self/mountinfo").read_bytes()
    yield
    assert Path("/proc/self/mountinfo").read_bytes() == before


@pytest.mark.parametrize("factory, case", list(parameters()))
def test_conformance(factory: OpenDriver, case: DriverCase, root: Path) -> None:
    case.run(factory, root)
