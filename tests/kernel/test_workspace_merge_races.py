"""A merge into a directory that somebody changes meanwhile: all of it or nothing, and no edit of theirs is lost."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import sys
import threading
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from faults import Injection, spread
from kernel.merges import KILL, Scene, count, places, scene, unlike
from onlap import errors
from onlap.testing import read_tree

__all__ = ["scene"]

pytestmark = [
    pytest.mark.needs("overlay", "mount"),
    pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came with Python 3.12"),
]


class Meddler(Injection):
    """Does something in the target before the nth system call of a ``with`` block."""

    def __init__(self, act: Callable[[], None], number: int) -> None:
        super().__init__(KILL, 0)
        self._act = act
        self._at = number

    def _called(self, code: types.CodeType, offset: int, called: object, argument: object) -> object:
        before = self.count
        done = super()._called(code, offset, called, argument)
        if self.count == self._at and before != self.count:
            self._act()
        return done


class Editor:
    """Somebody who edits a path of the target, in one of the ways in which programs do that.

    Args:
        target: the directory.
        path: what is edited.
        way: how.
    """

    def __init__(self, target: Path, path: str, way: str) -> None:
        self._path = target / path
        self._way = way
        self._open: int = -1
        self.token = b""

    def edit(self) -> None:
        """Edit, or begin to."""
        token = b"theirs-" + self._way.encode()
        try:
            if self._way == "in place":
                with open(self._path, "r+b") as file:
                    file.write(token)
            elif self._way == "saved anew":
                new = self._path.with_name("theirs~")
                new.write_bytes(token)
                new.rename(self._path)
            elif self._way == "removed":
                self._path.unlink()
                token = b""
            elif self._way == "made":
                with open(self._path, "xb") as file:
                    file.write(token)
            elif self._way == "written later":
                self._open = os.open(self._path, os.O_WRONLY)
            elif self._way == "mapped":
                fd = os.open(self._path, os.O_RDWR)
                self._map = mmap.mmap(fd, 6)
                os.close(fd)
            elif self._way == "below":
                (self._path / "theirs").write_bytes(token)
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            return
        self.token = token

    def end(self) -> None:
        """End what was begun."""
        if self._open >= 0:
            os.write(self._open, self.token)
            os.close(self._open)
        if self._way == "mapped" and self.token:
            self.token = b"mapped"
            self._map[:6] = self.token
            self._map.close()


EDITS = [
    ("edited", "in place"),
    ("edited", "saved anew"),
    ("edited", "removed"),
    ("edited", "written later"),
    ("edited", "mapped"),
    ("removed", "in place"),
    ("removed", "written later"),
    ("removed", "made"),
    ("to-directory", "in place"),
    ("to-directory", "below"),
    ("to-directory/inside", "in place"),
    ("to-directory/theirs", "made"),
    ("to-file", "below"),
    ("to-file", "in place"),
    ("gone", "below"),
    ("gone/inside", "saved anew"),
    ("gone/inside", "in place"),
    ("new", "made"),
    ("new", "below"),
    ("new/file", "written later"),
    ("pointer", "saved anew"),
    ("attributes", "below"),
]


def is_there(place: Path, token: bytes) -> bool:
    """Whether any file holds it."""
    for directory, _, names in os.walk(place):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink() and token in path.read_bytes():
                return True
    return False


def meddle(scene: Scene, path: str, way: str, number: int, *, doomed: bool = False) -> bool:
    """Merge, with an edit at a point; whether the merge was done. A doomed one fails as its last step."""
    scene.restore()
    workspace = scene.workspace
    plan = workspace.plan()
    writer = os.open(workspace.target / "removed", os.O_WRONLY) if doomed else -1
    editor = Editor(workspace.target, path, way)
    failure = None
    with Meddler(editor.edit, number):
        try:
            workspace.apply(plan)
        except errors.OnlapError as error:
            failure = error
    editor.end()
    if doomed:
        os.close(writer)
    note = f"{path} {way} before call {number}: {failure}"
    place = workspace.target.parent
    assert not editor.token or is_there(place, editor.token), note
    assert failure is None or isinstance(failure, errors.FailedPrecondition), note
    # What they did not touch is as before, or as in the workspace.
    theirs = {os.fsencode(path), b"theirs~"}
    top = os.fsencode(path.partition("/")[0])
    now = {p: n for p, n in read_tree(workspace.target).items() if p not in theirs and p.partition(b"/")[0] != top}
    tree = scene.after if failure is None else scene.before
    wanted = {p: n for p, n in tree.items() if p in now or (p not in theirs and p.partition(b"/")[0] != top)}
    assert not unlike(now, wanted), note
    kept = [name for name in workspace.left() if "-kept-" in name]
    assert workspace.left() == kept, note
    assert not kept or (failure is not None and kept[0] in str(failure)), note
    assert not editor.token or kept or is_there(workspace.target, editor.token) or way in ("written later", "mapped")
    return failure is None


def test_edits(scene: Scene) -> None:
    total = places(scene)
    done = [meddle(scene, path, way, number) for path, way in EDITS for number in spread(total, 4)]
    assert 0 < sum(done) < len(done)


def test_edits_of_what_goes_back(scene: Scene) -> None:
    total = places(scene)
    for path, way in EDITS:
        if path != "removed":
            for number in spread(total, 4):
                assert not meddle(scene, path, way, number, doomed=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path, way", EDITS)
def test_edits_everywhere(scene: Scene, path: str, way: str) -> None:
    for number in range(1, places(scene) + 1):
        meddle(scene, path, way, number)
        meddle(scene, path, way, number, doomed=True)


def race(scene: Scene, seed: int) -> bool:
    """One merge beside a thread that edits; whether the merge was done."""
    rng = random.Random(seed)
    scene.restore()
    workspace = scene.workspace
    names = rng.sample(["edited", "removed", "to-directory", "gone/inside"], 2)
    written: dict[str, bytes] = {}
    plan = workspace.plan()
    begin = threading.Barrier(2)
    spins = rng.randrange(20_000)

    def run() -> None:
        begin.wait()
        for _ in range(spins):
            pass
        for number in range(3):
            for name in names:
                token = f"<{seed}-{number}-{name}>".encode()
                path = workspace.target / name
                try:
                    if rng.random() < 0.5:
                        with open(path, "r+b") as file:
                            file.truncate()
                            file.write(token)
                    else:
                        new = path.with_name("theirs~")
                        new.write_bytes(token)
                        new.rename(path)
                except OSError:
                    continue  # it is no file now
                written[name] = token

    thread = threading.Thread(target=run)
    thread.start()
    begin.wait()
    failure = None
    try:
        workspace.apply(plan)
    except errors.OnlapError as error:
        failure = error
    thread.join()
    for name, token in written.items():
        assert is_there(workspace.target.parent, token), f"{seed}: {name}: {failure}"
    now = read_tree(workspace.target)
    tree = scene.after if failure is None else scene.before
    tops = {name.partition("/")[0].encode() for name in names}
    same = {p: n for p, n in tree.items() if p.partition(b"/")[0] not in tops}
    assert not unlike(same, {p: n for p, n in now.items() if p.partition(b"/")[0] not in {*tops, b"theirs~"}}), seed
    return failure is None


def test_races(scene: Scene) -> None:
    done = [race(scene, seed) for seed in range(30)]
    assert not all(done)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_races(scene: Scene) -> None:
    for seed in range(1000, 6000):
        race(scene, seed)


@pytest.mark.parametrize("path", ["gone", "to-file"])
def test_a_directory_that_is_exchanged_for_a_symlink(scene: Scene, path: str) -> None:
    """Whenever that is, it is a conflict, and nothing else."""
    target = scene.workspace.target
    away = target.parent / "away"

    def exchange() -> None:
        (target / path).rename(away)
        (target / path).symlink_to(away)

    for number in spread(count(KILL, scene.workspace.plan), 40):
        with Meddler(exchange, number), suppress(errors.FailedPrecondition):
            scene.workspace.merge()
        assert not away.exists() or (away / "inside").exists() == (path == "gone")
        scene.restore()
        if away.exists():
            shutil.rmtree(away)
