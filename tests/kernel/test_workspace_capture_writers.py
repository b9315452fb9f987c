"""Captures of a directory that a program keeps writing into: what is committed was there at one moment."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onlap
from kernel.helpers import python
from onlap import errors
from onlap.store import Store
from onlap.workspaces.capture.scan import Scan, Scanner

pytestmark = pytest.mark.needs("overlay")

FILES = 12

# Writes generation after generation: each file, in their order, by a rename or in place; now and then it pauses. Each
# write is one write(2), so that no file is ever half written. A directory comes and goes.
WRITER = """
import os, random, sys, time
from pathlib import Path
source, count = Path(sys.argv[1]), int(sys.argv[3])
chance = random.Random(int(sys.argv[2]))
for number in range(count):
    (source / f"f{number}").write_bytes(b"%09d\\n" % 0 * (1 << 6 + number))
print(flush=True)
generation = 0
while True:
    generation += 1
    for number in range(count):
        path = source / f"f{number}"
        content = b"%09d\\n" % generation * (1 << 6 + number)
        if chance.random() < 0.5:
            (source / "new").write_bytes(content)
            os.rename(source / "new", path)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.pwrite(fd, content, 0)
            os.close(fd)
        if chance.random() < 0.1:
            time.sleep(chance.random() / 20)
    if generation % 2:
        os.mkdir(source / "d")
        (source / "d/f").write_bytes(content)
    else:
        os.unlink(source / "d/f")
        os.rmdir(source / "d")
    time.sleep(chance.random() / 10)
"""


@contextmanager
def writing(source: Path, seed: int) -> Iterator[None]:
    with python(WRITER, source, str(seed), str(FILES)) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield
        finally:
            child.kill()


def check_moment(tree: Path) -> int:
    """Check that there was a moment when the directory held this; returns the generation."""
    found = []
    for number in range(FILES):
        path = tree / f"f{number}"
        content = path.read_bytes()
        assert len(content) == 10 << 6 + number
        assert len(set(content.splitlines())) == 1, f"{path.name} is torn"
        found.append(int(content[:9]))
    assert found == sorted(found, reverse=True), found  # they are written one after the other
    assert found[0] - found[-1] <= 1, found
    if (tree / "new").exists():
        content = (tree / "new").read_bytes()
        assert not content or int(content[:9]) == found[0] + (found[0] == found[-1])
    return found[0]


def captures(store: Store, source: Path, count: int, prefix: str = "n") -> tuple[int, int]:
    """Capture so many times; returns how often that succeeded, and how many generations were met."""
    chance = random.Random(count)
    last, met, done = None, set(), 0
    for number in range(count):
        try:
            info = store.capture(source, f"{prefix}{number}", onto=last if chance.random() < 0.9 else None, patience=2)
        except errors.FailedPrecondition:
            continue  # it did not come to rest for so long
        last = info.name
        done += 1
        with store.mounted(info.name) as tree:
            met.add(check_moment(tree))
    return done, len(met)


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "overlay", snapshotter="overlay", sync="none") as opened:
        yield opened


@pytest.fixture
def source(root: Path) -> Path:
    path = root / "source"
    path.mkdir()
    return path


@pytest.mark.parametrize("seed", [1, 2])
def test_no_torn_file_beside_a_writer(store: Store, source: Path, seed: int) -> None:
    with writing(source, seed):
        done, met = captures(store, source, 25)
    assert done > 5
    assert met > 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_torn_file_in_a_thousand_captures(store: Store, source: Path) -> None:
    for seed in range(10):
        with writing(source, seed):
            captures(store, source, 100, f"{seed}-")


def test_a_directory_that_does_not_come_to_rest(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "quiet").write_text("")
    read = Scanner.read
    count = itertools.count()

    def disturbed(self: Scanner, fd: int, prefix: str) -> Scan:
        found = read(self, fd, prefix)
        (source / "busy").write_text(f"{next(count)}")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "read", disturbed)
        with pytest.raises(errors.FailedPrecondition, match=r"busy keeps changing") as caught:
            store.capture(source, "base", patience=0.2)
    assert caught.value.key == "busy"
    assert list(store.walk()) == []  # nothing is left
    store.capture(source, "base", patience=0.2)
