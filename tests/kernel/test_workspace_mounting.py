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


WITH_A_COMMAND = """
import threading
from onlap import errors
(fifo := pathlib.Path(sys.argv[1] + "/fifo")).parent.mkdir(exist_ok=True)
os.mkfifo(fifo)

class Running:
    def __init__(self, ws, script=""):
        self.thread = threading.Thread(target=self.run, args=(ws, f"read line < {fifo}; {script}"))

    def run(self, ws, script):
        self.ran = ws.run(["sh", "-c", script])

    def __enter__(self):
        self.thread.start()
        self.end = open(fifo, "w")  # which waits for the command to begin
        return self

    def __exit__(self, *_):
        self.end.close()
        self.thread.join()
"""


@pytest.mark.parametrize("ordinarily", [False, True])
def test_the_tree_stays_while_a_command_uses_it(root: Path, request: pytest.FixtureRequest, ordinarily: bool) -> None:
    code = """
with ws.mounted() as tree:
    (tree / "g").write_text("before")
    with Running(ws, "echo command > h") as running:
        for replace in (ws.checkpoint, ws.rollback, lambda: ws.rollback(wait=0.01)):
            (tree / "g").write_text("beside")
            try:
                replace()
            except errors.Busy as error:
                assert any("(sh)" in holder for holder in error.holders), error.holders
            else:
                raise AssertionError("it is in use")
            assert (tree / "g").read_text() == "beside"
        # A second command finds the tree, too.
        assert ws.run(["cat", "g"], capture=True).stdout == b"beside"
    assert running.ran.status == 0
    assert ws.checkpoint() == ws.at
    assert (tree / "h").read_text() == "command\\n"
"""
    where = request.getfixturevalue("ordinary") if ordinarily else root
    output(PRELUDE + WITH_A_COMMAND + code, where, ordinary=ordinarily)


@pytest.mark.needs("mount")
@pytest.mark.parametrize("propagation", ["MS_PRIVATE", "MS_SHARED"])
def test_mounts_of_workspaces_do_not_meet(root: Path, propagation: str) -> None:
    """Neither in other namespaces, which have a copy of every mount, nor where mounts are shared."""
    code = """
with store.build("system") as tree:
    for name in ("proc", "dev"):
        (tree / name).mkdir()
other = store.workspaces.create("other", "system")
mounts = len(pathlib.Path("/proc/self/mountinfo").read_text().splitlines())
with other.mounted() as system, ws.mounted() as tree:
    assert os.listdir(sys.argv[1] + "/empty") == []
    with Running(other):
        (tree / "g").write_text("1")
        ws.checkpoint()
        assert (tree / "g").read_text() == "1"
    try:
        other.run(["nothing"], isolation="namespace")
    except errors.NotFound as error:
        assert error.key == "nothing"
    assert os.listdir(system / "dev") == os.listdir(system / "proc") == []
    assert len(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()) == mounts + 4
assert len(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()) == mounts
"""
    apart = f"""
from onlap.syscalls import mount, namespaces
namespaces.unshare(namespaces.CLONE_NEWNS)
mount.mount("none", "/", None, mount.MS_REC | mount.{propagation}, None)
"""
    output(apart + PRELUDE + WITH_A_COMMAND + code, root)


@pytest.mark.needs("mount")
def test_what_somebody_mounted_on_top_is_not_unmounted(root: Path) -> None:
    code = """
from onlap import errors
from onlap.syscalls import mount
with ws.mounted() as tree:
    (tree / "f").write_text("1")
    mount.mount("none", tree, "tmpfs", 0, None)
    (tree / "theirs").touch()
    for replace in (ws.checkpoint, ws.rollback):
        try:
            replace()
        except errors.Busy as error:
            assert "on top of it" in error.holders[0]
        else:
            raise AssertionError("it was unmounted")
        assert os.listdir(tree) == ["theirs"]
    mount.umount2(tree)
    ws.checkpoint()
    assert (tree / "f").read_text() == "1"
"""
    output(PRELUDE + code, root)


def test_a_checkpoint_after_the_end_of_the_block_mounts_nothing(root: Path) -> None:
    """Another thread may come to it only then."""
    code = """
mounts = pathlib.Path("/proc/self/mountinfo").read_text()
with ws.mounted() as tree:
    (tree / "f").write_text("1")
    mounting = ws._mounting
with mounting.unmounted(0, discarded=False):
    ws.checkpoint()
assert not overlays() and pathlib.Path("/proc/self/mountinfo").read_text() == mounts
ws.remove()
"""
    output(PRELUDE + code, root)


def test_who_comes_second_begins_again(root: Path) -> None:
    code = """
from onlap.workspaces.history import chains
again = []

def second(name):
    first = getattr(chains, name)
    def late(*arguments):
        setattr(chains, name, first)
        other = store.workspaces["ws"]
        again.append(other.checkpoint())
        return first(*arguments)
    setattr(chains, name, late)

def write(text):
    with ws.mounted() as tree:
        (tree / "f").write_text(text)

write("1")
second("advance")
assert ws.checkpoint("both") == again[0] and ws.at.names == ("both",)
write("2")
second("reset")
assert ws.rollback("both").id == again[0].id == ws.at.id
"""
    output(PRELUDE + code, root)
