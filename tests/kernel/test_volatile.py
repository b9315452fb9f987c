"""Roots that are empty after a reboot."""

from __future__ import annotations

from pathlib import Path

import pytest

import onlap
from onlap import errors


@pytest.mark.needs("overlay")
def test_its_overlays_are_volatile_and_can_be_mounted_again(root: Path) -> None:
    with onlap.open(root / "store", snapshotter="overlay", volatile=True) as store:
        with store.build("base") as tree:
            (tree / "file").write_text("text")
        assert "volatile" in store.prepare("work", "base")[0].flags
        for content in ("one", "two"):
            with store.mounted("work") as tree:
                (tree / "file").write_text(content)
        with store.mounted("work") as tree:
            assert (tree / "file").read_text() == "two"


@pytest.mark.parametrize("kind", ["overlay", "native"])
def test_it_is_empty_after_a_reboot(
    tmp_path: Path, kind: onlap.store.SnapshotterKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    with onlap.open(root, snapshotter=kind, volatile=True) as store:
        store.prepare("work")
        store.commit("base", "work")
    with onlap.open(root) as store:
        assert store.snapshotter.volatile
        assert "base" in store
    monkeypatch.setattr("onlap.catalog.volatile.boot_id", lambda: "another")
    for _ in range(2):
        with onlap.open(root) as store:
            assert store.snapshotter.volatile
            assert list(store.walk()) == []
            store.cleanup()
            assert list((root / "snapshots").iterdir()) == []
            assert not store.check(deep=True).findings
            store.prepare("work")
            store.remove("work")


def test_a_root_that_keeps_its_content_does_not_become_volatile(tmp_path: Path) -> None:
    onlap.open(tmp_path / "store", snapshotter="native").close()
    with pytest.raises(errors.FailedPrecondition, match="cannot become volatile"):
        onlap.open(tmp_path / "store", volatile=True)


def test_no_checkpoint_of_it_is_durable(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "store", snapshotter="native", volatile=True) as store:
        store.prepare("work")
        store.commit("base", "work")
        workspace = store.workspaces.create("w", "base")
        with workspace.mounted() as tree:
            (tree / "file").write_text("text")
        with pytest.raises(errors.FailedPrecondition, match="is volatile"):
            workspace.checkpoint("kept", durable=True)
        assert not workspace.checkpoint("kept").durable


def test_what_is_restored_from_a_backup_of_it_keeps_its_content(tmp_path: Path) -> None:
    with onlap.open(tmp_path / "store", snapshotter="native", volatile=True) as store:
        store.prepare("work")
        store.commit("base", "work")
        store.backup(tmp_path / "backup.tar")
    onlap.restore(tmp_path / "backup.tar", tmp_path / "restored")
    with onlap.open(tmp_path / "restored") as store:
        assert not store.snapshotter.volatile
        assert "base" in store
