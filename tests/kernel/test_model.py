"""A state machine that drives the overlay snapshotter and the in-memory model side by side, mounts included.

After each step both must have answered the same: the same kind of error, the same infos, trees and changes.

Of two files of one size and time the model always reads the content, and an overlay where that time is a whole second
(or where one stack lies on the other): so it is such a time that files here may have in common.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import onlap
from kernel.programs import Programs, Work, beginning, directory, numbers, steps
from onlap import errors
from onlap.overlayfs.markers import TRUSTED, USER
from onlap.snapshots.contract import ACTIVE, COMMITTED, Info, Snapshotter
from onlap.snapshots.memory import MemorySnapshotter
from onlap.testing import OverlayFactory, Tree, assert_same_tree

NAMES = ["a", "b", "c", "d", "e/f"]
LABELS = st.dictionaries(st.sampled_from(["l", "m.n"]), st.sampled_from(["", "1", "2"]), max_size=2)
FIELDPATHS = st.sampled_from([(), ("labels",), ("labels.l",), ("labels.m.n", "labels.l"), ("parent",)])

names = st.sampled_from(NAMES)


def attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    """The kind of error, or "" and the answer."""
    try:
        return "", call()
    except errors.OnlapError as error:
        return error.kind, None


def plain(info: Info | None) -> tuple[object, ...] | None:
    return info and (info.name, info.parent, info.kind, dict(info.labels), info.created_ns == info.updated_ns)


class Side(NamedTuple):
    """What may be done to one of the two; the model's trees need no mount."""

    snapshotter: Snapshotter
    mounts: bool

    @contextlib.contextmanager
    def tree(self, key: str) -> Iterator[Path]:
        plan = self.snapshotter.mounts(key)
        if self.mounts:
            with onlap.mounted(plan) as path:
                yield path
        else:
            yield Path(plan[0].source)


