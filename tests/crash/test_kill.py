"""SIGKILL at any moment: what was acknowledged holds, and cleanup finds the rest.

The cycles run in a child, which is killed from outside after a random time, or kills itself at a random one of the
calls that change the root: a rename, a mkdir, a rmdir, a COMMIT.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import onlap
from onlap.store import Store

PATIENCE = 30.0

# argv: the root, a seed, the number of the call to die at (0: never). Prints what it is about to do and, when that has
# been acknowledged, "ok".
_CYCLES = r"""
import itertools, os, random, signal, sqlite3, sys
import onlap
from onlap.catalog.db import database

root, seed, fatal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
calls = itertools.count(1)  # several threads call: with a number that each had to add to, one could be passed over

def deadly(function, after):
    def call(*args, **kwargs):
        number = next(calls)
        if number == fatal and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if number == fatal and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

class Connection(sqlite3.Connection):
    def execute(self, sql, *parameters):
        run = super().execute
        if sql == "COMMIT" or sql.startswith(("INSERT", "DELETE", "UPDATE")):
            run = deadly(run, seed % 2)
        return run(sql, *parameters)

if fatal:
    for name in ("rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name), seed % 2))
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)

def say(*words):
    os.write(1, (" ".join(words) + "\n").encode())

def act(verb, *words, run):
    say(verb, *words)
    run()
    say("ok")

with onlap.open(root, snapshotter="overlay", sync=("none", "layer")[seed % 3 == 0]) as store:
    committed, active = [], []
    for info in store.walk():
        (committed if info.kind == "committed" else active).append(info.name)
    os.write(2, b"begun\n")
    for number in range(100000):
        choice = rng.random()
        key = f"{seed}-{number}"
        if choice < 0.35 or not active:
            parent = rng.choice(committed) if committed and rng.random() < 0.7 else ""
            act("prepare", key, parent or "-", run=lambda: store.prepare(key, parent))
            active.append(key)
        elif choice < 0.6:
            key = active.pop(rng.randrange(len(active)))
            tree = store.snapshotter.catalog.layout.tree(store.snapshotter.record(key).id)
            with open(f"{tree}/file", "w") as file:
                file.write(key)
            act("commit", f"c{key}", key, run=lambda: store.commit(f"c{key}", key, {"was": key}))
            committed.append(f"c{key}")
        elif choice < 0.8:
            key = active.pop(rng.randrange(len(active)))
            act("remove", key, run=lambda: store.remove(key))
        elif choice < 0.9:
            key = rng.choice(active)
            act("label", key, str(number), run=lambda: store.label(key, {"n": str(number)}))
        else:
            act("cleanup", run=store.cleanup)
