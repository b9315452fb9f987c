"""The contract of workspaces, case by case: names, what may not be done, what stands on what, and who else is there."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onlap
from kernel.helpers import mountinfo, python
from onlap import errors
from onlap.mounts.unmount import attempts
from onlap.store import Store
from onlap.workspaces.history import chains, durability
from onlap.workspaces.records import OWNER
from onlap.workspaces.workspace import Workspace
from syscall_sweep.children import descriptors

pytestmark = pytest.mark.needs("overlay", "mount")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    (root / "source").mkdir()
    (root / "source" / "file").write_text("captured")
    with onlap.open(root / "root", sync="none") as store:
        with store.build("base") as tree:
            (tree / "file").write_text("base")
        yield store


def write(ws: Workspace, text: str, name: str = "file") -> None:
    with ws.mounted() as tree:
        (tree / name).write_text(text)


def read(ws: Workspace, name: str = "file") -> str:
    with ws.mounted() as tree:
        return (tree / name).read_text()


def command(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onlap", "--root", str(store.root), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )


def of_workspaces(store: Store) -> list[str]:
    return sorted(record.name for record in store.snapshotter.catalog.walk(OWNER))


# Names


def test_names(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    with pytest.raises(errors.AlreadyExists, match="workspace w"):
        store.workspaces.create("w", "base")
    with pytest.raises(errors.NotFound, match="no workspace other"):
        store.workspaces["other"]
    with pytest.raises(errors.NotFound):
        store.workspaces.create("x", "nothing")
    wrong: tuple[Any, ...] = ("", " a", "a\n", "x" * 201, 3, b"w")
    for name in wrong:
        with pytest.raises(errors.InvalidArgument):
            store.workspaces.create(name, "base")
    source: Any = b"base"
    with pytest.raises(errors.InvalidArgument):
        store.workspaces.create("x", source)
    write(ws, "one")
    ws.checkpoint("green")
    write(ws, "two")
    for taken in ("green",):
        with pytest.raises(errors.AlreadyExists, match="checkpoint green"):
            ws.checkpoint(taken)
    with pytest.raises(errors.NotFound, match="no checkpoint red"):
        ws.rollback("red")
    assert list(store.workspaces) == ["w"]
    assert read(ws) == "two"


def test_a_name_that_is_used_again_is_another_workspace(store: Store) -> None:
    old = store.workspaces.create("w", "base")
    write(old, "of the old one")
    kept = old.checkpoint("green")
    fork = old.fork("fork")
    old.remove()
    new = store.workspaces.create("w", "base")
    assert [checkpoint.id for checkpoint in new.log()] == ["base"]
    with pytest.raises(errors.NotFound):
        new.rollback("green")
    write(new, "of the new one")
    assert new.checkpoint("green") != kept
    assert new.keep() == 0
    new.remove()
    assert fork.rollback(kept) == kept
    assert read(fork) == "of the old one"


def test_equal_and_free_checkpoints(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    base = ws.checkpoint("begin")
    assert (base, base.names, base.id) == (ws.at, ("begin",), "base")
    write(ws, "one")
    one = ws.checkpoint()
    before = of_workspaces(store)
    assert ws.checkpoint("again") == one == ws.checkpoint(durable=True)
    assert hash(ws.checkpoint()) == hash(one)
    assert of_workspaces(store) == before
    assert ws.at.names == ("again",)
    assert ws.at.durable
    fork = ws.fork("fork", at="begin")
    assert fork.at == base
    assert fork.at.names == ()


# What may not be done


@pytest.mark.parametrize("holder", ["file", "cwd", "mapped", "mount"])
def test_a_tree_in_use_is_not_replaced(store: Store, holder: str, tmp_path: Path) -> None:
    code = {
        "file": "f = open(path + '/file')",
        "cwd": "os.chdir(path)",
        "mapped": "f = open(path + '/file'); m = mmap.mmap(f.fileno(), 1, prot=1); f.close()",
        "mount": "pass",
    }[holder]
    ws = store.workspaces.create("w", "base")
    with ws.mounted() as tree:
        (tree / "file").write_text("in use")
        other = store.workspaces["w"] if holder == "mount" else ws
        code = f"import mmap, os, sys; path = sys.argv[1]; {code}; os.write(1, b'x'); sys.stdin.read()"
        with python(code, tree) as child:
            assert child.stdout is not None
            assert child.stdin is not None
            assert child.stdout.read(1) == b"x"
            for act in (other.checkpoint, other.rollback):
                with pytest.raises(errors.Busy) as caught:
                    act()
                found = caught.value.holders
                assert any(f"pid {child.pid} " in line for line in found) or (holder == "mount" and str(tree) in found)
            assert (tree / "file").read_text() == "in use"
            child.stdin.close()
            if holder != "mount":
                assert ws.checkpoint(wait=30).names == ()
                assert (tree / "file").read_text() == "in use"


def test_errors_speak_of_workspaces(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    with pytest.raises(errors.FailedPrecondition, match="workspace w is based on it"):
        store.remove("base")
    with ws.mounted() as tree:
        (tree / "new").write_text("")
        with pytest.raises(errors.Busy, match=r"^workspace w is mounted") as caught:
            ws.remove()
        assert caught.value.key == "w"
        assert "--force" not in str(caught.value)


def test_a_checkpoint_that_another_workspace_stands_on_stays(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    write(ws, "one")
    one = ws.checkpoint()
    fork = ws.fork("fork")
    write(ws, "two")
    ws.checkpoint()
    with pytest.raises(errors.FailedPrecondition, match="workspace fork stands on"):
        ws.forget(one)
    assert ws.keep(last=0) == 0
    assert fork.at == one == fork.checkpoint()
    fork.remove()
    assert ws.keep(last=0) == 1
    assert read(ws) == "two"


def test_what_is_kept_is_a_number_of_checkpoints_or_an_age(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    for text in ("one", "two"):
        write(ws, text)
        ws.checkpoint()
    for wrong in ({"last": -1}, {"newer_than": -1.0}):
        with pytest.raises(errors.InvalidArgument):
            ws.keep(**wrong)
    assert ws.keep(newer_than=float("inf")) == 0
    assert ws.keep(last=1) == 1


def test_others_leave_workspaces_alone(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    write(ws, "one")
    ws.checkpoint("green")
    for name in of_workspaces(store):
        assert command(store, "rm", name).returncode == 3
    refused = command(store, "serve", "containerd", "--owner", OWNER, "--socket", f"{store.root}/socket")
    assert refused.returncode == 2
    assert "choose another owner" in refused.stderr
    store.cleanup()
    assert store.check(deep=True, repair=True).findings == ()
    assert ws.rollback("green").names == ("green",)
    assert read(ws) == "one"


# The end


def test_what_a_fork_needs_outlives_its_origin(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    for text in ("one", "two"):
        write(ws, text)
        ws.checkpoint(text)
    fork = ws.fork("fork", at="one")
    ws.remove()
    assert len(of_workspaces(store)) == 2
    assert [checkpoint.id for checkpoint in fork.log()] == ["base", fork.at.id]
    assert read(fork) == "one"
    fork.remove()
    assert of_workspaces(store) == []


def test_unnamed_workspaces_end_with_their_block_and_named_forks_do_not(store: Store) -> None:
    with store.workspaces.create(None, "base") as ws:
        write(ws, "one")
        ws.checkpoint()
        ws.fork("stays")
        ws.fork()
    store.cleanup()
    assert list(store.workspaces) == ["stays"]
    assert read(store.workspaces["stays"]) == "one"


def test_what_a_killed_program_left_is_collected(store: Store) -> None:
    code = (
        "import os, signal, sys, onlap\n"
        "with onlap.open(sys.argv[1]) as store:\n"
        "    ws = store.workspaces.create(None, 'base')\n"
        "    with ws.mounted() as tree:\n"
        "        (tree / 'file').write_text('x')\n"
        "        ws.checkpoint()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with python(code, store.root) as child:
        assert child.wait() == -9
    assert len(store.workspaces) == 1
    store.cleanup()
    assert len(store.workspaces) == 0
    assert of_workspaces(store) == []
    assert str(store.root).encode() not in mountinfo()


# What keeps them


def test_a_backup_and_a_rebuilt_catalog_keep_them(store: Store, root: Path) -> None:
    ws = store.workspaces.create("w", root / "source")
    for text in ("one", "two", "three"):
        write(ws, text)
        ws.checkpoint(text, durable=True)
    store.backup(root / "backup.tar", active=True)
    log = [checkpoint.names for checkpoint in ws.log()]

    def check(where: Path) -> None:
        with onlap.open(where, sync="none") as again:
            found = again.workspaces["w"]
            assert [checkpoint.names for checkpoint in found.log()] == log
            for text in ("one", "three", "two"):
                assert found.rollback(text).names == (text,)
                assert read(found) == text
            assert [change.path for change in found.diff("base", "one")] == ["file"]
            found.fork("fork", at="one").remove()
            again.cleanup()
            assert again.check(deep=True).findings == ()

    onlap.restore(root / "backup.tar", root / "restored")
    check(root / "restored")
    store.close()
    (root / "root" / "catalog.db").write_bytes(b"not a database" * 100)
    done = subprocess.run(
        [sys.executable, "-m", "onlap", "--root", str(root / "root"), "check", "--deep", "--repair"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    check(root / "root")


def test_what_is_in_a_backup_is_durable(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the root that it is of had not yet written it to the disk, and the next machine has another boot."""
    monkeypatch.setattr(durability.Durability, "begin", lambda _: None)
    ws = store.workspaces.create("w", "base")
    write(ws, "one")
    assert not ws.checkpoint().durable
    store.backup(root / "backup.tar", active=True)
    onlap.restore(root / "backup.tar", root / "restored")
    for module in (durability, chains):
        monkeypatch.setattr(module, "boot_id", lambda: "of another machine")
    with onlap.open(root / "restored", sync="none") as again:
        assert again.workspaces["w"].at.durable
        assert read(again.workspaces["w"]) == "one"


