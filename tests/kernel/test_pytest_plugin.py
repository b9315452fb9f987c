"""The pytest plugin: real runs of pytest, alone and with workers, as whoever runs the tests and as an ordinary user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernel.helpers import NOBODY, SOURCE


class Project:
    """A directory with tests, that pytest is run in.

    Attributes:
        path: of the directory.
        source: a directory with files.
        base: pytest's directory for temporary files.
    """

    def __init__(self, path: Path, *, ordinary: bool = False) -> None:
        self.path = path
        self.source = path / "source"
        self.base = path / "base"
        self.ordinary = ordinary
        (self.source / "d").mkdir(parents=True)
        (self.source / "f").write_text("content")
        (self.source / "d/g").write_text("more")
        # The entry point, as an installed Onlap has it; one of the interpreter's own has the same name.
        installed = path / "installed" / "onlap-0.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: onlap\nVersion: 0\n")
        (installed / "entry_points.txt").write_text("[pytest11]\nonlap = onlap.pytest_plugin\n")
        (path / "pytest.ini").write_text("[pytest]\n")

    def write(self, code: str) -> None:
        head = "import os, pathlib, signal, subprocess, sys, pytest\nSOURCE = pathlib.Path('source')\n"
        (self.path / "test_it.py").write_text(head + code)

    def run(self, *arguments: str) -> str:
        """The output of a run, which leaves nothing mounted, and nothing of ours in its directory."""
        user: dict[str, Any] = {}
        if self.ordinary and os.geteuid() == 0:
            subprocess.run(["chown", "-R", str(NOBODY), str(self.path)], check=True)
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "-W",
                "error",
                f"--basetemp={self.base}",
                *arguments,
            ],
            cwd=self.path,
            env={"PYTHONPATH": f"{SOURCE}:{self.path / 'installed'}", "PATH": os.defpath, "HOME": str(self.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=100,
            **user,
        )
        if self.ordinary and "No module named 'onlap'" in done.stdout:
            pytest.skip("an ordinary user cannot read this checkout")
        assert str(self.path) not in Path("/proc/self/mountinfo").read_text(), done.stdout
        assert not (self.base / "onlap").exists(), done.stdout
        return done.stdout


@pytest.fixture
def project(root: Path) -> Project:
    return Project(root)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.needs("ordinary_user"))], ids=["self", "ordinary"])
def anybodys(request: pytest.FixtureRequest, root: Path) -> Project:
    """A project of whoever runs the tests, and one of an ordinary user."""
    if request.param:
        return Project(request.getfixturevalue("ordinary"), ordinary=True)
    return Project(root)


ISOLATED = """
@pytest.mark.parametrize("number", range(12))
def test_own(overlay_tree, overlay_store, number):
    tree = overlay_tree(SOURCE)
    assert sorted(os.listdir(tree)) == ["d", "f"]
    (tree / "f").write_text(str(number))
    (tree / "d/g").unlink()
    other = overlay_tree(SOURCE)
    assert (other / "f").read_text() == "content" and (other / "d/g").exists()
    assert subprocess.check_output(["pwd", "-P"], cwd=tree, text=True).strip() == os.path.realpath(tree)
    os.chdir(tree)
    captures = overlay_store.workspaces._site.snapshotter.walk()
    assert len([info for info in captures if info.name.startswith("capture/")]) == 1
"""


@pytest.mark.parametrize("workers", ["0", "4"])
def test_each_test_has_a_tree_of_its_own_and_the_source_is_captured_once(anybodys: Project, workers: str) -> None:
    anybodys.write(ISOLATED)
    out = anybodys.run("-n", workers)
    assert "12 passed" in out, out


@pytest.mark.needs("overlay")
def test_a_run_says_how_its_trees_are_made(anybodys: Project) -> None:
    anybodys.write("def test_it(overlay_tree): overlay_tree(SOURCE)\ndef test_other(): pass\n")
    made = "copies, since this process may not mount" if anybodys.ordinary else "overlays"
    assert f"onlap: trees are {made}" in anybodys.run()
    assert "onlap" not in anybodys.run("-k", "other", "-q").replace(str(anybodys.path), "")


def test_a_source_that_changed_is_captured_again(project: Project) -> None:
    project.write("""