class Machine(RuleBasedStateMachine):
    flavour = TRUSTED

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        where = directory()
        self.place = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="onlap-test-", dir=where))
        (Path(self.place) / "model").mkdir()
        self.before = Path("/proc/self/mountinfo").read_bytes()
        self.factory = OverlayFactory(self.flavour)
        self.open()
        self.model = Side(MemorySnapshotter(f"{self.place}/model"), False)
        self.programs = Programs()

    def open(self) -> None:
        self.opened = self.factory(f"{self.place}/root")
        self.overlay = Side(self.opened.__enter__(), True)

    def teardown(self) -> None:
        self.opened.__exit__(None, None, None)
        self.stack.close()
        assert Path("/proc/self/mountinfo").read_bytes() == self.before

    def both(self, call: Callable[[Snapshotter], Any], kept: Callable[[Any], Any] = lambda answer: None) -> str:
        """Call it on both; the kinds of errors, and what ``kept`` makes of the answers, must be equal."""
        ours, model = attempt(lambda: call(self.overlay.snapshotter)), attempt(lambda: call(self.model.snapshotter))
        assert ours[0] == model[0]
        if not ours[0]:
            assert kept(ours[1]) == kept(model[1])
        return ours[0]

    def of_kind(self, *kinds: str) -> list[str]:
        return sorted(info.name for info in self.model.snapshotter.walk() if info.kind in kinds)

    def any_of(self, data: st.DataObject, *kinds: str) -> str:
        """A name of such a snapshot mostly, or any."""
        known = self.of_kind(*kinds)
        return data.draw(st.one_of(names, st.sampled_from(known)) if known else names)

    @initialize()
    def base(self) -> None:
        """Something to build on: rules alone would take long to get there."""
        self.both(lambda sn: sn.prepare("base"))
        for side in (self.overlay, self.model):
            with side.tree("base") as top:
                beginning().apply(top)
        self.both(lambda sn: sn.commit("a", "base"))

    # Records

    @rule(key=names, data=st.data(), labels=LABELS, on=st.booleans())
    def prepare(self, key: str, data: st.DataObject, labels: dict[str, str], on: bool) -> None:
        parent = self.any_of(data, COMMITTED) if on else None
        failed = self.both(lambda sn: sn.prepare(key, parent, labels))
        if not failed and not parent:
            self.set_time(key, ".")

    def set_time(self, key: str, path: str) -> None:
        """Fresh trees were made at two moments: give both the same, to compare them to the nanosecond."""
        now = self.programs.next_time()
        for side in (self.overlay, self.model):
            with side.tree(key) as top:
                Tree().times(path, now).apply(top)

    @rule(key=names, data=st.data())
    def view(self, key: str, data: st.DataObject) -> None:
        parent = self.any_of(data, COMMITTED)
        self.both(lambda sn: sn.view(key, parent))

    @rule(name=names, data=st.data(), labels=LABELS, named=st.booleans())
    def commit(self, name: str, data: st.DataObject, labels: dict[str, str], named: bool) -> None:
        key = self.any_of(data, ACTIVE)
        parent = self.any_of(data, COMMITTED) if named else None
        probe = {info.name: info for info in self.model.snapshotter.walk()}
        if parent and key in probe and probe[key].parent is None:
            parent = None  # the one thing that the model cannot do
        self.both(lambda sn: sn.commit(name, key, labels, parent=parent))

    @rule(key=names)
    def remove(self, key: str) -> None:
        self.both(lambda sn: sn.remove(key))

    @rule(key=names, labels=LABELS, paths=FIELDPATHS)
    def update(self, key: str, labels: dict[str, str], paths: tuple[str, ...]) -> None:
        if key not in {info.name for info in self.model.snapshotter.walk()}:
            paths = ()
        info = Info(key, "forged", "view", labels, 1, 2)
        self.both(lambda sn: sn.update(info, *paths), lambda info: plain(info._replace(updated_ns=0)))

    @rule(key=names)
    def mounts_and_usage(self, key: str) -> None:
        self.both(lambda sn: sn.mounts(key), lambda plan: plan[-1].readonly)
        self.both(lambda sn: sn.usage(key), lambda usage: usage.inodes > 0)

    @rule(kind=st.sampled_from(["active", "view", "committed"]), name=names)
    def walk(self, kind: str, name: str) -> None:
        for filters in (
            (f"kind=={kind}",),
            (f'parent=="{name}"',),
            (f'name=="{name}"', "labels.l==1"),
            ("labels.m.n",),
        ):
            self.both(lambda sn, f=filters: {info.name for info in sn.walk(*f)}, lambda found: found)  # type: ignore[misc]

    @rule()
    def reopen(self) -> None:
        self.opened.__exit__(None, None, None)
        self.open()

    @rule()
    def cleanup(self) -> None:
        self.overlay.snapshotter.cleanup()  # type: ignore[attr-defined]

    # Trees

    @precondition(lambda self: self.of_kind(ACTIVE))
    @rule(which=numbers, work=steps)
    def write(self, which: int, work: list[Work]) -> None:
        active = self.of_kind(ACTIVE)
        self.write_into(active[which % len(active)], work)

    @rule(name=names, which=numbers, work=steps, then=steps, labels=LABELS)
    def layer(self, name: str, which: int, work: list[Work], then: list[Work], labels: dict[str, str]) -> None:
        """One more layer, as it mostly goes."""
        committed = [*self.of_kind(COMMITTED), None]
        parent = committed[which % len(committed)]
        if self.both(lambda sn: sn.prepare("work", parent)):
            return
        if parent is None:
            self.set_time("work", ".")
        for part in (work, then):  # mounted a second time in between
            self.write_into("work", part)
            self.same_changes("work")
        if self.both(lambda sn: sn.commit(name, "work", labels)):
            self.both(lambda sn: sn.remove("work"))
        else:
            self.same_changes(name)

    def write_into(self, key: str, work: list[Work]) -> None:
        with self.overlay.tree(key) as ours, self.model.tree(key) as model:
            self.programs.run(work, ours, model)
            assert_same_tree(model, ours, ignore=("links",))
        with self.overlay.tree(key) as ours, self.model.tree(key) as model:
            assert_same_tree(model, ours, ignore=("links",))

    @precondition(lambda self: self.of_kind(COMMITTED))
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """The tree of a committed snapshot, through a view."""
        name = data.draw(st.sampled_from(self.of_kind(COMMITTED)))
        self.both(lambda sn: sn.view("look", name))
        with self.overlay.tree("look") as ours, self.model.tree("look") as model:
            assert_same_tree(model, ours, ignore=("links",))
        self.both(lambda sn: sn.remove("look"))

    @rule(one=numbers, two=numbers)
    def changes_between(self, one: int, two: int) -> None:
        known = [*sorted(info.name for info in self.model.snapshotter.walk()), "nobody"]
        self.same_changes(known[one % len(known)], known[two % len(known)])

    def same_changes(self, key: str, other: str | None = None) -> None:
        def listed(changes: list[Any]) -> list[tuple[object, ...]]:
            return [(each.kind, each.path, each.before, each.after, each.what) for each in changes]

        self.both(lambda sn: list(sn.diff(key, base=other)), listed)  # type: ignore[attr-defined]

    @invariant()
    def same_infos(self) -> None:
        ours = {info.name: info for info in self.overlay.snapshotter.walk()}
        model = {info.name: info for info in self.model.snapshotter.walk()}
        assert {name: plain(info) for name, info in ours.items()} == {n: plain(info) for n, info in model.items()}
        for name, info in ours.items():
            assert self.overlay.snapshotter.stat(name) == info


class UserMachine(Machine):
    flavour = USER


# The profile "long" has its own numbers.
SHORT = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci"


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("machine, examples", [(Machine, 150), (UserMachine, 60)], ids=[TRUSTED, USER])
def test_overlay_and_model(machine: type[Machine], examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    mine = settings(max_examples=examples, stateful_step_count=25) if SHORT else settings()
    run_state_machine_as_test(machine, settings=mine)