# Several at once


def test_threads_and_processes_on_one_workspace(store: Store) -> None:
    ws = store.workspaces.create("w", "base")
    code = (
        "import sys, onlap\n"
        "from onlap import errors\n"
        "with onlap.open(sys.argv[1], sync='none') as store:\n"
        "    ws = store.workspaces['w']\n"
        "    for number in range(8):\n"
        "        try:\n"
        "            ws.checkpoint()\n"
        "            ws.fork(at='base').remove()\n"
        "        except errors.Busy:\n"
        "            pass\n"
        "print('done')\n"
    )
    failures: list[BaseException] = []
    named: list[str] = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                try:
                    named.append(ws.checkpoint(f"{turn}", wait=20).id)
                except errors.AlreadyExists:
                    pass
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    with ws.mounted() as tree, python(code, store.root) as child:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (tree / "file").write_text("still there")
        out, err = child.communicate(timeout=50)
        assert out == b"done\n", err
    assert not failures
    names = [name for checkpoint in ws.log() for name in checkpoint.names]
    assert sorted(names) == ["0", "1", "2", "3"]
    assert read(ws) == "still there"


# Without end


def cycle(store: Store, ws: Workspace, count: int) -> None:
    """So many checkpoints, each gone back from."""
    with ws.mounted() as tree:
        for number in range(count):
            (tree / "file").write_text(str(number))
            ws.checkpoint()
            ws.rollback("base")
            if number % 100 == 99:
                ws.keep()
    ws.keep()
    store.workspaces.collect()
    store.workspaces.close()
    store.cleanup()
    gc.collect()


