"""Forks: no SQLite connection crosses one, and both sides go on writing.

A child that opens a connection of its own while it still holds its parent's loses acknowledged commits: SQLite keeps
POSIX locks, which belong to a process, and a close in the child takes away what the parent relies on
(sqlite.org/howtocorrupt.html, section 2.6).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onlap
from onlap import errors

PATIENCE = 40.0

# Each program prints the keys that it was told are there, a line each, and "done" at the end.
_COMMON = """
import faulthandler, multiprocessing, os, subprocess, sys, threading, time, warnings
faulthandler.dump_traceback_later(float(os.environ.get("PATIENCE", 30)), exit=True)
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is what is tested
import onlap
from onlap.catalog.db.writer import forks
root = sys.argv[1]

def acknowledge(key):
    os.write(1, f"{key}\\n".encode())

def write(store, name, count):
    for index in range(count):
        key = f"{name}-{index}"
        store.prepare(key)
        acknowledge(key)

def fork(store, name, count):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            write(store, name, count)
            status = 0
        finally:
            os._exit(status)
    return pid

def reap(pids):
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        assert status == 0, status
"""

_PROGRAMS = {
    "threads write while it forks": """
store = onlap.open(root, snapshotter="overlay", sync="none")
threads = [threading.Thread(target=write, args=(store, f"thread{n}", 15)) for n in range(4)]
for thread in threads:
    thread.start()
pids = []
for n in range(5):
    pids.append(fork(store, f"child{n}", 6))
    write(store, f"between{n}", 2)
for thread in threads:
    thread.join()
reap(pids)
write(store, "after", 2)
store.close()
""",
    "a child and its child": """
store = onlap.open(root, snapshotter="overlay", sync="none")
write(store, "before", 2)
pid = os.fork()
if not pid:
    write(store, "child", 3)
    reap([fork(store, "grandchild", 3)])
    write(store, "child-again", 3)
    store.close()
    os._exit(0)
write(store, "parent", 10)
reap([pid])
write(store, "after", 2)
store.close()
""",
    "a child ends without closing": """
store = onlap.open(root, snapshotter="overlay", sync="none")
for n in range(10):
    write(store, f"before{n}", 2)
    pid = os.fork()
    if not pid:
        store.stat("before0-0")
        os._exit(0)
    write(store, f"beside{n}", 2)
    reap([pid])
store.close()
""",
    "a child closes the store": """
store = onlap.open(root, snapshotter="overlay", sync="none")
for n in range(10):
    write(store, f"before{n}", 2)
    pid = os.fork()
    if not pid:
        store.close()
        os._exit(0)
    write(store, f"beside{n}", 2)
    reap([pid])
write(store, "after", 2)
store.close()
""",
    "a child opens the root anew": """
store = onlap.open(root, snapshotter="overlay", sync="none")
write(store, "before", 2)
for n in range(5):
    pid = os.fork()
    if not pid:
        own = onlap.open(root, sync="none")
        write(own, f"child{n}", 5)
        own.close()
        os._exit(0)
    write(store, f"beside{n}", 5)
    reap([pid])
store.close()
""",
    "multiprocessing forks": """
store = onlap.open(root, snapshotter="overlay", sync="none")
write(store, "before", 2)
context = multiprocessing.get_context("fork")
children = [context.Process(target=write, args=(store, f"child{n}", 8)) for n in range(3)]
for child in children:
    child.start()
write(store, "parent", 8)
for child in children:
    child.join()
    assert child.exitcode == 0, child.exitcode
store.close()
""",
    "subprocesses with a preexec_fn": """
store = onlap.open(root, snapshotter="overlay", sync="none")
threads = [threading.Thread(target=write, args=(store, f"thread{n}", 15)) for n in range(3)]
for thread in threads:
    thread.start()
for n in range(10):
    subprocess.run(["true"], preexec_fn=lambda: None, check=True)
    subprocess.run(["true"], check=True)
for thread in threads:
    thread.join()
store.close()
""",
    "a fork while a commit is under way": """
store = onlap.open(root, snapshotter="overlay", sync="none")
database = store.snapshotter.catalog.database
inside, go = threading.Event(), threading.Event()
def hold(connection):
    inside.set()
    go.wait()
    connection.execute("INSERT INTO settings VALUES ('held', '1')")
leader = threading.Thread(target=database.write, args=(hold,))
leader.start()
inside.wait()
waiters = [threading.Thread(target=write, args=(store, f"waiter{n}", 1)) for n in range(3)]
for waiter in waiters:
    waiter.start()
while database._writer._helper.jobs.qsize() < 3:
    time.sleep(0.001)
forked = threading.Event()
def release():
    # By now the fork waits for what is under way; if it did not, the child would find an open transaction.
    while not forks.lock.locked():
        time.sleep(0.001)
    assert not forked.is_set()
    go.set()
releaser = threading.Thread(target=release)
releaser.start()
pid = fork(store, "child", 3)
forked.set()
for thread in (leader, releaser, *waiters):
    thread.join()
reap([pid])
assert database.read(lambda c: c.execute("SELECT value FROM settings WHERE key = 'held'").fetchone()) == ("1",)
store.close()
""",
}

_SPAWN = """
import multiprocessing, os, sys
import onlap

def child(root, name):
    with onlap.open(root, sync="none") as store:
        for index in range(5):
            store.prepare(f"{name}-{index}")
            os.write(1, f"{name}-{index}\\n".encode())

