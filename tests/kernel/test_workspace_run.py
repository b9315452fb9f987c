"""Commands in workspaces, and the tree at one path, as whoever runs the tests and as an ordinary user."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel.helpers import PRELUDE as COMMON
from kernel.helpers import output

pytestmark = pytest.mark.needs("overlay")

PRELUDE = f"""{COMMON}
import collections
ws = store.workspaces.create("w", source)
sh = lambda script, **options: ws.run(["sh", "-c", script], capture=True, **options)
paths = lambda changes: [(change.kind, change.path) for change in changes]
"""


def test_what_each_command_changed_and_the_way_back(who: bool, place: Path) -> None:
    code = """
first = sh("echo $ONLAP_WORKSPACE; rm f; echo one > n; mkdir d/e")
assert first.stdout == b"w\\n" and first.status == 0
assert paths(first.changes) == [("C", "d"), ("A", "d/e"), ("D", "f"), ("A", "n")], first.changes
assert first.before.id == "base"
second = sh("echo two >> n; exit 3", cwd="d/..")
assert second.status == 3 and paths(second.changes) == [("C", "n")]
third = sh("cat n")
assert third.stdout == b"one\\ntwo\\n" and third.changes == ()
assert sh("true").before == third.before
log = ws.log()
assert [c.command[2:] for c in log] == [(), ("echo $ONLAP_WORKSPACE; rm f; echo one > n; mkdir d/e",),
                                        ("echo two >> n; exit 3",)], log
ws.rollback(second.before)
assert sh("cat n").stdout == b"one\\n"
ws.rollback(first.before)
assert sh("ls").stdout == b"d\\nf\\n"
killed = sh("echo x > x; sleep 60", timeout=0.5)
assert killed.timed_out and killed.status == 137 and paths(killed.changes) == [("A", "x")]
assert raises(onlap.NotFound, ws.run, ["no-such-command"]).key == "no-such-command"
raises(onlap.InvalidArgument, ws.run, ["true"], isolation="vm")
"""
    output(PRELUDE + code, place, ordinary=who)


def test_the_tree_stays_at_one_path(who: bool, place: Path) -> None:
    code = """
def descriptors():
    store.workspaces.close()
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) in open_files()]
    return sorted(link for link in links if "/catalog." not in link)  # threads have connections of their own
def open_files():
    import fcntl
    def is_open(fd):
        try:
            return fcntl.fcntl(fd, fcntl.F_GETFD) >= 0
        except OSError:
            return False
    return [fd for fd in range(256) if is_open(fd)]
with ws.mounted() as tree:
    sh("true")  # the helper, and the connections of threads
before = descriptors()
with ws.mounted() as tree:
    path = os.fspath(tree)
    assert "mounted" in str(raises(onlap.Busy, ws.mounted().__enter__))
    (tree / "a").write_text("1")
    one = ws.checkpoint("one")
    assert ws.checkpoint() == one and ws.at == one
    (tree / "a").write_text("2")
    ws.rollback()
    assert (tree / "a").read_text() == "1"
    ran = sh("echo 3 > a; pwd")
    assert (tree / "a").read_text() == "3\\n" and paths(ran.changes) == [("C", "a")] and ran.before == one
    with open(tree / "b", "w") as held:
        busy = raises(onlap.Busy, ws.checkpoint)
        assert any(f"pid {os.getpid()} " in line for line in busy.holders), busy.holders
        assert "wait" in busy.hint
        held.write("still there")
    assert (tree / "b").read_text() == "still there"
    timer = threading.Timer(0.3, held.close)
    with open(tree / "b") as held:
        timer = threading.Timer(0.3, held.close)
        timer.start()
        ws.checkpoint("two", wait=30)
        timer.join()
    child = subprocess.Popen(["sleep", "60"], cwd=tree)
    busy = raises(onlap.Busy, ws.rollback, "one")
    assert any(f"pid {child.pid} " in line for line in busy.holders), busy.holders
    child.kill()
    child.wait()
    ws.rollback("one")
    assert sorted(os.listdir(tree)) == ["a", "d", "f"]
    assert os.fspath(tree) == path
child = None
def leave():
    global child
    with ws.mounted() as tree:
        child = subprocess.Popen(["sleep", "60"], cwd=tree)
busy = raises(onlap.Busy, leave)
assert any(f"pid {child.pid} " in line for line in busy.holders), busy.holders
child.kill()
child.wait()
store.cleanup()
more = collections.Counter(descriptors()) - collections.Counter(before)
assert not more, more
ws.checkpoint()
store.close()
"""
    output(PRELUDE + code, place, ordinary=who)


def test_two_commands_share_the_tree(who: bool, place: Path) -> None:
    code = """
os.mkfifo(source / "fifo")
ws = store.workspaces.create("shared", source)
results = []
thread = threading.Thread(target=lambda: results.append(ws.run(["sh", "-c", "echo a > a; cat fifo > from"])))
thread.start()
second = ws.run(["sh", "-c", "echo b > b; echo word > fifo"])
thread.join()
assert second.status == 0 and results[0].status == 0
assert {"a", "b", "from"} <= {path for _, path in paths(ws.diff("base"))}
assert ws.run(["cat", "from"], capture=True).stdout == b"word\\n"
"""
    output(PRELUDE + code, place, ordinary=who)


def test_a_root_of_its_own(who: bool, place: Path) -> None:
    code = """