def left(store: Store) -> Counter[str]:
    """What there is of a root: directories, descriptors, mounts, snapshots."""
    found = Counter({name: len(os.listdir(store.root / name)) for name in ("snapshots", "staging", "trash", "runs")})
    # The catalog keeps some connections, for whoever reads at the same time.
    found.update(link for link in descriptors().values() if str(store.root) in link and "/catalog.db" not in link)
    found["mounts"] = mountinfo().count(b"\n")
    found.update(of_workspaces(store))
    return found


@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_cycles_leave_nothing(store: Store, count: int) -> None:
    ws = store.workspaces.create("w", "base")
    cycle(store, ws, 20)
    first = left(store)
    cycle(store, ws, count)
    for last in attempts(20):  # the background may still have a file open
        more = left(store) - first
        if not more or last:
            break
    assert not more


def test_the_depth_of_a_mount_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_BASE", 2)
    ws = store.workspaces.create("w", "base")
    snapshotter = store.snapshotter.for_owner(OWNER)
    names = []
    for number in range(130):
        record = snapshotter.record("top/w")
        Path(snapshotter.catalog.layout.tree(record.id), str(number)).write_text("")
        ws.checkpoint()
        # One layer for each digit of the number of checkpoints that is not 0; the base and the top.
        depth = len(snapshotter.ancestors(snapshotter.record("top/w"))) + 1
        assert depth == 2 + (number + 1).bit_count()
        names.append(str(number))
    with ws.mounted() as tree:
        assert sorted(os.listdir(tree)) == sorted([*names, "file"])
