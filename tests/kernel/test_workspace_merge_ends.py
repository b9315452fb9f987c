"""A merge that ends early: killed, interrupted or with an error at every place; all of it is done then, or nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from faults import FAULTS, Fault, Injection, spread
from interrupts import Interrupter
from kernel.merges import KILL, Scene, copy, count, in_a_child, is_a_system_call, places, scene, unlike
from onlap import errors
from onlap.testing import Tree, read_tree
from onlap.testing.same import Listing
from onlap.workspaces.merge.undo import recover

__all__ = ["scene"]

pytestmark = [
    pytest.mark.needs("overlay", "mount"),
    pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came with Python 3.12"),
]


def kill_at(scene: Scene, numbers: list[int]) -> dict[str, int]:
    found = {"all": 0, "nothing": 0}
    for number in numbers:
        scene.restore()
        assert in_a_child(scene.workspace.merge, KILL, number) == -signal.SIGKILL
        recover(str(scene.workspace.target))
        found[scene.outcome()] += 1
    return found


def test_killed_at_system_calls(scene: Scene) -> None:
    total = places(scene)
    found = kill_at(scene, sorted({*spread(total, 25), *range(total - 8, total + 1)}))
    assert found["all"] >= 2
    assert found["nothing"] >= 15


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_at_every_system_call(scene: Scene) -> None:
    kill_at(scene, list(range(1, places(scene) + 1)))


def test_killed_again_while_it_recovers(scene: Scene) -> None:
    total = places(scene)
    target = str(scene.workspace.target)
    for number in (total // 2, total * 2 // 3, total * 3 // 4):
        again = 1
        scene.restore()
        assert in_a_child(scene.workspace.merge, KILL, number) == -signal.SIGKILL
        # Each recovery goes on where the one before was killed, and gets a bit further.
        while in_a_child(lambda: recover(target), KILL, again) == -signal.SIGKILL:
            again += 23
        assert scene.outcome() == "nothing"


def test_killed_while_it_keeps_what_cannot_go_back(scene: Scene) -> None:
    total = places(scene)
    target = scene.workspace.target
    for again in range(1, 1000, 19):
        scene.restore()
        number = total * 3 // 4
        while True:
            assert in_a_child(scene.workspace.merge, KILL, number) == -signal.SIGKILL
            if (target / "edited").read_bytes() != b"before":
                break
            number += 3
        (target / "edited").write_bytes(b"theirs")
        (target / "removed").write_bytes(b"theirs as well")
        done = in_a_child(lambda: recover(str(target)), KILL, again)
        with suppress(errors.FailedPrecondition):
            recover(str(target))
        kept = target.parent.glob(".target.onlap-kept-*/*")
        there = sorted(path.read_bytes() for path in kept if path.is_file() and not path.is_symlink())
        assert {b"before", b"gone"} <= set(there), (again, there)
        assert (target / "edited").read_bytes() == b"theirs"
        assert (target / "removed").read_bytes() == b"theirs as well"
        assert not recover(str(target))
        if done != -signal.SIGKILL:
            assert len(there) == 2
            break
    else:
        raise AssertionError("it never ended")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_again_everywhere(scene: Scene) -> None:
    total = places(scene)
    target = str(scene.workspace.target)
    for number in range(total // 3, total + 1, 5):
        for again in range(1, 400, 3):
            scene.restore()
            assert in_a_child(scene.workspace.merge, KILL, number) == -signal.SIGKILL
            done = in_a_child(lambda: recover(target), KILL, again)
            recover(target)
            scene.outcome()
            if done == 0:
                break


def fail_at(scene: Scene, fault: Fault, numbers: list[int]) -> None:
    for number in numbers:
        scene.restore()
        open_before = len(os.listdir("/proc/self/fd"))
        failed = False
        injection = Injection(fault, number)
        try:
            with injection:
                scene.workspace.merge()
        except (errors.OnlapError, MemoryError, RecursionError):  # a public call has its boundary
            failed = True
        try:
            recover(str(scene.workspace.target))
            outcome = scene.outcome()
        except BaseException as error:
            error.add_note(f"{number}: {injection.place}")
            raise
        assert failed or outcome == "all", injection.place
        if fault.anywhere:  # without memory, not every file is closed at once
            assert len(os.listdir("/proc/self/fd")) == open_before, injection.place


def _fault(name: str) -> Fault:
    return FAULTS[name]._replace(comes_from=is_a_system_call) if name.startswith("E") else FAULTS[name]


@pytest.mark.parametrize("name", ["EIO", "EMFILE", "EACCES", "MemoryError"])
def test_errors(scene: Scene, name: str) -> None:
    fault = _fault(name)
    fail_at(scene, fault, spread(count(fault, scene.workspace.merge), 15))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["EIO", "EMFILE", "EACCES", "ESTALE", "MemoryError", "RecursionError"])
def test_errors_everywhere(scene: Scene, name: str) -> None:
    fault = _fault(name)
    fail_at(scene, fault, list(range(1, count(fault, scene.workspace.merge) + 1)))


def interrupt_at(scene: Scene, numbers: Any) -> None:
    for number in numbers:
        scene.restore()
        interrupter = Interrupter(number)
        try:
            with interrupter:
                scene.workspace.merge()
        except KeyboardInterrupt:
            pass
        recover(str(scene.workspace.target))
        scene.outcome()
        if not interrupter.fired:
            break


def test_interrupts(scene: Scene) -> None:
    interrupt_at(scene, range(1, 100_000, 997))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_interrupts_everywhere(scene: Scene) -> None:
    interrupt_at(scene, range(1, 100_000, 11))


@contextmanager
def full(directory: Path) -> Any:
    """A filesystem without free space."""
    filler = directory / "filler"
    size = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    with open(filler, "wb") as file:
        while size >= 4096:
            try:
                file.write(b"x" * size)
                file.flush()
            except OSError:
                size //= 2
    yield
    filler.unlink()


@pytest.mark.needs("ext4")
def test_no_space(scene: Scene, loop_ext4: Callable[[int], Path]) -> None:
    place = loop_ext4(16)
    workspace = scene.workspace
    workspace.change(Tree().file("large", b"x" * 1_000_000))
    copy(workspace.target, place / "target")
    workspace.target = place / "target"
    before: Listing = read_tree(workspace.target)
    with full(place), pytest.raises(errors.ResourceExhausted) as raised:
        workspace.merge()
    assert raised.value.key == str(workspace.target)
    assert not unlike(before, read_tree(workspace.target))
    assert sorted(os.listdir(place)) == ["lost+found", "target"]
    workspace.merge()
    assert not unlike(workspace.wanted(), read_tree(workspace.target))
