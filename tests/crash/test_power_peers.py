"""The same power cuts with containerd's overlay snapshotter and Docker's overlay2, as the Go libraries that they are.

What they are known to lose is found: else the states would not be those of a power cut. And what is found there is
what Onlap's ``sync="none"`` loses, and ``"layer"`` does not.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import onlap
from crash import facts
from crash.filesystems import SIZES, Filesystem, states
from crash.powerdisk import Disk, mark
from onlap.snapshots.recorded import Sync
from peers import dockergo, gobuild

pytestmark = pytest.mark.needs("overlay", "loop", "fuse", "ext4", "peer:gcc")

HERE = Path(__file__).parent
LAYERS = 4
SEED = 1


class Side(NamedTuple):
    """Somebody who unpacks layers.

    Attributes:
        unpack: archives into a root, with marks.
        layers: what layers it says that there are after a power cut, by number; the directories of each, topmost first.
    """

    unpack: Callable[[Path, Path, list[Path]], object]
    layers: Callable[[Path, int], dict[int, list[str]]]


def containerd() -> Side:
    program = gobuild.build(HERE / "go" / "containerdlayers")

    def layers(root: Path, _acknowledged: int) -> dict[int, list[str]]:
        told = json.loads(_run(program, "look", root))
        return {int(name.removeprefix("layer-")): directories for name, directories in told.items()}

    return Side(lambda root, marks, tars: _run(program, "unpack", root, marks, *tars), layers)


def docker() -> Side:
    program = dockergo.build(HERE / "go" / "dockerlayers")

    def layers(root: Path, acknowledged: int) -> dict[int, list[str]]:
        # What layers there are dockerd keeps elsewhere, when ApplyDiff has returned.
        numbers = range(acknowledged)
        return {top: [f"{root}/layer-{number}/diff" for number in reversed(range(top + 1))] for top in numbers}

    return Side(lambda root, marks, tars: _run(program, root, marks, *tars), layers)


def onlap_snapshots(sync: Sync) -> Side:
    def unpack(root: Path, marks: Path, tars: list[Path]) -> None:
        with onlap.open(root, snapshotter="overlay", sync=sync) as store:
            for number, tar in enumerate(tars):
                mark(marks, f"begun {number}")
                store.prepare(f"key-{number}", f"layer-{number - 1}" if number else None)
                store.apply(f"key-{number}", tar)
                store.commit(f"layer-{number}", f"key-{number}")
                mark(marks, f"done {number}")

    def layers(root: Path, _acknowledged: int) -> dict[int, list[str]]:
        with onlap.open(root, snapshotter="overlay") as store:
            infos = store.walk("kind==committed")
            records = [store.snapshotter.record(info.name) for info in infos]
            return {int(each.name.removeprefix("layer-")): store.snapshotter.layers(each) for each in records}

    return Side(unpack, layers)


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Losses(NamedTuple):
    """States, those in which something acknowledged was lost, and how many files of acknowledged layers were wrong."""

    states: int
    bad: int
    files: int


def count(side: Side, program: Path, directory: Path) -> Losses:
    """Unpack on a fresh disk, and look at every flush and between them."""
    trees = [facts.of_number(number) for number in range(LAYERS)]
    tars = [directory / f"{number}.tar" for number in range(LAYERS)]
    for tar, tree in zip(tars, trees, strict=True):
        tar.write_bytes(facts.archive(tree))
    disk = Disk(program, directory, SIZES["ext4"] << 20)
    try:
        filesystem = Filesystem(disk, "ext4", directory / "top")
        disk.keep()
        disk.record()
        with filesystem.mounted() as top:
            side.unpack(top / "root", disk.mark, tars)
        entries = disk.log()
        bad = files = looked = 0
        for state in states(entries, random.Random(SEED), 1, "ext4"):
            acknowledged = sum(each.text.startswith("done") for each in entries[: state.cut])
            if not acknowledged:
                continue
            looked += 1
            disk.become(state)
            with filesystem.mounted() as top:
                wrong = _wrong(side.layers(top / "root", acknowledged), trees, acknowledged)
            files += wrong
            bad += bool(wrong)
    finally:
        disk.close()
    return Losses(looked, bad, files)


def _wrong(layers: dict[int, list[str]], trees: list[dict[str, facts.Fact]], acknowledged: int) -> int:
    wrong = 0
    whole: dict[str, facts.Fact] = {}
    for number in range(acknowledged):
        whole |= trees[number]
        directories = [each for each in layers.get(number, []) if Path(each).is_dir()]
        found = facts.read(directories)
        wrong += sum(found.get(name) != fact for name, fact in whole.items())
    return wrong


@pytest.mark.parametrize(
    "side",
    [
        pytest.param(containerd, marks=pytest.mark.needs("gopkg:github.com/containerd/containerd")),
        pytest.param(docker, marks=pytest.mark.needs("gopkg:github.com/docker/docker")),
        pytest.param(lambda: onlap_snapshots("none"), id="onlap, sync=none"),
    ],
)
def test_layers_that_are_not_synced_are_lost(
    side: Callable[[], Side],
    program: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    counted: Callable[[str], None],
) -> None:
    found = count(side(), program, tmp_path)
    assert found.bad > found.states // 10
    counted(f"power cuts, {request.node.callspec.id}: layers were lost in {found.bad} of {found.states} states")


def test_layers_that_are_synced_are_not(program: Path, tmp_path: Path) -> None:
    found = count(onlap_snapshots("layer"), program, tmp_path)
    assert found.states > 20
    assert found.files == 0
