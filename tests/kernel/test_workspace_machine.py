"""A state machine that drives workspaces, beside plain copies of every state that they were in.

Random programs write through the mount; the same is done to a plain directory. Whatever is then checkpointed, rolled
back, forked, forgotten, merged behind or collected: a workspace has the tree of its directory, and every checkpoint the
tree of the copy that was made when it was. How many layers are merged at a time is lowered, so that it happens often.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import onlap
from kernel.programs import Programs, Work, beginning, directory, numbers, steps
from onlap import errors
from onlap.store import SnapshotterKind
from onlap.testing import assert_same_tree, differences, read_tree
from onlap.testing.same import Listing, Node
from onlap.workspaces.history import chains
from onlap.workspaces.records import Checkpoint
from onlap.workspaces.workspace import Workspace

NAMES = ["one", "two", "three", "one.1"]
LABELS = ["green", "red"]
# The overlay breaks hard links when it copies up; and a merge leaves the times of directories alone.
LINKS, MERGED = ("links",), ("links", "times")

names = st.sampled_from(NAMES)
labels = st.sampled_from(LABELS)


class Kept:
    """A checkpoint as it should be.

    Attributes:
        parent: the id of the one before.
        line: the workspace that made it: names are used again.
        names: what each line calls it.
        copy: a plain directory with its tree.
        seen: its tree as it was mounted when it was made.
    """

    def __init__(self, parent: str, line: Line, copy: Path, seen: Listing) -> None:
        self.parent = parent
        self.line = line
        self.names: dict[Line, set[str]] = {}
        self.copy = copy
        self.seen = seen


class Line:
    """A workspace as it should be.

    Attributes:
        at: the id of the checkpoint that it stands on.
        base: what it was made from.
        base_names: what it calls that.
        merged: the paths that it, or what it was forked from, brought into the target.
        tree: a plain directory with its tree.
    """

    def __init__(self, base: Path, tree: Path) -> None:
        self.at = "base"
        self.base = base
        self.base_names: set[str] = set()
        self.merged: set[bytes] = set()
        self.tree = tree


class Machine(RuleBasedStateMachine):
    kind: SnapshotterKind = "overlay"
    merged_at_a_time = 2

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        name = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-test-", dir=directory()))
        self.place = Path(name)
        self.target = self.place / "target"
        self.target.mkdir()
        (self.place / "outside").mkdir()
        self.mounts_before = Path("/proc/self/mountinfo").read_bytes()
        self.open_before = os.listdir("/proc/self/fd")
        self.base_before, chains._BASE = chains._BASE, self.merged_at_a_time
        self.programs = Programs()
        self.copies = 0
        self.lines: dict[str, Line] = {}
        self.kept: dict[str, Kept] = {}
        self.mounted: dict[str, tuple[Workspace, Path, ExitStack]] = {}
        self.open()

    def open(self) -> None:
        self.store = onlap.open(self.place / "root", snapshotter=self.kind, sync="none")

    def unmount_all(self) -> None:
        for name in list(self.mounted):
            self.unmount(name)

    def teardown(self) -> None:
        with self.stack:
            self.stack.callback(setattr, chains, "_BASE", self.base_before)
            self.stack.callback(lambda: self.store.close())
            self.stack.callback(self.unmount_all)
            if sys.exception() is None:  # else that is what there is to tell
                self.finish()
        assert Path("/proc/self/mountinfo").read_bytes() == self.mounts_before
        assert os.listdir("/proc/self/fd") == self.open_before

    def finish(self) -> None:
        self.reopen()
        self.every_checkpoint()
        for name in list(self.lines):
            self.store.workspaces.remove(name)
        self.store.remove("snapshot")
        self.store.cleanup()
        records = {record.name for record in self.store.snapshotter.catalog.walk(None)}
        assert all(name.startswith("capture/") for name in records), records

    def copy(self, tree: Path) -> Path:
        self.copies += 1
        to = self.place / "outside" / str(self.copies)
        subprocess.run(["cp", "-a", "--", tree, to], check=True)
        return to

    def replace(self, tree: Path, source: Path) -> None:
        shutil.rmtree(tree)
        subprocess.run(["cp", "-a", "--", source, tree], check=True)

    def workspace(self, name: str) -> Workspace:
        return self.mounted[name][0] if name in self.mounted else self.store.workspaces[name]

    def pick(self, which: int, *, native: bool = True) -> str:
        known = sorted(self.lines)
        name = known[which % len(known)]
        if self.kind == "native" and not native and name in self.mounted:
            self.unmount(name)  # a copy cannot be replaced under its path
        return name

    def history(self, line: Line) -> list[str]:
        """The ids of a workspace's log, without the base."""
        found = {identifier for identifier, kept in self.kept.items() if kept.line is line}
        for start in [line.at, *found]:
            at = start
            while at != "base":
                found.add(at)
                at = self.kept[at].parent
        return [identifier for identifier in self.kept if identifier in found]

    def choose(self, line: Line, which: int) -> str:
        known = ["base", *self.history(line)]
        return known[which % len(known)]

    def copy_of(self, line: Line, identifier: str) -> Path:
        return line.base if identifier == "base" else self.kept[identifier].copy

    # Beginning and end

    @initialize()
    def sources(self) -> None:
        beginning().apply(self.target)
        self.store.import_(self.target, "snapshot")
        self.snapshot = self.copy(self.target)
        self.create("one", True)

    @rule(name=names, captured=st.booleans())
    def create(self, name: str, captured: bool) -> None:
        source: Any = self.target if captured else "snapshot"
        if name in self.lines:
            with pytest.raises(errors.AlreadyExists):
                self.store.workspaces.create(name, source)
            return
        workspace = self.store.workspaces.create(name, source)
        base = self.copy(self.target if captured else self.snapshot)
        self.lines[name] = Line(base, self.copy(base))
        assert workspace.at.id == "base"
        assert workspace.source == (("directory", str(self.target)) if captured else ("snapshot", "snapshot"))

    @precondition(lambda self: len(self.lines) > 1)
    @rule(which=numbers)
    def remove(self, which: int) -> None:
        name = self.pick(which)
        if name in self.mounted:
            with pytest.raises(errors.Busy):
                self.workspace(name).remove()
            self.unmount(name)
        self.workspace(name).remove()
        line = self.lines.pop(name)
        used = {identifier for other in self.lines.values() for identifier in self.history(other)}
        for identifier, kept in list(self.kept.items()):
            kept.names.pop(line, None)
            if identifier not in used:
                del self.kept[identifier]

    @rule()
    def reopen(self) -> None:
        self.unmount_all()
        self.store.close()
        self.open()

    @rule()
    def cleanup(self) -> None:
        self.store.cleanup()

    # The tree

    @precondition(lambda self: self.lines)
    @rule(which=numbers)
    def mount(self, which: int) -> None:
        name = self.pick(which)
        if name in self.mounted:
            return
        with ExitStack() as stack:
            workspace = self.store.workspaces[name]
            path = stack.enter_context(workspace.mounted())
            self.mounted[name] = workspace, path, stack.pop_all()

    def unmount(self, name: str) -> None:
        self.mounted.pop(name)[2].close()

    def see(self, name: str) -> Listing:
        """The tree of a workspace, which must be as that of its directory."""
        if name in self.mounted:
            found = read_tree(self.mounted[name][1])
        else:
            with self.store.workspaces[name].mounted() as path:
                found = read_tree(path)
        assert_same_tree(self.lines[name].tree, found, ignore=LINKS)
        return found

    @precondition(lambda self: self.lines)
    @rule(which=numbers, work=steps)
    def write(self, which: int, work: list[Work]) -> None:
        self.write_into(self.pick(which), work)

    def write_into(self, name: str, work: list[Work]) -> None:
        if name in self.mounted:
            self.programs.run(work, self.mounted[name][1], self.lines[name].tree)
            return
        with self.store.workspaces[name].mounted() as path:
            self.programs.run(work, path, self.lines[name].tree)

    @precondition(lambda self: self.lines)
    @rule(which=numbers)
    def look(self, which: int) -> None:
        self.see(self.pick(which))

    # Checkpoints

    @precondition(lambda self: self.lines)
    @rule(which=numbers, name=st.one_of(st.none(), labels), durable=st.booleans(), work=st.one_of(st.none(), steps))
    def checkpoint(self, which: int, name: str | None, durable: bool, work: list[Work] | None) -> None:
        workspace = self.pick(which, native=False)
        if work:
            self.write_into(workspace, work)
        self.check_checkpoint(workspace, name, durable)

    @precondition(lambda self: self.lines)
    @rule(which=numbers, works=st.lists(steps, min_size=3, max_size=8))
    def checkpoints(self, which: int, works: list[list[Work]]) -> None:
        """A row of them, as it mostly goes."""
        name = self.pick(which, native=False)
        for work in works:
            self.write_into(name, work)
            self.check_checkpoint(name, None, False)

    def check_checkpoint(self, name: str, called: str | None, durable: bool) -> None:
        line, workspace = self.lines[name], self.workspace(name)
        seen = self.see(name)
        changed = workspace.is_changed
        if not changed:
            # Copies are compared, which leaves out the time of the top.
            assert_same_tree(self.copy_of(line, line.at), line.tree, ignore=LINKS if self.kind == "overlay" else MERGED)
        taken = {other for other in ["base", *self.history(line)] if called in self.names_of(line, other)} - (
            {line.at} if not changed else set()
        )
        if called and taken:
            with pytest.raises(errors.AlreadyExists):
                workspace.checkpoint(called, durable=durable)
            return
        made = workspace.checkpoint(called, durable=durable)
        if changed:
            assert made.id not in self.kept
            self.kept[made.id] = Kept(line.at, line, self.copy(line.tree), seen)
            line.at = made.id
        assert made == workspace.at
        assert made.id == line.at
        assert made.durable or not durable
        if called:
            self.names_of(line, made.id).add(called)
        self.see(name)

    def names_of(self, line: Line, identifier: str) -> set[str]:
        if identifier == "base":
            return line.base_names
        return self.kept[identifier].names.setdefault(line, set())

    def reference(self, line: Line, identifier: str, which: int) -> str:
        """An id, or a name."""
        known = [identifier, *sorted(self.names_of(line, identifier))]
        return known[which % len(known)]

    @precondition(lambda self: self.lines)
    @rule(which=numbers, to=numbers, how=numbers)
    def rollback(self, which: int, to: int, how: int) -> None:
        name = self.pick(which, native=False)
        line = self.lines[name]
        identifier = self.choose(line, to)
        back = self.workspace(name).rollback(self.reference(line, identifier, how))
        assert back.id == identifier
        line.at = identifier
        self.replace(line.tree, self.copy_of(line, identifier))
        self.as_kept(name)

    def as_kept(self, name: str) -> None:
        """A workspace that nothing was written to since its checkpoint."""
        found = self.see(name)
        at = self.lines[name].at
        if at != "base":
            assert_same_tree(self.kept[at].seen, found)
        assert not self.workspace(name).is_changed

    @precondition(lambda self: self.lines)
    @rule(which=numbers, at=st.one_of(st.none(), numbers), name=st.one_of(st.none(), names))
    def fork(self, which: int, at: int | None, name: str | None) -> None:
        old = self.pick(which, native=False)
        line = self.lines[old]
        if name in self.lines:
            with pytest.raises(errors.AlreadyExists):
                self.workspace(old).fork(name, at="base")
            return
        if at is None:
            self.check_checkpoint(old, None, False)
        identifier = line.at if at is None else self.choose(line, at)
        new = self.workspace(old).fork(name, at=None if at is None else identifier)
        assert new.name not in self.lines
        assert name in (None, new.name)
        copy = self.copy_of(line, identifier)
        made = self.lines[new.name] = Line(line.base, self.copy(copy))
        made.at = identifier
        made.merged = set(line.merged)
        self.as_kept(new.name)

    @precondition(lambda self: self.lines)
    @rule(which=numbers, what=numbers)
    def forget(self, which: int, what: int) -> None:
        name = self.pick(which)
        line = self.lines[name]
        identifier = self.choose(line, what)
        if identifier == "base" or any(other.at == identifier for other in self.lines.values()):
            with pytest.raises(errors.FailedPrecondition):
                self.workspace(name).forget(identifier)
            return
        self.workspace(name).forget(identifier)
        self.is_forgotten([identifier])

    def is_forgotten(self, gone: list[str]) -> None:
        for identifier in gone:
            parent = self.kept.pop(identifier).parent
            for kept in self.kept.values():
                if kept.parent == identifier:
                    kept.parent = parent

    @precondition(lambda self: self.lines)
    @rule(which=numbers, last=st.integers(0, 3), named=st.booleans())
    def keep(self, which: int, last: int, named: bool) -> None:
        name = self.pick(which)
        line = self.lines[name]
        own = [identifier for identifier, kept in self.kept.items() if kept.line is line]
        gone = [
            identifier
            for identifier in own[: len(own) - last]
            if not any(other.at == identifier for other in self.lines.values())
            and not (named and self.names_of(line, identifier))
        ]
        assert self.workspace(name).keep(last=last, named=named) == len(gone)
        self.is_forgotten(gone)

    # Comparing

    @precondition(lambda self: self.lines)
    @rule(which=numbers, one=numbers, two=st.one_of(st.none(), numbers))
    def diff(self, which: int, one: int, two: int | None) -> None:
        name = self.pick(which)
        line = self.lines[name]
        before = self.choose(line, one)
        after = None if two is None else self.choose(line, two)
        found = {change.path: change.kind for change in self.workspace(name).diff(before, after)}
        new = line.tree if after is None else self.copy_of(line, after)
        wanted = changes(read_tree(self.copy_of(line, before)), read_tree(new))
        assert found == wanted

    # Merging back

    @rule(work=steps)
    def change_target(self, work: list[Work]) -> None:
        beside = self.copy(self.target)
        self.programs.run(work, self.target, beside)
        shutil.rmtree(beside)

    @precondition(lambda self: self.lines)
    @rule(which=numbers)
    def merge(self, which: int) -> None:
        name = self.pick(which, native=False)
        self.check_checkpoint(name, None, False)  # which a merge makes otherwise
        line, workspace = self.lines[name], self.workspace(name)
        base, new, before = read_tree(line.base), read_tree(line.tree), read_tree(self.target)
        changed = {path for path in base.keys() | new.keys() if unlike(base.get(path), new.get(path))}
        changed |= line.merged
        conflicts = workspace.merge_plan(self.target).conflicts
        if conflicts:
            assert any(unlike(base.get(path), before.get(path)) for path in base.keys() | before.keys())
            with pytest.raises(errors.FailedPrecondition):
                workspace.merge(self.target)
            assert_same_tree(before, self.target)
            return
        workspace.merge(self.target)
        wanted = {path: node for path, node in before.items() if path not in changed}
        wanted |= {path: new[path] for path in changed & new.keys()}
        if line.merged:
            # What was merged earlier, and has been changed in the target since, may stay so.
            after = read_tree(self.target)
            for path in changed:
                if not unlike(before.get(path), after.get(path)):
                    wanted.pop(path, None)
                    wanted |= {path: before[path]} if path in before else {}
        line.merged |= changed
        assert_same_tree(wanted, self.target, ignore=MERGED)
        assert all(entry.state == "same" for entry in workspace.merge_plan(self.target).entries)

    # What must hold at any time

    @invariant()
    def same_history(self) -> None:
        assert sorted(self.store.workspaces) == sorted(self.lines)
        for name, line in self.lines.items():
            log = self.workspace(name).log()
            assert [checkpoint.id for checkpoint in log] == ["base", *self.history(line)], name
            for checkpoint in log:
                self.check_described(line, checkpoint)
            assert self.workspace(name).at.id == line.at

    def check_described(self, line: Line, checkpoint: Checkpoint) -> None:
        assert set(checkpoint.names) == self.names_of(line, checkpoint.id)
        if checkpoint.id == "base":
            assert checkpoint.parent is None
            assert checkpoint.durable
            return
        kept = self.kept[checkpoint.id]
        assert checkpoint.parent == kept.parent
        assert checkpoint.inodes
        assert checkpoint.size is not None

    def every_checkpoint(self) -> None:
        """In the end: each can still be gone back to."""
        for name, line in self.lines.items():
            for identifier in ["base", *self.history(line)]:
                self.store.workspaces[name].rollback(identifier)
                line.at = identifier
                self.replace(line.tree, self.copy_of(line, identifier))
                self.as_kept(name)


