"""After a COMMIT nothing fails the call; what cannot be closed or forked is told and keeps nobody waiting."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from onlap import errors, locks
from onlap.catalog import helper
from onlap.errors import from_oserror
from onlap.layers.stream.digests import digest_of
from onlap.store import Store

PATIENCE = 30.0


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root, snapshotter="overlay", sync="none", timeout=5) as store:
        yield store


def run(program: str, root: Path) -> str:
    """A program in a process of its own, since a defect here is one that hangs."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_that_gets_no_thread_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helper, "start_new_thread", refused)
    with onlap.open(root, snapshotter="overlay") as store:
        Path(store.prepare("key")[0].source, "file").touch()
        store.commit("name", "key")
        assert "name" in store
        store.remove("name")
        assert "name" not in store
    monkeypatch.undo()
    with onlap.open(root) as store:
        assert list(store.walk()) == []


def test_without_a_thread_a_taken_lock_is_unavailable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with onlap.open(root, snapshotter="overlay", sync="none") as other:
        inside, go = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            inside.set()
            assert go.wait(PATIENCE)

        holder = threading.Thread(target=other.snapshotter.catalog.database.write, args=(hold,))
        holder.start()
        assert inside.wait(PATIENCE)
        monkeypatch.setattr(helper, "start_new_thread", refused)
        with onlap.open(root, sync="none", timeout=5) as store:
            with pytest.raises(errors.Unavailable, match=r"catalog\.lock"):
                store.prepare("key")
            go.set()
            holder.join()
            store.prepare("key")


