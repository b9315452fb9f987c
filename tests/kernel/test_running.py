"""Programs in a tree: `Store.run`, as whoever runs the tests and as an ordinary user."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest

from capabilities import find_program
from kernel.helpers import PRELUDE as COMMON
from kernel.helpers import output, python

pytestmark = pytest.mark.needs("overlay")

PRELUDE = f"""{COMMON}
import select, signal
# Both are ignored where the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
if "base" not in store:
    os.symlink("d", source / "in")
    os.symlink("/", source / "out")
    store.import_(source, "base")
    store.prepare("work", "base")
sh = lambda script, **options: store.run("work", ["sh", "-c", script], capture=True, **options)
def ended(pid):
    # Of a process that may have been reaped by another parent.
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    return bool(select.select([fd], [], [], 20)[0])
"""


def test_streams_status_and_environment(who: bool, place: Path) -> None:
    code = """
done = sh("cat; echo err >&2; echo $ONLAP_KEY $A; exit 7", input=b"x" * 1000000, env={"PATH": os.defpath, "A": "b"})
assert done.status == 7 and done.stdout == b"x" * 1000000 + b"work b\\n" and done.stderr == b"err\\n", done[1:]
assert done.argv[0] == "sh" and not done.timed_out
assert sh("head -c 1", input=b"y" * 1000000).stdout == b"y"
assert sh("cat; cat <&1 >/dev/null | true").stdout == b""
assert sh("kill -9 $$").status == 137
assert sh("yes | head -n 1; ulimit -n; umask").stdout.split()[0] == b"y"
os.umask(0o27)
assert sh("umask").stdout == b"0027\\n"
assert sh("ls /proc/self/fd").stdout.split() == [b"0", b"1", b"2", b"3"]
assert sh("grep -E 'Sig(Blk|Ign)' /proc/self/status | sort -u").stdout.split()[1::2] == [b"0" * 16] * 2
"""
    output(PRELUDE + code, place, ordinary=who)


def test_the_working_directory(who: bool, place: Path) -> None:
    code = """
tree = os.fsdecode(sh('test "$PWD" = "$(pwd -P)" && pwd').stdout.strip())
assert tree.startswith(root + "/store/runs/") and tree.endswith("/tree"), tree
assert sh("echo $PWD; pwd -P", cwd="in").stdout.split()[0].endswith(b"/tree/in")
assert sh("pwd -P", cwd="in/../d").stdout.endswith(b"/tree/d\\n")
assert "leads out" in str(raises(onlap.InvalidArgument, sh, "true", cwd="out/tmp"))
assert "leads out" in str(raises(onlap.InvalidArgument, sh, "true", cwd=".."))
assert raises(onlap.NotFound, sh, "true", cwd="none").key == "none"
raises(onlap.InvalidArgument, sh, "true", cwd="/tmp")
raises(onlap.InvalidArgument, sh, "true", cwd="f")
assert raises(onlap.NotFound, store.run, "work", ["./none"]).key == "./none"
assert "cannot run ./f: Permission" in str(raises(onlap.PermissionDenied, store.run, "work", ["./f"]))
assert raises(onlap.NotFound, store.run, "none", ["true"]).key == "none"
assert os.listdir(root + "/store/runs") == []
assert b"Read-only" in store.run("base", ["touch", "x"], capture=True).stderr
store.commit("next", "work")
"""
    output(PRELUDE + code, place, ordinary=who)


DO = """
def do(*argv):
    done = store.run("work", argv, capture=True)
    assert done.status == 0, done
    return done.stdout
"""


@pytest.mark.needs("peer:git")
def test_git_works_in_it(who: bool, place: Path) -> None:
    code = """
git = sys.argv[2]
do(git, "init", "-q")
assert b"?? f" in do(git, "status", "--porcelain")
"""
    output(PRELUDE + DO + code, place, find_program("git") or "", ordinary=who)


@pytest.mark.needs("peer:make")
def test_make_works_in_it(who: bool, place: Path) -> None:
    code = """
