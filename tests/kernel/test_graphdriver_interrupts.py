"""KeyboardInterrupt at any bytecode of a graph driver: its layers can be used, also while the exception is kept."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import interrupts
from onlap.graphdrivers.counter import Locks

pytestmark = [
    pytest.mark.needs("overlay", "mount"),
    pytest.mark.skipif(sys.version_info < (3, 12), reason="tells bytecodes by sys.monitoring, Python 3.12"),
]

# Every how manieth bytecode; all of them are for the long run.
_EVERY = {"create": 29, "get": 17, "get again": 17, "put": 7, "apply": 37, "remove": 17}
SCENARIOS = [f"{kind} {name}" for kind in ("overlay", "overlay2") for name in interrupts.DRIVER_SCENARIOS]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interrupt_at_any_moment_is_survived(root: Path, scenario: str) -> None:
    every = _EVERY[scenario.partition(" driver ")[2]]
    assert interrupts.points(root / "home", scenario, every, 50) > 5


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interrupt_at_every_bytecode_is_survived(root: Path, scenario: str) -> None:
    assert interrupts.points(root / "home", scenario, 1, 1800) > 100


def test_a_turn_ends_once_and_one_comes_after_the_other() -> None:
    locks = Locks()
    inside: list[int] = []

    def work(number: int) -> int:
        inside.append(number)
        assert inside == [number]
        inside.remove(number)
        return number

    def many() -> None:
        for number in range(1000):
            assert locks.hold("id", lambda: work(number)) == number  # noqa: B023 - run at once
        done.append(True)

    done: list[bool] = []
    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4
    assert locks._turns == {}
