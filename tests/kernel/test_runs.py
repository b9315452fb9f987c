"""What a program uses for a time goes with it: when it is killed, when a forked child leaves, when the end fails."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.helpers import SOURCE, mountinfo, output
from onlap import errors
from onlap.catalog.db.database import Database
from onlap.mounts import temporary
from onlap.mounts.unmount import unmount
from onlap.store import Store
from onlap.trees import atomic
from onlap.trees.copy import Copier

pytestmark = [pytest.mark.needs("overlay", "mount")]

ONLAP = [sys.executable, "-m", "onlap"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE}


@pytest.fixture(params=["overlay", "native"])
def store(root: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    with onlap.open(root / "onlap", snapshotter=request.param) as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        yield store


# Each line blocks in the middle of something, after it printed a line.
_BLOCKS = {
    "scratch": "with store.scratch('base') as tree: wait(tree)",
    "scratch of nothing": "with store.scratch() as tree: wait(tree)",
    "build": "with store.build('made', 'base') as tree: wait(tree)",
    "mounted": "with store.mounted('base') as tree: wait(tree)",
    "mounted at": "with store.mounted('base', at) as tree: wait(tree)",
    "mounted active at": "with store.mounted('work', at) as tree: wait(tree)",
    "a plan": "with onlap.mounted(store.mounts('work')) as tree: wait(tree)",
    "a plan at": "with onlap.mounted(store.mounts('work'), at) as tree: wait(tree)",
    "detached": "with store.mounted('base', detached=True) as tree: wait(tree)",
    "import": "store.import_(source, 'made', progress=wait)",
    "export": "store.export('base', out, progress=wait)",
    "image export": "store.images.export('x:1', out, progress=wait)",
    "image import": "store.images.import_(source, name='x:1', progress=wait)",
}
_CHILD = """
import signal, sys, onlap
root, at, source, out = sys.argv[1:5]
def wait(_): print("there", flush=True); signal.pause()
with onlap.open(root) as store:
    {block}