def test_first(overlay_tree):
    assert (overlay_tree(SOURCE) / "f").read_text() == "content"
    (SOURCE / "f").write_text("changed content")
def test_second(overlay_tree):
    assert (overlay_tree(SOURCE) / "f").read_text() == "changed content"
    assert not (overlay_tree(SOURCE, exclude=["f"]) / "f").exists()
""")
    assert "2 passed" in project.run()


def test_a_snapshot_is_a_source_too(project: Project) -> None:
    project.write("""
@pytest.fixture(scope="session")
def prepared(overlay_store):
    with overlay_store.build("prepared") as tree:
        (tree / "file").write_text("text")
    return "prepared"
def test_it(overlay_tree, prepared):
    assert (overlay_tree(prepared) / "file").read_text() == "text"
def test_none(overlay_tree):
    overlay_tree("none")
""")
    out = project.run()
    assert "1 failed, 1 passed" in out, out
    assert "there is no snapshot and no image none" in out


def test_a_process_that_is_left_in_a_tree_fails_the_test_and_is_named(anybodys: Project) -> None:
    anybodys.write("""
def test_leaving(overlay_tree, request):
    child = subprocess.Popen(["sleep", "1000"], cwd=overlay_tree(SOURCE))
    print(f"child={child.pid}=")
    pathlib.Path("pid").write_text(str(child.pid))
def test_after(overlay_tree):
    tree = overlay_tree(SOURCE)
    assert (tree / "f").read_text() == "content"
    os.kill(int(pathlib.Path("pid").read_text()), signal.SIGKILL)
    os.waitpid(int(pathlib.Path("pid").read_text()), 0)
""")
    out = anybodys.run("-W", "ignore::ResourceWarning", "-W", "ignore::pytest.PytestUnraisableExceptionWarning")
    assert "2 passed, 1 error" in out, out
    assert "processes were left in the trees of this test" in out
    assert f"pid {(anybodys.path / 'pid').read_text()}" in out


@pytest.mark.parametrize("where", ["in the test", "while it captures"])
def test_a_killed_worker_leaves_nothing_and_the_others_go_on(project: Project, where: str) -> None:
    capturing = """
@pytest.fixture(autouse=True)
def killed_once(overlay_store, monkeypatch):
    try:
        (pathlib.Path("killed")).touch(exist_ok=False)
    except FileExistsError:
        return
    import onlap.workspaces.capture.passes as passes
    monkeypatch.setattr(passes.Passes, "run", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
"""
    in_test = """
@pytest.mark.parametrize("number", range(8))
def test_more(overlay_tree, number):
    tree = overlay_tree(SOURCE)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    project.write(ISOLATED.replace("== 1", "<= 2") + (capturing if where == "while it captures" else in_test))
    out = project.run("-n", "3")
    passed = 11 if where == "while it captures" else 19
    assert f"1 failed, {passed} passed" in out, out
    assert "worker 'gw" in out


def test_a_run_that_uses_no_tree_loads_nothing(project: Project) -> None:
    project.write("""
def test_it(tmp_path):
    loaded = {name for name in sys.modules if name.startswith("onlap")}
    assert loaded == {"onlap", "onlap._version", "onlap.pytest_plugin"}
    assert "sqlite3" not in sys.modules and "asyncio" not in loaded
""")
    assert "1 passed" in project.run()


def test_a_failed_session_leaves_nothing(project: Project) -> None:
    project.write("""
@pytest.fixture(scope="session")
def shared(overlay_store):
    with overlay_store.scratch() as tree:
        yield tree
def test_it(shared, overlay_tree):
    overlay_tree(SOURCE)
    assert 0
def test_never(): pass
""")
    out = project.run("-x")
    assert "1 failed" in out, out
    assert "error" not in out.rpartition("\n=")[2], out


def test_the_guide(project: Project) -> None:
    (project.path / "fixtures" / "site" / "pages").mkdir(parents=True)
    (project.path / "fixtures" / "site" / "pages" / "home").write_text("home\n")
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "fixtures.md"
    project.write("".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)))
    assert "22 passed" in project.run()
