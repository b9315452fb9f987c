"""A workspace that is merged, worked in, and merged again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from onlap import Store, Workspace, cancellation, errors

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture
def target(root: Path) -> Path:
    made = root / "target"
    (made / "d").mkdir(parents=True)
    for name in ("a", "b", "d/c"):
        (made / name).write_text("captured")
    return made


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "store", snapshotter="overlay", sync="none") as store:
        yield store


@pytest.fixture
def workspace(store: Store, target: Path) -> Workspace:
    return store.workspaces.create("w", target)


def write(workspace: Workspace, **files: str | None) -> None:
    with workspace.mounted() as tree:
        for name, text in files.items():
            path = tree / name.replace("_", "/")
            if text is None:
                path.unlink()
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)


def contents(directory: Path) -> dict[str, str]:
    found = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_text() for path in found}


def test_what_was_merged_before_is_no_conflict(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one", b=None, new_n="one")
    workspace.merge()
    write(workspace, a="two", b="again", new_n=None, d_c="two")
    workspace.merge()
    assert contents(target) == {"a": "two", "b": "again", "d/c": "two"}
    assert workspace.merge().applied == 0


def test_what_the_workspace_takes_back_is_taken_back(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one", b=None, new_n="one")
    workspace.merge()
    workspace.rollback("base")
    plan = workspace.merge_plan()
    assert {(entry.path, entry.state) for entry in plan.entries} == {
        ("a", "apply"), ("b", "apply"), ("new", "apply"), ("new/n", "apply")
    }  # fmt: skip
    workspace.merge()
    assert contents(target) == {"a": "captured", "b": "captured", "d/c": "captured"}
    assert not (target / "new").exists()


def test_an_edit_that_restored_size_and_time_is_taken_back(stores: tuple[Store, Store], target: Path) -> None:
    for store in stores:
        workspace = store.workspaces.create("w", target)
        with workspace.mounted() as tree:
            before = (tree / "a").stat()
            (tree / "a").write_text("CAPTURED")
            os.utime(tree / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert workspace.merge().applied == 1
        assert contents(target)["a"] == "CAPTURED"
        workspace.rollback("base")
        assert workspace.merge().applied == 1
        assert contents(target)["a"] == "captured"


def test_what_others_wrote_after_a_merge_is_a_conflict(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one", b="one")
    workspace.merge()
    (target / "a").write_text("theirs")
    write(workspace, a="two", b="two")
    with pytest.raises(errors.FailedPrecondition, match="conflicts: a"):
        workspace.merge()
    assert contents(target) == {"a": "theirs", "b": "one", "d/c": "captured"}
    workspace.merge(select=["b"])
    assert contents(target) == {"a": "theirs", "b": "two", "d/c": "captured"}
    # What the workspace has taken back, and others have changed, is theirs.
    workspace.rollback("base")
    workspace.merge()
    assert contents(target) == {"a": "theirs", "b": "captured", "d/c": "captured"}


def test_parts_that_were_merged_at_different_times(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one", b="one")
    workspace.merge(select=["a"])
    write(workspace, a="two", b="two")
    workspace.merge(select=["b"])
    write(workspace, a="three", b="three")
    fork = workspace.fork()
    fork.merge()
    assert contents(target) == {"a": "three", "b": "three", "d/c": "captured"}


def test_a_merged_state_that_was_forgotten_is_unknown(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one")
    workspace.merge()
    merged = workspace.at
    write(workspace, a="two")
    workspace.checkpoint()
    workspace.forget(merged)
    with pytest.raises(errors.FailedPrecondition, match="conflicts: a"):
        workspace.merge()
    os.unlink(target / "a")
    (target / "a").write_text("captured")
    workspace.merge()
    assert (target / "a").read_text() == "two"


def test_merges_that_had_conflicts_do_not_displace_one_that_was_done(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one")
    workspace.merge()
    (target / "b").write_text("theirs")
    for number in range(10):
        write(workspace, a=f"{number}", b=f"{number}")
        with pytest.raises(errors.FailedPrecondition, match=r"b \(changed in the target\)"):
            workspace.merge()
    (target / "b").write_text("captured")
    workspace.merge()
    assert contents(target) == {"a": "9", "b": "9", "d/c": "captured"}


def test_a_canceled_merge_that_is_done_is_remembered(workspace: Workspace, target: Path) -> None:
    write(workspace, a="one")
    with cancellation.Call() as call:
        workspace.merge()
    call.cancel()
    call.undo()
    write(workspace, a="two")
    workspace.merge()
    assert contents(target)["a"] == "two"
