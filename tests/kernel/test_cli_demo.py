"""The demo, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import capabilities
from onlap.mounts import mountinfo

SOURCE = Path(__file__).resolve().parents[2] / "src"
LAST = "Nothing is left in {}: no mount, no directory, no record. "


@pytest.fixture
def place(root: Path) -> Iterator[Path]:
    """A directory for the demo, which must leave nothing there, and no mount."""
    yield root
    assert list(root.iterdir()) == []
    where = os.fsencode(root)
    assert where not in mountinfo.own()


def line(*arguments: str) -> list[str]:
    return [sys.executable, "-S", "-m", "onlap", "demo", *arguments]


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "TMPDIR": str(place)}


def demo(place: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *line(*arguments)], capture_output=True, text=True, env=environment(place))


def without_namespaces() -> tuple[str, ...]:
    """A prefix for a command line: in a user namespace that maps no user, no other one and no mount can be made."""
    unshare = capabilities.find_program("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    return (unshare, "--user")


@pytest.mark.needs("overlay")
def test_demo(place: Path) -> None:
    done = demo(place)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Onlap ")
    assert lines[1].startswith("mode: overlay")
    assert lines[-1].startswith(LAST.format(place))
    assert lines[-1].endswith(" s in all.")
    steps = [text.split()[0] for text in lines if " ms  " in text]
    assert steps[:3] == ["import", "prepare", "mount"]
    assert steps[-2:] == ["usage", "remove"]
    assert steps.count("mount") == steps.count("unmount") == 3
    assert any("compileall" in text for text in lines)
    shown = [text.split()[0] for text in lines if text.startswith(" " * 21)]
    assert {"A", "C", "D"} <= set(shown)
    tree = lines[next(i for i, text in enumerate(lines) if text.startswith("NAME ")) + 1 :][:4]
    assert [text.split("committed")[0].split("active")[0].split(" ")[-2:] for text in tree]
    assert [word for text in tree for word in text.split() if word in {"base", "step", "left", "right"}] == [
        "base",
        "step",
        "left",
        "right",
    ]


@pytest.mark.needs("overlay")
def test_demo_in_json(place: Path) -> None:
    done = demo(place, "--json", "--require", "overlay")
    assert (done.returncode, done.stderr) == (0, "")
    things: list[dict[str, Any]] = [json.loads(text) for text in done.stdout.splitlines()]
    assert "overlay" in things[0]["mode"]
    assert things[-1]["left"] == {"mounts": [], "directories": [], "records": []}
    steps = [thing for thing in things if "step" in thing]
    assert all(thing["ms"] >= 0 for thing in steps)
    # Thousands of files, as in a real tree.
    entries = int(steps[0]["text"].split(" as base: ")[1].split()[0].replace(",", ""))
    assert entries > 1000


@pytest.mark.needs("userns")
def test_demo_where_nothing_can_be_mounted(place: Path) -> None:
    done = demo(place, prefix=without_namespaces())
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith(f"mode: native copies in {place}: ")
    assert "with overlays: " in lines[1]
    assert lines[-1].startswith(LAST.format(place))


@pytest.mark.needs("userns")
def test_demo_that_must_not_fall_back(place: Path) -> None:
    done = demo(place, "--require", "overlay", prefix=without_namespaces())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("onlap: an overlay can be used nowhere: in ")
    assert done.stderr.count("\n") == 1


@pytest.mark.needs("overlay", "mount")
def test_demo_skips_a_directory_on_overlayfs(root: Path, tmp_path: Path) -> None:
    merged = root / "merged"
    for name in ("lower", "upper", "work", "merged"):
        (root / name).mkdir()
    options = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    try:
        done = demo(merged)
    finally:
        subprocess.run(["umount", merged], check=True)
    assert (done.returncode, done.stderr) == (0, "")
    mode = done.stdout.splitlines()[1]
    assert mode.startswith(("mode: overlay in /var/tmp: ", "mode: overlay in /dev/shm: "))
    assert f"not in {merged}: " in mode
    assert "not supported as upperdir" in mode


@pytest.mark.needs("overlay")
def test_demo_that_is_interrupted_leaves_nothing(place: Path) -> None:
    process = subprocess.Popen(
        line(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(place)
    )
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("mount "):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "")
