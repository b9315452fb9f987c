"""Merging into a directory, and from a workspace, that somebody prepared to lead elsewhere."""

from __future__ import annotations

import json
import os
import platform
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kernel.helpers import NOBODY, OPENAT2, output, without
from kernel.merges import KILL, Workspace, copy, count, in_a_child, unlike
from onlap import errors
from onlap.testing import Tree, read_tree
from onlap.workspaces.merge.staging import claim
from onlap.workspaces.merge.target import Target
from onlap.workspaces.merge.undo import recover

pytestmark = pytest.mark.needs("overlay", "mount")

BASE = (
    Tree()
    .file("edited", b"before")
    .directory("kept")
    .file("kept/inside", b"inside")
    .directory("gone")
    .file("gone/inside", b"inside")
)
CHANGES = (
    Tree()
    .write("edited", b"after")
    .write("kept/inside", b"after")
    .file("kept/new", b"new")
    .remove("gone/inside")
    .remove("gone")
)
NAME = ".target.onlap-merge"


@pytest.fixture
def workspace(root: Path) -> Workspace:
    made = Workspace(root, BASE)
    made.change(CHANGES)
    return made


@pytest.fixture
def elsewhere(root: Path) -> Path:
    """A directory that must never change; it looks like the target."""
    path = root / "elsewhere"
    copy(root / "target", path)
    return path


@contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """A bind mount."""
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


MOUNTS = {
    "a directory on the way": ("kept", "kept", "kept/inside"),
    "a file": ("edited", "edited", "edited"),
    "a directory that is to be removed": ("gone", "gone", "gone"),
    "a file in it": ("gone/inside", "gone/inside", "gone/inside"),
}


@pytest.mark.parametrize("name", MOUNTS)
@pytest.mark.parametrize("planned", [True, False])
def test_mounts_in_the_target(workspace: Workspace, elsewhere: Path, name: str, planned: bool) -> None:
    source, at, path = MOUNTS[name]
    before, there = read_tree(elsewhere), read_tree(workspace.target)
    with ExitStack() as cleanup:
        if not planned:
            cleanup.enter_context(bound(elsewhere / source, workspace.target / at))
        plan = workspace.plan()
        if not planned:
            assert "mounted" in {entry.path: entry.reason for entry in plan.conflicts}[path]
        else:
            assert not plan.conflicts
            cleanup.enter_context(bound(elsewhere / source, workspace.target / at))
        with pytest.raises(errors.FailedPrecondition):
            workspace.apply(plan)
    assert not unlike(before, read_tree(elsewhere))
    assert not unlike(there, read_tree(workspace.target))
    assert not workspace.left()


def test_links_of_the_workspace_lead_nowhere(workspace: Workspace, elsewhere: Path) -> None:
    before = read_tree(elsewhere)
    workspace.change(
        Tree()
        .remove("kept/new")
        .remove("kept/inside")
        .remove("kept")
        .symlink("kept", str(elsewhere / "kept"))
        .symlink("up", "../elsewhere")
        .symlink("root", "/")
    )
    workspace.merge()
    assert not unlike(workspace.wanted(), read_tree(workspace.target))
    assert not unlike(before, read_tree(elsewhere))
    assert os.readlink(workspace.target / "root") == "/"


def test_fifos_are_never_opened(workspace: Workspace) -> None:
    workspace.change(Tree().remove("edited").fifo("edited").fifo("kept/pipe"))
    workspace.merge()
    (workspace.target / "edited").unlink()
    os.mkfifo(workspace.target / "edited", 0o600)
    workspace.change(Tree().remove("edited").file("edited", b"a file again"))
    assert workspace.states()["edited"] == "changed in the target"


@pytest.mark.parametrize("what", ["symlink", "file", "another's", "open to others", "fifo"])
def test_a_planted_staging_directory(workspace: Workspace, elsewhere: Path, what: str) -> None:
    planted = workspace.target.parent / NAME
    before = read_tree(elsewhere)
    if what == "symlink":
        planted.symlink_to(elsewhere)
    elif what == "file":
        planted.write_bytes(b"")
    elif what == "fifo":
        os.mkfifo(planted)
    else:
        planted.mkdir(mode=0o700 if what == "another's" else 0o777)
        # An order to move something of the target away.
        (planted / "journal").write_text("x\n" + json.dumps({"inode": 0, "steps": []}))
        if what == "another's":
            os.chown(planted, NOBODY, NOBODY)
        else:
            planted.chmod(0o777)
    workspace.merge()
    assert not unlike(workspace.wanted(), read_tree(workspace.target))
    assert not unlike(before, read_tree(elsewhere))
    assert workspace.left() == [NAME]
    # In the target as well: nowhere is left.
    (workspace.target / NAME).symlink_to(elsewhere)
    workspace.change(Tree().file("another", b""))
    with pytest.raises(errors.PermissionDenied):
        workspace.merge()
    assert not (workspace.target / "another").exists()
    assert not unlike(before, read_tree(elsewhere))


