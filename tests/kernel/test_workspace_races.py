"""What another thread or process does to the same workspace between two steps of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import onlap
from onlap import errors
from onlap.catalog.catalog import Catalog
from onlap.catalog.records import Record
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.store import Store
from onlap.workspaces import merging
from onlap.workspaces.history import chains, checkpoints, naming
from onlap.workspaces.records import MERGED, OWNER, top_key
from onlap.workspaces.workspace import Workspace

pytestmark = pytest.mark.needs("overlay", "mount")


@pytest.fixture
def source(root: Path) -> Path:
    path = root / "source"
    path.mkdir()
    (path / "file").write_text("captured")
    return path


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "root", snapshotter="overlay", sync="none") as store:
        yield store


def checkpoint(ws: Workspace, text: str, name: str | None = None) -> onlap.Checkpoint:
    with ws.mounted() as tree:
        (tree / "file").write_text(text)
    return ws.checkpoint(name)


def before(monkeypatch: pytest.MonkeyPatch, owner: type | object, method: str, action: Callable[[], object]) -> None:
    """Do something once, just before a function is called."""
    real = getattr(owner, method)

    def changed(*arguments: object, **keywords: object) -> object:
        monkeypatch.setattr(owner, method, real)
        action()
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, method, changed)


@pytest.mark.parametrize("of", ["a checkpoint", "the base"])
def test_a_name_that_another_gives_meanwhile(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    ws = store.workspaces.create("w", source)
    first, second = checkpoint(ws, "one"), checkpoint(ws, "two")

    def name(identifier: str, given: str = "n") -> None:
        naming.give(store.snapshotter, ws._top(), naming.find(store.snapshotter, ws._top(), identifier), given)

    before(monkeypatch, Catalog, "update", lambda: name("base" if of == "the base" else first.id))
    with pytest.raises(errors.AlreadyExists, match="has a checkpoint n already"):
        name(second.id)
    assert ["n" in each.names for each in ws.log()] == [of == "the base", of != "the base", False]
    before(monkeypatch, Catalog, "update", lambda: name(second.id, "m"))
    with pytest.raises(errors.AlreadyExists, match="has a checkpoint m already"):
        name("base", "m")


def test_a_name_for_what_another_forgets_meanwhile(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = store.workspaces.create("w", source)
    first = checkpoint(ws, "one")
    checkpoint(ws, "two")
    other = ws.fork("other", at=first)
    record = naming.find(store.snapshotter, other._top(), first)

    def forget() -> None:
        checkpoints.forget(store.snapshotter, [record], everywhere=True)

    before(monkeypatch, Catalog, "update", forget)
    with pytest.raises(errors.NotFound):
        other.checkpoint("n")
    assert all("n" not in each.names for each in ws.log())


def test_a_name_that_the_next_checkpoint_was_to_get(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = store.workspaces.create("w", source)
    first = checkpoint(ws, "one")
    top = ws._top()
    record = naming.find(store.snapshotter, top, first)
    before(monkeypatch, chains, "_commit", lambda: naming.give(store.snapshotter, top, record, "n"))
    with pytest.raises(errors.AlreadyExists, match="has a checkpoint n already"):
        checkpoint(ws, "two", "n")
    assert [each.names for each in ws.log()] == [(), ("n",)]
    assert checkpoint(ws, "two", "m").names == ("m",)


def test_two_merges_at_once_are_both_remembered(store: Store, source: Path, root: Path) -> None:
    ws = store.workspaces.create("w", source)
    first, second = checkpoint(ws, "one"), checkpoint(ws, "two")
    before_both = ws._top()
    for number, state in enumerate((first, second)):
        record = naming.find(store.snapshotter, before_both, state)
        (root / f"target-{number}").mkdir()
        (root / f"target-{number}" / "file").write_text("captured")
        merging.merge(ws._site, before_both, record, str(root / f"target-{number}"), ())
    remembered = store.snapshotter.catalog.get(OWNER, top_key("w")).labels[MERGED]
    assert remembered.split() == [first.id, second.id]


@pytest.mark.parametrize("live", [True, False])
def test_a_base_that_another_process_cleans_up(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    started: list[Record] = []
    real = chains.start

    def start(
        snapshotter: RecordedSnapshotter, keys: Sequence[str], onto: Record, labels: Sequence[Mapping[str, str]]
    ) -> list[Record]:
        if not started:
            snapshotter.remove(onto.name)
        started.append(onto)
        return real(snapshotter, keys, onto, labels)

    monkeypatch.setattr(chains, "start", start)
    ws = store.workspaces.create("w", source, live=live)
    assert len(started) == 2
    with ws.mounted() as tree:
        assert (tree / "file").read_text() == "captured"
    monkeypatch.setattr(chains, "start", real)
    with pytest.raises(errors.AlreadyExists):
        store.workspaces.create("w", source, live=live)