"""


@pytest.mark.parametrize(
    "store, block",
    [("overlay", block) for block in _BLOCKS] + [("native", block) for block in ("scratch", "mounted at", "a plan")],
    indirect=["store"],
)
def test_nothing_is_left_of_a_killed_program(store: Store, root: Path, block: str) -> None:
    for name in ("at", "source"):
        (root / name).mkdir()
    (root / "source" / "file").write_text("content")
    store.prepare("work", "base")
    temporary = root / "temporary"
    temporary.mkdir()
    store.images.import_(root / "source", name="x:1")
    before, names, there = mountinfo(), {info.name for info in store.walk()}, sorted(os.listdir(root))
    code = _CHILD.format(block=_BLOCKS[block])
    arguments = [str(store.root), *(str(root / name) for name in ("at", "source", "out"))]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        env={**ENVIRONMENT, "TMPDIR": str(temporary)},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        store.cleanup()
        assert {info.name for info in store.walk()} >= names
        assert child.poll() is None
        child.kill()
    store.cleanup()
    assert mountinfo() == before
    assert {info.name for info in store.walk()} == names
    assert os.listdir(store.root / "runs") == []
    assert os.listdir(temporary) == []
    assert sorted(os.listdir(root)) == there
    store.remove("work")
    store.remove("base")
    store.images.remove("x:1")
    store.cleanup()
    assert os.listdir(store.root / "snapshots") == []


def test_nothing_is_left_of_a_killed_enter(store: Store) -> None:
    before = mountinfo()
    with subprocess.Popen(
        [*ONLAP, "--root", str(store.root), "enter", "base", "--", "sh", "-c", "echo $$; read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as child:
        assert child.stdout is not None
        inside = os.pidfd_open(int(child.stdout.readline()))
        child.kill()
        child.wait()
        select.select([inside], [], [])  # the helper has ended it
        os.close(inside)
    store.cleanup()
    assert mountinfo() == before
    assert [info.name for info in store.walk()] == ["base"]
    assert os.listdir(store.root / "runs") == []


@pytest.mark.parametrize("key", ["base", "work"])
def test_an_interrupt_that_leaves_descriptors_open_leaves_no_mount(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    store.prepare("work", "base")
    with store.mounted("work") as tree:
        (tree / "new").mkdir()
    with store.build("over", "base") as tree:
        (tree / "new").mkdir()
    left: list[int] = []
    directory = Copier._directory

    def interrupted(self: Copier, *args: Any) -> None:
        left.extend(directory(self, *args) or ())
        raise KeyboardInterrupt

    before = mountinfo()
    monkeypatch.setattr(Copier, "_directory", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            store.export("over" if key == "base" else key, root / "out")
        assert left
        assert mountinfo() == before
        assert os.listdir(root) == ["onlap"]
        with store.mounted("work") as tree:
            (tree / "new" / "more").touch()
        store.commit("made", "work")
    finally:
        for fd in left:
            os.close(fd)


def test_an_export_whose_own_end_is_interrupted_leaves_nothing(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "remove_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.export("base", root / "out", progress=interrupted)
    assert os.listdir(root) == ["onlap"]


def test_the_next_run_cleans_up_as_well(store: Store) -> None:
    code = "import onlap, os, sys; onlap.open(sys.argv[1]).scratch('base').__enter__(); os._exit(0)"
    output(code, store.root)
    with onlap.open(store.root) as other, other.scratch():
        assert len([info for info in store.walk() if info.kind == "active"]) == 1


def test_one_failed_sweep_does_not_keep_the_others(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    # A container whose runtime is gone.
    stray = store.root / "runs" / "0"
    (stray / "state" / "onlap-0").mkdir(parents=True)
    (stray / "runtime").write_text("/nonexistent/runc")
    code = "import onlap, os, sys; onlap.open(sys.argv[1]).scratch('base').__enter__(); os._exit(0)"
    output(code, store.root)
    store.cleanup()
    assert os.listdir(store.root / "runs") == ["0"]
    assert "cannot clean up" in caplog.text
    with store.scratch():
        pass
    assert [info.name for info in store.walk()] == ["base"]


_FORKS = """
import os, sys, onlap
with onlap.open(sys.argv[1]) as store:
    store.prepare("work", "base")
    blocks = [
        lambda: store.scratch("base"),
        lambda: store.mounted("base"),
        lambda: store.mounted("base", sys.argv[2]),
        lambda: store.mounted("work"),
        lambda: store.mounted("work", detached=True),
        lambda: store.build("made", "base"),
        lambda: onlap.mounted(store.mounts("work")),
    ]
    for leave in ("raise KeyError", "sys.exit(3)", "pass"):
        for block in blocks:
            parent = os.getpid()
            try:
                with block() as tree:
                    child = os.fork()
                    if child == 0:
                        exec(leave)
                    else:
                        os.waitpid(child, 0)
                        assert (tree / "file").read_text() == "base"
                        assert "made" not in store
                if os.getpid() == parent and "made" in store:
                    store.remove("made")
            finally:
                if os.getpid() != parent:
                    os._exit(0)
    with store.content.lease("test") as lease:
        lease.pin("sha256:" + "0" * 64)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            assert store.snapshotter.catalog.database.read(lambda c: c.execute("SELECT 1 FROM pins").fetchall())
            assert os.path.isdir(lease.run.directory)
    if child == 0:
        os._exit(0)
    child = os.fork()
    if child == 0:
        sys.exit(3)
    os.waitpid(child, 0)
