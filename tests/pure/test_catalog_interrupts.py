"""KeyboardInterrupt at any bytecode: nobody hangs, nothing stays locked, what was acknowledged is there."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import interrupts
import onlap
from onlap import locks
from onlap.catalog.disk.sync import Syncer
from onlap.syscalls.files import Descriptor

# Every how manieth bytecode: about twenty looks at each call. All of them are for the long run.
_EVERY = {"stat": 11, "prepare": 41, "commit": 67, "remove": 53, "open and close": 389, "fork": 9}
_EVERY |= {"view": 43, "label": 29, "apply": 79, "import": 389, "export": 59, "squash": 397, "cleanup": 293}
_EVERY |= {"mounted": 97, "scratch": 251, "build": 397, "image import": 389, "image commit": 499, "image remove": 97}
_EVERY |= {"ws create": 197, "ws checkpoint": 197, "ws checkpoint within": 397, "ws rollback": 97, "ws fork": 97}
_EVERY |= {"ws forget": 197, "ws remove": 297}
# These mount an overlay.
_MOUNTING = ("mounted", "scratch", "build", "ws checkpoint within")
SCENARIOS = [
    pytest.param(scenario, marks=[pytest.mark.needs("overlay")] if scenario in _MOUNTING else [])
    for scenario in interrupts.SCENARIOS
]

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="tells bytecodes by sys.monitoring, Python 3.12")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interrupt_at_any_moment_is_survived(root: Path, scenario: str) -> None:
    assert interrupts.points(root, scenario, _EVERY[scenario], 50) > 5


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interrupt_at_every_bytecode_is_survived(root: Path, scenario: str) -> None:
    assert interrupts.points(root, scenario, 1, 1800) > 100


@pytest.mark.parametrize("part", ["_janitor.stop", "sidecars.finish", "staging.close", "database.close"])
def test_an_interrupted_close_closes_the_rest(root: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    store = onlap.open(root, snapshotter="native", sync="none")
    store.prepare("key")
    catalog = store.snapshotter.catalog
    name, _, method = part.partition(".")
    interrupted: list[str] = []

    def interrupt() -> None:
        if not interrupted:
            interrupted.append(part)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(getattr(catalog, name), method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.close()
    assert catalog._format_lock.fd == -1
    assert interrupts.descriptors(catalog.layout.snapshots) == []
    assert catalog.staging._claimed == {} or name == "staging"
    assert catalog.database._closed or name == "database"
    store.close()
    assert catalog.staging._claimed == {}
    assert catalog.database._closed


def test_a_thing_that_nobody_closed_is_closed(tmp_path: Path) -> None:
    syncer = Syncer(str(tmp_path))
    assert len(interrupts.descriptors(str(tmp_path))) == 1
    del syncer
    gc.collect()
    assert interrupts.descriptors(str(tmp_path)) == []


class Interrupted:
    """A finalizer that an interrupt keeps from being detached, once."""

    def __init__(self, finalizer: object) -> None:
        self._finalizer = finalizer
        self._interrupts = 1

    def detach(self) -> None:
        if self._interrupts:
            self._interrupts -= 1
            raise KeyboardInterrupt
        self._finalizer.detach()  # type: ignore[attr-defined]


def test_an_interrupt_as_a_descriptor_is_closed(tmp_path: Path) -> None:
    """Its number is soon that of another file, which nothing may close."""
    opened = Descriptor(str(tmp_path), os.O_RDONLY)
    number = opened.fd
    opened._forgotten = Interrupted(opened._forgotten)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        opened.close()
    other = os.open(tmp_path, os.O_RDONLY)
    assert other == number
    del opened
    gc.collect()
    os.close(other)


@pytest.mark.parametrize("step", ["forgotten", "unlocked"])
def test_an_interrupt_as_a_lock_is_given_back(root: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A signal's exception comes as a call ends: each of them that gives a lock back."""

    class Interrupted(dict[int, object]):
        def pop(self, *arguments: object) -> object:
            super().pop(*arguments)  # type: ignore[call-overload]
            raise KeyboardInterrupt

    def unlock(fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)
        raise KeyboardInterrupt

    held = locks.lock_directory(str(root))
    assert held is not None
    with monkeypatch.context() as patch:
        if step == "forgotten":
            patch.setattr(locks, "_open_flocks", Interrupted())
        else:
            patch.setattr(locks, "fcntl", SimpleNamespace(flock=unlock, LOCK_UN=fcntl.LOCK_UN))
        with pytest.raises(KeyboardInterrupt):
            held.release()
    with locks.lock_directory(str(root)) as other:  # type: ignore[union-attr]
        assert other is not None


def test_a_lock_that_nobody_let_go_of_is_given_back(root: Path) -> None:
    held = locks.lock_directory(str(root))
    assert locks.lock_directory(str(root)) is None
    del held
    with locks.lock_directory(str(root)) as other:  # type: ignore[union-attr]
        assert other is not None


def test_nothing_runs_that_could_swallow_an_interrupt_as_a_lock_is_forgotten(root: Path) -> None:
    held = locks.lock_directory(str(root))
    assert held is not None
    held.release()
    ran: list[str] = []
    sys.setprofile(lambda frame, event, _: ran.append(frame.f_code.co_name) if event == "call" else None)
    del held
    sys.setprofile(None)
    assert ran == []
