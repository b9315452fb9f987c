"""The steps of the demo, each with its milliseconds."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from onlap import errors
from onlap._version import __version__
from onlap.cli.call import Call
from onlap.cli.demo.material import Material, Program, programs, run, shell
from onlap.cli.demo.place import Place
from onlap.cli.shared.changes import STYLES, path_of, summary
from onlap.cli.shared.tree import print_tree
from onlap.cli.terminal.text import amount, count, size, skipped_text
from onlap.errors import shown
from onlap.mounts import mountinfo
from onlap.overlayfs.markers import TRUSTED, USER
from onlap.probing.probe import NATIVE, OVERLAY
from onlap.snapshots.native import NativeSnapshotter
from onlap.snapshots.overlay import OverlaySnapshotter, Properties
from onlap.store import Store
from onlap.trees.compare import Change
from onlap.trees.remove import remove_at

# Lines of a diff that are shown for each of A, C and D.
_SHOWN = 2

# What is to run in a tree, given where that is mounted.
_Programs = Callable[[str], list[Program]]


class Story:
    """Tells what is done, while it is done.

    Args:
        call: whose output it goes to.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.out = call.out
        self._started = time.perf_counter()

    def begin(self, material: Material, line: str) -> None:
        """The head: what this is, and which mode it runs in and why."""
        version = ".".join(map(str, sys.version_info[:3]))
        if self.out.json:
            self.out.item({"demo": __version__, "python": version, "source": material.directory, "mode": line})
            return
        self.out.line(
            self.out.paint(f"Onlap {__version__}, the main job, on the standard library of Python {version}", "bold")
        )
        self.out.line(f"mode: {line}")
        self.out.line()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """A step; the block appends what is to be told of it."""
        told: list[str] = []
        started = time.perf_counter()
        yield told
        milliseconds = (time.perf_counter() - started) * 1000
        if self.out.json:
            self.out.item({"step": name, "ms": round(milliseconds, 3), "told": " ".join(told)})
        else:
            self.out.line(f"{name:<8} {milliseconds:>7,.1f} ms  {' '.join(told)}".rstrip())
        self.out.flush()

    def changes(self, changes: Iterable[Change]) -> None:
        """A few lines of a diff, of what lies highest in the tree."""
        if self.out.json:
            return
        # A directory that is only on the way to a change says little.
        telling = [change for change in changes if change.what or change.kind != "C"]
        telling.sort(key=lambda change: (change.kind, change.path.count("/")))
        seen: Counter[str] = Counter()
        for change in telling:
            seen[change.kind] += 1
            if seen[change.kind] <= _SHOWN:
                self.out.line(f"{'':<21}{self.out.paint(change.kind, STYLES[change.kind])} {shown(path_of(change))}")

    def gap(self) -> None:
        """An empty line, for people."""
        if not self.out.json:
            self.out.line()

    def end(self, place: Place) -> None:
        """The last line."""
        seconds = time.perf_counter() - self._started
        if self.out.json:
            nothing: dict[str, list[str]] = {"mounts": [], "directories": [], "records": []}
            self.out.item({"left": nothing, "seconds": round(seconds, 3)})
            return
        said = f"Nothing is left in {shown(place.directory)}: no mount, no directory, no record."
        self.out.line(f"{self.out.paint(said, 'green')} {seconds:.1f} s in all.")


def tell(call: Call, place: Place, line: str, material: Material) -> None:
    """Run the demo in a directory of its own inside ``place``, and remove everything.

    Raises:
        OnlapError: a step failed, or something is left.
    """
    story = Story(call)
    story.begin(material, line)
    scratch = tempfile.mkdtemp(prefix="onlap-demo-", dir=place.directory)
    try:
        root = f"{scratch}/root"
        with open_store(root, place.mode) as store:
            _work(story, store, material)
            _two_children(story, store)
            with story.step("usage") as told:
                told.append(_usage(store))
            story.gap()
            print_tree(call.out, store)
            story.gap()
            with story.step("remove") as told:
                keys = ("left", "right", "step", "base")
                for key in keys:
                    store.remove(key)
                records = [shown(info.name) for info in store.walk()]
                # Ends the background, which would delete slowly.
                store.close()
                store.snapshotter.catalog.garbage.sweep()
                told.append(" ".join(keys))
        directories = _left_in(root)
    finally:
        _remove_scratch(scratch)
    _check(scratch, records, directories)
    story.gap()
    story.end(place)


