"""backup and restore that are killed, interrupted, or meet a full disk: all of it, or nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import onlap
from kernel.helpers import python
from onlap import errors
from onlap.catalog import pins
from onlap.catalog.disk.layout import Layout

# What ends it

_BACK_UP = "import onlap, sys; s = onlap.open(sys.argv[1]); print(flush=True); s.backup(sys.argv[2])"


_RESTORE = "import onlap, sys; print(flush=True); onlap.restore(sys.argv[2], sys.argv[1])"


def big(root: Path, size: int = 4 << 20) -> Path:
    """A root whose backup takes a moment."""
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            for number in range(300):
                (top / str(number)).write_bytes(os.urandom(100) * 50)
            (top / "large").write_bytes(os.urandom(size))
        store.cleanup(manifests=True)
    return root / "root"


def ended(code: str, *arguments: Path, number: int, after: float) -> None:
    """Run Python, and send it a signal so many seconds after it says that it begins."""
    with python(code, *arguments) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_backup_that_is_ended(root: Path, number: int) -> None:
    made = big(root)
    archive = root / "out" / "backup.tar"
    archive.parent.mkdir()
    rng = random.Random(number)
    for _ in range(3):
        ended(_BACK_UP, made, archive, number=number, after=rng.uniform(0, 0.2))
        if archive.exists():
            onlap.restore(archive, root / "again")
            subprocess.run(["rm", "-r", root / "again", archive], check=True)
        with onlap.open(made) as store:
            store.cleanup()
            assert store.snapshotter.catalog.database.read(pins.valid) == []
            assert store.check().findings == ()
        assert list(archive.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("existing", [False, True])
def test_a_restore_that_is_ended(root: Path, number: int, existing: bool) -> None:
    made = big(root)
    with onlap.open(made) as store:
        store.backup(root / "backup.tar")
    again = root / "again"
    rng = random.Random(number)
    for _ in range(3):
        if existing:
            again.mkdir(exist_ok=True)
        ended(_RESTORE, again, root / "backup.tar", number=number, after=rng.uniform(0, 0.4))
        if not (again / "catalog.db").exists():
            assert number == signal.SIGKILL or existing == again.exists()
            if (again / "restore.partial").exists():
                with pytest.raises(errors.FailedPrecondition, match="being restored"):
                    onlap.open(again)
            onlap.restore(root / "backup.tar", again)
        with onlap.open(again) as store:
            store.cleanup()
            assert store.check(deep=True).findings == ()
        assert not (again / "restore.partial").exists()
        subprocess.run(["rm", "-r", again], check=True)


_DIE = """
import os, signal, sys, onlap
rename, left = os.rename, int(sys.argv[3])
def deadly(one, other, **more):
    global left
    if ".partial" in str(one):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return rename(one, other, **more)
os.rename = deadly
onlap.restore(sys.argv[2], sys.argv[1])
"""


def test_a_kill_between_any_two_renames(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="native", sync="none") as store:
        with store.build("base") as top:
            (top / "f").write_text("x")
        store.backup(root / "backup.tar")
    again = root / "again"
    for count in range(40):
        with python(_DIE, again, root / "backup.tar", str(count)) as process:
            pass
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert not (again / "catalog.db").exists()
        with pytest.raises(errors.FailedPrecondition, match="being restored"):
            onlap.open(again, create=False)
    assert 8 < count < 39
    with onlap.open(again) as store:
        assert store.check(deep=True).findings == ()
    assert not (again / "restore.partial").exists()


def test_where_a_restore_was_killed_at_its_end(root: Path) -> None:
    with onlap.open(root / "root", snapshotter="native") as store:
        Path(Layout(store.root).partial).mkdir()
        store.cleanup()
        assert not Path(Layout(store.root).partial).exists()


@pytest.mark.needs("loop")
def test_a_full_disk(root: Path, loop_ext4: Callable[[int], Path]) -> None:
    small = loop_ext4(16)
    made = big(root, size=20 << 20)
    with onlap.open(made) as store:
        with pytest.raises(errors.ResourceExhausted):
            store.backup(small / "backup.tar")
        assert sorted(os.listdir(small)) == ["lost+found"]
        assert store.snapshotter.catalog.database.read(pins.valid) == []
        store.backup(root / "backup.tar")
    with pytest.raises(errors.ResourceExhausted):
        onlap.restore(root / "backup.tar", small)
    assert sorted(os.listdir(small)) == ["lost+found"]
    with onlap.open(root / "less", snapshotter="native") as store:
        store.prepare("x")
        store.commit("y", "x")
        store.backup(root / "less.tar")
    onlap.restore(root / "less.tar", small)  # a mount point
    with onlap.open(small) as store:
        assert store.check().findings == ()