do("sh", "-c", "printf 'all:\\\\n\\\\tpwd > made\\\\n' > Makefile")
do(sys.argv[2])
assert b"/tree" in do("cat", "made")
"""
    output(PRELUDE + DO + code, place, find_program("make") or "", ordinary=who)


def test_python_works_in_it(who: bool, place: Path) -> None:
    code = """
do(sys.executable, "-m", "venv", "--without-pip", "venv")
assert b"/tree/venv" in do("venv/bin/python", "-c", "import sys; print(sys.prefix)")
do("sh", "-c", "echo 'def test(): import os; assert os.path.samefile(os.getcwd(), \\".\\")' > test_x.py")
pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.")
assert b"1 passed" in do(*pytest, "test_x.py")
"""
    output(PRELUDE + DO + code, place, ordinary=who)


def test_a_timeout_ends_all_of_it(who: bool, place: Path) -> None:
    """Also what ignores signals, and what left its process group."""
    code = """
done = sh("trap '' TERM; sleep 100 & echo $!; setsid sleep 100 & echo $!; echo $$; wait", timeout=0.5)
assert (done.status, done.timed_out) == (137, True), done
numbers = [int(pid) for pid in done.stdout.split()]
assert len(numbers) == 3 and all(ended(pid) for pid in numbers), numbers
store.commit("next", "work")
"""
    output(PRELUDE + code, place, ordinary=who)


def test_an_interrupt_ends_all_of_it(who: bool, place: Path) -> None:
    code = """
os.mkfifo(root + "/fifo")
script = f"sleep 100 & echo $! > {root}/pids; setsid sleep 100 & echo $! >> {root}/pids; echo > {root}/fifo; wait"
def interrupt():
    with open(root + "/fifo") as file:
        file.read()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
raises(KeyboardInterrupt, sh, script)
assert all(ended(int(pid)) for pid in open(root + "/pids").read().split())
store.commit("next", "work")
assert os.listdir(root + "/store/runs") == []
store.prepare("again", "next")
assert store.run("again", ["true"]).status == 0
"""
    output(PRELUDE + code, place, ordinary=who)


def test_what_stays_in_the_background_is_named(who: bool, place: Path) -> None:
    code = """
done = sh("setsid sleep 100 >/dev/null 2>&1 & echo $!")
pid = int(done.stdout)
for error in (
    raises(onlap.Busy, store.commit, "next", "work"),
    raises(onlap.Busy, sh, "true"),
    raises(onlap.Busy, store.remove, "work"),
):
    assert f"pid {pid} (" in str(error), error
store.collect()  # leaves its mount point in place: otherwise nothing would show the mount any more
raises(onlap.Busy, store.commit, "next", "work")
fd = os.pidfd_open(pid)
os.kill(pid, signal.SIGKILL)
select.select([fd], [], [])
store.commit("next", "work")
store.cleanup()
assert os.listdir(root + "/store/runs") == []
"""
    output(PRELUDE + code, place, ordinary=who)


def test_two_programs_in_one_tree(who: bool, place: Path) -> None:
    """One overlay: what one writes, the other reads; and the lock ends with the last."""
    code = """
os.mkfifo(root + "/fifo")
script = f"echo 1 > shared; echo > {root}/fifo; read x < {root}/fifo; cat second > {root}/seen"
first = threading.Thread(target=sh, args=(script,))
first.start()
open(root + "/fifo").read()
assert sh("cat shared; echo 2 > second").stdout == b"1\\n"
assert "mounted read-write" in str(raises(onlap.Busy, store.commit, "next", "work"))
open(root + "/fifo", "w").write("x\\n")
first.join()
assert open(root + "/seen").read() == "2\\n"
store.commit("next", "work")
"""
    output(PRELUDE + code, place, ordinary=who)


def test_what_writes_without_end_in_the_background(who: bool, place: Path) -> None:
    code = """
# What tee(1) gives to head(1) it has written to the stream before; with -p it goes on when head has ended.
done = sh("mkfifo p; (echo first; yes | tee -p p) & head -c 100000 p >/dev/null")
assert done.status == 0 and done.stdout.startswith(b"first\\n" + b"y\\n" * 50000), (done.status, done.stdout[:100])
assert set(done.stdout[6:]) == set(b"y\\n")
"""
    output(PRELUDE + code, place, ordinary=who)


def test_wrong_arguments(who: bool, place: Path) -> None:
    code = """
