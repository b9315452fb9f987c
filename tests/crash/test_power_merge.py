"""A power cut during a merge into a directory: the next call leaves all of the merge or nothing, and what was
acknowledged stays."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crash.filesystems import SIZES, Filesystem, states
from crash.powerdisk import Disk, mark
from kernel.merges import Scene, copy, unlike
from onlap.testing import read_tree
from onlap.workspaces.merge.undo import recover

pytestmark = pytest.mark.needs("overlay", "loop", "fuse", "peer:gcc")

each_kind = pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.needs(kind)) for kind in SIZES])
DONE = "done"


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Callable[[str], Filesystem]]:
    """`start(kind)`: a filesystem on a disk of its own."""
    disks: list[Disk] = []

    def make(kind: str) -> Filesystem:
        disks.append(Disk(program, tmp_path, SIZES[kind] << 20))
        return Filesystem(disks[0], kind, tmp_path / "top")

    yield make
    for disk in disks:
        disk.close()


def cut(scene: Scene, filesystem: Filesystem, each: int, limit: int) -> dict[str, int]:
    """Merge, and look at the states that a power cut may leave; how often there was all or nothing."""
    workspace, disk = scene.workspace, filesystem.disk
    with filesystem.mounted() as top:
        copy(workspace.target, top / "target")
        workspace.target = top / "target"
        os.sync()
    disk.keep()
    disk.record()
    with filesystem.mounted():
        workspace.merge()
        mark(disk.mark, DONE)
    entries = disk.log()
    acknowledged = next(number for number, entry in enumerate(entries) if entry.text == DONE)
    rng = random.Random(1)
    every = list(states(entries, rng, each, filesystem.kind))
    found = {"all": 0, "nothing": 0}
    for state in [every[number] for number in sorted(rng.sample(range(len(every)), min(limit, len(every))))]:
        disk.become(state)
        with filesystem.mounted():
            recover(str(workspace.target))
            now = read_tree(workspace.target)
            left = os.listdir(workspace.target.parent)
        outcome = "nothing" if unlike(now, scene.after) else "all"
        assert outcome == "all" or not unlike(now, scene.before), f"{state}: {unlike(now, scene.before)}"
        assert outcome == "all" or acknowledged >= state.cut, f"{state}: what was acknowledged is lost"
        assert not [name for name in left if "onlap" in name], state
        found[outcome] += 1
    assert min(found.values()) >= 1, found
    return found


@each_kind
def test_all_or_nothing(
    root: Path, start: Callable[[str], Filesystem], kind: str, counted: Callable[[str], None]
) -> None:
    found = cut(Scene(root), start(kind), 20, 80)
    counted(f"power cuts of a merge on {kind}: {found}")


@pytest.mark.long
@pytest.mark.timeout(3600)
@each_kind
def test_all_or_nothing_very_often(
    root: Path, start: Callable[[str], Filesystem], kind: str, counted: Callable[[str], None]
) -> None:
    found = cut(Scene(root), start(kind), 400, 3000)
    counted(f"power cuts of a merge on {kind}: {found}")
