"""Nothing but OnlapError leaves a call of a graph driver, whatever goes wrong inside; see test_public_errors.py."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import FAULTS, public_names, spread, tried
from onlap.graphdrivers import DRIVERS, open_driver
from onlap.graphdrivers.overlay import OverlayDriver
from onlap.graphdrivers.overlay2 import Overlay2Driver
from pure.image_makers import layer

pytestmark = [
    pytest.mark.needs("overlay", "mount"),
    pytest.mark.skipif(sys.version_info < (3, 12), reason="tells calls by sys.monitoring, Python 3.12"),
]

_numbers = itertools.count(1)
_ARCHIVE = layer(a="1", b="2")


class Ground:
    """A driver with the layers ``base`` and, on it, ``top``."""

    def __init__(self, home: Path, kind: str) -> None:
        self.home = home
        self.kind = kind
        self.driver: Any = open_driver(kind, str(home), sync="none")
        self.driver.create("base")
        self.driver.apply_diff("base", "", io.BytesIO(_ARCHIVE))
        self.driver.create_read_write("top", "base")

    def new(self) -> str:
        """An id of nobody's."""
        return f"new-{next(_numbers)}"

    def made(self) -> str:
        """A layer that others may lose."""
        id = self.new()
        self.driver.create(id, "base")
        return id

    def got(self) -> str:
        """The same, mounted."""
        id = self.made()
        self.driver.get(id)
        return id

    def opened(self) -> Any:
        """Another driver of the same home."""
        return open_driver(self.kind, str(self.home), sync="none")


Call = tuple[Callable[[Ground], Any], Callable[[Ground, Any], object]]

CALLS: dict[str, Call] = {
    "__init__": (Ground.new, lambda g, _: g.opened().close()),
    "close": (Ground.opened, lambda _, driver: driver.close()),
    "create": (Ground.new, lambda g, id: g.driver.create(id, "base")),
    "create_read_write": (Ground.new, lambda g, id: g.driver.create_read_write(id, "base")),
    "remove": (Ground.made, lambda g, id: g.driver.remove(id)),
    "get": (Ground.made, lambda g, id: g.driver.get(id)),
    "put": (Ground.got, lambda g, id: g.driver.put(id)),
    "exists": (Ground.new, lambda g, _: g.driver.exists("top")),
    "status": (Ground.new, lambda g, _: g.driver.status()),
    "metadata": (Ground.new, lambda g, _: g.driver.metadata("top")),
    "cleanup": (Ground.got, lambda g, _: g.driver.cleanup()),
    "counts": (Ground.got, lambda g, _: g.driver.counts),
    "diff": (Ground.new, lambda g, _: g.driver.diff("base", "", io.BytesIO())),
    "changes": (Ground.new, lambda g, _: g.driver.changes("base", "")),
    "diff_size": (Ground.new, lambda g, _: g.driver.diff_size("base", "")),
    "apply_diff": (Ground.made, lambda g, id: g.driver.apply_diff(id, "base", io.BytesIO(_ARCHIVE))),
}


@pytest.mark.parametrize("kind", [OverlayDriver, Overlay2Driver])
def test_every_public_call_is_tried(kind: type) -> None:
    assert public_names(kind) == set(CALLS)


@pytest.fixture(scope="module", params=DRIVERS)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    ground = Ground(tmp_path_factory.mktemp("home"), request.param)
    yield ground
    ground.driver.cleanup()
    ground.driver.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60)  # nothing is waited for, so that whatever takes so long hangs
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_else_leaves_a_call(ground: Ground, name: str, fault: str, request: pytest.FixtureRequest) -> None:
    arrange, act = CALLS[name]
    most = 1000 if request.config.getoption("--long") else 3
    for number in spread(tried(lambda: arrange(ground), lambda given: act(ground, given), fault, 0), most):
        tried(lambda: arrange(ground), lambda given: act(ground, given), fault, number)
        assert ground.driver.exists("top")