for name in ("", "A=B"):
    assert "has the name" in str(raises(onlap.InvalidArgument, sh, "true", env={name: "x"}))
assert "empty" in str(raises(onlap.InvalidArgument, store.run, "work", [""]))
assert "too long" in str(raises(onlap.InvalidArgument, sh, "true", env={"A": "x" * 3_000_000}))
assert sh("true", timeout=float("inf")).status == 0
assert sh("true", timeout=1e30).status == 0
"""
    output(PRELUDE + code, place, ordinary=who)


def test_many_threads(who: bool, place: Path) -> None:
    code = """
failed = []
def body(number):
    try:
        key = f"k{number}"
        store.prepare(key, "base")
        for _ in range(3):
            with store.mounted(key, detached=True) as tree:
                open(tree / "n", "w").write(key)
            assert store.run(key, ["cat", "n"], capture=True).stdout == key.encode()
            assert sh("cat f").stdout == b"content"
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=body, args=(number,)) for number in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
assert len({thread for thread in os.listdir(f"/proc/{store.snapshotter.helper.client.pid}/task")}) == 1
assert len([pid for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()]) == 1
before = set(os.listdir("/proc/self/fd"))
sh("true")
assert set(os.listdir("/proc/self/fd")) == before
store.close()
assert open(f"/proc/self/task/{os.getpid()}/children").read() == ""
"""
    output(PRELUDE + code, place, ordinary=who)


def test_a_killed_helper(who: bool, place: Path) -> None:
    """What ran ends with it, and the next need starts another."""
    code = """
os.mkfifo(root + "/fifo")
def kill():
    with open(root + "/fifo") as file:
        file.read()
    os.kill(store.snapshotter.helper.client.pid, signal.SIGKILL)
sh("true")
threading.Thread(target=kill).start()
script = f"sleep 100 & echo $! > {root}/pids; setsid sleep 100 & echo $! >> {root}/pids; echo > {root}/fifo; wait"
raises(onlap.Unavailable, sh, script)
assert all(ended(int(pid)) for pid in open(root + "/pids").read().split())
assert sh("cat f").stdout == b"content"
def kill_helper():
    pid = store.snapshotter.helper.client.pid
    if pid is not None:  # root mounts without one
        os.kill(pid, signal.SIGKILL)
        assert ended(pid)
kill_helper()
with store.mounted("work", detached=True) as tree:
    assert (tree / "f").read_text() == "content"
kill_helper()
assert sh("cat f").stdout == b"content"
store.commit("next", "work")
"""
    output(PRELUDE + code, place, ordinary=who)


def test_a_stopped_helper(who: bool, place: Path) -> None:
    """A program may stop its parent: a timeout ends it all the same, and nothing outlives a caller that is killed."""
    code = """
assert sh("kill -STOP $PPID; sleep 100", timeout=0.1).timed_out
assert sh("cat f").stdout == b"content"
os.kill(store.snapshotter.helper.client.pid, signal.SIGSTOP)
assert sh("cat f").stdout == b"content"
os.kill(store.snapshotter.helper.client.pid, signal.SIGSTOP)
store.close()
os.mkfifo(root + "/fifo")
child = '''
import onlap, sys
root = sys.argv[1]
with onlap.open(root + "/store") as store:
    store.run("work", ["sh", "-c", f"kill -STOP $PPID; sleep 100 & echo $! > {root}/fifo; wait"])
'''
caller = subprocess.Popen([sys.executable, "-c", child, root])
pid = int(open(root + "/fifo").read())
caller.kill()
assert ended(pid)
"""
    output(PRELUDE + code, place, ordinary=who)


def test_a_killed_caller(who: bool, place: Path) -> None:
    code = """