"""


def test_a_forked_child_that_leaves_a_block_changes_nothing(store: Store) -> None:
    at = store.root.parent / "at"
    at.mkdir()
    output(_FORKS, store.root, at)
    assert {info.name for info in store.walk()} == {"base", "work"}
    assert os.listdir(store.root / "runs") == []


def test_a_build_whose_tree_is_in_use_at_the_end_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "unmount", lambda target, timeout: unmount(target, timeout=0))
    children = []

    def build() -> None:
        with store.build("made", "base") as tree:
            (tree / "new").write_text("work of hours")
            children.append(subprocess.Popen(["sleep", "1000"], cwd=tree))

    with pytest.raises(errors.Busy) as caught:
        build()
    (child,) = children
    error = caught.value
    assert str(child.pid) in str(error)
    assert error.key is not None
    assert f"onlap commit made {error.key}" in str(error)
    store.cleanup()
    assert store.stat(error.key).kind == "active"
    child.kill()
    child.wait()
    store.cleanup()
    store.commit("made", error.key)
    with store.mounted("made") as tree:
        assert (tree / "new").read_text() == "work of hours"
    assert os.listdir(store.root / "runs") == []


@pytest.mark.parametrize("full", [False, True])
def test_a_build_whose_commit_fails_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """Also where the catalog takes no word any more that it is to be kept."""

    def build() -> None:
        with store.build("made", "base") as tree:
            (tree / "new").write_text("work of hours")
            if full:
                monkeypatch.setattr(Database, "write", no_room)
            else:
                store.prepare("other")
                store.commit("made", "other")

    def no_room(_database: Database, _operation: object) -> None:
        raise errors.ResourceExhausted("no room")

    with pytest.raises(errors.OnlapError) as caught:
        build()
    monkeypatch.undo()
    key = caught.value.key
    assert key is not None
    store.cleanup()
    assert os.listdir(store.root / "runs") == []
    store.cleanup()
    store.commit("other", key)
    assert [change.path for change in store.diff("other")] == ["new"]


def test_a_build_that_fails_itself_is_dropped(store: Store) -> None:
    with pytest.raises(KeyError), store.build("made", "base"):
        raise KeyError
    assert [info.name for info in store.walk()] == ["base"]
    assert os.listdir(store.root / "runs") == []


def test_builds_beside_threads_that_start_programs(ordinary: Path) -> None:
    """A child between fork and exec has the descriptors of every thread's mount and locks."""
    code = """
import subprocess, sys, threading, onlap
failures = []
with onlap.open(sys.argv[1]) as store:
    def work(number):
        for turn in range(6):
            try:
                with store.build(f"made-{number}-{turn}") as tree:
                    subprocess.run(["true"], check=True)
                    (tree / "x").write_text("x")
                    subprocess.run(["true"], check=True, preexec_fn=lambda: __import__("time").sleep(0.05))
            except onlap.OnlapError as error:
                failures.append(str(error))
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failures, failures
    assert len(list(store.walk())) == 48
"""
    output(code, ordinary / "onlap", ordinary=True)


def test_somebody_elses_root_is_no_place_for_a_new_one(ordinary: Path) -> None:
    with onlap.open(ordinary / "roots", snapshotter="native"):
        pass
    code = """
import sys, onlap
for create in (True, False):
    try:
        onlap.open(sys.argv[1], create=create)
    except (onlap.FailedPrecondition, onlap.PermissionDenied) as error:
        assert "the root" in str(error), error
    else:
        raise AssertionError("it was opened")
"""
    output(code, ordinary / "roots", ordinary=True)


def test_an_ordinary_user_with_as_many_processes_as_he_may_have(ordinary: Path) -> None:
    code = """
import resource, sys, onlap
with onlap.open(sys.argv[1]) as store:
    with store.build("base") as tree:
        (tree / "file").touch()
    store.prepare("work", "base")
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    try:
        with store.mounted("work"):
            pass
    except onlap.ResourceExhausted as error:
        assert "cannot start the helper" in str(error) and "ulimit -u" in str(error), error
    else:
        raise AssertionError("it was mounted without a helper")
    store.commit("made", "work")
"""
    output(code, ordinary / "onlap", ordinary=True)


def test_a_build_of_an_ordinary_user_whose_tree_is_in_use_at_the_end_is_kept(ordinary: Path) -> None:
    """No mountinfo shows his mount, so that nothing but /proc says that somebody could go on writing into the layer."""
    code = """
import subprocess, sys, onlap
from onlap.mounts import unmount
unmount.attempts = lambda _timeout: [True]
with onlap.open(sys.argv[1]) as store:
    with store.build("base") as tree:
        (tree / "file").write_text("base")
    for parent in ("base", None):
        try:
            with store.build("made", parent) as tree:
                (tree / "new").write_text("work of hours")
                child = subprocess.Popen(["sleep", "1000"], cwd=tree)
        except onlap.errors.Busy as error:
            assert any(f"pid {child.pid} (sleep): cwd" in line for line in error.holders), error.holders
            assert f"onlap commit made {error.key}" in str(error)
            key = error.key
        else:
            sys.exit("committed")
        finally:
            child.kill()
            child.wait()
    store.commit("made", key)
    with store.mounted("made") as tree:
        assert (tree / "new").read_text() == "work of hours"
"""
    output(code, ordinary / "onlap", ordinary=True)


