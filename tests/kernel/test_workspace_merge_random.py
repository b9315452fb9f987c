"""Merges of random changes: the directory ends up as the workspace, or as before with a conflict that is one."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from kernel.merges import Workspace, unlike
from onlap import errors
from onlap.syscalls import files
from onlap.testing import Tree, read_tree
from onlap.testing.same import Listing

pytestmark = pytest.mark.needs("overlay", "mount")

VERBS = ["write", "write", "append", "mkdir", "mkdir", "remove", "rename", "symlink", "chmod", "link"]
NAMES = ["a", "b", "c-\udcff", "a b"]


def change(rng: random.Random, top: Path, count: int) -> None:
    """Some random changes of a tree."""
    for _ in range(count):
        path = top.joinpath(*rng.choices(NAMES, k=rng.randint(1, 3)))
        other = top.joinpath(*rng.choices(NAMES, k=rng.randint(1, 3)))
        verb = rng.choice(VERBS)
        if any(each.is_symlink() for one in (path, other) for each in one.parents if top in each.parents):
            continue  # it would lead out of the tree
        try:
            if verb in ("write", "append") and not path.is_symlink():
                with open(path, "wb" if verb == "write" else "ab") as file:
                    file.write(rng.randbytes(rng.randint(1, 9)))
            elif verb == "mkdir":
                path.mkdir()
            elif verb == "remove" and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif verb == "remove":
                path.unlink()
            elif verb == "rename":
                path.rename(other)
            elif verb == "symlink":
                path.symlink_to(rng.choice(["a", "/", "../..", "nowhere"]))
            elif verb == "chmod" and not path.is_symlink():
                path.chmod(rng.choice([0o644, 0o600, 0o755, 0o4711]) | (0o700 if path.is_dir() else 0))
            elif verb == "link":
                os.link(path, other, follow_symlinks=False)
        except OSError:
            continue  # not possible there


def without_links_and_times(tree: Listing) -> Listing:
    # A copy-up parts the names of a file, and a merge alone of unchanged files does not.
    return {path: node._replace(links=(), times=0) for path, node in tree.items()}


def merge(place: Path, seed: int, theirs: int) -> bool:
    rng = random.Random(seed)
    place.mkdir()
    workspace = Workspace(place, Tree())
    change(rng, workspace.target, 25)
    shutil.rmtree(workspace.base)
    shutil.copytree(workspace.target, workspace.base, symlinks=True)
    with workspace.mounted() as tree:
        change(rng, tree, 15)
    before = read_tree(workspace.base)
    change(rng, workspace.target, theirs)
    there, wanted = read_tree(workspace.target), workspace.wanted()
    plan = workspace.plan()
    try:
        workspace.apply(plan)
        done = True
    except errors.FailedPrecondition:
        assert plan.conflicts
        done = False
    now = without_links_and_times(read_tree(workspace.target))
    one, two = without_links_and_times(before), without_links_and_times(wanted)
    theirs_before = without_links_and_times(there)
    assert not workspace.left()
    if not done:
        assert not unlike(read_tree(workspace.target), there), seed
        assert one != theirs_before, seed
        return False
    # Where the workspace changed something it is as there, elsewhere as the directory was.
    for path in one.keys() | two.keys() | theirs_before.keys() | now.keys():
        expected = two.get(path) if one.get(path) != two.get(path) else theirs_before.get(path)
        assert now.get(path) == expected, (seed, path)
    assert {entry.state for entry in workspace.plan().entries} <= {"same"}, seed
    return True


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the disk takes is no matter here."""
    monkeypatch.setattr(files, "syncfs", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("theirs", [0, 2])
def test_random_changes(root: Path, theirs: int) -> None:
    done = [merge(root / str(seed), seed, theirs) for seed in range(40)]
    assert all(done) if not theirs else any(done) and not all(done)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("theirs", [0, 1, 3])
def test_very_many_random_changes(root: Path, theirs: int) -> None:
    for seed in range(1000, 4000):
        merge(root / str(seed), seed, theirs)
        shutil.rmtree(root / str(seed))