if __name__ == "__main__":
    root = sys.argv[1]
    store = onlap.open(root, snapshotter="overlay", sync="none")
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=child, args=(root, f"child{n}")) for n in range(2)]
    for process in children:
        process.start()
    for index in range(10):
        store.prepare(f"parent-{index}")
        os.write(1, f"parent-{index}\\n".encode())
    for process in children:
        process.join()
        assert process.exitcode == 0
    store.close()
    print("done")
"""

_TWO_FORK = """
# Two threads that fork at once, as two that run a program with a preexec_fn do.
store = onlap.open(root, snapshotter="overlay", sync="none")
def forks(n):
    for index in range(40):
        pid = os.fork()
        if not pid:
            os._exit(0)
        reap([pid])
        if not index % 8:
            write(store, f"thread{n}-{index}", 1)
threads = [threading.Thread(target=forks, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
store.close()
"""


def run(program: str, root: Path, script: Path | None = None) -> set[str]:
    """The keys that the program acknowledged, all of its processes together."""
    arguments = ["-c", program] if script is None else [str(script)]
    done = subprocess.run(
        [sys.executable, *arguments, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert lines.count("done") == 1, done.stderr
    return set(lines) - {"done"}


def check(root: Path, acknowledged: set[str]) -> None:
    with onlap.open(root, sync="none") as store:
        records = list(store.snapshotter.catalog.walk(None))
        assert {record.name for record in records} == acknowledged
        assert len({record.id for record in records}) == len(records)
        for record in records:
            assert os.path.isdir(store.snapshotter.catalog.layout.tree(record.id))
            assert os.path.isdir(store.snapshotter.catalog.layout.work(record.id))
        assert store.snapshotter.catalog.database.read(lambda c: c.execute("PRAGMA integrity_check").fetchall()) == [
            ("ok",)
        ]


@pytest.mark.parametrize("name", _PROGRAMS)
def test_a_fork_loses_nothing(root: Path, name: str) -> None:
    acknowledged = run(_COMMON + _PROGRAMS[name] + 'print("done")\n', root)
    assert acknowledged
    check(root, acknowledged)


def test_a_spawned_process_loses_nothing(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(_SPAWN)
    acknowledged = run("", root, script)
    assert acknowledged
    check(root, acknowledged)


def test_two_threads_fork_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATIENCE", "10")
    acknowledged = run(_COMMON + _TWO_FORK + 'print("done")\n', root)
    check(root, acknowledged)


def test_a_fork_behind_pythons_back_is_refused(root: Path) -> None:
    # fork(2) called by C code runs no hook: the child must not touch what its parent has open.
    program = """
import ctypes, os, sys
import onlap
from onlap import errors
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none")
store.prepare("key")
pid = ctypes.CDLL(None).fork()
if not pid:
    try:
        store.prepare("child")
    except errors.FailedPrecondition as error:
        os.write(1, b"refused\\n" if "fork" in str(error) else str(error).encode())
    os._exit(0)
os.waitpid(pid, 0)
store.prepare("parent")
store.close()
print("done")
"""
    assert run(program, root) == {"refused"}
    with onlap.open(root) as store:
        assert {info.name for info in store.walk()} == {"key", "parent"}


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(root: Path) -> None:
    """What the parent locks and unlocks after the fork is not held on by a child that lives long."""
    store = onlap.open(root, snapshotter="overlay", sync="none")
    store.prepare("before")
    ready, stay = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(stay)
        os.read(ready, 1)  # until the parent is done
        os._exit(0)
    try:
        os.close(ready)
        store.prepare("parent")
        with onlap.open(root, sync="none", timeout=5) as other:
            other.prepare("other")
        store.close()
        # The child never closed the store, and has not asked for the lock either.
        with onlap.open(root, sync="none", timeout=5) as other:
            other.remove("parent")
            with pytest.raises(errors.NotFound):
                other.stat("parent")
    finally:
        os.close(stay)
        os.waitpid(pid, 0)


def test_a_forked_child_does_not_keep_what_its_parent_holds(root: Path) -> None:
    """Trees, the staging directory and the root itself are free when the parent is dead, whoever its children are."""
    program = """
import os, sys, threading
import onlap
from onlap.locks import lock_directory
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none")
store.prepare("key")
catalog = store.snapshotter.catalog
record = catalog.get("", "key")
writing = lock_directory(catalog.layout.tree(record.id), shared=True)
with catalog.hold([record.id]), writing, catalog.serve("server"):
    if os.fork():
        os._exit(0)  # as if killed: nothing is given back
    os.write(1, b"forked\\n")
    os.read(0, 1)
    os.write(1, b"leaving\\n")
os.write(1, b"done\\n")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forked\n"
        assert parent.wait(PATIENCE) == 0
        with onlap.open(root, snapshotter="overlay", sync="none") as store:
            assert len(os.listdir(root / "staging")) == 2
            store.commit("name", "key")  # nobody writes to it
            store.remove("name")
            assert store.snapshotter.catalog.garbage.cleanup() == 3  # the tree, and two directories of the dead
            assert os.listdir(root / "staging") == []
        parent.stdin.write(b"go\n")
        parent.stdin.flush()
        # The child takes nothing away from anybody as it leaves the blocks.
        assert parent.stdout.read() == b"leaving\ndone\n"
