"""What a mounted workspace leaves while its tree is replaced, and after that."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel.helpers import output

pytestmark = pytest.mark.needs("overlay")

PRELUDE = """
import os, pathlib, sys
import onlap
store = onlap.open(sys.argv[1], snapshotter="overlay")
with store.build("base") as tree:
    (tree / "f").write_text("base")
ws = store.workspaces.create("ws", "base")

def overlays():
    # A detached mount shows where a descriptor of it leads to, if it was the root of one.
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            kind = os.stat(f"/proc/self/fd/{name}").st_dev
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if path == "/" and kind != os.stat("/").st_dev:
            found.append(name)
    return found
"""


def test_a_replaced_tree_ends_at_the_latest_with_the_block(root: Path) -> None:
    code = """
before = len(os.listdir("/proc/self/fd")), pathlib.Path("/proc/self/mountinfo").read_text().count("\\n")
with ws.mounted() as tree:
    for number in range(50):
        (tree / "f").write_text(str(number))
        ws.rollback()
        assert (tree / "f").read_text() == "base"
        assert len(overlays()) <= 33
assert not overlays()
ws.rollback()
store.close()
store = onlap.open(sys.argv[1])
assert len(os.listdir("/proc/self/fd")) <= before[0]
assert pathlib.Path("/proc/self/mountinfo").read_text().count("\\n") == before[1]
"""
    output(PRELUDE + code, root)


def test_no_upper_layer_is_in_two_overlays(root: Path) -> None:
    code = """
with ws.mounted() as tree:
    for number in range(5):  # the sixth checkpoint is a layer of its own, merged
        (tree / "f").write_text(str(number))
        ws.checkpoint()
        # The kernel would warn of the next mount, whose lower layer this was.
        assert not overlays()
        (tree / "g").write_text("discarded")
        ws.rollback()
        assert os.listdir(tree) == ["f"] and (tree / "f").read_text() == str(number)
"""
    output(PRELUDE + code, root)


def test_a_forked_child_keeps_no_overlay(root: Path) -> None:
    code = """
with ws.mounted() as tree:
    (tree / "f").write_text("1")
    ws.rollback()
    child = os.fork()
    if child == 0:
        os._exit(len(overlays()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (tree / "f").write_text("2")
    ws.checkpoint(durable=True)
child = os.fork()
if child == 0:
    # What the parent's threads did is begun anew here.
    with ws.mounted() as tree:
        (tree / "f").write_text("3")
        assert ws.checkpoint(durable=True).durable
        (tree / "f").write_text("4")
        ws.rollback()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    output(PRELUDE + code, root)


def test_checkpoints_become_durable_without_being_asked(root: Path) -> None:
    code = """
import time
with ws.mounted() as tree:
    for number in range(5):
        (tree / "f").write_text(str(number))
        ws.checkpoint()
deadline = time.monotonic() + 20
while not all(each.durable for each in ws.log()):
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""
    output(PRELUDE + code, root)


def test_removing_a_fork_takes_what_only_it_kept(root: Path) -> None:
    code = """
def count():
    return len(os.listdir(sys.argv[1] + "/snapshots"))

def write(ws, text):
    with ws.mounted() as tree:
        (tree / "f").write_text(text)
    return ws.checkpoint()

alone = count()
write(ws, "1")
one, two = ws.forks(2)
write(two, "2")
full = count()
one.remove()
assert count() == full - 1
one = ws.fork("one")
ws.remove()
assert count() == full - 1, "the forks stand on its checkpoint"
two.remove()
assert count() == full - 3, "the checkpoint of this fork went with it"
write(one, "3")
one.rollback("base")
one.remove()
assert count() == alone - 1
"""
    output(PRELUDE + code, root)
