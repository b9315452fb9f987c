"""Every system call of every verb: killed before it, or failing with each error that it may return.

What :mod:`syscall_sweep` finds wrong is a failure here. A finding has a case, which can be looked at alone::

    python tests/syscall_sweep/sweep.py EMPTY_DIRECTORY overlay 1 1 commit fdatasync 2 EIO
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from syscall_sweep import sweep, tracer
from syscall_sweep.verbs import PARTS

pytestmark = [
    pytest.mark.needs("mount", "overlay"),
    pytest.mark.skipif(bool(tracer.unsupported()), reason=tracer.unsupported() or "it works here"),
]

SEED = 1
# How many points of each part; all of them, some 70,000, are for the long run.
POINTS = {
    "overlay": 270,
    "native": 170,
    "images": 220,
    "images on copies": 140,
    "workspaces": 230,
    "workspaces of copies": 100,
    "merges": 110,
    "driver overlay2": 150,
    "driver overlay": 120,
}


def swept(directory: Path, part: str, count: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the program; its counts."""
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, sweep.__file__, str(directory), part, str(SEED), str(count)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *findings, counts = [json.loads(line) for line in done.stdout.splitlines()]
    with capsys.disabled():
        sys.stdout.write(f"\n{part}: {counts}\n")
    assert not findings, json.dumps(findings, indent=1).replace("\\n", "\n")
    found: dict[str, Any] = counts
    return found


def test_all_parts_have_their_points() -> None:
    assert set(POINTS) == set(PARTS)
    assert sum(POINTS.values()) >= 1500


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", PARTS)
def test_some_system_calls(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts = swept(tmp_path / "sweep", part, POINTS[part], capsys)
    assert counts["points"] == POINTS[part] + counts.get("a thread was left, once", 0)
    # Threads take turns in another order, and a call is made once less: few points may come to nothing.
    assert counts.get("not reached", 0) < POINTS[part] / 5
    assert counts["killed"] > POINTS[part] / 10
    assert counts["raised, undone"] > POINTS[part] / 10


@pytest.mark.long
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("part", PARTS)
def test_every_system_call(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts = swept(tmp_path / "sweep", part, 0, capsys)
    assert counts["points"] > 2000
