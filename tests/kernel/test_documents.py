"""What the documents show works as shown."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onlap.serve.containerd.status import CODES

TOP = Path(__file__).resolve().parents[2]
PAGES = sorted(page.relative_to(TOP) for page in (TOP / "docs").rglob("*.md"))
# What verbs that run a command say there: a summary, and changes by path or as a patch.
ON_STDERR = (
    "onlap: ",
    "  A ",
    "  C ",
    "  D ",
    "A /",
    "C /",
    "D /",
    "diff --git",
    "deleted",
    "index",
    "---",
    "+++",
    "@@",
    "-",
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: str, language: str) -> list[str]:
    """The code of one language that a document shows."""
    return [code for found, code in FENCE.findall((TOP / document).read_text()) if found == language]


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``onlap`` is this checkout's, and ``HOME`` is nobody's."""
    command = tmp_path / "bin" / "onlap"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m onlap "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": str(TOP / "src"), "TMPDIR": str(tmp_path)}


@pytest.mark.needs("overlay")
def test_the_python_of_the_readme(tmp_path: Path, shell: dict[str, str]) -> None:
    code = blocks("README.md", "python")[1]
    moved = code.replace("/tmp/onlap-example", str(tmp_path / "root"))
    done = subprocess.run(
        [sys.executable, "-c", moved], cwd=TOP, env=shell, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("A hello.py\n", "", 0)


@pytest.mark.needs("overlay")
def test_the_workspace_of_the_readme(tmp_path: Path, shell: dict[str, str]) -> None:
    (tmp_path / "repo" / "src").mkdir(parents=True)
    for name in ("README", "bug.py", "src/main.py"):
        (tmp_path / "repo" / name).write_text(f"{name}\n")
    moved = blocks("README.md", "python")[0].replace("/tmp/onlap-example", str(tmp_path / "root"))
    done = subprocess.run(
        [sys.executable, "-c", moved], cwd=tmp_path, env=shell, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("C README\nD src\n", "", 0)
    assert (tmp_path / "repo" / "bug.py").read_text() == "fixed\n"
    assert (tmp_path / "repo" / "README").read_text() == "README\n"


@pytest.mark.needs("overlay")
def test_the_shell_of_the_readme(tmp_path: Path, shell: dict[str, str]) -> None:
    code = next(code for code in blocks("README.md", "sh") if "ONLAP_ROOT" in code)
    (tmp_path / "src").symlink_to(TOP / "src")
    moved = code.replace("/tmp/onlap-example-shell", str(tmp_path / "root"))
    done = subprocess.run(["sh", "-euc", moved], cwd=tmp_path, env=shell, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    assert "A /greeting" in done.stdout
    left = subprocess.run(
        ["onlap", "--root", str(tmp_path / "root"), "ls", "-q"], env=shell, capture_output=True, text=True, check=True
    )
    assert left.stdout == ""


@pytest.mark.needs("overlay")
def test_the_tutorial_in_python() -> None:
    """The examples that follow one another, as one doctest."""
    example = doctest.DocTestParser().get_doctest(
        "".join(blocks("docs/tutorial/library.md", "python")), {}, "library.md", "docs/tutorial/library.md", 0
    )
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert (result.failed, "".join(said)) == (0, "")
    assert result.attempted > 20


@pytest.mark.needs("overlay")
def test_the_tutorial_in_the_shell(tmp_path: Path, shell: dict[str, str]) -> None:
    """What follows a command, up to the next one, is what both streams show."""
    shown = "".join(blocks("docs/tutorial/shell.md", "console"))
    script = re.sub(r"^(?!\$ ).*\n", "", shown, flags=re.MULTILINE)
    script = re.sub(
        r"^\$ (.*)$", lambda line: f"cat <<'__END'\n{line[0]}\n__END\n{line[1]}", script, flags=re.MULTILINE
    )
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", f"exec 2>&1\n{script}"],
        cwd=tmp_path / "work",
        env={**shell, "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == shown.splitlines()
    assert done.returncode == 0


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("page", ["archives", "backup", "fork-trees", "repair", "snapshotter", "space", "unprivileged"])
def test_a_how_to_guide(tmp_path: Path, shell: dict[str, str], page: str) -> None:
    """All of its Python as one program, then its shell, beside a directory "project", which is "base" in the root."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "hello.py").write_text("print('hello')\n")
    environment = {**shell, "ONLAP_ROOT": str(tmp_path / "root")}
    document = f"docs/how-to/{page}.md"

    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    if python := blocks(document, "python"):
        run(sys.executable, "-c", "".join(python))
    run("onlap", "import", "-q", "project", "base")
    run("sh", "-euc", "onlap prepare work base; onlap enter work sh -c 'echo more > NEWS'; onlap commit next work")
    for code in blocks(document, "sh"):
        run("sh", "-euc", code)


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("page", ["agent-sandbox", "parallel-attempts", "try"])
def test_a_guide_to_workspaces(tmp_path: Path, shell: dict[str, str], page: str) -> None:
    """As the other guides; their commands say on stderr what was changed."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "hello.py").write_text("print('hello')\n")
    environment = {**shell, "ONLAP_ROOT": str(tmp_path / "root")}
    document = f"docs/how-to/{page}.md"
    if python := blocks(document, "python"):
        done = subprocess.run(
            [sys.executable, "-c", "".join(python)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    for code in blocks(document, "sh"):
        done = subprocess.run(
            ["sh", "-euc", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert {line for line in done.stderr.splitlines() if not line.startswith(ON_STDERR)} == set()
    left = subprocess.run(["onlap", "ws", "ls", "-q"], env=environment, capture_output=True, text=True, check=True)
    assert left.stdout == ""


@pytest.mark.parametrize("document", PAGES, ids=str)
def test_what_a_document_imports_is_there(document: Path) -> None:
    for code in blocks(str(document), "python"):
        # Of a session only its input is Python.
        prompted = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", code, re.MULTILINE)
        for node in ast.walk(ast.parse("\n".join(prompted) or code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onlap"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    home = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.util.find_spec(home), home


# What others say, in docs/troubleshooting.md.
OTHERS = {
    "Invalid argument",
    "ctr image rm",
    "no unpack platforms defined",
    "parent snapshot sha256:",
    "mount options is too long",
}


def test_the_messages_of_troubleshooting_are_said() -> None:
    """Each quoted message, between the gaps for names, is in the source."""
    said = set()
    for path in (TOP / "src" / "onlap").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    text = "\0".join(said)
    quoted = re.findall(r"\*\*[^*]*\*\*", (TOP / "docs" / "troubleshooting.md").read_text())
    messages = [message for heading in quoted for message in re.findall(r"`([^`]+ [^`]+)`", heading)]
    assert len(messages) > 40
    parts = [part for message in messages for part in re.split(r" ?\.\.\. ?|; ", message)]
    assert [part for part in parts if part not in text and part not in OTHERS] == []


def test_the_codes_of_the_error_kinds_are_those_that_are_sent() -> None:
    table = (TOP / "docs" / "reference" / "errors.md").read_text()
    codes = {kind: int(code) for kind, code in re.findall(r"^\| `(\w+)` \| (\d+) \|", table, re.MULTILINE)}
    # A Busy is sent as a FailedPrecondition, a DigestMismatch as a DataLoss.
    assert codes == {**CODES, "Busy": CODES["FailedPrecondition"], "DigestMismatch": CODES["DataLoss"]}


def test_every_document_that_is_linked_exists() -> None:
    missing = []
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *map(str, PAGES)]:
        text = (TOP / document).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            if not ((TOP / document).parent / target).exists():
                missing.append(f"{document}: {target}")
    assert missing == []
