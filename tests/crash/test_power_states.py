"""Every state that a power cut may leave of the disk, as far as they can be counted: nothing acknowledged is lost.

What a store does is recorded once, at the block device; then the power is cut at every flush, and between them with any
part of what was written since.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crash.aftermath import Loss
from crash.campaign import Campaign
from crash.filesystems import SIZES
from crash.powerdisk import Disk
from onlap.catalog import recovery
from onlap.catalog.disk import sync as syncing
from onlap.snapshots.recorded import Sync

pytestmark = pytest.mark.needs("overlay", "loop", "fuse", "peer:gcc")

SEED = int(os.environ.get("POWER_SEED", "1"))
# How many states of each are looked at in the short form, 2,000 together. The long one looks at 50 times as many.
SHARES: dict[tuple[str, Sync], int] = {
    ("ext4", "layer"): 700,
    ("xfs", "layer"): 450,
    ("btrfs", "layer"): 250,
    ("ext4", "none"): 350,
    ("xfs", "none"): 150,
    ("btrfs", "none"): 100,
}
PARTS = 5

each_kind = pytest.mark.parametrize(
    "kind, sync", [pytest.param(*each, marks=pytest.mark.needs(each[0])) for each in SHARES]
)


Start = Callable[..., Campaign]


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Start]:
    """`start(kind, sync, seed)`: a campaign on a disk of its own."""
    disks: list[Disk] = []

    def make(kind: str, sync: Sync, seed: int = SEED) -> Campaign:
        disk = Disk(program, tmp_path, SIZES[kind] << 20)
        disks.append(disk)
        return Campaign(disk, kind, sync, tmp_path / "top", seed)

    yield make
    for disk in disks:
        disk.close()


@each_kind
def test_nothing_acknowledged_is_lost(start: Start, kind: str, sync: Sync, counted: Callable[[str], None]) -> None:
    campaign = start(kind, sync)
    campaign.run(SHARES[kind, sync])
    assert campaign.states == SHARES[kind, sync]
    assert campaign.checks > campaign.states
    # Else the states would not be those of a power cut: without a sync layers are lost.
    assert bool(campaign.lost) == (sync == "none")
    counted(f"power cuts on {kind}, sync={sync}, seed {SEED}: {campaign}")


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
@each_kind
def test_nothing_acknowledged_is_lost_of_very_many(
    start: Start, kind: str, sync: Sync, part: int, counted: Callable[[str], None]
) -> None:
    seed = SEED * 1000 + part
    campaign = start(kind, sync, seed)
    count = SHARES[kind, sync] * 50 // PARTS
    campaign.run(count, part, PARTS)
    assert campaign.states == count
    counted(f"power cuts on {kind}, sync={sync}, seed {seed}: {campaign}")


def _no_syncfs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(syncing, "syncfs", lambda fd: None)


def _no_recovery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "recover", lambda catalog, remake: None)


def _no_sync_of_records(patch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    class Careless(sqlite3.Connection):
        def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:
            return super().execute(sql.replace("synchronous = FULL", "synchronous = OFF"), *parameters)  # type: ignore[arg-type]

    patch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Careless, **options))


@pytest.mark.needs("ext4")
@pytest.mark.parametrize(
    "defect, verbs",
    [
        (_no_syncfs, ("settle", "fill", "commit", "prepare")),
        (_no_recovery, ("settle", "prepare", "prepare")),
        (_no_sync_of_records, ("label", "label", "label")),
    ],
)
def test_a_defect_is_found(
    start: Start, monkeypatch: pytest.MonkeyPatch, defect: Callable[[pytest.MonkeyPatch], None], verbs: tuple[str, ...]
) -> None:
    """Else it would prove nothing that none is found."""
    campaign = start("ext4", "layer")
    campaign.found_root()
    campaign.look(*verbs, limit=100)
    defect(monkeypatch)
    with pytest.raises((Loss, AssertionError, OSError)):
        campaign.look(*verbs, limit=100)
