"""KeyboardInterrupt at any bytecode: nobody hangs, nothing stays locked, what was acknowledged is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import interrupts

# Every how manieth bytecode: about twenty looks at each call. All of them are for the long run.
_EVERY = {"stat": 11, "prepare": 41, "commit": 67, "remove": 53, "open and close": 389, "fork": 9}

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="tells bytecodes by sys.monitoring, Python 3.12")


def points(root: Path, scenario: str, every: int, timeout: float) -> int:
    done = subprocess.run(
        [sys.executable, interrupts.__file__, str(root), scenario, str(every)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    found, word = done.stdout.split()
    assert word == "done"
    return int(found)


@pytest.mark.parametrize("scenario", interrupts.SCENARIOS)
def test_an_interrupt_at_any_moment_is_survived(root: Path, scenario: str) -> None:
    assert points(root, scenario, _EVERY[scenario], 50) > 5


@pytest.mark.long
@pytest.mark.parametrize("scenario", interrupts.SCENARIOS)
def test_an_interrupt_at_every_bytecode_is_survived(root: Path, scenario: str) -> None:
    assert points(root, scenario, 1, 1800) > 100
