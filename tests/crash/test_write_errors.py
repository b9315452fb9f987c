"""A disk that refuses writes: what has been acknowledged is there, and nothing that may be lost is acknowledged.

The kernel reports a failed write-back once to each open file; afterwards what could not be written counts as clean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onlap
from crash import failing
from crash.campaign import Campaign
from crash.failing import apart
from crash.filesystems import SIZES, states
from crash.powerdisk import Disk, Entry, mark
from onlap import errors
from onlap.store import Store
from onlap.workspaces.history.durability import Durability

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
            # Before it is written: sync(2) of any other program on the machine writes it as well.
            disk.spoil(SPOILED)
            for store, key in zip((one, one, other), KEYS, strict=True):
                store.prepare(key)
                text = SPOILED if key == "spoiled" else key
                (tree(store, key) / "file").write_text(text * 1000)
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


@kinds
@pytest.mark.parametrize("told", ["the workspace", "another"])
def test_a_checkpoint_that_could_not_be_written_never_counts_as_durable(
    campaign: Campaign, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = campaign.disk

    def life() -> None:
        monkeypatch.setattr(Durability, "begin", lambda _: None)
        with (
            campaign.filesystem.mounting() as top,
            open_store(top / "root") as store,
            open_store(top / "root") as other,
        ):
            with store.build("base") as base:
                (base / "file").write_text("base")
            ws = store.workspaces.create("ws", "base")
            with ws.mounted() as place:
                disk.spoil(SPOILED)
                (place / "file").write_text(SPOILED * 1000)
                ws.checkpoint("spoiled")
                if told == "another":
                    other.prepare("key")
                    (tree(other, "key") / "file").write_text("another")
                    with pytest.raises(errors.OnlapError):
                        other.commit("committed", "key")
                else:
                    with pytest.raises(errors.DataLoss):
                        ws.checkpoint(durable=True)
                disk.spoil()
                with open_store(top / "root") as late:
                    # The kernel does not tell it.
                    asked = ws if told == "the workspace" else late.workspaces["ws"]
                    for _ in range(2):
                        with pytest.raises(errors.DataLoss, match="had not reached the disk"):
                            asked.checkpoint(durable=True)
                ws.rollback("base")
                (place / "file").write_text("after")
                ws.checkpoint("after")
            with open_store(top / "root") as late:
                assert late.workspaces["ws"].checkpoint(durable=True).durable

    def later() -> None:
        with open_store(top / "root") as store:
            ws = store.workspaces["ws"]
            with ws.mounted() as place:
                assert (place / "file").read_text() == "after"
            with pytest.raises(errors.DataLoss, match="had not reached the disk"):
                ws.rollback("spoiled")

    apart(life)
    with campaign.filesystem.mounted() as top:
        later()


@kinds
@pytest.mark.parametrize("below", [0, 5])
def test_after_a_failed_sync_no_top_of_a_workspace_becomes_a_checkpoint(campaign: Campaign, below: int) -> None:
    """Also if its layer is merged with those of the checkpoints below it."""

    def life() -> None:
        with (
            campaign.filesystem.mounting() as top,
            open_store(top / "root") as store,
            open_store(top / "root") as other,
        ):
            with store.build("base") as base:
                (base / "file").write_text("base")
            ws = store.workspaces.create("ws", "base")
            with ws.mounted() as place:
                for number in range(below):
                    (place / "file").write_text(str(number))
                    ws.checkpoint(durable=True)
                campaign.disk.spoil(SPOILED)
                (place / "file").write_text(SPOILED * 1000)
                other.prepare("key")
                (tree(other, "key") / "file").write_text("another")
                with pytest.raises(errors.OnlapError):
                    other.commit("committed", "key")
                campaign.disk.spoil()
                with pytest.raises(errors.DataLoss, match="workspace ws may lack content"):
                    ws.checkpoint()
                ws.rollback()
                assert (place / "file").read_text() == (str(below - 1) if below else "base")
                (place / "file").write_text("after")
                ws.checkpoint()

    apart(life)


@kinds
@pytest.mark.parametrize("ends", ["killed", "closed", "never"])
def test_what_a_program_could_not_write_is_nothing_to_build_on(campaign: Campaign, ends: str) -> None:
    """Records that failed are in the page cache, clean, and not on the disk; whoever opens the log next reads them."""
    disk = campaign.disk

    def go_on(store: Store) -> None:
        for number in range(3):
            store.prepare(f"after-{number}")
            mark(disk.mark, f"done {number}")

    def first() -> None:
        store = open_store(top / "root")
        for number in range(3):
            store.prepare(f"before-{number}")
        # Not whichever write is next: it may be one of the filesystem's journal, which then allows no more changes.
        disk.spoil(SPOILED)
        with pytest.raises(errors.OnlapError):
            store.prepare(SPOILED)
        disk.spoil()
        if ends == "never":
            go_on(store)
        if ends == "closed":
            store.close()

    def second() -> None:
        with open_store(top / "root") as store:
            go_on(store)

    campaign.found_root()
    disk.record()
    with campaign.filesystem.mounted() as top:
        apart(first)
        assert disk.failed()
        if ends != "never":
            apart(second)
    entries = disk.log()
    for state in states(entries, campaign.rng, 1, campaign.filesystem.kind):
        done = sum(entry.text.startswith("done") for entry in entries[: state.cut])
        disk.become(state)
        with campaign.filesystem.mounted() as top, open_store(top / "root") as store:
            names = {info.name for info in store.walk()}
            lost = {f"after-{number}" for number in range(done)} - names
            assert not lost, state
            assert not done or {f"before-{number}" for number in range(3)} <= names


# Each with the verbs before it; "image commit" is left out, since what it would have made cannot be told.
LIVES = [
    ("fill", "commit"),
    ("settle", "write", "commit"),
    ("build",),
    ("prepare", "remove"),
    ("label", "view"),
    ("import archive",),
    ("apply", "commit"),
    ("squash",),
    ("image import",),
    ("image tag", "image remove"),
    ("remove", "cleanup"),
    ("reopen", "prepare"),
]


def enumerate_failures(campaign: Campaign, each: int) -> str:
    """Let writes and flushes fail in all lives, so many in each; what was tried."""
    campaign.found_root()
    tried = refused = later = 0
    for verbs in LIVES:
        _, entries = campaign.record(*verbs)
        for flush in (False, True):
            numbers = points(entries, flush)
            for number in campaign.rng.sample(numbers, min(each, len(numbers))):
                outcome = failing.fail(campaign, verbs, number, flush=flush, keep=campaign.rng.random() < 0.5)
                tried += 1
                refused += outcome.error is not None
                later += outcome.later > 0
    # Most writes are the filesystem's own, or in the background, and fail no call.
    assert tried >= len(LIVES)
    assert refused
    return f"{tried} refused, told by {refused} calls, {later} of {refused} stores went on; {campaign}"


def points(entries: list[Entry], flush: bool) -> list[int]:
    """The numbers of the writes or flushes, from 1, that come when the store has been opened, up to its close."""
    number = done = 0
    found = []
    for entry in entries:
        if entry.kind == "m":
            done += entry.text.startswith("done")
        elif entry.changes != flush:
            number += 1
            if done:
                found.append(number)
    return found


@kinds
def test_a_write_that_fails_loses_nothing_acknowledged(
    campaign: Campaign, kind: str, counted: Callable[[str], None]
) -> None:
    counted(f"writes and flushes on {kind}, seed {SEED}: {enumerate_failures(campaign, 2)}")


@pytest.mark.long
@kinds
def test_any_write_that_fails_loses_nothing_acknowledged(
    campaign: Campaign, kind: str, counted: Callable[[str], None]
) -> None:
    counted(f"writes and flushes on {kind}, seed {SEED}: {enumerate_failures(campaign, 1000)}")
