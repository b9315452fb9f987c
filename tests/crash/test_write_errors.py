"""A disk that refuses writes: what has been acknowledged is there, and nothing that may be lost is acknowledged.

The kernel reports a failed write-back once to each open file; afterwards what could not be written counts as clean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from crash.campaign import Campaign
from crash.failing import apart
from crash.filesystems import SIZES
from crash.powerdisk import Disk
from onlap import errors
from onlap.store import Store

pytestmark = pytest.mark.needs("overlay", "loop", "fuse", "peer:gcc")

SEED = int(os.environ.get("POWER_SEED", "1"))
kinds = pytest.mark.parametrize("kind", [pytest.param(each, marks=pytest.mark.needs(each)) for each in SIZES])

# What holds this cannot be written.
SPOILED = "it-is-not-to-be-written"


@pytest.fixture
def campaign(program: Path, tmp_path: Path, kind: str) -> Iterator[Campaign]:
    disk = Disk(program, tmp_path, SIZES[kind] << 20)
    yield Campaign(disk, kind, "layer", tmp_path / "top", SEED)
    disk.close()


def open_store(root: Path, sync: str = "layer") -> Store:
    return onlap.open(root, snapshotter="overlay", sync=sync)  # type: ignore[arg-type]


def tree(store: Store, key: str) -> Path:
    return Path(store.snapshotter.catalog.layout.tree(store.snapshotter.record(key).id))


def refused(store: Store, *keys: str) -> list[str]:
    """Which of the active snapshots cannot be committed."""
    found = []
    for key in keys:
        try:
            store.commit(f"committed-{key}", key)
        except errors.DataLoss:
            found.append(key)
    return found


KEYS = ["spoiled", "beside", "of another"]


@kinds
@pytest.mark.parametrize("first", ["a commit", "a sync", "fsync of the file"])
def test_after_a_failed_sync_nothing_that_was_active_is_committed(campaign: Campaign, first: str) -> None:
    """Whoever tries it, and whoever was told of the error before: also another program."""

    def life() -> None:
        disk = campaign.disk
        with campaign.filesystem.mounting() as top:
            one, other = open_store(top / "root"), open_store(top / "root")
            careless = open_store(top / "root", "none")
            for store, key in zip((one, one, other), KEYS, strict=True):
                store.prepare(key)
                text = SPOILED if key == "spoiled" else key
                (tree(store, key) / "file").write_text(text * 1000)
            disk.spoil(SPOILED)
            if first == "a sync":
                os.sync()
            elif first == "fsync of the file":
                with (tree(one, "spoiled") / "file").open("rb") as file, pytest.raises(OSError):
                    os.fsync(file)
            # One that is not concerned cannot tell either.
            with pytest.raises(errors.OnlapError):
                other.commit("first", "of another")
            assert disk.failed() > 0
            disk.spoil()
            late = open_store(top / "root")
            for store in (other, one, late, careless):
                assert refused(store, *KEYS) == KEYS
            # In another process, which knows of nothing.
            assert apart(lambda: refused(open_store(top / "root"), *KEYS)) == KEYS
            # What is made from now on is kept.
            one.prepare("new")
            (tree(one, "new") / "file").write_text("new")
            one.commit("kept", "new")
            for store in (one, other, careless, late):
                store.close()

    apart(life)
    with campaign.filesystem.mounted() as top, open_store(top / "root") as store:
        assert {info.name for info in store.walk()} == {*KEYS, "kept"}
        assert (tree(store, "kept") / "file").read_text() == "new"
        assert refused(store, *KEYS) == KEYS
        for key in KEYS:
            store.remove(key)
