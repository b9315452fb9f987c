"""The conformance suite itself: it passes over the model without privilege, and it fails where something is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from onlap import errors
from onlap.catalog.records import Kind
from onlap.mounts.plan import Mount
from onlap.snapshots.contract import ACTIVE, Info, Snapshotter, Usage
from onlap.snapshots.memory import MemorySnapshotter
from onlap.snapshots.native import NativeSnapshotter
from onlap.testing import (
    CAPABILITIES,
    MemoryFactory,
    NativeFactory,
    Tree,
    assert_same_tree,
    cases,
    differences,
    read_tree,
    run_suite,
)
from onlap.testing.snapshotters import Case

# A read-write bind needs no mount, so that whoever may not mount writes into the copies all the same.
COPIES = {"trees", "differ", "root_attributes"}


@pytest.mark.parametrize("case", cases(COPIES), ids=str)
def test_the_model_without_privilege(case: Case, tmp_path: Path) -> None:
    case.run(MemoryFactory(), tmp_path)


@pytest.mark.parametrize(
    "case",
    [case for case in cases(COPIES | {"persistent", "processes", "owners"}) if "trees" not in case.needs],
    ids=str,
)
def test_native_without_privilege(case: Case, tmp_path: Path) -> None:
    case.run(NativeFactory(), tmp_path)


# Mutants: a snapshotter with one defect, and the cases that have to notice.


class OldLabels(MemorySnapshotter):
    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, **options: Any) -> None:
        kept = self.stat(key).labels
        super().commit(name, key, {**kept, **(labels or {})}, **options)


class KeyFirst(MemorySnapshotter):
    def prepare(self, key: str, parent: str | None = None, labels: Mapping[str, str] | None = None) -> list[Mount]:
        if key in [info.name for info in self.walk()]:
            raise errors.AlreadyExists("taken", key=key)
        return super().prepare(key, parent, labels)


class KindBeforeName(MemorySnapshotter):
    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, **options: Any) -> None:
        if self.stat(key).kind != ACTIVE:
            raise errors.FailedPrecondition("not active", key=key)
        super().commit(name, key, labels, **options)


class CommitsViews(MemorySnapshotter):
    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, **options: Any) -> None:
        info = self._infos.get(key)
        if info is not None and info.kind == "view":
            self._infos[key] = info._replace(kind=ACTIVE)
        super().commit(name, key, labels, **options)


class Orphans(MemorySnapshotter):
    def remove(self, key: str) -> None:
        children = [name for name, info in self._infos.items() if info.parent == key]
        for name in children:
            self._infos[name] = self._infos[name]._replace(parent=None)
        super().remove(key)


class Microseconds(MemorySnapshotter):
    def update(self, info: Info, *fieldpaths: str) -> Info:
        found = super().update(info, *fieldpaths)
        self._infos[info.name] = found._replace(updated_ns=found.updated_ns // 1000 * 1000)
        return self._infos[info.name]


class CommitKeepsTime(MemorySnapshotter):
    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, **options: Any) -> None:
        created = self.stat(key).created_ns
        super().commit(name, key, labels, **options)
        self._infos[name] = self._infos[name]._replace(created_ns=created)


class ForgedFields(MemorySnapshotter):
    def update(self, info: Info, *fieldpaths: str) -> Info:
        super().update(info, *fieldpaths)
        self._infos[info.name] = self._infos[info.name]._replace(parent=info.parent)
        return self._infos[info.name]


class LockedWalk(MemorySnapshotter):
    def walk(self, *filters: str) -> Iterator[Info]:
        names = [info.name for info in super().walk(*filters)]
        return (self._infos[name] for name in names)  # KeyError for what is removed meanwhile


class MountsCommitted(MemorySnapshotter):
    def mounts(self, key: str) -> list[Mount]:
        return [Mount("bind", self._trees[key], flags=("rw", "rbind"))] if key in self._trees else super().mounts(key)


class ViewsHaveUsage(MemorySnapshotter):
    def usage(self, key: str) -> Usage:
        return Usage(1, 4096) if self.stat(key).kind == "view" else super().usage(key)


class Litter(MemorySnapshotter):
    def remove(self, key: str) -> None:
        tree = self._trees.get(key)
        if tree is not None and not any(info.parent == key for info in self._infos.values()):
            os.rename(tree, tree + ".removed")
            os.mkdir(tree)
        super().remove(key)


class SharedTrees(MemorySnapshotter):
    def _new(self, kind: Kind, key: str, parent: str | None, labels: Mapping[str, str] | None) -> list[Mount]:
        plan = super()._new(kind, key, parent, labels)
        if parent:
            self._trees[key] = self._trees[parent]
            return self.mounts(key)
        return plan


class NoLock:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class Unlocked(MemorySnapshotter):
    """Checks, gives the other threads time, and acts."""

    def _new(self, kind: Kind, key: str, parent: str | None, labels: Mapping[str, str] | None) -> list[Mount]:
        self._mutex = NoLock()  # type: ignore[assignment]
        return super()._new(kind, key, parent, labels)


MUTANTS = [
    (OldLabels, "a_commit_replaces_the_labels"),
    (KeyFirst, "prepare_looks_at_the_parent_first"),
    (KindBeforeName, "commit_looks_at_the_key_first"),
    (CommitsViews, "commit_of_a_view_fails"),
    (Orphans, "what_has_children_stays"),
    (Microseconds, "times_of_creation"),
    (CommitKeepsTime, "times_of_creation"),
    (ForgedFields, "other_fields_are_not_touched"),
    (LockedWalk, "changing_within_a_walk"),
    (MountsCommitted, "mounts_of_a_committed_snapshot_fail"),
    (ViewsHaveUsage, "usage_of_a_view_is_nothing"),
    (Litter, "removed_trees_go"),
    (SharedTrees, "siblings_do_not_meet"),
    (Unlocked, "threads_race_for_a_key"),
]


@pytest.mark.parametrize("mutant, name", MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_a_defect_is_noticed(mutant: type[MemorySnapshotter], name: str, tmp_path: Path) -> None:
    def factory(directory: str) -> AbstractContextManager[Snapshotter]:
        os.makedirs(directory, exist_ok=True)
        return mutant(directory)

    (case,) = [case for case in cases() if case.name == name]
    with pytest.raises((AssertionError, KeyError, FileNotFoundError)):
        case.run(factory, tmp_path)


# Running all


def test_run_suite_names_what_ran() -> None:
    ran = run_suite(MemoryFactory(), capabilities=())
    assert ran == [case.name for case in cases(())]
    assert len(ran) > 30


def test_run_suite_names_what_failed(tmp_path: Path) -> None:
    def factory(directory: str) -> AbstractContextManager[Snapshotter]:
        os.makedirs(directory, exist_ok=True)
        return OldLabels(directory)

    with pytest.raises(ExceptionGroup) as caught:
        run_suite(factory, capabilities=(), directory=tmp_path)
    notes = [note for error in caught.value.exceptions for note in error.__notes__]
    assert "in the case a_commit_replaces_the_labels" in notes
    assert list(tmp_path.iterdir()) == []


def test_every_case_says_what_it_needs() -> None:
    assert {name for case in cases() for name in case.needs | case.lacks} == set(CAPABILITIES)
    with pytest.raises(ValueError, match="no such capability: tree"):
        cases({"tree"})


def test_sockets_may_flatten_the_classes(tmp_path: Path) -> None:
    """What counts is the kind of an error."""
    from onlap.testing.site import raises

    def busy() -> None:
        raise errors.Busy("busy")

    assert raises(errors.FailedPrecondition, "it", busy).kind == "FailedPrecondition"
    with pytest.raises(AssertionError, match="wanted NotFound"):
        raises(errors.NotFound, "it", busy)
    with pytest.raises(AssertionError, match="it answered None"):
        raises(errors.NotFound, "it", lambda: None)


def test_rebase_of_a_copy_is_refused(tmp_path: Path) -> None:
    with NativeSnapshotter(tmp_path / "root", sync="none") as sn:
        sn.prepare("a")
        sn.commit("base", "a")
        sn.prepare("b")
        with pytest.raises(errors.Unimplemented):
            sn.commit("new", "b", parent="base")


# Trees


def make(directory: Path, *trees: Tree) -> Path:
    directory.mkdir()
    for tree in trees:
        tree.apply(directory)
    os.utime(directory, ns=(0, 0))
    return directory


TIME = 10**18
PLAIN = (
    Tree()
    .directory("d", mtime_ns=TIME)
    .file("d/f", b"content", mtime_ns=TIME)
    .file("g", b"content", mtime_ns=TIME)
    .symlink("s", "d", mtime_ns=TIME)
    .fifo("p", mtime_ns=TIME)
)


@pytest.mark.parametrize(
    "change, line",
    [
        (Tree().remove("p").file("p", mtime_ns=TIME), "b'p': type fifo != file"),
        (Tree().chmod("d/f", 0o600), "b'd/f': mode 0o644 != 0o600"),
        (Tree().chmod("d", 0o1755), "b'd': mode 0o755 != 0o1755"),
        (Tree().times("d/f", TIME + 1), f"b'd/f': times {TIME} != {TIME + 1}"),
        (Tree().times("s", TIME - 1), f"b's': times {TIME} != {TIME - 1}"),
        (Tree().times("d", 0), f"b'd': times {TIME} != 0"),
        (Tree().xattr("d/f", "user.a", b"1"), "b'd/f': xattrs {} != {'user.a': b'1'}"),
        (Tree().write("d/f", b"CONTENT").times("d/f", TIME), "b'd/f': content b'content'... != b'CONTENT'..."),
        (Tree().write("d/f", b"more content").times("d/f", TIME), "b'd/f': size 7 != 12"),
        (Tree().remove("s").symlink("s", "g", mtime_ns=TIME), "b's': target b'd' != b'g'"),
        (Tree().remove("d/f").times("d", TIME), "b'd/f': only in the first (file)"),
        (Tree().file(b"d/\xff").times("d", TIME), r"b'd/\xff': only in the second (file)"),
        (Tree().remove("g").link("g", "d/f"), "b'd/f': links () != (b'g',)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_difference_is_seen(tmp_path: Path, change: Tree, line: str) -> None:
    one, other = make(tmp_path / "one", PLAIN), make(tmp_path / "two", PLAIN)
    assert_same_tree(one, other)
    before = read_tree(other)
    change.apply(other)
    os.utime(other, ns=(0, 0))
    assert line in differences(one, other)
    assert line in differences(before, other)
    with pytest.raises(AssertionError, match=re.escape(line)):
        assert_same_tree(one, other)


def test_what_is_ignored_is_not_seen(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", PLAIN), make(tmp_path / "two", PLAIN)
    Tree().times("d", 0).chmod("g", 0o600).apply(other)
    assert len(differences(one, other)) == 2
    assert differences(one, other, ignore=("times", "mode")) == []
    with pytest.raises(ValueError, match="colour"):
        differences(one, other, ignore=("colour",))


def test_the_groups_of_links_are_compared(tmp_path: Path) -> None:
    base = Tree().file("a", mtime_ns=TIME).file("b", mtime_ns=TIME)
    one = make(tmp_path / "one", base, Tree().link("c", "a").link("d", "b"))
    other = make(tmp_path / "two", base, Tree().link("c", "b").link("d", "a"))
    assert len(differences(one, other)) == 4
    assert differences(one, other, ignore=("links",)) == []


def test_modes_are_those_given_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o777)
    try:
        Tree().directory("d", mode=0o2777).file("f", mode=0o4666).fifo("p", mode=0o622).apply(tmp_path)
    finally:
        os.umask(old)
    assert [oct((tmp_path / name).stat().st_mode & 0o7777) for name in "dfp"] == ["0o2777", "0o4666", "0o622"]


def test_operations(tmp_path: Path) -> None:
    tree = (
        Tree()
        .directory("d", mtime_ns=TIME)
        .file("d/f", b"1")
        .append("d/f", b"2")
        .rename("d/f", "d/g")
        .replace("d/g", b"3", mode=0o600)
        .file("d/h")
        .move("d/h", "h")
        .directory("e")
        .file("e/x")
        .remove("e")
        .xattr("h", "user.a", b"1")
        .xattr("h", "user.a", None)
    )
    tree.apply(tmp_path)
    assert sorted(read_tree(tmp_path)) == [b".", b"d", b"d/g", b"h"]
    assert (tmp_path / "d/g").read_bytes() == b"3"
    assert (tmp_path / "d").stat().st_mtime_ns == TIME
    assert repr(tree).startswith("Tree().directory('d', mode=0o755).file('d/f', b'1', mode=0o644).append('d/f', b'2')")


def test_a_failed_operation_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError) as caught:
        Tree().file("f").file("f").apply(tmp_path)
    assert caught.value.__notes__ == ["in file('f', b'', mode=0o644)"]