class DeeperMachine(Machine):
    merged_at_a_time = 3


class NativeMachine(Machine):
    kind = "native"


def unlike(one: Node | None, other: Node | None) -> bool:
    """Whether a merge has something to do, or to mind."""
    if one is None or other is None:
        return one is not other
    times = () if one.type == other.type == "directory" else ("times",)
    return any(
        getattr(one, aspect) != getattr(other, aspect)
        for aspect in ("type", "mode", "owner", "xattrs", "content", "target", *times)
    )


def changes(before: Listing, after: Listing) -> dict[str, str]:
    """What should be listed: a deleted directory without what was in it; the top only if it has other attributes."""
    found: dict[bytes, str] = {}
    for path in sorted(before.keys() | after.keys()):
        if path not in before:
            found[path] = "A"
        elif path not in after:
            above = os.path.dirname(path) or b"."
            if above in after and after[above].type == "directory":
                found[path] = "D"
        elif differences({path: before[path]}, {path: after[path]}, ignore=MERGED if path == b"." else LINKS):
            found[path] = "C"
    for path in list(found):
        while path := os.path.dirname(path):
            found.setdefault(path, "C")
    return {os.fsdecode(path): kind for path, kind in found.items()}


# The profile "long" has its own numbers.
SHORT = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci"


@pytest.mark.needs("overlay")
@pytest.mark.parametrize(
    "machine, examples",
    [(Machine, 10), (DeeperMachine, 6), (NativeMachine, 6)],
    ids=["two at a time", "three at a time", "copies"],
)
def test_workspaces_and_copies(machine: type[Machine], examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    mine = settings(max_examples=examples, stateful_step_count=25) if SHORT else settings()
    run_state_machine_as_test(machine, settings=mine)