"""


class Model:
    """What must be there: the snapshots by name as (kind, parent, labels), and the one that may be either way."""

    def __init__(self) -> None:
        self.snapshots: dict[str, tuple[str, str | None, dict[str, str]]] = {}

    def run(self, output: str) -> list[dict[str, tuple[str, str | None, dict[str, str]]]]:
        """Take the acknowledged changes in; what may be there now: with the unacknowledged last one, or without."""
        lines = output.splitlines()
        pending: list[str] | None = None
        for line in lines:
            if line == "ok":
                assert pending is not None
                self._apply(self.snapshots, pending)
                pending = None
            else:
                pending = line.split(" ")
        right = [self.snapshots]
        if pending is not None:
            other = dict(self.snapshots)
            self._apply(other, pending)
            right.append(other)
        return right

    @staticmethod
    def _apply(snapshots: dict[str, tuple[str, str | None, dict[str, str]]], words: list[str]) -> None:
        verb, *rest = words
        if verb == "prepare":
            snapshots[rest[0]] = ("active", None if rest[1] == "-" else rest[1], {})
        elif verb == "commit":
            _, parent, _ = snapshots.pop(rest[1])
            snapshots[rest[0]] = ("committed", parent, {"was": rest[1]})
        elif verb == "remove":
            del snapshots[rest[0]]
        elif verb == "label":
            kind, parent, labels = snapshots[rest[0]]
            snapshots[rest[0]] = (kind, parent, {**labels, "n": rest[1]})


def check(store: Store, right: list[dict[str, tuple[str, str | None, dict[str, str]]]]) -> Model:
    """The store against the states that are right; the model of the one that it is."""
    found: dict[str, tuple[str, str | None, dict[str, str]]] = {
        info.name: (info.kind, info.parent, dict(info.labels)) for info in store.walk()
    }
    assert found in right
    catalog = store.snapshotter.catalog
    records = list(catalog.walk(None))
    identifiers = {record.id for record in records}
    assert len(identifiers) == len(records)
    for record in records:
        assert record.parent_id is None or record.parent_id in identifiers
        tree = Path(catalog.layout.tree(record.id))
        assert tree.is_dir()
        if record.kind == "active":
            assert os.path.isdir(catalog.layout.work(record.id))
        else:
            # Of the same process's life, so that the page cache has it: the content is that of this very snapshot.
            assert (tree / "file").read_text() == record.labels["was"]
    assert catalog.lost == []
    model = Model()
    model.snapshots = found
    return model


def check_garbage(store: Store) -> None:
    layout = store.snapshotter.catalog.layout
    store.cleanup()
    records = {str(record.id) for record in store.snapshotter.catalog.walk(None)}
    assert set(os.listdir(layout.snapshots)) == records
    assert os.listdir(layout.trash) == []
    own = {os.path.basename(store.snapshotter.catalog.staging._own or "")}
    assert set(os.listdir(layout.staging)) <= own


def start(root: Path, seed: int, fatal: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CYCLES, str(root), str(seed), str(fatal)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rounds(root: Path, count: int, *, inside: bool, seed: int) -> int:
    """Start and kill programs, and look at what they left; how much they had acknowledged."""
    rng = random.Random(seed)
    acknowledged = 0
    model = Model()
    for number in range(count):
        fatal = rng.randrange(1, 150) if inside else 0
        child = start(root, seed + number, fatal)
        try:
            if not inside:
                assert child.stderr is not None
                assert child.stderr.readline() == "begun\n"
                time.sleep(rng.random() * 0.15)  # any moment will do: no event is waited for
                child.kill()
            out, err = child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == -signal.SIGKILL, err
        acknowledged += len(out.splitlines())
        right = model.run(out)
        with onlap.open(root, snapshotter="overlay", sync="none") as store:
            model = check(store, right)
            if number % 3 == 2:
                check_garbage(store)
                model = check(store, [model.snapshots])
    return acknowledged


def test_killed_from_outside(root: Path) -> None:
    assert rounds(root, 15, inside=False, seed=100) > 15


def test_killed_at_a_step(root: Path) -> None:
    assert rounds(root, 30, inside=True, seed=1000) > 30


@pytest.mark.long
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "at a step"])
def test_killed_many_times(root: Path, inside: bool) -> None:
    assert rounds(root, 600, inside=inside, seed=5000) > 600


_DIE = """
import os, signal, sys
import onlap
from onlap.catalog import records
from onlap.snapshots.overlay import OverlaySnapshotter

step = sys.argv[2]
def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none")
store.prepare("before")
if step == "in staging":
    OverlaySnapshotter._inherit = die
elif step == "after the insert":
    os.rename = die
elif step == "after the rename":
    rename = os.rename
    def rename_and_die(*args):
        rename(*args)
        die()
    os.rename = rename_and_die
elif step == "after the delete":
    os.rename = die
    store.remove("before")
elif step == "after the move to the trash":
    store.snapshotter.catalog._janitor.wake = die
    store.remove("before")
elif step == "while it is deleted":
    tree = store.snapshotter.catalog.layout.tree(store.snapshotter.record("before").id)
    for n in range(100):
        open(f"{tree}/{n}", "w").close()
    unlink, left = os.unlink, iter(range(50))
    def unlink_or_die(*args, **kwargs):
        if next(left, None) is None:
            die()
        unlink(*args, **kwargs)
    store.remove("before")
    os.unlink = unlink_or_die
    store.cleanup()
store.prepare("key")
"""


@pytest.mark.parametrize(
    "step, left",
    [
        ("in staging", {"before"}),
        ("after the insert", {"before"}),
        ("after the rename", {"before"}),
        ("after the delete", set()),
        ("after the move to the trash", set()),
        ("while it is deleted", set()),
    ],
)
def test_each_step(root: Path, step: str, left: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DIE, str(root), step],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        assert {info.name for info in store.walk()} == left
        # A directory without a record may lie at the next number: it is no obstacle, and that number is not taken.
        orphans = set(os.listdir(root / "snapshots")) - {str(r.id) for r in store.snapshotter.catalog.walk(None)}
        store.prepare("next")
        assert str(store.snapshotter.record("next").id) not in orphans
        assert os.listdir(store.snapshotter.catalog.layout.tree(store.snapshotter.record("next").id)) == []
        check_garbage(store)
