"""What the tests of merges share: a captured directory, a workspace on the capture, and both trees afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults import FAULTS, Fault, Injection
from kernel.layer_oracle import TRUSTED
from onlap.mounts.plan import overlay
from onlap.snapshots.contexts import mounted
from onlap.syscalls import files
from onlap.testing import Tree, differences, read_tree
from onlap.testing.same import Listing
from onlap.workspaces.merge.apply import apply
from onlap.workspaces.merge.entries import Merged, MergePlan
from onlap.workspaces.merge.plan import plan

# Directories' times move with what is made in them.
NOT_COMPARED = ("times",)


class Workspace:
    """A directory, what was captured of it, and what a workspace changed.

    Args:
        place: an empty directory, where OverlayFS works.
        tree: what the directory has in the beginning.
        flags: more options of the workspace's mounts.
    """

    def __init__(self, place: Path, tree: Tree, flags: tuple[str, ...] = ()) -> None:
        self._place = place
        self._flags = flags
        self.target = place / "target"
        self.target.mkdir()
        tree.apply(self.target)
        self.base = place / "base"
        copy(self.target, self.base)
        self.upper = place / "upper"
        self.upper.mkdir()
        shutil.copystat(self.base, self.upper)

    @property
    def before(self) -> list[str]:
        """The layers of the capture."""
        return [str(self.base)]

    @property
    def after(self) -> list[str]:
        """The layers of the workspace."""
        return [str(self.upper), str(self.base)]

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """The workspace's tree, writable."""
        work = self._place / "work"
        work.mkdir()
        with mounted(overlay((str(self.base),), upper=str(self.upper), work=str(work), flags=self._flags)) as tree:
            yield tree
        shutil.rmtree(work)

    def change(self, tree: Tree) -> None:
        """Change something in the workspace."""
        with self.mounted() as merged:
            tree.apply(merged)

    def wanted(self) -> Listing:
        """All that the workspace has."""
        with self.mounted() as merged:
            return read_tree(merged)

    def plan(self, select: Sequence[str] = ()) -> MergePlan:
        """The plan of a merge into the directory."""
        return plan(self.before, self.after, TRUSTED, str(self.target), select=select)

    def apply(self, done: MergePlan) -> Merged:
        """Do a plan."""
        return apply(done, self.after, TRUSTED)

    def merge(self, select: Sequence[str] = ()) -> Merged:
        """Plan and do."""
        return self.apply(self.plan(select))

    def states(self, select: Sequence[str] = ()) -> dict[str, str]:
        """The state of each path of a plan; the reason for those in conflict."""
        return {entry.path: entry.reason or entry.state for entry in self.plan(select).entries}

    def left(self) -> list[str]:
        """What merges have left beside the target, or in it."""
        names = [*os.listdir(self._place), *os.listdir(self.target)]
        return sorted(name for name in names if name.startswith(".") and "onlap" in name)


def copy(source: Path, target: Path) -> None:
    """A complete copy of a tree."""
    subprocess.run(["cp", "-a", "--", source, target], check=True)


def unlike(one: Listing, other: Listing) -> list[str]:
    """How two trees differ, but for the times of directories."""
    return differences(one, other, ignore=NOT_COMPARED) + [
        f"{path!r}: times"
        for path in one.keys() & other.keys()
        if one[path].type != "directory" and one[path].times != other[path].times
    ]


# What is merged again and again.
BASE = (
    Tree()
    .file("edited", b"before")
    .file("removed", b"gone")
    .directory("attributes", mode=0o755)
    .directory("gone", mode=0o711, mtime_ns=10**18)
    .file("gone/inside", b"inside")
    .file("to-directory", b"a file")
    .directory("to-file", mtime_ns=10**18)
    .symlink("pointer", "edited")
)
CHANGES = (
    Tree()
    .write("edited", b"after, and longer")
    .remove("removed")
    .chmod("attributes", 0o700)
    .xattr("attributes", "user.directory", b"yes")
    .remove("gone/inside")
    .remove("gone")
    .remove("to-directory")
    .directory("to-directory")
    .file("to-directory/inside", b"new")
    .remove("to-file")
    .file("to-file", b"a file now")
    .remove("pointer")
    .symlink("pointer", "to-file")
    .directory("new", mode=0o555)
    .file("new/file", b"deep", mode=0o600)
    .link("new/hard", "new/file")
)


def is_a_system_call(called: object) -> bool:
    """Whether this is a function of Python's or ours that makes one."""
    return FAULTS["EIO"].comes_from(called) or getattr(called, "__module__", "") == "onlap.syscalls._libc"


def _kill() -> Exception:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it was killed")


KILL = Fault(_kill, is_a_system_call)


class Scene:
    """A merge that is done again and again, each time into the directory as it was captured."""

    def __init__(self, place: Path) -> None:
        self.workspace = Workspace(place, BASE)
        self.workspace.change(CHANGES)
        self.before = read_tree(self.workspace.target)
        self.after = self.workspace.wanted()
        self._kept = place / "kept"
        copy(self.workspace.target, self._kept)

    def restore(self) -> None:
        """Let everything be as before."""
        target = self.workspace.target
        for path in [target, *(target.parent / name for name in self.workspace.left())]:
            shutil.rmtree(path)
        copy(self._kept, target)

    def outcome(self) -> str:
        """Which of both trees there is; fails for any other, and for anything that is left."""
        assert not self.workspace.left()
        now = read_tree(self.workspace.target)
        if not unlike(now, self.after):
            return "all"
        assert not unlike(now, self.before)
        return "nothing"


@pytest.fixture
def scene(root: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene on which no merge waits for the disk; tests/crash cuts its power."""
    monkeypatch.setattr(files, "syncfs", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return Scene(root)


def count(fault: Fault, act: Callable[[], object]) -> int:
    """At how many places a fault may come."""
    with Injection(fault, 0) as injection:
        act()
    return injection.count


def places(scene: Scene) -> int:
    """At how many system calls a merge could be killed."""
    found = count(KILL, scene.workspace.merge)
    assert scene.outcome() == "all"
    return found


def in_a_child(act: Callable[[], object], fault: Fault, number: int) -> int:
    """Do something in a child with a fault; its exit status as by waitstatus_to_exitcode."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        with Injection(fault, number):
            act()
        status = 0
    finally:
        os._exit(status)