def test_one_merge_at_a_time(workspace: Workspace) -> None:
    plan = workspace.plan()
    with Target(str(workspace.target)) as target, ExitStack() as cleanup:
        claim(target, cleanup)
        for act in (workspace.plan, lambda: workspace.apply(plan), lambda: recover(str(workspace.target))):
            with pytest.raises(errors.Busy, match="another merge") as raised:
                act()
            assert raised.value.key == str(workspace.target)
    assert workspace.apply(plan).applied == 5


def interrupted(workspace: Workspace) -> None:
    """Kill a merge in the middle of its steps."""
    plan = workspace.plan()
    kept = workspace.target.with_name("kept-target")
    copy(workspace.target, kept)
    total = count(KILL, lambda: workspace.apply(plan))
    subprocess.run(["rm", "-rf", workspace.target], check=True)
    kept.rename(workspace.target)
    for number in range(total * 2 // 3, 1, -1):
        assert in_a_child(workspace.merge, KILL, number + count(KILL, workspace.plan)) != 0
        if (workspace.target.parent / NAME / "journal").exists():
            return
    raise AssertionError("no journal was found")


def test_a_damaged_journal_is_kept(workspace: Workspace) -> None:
    interrupted(workspace)
    journal = workspace.target.parent / NAME / "journal"
    journal.write_bytes(journal.read_bytes()[:-10])
    with pytest.raises(errors.DataLoss, match="kept") as raised:
        workspace.plan()
    assert raised.value.key is not None
    assert Path(raised.value.key, "journal").exists()
    workspace.plan()


def test_a_journal_that_was_not_complete(workspace: Workspace) -> None:
    before = read_tree(workspace.target)
    staging = workspace.target.parent / NAME
    staging.mkdir(mode=0o700)
    (staging / "1").write_bytes(b"staged")
    (staging / "journal.partial").write_bytes(b"0123")
    assert recover(str(workspace.target))
    assert not recover(str(workspace.target))
    assert not workspace.left()
    assert not unlike(before, read_tree(workspace.target))


def test_the_journal_of_a_directory_that_was_replaced(workspace: Workspace) -> None:
    interrupted(workspace)
    workspace.target.rename(workspace.target.with_name("moved"))
    copy(workspace.base, workspace.target)
    before = read_tree(workspace.target)
    with pytest.raises(errors.FailedPrecondition, match="unfinished merge"):
        workspace.plan()
    assert not unlike(before, read_tree(workspace.target))
    workspace.merge()


def test_a_target_that_is_a_mount(workspace: Workspace, loop_ext4: Callable[[int], Path]) -> None:
    place = loop_ext4(16)
    subprocess.run(["cp", "-aT", workspace.target, place], check=True)
    workspace.target = place
    workspace.merge()
    assert (place / "kept/new").read_bytes() == b"new"
    assert not [name for name in os.listdir(place) if "onlap" in name]


def test_a_target_by_a_symlink(workspace: Workspace) -> None:
    link = workspace.target.with_name("link")
    link.symlink_to("target")
    real, workspace.target = workspace.target, link
    workspace.merge()
    assert (real / "edited").read_bytes() == b"after"


@pytest.mark.parametrize("what", ["missing", "file"])
def test_no_target(workspace: Workspace, what: str) -> None:
    workspace.target = workspace.target.with_name("other")
    if what == "file":
        workspace.target.write_bytes(b"")
    with pytest.raises(errors.OnlapError) as raised:
        workspace.plan()
    assert isinstance(raised.value, errors.NotFound if what == "missing" else errors.InvalidArgument)
    assert raised.value.key == str(workspace.target)


@pytest.mark.parametrize("planned", [True, False])
def test_mounts_on_an_old_kernel(workspace: Workspace, elsewhere: Path, planned: bool) -> None:
    before = read_tree(elsewhere)
    with ExitStack() as cleanup:
        plan = workspace.plan()
        cleanup.enter_context(bound(elsewhere / "kept", workspace.target / "kept"))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                exec(without(OPENAT2), {})
                workspace.apply(plan if planned else workspace.plan())
            except errors.FailedPrecondition as error:
                status = 0 if "mounted" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not unlike(before, read_tree(elsewhere))
    workspace.merge()
    assert not unlike(workspace.wanted(), read_tree(workspace.target))


def test_what_the_kernel_refuses_is_named(workspace: Workspace) -> None:
    before = read_tree(workspace.target)
    path = workspace.target / "gone/inside"
    if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("no immutable files here")
    try:
        with pytest.raises(errors.PermissionDenied, match="gone/inside"):
            workspace.merge()
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    assert not unlike(before, read_tree(workspace.target))
    assert not workspace.left()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of renameat2 is that of x86_64")
def test_without_exchanges(workspace: Workspace) -> None:
    before = read_tree(workspace.target)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            exec(without(316), {})
            workspace.merge()
        except errors.Unimplemented:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert not unlike(before, read_tree(workspace.target))
    assert not workspace.left()


_ORDINARY = """
import os, sys
from pathlib import Path
from onlap.overlayfs.markers import Markers
from onlap.workspaces.merge.apply import apply
from onlap.workspaces.merge.plan import plan
place = Path(sys.argv[1])
os.umask(0o022)
base, upper, target = place / "base", place / "upper", place / "target"
for top in (base, target):
    top.mkdir()
    (top / "edited").write_text("before")
    (top / "locked").mkdir()
    (top / "locked" / "inside").write_text("before")
    (top / "locked" / "removed").write_text("gone")
    (top / "sealed").mkdir()
    (top / "sealed" / "removed").write_text("gone")
    (top / "locked").chmod(0o555)
    (top / "sealed").chmod(0o555)
upper.mkdir()
(upper / "edited").write_text("after")
(upper / "locked").mkdir()
(upper / "locked" / "inside").write_text("after")
os.mknod(upper / "locked" / "removed", 0o020000, 0)
(upper / "locked").chmod(0o555)
os.mknod(upper / "sealed", 0o020000, 0)
for name, owner in (("another's", "0:0"), ("own", f"{os.getuid()}:{os.getgid()}")):
    path = upper / name
    path.write_text("program")
    os.setxattr(path, "user.containers.override_stat", f"{owner}:0100755".encode())
    path.chmod(0o4755)
(upper / "new").mkdir()
(upper / "new" / "file").write_text("new")
(upper / "new").chmod(0o555)
if sys.argv[2] == "inside":
    place.chmod(0o555)
layers = [str(upper), str(base)]
markers = Markers("user")
planned = plan([str(base)], layers, markers, str(target))
assert not planned.conflicts, planned.conflicts
if sys.argv[2] == "fails":
    with open(target / "edited", "r+") as writer:
        try:
            apply(planned, layers, markers)
        except Exception as error:
            print(type(error).__name__, error.key)
else:
    print(apply(planned, layers, markers).applied)
    again = plan([str(base)], layers, markers, str(target))
    print(sorted({entry.state for entry in again.entries}))
place.chmod(0o755)
"""


@pytest.mark.needs("ordinary_user")
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_as_an_ordinary_user(ordinary: Path, where: str) -> None:
    assert output(_ORDINARY, ordinary, where, ordinary=True) == "9\n['same']\n"
    target = ordinary / "target"
    assert stat.S_IMODE((target / "another's").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "own").stat().st_mode) == 0o4755
    assert os.listxattr(target / "own") == []
    assert stat.S_IMODE((target / "locked").stat().st_mode) == 0o555
    assert sorted(os.listdir(target)) == ["another's", "edited", "locked", "new", "own"]
    assert os.listdir(target / "locked") == ["inside"]
    assert stat.S_IMODE((target / "new").stat().st_mode) == 0o555
    assert sorted(os.listdir(ordinary)) == ["base", "target", "upper"]


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_users_merge_is_undone(ordinary: Path) -> None:
    assert output(_ORDINARY, ordinary, "fails", ordinary=True) == "FailedPrecondition edited\n"
    assert not unlike(
        {p: n._replace(times=0) for p, n in read_tree(ordinary / "base").items()},
        {p: n._replace(times=0) for p, n in read_tree(ordinary / "target").items()},
    )
    assert sorted(os.listdir(ordinary)) == ["base", "target", "upper"]