@pytest.mark.parametrize("when", ["taken", "given back"])
def test_a_lock_that_fails(store: Store, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """ENOLCK: before the COMMIT nothing is done, after it all is."""
    flock = fcntl.flock

    def fails(fd: int, operation: int) -> None:
        if bool(operation & fcntl.LOCK_UN) == (when == "given back"):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(fd, operation)

    store.prepare("before")
    monkeypatch.setattr(locks.fcntl, "flock", fails)  # type: ignore[attr-defined]
    if when == "taken":
        with pytest.raises(errors.Unavailable):
            store.label("before", {"a": "b"})
    else:
        store.label("before", {"a": "b"})
    monkeypatch.undo()
    assert store.stat("before").labels == ({} if when == "taken" else {"a": "b"})
    with onlap.open(store.root, sync="none", timeout=5) as other:
        other.prepare("after")


def test_a_tree_that_cannot_be_thrown_away_is_removed_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.prepare("key")

    def fails(_: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store.snapshotter.catalog.trash, "put", fails)
    store.remove("key")
    monkeypatch.undo()
    assert "key" not in store
    assert store.snapshotter.catalog.garbage.cleanup() == 1


def test_a_warning_that_cannot_be_given_fails_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors even the module that logs cannot be loaded."""
    store.prepare("key")

    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(store.snapshotter.catalog.trash, "put", fails)
    monkeypatch.setitem(sys.modules, "logging", None)
    store.remove("key")
    assert "key" not in store
    monkeypatch.setattr(locks.os, "pwrite", fails)  # type: ignore[attr-defined]
    store.prepare("key")
    store.prepare("other")
    assert "key" in store


def test_a_commit_that_cannot_be_counted_is_done(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "pwrite", fails)  # type: ignore[attr-defined]
    store.prepare("key")
    monkeypatch.undo()
    assert "key" in store


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EAGAIN, errno.EDEADLK])
def test_what_a_lock_says_may_be_otherwise_later(number: int) -> None:
    assert isinstance(from_oserror(OSError(number, "no"), doing="lock"), errors.Unavailable)


@pytest.mark.parametrize("number", [errno.EUCLEAN, errno.EBADMSG])
def test_a_damaged_filesystem_is_no_defect_of_ours(number: int) -> None:
    assert isinstance(from_oserror(OSError(number, "no"), doing="look"), errors.DataLoss)


def test_a_root_that_is_deleted_before_the_close(root: Path) -> None:
    program = """
import shutil, sys
import onlap
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none")
store.prepare("key")
shutil.rmtree(sys.argv[1])
other = onlap.open(sys.argv[1] + "-2", snapshotter="overlay")  # and one that is never closed
other.prepare("key")
shutil.rmtree(sys.argv[1] + "-2")
store.close()
print("closed")
"""
    assert run(program, root) == "closed\n"


def test_a_fork_without_descriptors(root: Path) -> None:
    program = """
import os, resource, sys
import onlap
from onlap import errors
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none", timeout=5)
store.prepare("before")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
pid = os.fork()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
store.prepare("child" if not pid else "parent")
if not pid:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(sorted(info.name for info in store.walk()))
store.close()
"""
    assert run(program, root) == "['before', 'child', 'parent']\n"


def test_a_fork_of_a_deleted_root(root: Path) -> None:
    program = """
import os, shutil, sys
import onlap
from onlap import errors
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none", timeout=5)
store.prepare("before")
shutil.rmtree(sys.argv[1])
pid = os.fork()
for attempt in range(2):
    try:
        store.prepare("after")
    except errors.OnlapError as error:
        pass
if not pid:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
store.close()
print("closed")
"""
    assert run(program, root) == "closed\n"


def test_a_fork_that_is_interrupted_leaves_the_store_as_it_was(root: Path) -> None:
    program = """
import os, signal, sys, threading, time
import onlap
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none", timeout=5)
database = store.snapshotter.catalog.database
inside, go = threading.Event(), threading.Event()
def hold(connection):
    inside.set()
    go.wait()
holder = threading.Thread(target=database.write, args=(hold,))
holder.start()
inside.wait()
from onlap.catalog.db.writer import forks
def interrupt():
    while not forks.lock.locked():
        time.sleep(0.001)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    go.set()
threading.Thread(target=interrupt).start()
try:
    pid = os.fork()
except KeyboardInterrupt:
    pid = None
if pid == 0:
    os._exit(0)
if pid:
    os.waitpid(pid, 0)
holder.join()
store.prepare("after")
store.close()
print("closed")
"""
    assert run(program, root) == "closed\n"


def test_a_program_that_cannot_take_the_lock_can_end(root: Path) -> None:
    program = """
import fcntl, os, sys
import onlap
store = onlap.open(sys.argv[1], snapshotter="overlay", sync="none", timeout=0.2)
assert "key" not in store
fd = os.open(sys.argv[1] + "/catalog.lock", os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
store.close()
print("closed")
"""
    assert run(program, root) == "closed\n"
    shutil.rmtree(root)


def test_a_prepare_looks_nothing_up_when_the_snapshot_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.prepare("one")
    store.commit("base", "one")
    with onlap.open(store.root, sync="none") as fresh:  # which knows no chain yet
        catalog = fresh.snapshotter.catalog
        create = catalog.create

        def then_blind(*arguments: object) -> object:
            record = create(*arguments)  # type: ignore[arg-type]

            def fails(_: object) -> None:
                raise errors.DataLoss("the catalog cannot be read")

            monkeypatch.setattr(catalog.database, "read", fails)
            return record

        monkeypatch.setattr(catalog, "create", then_blind)
        assert fresh.prepare("key", "base")
        monkeypatch.undo()


def test_a_blob_that_could_not_be_synced_is_fetched_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry of the fsync would succeed: the pages that were lost count as clean."""
    digest = digest_of(b"content")
    fsync = os.fsync

    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with store.content.partial(digest, 7) as partial:
        partial.write(b"content")
        with pytest.raises(OSError, match="Input/output"):
            partial.commit()
    monkeypatch.setattr(os, "fsync", fsync)
    with store.content.partial(digest, 7) as partial:
        assert partial.offset == 0
        partial.write(b"content")
        partial.commit()
    assert store.content.read(digest, 100) == b"content"