print(os.getpid(), flush=True)
store.run("work", ["sh", "-c", "sleep 100 & echo $! $$ $PPID; wait"])
"""
    with python(PRELUDE + code, place, ordinary=who) as child:
        assert child.stdout is not None
        child.stdout.readline()
        inside = [os.pidfd_open(int(pid)) for pid in child.stdout.readline().split()]
        child.kill()
        child.wait()
        for fd in inside:
            assert select.select([fd], [], [], 20)[0]
            os.close(fd)
    output(PRELUDE + 'assert sh("cat f").stdout == b"content"\nstore.commit("next", "work")', place, ordinary=who)


def test_a_forked_child_has_its_own(who: bool, place: Path) -> None:
    """It may use the store, and its end ends nothing of its parent's."""
    code = """
os.mkfifo(root + "/fifo")
running = threading.Thread(target=lambda: print(sh(f"echo > {root}/fifo; read x < {root}/fifo; echo $x").stdout))
running.start()
open(root + "/fifo").read()
pid = os.fork()
if pid == 0:
    os._exit(store.run("base", ["sh", "-c", "exit 5"]).status)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
open(root + "/fifo", "w").write("still\\n")
running.join()
"""
    assert "still" in output(PRELUDE + code, place, ordinary=who)


def test_closing_ends_what_runs(who: bool, place: Path) -> None:
    code = """
os.mkfifo(root + "/fifo")
found = []
def body():
    found.append(raises((onlap.OnlapError, AssertionError), sh, f"echo $$ > {root}/pid; echo > {root}/fifo; sleep 100"))
thread = threading.Thread(target=body)
thread.start()
open(root + "/fifo").read()
store.close()
assert ended(int(open(root + "/pid").read()))
thread.join()
"""
    output(PRELUDE + code, place, ordinary=who)


CHROOT = """
with store.mounted("work") as tree:
    make_tree(tree)
    for name in ("proc", "dev", "sub"):
        (tree / name).mkdir()
def inside(script, **options):
    return store.run("work", ["sh", "-c", script], capture=True, chroot=True, env={"PATH": "/bin"}, **options)
"""


def test_chroot(who: bool, place: Path) -> None:
    code = """
done = inside("echo $PWD $$; ls -1 /dev; echo /proc/[0-9]*; echo x > /dev/null; cat /f; exit 9")
assert done.status == 9, done
lines = done.stdout.split(b"\\n")
assert lines[0] == b"/ 2" and b"/proc/1 /proc/2" in done.stdout and b"urandom" in lines, lines
assert lines[-1] == b"content"
# Nothing of the machine is left in the namespace.
points = [line.split()[4] for line in inside("cat /proc/self/mountinfo").stdout.decode().splitlines()]
assert points[0] == "/" and all(point.startswith(("/dev", "/proc")) for point in points[1:]), points
assert inside("echo $PWD", cwd="/sub").stdout == b"/sub\\n"
raises(onlap.InvalidArgument, inside, "true", cwd="f")
assert raises(onlap.NotFound, store.run, "work", ["git"], chroot=True, env={"PATH": "/bin"}).key == "git"
assert inside("kill -TERM $$").status == 143
done = inside("sleep 100 & sleep 100", timeout=0.3)
assert (done.status, done.timed_out) == (137, True)
# What stays in the background ends with the first: it is process 1's.
inside("sleep 100 >/dev/null 2>&1 &")
store.commit("next", "work")
"""
    output(PRELUDE + CHROOT + code, place, ordinary=who)


def test_a_chroot_with_links_for_directories(who: bool, place: Path) -> None:
    """/proc and /dev that lead elsewhere are no mount points."""
    code = """
with store.mounted("work") as tree:
    for name in ("proc", "dev"):
        os.rmdir(tree / name)
        os.symlink("/sub", tree / name)
assert inside("ls /sub; cat /f").stdout == b"content"
"""
    output(PRELUDE + CHROOT + code, place, ordinary=who)


@pytest.mark.needs("userns", "ordinary_user")
def test_the_environment_of_the_caller_stays_outside(ordinary: Path) -> None:
    code = """
os.environ["SECRET"] = "hidden"
done = inside("cat /proc/1/environ; ls /proc/1/fd /proc/1/root; cat /proc/*/environ")
assert b"hidden" not in done.stdout and b"denied" in done.stderr, done
"""
    output(PRELUDE + CHROOT + code, ordinary, ordinary=True)
