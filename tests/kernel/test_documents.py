"""What the documents show works as shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
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
    (code,) = blocks("README.md", "python")
    moved = code.replace("/tmp/onlap-example", str(tmp_path / "root"))
    done = subprocess.run(
        [sys.executable, "-c", moved], cwd=TOP, env=shell, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("A hello.py\n", "", 0)


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


def test_every_document_that_is_linked_exists() -> None:
    missing = []
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *map(str, (TOP / "docs").rglob("*.md"))]:
        text = (TOP / document).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            if not ((TOP / document).parent / target).exists():
                missing.append(f"{document}: {target}")
    assert missing == []
