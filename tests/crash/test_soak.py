"""Eight processes that do everything at once and are interrupted, killed and forked at random: nothing is lost or left.

A worker notes in a file of its own what it is about to do and what has returned. At the end the store is compared with
the notes, and looked at by ``check``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onlap
from onlap.store import Store

WORKERS = 8
# The signals that a worker gets, by how often; SIGKILL is the power cut of a process.
SIGNALS = [signal.SIGINT] * 4 + [signal.SIGTERM] * 2 + [signal.SIGKILL] * 3

# argv: the root, the worker's notes, a seed, how many operations. A line of the notes is [verb, name], the name of what
# is to be committed or removed; "ok" stands behind it when that has returned.
_WORKER = r"""
import io, json, os, random, signal, sys, threading
import onlap
from onlap import errors

root, notes, seed, turns = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
log = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

class Terminated(BaseException):
    pass

def terminate(*_):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)

def note(*words):
    os.write(log, (json.dumps(words) + "\n").encode())

def content(name):
    return name * 100

def write(tree, name):
    (tree / "name").write_text(content(name))
    (tree / "d").mkdir(exist_ok=True)
    for number in range(3):
        (tree / "d" / f"{name}-{number}").write_text(name)

def committed(store):
    found = [info.name for info in store.walk("kind==committed") if info.name.startswith("w")]
    return rng.choice(found) if found else None

def build(store, name):
    parent = committed(store)
    note("commit", name)
    with store.build(name, parent) as tree:
        write(tree, name)
    note("ok", name)

def by_hand(store, name):
    store.prepare(f"key-{name}", committed(store), {"n": "1"})
    with store.mounted(f"key-{name}") as tree:
        write(tree, name)
    store.label(f"key-{name}", {"n": "2"})
    if rng.random() < 0.3:
        store.remove(f"key-{name}")
        return
    note("commit", name)
    store.commit(name, f"key-{name}")
    note("ok", name)

def imported(store, name):
    buffer = io.BytesIO()
    source = committed(store)
    if source is None:
        return
    store.export(source, buffer, compression=rng.choice(["none", "gzip"]))
    buffer.seek(0)
    note("commit", name)
    with store.build(f"tmp-{name}") as tree:
        write(tree, name)
    store.squash(f"tmp-{name}", name)
    note("ok", name)
    store.import_(buffer, f"again-{name}")
    store.remove(f"again-{name}")
    store.remove(f"tmp-{name}")

def scratch(store, name):
    with store.scratch(committed(store)) as tree:
        write(tree, name)

def look(store, name):
    source = committed(store)
    if source is not None:
        list(store.diff(source))
        store.write_diff(source, io.BytesIO())
        store.usage(source)
        store.view(f"view-{name}", source)
        store.remove(f"view-{name}")

def remove(store, name):
    found = committed(store)
    if found is not None:
        note("remove", found)
        store.remove(found)

def care(store, name):
    rng.choice([store.cleanup, store.collect, store.check])()

def fork(store, name):
    ready = threading.Event()
    helper = threading.Thread(target=lambda: (ready.set(), list(store.walk())))
    helper.start()
    ready.wait()
    child = os.fork()
    if child == 0:
        try:
            scratch(store, name)
        finally:
            os._exit(0)
    try:
        helper.join()
    finally:
        os.waitpid(child, 0)

VERBS = [build] * 4 + [by_hand] * 4 + [imported] * 2 + [scratch, look, fork, care] + [remove] * 5

def main():
    turn = 0
    while turn < turns:
        with onlap.open(root) as store:
            for turn in range(turn, min(turns, turn + rng.randrange(1, 12))):
                try:
                    rng.choice(VERBS)(store, f"w{seed}-{turn}")
                except errors.OnlapError as error:
                    # Others remove what we chose, stand on it, mount it.
                    if error.kind not in ("NotFound", "FailedPrecondition", "Busy", "AlreadyExists", "Unavailable"):
                        raise
                    note("failed", error.kind)
            turn += 1

while True:
    try:
        main()
        break
    except KeyboardInterrupt:
        seed += 1_000_000
"""


class Worker:
    """One of the processes, started again with another seed when it ends."""

    def __init__(self, root: Path, number: int) -> None:
        self.root = root
        self.number = number
        self.notes = root.parent / f"notes-{number}"
        self.ends: Counter[int] = Counter()
        self.errors = b""
        self.started = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.started += 1
        seed = str(self.number * 10_000 + self.started)
        return subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _WORKER, self.root, self.notes, seed, "40"],
            stderr=subprocess.PIPE,
        )

    def revive(self) -> None:
        """Start it again if it has ended."""
        if self.process.poll() is not None:
            self.finish()
            self.process = self._start()

    def finish(self) -> None:
        """Wait for its end, and keep what it said."""
        _, said = self.process.communicate()
        self.ends[self.process.returncode] += 1
        # A traceback of what the signals raise, wherever they met it, is how such a process ends.
        if said and b"Terminated" not in said and b"KeyboardInterrupt" not in said:
            self.errors += said


def test_everything_at_once(tmp_path: Path, counted: Callable[[str], None]) -> None:
    soak(tmp_path, 30.0, seed=1, counted=counted)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_everything_at_once_for_ten_minutes(tmp_path: Path, counted: Callable[[str], None]) -> None:
    soak(tmp_path, 600.0, seed=2, counted=counted)


def soak(place: Path, seconds: float, *, seed: int, counted: Callable[[str], None]) -> None:
    """Run the workers for so long, then look at what they leave."""
    rng = random.Random(seed)
    root = place / "root"
    onlap.open(root, sync="none").close()
    workers = [Worker(root, number) for number in range(WORKERS)]
    sent = 0
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            # Not waiting for anything: this is how often somebody is hit.
            time.sleep(rng.uniform(0.05, 0.4))
            worker = rng.choice(workers)
            worker.revive()
            worker.process.send_signal(rng.choice(SIGNALS))
            sent += 1
    finally:
        for worker in workers:
            worker.process.kill()
            worker.finish()
    for worker in workers:
        assert worker.errors == b"", worker.errors.decode()
    with onlap.open(root) as store:
        acknowledged = compare(store, workers)
        store.cleanup(manifests=True)
        report = store.check(deep=True)
        assert [str(each) for each in report.findings] == []
        assert report.unlisted == 0
    assert_nothing_is_left(root)
    counted(f"soak: seed {seed}, {sent} signals, {acknowledged} acknowledged commits, {report.files} files checked")


def compare(store: Store, workers: list[Worker]) -> int:
    """What was acknowledged, and never to be removed, is there with its content; returns how many that were."""
    kept, removed = set(), set()
    for words in (words for worker in workers for words in notes_of(worker)):
        if words[0] == "ok":
            kept.add(words[1])
        elif words[0] == "remove":
            removed.add(words[1])
    there = {info.name for info in store.walk("kind==committed")}
    assert kept - removed <= there
    for name in sorted(there):
        if name in kept:
            with store.mounted(name) as tree:
                assert (tree / "name").read_text() == name * 100
                assert {(tree / "d" / f"{name}-{number}").read_text() for number in range(3)} == {name}
    return len(kept)


def notes_of(worker: Worker) -> Iterator[list[str]]:
    """The lines of a worker's notes; the last one may be cut."""
    for line in worker.notes.read_text().splitlines() if worker.notes.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def assert_nothing_is_left(root: Path) -> None:
    """No mount, staging, run or trash of any of them."""
    with open("/proc/self/mountinfo") as file:
        assert [line for line in file if str(root) in line] == []
    for name in ("staging", "runs", "trash"):
        assert os.listdir(root / name) == []
