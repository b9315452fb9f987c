"""Which layers of another program's store are mounted, also by names relative to a driver's directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onlap.check.stores.contract import StoreLayer
from onlap.check.stores.repairing.use import mounted
from onlap.overlayfs.markers import TRUSTED, Markers

pytestmark = pytest.mark.needs("overlay", "mount")

# Mounts in a mount namespace of its own, below a tmpfs that only this one has, until its input ends.
APART = """
import subprocess, sys
hidden, base, volume, covered = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", hidden], check=True)
if volume:
    subprocess.run(["mount", "--bind", volume, base], check=True)
subprocess.run(["mkdir", "-p", *(f"{base}/{name}/{each}" for name in "123" for each in ("fs", "work")), f"{hidden}/m"],
    check=True)
options = f"lowerdir=2/fs:1/fs,upperdir={base}/3/fs,workdir={base}/3/work"
subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, f"{hidden}/m"], cwd=base, check=True)
if covered:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", covered], check=True)
print("mounted", flush=True)
sys.stdin.read()
"""


def store(home: Path, tree: str = "fs", work: str = "work") -> StoreLayer:
    """A home with three layers; the first."""
    for name in "123":
        for each in (tree, work):
            (home / name / each).mkdir(parents=True)
    return StoreLayer("first", str(home / "1"), str(home / "1" / tree), (), Markers(TRUSTED), None)


@contextmanager
def overlay(cwd: Path, target: Path, options: str) -> Iterator[None]:
    target.mkdir()
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, target], cwd=cwd, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def by_names(home: Path) -> str:
    """As containerd mounts many layers."""
    return f"lowerdir=2/fs:1/fs,upperdir={home}/3/fs,workdir={home}/3/work"


def test_many_layers_of_containerd(root: Path) -> None:
    """Its layers have the same names in every store: only the one whose upperdir it is has mounted them."""
    ours, theirs = store(root / "ours"), store(root / "theirs")
    with overlay(root / "theirs", root / "m", by_names(root / "theirs")):
        assert (mounted([ours]), mounted([theirs])) == (set(), {"first"})


def test_a_view_of_many_layers(root: Path) -> None:
    """Nothing tells whose it is, and a layer that may be in use is left alone."""
    layer = store(root / "home")
    with overlay(root / "home", root / "m", "lowerdir=2/fs:1/fs"):
        assert mounted([layer]) == {"first"}


@pytest.mark.parametrize("spelling", ["1/diff", "l/SHORT"])
def test_layers_of_docker(root: Path, spelling: str) -> None:
    """The upperdir is relative, too."""
    ours, theirs = store(root / "ours", "diff"), store(root / "theirs", "diff")
    for home in ("ours", "theirs"):
        (root / home / "l").mkdir()
    (root / "ours" / "l" / "SHORT").symlink_to("../1/diff")
    (root / "ours" / "3").rename(root / "ours" / "a-random-id")
    with overlay(
        root / "ours", root / "m", f"lowerdir=2/diff:{spelling},upperdir=a-random-id/diff,workdir=a-random-id/work"
    ):
        assert (mounted([ours]), mounted([theirs])) == ({"first"}, set())


@pytest.mark.parametrize(
    "base, volume, covered, is_ours",
    [
        ("home", "", "", True),
        ("link", "", "", True),
        ("home", "", "home", True),  # something was mounted on it since
        ("hidden/home", "", "", False),  # on another filesystem
        ("other", "", "", False),
        ("other", "", "home", False),
        ("home", "other", "", False),  # as a containerd in a container, whose directory is a volume
    ],
)
def test_in_another_mount_namespace(root: Path, base: str, volume: str, covered: str, is_ours: bool) -> None:
    """The upperdir is where it was mounted."""
    layer = store(root / "home")
    store(root / "other")
    (root / "hidden").mkdir()
    (root / "link").symlink_to("home")
    words = [root / "hidden", root / base, *(name and root / name for name in (volume, covered))]
    child = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", APART, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"mounted\n"
        assert mounted([layer]) == ({"first"} if is_ours else set())
    finally:
        child.stdin.close()
        child.stdout.close()
        assert child.wait() == 0
    assert not os.listdir(root / "hidden")