def test_a_forked_worker_does_not_keep_an_ordinary_users_tree(ordinary: Path) -> None:
    code = """
import os, sys, onlap
from onlap.mounts import unmount
unmount.attempts = lambda _timeout: [True]
there, here = os.pipe()
read, wrote = os.pipe()
with onlap.open(sys.argv[1]) as store:
    with store.build("base") as tree:
        (tree / "file").write_text("base")
    with store.build("made", "base") as tree:
        if not os.fork():
            os.close(here)
            assert (tree / "file").read_text() == "base"
            os.write(wrote, b"x")
            os.read(there, 1)
            os._exit(0)
        os.close(wrote)
        assert os.read(read, 1)
    store.remove("made")
    os.close(here)
    os.wait()
"""
    output(code, ordinary / "onlap", ordinary=True)


@pytest.mark.parametrize(
    "fork",
    [
        # In a container a program is 1, and so is the child with which it begins a PID namespace.
        "unshare(0x20000000); child = os.fork()",
        # Behind Python's back.
        "child = ctypes.CDLL(None).fork()",
    ],
)
def test_a_child_that_is_hard_to_know_changes_nothing(store: Store, fork: str) -> None:
    code = f"""
import ctypes, os, subprocess, sys, onlap
from onlap.syscalls.namespaces import unshare
with onlap.open(sys.argv[1]) as store, store.scratch("base") as tree:
    scratch = store.scratch("base")
    other = scratch.__enter__()
    {fork}
    if child == 0:
        try:
            scratch.__exit__(None, None, None)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.getpid() == 1
    onlap.open(sys.argv[1]).cleanup()
    assert (other / "file").read_text() == "base"
    scratch.__exit__(None, None, None)
"""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-W", "ignore", "-c", code]
    subprocess.run([*command, str(store.root)], check=True, env=ENVIRONMENT)
    assert os.listdir(store.root / "runs") == []


def test_what_others_do_at_the_place_inside_the_block(store: Store) -> None:
    """Unmounted by the program itself, or moved with the root: it is found. What another mounts above it stays."""
    before = mountinfo()
    with store.scratch("base") as tree:
        unmount(str(tree))
    moved = store.root.with_name("moved")
    with onlap.open(moved) as other:
        with other.build("base"):
            pass
        with other.mounted("base") as tree:
            moved.rename(store.root.with_name("again"))
    assert mountinfo() == before
    with pytest.raises(errors.Busy, match="on top of it"), store.scratch("base") as tree:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree], check=True)
    assert os.path.ismount(tree)
    unmount(str(tree))
    store.cleanup()
    assert mountinfo() == before


def test_a_mount_elsewhere_that_could_not_be_ended_is_left_to_the_next_cleanup(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = store.root.with_name("at")
    at.mkdir()
    before = mountinfo()
    monkeypatch.setattr(temporary, "unmount", lambda target, timeout: unmount(target, timeout=0))
    with contextlib.ExitStack() as stack:
        with pytest.raises(errors.Busy), store.mounted("base", at):
            stack.enter_context(open(at / "file"))
        store.cleanup()
        assert mountinfo() != before
    store.cleanup()
    assert mountinfo() == before


def test_a_mount_point_that_is_a_symlink(store: Store) -> None:
    at, link = (store.root.with_name(name) for name in ("at", "link"))
    at.mkdir()
    link.symlink_to(at)
    before = mountinfo()
    with store.mounted("base", link) as tree:
        assert tree == link
        link.unlink()
        assert (at / "file").read_text() == "base"
    assert mountinfo() == before
