"""The steps of the demo, each with its time in milliseconds."""

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
from onlap.cli.demo.place import Place
from onlap.cli.demo.tree import Program, Source, programs, run, script
from onlap.cli.shared.changes import STYLES, path_of, summary
from onlap.cli.shared.tree import print_tree
from onlap.cli.terminal.output import Output
from onlap.cli.terminal.text import amount, count, size, skipped_text
from onlap.errors import shown
from onlap.mounts import mountinfo
from onlap.snapshots.native import NativeSnapshotter
from onlap.store import Store, open
from onlap.trees.compare import Change
from onlap.trees.remove import remove_at

# How many lines of a diff are shown for each of A, C and D.
_SHOWN = 2

# The programs to run in a tree, given its mount point.
_Programs = Callable[[str], list[Program]]


class Report:
    """Prints what the demo does, while it does it."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self._started = time.perf_counter()

    def begin(self, source: Source, line: str) -> None:
        """The head: what this is, the mode and its reason."""
        version = ".".join(map(str, sys.version_info[:3]))
        if self.out.json:
            self.out.item({"demo": __version__, "python": version, "source": source.directory, "mode": line})
            return
        self.out.line(
            self.out.paint(f"Onlap {__version__}, the main job, on the standard library of Python {version}", "bold")
        )
        self.out.line(f"mode: {line}")
        self.out.line()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """A step; the block appends texts about it."""
        texts: list[str] = []
        started = time.perf_counter()
        yield texts
        milliseconds = (time.perf_counter() - started) * 1000
        if self.out.json:
            self.out.item({"step": name, "ms": round(milliseconds, 3), "text": " ".join(texts)})
        else:
            self.out.line(f"{name:<8} {milliseconds:>7,.1f} ms  {' '.join(texts)}".rstrip())
        self.out.flush()

    def changes(self, changes: Iterable[Change]) -> None:
        """A few lines of a diff, of the paths highest in the tree."""
        if self.out.json:
            return
        # Not the directories that are only on the way to a change.
        chosen = [change for change in changes if change.what or change.kind != "C"]
        chosen.sort(key=lambda change: (change.kind, change.path.count("/")))
        seen: Counter[str] = Counter()
        for change in chosen:
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
        text = f"Nothing is left in {shown(place.directory)}: no mount, no directory, no record."
        self.out.line(f"{self.out.paint(text, 'green')} {seconds:.1f} s in all.")


def run_steps(out: Output, place: Place, line: str, source: Source) -> None:
    """Run the demo in a new directory inside ``place``, and remove everything.

    Raises:
        OnlapError: a step failed, or something is left.
    """
    report = Report(out)
    report.begin(source, line)
    scratch = tempfile.mkdtemp(prefix="onlap-demo-", dir=place.directory)
    try:
        root = f"{scratch}/root"
        with open(root) as store:
            _work(report, store, source)
            _two_children(report, store)
            with report.step("usage") as texts:
                texts.append(_usage(store))
            report.gap()
            print_tree(out, store)
            report.gap()
            with report.step("remove") as texts:
                keys = ("left", "right", "step", "base")
                for key in keys:
                    store.remove(key)
                records = [shown(info.name) for info in store.walk()]
                # Ends the background thread, which would delete slowly.
                store.close()
                store.snapshotter.catalog.garbage.sweep()
                texts.append(" ".join(keys))
        places = (f"{root}/{name}" for name in ("snapshots", "trash", "staging"))
        directories = [shown(f"{each}/{name}") for each in places for name in os.listdir(each)]
    finally:
        with errors.translated("remove what the demo made", key=scratch):
            # By descriptors, never through a mount: after a failed unmount a recursive delete would empty the tree.
            remove_at(scratch)
    _check(scratch, records, directories)
    report.gap()
    report.end(place)


def _work(report: Report, store: Store, source: Source) -> None:
    with report.step("import") as texts:
        done = store.import_(source.directory, "base", exclude=source.exclude)
        texts.append(f"{shown(source.directory)} as base: {amount(done.entries, done.size)}")
        if done.skipped:
            texts.append(f"(not kept: {skipped_text(done.skipped)})")
    with report.step("prepare") as texts:
        store.prepare("work", "base")
        texts.append("work, on base")
    _run_in(report, store, "work", programs)
    with report.step("diff") as texts:
        changes = list(store.diff("work"))
        texts.append(_summary(changes))
    report.changes(changes)
    with report.step("commit") as texts:
        store.commit("step", "work")
        texts.append("work as step, durable")


def _two_children(report: Report, store: Store) -> None:
    with report.step("prepare") as texts:
        store.prepare("left", "step")
        store.prepare("right", "step")
        texts.append("left and right, both on step")
    _run_in(report, store, "left", lambda tree: [script(tree, "echo left > way.txt")])
    _run_in(
        report,
        store,
        "right",
        lambda tree: [script(tree, "echo right > way.txt"), Program(("rm", f"{tree}/zen.py"), "rm zen.py")],
    )
    with report.step("diff") as texts:
        changes = list(store.diff("right", base="left"))
        texts.append(f"left to right: {_summary(changes)}")
    report.changes(changes)


def _run_in(report: Report, store: Store, key: str, wanted: _Programs) -> None:
    """Mount a snapshot, run programs in it, and unmount it."""
    with ExitStack() as stack:
        with report.step("mount") as texts:
            tree = os.fspath(stack.enter_context(store.mounted(key)))
            texts.append(f"{key} at {shown(tree)}")
        for program in wanted(tree):
            with report.step("run") as texts:
                run(program)
                texts.append(program.text)
        with report.step("unmount") as texts:
            stack.close()
            texts.append(key)


def _usage(store: Store) -> str:
    """The usage of the four snapshots, and what full copies would take."""
    taken = [store.snapshotter.usage_of(store.snapshotter.record(info.name)) for info in store.walk()]
    total = f"{size(sum(one.size for one in taken))} in {count(sum(one.inodes for one in taken), 'inode')}"
    if isinstance(store.snapshotter, NativeSnapshotter):
        return f"{total} for {len(taken)} trees, each a full copy"
    return f"{total} for {len(taken)} trees; full copies would take {size(len(taken) * taken[0].size)}"


def _summary(changes: Iterable[Change]) -> str:
    return summary(Counter(change.kind for change in changes))


def _check(scratch: str, records: list[str], directories: list[str]) -> None:
    """Raise Internal if anything is left."""
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