def open_store(root: str, mode: str) -> Store:
    """A new root of the mode that was found to work."""
    if mode == NATIVE:
        return Store(NativeSnapshotter(root))
    return Store(OverlaySnapshotter(root, properties=Properties(TRUSTED if mode == OVERLAY else USER)))


def _work(story: Story, store: Store, material: Material) -> None:
    with story.step("import") as told:
        done = store.import_(material.directory, "base", exclude=material.exclude)
        told.append(f"{shown(material.directory)} as base: {amount(done.entries, done.size)}")
        if done.skipped:
            told.append(f"(not kept: {skipped_text(done.skipped)})")
    with story.step("prepare") as told:
        store.prepare("work", "base")
        told.append("work, on base")
    _run_in(story, store, "work", programs)
    with story.step("diff") as told:
        changes = list(store.diff("work"))
        told.append(_summary(changes))
    story.changes(changes)
    with story.step("commit") as told:
        store.commit("step", "work")
        told.append("work as step, durable")


def _two_children(story: Story, store: Store) -> None:
    with story.step("prepare") as told:
        store.prepare("left", "step")
        store.prepare("right", "step")
        told.append("left and right, both on step")
    _run_in(story, store, "left", lambda tree: [shell(tree, "echo left > way.txt")])
    _run_in(
        story,
        store,
        "right",
        lambda tree: [shell(tree, "echo right > way.txt"), Program(("rm", f"{tree}/zen.py"), "rm zen.py")],
    )
    with story.step("diff") as told:
        changes = list(store.diff("right", base="left"))
        told.append(f"left to right: {_summary(changes)}")
    story.changes(changes)


def _run_in(story: Story, store: Store, key: str, wanted: _Programs) -> None:
    """Mount a snapshot, run programs in it, and unmount it."""
    with ExitStack() as stack:
        with story.step("mount") as told:
            tree = os.fspath(stack.enter_context(store.mounted(key)))
            told.append(f"{key} at {shown(tree)}")
        for program in wanted(tree):
            with story.step("run") as told:
                run(program)
                told.append(program.told)
        with story.step("unmount") as told:
            stack.close()
            told.append(key)


def _usage(store: Store) -> str:
    """What the four snapshots take, beside what full trees would."""
    taken = [store.snapshotter.usage_of(store.snapshotter.record(info.name)) for info in store.walk()]
    said = f"{size(sum(one.size for one in taken))} in {count(sum(one.inodes for one in taken), 'inode')}"
    if isinstance(store.snapshotter, NativeSnapshotter):
        return f"{said} for {len(taken)} trees, each a full copy"
    return f"{said} for {len(taken)} trees; full copies would take {size(len(taken) * taken[0].size)}"


def _summary(changes: Iterable[Change]) -> str:
    return summary(Counter(change.kind for change in changes))


def _left_in(root: str) -> list[str]:
    places = (f"{root}/{name}" for name in ("snapshots", "trash", "staging"))
    return [shown(f"{place}/{name}") for place in places for name in os.listdir(place)]


def _remove_scratch(scratch: str) -> None:
    with errors.translated("remove what the demo made", key=scratch):
        # By descriptors, never through a mount: after a failed unmount a plain recursive delete would empty the tree.
        remove_at(scratch)


def _check(scratch: str, records: list[str], directories: list[str]) -> None:
    where = os.fsencode(os.path.realpath(scratch))
    mounts = [
        shown(entry.mountpoint)
        for entry in mountinfo.parse(mountinfo.own())
        if where in entry.mountpoint or where in entry.super_options or where in entry.root
    ]
    directories += [shown(scratch)] if os.path.lexists(scratch) else []
    left = [f"mount {m}" for m in mounts] + directories + [f"record {r}" for r in records]
    if left:
        raise errors.Internal(f"the demo left something behind: {', '.join(left)}")
