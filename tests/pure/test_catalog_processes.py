"""Many processes at one root: nothing is lost, nobody starves, and a stopped one is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onlap
from onlap import errors

PATIENCE = 50.0

_WRITER = """
import os, sys, time
import onlap
root, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.stdin.readline()  # all at once
worst = 0.0
with onlap.open(root, snapshotter="overlay", sync="none") as store:
    for index in range(count):
        start = time.monotonic()
        store.prepare(f"{name}-{index}", labels={"by": name})
        worst = max(worst, time.monotonic() - start)
        os.write(1, f"{name}-{index}\\n".encode())
os.write(2, f"{worst}\\n".encode())
"""

_HOLDER = """
import os, sys
import onlap
with onlap.open(sys.argv[1], snapshotter="overlay", sync="none") as store:
    def hold(connection):
        os.write(1, b"held\\n")
        sys.stdin.readline()
    store.snapshotter.catalog.database.write(hold)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("fresh", [False, True], ids=["an old root", "a root that all of them make"])
def test_sixteen_processes_lose_nothing(
    root: Path, fresh: bool, record_property: Callable[[str, object], None]
) -> None:
    if not fresh:
        onlap.open(root, snapshotter="overlay").close()
    writers = [start(_WRITER, root, f"writer{number}", 12) for number in range(16)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    acknowledged: set[str] = set()
    worst = 0.0
    for writer in writers:
        out, err = writer.communicate(timeout=PATIENCE)
        assert writer.returncode == 0, err
        acknowledged |= set(out.split())
        worst = max(worst, float(err))
    record_property("longest wait for one prepare, seconds", worst)
    assert len(acknowledged) == 16 * 12
    with onlap.open(root) as store:
        found = list(store.snapshotter.catalog.walk(None))
        assert {record.name for record in found} == acknowledged
        assert len({record.id for record in found}) == len(found)
        assert all(os.path.isdir(store.snapshotter.catalog.layout.tree(record.id)) for record in found)
        store.cleanup()
    assert sorted(os.listdir(root / "snapshots"), key=int) == sorted((str(r.id) for r in found), key=int)
    assert not os.listdir(root / "trash")


def test_a_stopped_process_is_no_deadlock(root: Path) -> None:
    holder = start(_HOLDER, root)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with onlap.open(root, snapshotter="overlay", sync="none", timeout=0.3) as store:
            with pytest.raises(errors.Unavailable, match=r"catalog\.lock for 0.3 s"):
                store.prepare("key")
            assert "key" not in store
            holder.send_signal(signal.SIGCONT)
            holder.communicate("go\n", timeout=PATIENCE)
            store.prepare("key")
            assert "key" in store
    finally:
        holder.kill()
        holder.communicate()


def test_a_killed_process_gives_its_lock_back(root: Path) -> None:
    holder = start(_HOLDER, root)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        with onlap.open(root, sync="none", timeout=PATIENCE) as store:
            store.prepare("key")
    finally:
        holder.kill()
        holder.communicate()


_FORKING = """
import os, signal, sys, threading, time
import onlap
from onlap import errors
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none", timeout=0.2)
try:
    store.prepare("key")
except errors.Unavailable:
    pass
# The thread that waited for the lock still stands in the kernel's queue, and a child has its descriptor too.
pid = os.fork()
if not pid:
    os.read(0, 1)
    os._exit(0)
os.write(1, b"forked\\n")
os.waitpid(pid, 0)
"""


def test_a_child_does_not_inherit_a_place_in_the_queue(root: Path) -> None:
    onlap.open(root, snapshotter="overlay").close()
    holder = start(_HOLDER, root)
    other = None
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        other = start(_FORKING, root)
        assert other.stdout is not None
        assert other.stdout.readline() == "forked\n"
        holder.communicate("go\n", timeout=5)  # it closes its store, which takes the lock
        with onlap.open(root, sync="none", timeout=1) as store:
            store.prepare("after")
    finally:
        holder.kill()
        holder.communicate()
        if other is not None:
            other.communicate("go\n", timeout=PATIENCE)


_LOOKING = """
import os, sys
import onlap
from onlap import errors
try:
    with onlap.open(sys.argv[1], timeout=0.2) as store:
        print([info.name for info in store.walk()])
except errors.Unavailable:
    print("unavailable")
"""


def test_who_only_looks_does_not_hang_on_a_stopped_process(root: Path) -> None:
    """As ``onlap ls`` does it; it may say Unavailable, but has to end."""
    holder = start(_HOLDER, root)
    looker = None
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        looker = start(_LOOKING, root)
        out, err = looker.communicate(timeout=4)
        assert out in ("[]\n", "unavailable\n"), err
    finally:
        for process in (holder, looker):
            if process is not None:
                process.kill()
                process.communicate()
