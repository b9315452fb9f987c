"""Merging a workspace's changes into the directory that was captured: every kind of change, conflicts, selections."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernel.layer_stacks import CAPABILITY, METACOPY
from kernel.merges import Workspace, copy, unlike
from onlap import errors
from onlap.mounts.plan import overlay
from onlap.snapshots.contexts import mounted
from onlap.testing import Tree, read_tree

pytestmark = pytest.mark.needs("overlay", "mount")

BASE = (
    Tree()
    .file("edited", b"before", mtime_ns=10**18)
    .file("untouched", b"stays")
    .file("removed", b"gone")
    .file("mode", b"m", mode=0o640)
    .file("owned", b"o")
    .file("marked", b"x", xattrs={"user.a": b"1", "user.b": b"2"})
    .file("to-directory", b"a file")
    .file("one", b"linked")
    .link("two", "one")
    .symlink("pointer", "edited")
    .symlink("to-root", "/")
    .directory("kept")
    .file("kept/inside", b"inside")
    .directory("attributes", mode=0o755)
    .directory("gone")
    .directory("gone/deep")
    .file("gone/deep/file", b"deep")
    .symlink("gone/link", "/etc")
    .directory("to-file")
    .file("to-file/inside", b"inside")
    .fifo("pipe")
    .file(b"not-utf8-\xff", b"before")
)
CHANGES = (
    Tree()
    .write("edited", b"after, and longer")
    .remove("removed")
    .chmod("mode", 0o4755)
    .chown("owned", 1234, 5678)
    .xattr("marked", "user.a", b"changed")
    .xattr("marked", "user.b", None)
    .remove("to-directory")
    .directory("to-directory", mode=0o2775)
    .file("to-directory/inside", b"new")
    .remove("pointer")
    .symlink("pointer", "untouched")
    .remove("to-root")
    .directory("to-root")
    .file("to-root/passwd", b"not that of the machine")
    .remove("kept/inside")
    .chmod("attributes", 0o700)
    .xattr("attributes", "user.directory", b"yes")
    .remove("gone/deep/file")
    .remove("gone/deep")
    .remove("gone/link")
    .remove("gone")
    .remove("to-file/inside")
    .remove("to-file")
    .file("to-file", b"a file now")
    .remove("pipe")
    .fifo("new-pipe", mode=0o600)
    .write(b"not-utf8-\xff", b"after")
    .directory("new", mode=0o500)
    .directory("new/\udcfe", mode=0o750, mtime_ns=10**18)
    .file("new/\udcfe/file", b"deep", mode=0o4755, uid=77, mtime_ns=10**18 + 7)
    .link("new/hard", "new/\udcfe/file")
    .file("capable", b"c", xattrs={"security.capability": CAPABILITY})
    .device("null", 1, 3)
)


@pytest.fixture
def workspace(root: Path) -> Workspace:
    return Workspace(root, BASE)


def test_every_kind_of_change(workspace: Workspace) -> None:
    workspace.change(CHANGES)
    plan = workspace.plan()
    assert not plan.conflicts
    assert {entry.state for entry in plan.entries} == {"apply"}
    assert "gone/deep/file" in {entry.path for entry in plan.entries}
    done = workspace.apply(plan)
    assert done == (len(plan.entries), 0)
    assert not unlike(workspace.wanted(), read_tree(workspace.target))
    assert not workspace.left()
    assert set(workspace.states().values()) == {"same"}
    assert workspace.merge() == (0, len(plan.entries))


def test_what_is_the_same_keeps_its_file(workspace: Workspace) -> None:
    workspace.change(Tree().write("edited", b"after").times("untouched", 5).file("new", b"n"))
    shutil.copy(workspace.target / "untouched", workspace.target / "new")
    (workspace.target / "new").write_bytes(b"n")
    (workspace.target / "new").chmod(0o644)
    inode = (workspace.target / "untouched").stat().st_ino
    assert workspace.states() == {"edited": "apply", "new": "same", "untouched": "same"}
    assert workspace.merge() == (1, 2)
    assert (workspace.target / "untouched").stat().st_ino == inode


def test_a_time_alone_is_no_conflict(workspace: Workspace) -> None:
    workspace.change(Tree().write("edited", b"after").remove("removed"))
    os.utime(workspace.target / "edited")
    os.utime(workspace.target / "removed")
    workspace.merge()
    assert (workspace.target / "edited").read_bytes() == b"after"
    assert not (workspace.target / "removed").exists()


CONFLICTS = {
    "edited": (Tree().write("edited", b"theirs"), "edited", "changed in the target"),
    "edited to the same size and time": (
        Tree().write("edited", b"THEIRS").times("edited", 10**18),
        "edited",
        "changed in the target",
    ),
    "mode": (Tree().chmod("edited", 0o600), "edited", "changed in the target"),
    "xattr": (Tree().xattr("edited", "user.theirs", b"1"), "edited", "changed in the target"),
    "owner": (Tree().chown("edited", 5, 5), "edited", "changed in the target"),
    "removed": (Tree().remove("edited"), "edited", "removed in the target"),
    "edited and removed": (Tree().write("removed", b"theirs"), "removed", "changed in the target"),
    "appeared": (Tree().file("new", b"theirs"), "new", "appeared in the target"),
    "a directory": (Tree().remove("edited").directory("edited"), "edited", "changed in the target"),
    "a symlink": (Tree().remove("edited").symlink("edited", "/etc/passwd"), "edited", "changed in the target"),
    "a fifo": (Tree().remove("edited").fifo("edited"), "edited", "changed in the target"),
    "not empty": (Tree().file("gone/deep/theirs", b""), "gone/deep", "not empty there"),
    "not empty where a file is to be": (Tree().file("to-file/theirs", b""), "to-file", "not empty there"),
    "the directory's mode": (Tree().chmod("attributes", 0o711), "attributes", "changed in the target"),
    "a directory is gone": (
        Tree().remove("kept/inside").remove("kept"),
        "kept/another",
        "its directory is not there any more",
    ),
    "a file instead of the directory": (
        Tree().remove("kept/inside").remove("kept").file("kept", b""),
        "kept/another",
        "a file is on its way",
    ),
    "a symlink on the way": (
        Tree().rename("kept", "elsewhere").symlink("kept", "elsewhere"),
        "kept/another",
        "a symlink is on its way",
    ),
    "a symlink to / on the way": (
        Tree().rename("kept", "elsewhere").symlink("kept", "/"),
        "kept/another",
        "a symlink is on its way",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts(workspace: Workspace, name: str) -> None:
    theirs, path, reason = CONFLICTS[name]
    workspace.change(CHANGES + Tree().file("kept/another", b"a").write("edited", b"BEFORE"))
    if name != "appeared":
        workspace.change(Tree().remove("null"))
    else:
        workspace.change(Tree().chmod("new", 0o700).rename("new", "newer").file("new", b"ours"))
    theirs.apply(workspace.target)
    before = read_tree(workspace.target)
    plan = workspace.plan()
    assert {entry.path: entry.reason for entry in plan.conflicts}[path] == reason
    with pytest.raises(errors.FailedPrecondition, match="conflict") as raised:
        workspace.apply(plan)
    assert raised.value.key == plan.conflicts[0].path
    assert raised.value.hint
    assert not unlike(before, read_tree(workspace.target))
    assert not workspace.left()


def test_what_both_have_done_is_the_same(workspace: Workspace) -> None:
    theirs = Tree().write("edited", b"both").remove("removed").remove("gone/deep/file").remove("gone/deep")
    theirs.remove("gone/link").remove("gone").directory("new").file("new/x", b"1")
    workspace.change(theirs)
    theirs.apply(workspace.target)
    assert set(workspace.states().values()) == {"same"}


def test_a_directory_that_became_a_symlink_is_merged_once(workspace: Workspace) -> None:
    workspace.change(Tree().remove("kept/inside").remove("kept").symlink("kept", "/"))
    assert workspace.merge() == (2, 0)
    assert workspace.states() == {"kept": "same", "kept/inside": "same"}


def test_changed_since_the_plan(workspace: Workspace) -> None:
    workspace.change(CHANGES)
    plan = workspace.plan()
    (workspace.target / "edited").write_bytes(b"thirds")
    before = read_tree(workspace.target)
    with pytest.raises(errors.FailedPrecondition, match="edited changed since") as raised:
        workspace.apply(plan)
    assert raised.value.key == "edited"
    assert not unlike(before, read_tree(workspace.target))
    assert not workspace.left()


@pytest.mark.parametrize("name", CONFLICTS)
def test_every_conflict_also_after_the_plan(workspace: Workspace, name: str) -> None:
    theirs, _, _ = CONFLICTS[name]
    workspace.change(CHANGES + Tree().file("kept/another", b"a").write("edited", b"BEFORE"))
    if name == "appeared":
        workspace.change(Tree().chmod("new", 0o700).rename("new", "newer").file("new", b"ours"))
    plan = workspace.plan()
    assert not plan.conflicts
    theirs.apply(workspace.target)
    before = read_tree(workspace.target)
    with pytest.raises(errors.FailedPrecondition, match="changed since"):
        workspace.apply(plan)
    assert not unlike(before, read_tree(workspace.target))
    assert not workspace.left()


def test_changed_in_the_workspace_since_the_plan(workspace: Workspace) -> None:
    workspace.change(Tree().write("edited", b"after"))
    plan = workspace.plan()
    workspace.change(Tree().write("edited", b"after that"))
    with pytest.raises(errors.FailedPrecondition, match="changed in the workspace"):
        workspace.apply(plan)
    assert (workspace.target / "edited").read_bytes() == b"before"
    assert not workspace.left()


def test_another_directory_since_the_plan(workspace: Workspace) -> None:
    workspace.change(Tree().write("edited", b"after"))
    plan = workspace.plan()
    workspace.target.rename(workspace.target.with_name("old"))
    shutil.copytree(workspace.base, workspace.target, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    with pytest.raises(errors.FailedPrecondition, match="another directory"):
        workspace.apply(plan)


SELECTIONS = {
    ("edited",): {"edited"},
    ("new/**",): {"new", "new/hard", "new/\udcfe", "new/\udcfe/file"},
    ("new/*/file",): {"new", "new/\udcfe", "new/\udcfe/file"},
    ("**/file",): {"gone/deep/file", "new", "new/\udcfe", "new/\udcfe/file"},
    ("gone/**", "[em]*"): {"gone", "gone/deep", "gone/deep/file", "gone/link", "edited", "mode", "marked"},
    ("*-file", "to-directory/*"): {"to-file", "to-directory", "to-directory/inside"},
}


@pytest.mark.parametrize("patterns", SELECTIONS)
def test_selections(workspace: Workspace, patterns: tuple[str, ...]) -> None:
    workspace.change(CHANGES)
    assert set(workspace.states(patterns)) == SELECTIONS[patterns]


def test_only_what_is_selected_is_merged(workspace: Workspace) -> None:
    workspace.change(CHANGES)
    before = read_tree(workspace.target)
    assert workspace.merge(["new/**", "edited"]).applied == 5
    after, wanted = read_tree(workspace.target), workspace.wanted()
    changed = {b"edited", b"new", b"new/hard", b"new/\xfe", b"new/\xfe/file"}
    assert not unlike({p: wanted[p] for p in changed}, {p: after[p] for p in changed})
    assert not unlike(
        {p: n for p, n in after.items() if p not in changed}, {k: v for k, v in before.items() if k != b"edited"}
    )


def test_a_directory_without_its_contents_is_not_removed(workspace: Workspace) -> None:
    workspace.change(CHANGES)
    assert workspace.states(["gone"]) == {"gone": "not empty there"}


@pytest.mark.parametrize("pattern", ["nothing", "untouched", "edited/**/x", "/"])
def test_a_pattern_that_matches_nothing(workspace: Workspace, pattern: str) -> None:
    workspace.change(CHANGES)
    with pytest.raises(errors.InvalidArgument, match="matches") as raised:
        workspace.plan(["edited", pattern])
    assert raised.value.key == pattern


def test_a_new_link_to_an_old_file(workspace: Workspace) -> None:
    workspace.change(Tree().link("third", "untouched"))
    assert workspace.states() == {"third": "apply", "untouched": "apply"}
    workspace.merge()
    assert workspace.target.joinpath("third").samefile(workspace.target / "untouched")
    assert set(workspace.states().values()) == {"same"}


def test_that_a_copy_up_parted_links_is_no_change(workspace: Workspace) -> None:
    with workspace.mounted() as tree, open(tree / "one", "r+b"):
        pass
    (workspace.target / "one").write_bytes(b"theirs")
    assert workspace.states() == {}


def test_the_directory_itself(workspace: Workspace) -> None:
    workspace.change(Tree().chmod(".", 0o711).xattr(".", "user.top", b"1"))
    assert workspace.states() == {".": "apply"}
    workspace.merge()
    assert stat.S_IMODE(workspace.target.stat().st_mode) == 0o711
    assert os.getxattr(workspace.target, "user.top") == b"1"


def test_holes_stay_holes(workspace: Workspace) -> None:
    with workspace.mounted() as tree, open(tree / "sparse", "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"in the middle")
    workspace.merge()
    status = (workspace.target / "sparse").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20


def test_very_deep(workspace: Workspace) -> None:
    with workspace.mounted() as tree:
        here = os.open(tree, os.O_RDONLY)
        for _ in range(60):
            os.mkdir("d" * 100, dir_fd=here)
            below = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.close(here)
    assert workspace.merge() == (61, 0)
    assert set(workspace.states().values()) == {"same"}


@contextmanager
def filesystem(kind: str, place: Path, loop_fs: Callable[..., Path]) -> Iterator[Path]:
    """A directory on another kind of filesystem."""
    if kind != "tmpfs":
        yield loop_fs(kind, 400 if kind == "xfs" else 130)
        return
    at = place / "elsewhere"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_on_other_filesystems(workspace: Workspace, root: Path, loop_fs: Callable[..., Path], kind: str) -> None:
    workspace.change(CHANGES)
    with filesystem(kind, root, loop_fs) as place:
        copy(workspace.target, place / "target")
        workspace.target = place / "target"
        assert workspace.merge() == (len(workspace.plan().entries), 0)
        assert not unlike(workspace.wanted(), read_tree(workspace.target))
        assert set(workspace.states().values()) == {"same"}
        assert not [name for name in os.listdir(place) if "onlap" in name]


@pytest.mark.parametrize("doomed", [False, True])
def test_into_a_tree_that_is_itself_an_overlay(workspace: Workspace, root: Path, doomed: bool) -> None:
    workspace.change(CHANGES)
    (root / "lower").mkdir()
    workspace.target.rename(root / "lower" / "target")
    for name in ("over", "over-work"):
        (root / name).mkdir()
    with mounted(overlay((str(root / "lower"),), upper=str(root / "over"), work=str(root / "over-work"))) as tree:
        workspace.target = tree / "target"
        before = read_tree(workspace.target)
        if doomed:
            plan = workspace.plan()
            with open(workspace.target / "removed", "r+b"), pytest.raises(errors.FailedPrecondition, match="writing"):
                workspace.apply(plan)
            assert not unlike(before, read_tree(workspace.target))
        else:
            workspace.merge()
            assert not unlike(workspace.wanted(), read_tree(workspace.target))
        assert os.listdir(tree) == ["target"]


def test_renamed_directories_and_files_without_data(root: Path) -> None:
    workspace = Workspace(root, BASE, METACOPY)
    workspace.change(Tree().rename("gone", "renamed").chmod("kept/inside", 0o600).rename("kept", "moved"))
    workspace.merge()
    assert not unlike(workspace.wanted(), read_tree(workspace.target))
    assert (workspace.target / "moved/inside").read_bytes() == b"inside"


@pytest.mark.parametrize("name", ["n" * 255, "\u4e00" * 85])
def test_a_target_with_a_long_name(workspace: Workspace, name: str) -> None:
    workspace.target = workspace.target.rename(workspace.target.with_name(name))
    workspace.change(CHANGES)
    workspace.merge()
    assert not unlike(workspace.wanted(), read_tree(workspace.target))
    assert not workspace.left()


@pytest.mark.needs("peer:git")
def test_an_index_of_git_that_differs_only_in_stats_is_no_conflict(root: Path) -> None:
    def git(tree: Path, *arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "safe.directory=*", *arguments]
        done = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
        return done.stdout

    workspace = Workspace(root, Tree().directory("sub").file("sub/a", b"a", mtime_ns=10**18))
    git(workspace.target, "init", "-q")
    git(workspace.target, "add", ".")
    git(workspace.target, "commit", "-qm", "one")
    os.utime(workspace.target / ".git/index", ns=(10**18 + 10**10, 10**18 + 10**10))  # else its entries are racy
    shutil.rmtree(workspace.base)
    copy(workspace.target, workspace.base)
    git(workspace.base, "status")  # as a capture does, it exchanges the stats
    index = Path(".git/index")
    assert (workspace.base / index).read_bytes() != (workspace.target / index).read_bytes()
    with workspace.mounted() as tree:
        (tree / "b").write_text("b")
        git(tree, "add", "b")
        git(tree, "commit", "-qm", "two")
    assert set(workspace.states().values()) == {"apply"}
    shutil.copytree(workspace.target, root / "another", symlinks=True)
    workspace.merge()
    assert git(workspace.target, "status", "--porcelain") == ""
    assert git(workspace.target, "log", "--format=%s") == "two\none\n"
    # What was staged there meanwhile is a conflict.
    workspace.target = root / "another"
    (workspace.target / "c").write_text("c")
    git(workspace.target, "add", "c")
    assert workspace.states()[str(index)] == "changed in the target"
