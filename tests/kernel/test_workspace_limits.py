"""Limits of what a command may write in a workspace."""

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
    source = root / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/file").write_text("old")
    with onlap.open(root / "store", snapshotter="overlay", sync="none") as store:
        yield store


def test_a_command_below_the_limit_leaves_all_that_it_wrote(store: Store, root: Path) -> None:
    workspace = store.workspaces.create("w", root / "source", max_bytes=1 << 20, max_inodes=20)
    script = "echo new > d/file; mkdir e; ln -s x e/l; mkfifo e/p; ln d/file hard; chmod 751 e; rm -r d; mkdir d; > d/n"
    ran = workspace.run(["sh", "-c", script])
    assert ran.status == 0
    changed = {(change.kind, change.path) for change in ran.changes}
    assert changed == {("C", "d"), ("D", "d/file"), ("A", "d/n"), ("A", "e"), ("A", "e/l"), ("A", "e/p"), ("A", "hard")}
    with workspace.fork().mounted() as tree:
        assert os.listdir(tree / "d") == ["n"]
        assert (tree / "e").stat().st_mode & 0o777 == 0o751
        assert os.readlink(tree / "e/l") == "x"


@pytest.mark.parametrize("size, inodes", [(1 << 20, None), (None, 30)], ids=["bytes", "inodes"])
def test_a_command_that_fills_it_fails_and_others_go_on(
    store: Store, root: Path, size: int | None, inodes: int | None
) -> None:
    workspace = store.workspaces.create("w", root / "source", max_bytes=size, max_inodes=inodes)
    script = "for i in $(seq 100); do head -c 100000 /dev/zero > f$i || exit 9; done"
    with pytest.raises(errors.ResourceExhausted, match="limit of workspace w") as caught:
        workspace.run(["sh", "-c", script])
    assert caught.value.key == "w"
    assert 5 < len(list(workspace.diff())) <= 31
    other = store.workspaces.create("other", root / "source")
    assert other.run(["sh", "-c", script]).status == 0
    workspace.rollback()
    assert workspace.run(["sh", "-c", "echo small > f"]).status == 0
    with pytest.raises(errors.ResourceExhausted):
        workspace.fork().run(["sh", "-c", script])


def test_where_a_limit_cannot_be_kept_it_says_so(store: Store, root: Path) -> None:
    workspace = store.workspaces.create("w", root / "source", max_bytes=1 << 20)
    with workspace.mounted(), pytest.raises(errors.Unimplemented, match="hold neither"):
        workspace.run(["true"])
    with pytest.raises(errors.Unimplemented):
        workspace.run(["true"], isolation="runtime")
    for wrong in (0, -1, 1.5):
        with pytest.raises(errors.InvalidArgument):
            store.workspaces.create("x", root / "source", max_bytes=wrong)  # type: ignore[arg-type]
    with (
        onlap.open(root / "native", snapshotter="native") as native,
        pytest.raises(errors.Unimplemented, match="overlay root"),
    ):
        native.workspaces.create("w", root / "source", max_inodes=10)
    assert "x" not in store.workspaces
