"""A captured work tree of git: the first status in a fork reads no more files than in the original."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import onlap
from gits import age, git, repository, unsure
from kernel.helpers import output
from onlap.store import Store

pytestmark = pytest.mark.needs("overlay", "peer:git")


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with onlap.open(root / "overlay", snapshotter="overlay", sync="none") as opened:
        yield opened


def in_fork(store: Store, name: str) -> tuple[list[str], str]:
    """The files of which git is unsure in a fork, and then its status."""
    with store.scratch(name) as tree:
        return unsure(tree), git(tree, "status", "--porcelain")


@pytest.mark.parametrize("sha256", [False, True], ids=["sha1", "sha256"])
@pytest.mark.parametrize("version", ["2", "4"])
def test_no_file_need_be_read_in_a_fork(store: Store, root: Path, version: str, sha256: bool) -> None:
    at = repository(root / "r", {"index.version": version}, sha256=sha256)
    store.import_(at, "imported")
    assert len(in_fork(store, "imported")[0]) == 10
    store.capture(at, "base")
    assert in_fork(store, "base") == ([], "")
    assert unsure(at) == []  # and the original is as it was


def test_what_changed_is_seen(store: Store, root: Path) -> None:
    at = repository(root / "r")
    (at / "a").write_text("longer than it was")
    (at / "d/h").unlink()
    (at / "new").write_text("")
    status = git(at, "status", "--porcelain")
    store.capture(at, "base")
    assert in_fork(store, "base") == (["a", "d/h"], status)
    assert len(status.splitlines()) == 3


def test_an_edit_that_restores_size_and_time_is_seen(store: Store, root: Path) -> None:
    at = repository(root / "r")
    before = os.stat(at / "a")
    (at / "a").write_text("CONTENT OF a\n")
    os.utime(at / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    store.capture(at, "base")
    assert in_fork(store, "base") == (["a"], " M a\n")


def test_an_edit_in_the_fork_is_seen(store: Store, root: Path) -> None:
    at = repository(root / "r")
    store.capture(at, "base")
    with store.scratch("base") as tree:
        (tree / "a").write_text("CONTENT OF a\n")
        assert git(tree, "status", "--porcelain") == " M a\n"


def test_racy_files_stay_racy(store: Store, root: Path) -> None:
    at = repository(root / "r")
    index = at / ".git/index"
    # As if a was written in the moment of the add, and again after it.
    (at / "a").write_text("content of A\n")
    age(at)
    os.utime(index, ns=(os.stat(at / "a").st_mtime_ns, os.stat(at / "a").st_mtime_ns))
    store.capture(at, "base")
    assert in_fork(store, "base")[1] == " M a\n"


def test_again_after_commits(store: Store, root: Path) -> None:
    at = repository(root / "r")
    last = store.capture(at, "n0").name
    for number in range(1, 4):
        (at / "a").write_text("x" * number)
        (at / f"new{number}").write_text("")
        age(at)
        git(at, "add", ".")
        git(at, "commit", "-qm", "next")
        git(at, "status")  # takes up the other files' new ctimes
        if number == 2:
            git(at, "mv", "d", "e")
            git(at, "commit", "-qm", "moved")
        last = store.capture(at, f"n{number}", onto=last).name
        assert in_fork(store, last) == ([], "")


def test_repositories_in_repositories(store: Store, root: Path) -> None:
    at = repository(root / "r")
    inner = repository(at / "vendor/inner")
    store.capture(root / "r", "base")
    with store.scratch("base") as tree:
        assert unsure(tree) == []
        assert unsure(tree / "vendor/inner") == []
    (inner / "a").write_text("1")
    age(at)
    git(inner, "commit", "-qam", "next")
    git(inner, "status")
    store.capture(at, "next", onto="base")
    with store.scratch("next") as tree:
        assert unsure(tree / "vendor/inner") == []


def test_an_index_that_has_other_names_or_is_none_stays(store: Store, root: Path) -> None:
    at = repository(root / "r")
    other = root / "r/other/.git"
    other.mkdir(parents=True)
    (other / "index").write_text("DIRC and something else")
    os.link(at / ".git/index", at / "kept")
    expected = (at / "kept").read_bytes()
    store.capture(at, "base")
    with store.mounted("base") as tree:
        assert (tree / "kept").read_bytes() == expected
        assert (tree / "other/.git/index").read_text() == "DIRC and something else"


def test_a_commit_in_a_workspace_is_merged_back(store: Store, root: Path) -> None:
    at = repository(root / "r")
    workspace = store.workspaces.create("w", at)
    with workspace.mounted() as tree:
        (tree / "a").write_text("more than it was")
        git(tree, "commit", "-qam", "more")
    os.utime(at / "d/h")
    git(at, "status")  # takes up the new time
    workspace.merge()
    assert git(at, "log", "--format=%s") == "more\nfirst\n"
    assert git(at, "status", "--porcelain") == ""


def test_an_add_in_the_target_is_a_conflict(store: Store, root: Path) -> None:
    at = repository(root / "r")
    workspace = store.workspaces.create("w", at)
    with workspace.mounted() as tree:
        (tree / "a").write_text("more than it was")
        git(tree, "add", "a")
    (at / "a-b").write_text("other")
    git(at, "add", "a-b")
    assert [entry.path for entry in workspace.merge_plan().entries if entry.state == "conflict"] == [".git/index"]


AS_USER = """
import os, sys
from pathlib import Path
import onlap
sys.path.insert(0, sys.argv[2])
from gits import git, repository
at = repository(Path(sys.argv[1]) / "r")
with onlap.open(Path(sys.argv[1]) / "root", snapshotter="overlay", sync="none") as store:
    store.capture(at, "base")
    with store.scratch("base") as tree:
        # The path of the tree leads through a descriptor, where git finds no work tree.
        (at / ".git/index").write_bytes((tree / ".git/index").read_bytes())
        status = os.lstat(tree / "d/h")
        seconds, rest = divmod(status.st_ctime_ns, 10**9)
        print(f"ctime: {seconds}:{rest}" in git(at, "ls-files", "--debug", "d/h"))
        print(f"ino: {status.st_ino}\\n" in git(at, "ls-files", "--debug", "d/h"))
"""


@pytest.mark.needs("ordinary_user")
def test_an_ordinary_user(ordinary: Path) -> None:
    assert output(AS_USER, ordinary, Path(__file__).parent.parent, ordinary=True) == "True\nTrue\n"
