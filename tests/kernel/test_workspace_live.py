"""Workspaces on a directory itself, and what has changed in the directory since."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from onlap import Store, errors

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "store", snapshotter="overlay") as store:
        yield store


@pytest.fixture
def directory(root: Path) -> Path:
    made = root / "directory"
    (made / "below").mkdir(parents=True)
    (made / "below/file").write_text("old")
    (made / "gone").write_text("old")
    return made


def test_the_directory_is_the_lowest_layer_and_is_not_written_to(store: Store, directory: Path) -> None:
    workspace = store.workspaces.create("w", directory, live=True)
    with workspace.mounted() as tree:
        assert sorted(os.listdir(tree)) == ["below", "gone"]
        (tree / "below/file").write_text("new")
        (tree / "gone").unlink()
        workspace.checkpoint("changed")
        assert [(c.kind, c.path) for c in workspace.diff("base")] == [
            ("C", "below"),
            ("C", "below/file"),
            ("D", "gone"),
        ]
    assert (directory / "below/file").read_text() == "old"
    fork = workspace.fork(at="base")
    with fork.mounted() as tree:
        assert (tree / "gone").read_text() == "old"
    assert workspace.merge(select=["below/**"]).applied == 1
    assert (directory / "below/file").read_text() == "new"


def test_nothing_of_it_is_left_when_no_workspace_stands_on_it(store: Store, directory: Path) -> None:
    workspace = store.workspaces.create("w", directory, live=True)
    fork = workspace.fork()
    workspace.remove()
    fork.remove()
    store.cleanup()
    assert list(store.snapshotter.catalog.walk("workspaces")) == []
    assert (directory / "below/file").read_text() == "old"


@pytest.mark.parametrize("live", [True, False])
def test_changes_in_the_directory_are_found(store: Store, directory: Path, live: bool) -> None:
    for name in ("one", "two", "three", "w"):
        (directory / "young").write_text(name)  # what was written just before is no change
        workspace = store.workspaces.create(name, directory, live=live)
        assert list(workspace.source_changes()) == []
    (directory / "below/file").write_text("new")
    (directory / "gone").unlink()
    (directory / "added").symlink_to("gone")
    assert list(workspace.source_changes()) == [".", "added", "below/file", "gone"]
    os.rename(directory, directory.with_name("moved"))
    with pytest.raises(errors.NotFound):
        list(workspace.source_changes())


def test_what_was_excluded_does_not_count(store: Store, directory: Path) -> None:
    workspace = store.workspaces.create("w", directory, exclude=["*.log"])
    (directory / "below/some.log").write_text("text")
    assert [path for path in workspace.source_changes() if path.endswith(".log")] == []


def test_overlapping_directories_are_refused(store: Store, root: Path) -> None:
    (root / "store/snapshots/inside").mkdir()
    for place in (root, root / "store/snapshots/inside"):
        with pytest.raises(errors.InvalidArgument, match="lie in each other"):
            store.workspaces.create("w", place, live=True)


def test_a_native_root_has_no_such_layers(root: Path, directory: Path) -> None:
    with (
        onlap.open(root / "native", snapshotter="native") as store,
        pytest.raises(errors.Unimplemented, match="no layers"),
    ):
        store.workspaces.create("w", directory, live=True)


def test_after_a_restore_the_directory_is_missing_and_not_empty(store: Store, directory: Path) -> None:
    workspace = store.workspaces.create("w", directory, live=True)
    with workspace.mounted() as tree:
        (tree / "added").touch()
    archive, restored = directory.with_name("archive.tar"), directory.with_name("restored")
    store.backup(archive, active=True)
    onlap.restore(archive, restored)
    with onlap.open(restored) as other:
        workspace = other.workspaces["w"]
        with pytest.raises(errors.NotFound, match="not-in-the-backup"), workspace.mounted():
            pass
        with pytest.raises(errors.NotFound, match="not-in-the-backup"):
            workspace.merge()
        for live in restored.glob("snapshots/*/about/live"):
            live.unlink()
            live.symlink_to(directory)
        with workspace.mounted() as tree:
            assert sorted(os.listdir(tree)) == ["added", "below", "gone"]