make_tree(source)
(source / "proc").mkdir()
ws = store.workspaces.create("chrooted", source)
ran = ws.run(["sh", "-c", "pwd; ls /; echo $$; echo x > /new"], isolation="namespace", capture=True)
top, *names, pid = ran.stdout.decode().split()
assert top == "/" and names == sorted(os.listdir(source)), ran
assert int(pid) < 10 and paths(ran.changes) == [("A", "new")]
"""
    output(PRELUDE + code, place, ordinary=who)


@pytest.mark.needs("cgroup2")
def test_a_checkpoint_freezes_what_runs(root: Path) -> None:
    code = """
os.mkfifo(source / "fifo")
ws = store.workspaces.create("running", source)
from onlap.mounts import freezer
groups, make = [], freezer._make
freezer._make = lambda group: (groups.append(group), make(group))
script = "echo start > log; exec 3<>fifo; while ! read -t 0 line <&3; do i=$((i+1)); echo $i $i > count; done"
results = []
thread = threading.Thread(target=lambda: results.append(ws.run(["bash", "-c", script], timeout=60)))
thread.start()
while "A" not in "".join(kind for kind, path in paths(ws.diff("base")) if path == "count"):
    pass
assert raises(onlap.Busy, ws.checkpoint, "refused").holders
kept = [ws.checkpoint(f"kept-{number}", freeze=True) for number in range(5)]
assert ws.at == kept[-1]
fork = ws.fork(at=kept[0])
with fork.mounted() as tree:
    (tree / "mine").write_text("x")
    assert (tree / "log").read_text() == "start\\n"
ws.run(["sh", "-c", "echo x > fifo"])
thread.join()
assert results[0].status == 0, results
counts = []
for one in kept:
    ws.rollback(one)
    words = ws.run(["cat", "count"], capture=True).stdout.split()
    assert len(set(words)) <= 1, words
    counts += [int(words[0])] if words else []
assert counts == sorted(counts), counts
assert groups and not [group for group in groups if os.path.exists(group)]
"""
    output(PRELUDE + code, root)


@pytest.mark.needs("cgroup2")
def test_what_a_killed_program_froze_runs_again_after_the_next_cleanup(root: Path) -> None:
    code = """
import signal, time
script = "while [ ! -e stop ]; do echo > alive; done"
thread = threading.Thread(target=lambda: ws.run(["sh", "-c", script], timeout=60))
thread.start()
while not ws.is_changed:
    pass
pid = os.fork()
if pid == 0:
    from onlap.workspaces.history import chains
    chains.copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    other = onlap.open(root + "/store")
    other.workspaces["w"].checkpoint(freeze=True)
    os._exit(1)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
noted = [path.read_text().splitlines() for path in pathlib.Path(root, "store/runs").glob("*/frozen")]
groups = sum(noted, [])
assert groups and all(map(os.path.exists, groups)), groups
store.cleanup()
assert not any(map(os.path.exists, groups))
assert ws.run(["touch", "stop"]).status == 0
thread.join()
"""
    output(PRELUDE + code, root)


def test_a_forked_child_that_leaves_the_blocks_changes_nothing(who: bool, place: Path) -> None:
    code = """
with store.workspaces.create(None, source) as unnamed:
    with unnamed.mounted() as tree:
        pid = os.fork()
        if pid == 0:
            try:
                raise SystemExit
            except SystemExit:
                pass
        else:
            assert os.waitpid(pid, 0)[1] == 0
            (tree / "after").write_text("the fork")
            unnamed.checkpoint()
            assert (tree / "after").read_text() == "the fork"
    if pid == 0:
        os.environ["LEFT"] = "yes"
if pid == 0:
    os._exit(0)
assert list(store.workspaces) == ["w"]
"""
    output(PRELUDE + code, place, ordinary=who)


@pytest.mark.needs("mount")
def test_a_killed_program_leaves_no_mount_at_a_place_of_its_own(root: Path) -> None:
    code = """
import signal
place = root + "/place"
os.mkdir(place)
pid = os.fork()
if pid == 0:
    other = onlap.open(root + "/store")
    again = other.workspaces["w"]
    with again.mounted(place) as tree:
        for number in range(8):
            (tree / "n").write_text(str(number))
            again.checkpoint()
        again.rollback("base")
        os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(pid, 0)
assert os.path.ismount(place)
store.cleanup()
assert not os.path.ismount(place)
with ws.mounted(place) as tree:
    assert os.listdir(tree) == ["d", "f"] or os.listdir(tree) == ["f", "d"]
"""
    output(PRELUDE + code, root)


def test_nothing_is_lost_that_is_written_while_the_tree_is_replaced(who: bool, place: Path) -> None:
    code = """
written, refused = [], []
stop = threading.Event()
def write(tree):
    number = 0
    while not stop.is_set():
        name = f"written-{number}"
        number += 1
        try:
            fd = os.open(tree / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.close(fd)
            written.append(name)
        except OSError as error:
            refused.append(error.errno)
with ws.mounted() as tree:
    thread = threading.Thread(target=write, args=(tree,))
    thread.start()
    try:
        for _ in range(25):
            ws.checkpoint(wait=20)
    finally:
        stop.set()
        thread.join()
    there = set(os.listdir(tree))
    assert written and not [name for name in written if name not in there]
import errno
assert set(refused) <= {errno.EROFS, errno.ENOENT}, set(refused)
assert os.listdir(root + "/store/empty") == []
"""
    output(PRELUDE + code, place, ordinary=who)
